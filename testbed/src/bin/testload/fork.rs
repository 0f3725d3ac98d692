//! Children: the tree that a load starts with, and those that a step forks.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, alarm, getpid};
use testbed::load::report::StepReport;
use testbed::load::spec::LoadSpec;
use testbed::load::steps::{Order, Pass};
use testbed::sys;

use crate::memory::Memory;
use crate::pass;

/// Forks the tree of the load: returns the number of the process that this one has become.
pub(crate) fn grow_tree(spec: &LoadSpec) -> Result<u32> {
    let mut process = 0;
    'tree: loop {
        for child in [2 * process + 1, 2 * process + 2] {
            if child < spec.processes && sys::fork()?.is_child() {
                process = child;
                continue 'tree;
            }
        }
        return Ok(process);
    }
}

/// Leaves `count` children that have exited and are not waited for.
pub(crate) fn leave_zombies(count: u32) -> Result<()> {
    for _ in 0..count {
        if sys::fork()?.is_child() {
            sys::exit_now(0);
        }
    }
    Ok(())
}

/// Forks `depth` generations; every one of them, this process included, verifies its memory at the
/// same time.
pub(crate) fn fork_and_verify(
    memory: &Memory,
    spec: &LoadSpec,
    depth: u32,
    pass: Pass,
) -> Result<StepReport> {
    if depth == 0 {
        return pass::verify(memory, pass);
    }
    match sys::fork().context("fork")? {
        ForkResult::Child => {
            alarm::set(spec.lifetime_s);
            let report = fork_and_verify(memory, spec, depth - 1, pass)
                .unwrap_or_else(|error| failed(format!("{error:#}")));
            let written = write_json(&child_report(&spec.dir, getpid()), &report);
            sys::exit_now(i32::from(written.is_err()));
        }
        ForkResult::Parent { child } => {
            let mut report = pass::verify(memory, pass)?;
            let mut of_child =
                collect(&spec.dir, child).unwrap_or_else(|error| failed(format!("{error:#}")));
            // Side by side: what is nested deeply cannot be read.
            report.children.append(&mut of_child.children);
            report.children.push(of_child);
            report.step = format!("fork {depth}: {pass:?}");
            Ok(report)
        }
    }
}

/// Forks `children`, `per_s` a second, each of which compares one page and ends after `lifetime`.
pub(crate) fn fork_often(
    memory: &Memory,
    per_s: u32,
    children: u32,
    lifetime: Duration,
) -> Result<StepReport> {
    let order = pass::visits(memory, Order::Random, 0);
    let began = Instant::now();
    let mut report = StepReport::default();
    let mut running = 0;
    for number in 0..children {
        let due = Duration::from_secs(1) * number / per_s.max(1);
        std::thread::sleep(due.saturating_sub(began.elapsed()));
        let visit = order[number as usize % order.len()];
        if sys::fork().context("fork")?.is_child() {
            let right = pass::is_right(memory, visit);
            std::thread::sleep(lifetime);
            sys::exit_now(i32::from(!right));
        }
        running += 1;
        while running > 0 && reap(&mut report, Some(WaitPidFlag::WNOHANG))? {
            running -= 1;
        }
    }
    while running > 0 && reap(&mut report, None)? {
        running -= 1;
    }
    report.wall_us = u64::try_from(began.elapsed().as_micros())?;
    report.step = format!("{children} children, {per_s} a second");
    Ok(report)
}

/// Notes a child that has ended, if one has.
fn reap(report: &mut StepReport, flags: Option<WaitPidFlag>) -> Result<bool> {
    match waitpid(None, flags)? {
        WaitStatus::StillAlive => return Ok(false),
        WaitStatus::Exited(_, 0) => {}
        _ => report.wrong += 1,
    }
    report.checked += 1;
    Ok(true)
}

fn failed(failure: String) -> StepReport {
    StepReport {
        failure: Some(failure),
        ..StepReport::default()
    }
}

fn child_report(dir: &Path, child: Pid) -> PathBuf {
    dir.join(format!("child-{child}.json"))
}

fn collect(dir: &Path, child: Pid) -> Result<StepReport> {
    let status = waitpid(child, None).context("waitpid")?;
    if status != WaitStatus::Exited(child, 0) {
        bail!("forked child: {status:?}");
    }
    let path = child_report(dir, child);
    let report = serde_json::from_slice(&fs::read(&path)?)?;
    fs::remove_file(path)?;
    Ok(report)
}

/// Writes a file that is whole or absent.
pub(crate) fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let unfinished = path.with_extension("tmp");
    fs::write(&unfinished, serde_json::to_vec(value)?)?;
    fs::rename(&unfinished, path)?;
    Ok(())
}
