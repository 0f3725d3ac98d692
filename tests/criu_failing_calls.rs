//! Each call that a lazy-client makes about its images fails in turn, once or from then on, while a real CRIU restores from
//! them: it does not start and says why, or every page that comes is right. What cannot be had is poisoned, never zero.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use testbed::criu::{Criu, Suite};
use testbed::daemons::Make;
use testbed::failing::{CallCounts, FailingCalls, Failure};
use testbed::gate;
use testbed::load::scenarios::verifying;
use testbed::load::spec::{LoadSpec, OnLostPage};
use testbed::orphan::Orphan;
use testbed::postcopy::{Plan, PostCopy, Source};
use testbed::process::descendants;
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::GENEROUS;
use testbed::workspace;

const MIB: u32 = 8;

/// Calls that fail in a run of every day, spread over all of them.
const SAMPLES: u64 = 4;

/// No call fails.
fn nothing() -> Failure {
    Failure {
        calls: u64::MAX >> 1..=u64::MAX >> 1,
        errno: Errno::EIO,
        thread: None,
    }
}

/// A directory with a `lazy-client` whose calls fail, for [`Make::Build`].
fn build(
    test_dir: &TestDir,
    failing: &FailingCalls,
    failure: &Failure,
) -> Result<(PathBuf, CallCounts)> {
    let dir = test_dir.path("build");
    fs::create_dir(&dir)?;
    let images = test_dir.dir().canonicalize()?.join("dumped");
    let (environment, counts) = failing.environment(&images, failure, &test_dir.path("counts"))?;
    let words: Vec<_> = environment
        .iter()
        .map(|(name, value)| format!("{name}='{value}'"))
        .collect();
    let program = workspace::daemon("lazy-client")?;
    let script = format!(
        "#!/bin/sh\n{} exec '{}' \"$@\"\n",
        words.join(" "),
        program.display()
    );
    let path = dir.join("lazy-client");
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok((dir, counts))
}

fn expect_error(log: &Path, failure: &Failure) -> Result<()> {
    let log_text = fs::read_to_string(log).with_context(|| log.display().to_string())?;
    let reason = std::io::Error::from(failure.errno).to_string();
    let named = log_text
        .lines()
        .any(|line| line.contains("error: ") || line.contains("warning: "));
    ensure!(
        named && log_text.contains(&reason),
        "it does not say {reason:?}:\n{log_text}"
    );
    Ok(())
}

/// One restore. Returns how many calls were made, and the name of the one that failed first.
fn restored(
    outer: &TestDir,
    criu: &Criu,
    failing: &FailingCalls,
    failure: &Failure,
) -> Result<(u64, Option<String>)> {
    let test_dir = TestDir::new_in(outer.dir())?;
    let (dir, counts) = build(&test_dir, failing, failure)?;
    let spec = LoadSpec {
        on_lost_page: OnLostPage::Count,
        pin_own_memory: true,
        ..LoadSpec::mixed(test_dir.path("load"), MIB)
    };
    let mut plan = Plan::new(criu, Source::Local, Make::Build(&dir));
    plan.client_options = ["--local-timeout", "0", "--wait", "0"]
        .map(str::to_owned)
        .into();
    let log = test_dir.path("dumped/lazy.log");
    match PostCopy::start(&test_dir, &plan, spec, &[]) {
        Err(error) => {
            ensure!(counts.read()?.1.is_some(), "{error:#}");
            expect_error(&log, failure).with_context(|| format!("{error:#}"))?;
        }
        Ok(mut moving) => {
            let report = moving.load.run(0, &verifying())?;
            ensure!(report.wrong() == 0, "{} pages wrong", report.wrong());
            ensure!(
                report.wrong_zero() == 0,
                "{} pages zero",
                report.wrong_zero()
            );
            let ended = moving.daemon.process().wait(GENEROUS)?;
            let whole = report.poisoned() == 0;
            ensure!(
                !ended.status.success() || whole,
                "a success with {} lost pages",
                report.poisoned()
            );
            if !ended.status.success() {
                expect_error(&log, failure)?;
            }
        }
    }
    counts.read()
}

/// The process that stands by has this name.
const STANDBY: Option<&str> = Some("lazy-standby");

/// A restore from images at their rate of `bandwidth`, with a standby whose calls fail as `failure` says.
fn restored_with_standby(
    test_dir: &TestDir,
    criu: &Criu,
    failing: &FailingCalls,
    failure: &Failure,
    bandwidth: &str,
) -> Result<(PostCopy, CallCounts)> {
    let (dir, counts) = build(test_dir, failing, failure)?;
    let mut plan = Plan::new(criu, Source::Local, Make::Build(&dir));
    plan.client_options = ["--max-bandwidth", bandwidth].map(str::to_owned).into();
    let spec = LoadSpec::mixed(test_dir.path("load"), MIB);
    Ok((PostCopy::start(test_dir, &plan, spec, &[])?, counts))
}

#[test]
fn a_standby_whose_calls_fail_leaves_no_process_that_reads_zeros() {
    with_criu(Suite::Sid, |outer, criu| {
        let Some(failing) = gate::need("a C compiler", FailingCalls::compiled(outer.dir())) else {
            return Ok(());
        };
        let test_dir = TestDir::new_in(outer.dir())?;
        let none = Failure {
            thread: STANDBY,
            ..nothing()
        };
        let (mut moving, counts) = restored_with_standby(&test_dir, criu, &failing, &none, "1G")?;
        moving.daemon.process().succeed(GENEROUS)?;
        let (calls, _) = counts.read()?;
        ensure!(calls > SAMPLES, "the standby makes {calls} calls");
        for first in (0..SAMPLES).map(|sample| 1 + sample * (calls - 1) / (SAMPLES - 1)) {
            let test_dir = TestDir::new_in(outer.dir())?;
            let failure = Failure {
                calls: first..=u64::MAX >> 1,
                ..none.clone()
            };
            // So slow that next to nothing has come when it is killed.
            let (mut moving, counts) =
                restored_with_standby(&test_dir, criu, &failing, &failure, "16K")?;
            let standby = descendants(moving.daemon.process().pid());
            ensure!(standby.len() == 1, "{} processes stand by", standby.len());
            let standby = Orphan::new(standby[0].as_raw())?;
            let pid = u32::try_from(moving.load.pid().as_raw())?;
            moving.wait_for_line("cannot stand by any longer")?;
            moving.daemon.process().kill()?;
            standby.fail()?;
            let (_, failed) = counts.read()?;
            eprintln!("{first} of {calls}: {failed:?}");
            let end = moving.restored.wait_for_end(pid, GENEROUS)?;
            ensure!(end == "killed SIGKILL", "the restored process {end}");
        }
        Ok(())
    });
}

fn failures(numbers: impl Iterator<Item = u64> + Clone) -> impl Iterator<Item = Failure> {
    let once = numbers.clone().map(|number| number..=number);
    let from_then_on = numbers.map(|number| number..=u64::MAX >> 1);
    once.chain(from_then_on).map(|calls| Failure {
        calls,
        errno: Errno::EIO,
        thread: None,
    })
}

/// Restores with the failures that `choose` takes of those of so many calls.
fn sweep(choose: impl Fn(u64) -> Vec<u64>) {
    with_criu(Suite::Sid, |test_dir, criu| {
        let Some(failing) = gate::need("a C compiler", FailingCalls::compiled(test_dir.dir()))
        else {
            return Ok(());
        };
        let (calls, failed) = restored(test_dir, criu, &failing, &nothing())?;
        ensure!(
            failed.is_none() && calls > SAMPLES,
            "{calls} calls, {failed:?}"
        );
        for failure in failures(choose(calls).into_iter()) {
            let done = restored(test_dir, criu, &failing, &failure);
            let (_, failed) = done.with_context(|| format!("{failure:?} of {calls}"))?;
            eprintln!("{:?} of {calls}: {failed:?}", failure.calls.start());
        }
        Ok(())
    });
}

#[test]
fn a_call_that_fails_makes_no_page_wrong() {
    sweep(|calls| {
        (0..SAMPLES)
            .map(|sample| 1 + sample * calls / SAMPLES)
            .collect()
    });
}

#[test]
#[ignore = "takes minutes: cargo nextest run -p pageferry --test criu_failing_calls --run-ignored all"]
fn no_call_that_fails_makes_a_page_wrong() {
    sweep(|calls| (1..=calls).collect());
}
