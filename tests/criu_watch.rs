//! `pageferry watch` with real pressure, real control groups, a real migration, and restarts.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use testbed::agent::Agent;
use testbed::criu::{Criu, Suite};
use testbed::gate::{need, root};
use testbed::load::Load;
use testbed::load::scenarios::verifying;
use testbed::load::spec::LoadSpec;
use testbed::process::Spawned;
use testbed::suite::with_criu;
use testbed::test_dir::{TestDir, with_test_dir};
use testbed::wait::{self, GENEROUS};
use testbed::workspace::binary;

/// Where version 2 of control groups may be mounted.
const MOUNTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// A control group, removed on drop. Who put processes there ends them before.
struct Group(PathBuf);

impl Group {
    fn new(name: &str) -> Result<Group> {
        let mount = MOUNTS
            .iter()
            .find(|mount| Path::new(mount).join("cgroup.procs").is_file());
        let mount = mount.context("no control groups of version 2 are mounted")?;
        let unique = format!("pageferry-watch-{name}-{}", std::process::id());
        let path = Path::new(mount).join(unique);
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        let group = Group(path);
        ensure!(
            group.0.join("cpu.pressure").is_file(),
            "this kernel has no PSI"
        );
        Ok(group)
    }

    /// A command of a shell that runs in it.
    fn run(&self, name: &str, command: &str) -> Result<Spawned> {
        let procs = self.0.join("cgroup.procs");
        let text = format!("echo $$ > '{}' && {command}", procs.display());
        Spawned::start(name, Command::new("sh").args(["-c", &text]), None)
    }

    fn event(&self, line: &str) -> Result<bool> {
        let text = fs::read_to_string(self.0.join("cgroup.events"))?;
        Ok(text.lines().any(|found| found == line))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // What a failed test has left in it.
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        let removed = wait::undisturbed("the group to be empty", GENEROUS, || {
            Ok(fs::remove_dir(&self.0).ok())
        });
        if let Err(error) = removed {
            eprintln!("removing {}: {error:#}", self.0.display());
        }
    }
}

fn watch(test_dir: &TestDir, name: &str, rules: &str, more: &[&str]) -> Result<Spawned> {
    fs::write(test_dir.path("rules.toml"), rules)?;
    let log = test_dir.path(&format!("{name}.log"));
    let mut command = Command::new(binary("pageferry")?);
    command
        .args(["watch", "--interval", "20ms", "--rules"])
        .arg(test_dir.path("rules.toml"))
        .arg("--state")
        .arg(test_dir.path("state.json"))
        .args(more)
        .stderr(fs::File::create(&log)?);
    Spawned::start(name, &mut command, Some(log))
}

/// Waits until the watcher has logged it.
fn expect_logged(watcher: &mut Spawned, text: &str) -> Result<()> {
    wait::until(text, GENEROUS, || {
        let log = log_of(watcher)?;
        if log.contains(text) {
            return Ok(Some(()));
        }
        match watcher.ended()? {
            Some(ended) => bail!("{}: {log}", ended.status),
            None => Ok(None),
        }
    })
}

fn log_of(watcher: &Spawned) -> Result<String> {
    Ok(fs::read_to_string(watcher.log().context("a log")?)?)
}

fn lines(path: &Path) -> usize {
    fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

/// The group of a test, if this kernel has such.
fn group(name: &str) -> Option<Group> {
    let group = Group::new(name).map_err(|error| format!("{error:#}"));
    need("control groups with PSI", group)
}

fn with_group(name: &str, test: impl FnOnce(&TestDir, &Group) -> Result<()>) {
    if root().is_none() {
        return;
    }
    if let Some(group) = group(name) {
        with_test_dir(|test_dir| test(test_dir, &group));
    }
}

/// Three for one processor: two of them wait at any time.
fn press(group: &Group) -> Result<Vec<Spawned>> {
    let busy = "exec taskset -c 0 sh -c 'while :; do :; done'";
    (0..3).map(|_| group.run("busy", busy)).collect()
}

/// The rule, both sides and the end are told under one name.
fn expect_one_log(path: &Path) -> Result<()> {
    let events = testbed::agent::read_events(path, 0)?;
    let found: BTreeSet<String> = events
        .iter()
        .map(|event| format!("{} {} {}", event["program"], event["step"], event["state"]))
        .collect();
    for wanted in [
        r#""watch" "rule" "note""#,
        r#""watch" "rule" "done""#,
        r#""migrate" "preflight" "done""#,
        r#""agent" "restore" "done""#,
        r#""migrate" "end" "done""#,
    ] {
        ensure!(found.contains(wanted), "{wanted} is not in {found:#?}");
    }
    let names: BTreeSet<&str> = events
        .iter()
        .map(|event| event["migration"].as_str().unwrap_or_default())
        .collect();
    ensure!(names.len() == 1 && !names.contains(""), "{names:?}");
    Ok(())
}

#[test]
fn pressure_moves_a_tree_to_another_host() {
    with_criu(Suite::Sid, |test_dir: &TestDir, criu: &Criu| {
        let Some(group) = group("moves") else {
            return Ok(());
        };
        let mut load = Load::start(LoadSpec::tree(test_dir.path("load"), 8, 2), None)?;
        let agent = Agent::in_test(test_dir, criu, "agent")?;
        let report = test_dir.path("report.json");
        let args = [
            ["--pid", &load.pid().to_string()],
            ["--to", &agent.address().to_string()],
            ["--mode", "cold"],
            [
                "--state-dir",
                &test_dir.path("source").display().to_string(),
            ],
            ["--report", &report.display().to_string()],
            ["--criu", &criu.path.display().to_string()],
        ];
        let rules = format!(
            r#"
            [[rule]]
            name = "pressed"
            when.psi = {{ resource = "cpu", stall = "100ms", window = "2s", cgroup = "{}" }}
            action.migrate.args = {:?}
            "#,
            group.0.display(),
            args.concat()
        );
        let events = test_dir.path("events.jsonl");
        let options = ["--events".to_owned(), events.display().to_string()];
        let mut watcher = watch(
            test_dir,
            "watch",
            &rules,
            &options.each_ref().map(String::as_str),
        )?;
        expect_logged(&mut watcher, "1 rules are watched")?;
        load.expect_running()?;
        let busy = press(&group)?;
        expect_logged(&mut watcher, "pressed: done")?;
        expect_one_log(&events)?;
        drop(busy);
        load.wait_until_gone()?;
        let report: Value = serde_json::from_slice(&fs::read(&report)?)?;
        testbed::schema::expect("migrate-report", &report)?;
        ensure!(report["result"] == "moved", "{report}");
        load.steer(agent.init()?)?;
        for report in load.run_everywhere(&verifying())? {
            report.expect_right()?;
        }
        watcher.signal(Signal::SIGTERM)?;
        watcher.succeed(GENEROUS).map(drop)
    });
}

#[test]
fn pressure_pauses_a_group_and_a_file_resumes_it() {
    with_group("pressure", |test_dir, group| {
        let (cgroup, done) = (group.0.display(), test_dir.path("over"));
        let rules = format!(
            r#"
            [[rule]]
            name = "squeezed"
            target = "web"
            when.psi = {{ resource = "cpu", stall = "100ms", window = "2s", cgroup = "{cgroup}" }}
            action.pause.cgroup = "{cgroup}"

            [[rule]]
            name = "over"
            target = "web"
            when.file.path = "{}"
            action.resume.cgroup = "{cgroup}"
            "#,
            done.display()
        );
        let mut watcher = watch(test_dir, "watch", &rules, &[])?;
        expect_logged(&mut watcher, "2 rules are watched")?;
        ensure!(group.event("frozen 0")?, "nothing has happened yet");
        let busy = press(group)?;
        wait::until("the group to be frozen", GENEROUS, || {
            Ok(group.event("frozen 1")?.then_some(()))
        })?;
        expect_logged(&mut watcher, "web: done")?;
        fs::write(&done, "")?;
        wait::until("the group to go on", GENEROUS, || {
            Ok(group.event("frozen 0")?.then_some(()))
        })?;
        drop(busy);
        watcher.signal(Signal::SIGTERM)?;
        watcher.succeed(GENEROUS).map(drop)
    });
}

#[test]
fn a_group_is_restarted_by_a_word() {
    with_group("restart", |test_dir, group| {
        let (socket, started) = (test_dir.path("socket"), test_dir.path("started"));
        let rules = format!(
            r#"
            [[rule]]
            name = "again"
            when.command.word = "restart"
            cool-down = "1ms"
            [rule.action.restart]
            cgroup = "{}"
            start = "echo started >> '{}'"
            "#,
            group.0.display(),
            started.display()
        );
        let socket_option = socket.display().to_string();
        let mut watcher = watch(test_dir, "watch", &rules, &["--socket", &socket_option])?;
        expect_logged(&mut watcher, "1 rules are watched")?;
        let mut service = group.run("service", "exec sleep 1000000")?;
        wait::until("the service to be there", GENEROUS, || {
            Ok(group.event("populated 1")?.then_some(()))
        })?;
        let mut stream = UnixStream::connect(&socket)?;
        stream.write_all(b"nothing\nrestart\n")?;
        let mut answers = BufReader::new(stream).lines();
        for _ in 0..2 {
            ensure!(answers.next().context("an answer")?? == "ok");
        }
        service.wait(GENEROUS)?;
        expect_logged(&mut watcher, "again: done")?;
        ensure!(lines(&started) == 1);
        ensure!(log_of(&watcher)?.contains("no rule has the command \"nothing\""));
        Ok(())
    });
}

#[test]
fn what_has_fired_is_known_after_a_kill_and_one_action_runs_at_a_time() {
    with_test_dir(|test_dir| {
        let (given, go, ran) = (
            test_dir.path("given"),
            test_dir.path("go"),
            test_dir.path("ran"),
        );
        let rule = |name: &str| {
            format!(
                r#"
                [[rule]]
                name = "{name}"
                target = "one"
                when.file.path = "{}"
                cool-down = "1ms"
                action.exec.command = "echo {name} >> '{}'; while [ ! -e '{}' ]; do sleep 0.05; done; echo end >> '{}'"
                "#,
                given.display(),
                ran.display(),
                go.display(),
                ran.display()
            )
        };
        let rules = rule("first") + &rule("second");
        fs::write(&given, "")?;
        let mut watcher = watch(test_dir, "killed", &rules, &[])?;
        wait::until("the first action", GENEROUS, || {
            Ok((lines(&ran) == 1).then_some(()))
        })?;
        // The pid is written down once the process runs.
        wait::until("the state", GENEROUS, || {
            let state = fs::read_to_string(test_dir.path("state.json")).unwrap_or_default();
            Ok(state.contains("\"pid\"").then_some(state))
        })
        .and_then(|state| testbed::schema::expect("watch-state", &serde_json::from_str(&state)?))?;
        watcher.kill()?;
        // The action goes on, and the second one waits for it.
        let mut watcher = watch(test_dir, "again", &rules, &[])?;
        expect_logged(&mut watcher, "is under way (pid ")?;
        ensure!(lines(&ran) == 1, "the target is busy");
        fs::write(&go, "")?;
        wait::until("both actions", GENEROUS, || {
            Ok((lines(&ran) == 4).then_some(()))
        })?;
        let text = fs::read_to_string(&ran)?;
        ensure!(text == "first\nend\nsecond\nend\n", "{text}");
        expect_logged(&mut watcher, "rule \"second\"")?;
        watcher.signal(Signal::SIGTERM)?;
        watcher.succeed(GENEROUS)?;

        // Both have fired, and the file is still there.
        let mut watcher = watch(test_dir, "third", &(rules + &rule("other")), &["--dry-run"])?;
        expect_logged(&mut watcher, "rule \"other\" would now")?;
        let log = log_of(&watcher)?;
        ensure!(
            !log.contains("\"first\" would") && !log.contains("\"second\" would"),
            "{log}"
        );
        ensure!(lines(&ran) == 4, "a dry run does nothing");
        Ok(())
    });
}

#[test]
fn words_are_heard_after_a_want_of_descriptors() {
    with_test_dir(|test_dir| {
        let (socket, ran) = (test_dir.path("socket"), test_dir.path("ran"));
        let rules = format!(
            "[[rule]]\nname = \"a\"\nwhen.command.word = \"go\"\naction.exec.command = \"echo a >> '{}'\"\n",
            ran.display()
        );
        fs::write(test_dir.path("rules.toml"), rules)?;
        let log = test_dir.path("watch.log");
        let mut command = Command::new("sh");
        command
            .args(["-c", "ulimit -n 40 && exec \"$0\" \"$@\""])
            .arg(binary("pageferry")?)
            .args(["watch", "--rules"])
            .arg(test_dir.path("rules.toml"))
            .arg("--state")
            .arg(test_dir.path("state.json"))
            .arg("--socket")
            .arg(&socket)
            .stderr(fs::File::create(&log)?);
        let mut watcher = Spawned::start("watch", &mut command, Some(log))?;
        expect_logged(&mut watcher, "1 rules are watched")?;
        let silent: Result<Vec<_>, _> = (0..60).map(|_| UnixStream::connect(&socket)).collect();
        expect_logged(&mut watcher, "cannot accept a connection")?;
        ensure!(
            log_of(&watcher)?.contains("ulimit -n"),
            "{}",
            log_of(&watcher)?
        );
        drop(silent?);
        let mut stream = UnixStream::connect(&socket)?;
        stream.write_all(b"go\n")?;
        let answer = BufReader::new(stream).lines().next();
        ensure!(answer.context("an answer")?? == "ok");
        expect_logged(&mut watcher, "a: done")?;
        ensure!(lines(&ran) == 1);
        watcher.signal(Signal::SIGTERM)?;
        watcher.succeed(GENEROUS).map(drop)
    });
}

#[test]
fn rules_with_a_mistake_change_nothing() {
    with_test_dir(|test_dir| {
        let (given, ran) = (test_dir.path("given"), test_dir.path("ran"));
        let good = format!(
            "[[rule]]\nname = \"a\"\nwhen.file.path = \"{}\"\naction.exec.command = \"echo a >> '{}'\"\n",
            given.display(),
            ran.display()
        );
        let bad = good.replace("action.exec.command", "action.exec.comand");
        let mut refused = watch(test_dir, "refused", &bad, &[])?;
        refused.fail(GENEROUS)?;
        let text = log_of(&refused)?;
        ensure!(
            text.contains("line 4 ") && text.contains("comand"),
            "{text}"
        );

        let mut watcher = watch(test_dir, "watch", &good, &[])?;
        expect_logged(&mut watcher, "1 rules are watched")?;
        fs::write(test_dir.path("rules.toml"), &bad)?;
        watcher.signal(Signal::SIGHUP)?;
        expect_logged(&mut watcher, "the rules stay as they were")?;
        fs::write(&given, "")?;
        wait::until("the old rule", GENEROUS, || {
            Ok((lines(&ran) == 1).then_some(()))
        })?;
        Ok(())
    });
}
