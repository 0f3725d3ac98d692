//! `pageferry watch` holds a shutdown back until its actions are over: a real systemd-logind on a bus of its own. Only
//! PID 1, which logind asks to bring the host down, is a stand-in.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::gate::{need, root};
use testbed::logind::{Bus, Logind, Programs};
use testbed::process::Spawned;
use testbed::test_dir::{TestDir, with_test_dir};
use testbed::wait::{self, GENEROUS};
use testbed::workspace::binary;

/// Longer than any test: what ends the wait is never logind's limit.
const DELAY_S: u32 = 3600;

/// What logind lists while a shutdown would wait.
const OURS: &str = "shutdown by pageferry (delay)";

fn with_programs(test: impl FnOnce(&TestDir, &Programs) -> Result<()>) {
    if root().is_none() {
        return;
    }
    let fetched = Programs::fetched().map_err(|error| format!("{error:#}"));
    if let Some(programs) = need("systemd-logind and dbus-daemon", fetched) {
        with_test_dir(|test_dir| test(test_dir, &programs));
    }
}

fn watch(test_dir: &TestDir, address: &str, rules: &str, more: &[&str]) -> Result<Spawned> {
    fs::write(test_dir.path("rules.toml"), rules)?;
    let log = test_dir.path("watch.log");
    let mut command = Command::new(binary("pageferry")?);
    command
        .args(["watch", "--interval", "20ms", "--rules"])
        .arg(test_dir.path("rules.toml"))
        .arg("--state")
        .arg(test_dir.path("state.json"))
        .args(more)
        .env("DBUS_SYSTEM_BUS_ADDRESS", address)
        .stderr(fs::File::create(&log)?);
    Spawned::start("watch", &mut command, Some(log))
}

fn log_of(test_dir: &TestDir) -> Result<String> {
    Ok(fs::read_to_string(test_dir.path("watch.log"))?)
}

/// Waits until the watcher has logged it `times` times.
fn expect_logged(
    test_dir: &TestDir,
    watcher: &mut Spawned,
    text: &str,
    times: usize,
) -> Result<()> {
    wait::until(text, GENEROUS, || {
        let log = log_of(test_dir)?;
        if log.matches(text).count() >= times {
            return Ok(Some(()));
        }
        match watcher.ended()? {
            Some(ended) => bail!("{}: {log}", ended.status),
            None => Ok(None),
        }
    })
}

fn expect_inhibitors(logind: &Logind, expected: &[&str]) -> Result<()> {
    wait::until("the inhibitors", GENEROUS, || {
        Ok((logind.inhibitors()? == expected).then_some(()))
    })
}

fn lines(path: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(path).unwrap_or_default();
    Ok(text.lines().map(str::to_owned).collect())
}

fn expect_lines(path: &Path, count: usize) -> Result<()> {
    wait::until("what the action writes", GENEROUS, || {
        Ok((lines(path)?.len() == count).then_some(()))
    })
}

/// A process that an action leaves behind, and whose pid it writes to this file. It is ended on drop.
struct LeftBehind(PathBuf);

impl LeftBehind {
    /// Ends it, and takes the file away.
    fn end(&self) -> Result<()> {
        let pid = fs::read_to_string(&self.0)?.trim().parse()?;
        fs::remove_file(&self.0)?;
        Ok(kill(Pid::from_raw(pid), Signal::SIGKILL)?)
    }
}

impl Drop for LeftBehind {
    fn drop(&mut self) {
        if self.0.exists()
            && let Err(error) = self.end()
        {
            eprintln!("ending the process of {}: {error:#}", self.0.display());
        }
    }
}

#[test]
fn a_shutdown_waits_until_its_actions_are_over() {
    with_programs(|test_dir, programs| {
        let logind = Logind::start(programs, test_dir.dir(), DELAY_S)?;
        let (ran, go) = (test_dir.path("ran"), test_dir.path("go"));
        let left = LeftBehind(test_dir.path("left"));
        let (ran_at, go_at, left_at) = (ran.display(), go.display(), left.0.display());
        // A process that an action leaves behind must not hold the host up.
        let rules = format!(
            r#"
            [[rule]]
            name = "away"
            target = "web"
            when.shutdown.delay = "1m"
            action.exec.command = """
            sleep 1000000 & echo $! > '{left_at}'
            echo away >> '{ran_at}'; until [ -e '{go_at}' ]; do sleep 0.02; done; echo over >> '{ran_at}'
            """

            [[rule]]
            name = "then"
            target = "web"
            when.shutdown = {{}}
            action.exec.command = "echo then >> '{ran_at}'"
            "#
        );
        let mut watcher = watch(test_dir, &logind.address(), &rules, &[])?;
        expect_logged(test_dir, &mut watcher, "2 rules are watched", 1)?;
        expect_inhibitors(&logind, &[OURS])?;
        // Another round follows a shutdown that was given up.
        for round in 1..=2 {
            logind.power_off()?;
            expect_lines(&ran, (round - 1) * 3 + 1)?;
            expect_inhibitors(&logind, &[OURS])?;
            ensure!(!logind.is_down(), "it did not wait");
            fs::write(&go, "")?;
            logind.expect_down()?;
            let order = lines(&ran)?;
            ensure!(
                order[order.len() - 3..] == ["away", "over", "then"],
                "{order:?}"
            );
            expect_logged(test_dir, &mut watcher, "the host may go down", round)?;
            expect_inhibitors(&logind, &[])?;
            left.end()?;
            fs::remove_file(&go)?;
            logind.cancel()?;
            expect_logged(test_dir, &mut watcher, "the host does not go down", round)?;
            expect_inhibitors(&logind, &[OURS])?;
        }
        watcher.signal(Signal::SIGTERM)?;
        watcher.succeed(GENEROUS)?;
        expect_inhibitors(&logind, &[])
    });
}

#[test]
fn a_dry_run_holds_nothing_back_and_rules_without_a_shutdown_let_go() {
    with_programs(|test_dir, programs| {
        let logind = Logind::start(programs, test_dir.dir(), DELAY_S)?;
        let ran = test_dir.path("ran");
        let rules = format!(
            "[[rule]]\nname = \"away\"\nwhen.shutdown = {{}}\naction.exec.command = \"echo a >> '{}'\"\n",
            ran.display()
        );
        let mut watcher = watch(test_dir, &logind.address(), &rules, &[])?;
        expect_inhibitors(&logind, &[OURS])?;
        let others = rules.replace("when.shutdown = {}", "when.file.path = \"/nonexistent\"");
        fs::write(test_dir.path("rules.toml"), others)?;
        watcher.signal(Signal::SIGHUP)?;
        expect_inhibitors(&logind, &[])?;
        // What cannot be kept changes nothing.
        let long = rules.replace("when.shutdown = {}", "when.shutdown.delay = \"2h\"");
        fs::write(test_dir.path("rules.toml"), long)?;
        watcher.signal(Signal::SIGHUP)?;
        expect_logged(test_dir, &mut watcher, "the rules stay as they were", 1)?;
        watcher.signal(Signal::SIGTERM)?;
        watcher.succeed(GENEROUS)?;

        let mut watcher = watch(test_dir, &logind.address(), &rules, &["--dry-run"])?;
        expect_logged(test_dir, &mut watcher, "1 rules are watched", 1)?;
        ensure!(logind.inhibitors()?.is_empty());
        logind.power_off()?;
        logind.expect_down()?;
        expect_logged(test_dir, &mut watcher, "would now", 1)?;
        ensure!(lines(&ran)?.is_empty(), "a dry run does nothing");
        Ok(())
    });
}

#[test]
fn what_is_in_the_way_is_told() {
    with_programs(|test_dir, programs| {
        let rules = "[[rule]]\nname = \"away\"\nwhen.shutdown.delay = \"2h\"\naction.exec.command = \"true\"\n";
        let refused = |address: &str, words: &[&str]| -> Result<()> {
            let mut watcher = watch(test_dir, address, rules, &[])?;
            watcher.fail(GENEROUS)?;
            let log = log_of(test_dir)?;
            let is_told = words.iter().all(|word| log.contains(word));
            ensure!(is_told && log.contains("rule \"away\""), "{words:?}: {log}");
            Ok(())
        };
        let nowhere = format!("unix:path={}", test_dir.path("nowhere").display());
        refused(&nowhere, &["the system bus of D-Bus", "nowhere"])?;
        let bus = Bus::start(programs, test_dir.dir())?;
        refused(
            &bus.address(),
            &["systemd-logind", "org.freedesktop.login1"],
        )
        .with_context(|| bus.log())?;
        drop(bus);
        let logind = Logind::start(programs, test_dir.dir(), DELAY_S)?;
        let words = ["3600 s at most", "7200 s", "InhibitDelayMaxSec=7200"];
        refused(&logind.address(), &words)
    });
}
