//! Whole migrations by one command: each mode moves a tree with all of its memory, and whatever breaks
//! before the decision leaves the processes where they were.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use serde_json::Value;
use testbed::agent::{Agent, Move};
use testbed::criu::Criu;
use testbed::for_each_criu;
use testbed::load::Load;
use testbed::load::content::Content;
use testbed::load::scenarios::verifying;
use testbed::load::spec::{AreaSpec, LoadSpec, Mapping};
use testbed::load::steps::Step;
use testbed::pki::{Authority, Host};
use testbed::process::Spawned;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};

for_each_criu!(
    a_tree_moves_in_every_mode,
    pages_are_right_however_they_are_tracked,
    locked_memory_moves_in_every_mode,
);

/// What fails before any CRIU restores is the same with each: one CRIU stands for all.
macro_rules! with_one_criu {
    ($($name:ident: $suite:ident),+ $(,)?) => {
        mod one {
            use testbed::criu::Suite;
            use testbed::suite::with_criu;

            $(#[test]
            fn $name() {
                with_criu(Suite::$suite, super::$name);
            })+
        }
    };
}

with_one_criu!(
    a_killed_command_leaves_the_processes_here: Trixie,
    a_killed_agent_leaves_the_processes_here: Sid,
    a_restore_that_fails_leaves_the_processes_here: Experimental,
    a_stopped_command_leaves_the_processes_here: Sid,
    certificates_are_asked_for: Trixie,
    a_plan_measures_and_recommends: Experimental,
);

const MIB: u32 = 24;
const MODES: [&str; 4] = ["cold", "pre-copy", "post-copy", "hybrid"];

fn tree(test_dir: &TestDir, name: &str) -> Result<Load> {
    Load::start(LoadSpec::tree(test_dir.path(name), MIB, 3), None)
}

fn a_tree_moves_in_every_mode(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    for mode in MODES {
        let mut load = tree(test_dir, &format!("load-{mode}"))?;
        let before = load.run_everywhere(&[Step::Status])?;
        let agent = Agent::in_test(test_dir, criu, &format!("agent-{mode}"))?;
        let moves = Move::new(criu, test_dir.path("source"), mode).with(&["--mode", mode]);
        let mut command = moves.start(&load, &agent)?;
        let moved = command.succeed(GENEROUS);
        moved.with_context(|| format!("{mode}: {}", agent.log()))?;
        load.wait_until_gone()?;
        load.steer(agent.init()?)?;
        for (before, after) in before.iter().zip(load.run_everywhere(&verifying())?) {
            after.expect_right()?;
            ensure!(
                after.nonce == before.nonce,
                "{mode}: another process answers"
            );
            ensure!(after.pid == before.pid, "{mode}: its pid has changed");
            ensure!(
                after.counter >= before.counter,
                "{mode}: its counter went back"
            );
        }
        let report = moves.report()?;
        expect_report(&report, mode)?;
        // The last pages of pre-copy are read in the stopped processes, not sent by CRIU.
        let reads = report["phases_ms"]["pages"].is_number();
        ensure!(reads == (mode == "pre-copy"), "{report}");
        expect_no_images(&moves.dir())?;
        expect_no_images(&agent.dir_of(mode))?;
    }
    Ok(())
}

/// No page can be lazy then: a lazy dump keeps none, and listens all the same.
fn locked_memory_moves_in_every_mode(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    for mode in MODES {
        let area = AreaSpec::new(Mapping::Locked, MIB * 256, Content::Mixed);
        let mut spec = LoadSpec::new(test_dir.path(&format!("load-{mode}")), vec![area]);
        spec.pin_own_memory = true;
        let mut load = Load::start(spec, None)?;
        let agent = Agent::in_test(test_dir, criu, &format!("agent-{mode}"))?;
        let moves = Move::new(criu, test_dir.path("source"), mode).with(&["--mode", mode]);
        let moved = moves.start(&load, &agent)?.succeed(GENEROUS);
        moved.with_context(|| format!("{mode}: {}", agent.log()))?;
        load.wait_until_gone()?;
        load.steer(agent.init()?)?;
        load.run(0, &verifying())?.expect_right()?;
        expect_report(&moves.report()?, mode)?;
    }
    Ok(())
}

/// While the processes write all the time.
fn pages_are_right_however_they_are_tracked(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    for (track, mode) in [
        ("wp", "hybrid"),
        ("wp", "pre-copy"),
        ("soft-dirty", "hybrid"),
        ("hash", "pre-copy"),
        ("auto", "hybrid"),
    ] {
        let id = format!("{track}-{mode}");
        let mut load = tree(test_dir, &format!("load-{id}"))?;
        load.run_everywhere(&[Step::Dirty { pages_per_s: 3000 }])?;
        let agent = Agent::start(
            &criu.path,
            &test_dir.path(&format!("agent-{id}")),
            None,
            &[],
        )?;
        let moves = Move::new(criu, test_dir.path(&format!("source-{id}")), "tracked").with(&[
            "--mode",
            mode,
            "--track",
            track,
            "--max-rounds",
            "3",
        ]);
        let mut command = moves.start(&load, &agent)?;
        let ended = command.wait(GENEROUS)?;
        let log = command.log_tail();
        if log.contains("this kernel or machine does not have it") {
            // Refused by name, and nothing has happened.
            expect_right_here(&mut load)?;
            continue;
        }
        ensure!(
            ended.status.success(),
            "{id}: {}{log}{}",
            ended.status,
            agent.log()
        );
        load.wait_until_gone()?;
        load.steer(agent.init()?)?;
        for report in load.run_everywhere(&verifying())? {
            report.expect_right().with_context(|| id.clone())?;
        }
        let report = moves.report()?;
        let taken = report["track"].as_str().unwrap_or_default();
        ensure!(
            taken == track || (track == "auto" && taken != "auto"),
            "{report}"
        );
        ensure!(!log.contains("tracked by hash"), "{log}");
        let rounds = report["rounds"].as_array().context("rounds")?;
        ensure!(rounds.len() > 1, "{report}");
    }
    Ok(())
}

fn expect_report(report: &Value, mode: &str) -> Result<()> {
    ensure!(report["result"] == "moved", "{report}");
    ensure!(report["mode"] == mode, "{report}");
    for figure in ["downtime_ms", "complete_ms", "total_ms", "preparation_ms"] {
        let value = report[figure].as_f64().context(figure)?;
        ensure!(value > 0.0, "{figure} in {report}");
    }
    let rounds = report["rounds"].as_array().context("rounds")?;
    ensure!(
        rounds.is_empty() != matches!(mode, "pre-copy" | "hybrid"),
        "{report}"
    );
    ensure!(
        report["wire_bytes"].as_u64() > Some(u64::from(MIB) << 19),
        "{report}"
    );
    Ok(())
}

/// No memory of processes is left behind.
fn expect_no_images(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            expect_no_images(&path)?;
        }
        let image = path.extension().is_some_and(|extension| extension == "img");
        ensure!(!image, "{} is left", path.display());
    }
    Ok(())
}

/// A script in place of CRIU that lets a restore fail, or hang before it begins.
fn obstructed(test_dir: &TestDir, criu: &Criu, instead_of_restore: &str) -> Result<PathBuf> {
    let path = test_dir.path("obstructed-criu");
    let text = format!(
        "#!/bin/sh\n[ \"$1\" = restore ] && {{ {instead_of_restore}; }}\nexec '{}' \"$@\"\n",
        criu.path.display()
    );
    fs::write(&path, text)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// A migration whose restore does not come, in `mode`, with its processes frozen.
fn frozen(test_dir: &TestDir, criu: &Criu, mode: &'static str) -> Result<(Load, Agent, Spawned)> {
    let load = tree(test_dir, &format!("load-{mode}"))?;
    let began = test_dir.path(&format!("restore-began-{mode}"));
    let wait = format!("touch '{}'; exec sleep 600", began.display());
    let hangs = obstructed(test_dir, criu, &wait)?;
    let agent = Agent::start(&hangs, &test_dir.path(&format!("agent-{mode}")), None, &[])?;
    let moves = Move::new(criu, test_dir.path("source"), mode).with(&["--mode", mode]);
    let mut command = moves.start(&load, &agent)?;
    wait::until("the restore to begin", GENEROUS, || {
        if let Some(ended) = command.ended()? {
            anyhow::bail!("{}{}", ended.status, command.log_tail());
        }
        Ok(began.exists().then_some(()))
    })?;
    Ok((load, agent, command))
}

fn expect_right_here(load: &mut Load) -> Result<()> {
    load.expect_running()?;
    for report in load.run_everywhere(&verifying())? {
        report.expect_right()?;
    }
    Ok(())
}

fn a_killed_command_leaves_the_processes_here(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    for mode in ["post-copy", "pre-copy"] {
        let (mut load, _agent, mut command) = frozen(test_dir, criu, mode)?;
        command.kill()?;
        expect_right_here(&mut load)?;
    }
    Ok(())
}

fn a_stopped_command_leaves_the_processes_here(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    for (mode, signal) in [("hybrid", Signal::SIGINT), ("cold", Signal::SIGTERM)] {
        let (mut load, agent, mut command) = frozen(test_dir, criu, mode)?;
        command.signal(signal)?;
        command.fail(GENEROUS)?;
        expect_right_here(&mut load)?;
        expect_no_images(&test_dir.path("source").join(mode))?;
        let record = agent.dir_of(mode).join("record.json");
        wait::until("the agent to abort", GENEROUS, || {
            Ok(fs::read_to_string(&record)
                .is_ok_and(|text| text.contains("aborted"))
                .then_some(()))
        })?;
    }
    Ok(())
}

fn a_killed_agent_leaves_the_processes_here(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    for mode in ["post-copy", "cold"] {
        let (mut load, agent, mut command) = frozen(test_dir, criu, mode)?;
        kill(agent.pid()?, Signal::SIGKILL)?;
        command.fail(GENEROUS)?;
        expect_right_here(&mut load)?;
    }
    Ok(())
}

fn a_restore_that_fails_leaves_the_processes_here(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let fails = obstructed(test_dir, criu, "exit 1")?;
    for mode in MODES {
        let mut load = tree(test_dir, &format!("load-{mode}"))?;
        let agent = Agent::start(&fails, &test_dir.path(&format!("agent-{mode}")), None, &[])?;
        let moves = Move::new(criu, test_dir.path("source"), mode).with(&["--mode", mode]);
        let mut command = moves.start(&load, &agent)?;
        command.fail(GENEROUS)?;
        expect_right_here(&mut load)?;
        let report = moves.report()?;
        ensure!(report["result"] == "rolled back", "{report}");
        let problem = report["problem"].as_str().unwrap_or_default();
        ensure!(problem.contains("criu restore"), "{report}");
    }
    Ok(())
}

fn certificates_are_asked_for(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let pki = test_dir.path("pki");
    fs::create_dir_all(&pki)?;
    let authority = Authority::new(&pki, "ca")?;
    let options = authority.issue(&Host::LOOPBACK)?.options();
    let agent = Agent::start(&criu.path, &test_dir.path("agent"), None, &options)?;
    let mut load = tree(test_dir, "load")?;
    // Without a certificate nothing begins.
    let bare = Move::new(criu, test_dir.path("source"), "bare").with(&["--mode", "hybrid"]);
    bare.start(&load, &agent)?.fail(GENEROUS)?;
    expect_right_here(&mut load)?;
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let moves = Move::new(criu, test_dir.path("source"), "secure").with(&["--mode", "hybrid"]);
    let moved = moves.with(&options).start(&load, &agent)?.succeed(GENEROUS);
    moved.with_context(|| agent.log())?;
    load.wait_until_gone()?;
    load.steer(agent.init()?)?;
    for report in load.run_everywhere(&verifying())? {
        report.expect_right()?;
    }
    Ok(())
}

fn a_plan_measures_and_recommends(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let load = Load::start(LoadSpec::mixed(test_dir.path("load"), MIB), None)?;
    load.run(0, &[Step::Dirty { pages_per_s: 500 }])?;
    let agent = Agent::in_test(test_dir, criu, "agent")?;
    let mut command = Command::new(testbed::workspace::binary("pageferry")?);
    command
        .args(["plan", "--json", "--pid", &load.pid().to_string()])
        .args(["--to", &agent.address().to_string(), "--state-dir"])
        .arg(test_dir.path("source"))
        .arg("--criu")
        .arg(&criu.path);
    let plan: Value = serde_json::from_slice(&testbed::process::run(&mut command)?.stdout)?;
    testbed::schema::expect("plan", &plan)?;
    let memory = plan["private_bytes"].as_u64().context("private_bytes")? >> 20;
    ensure!(
        (u64::from(MIB) / 2..u64::from(MIB) * 2).contains(&memory),
        "{plan}"
    );
    let dirty = plan["dirty_pages_per_s"]
        .as_f64()
        .context("dirty_pages_per_s")?;
    ensure!(dirty > 50.0, "{plan}");
    ensure!(
        plan["problems"].as_array().is_some_and(Vec::is_empty),
        "{plan}"
    );
    ensure!(plan["recommended"].is_string(), "{plan}");
    let modes = plan["modes"].as_array().context("modes")?;
    ensure!(modes.len() == MODES.len(), "{plan}");
    Ok(())
}
