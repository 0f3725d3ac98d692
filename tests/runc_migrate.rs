//! Containers of runc move by one command: each mode, with all memory, and whatever breaks before the decision
//! leaves the container where it was.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;
use serde_json::Value;
use testbed::agent::Move;
use testbed::containers::{self, ContainerHost};
use testbed::criu::Criu;
use testbed::load::report::Report;
use testbed::load::scenarios::reading;
use testbed::load::spec::LoadSpec;
use testbed::load::steps::Step;
use testbed::process::run;
use testbed::runc::{self, LOAD_DIR, Runc};
use testbed::test_dir::TestDir;
use testbed::wait::GENEROUS;
use testbed::{for_each_criu, gate};

for_each_criu!(a_container_moves, a_container_that_cannot_be_restored_stays);

const MIB: u32 = 16;

/// Every mode with the CRIU that most hosts will have, the two that differ most with the others.
fn modes(criu: &Criu) -> &'static [&'static str] {
    match criu.version.as_str() {
        version if version.starts_with("4.2") => &["cold", "pre-copy", "post-copy", "hybrid"],
        _ => &["cold", "hybrid"],
    }
}

/// A container that runs, and what its processes say; nothing without runc.
fn start<'a>(
    test_dir: &TestDir,
    criu: &'a Criu,
    id: &str,
) -> Result<Option<(Runc<'a>, Vec<Report>)>> {
    let Some(()) = gate::need("runc", runc::find()) else {
        return Ok(None);
    };
    let mut runc = Runc::new(test_dir, criu, LoadSpec::tree(LOAD_DIR, MIB, 3))?;
    runc.start(id)?;
    let before = runc.run_everywhere(&[Step::Status])?;
    Ok(Some((runc, before)))
}

fn expect_same(before: &[Report], after: &[Report]) -> Result<()> {
    for (before, after) in before.iter().zip(after) {
        after.expect_right()?;
        ensure!(after.nonce == before.nonce, "another process answers");
        ensure!(after.counter >= before.counter, "its counter went back");
    }
    Ok(())
}

fn a_container_moves(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    for &mode in modes(criu) {
        let id = &runc::unique(mode);
        let Some((runc, before)) = start(test_dir, criu, id)? else {
            return Ok(());
        };
        run(&mut runc.runtime(&["update", "--pids-limit", "77", id])?)?;
        let name = format!("agent-{mode}");
        let host = ContainerHost::start(test_dir, &criu.path, &name, (&runc, id))?;
        let moves = Move::new(criu, test_dir.path("source"), mode).with(&["--mode", mode]);
        let moved = containers::start(&moves, (&runc, id), &host)?.succeed(GENEROUS);
        moved.with_context(|| format!("{mode}: {}", host.agent.log()))?;
        runc.expect_gone(id)?;
        runc.steer(host.pid(id)?)?;
        expect_same(&before, &runc.run_everywhere(&reading())?)?;
        let report = moves.report()?;
        ensure!(
            report["result"] == "moved" && report["mode"] == mode,
            "{report}"
        );
        expect_of_the_runtime(&host, id)?;
    }
    Ok(())
}

/// The container is the destination's runtime's own: listed, limited, entered and deleted by it.
fn expect_of_the_runtime(host: &ContainerHost, id: &str) -> Result<()> {
    ensure!(host.list()? == id, "{}", host.list()?);
    let state = host.state(id)?.context("no state")?;
    ensure!(state["status"] == "running", "{state}");
    let limit = host.groups.limit_of(id, "pids.max")?;
    ensure!(limit == "77", "pids.max is {limit}");
    run(&mut host.runtime(&["exec", id, "/bin/testload", "--help"])?)?;
    run(&mut host.runtime(&["kill", id, "KILL"])?)?;
    run(&mut host.runtime(&["delete", "--force", id])?)?;
    ensure!(host.state(id)?.is_none(), "it is still there");
    Ok(())
}

/// A CRIU that looks good and refuses what a runtime asks for.
fn refusing(test_dir: &TestDir, criu: &Criu) -> Result<PathBuf> {
    let path = test_dir.path("refusing-criu");
    let criu = criu.path.display();
    let text = format!("#!/bin/sh\n[ \"$1\" = swrk ] && exit 1\nexec '{criu}' \"$@\"\n");
    fs::write(&path, text)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

fn a_container_that_cannot_be_restored_stays(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let refuses = refusing(test_dir, criu)?;
    for mode in ["cold", "hybrid"] {
        let id = &runc::unique(mode);
        let Some((runc, before)) = start(test_dir, criu, id)? else {
            return Ok(());
        };
        let name = format!("agent-{mode}");
        let host = ContainerHost::start(test_dir, &refuses, &name, (&runc, id))?;
        let moves = Move::new(criu, test_dir.path("source"), mode).with(&["--mode", mode]);
        containers::start(&moves, (&runc, id), &host)?.fail(GENEROUS)?;
        let report = moves.report()?;
        ensure!(report["result"] == "rolled back", "{report}");
        let problem = report["problem"].as_str().unwrap_or_default();
        ensure!(problem.contains("runc restore"), "{report}");
        ensure!(host.state(id)?.is_none(), "the destination keeps it");
        expect_here(&runc, id, &before)?;
        // What is missing there is told before anything is touched.
        fs::remove_file(host.bundles().join(id))?;
        let again = Move::new(criu, test_dir.path("source"), "again").with(&["--files", "never"]);
        let mut command = containers::start(&again, (&runc, id), &host)?;
        command.fail(GENEROUS)?;
        let log = command.log_tail();
        ensure!(
            log.contains("config.json") && log.contains("--bundle"),
            "{log}"
        );
    }
    Ok(())
}

/// The container runs in its runtime, whole, with its network open.
fn expect_here(runc: &Runc<'_>, id: &str, before: &[Report]) -> Result<()> {
    let state = run(runc.runtime(&["state", id])?.stdout(Stdio::piped()))?;
    let state: Value = serde_json::from_slice(&state.stdout)?;
    ensure!(state["status"] == "running", "{state}");
    let pid: Pid = runc.pid(id)?;
    runc.steer(pid)?;
    expect_same(before, &runc.run_everywhere(&reading())?)?;
    let net = format!("--net=/proc/{pid}/ns/net");
    let rules = run(Command::new("nsenter").args([&net, "--", "iptables-save"]))?;
    let rules = String::from_utf8_lossy(&rules.stdout).into_owned();
    ensure!(
        !rules.contains("CRIU") && !rules.contains("DROP"),
        "{rules}"
    );
    Ok(())
}
