//! A lazy-client that is killed while `criu restore` hands processes over to it: CRIU waits for no answer, so what it has
//! said may be unread when it has finished already. Who stands by reads it, and no page is wrong.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use testbed::criu::{Criu, Suite};
use testbed::daemons::Make;
use testbed::failing::{CallCounts, FailingCalls, Kill};
use testbed::gate;
use testbed::load::scenarios::verifying;
use testbed::load::spec::LoadSpec;
use testbed::postcopy::{Plan, PostCopy, Source};
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::GENEROUS;
use testbed::workspace;

const MIB: u32 = 4;
const PROCESSES: u32 = 3;

/// The process that serves has this name.
const SERVES: &str = "lazy-client";

/// No call has this number.
const NEVER: u64 = u64::MAX >> 1;

fn tree(test_dir: &TestDir) -> LoadSpec {
    LoadSpec {
        pin_own_memory: true,
        ..LoadSpec::tree(test_dir.path("load"), MIB, PROCESSES)
    }
}

/// lazy-client is stopped before the restore begins, and killed when that has ended.
fn unheard<'a>(plan: Plan<'a>) -> Plan<'a> {
    Plan {
        client_stops: true,
        ..plan
    }
}

#[test]
fn a_restore_that_nobody_has_heard_is_gone_on_with() {
    with_criu(Suite::Trixie, |test_dir, criu| {
        let plan = unheard(Plan::ours(criu, Source::Local, &[]));
        let mut moving = PostCopy::start(test_dir, &plan, tree(test_dir), &[])?;
        let socket = test_dir.path("dumped/lazy-pages.socket");
        ensure!(socket.exists(), "nobody listened");
        let standby = moving.daemon.kill_for_standby()?;
        moving.expect_all_right()?;
        standby.succeed()?;
        ensure!(!socket.exists(), "the socket is left behind");
        Ok(())
    });
}

#[test]
fn a_source_that_serves_again_has_the_memory_of_an_unheard_restore() {
    with_criu(Suite::Experimental, |test_dir, criu| {
        let plan = Plan {
            source_options: vec!["--keep".to_owned()],
            ..unheard(Plan::ours(criu, Source::PageServer(Make::Ours), &[]))
        };
        let mut moving = PostCopy::start(test_dir, &plan, tree(test_dir), &[])?;
        let standby = moving.daemon.kill_for_standby()?;
        moving.expect_all_right()?;
        standby.succeed()
    });
}

/// Only the dump had the memory, and is not to be reached again: it fails, and nobody reads zeros.
#[test]
fn what_a_dump_had_for_an_unheard_restore_is_poisoned() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let plan = unheard(Plan::ours(criu, Source::Dump, &[]));
        let spec = LoadSpec::mixed(test_dir.path("load"), MIB).careful();
        let mut moving = PostCopy::start(test_dir, &plan, spec, &[])?;
        let standby = moving.daemon.kill_for_standby()?;
        standby.fail()?;
        moving.source().context("the dump")?.fail(GENEROUS)?;
        let report = moving.load.run(0, &verifying())?;
        ensure!(report.poisoned() > 0, "nothing is lost");
        let wrong = report.wrong() + report.wrong_zero();
        ensure!(wrong == 0, "{wrong} pages wrong");
        moving.restored.kill();
        moving.load.expect_running()
    });
}

/// A `lazy-client` that is killed at its call number `call` on a socket, for [`Make::Build`].
fn killed_at(
    test_dir: &TestDir,
    failing: &FailingCalls,
    call: u64,
) -> Result<(PathBuf, CallCounts)> {
    let name = format!("killed-at-{call}");
    let dir = test_dir.path(&name);
    fs::create_dir(&dir)?;
    let counts = test_dir.path(&format!("{name}.counts"));
    let thread = SERVES;
    let (environment, counts) = failing.killing(Kill { call, thread }, &counts)?;
    let words: Vec<_> = environment
        .iter()
        .map(|(name, value)| format!("{name}='{value}'"))
        .collect();
    let program = workspace::daemon(SERVES)?;
    let script = format!(
        "#!/bin/sh\n{} exec '{}' \"$@\"\n",
        words.join(" "),
        program.display()
    );
    let path = dir.join(SERVES);
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok((dir, counts))
}

/// Which calls a lazy-client makes on sockets from when a restore may begin until it has read all that it has to say, first
/// and last, and a post-copy that was made to count them.
fn count(test_dir: &TestDir, criu: &Criu, failing: &FailingCalls) -> Result<(PostCopy, u64, u64)> {
    let (dir, counts) = killed_at(test_dir, failing, NEVER)?;
    let plan = unheard(Plan::new(criu, Source::Local, Make::Build(&dir)));
    let mut moving = PostCopy::start(test_dir, &plan, tree(test_dir), &[])?;
    let (before, _) = counts.read()?;
    moving.daemon.process().signal(Signal::SIGCONT)?;
    moving.wait_for_line("the restore is finished")?;
    let (until, _) = counts.read()?;
    moving.expect_all_right()?;
    moving.daemon.process().succeed(GENEROUS)?;
    // Each process takes three at least: looked at, told of, taken out.
    let least = u64::from(3 * PROCESSES);
    ensure!(until - before > least, "calls {before} to {until}");
    Ok((moving, before + 1, until))
}

/// Restores again and again, each time with a lazy-client that is killed at another of the calls that `choose` takes of
/// those that hand a restore over. It reads what CRIU has to say when that has ended, or while it says it.
fn sweep(suite: Suite, afterwards: bool, choose: impl Fn(u64) -> bool) {
    with_criu(suite, |test_dir, criu| {
        let Some(failing) = gate::need("a C compiler", FailingCalls::compiled(test_dir.dir()))
        else {
            return Ok(());
        };
        let (mut moving, first, last) = count(test_dir, criu, &failing)?;
        for call in (first..=last).filter(|call| choose(call - first)) {
            let (dir, counts) = killed_at(test_dir, &failing, call)?;
            let plan = Plan {
                client_stops: afterwards,
                ..Plan::new(criu, Source::Local, Make::Build(&dir))
            };
            let context = || format!("killed at call {call} of {first} to {last}");
            moving = moving.again(&plan, &[]).with_context(context)?;
            moving.daemon.process().signal(Signal::SIGCONT)?;
            let ended = moving.daemon.process().wait(GENEROUS)?;
            let (_, at) = counts.read()?;
            ensure!(at.is_some(), "it {}, {}", ended.status, context());
            eprintln!("{call} of {first} to {last}: {at:?}");
            let standby = moving.daemon.kill_for_standby().with_context(context)?;
            moving.expect_all_right().with_context(context)?;
            standby.succeed().with_context(context)?;
        }
        Ok(())
    });
}

#[test]
fn at_no_call_a_kill_makes_a_page_of_a_finished_restore_wrong() {
    sweep(Suite::Sid, true, |_| true);
}

#[test]
fn a_kill_during_a_restore_makes_no_page_wrong() {
    sweep(Suite::Sid, false, |number| number.is_multiple_of(4));
}

#[test]
#[ignore = "takes minutes: cargo nextest run -p pageferry --test criu_handover --run-ignored all"]
fn at_no_call_a_kill_during_a_restore_makes_a_page_wrong() {
    for suite in [Suite::Trixie, Suite::Sid, Suite::Experimental] {
        sweep(suite, false, |_| true);
    }
}
