//! What happens in a migration is told in one log, on both sides; and where CRIU fails, at the dump or at the restore, the
//! step, the side, CRIU's own line and what to do are told, with the logs of both sides beside the report.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;
use serde_json::Value;
use testbed::agent::{Agent, Move, read_events};
use testbed::criu::Criu;
use testbed::for_each_criu;
use testbed::load::Load;
use testbed::load::spec::LoadSpec;
use testbed::process::{Spawned, run};
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};

for_each_criu!(
    a_migration_is_told_on_both_sides,
    a_dump_that_fails_is_told_with_criu_s_line,
    a_file_that_is_missing_there_is_named,
    a_pid_that_is_taken_there_is_named,
);

fn a_migration_is_told_on_both_sides(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let file = test_dir.path("all.jsonl");
    // Half a line of a program that was killed.
    fs::write(&file, "{\"time_us\":17")?;
    for (mode, steps) in [
        (
            "cold",
            &["source images done", "destination images done"][..],
        ),
        (
            "hybrid",
            &[
                "source round done",
                "destination round done",
                "destination memory done",
            ][..],
        ),
    ] {
        let load = Load::start(
            LoadSpec::tree(test_dir.path(&format!("load-{mode}")), 8, 2),
            None,
        )?;
        let agent = Agent::in_test(test_dir, criu, &format!("agent-{mode}"))?;
        let option = file.display().to_string();
        let moves = Move::new(criu, test_dir.path("source"), mode)
            .with(&["--mode", mode, "--events", &option]);
        let mut command = moves.start(&load, &agent)?;
        command.succeed(GENEROUS).with_context(|| agent.log())?;
        let events = moves.events()?;
        let of_user = read_events(&file, 1)?;
        let of_user = of_user.iter().filter(|event| event["migration"] == mode);
        ensure!(of_user.eq(events.iter()), "the user's file is another");
        for event in &read_events(&agent.dir_of(mode).join("events.jsonl"), 0)? {
            ensure!(events.contains(event), "{event} is missing at the source");
        }
        moves.expect_events(
            &[
                &[
                    "source preflight done",
                    "source plan note",
                    "source begin done",
                    "destination begin done",
                    "source freeze note",
                    "source dump done",
                    "source restore done",
                    "destination restore done",
                    "source commit done",
                    "destination commit done",
                    "destination resume done",
                    "source resume note",
                    "destination end done",
                    "source end done",
                ][..],
                steps,
            ]
            .concat(),
        )?;
    }
    Ok(())
}

/// A tree of a leader of a session, without a terminal.
fn start(name: &str, words: &[&str]) -> Result<Spawned> {
    let mut command = Command::new("setsid");
    command
        .args(words)
        .current_dir("/")
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    Spawned::start_ungrouped(name, &mut command, None)
}

/// What a failure must say.
struct Wanted<'a> {
    step: &'a str,
    side: &'a str,
    /// Of CRIU's line.
    line: &'a str,
    advice: &'a str,
}

/// The message, the report, the logs and the events all say it, and the processes run here.
fn expect_explained(
    (moves, command): (&Move<'_>, &mut Spawned),
    subject: &mut Spawned,
    wanted: &Wanted<'_>,
) -> Result<()> {
    command.fail(GENEROUS)?;
    ensure!(subject.ended()?.is_none(), "the processes have ended");
    let log = command.log_tail();
    let Wanted {
        step,
        side,
        line,
        advice,
    } = wanted;
    let report = moves.report()?;
    ensure!(report["result"] == "rolled back", "{report}");
    let failure = &report["failure"];
    ensure!(
        failure["step"] == *step && failure["side"] == *side,
        "{report:#}"
    );
    let criu = failure["criu"].as_str().context("CRIU's line")?;
    ensure!(criu.contains("Error (") && criu.contains(line), "{criu}");
    let given = failure["advice"].as_str().context("advice")?;
    ensure!(given.contains(advice), "{given}");
    for part in [
        &format!("step {step} failed at the {side}"),
        criu,
        given,
        "; logs: ",
    ] {
        ensure!(log.contains(part), "{part:?} is not in {log}");
    }
    let logs = report["logs"].as_array().context("logs")?;
    let is_it = |log: &&Value| log["side"] == *side && log["program"] == "criu";
    let log = logs
        .iter()
        .find(is_it)
        .with_context(|| format!("{report:#}"))?;
    let path = Path::new(log["path"].as_str().context("a path")?);
    let beside = moves.report_path().with_extension("json.logs");
    ensure!(path.parent() == Some(&beside), "{}", path.display());
    let text = fs::read_to_string(path)?;
    ensure!(text.contains(criu), "{} lacks {criu}", path.display());
    let events = moves.events()?;
    let failed = events.iter().find(|event| {
        event["side"] == *side && event["step"] == *step && event["state"] == "failed"
    });
    let failed = failed.with_context(|| format!("{events:#?}"))?;
    ensure!(
        failed["criu"]
            .as_str()
            .is_some_and(|text| text.contains(criu)),
        "{failed}"
    );
    moves.expect_events(&[
        "source release done",
        "source end failed",
        "destination discard done",
    ])
}

fn a_dump_that_fails_is_told_with_criu_s_line(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let lock = test_dir.path("lock").display().to_string();
    let mut subject = start("a lock", &["flock", "--no-fork", &lock, "sleep", "100000"])?;
    wait::until("the lock", GENEROUS, || {
        let locks = fs::read_to_string("/proc/locks")?;
        Ok(locks
            .contains(&format!(" {} ", subject.pid()))
            .then_some(()))
    })?;
    for mode in ["cold", "hybrid"] {
        let agent = Agent::in_test(test_dir, criu, &format!("agent-{mode}"))?;
        let moves = Move::new(criu, test_dir.path("source"), mode).with(&["--mode", mode]);
        let pid = subject.pid().to_string();
        let mut command = moves.start_subject(&["--pid", &pid], &agent)?;
        let wanted = Wanted {
            step: "dump",
            side: "source",
            line: "file locks",
            advice: "file-locks",
        };
        expect_explained((&moves, &mut command), &mut subject, &wanted)
            .with_context(|| mode.to_owned())?;
    }
    Ok(())
}

fn a_file_that_is_missing_there_is_named(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let dir = test_dir.path("data");
    fs::create_dir(&dir)?;
    let file = dir.join("open").display().to_string();
    fs::write(&file, "x")?;
    let words = ["sh", "-c", "exec sleep 100000 3< \"$0\"", &file];
    let mut subject = start("an open file", &words)?;
    let fd = format!("/proc/{}/fd/3", subject.pid());
    wait::until("the open file", GENEROUS, || {
        let name = fs::read_to_string(format!("/proc/{}/comm", subject.pid()))?;
        let is_open = fs::read_link(&fd).is_ok_and(|link| link == Path::new(&file));
        Ok((is_open && name.trim() == "sleep").then_some(()))
    })?;
    for mode in ["cold", "hybrid"] {
        let agent = Agent::in_test(test_dir, criu, &format!("agent-{mode}"))?;
        let init = agent.init()?.to_string();
        run(Command::new("nsenter")
            .args([
                "--target", &init, "--mount", "--", "mount", "-t", "tmpfs", "tmpfs",
            ])
            .arg(&dir))?;
        let moves = Move::new(criu, test_dir.path("source"), mode).with(&["--mode", mode]);
        let pid = subject.pid().to_string();
        let mut command = moves.start_subject(&["--pid", &pid], &agent)?;
        let wanted = Wanted {
            step: "restore",
            side: "destination",
            line: "data/open",
            advice: "--volume",
        };
        expect_explained((&moves, &mut command), &mut subject, &wanted)
            .with_context(|| mode.to_owned())?;
    }
    Ok(())
}

/// Starts a process that has `pid` in the namespace of an agent.
fn take_pid(agent: &Agent, pid: Pid) -> Result<Spawned> {
    let init = agent.init()?.to_string();
    let script = format!(
        "echo {} > /proc/sys/kernel/ns_last_pid && sleep 100000; :",
        pid.as_raw() - 1
    );
    let mut command = Command::new("nsenter");
    command
        .args([
            "--target", &init, "--pid", "--mount", "--", "sh", "-c", &script,
        ])
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let taken = Spawned::start("a process with the pid", &mut command, None)?;
    let look = format!("/proc/{pid}");
    wait::until("the pid to be taken", GENEROUS, || {
        let mut command = Command::new("nsenter");
        command.args(["--target", &init, "--mount", "--", "test", "-d", &look]);
        Ok(command.status()?.success().then_some(()))
    })?;
    Ok(taken)
}

fn a_pid_that_is_taken_there_is_named(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let mut subject = start("a sleeper", &["sleep", "100000"])?;
    let agent = Agent::in_test(test_dir, criu, "agent")?;
    let taken = take_pid(&agent, subject.pid())?;
    let moves = Move::new(criu, test_dir.path("source"), "taken").with(&["--mode", "cold"]);
    let pid = subject.pid().to_string();
    let mut command = moves.start_subject(&["--pid", &pid], &agent)?;
    let wanted = Wanted {
        step: "restore",
        side: "destination",
        line: &pid,
        advice: "has this pid",
    };
    expect_explained((&moves, &mut command), &mut subject, &wanted)?;
    drop(agent);
    drop(taken);
    Ok(())
}
