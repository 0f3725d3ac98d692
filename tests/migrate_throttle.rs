//! Processes that are slowed while rounds do not shrink have their time back afterwards, whatever happens.

use std::fs;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::agent::{Agent, Move};
use testbed::criu::{Criu, Suite};
use testbed::load::Load;
use testbed::load::scenarios::verifying;
use testbed::load::spec::LoadSpec;
use testbed::load::steps::Step;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};

const MIB: u32 = 8;

/// So many pages are written in a second that each round finds most of them changed.
const PAGES_PER_S: u32 = 20_000;

/// Rounds by this rate take about a second.
const RATE: &str = "16M";

/// Whether control groups of version 2 can be had; `--throttle` needs them.
fn has_groups() -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let found = mounts
        .lines()
        .any(|line| line.split(' ').nth(2) == Some("cgroup2"));
    if !found {
        eprintln!("skipped: control groups of version 2 are not mounted");
    }
    found
}

fn writing(test_dir: &TestDir) -> Result<Load> {
    let load = Load::start(LoadSpec::tree(test_dir.path("load"), MIB, 2), None)?;
    let pages_per_s = PAGES_PER_S;
    load.run_everywhere(&[Step::Dirty { pages_per_s }])?;
    Ok(load)
}

fn moving<'a>(test_dir: &TestDir, criu: &'a Criu) -> Move<'a> {
    Move::new(criu, test_dir.path("source"), "slowed").with(&[
        "--mode",
        "pre-copy",
        "--track",
        "hash",
        "--round-rate",
        RATE,
        "--throttle",
        "80",
    ])
}

/// The control group of version 2 of a process.
fn group(pid: Pid) -> Result<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("0::"));
    Ok(line.context("a group of version 2")?.to_owned())
}

#[test]
fn slowed_processes_move_and_leave_no_group() {
    with_criu(Suite::Sid, |test_dir: &TestDir, criu: &Criu| {
        if !has_groups() {
            return Ok(());
        }
        let mut load = writing(test_dir)?;
        let agent = Agent::in_test(test_dir, criu, "agent")?;
        let moves = moving(test_dir, criu);
        moves.start(&load, &agent)?.succeed(GENEROUS)?;
        load.wait_until_gone()?;
        let log = fs::read_to_string(test_dir.path("source/slowed-migrate.log"))?;
        ensure!(log.contains("80 % less CPU time"), "{log}");
        ensure!(!moves.dir().join("throttle.json").exists(), "{log}");
        load.steer(agent.init()?)?;
        for report in load.run_everywhere(&verifying())? {
            report.expect_right()?;
        }
        Ok(())
    });
}

#[test]
fn a_killed_command_gives_the_time_back() {
    with_criu(Suite::Sid, |test_dir: &TestDir, criu: &Criu| {
        if !has_groups() {
            return Ok(());
        }
        let load = writing(test_dir)?;
        let home = group(load.pid())?;
        let agent = Agent::in_test(test_dir, criu, "agent")?;
        let moves = moving(test_dir, criu);
        let mut command = moves.start(&load, &agent)?;
        wait::until("the processes to be slowed", GENEROUS, || {
            ensure!(command.ended()?.is_none(), "{}", command.log_tail());
            Ok((group(load.pid())? != home).then_some(()))
        })?;
        kill(command.pid(), Signal::SIGKILL)?;
        command.wait(GENEROUS)?;
        wait::until("the processes to have their time back", GENEROUS, || {
            let is_home = group(load.pid())? == home;
            let is_done = !moves.dir().join("throttle.json").exists();
            Ok((is_home && is_done).then_some(()))
        })?;
        for report in load.run_everywhere(&verifying())? {
            report.expect_right()?;
        }
        Ok(())
    });
}
