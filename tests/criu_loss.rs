//! Who survives when the source is lost, and what a post-copy says of itself.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use pageferry::observe::trace::TraceReader;
use testbed::criu::{Criu, Suite};
use testbed::daemons::Make;
use testbed::load::spec::LoadSpec;
use testbed::load::steps::{Order, Pass, Step};
use testbed::postcopy::{Plan, PostCopy, Source, slow_link};
use testbed::proxy::ImpairmentKind;
use testbed::suite::with_criu;
use testbed::summary;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};

const MIB: u32 = 64;
/// About half of a post-copy of [`MIB`], bytes.
const HALF_WAY: u64 = 24 << 20;

const VERIFY: [Step; 1] = [Step::Verify(Pass {
    limit_ms: None,
    order: Order::Random,
    threads: 1,
    overlap: false,
    check: testbed::load::steps::Check::Full,
})];

fn spec(test_dir: &TestDir) -> LoadSpec {
    LoadSpec::mixed(test_dir.path("load"), MIB).careful()
}

fn wait_until_half_way(moving: &mut PostCopy) -> Result<()> {
    wait::until("half of the memory", GENEROUS, || {
        if moving.daemon.process().ended()?.is_some() {
            bail!("lazy-client is over{}", moving.daemon.process().log_tail());
        }
        Ok((moving.received() > HALF_WAY).then_some(()))
    })
}

fn kill_source(moving: &mut PostCopy) -> Result<()> {
    let Some(source) = moving.source() else {
        bail!("a source")
    };
    source.kill().map(drop)
}

#[test]
fn lost_processes_are_killed_if_so_told() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let plan = Plan::ours(criu, Source::Dump, &["--on-loss", "kill"]).over(slow_link());
        let mut moving = PostCopy::start(test_dir, &plan, spec(test_dir), &[])?;
        wait_until_half_way(&mut moving)?;
        let pid = u32::try_from(moving.load.pid().as_raw())?;
        kill_source(&mut moving)?;
        moving.daemon.process().fail(GENEROUS)?;
        let end = moving.restored.wait_for_end(pid, GENEROUS)?;
        ensure!(end == "killed SIGKILL", "the restored process {end}");
        Ok(())
    });
}

#[test]
fn held_processes_wait_until_they_are_poisoned() {
    with_criu(Suite::Experimental, |test_dir, criu| {
        let plan = Plan::ours(criu, Source::Dump, &["--on-loss", "hold"]).over(slow_link());
        let mut moving = PostCopy::start(test_dir, &plan, spec(test_dir), &[])?;
        wait_until_half_way(&mut moving)?;
        kill_source(&mut moving)?;
        moving.wait_for_line("holding the processes")?;
        let seq = moving.load.send(0, &VERIFY)?;
        ensure!(
            moving.daemon.process().ended()?.is_none(),
            "nobody holds the processes"
        );
        ensure!(
            moving.load.report(0, seq)?.is_none(),
            "lost pages were read"
        );
        moving.daemon.process().signal(Signal::SIGTERM)?;
        moving.daemon.process().fail(GENEROUS)?;
        let report = moving.load.receive(0, seq, GENEROUS)?;
        ensure!(
            report.poisoned() > 0,
            "no page was lost: nothing was tested"
        );
        ensure!(
            report.wrong() == 0,
            "{} pages wrong, {} zero",
            report.wrong(),
            report.wrong_zero()
        );
        Ok(())
    });
}

/// A post-copy from a page server of ours that stays for several sessions.
fn served(test_dir: &TestDir, criu: &Criu, options: &[&str]) -> Result<PostCopy> {
    let plan = Plan {
        source_options: vec!["--keep".to_owned()],
        ..Plan::ours(criu, Source::PageServer(Make::Ours), options).over(slow_link())
    };
    PostCopy::start(test_dir, &plan, spec(test_dir), &VERIFY)
}

#[test]
fn a_source_that_comes_back_is_used_again() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let mut moving = served(test_dir, criu, &["--reconnect-timeout", "60"])?;
        wait_until_half_way(&mut moving)?;
        moving
            .proxy
            .as_ref()
            .context("a link")?
            .cut(ImpairmentKind::Reset);
        moving.daemon.process().succeed(GENEROUS)?;
        moving.reports()?;
        let log = fs::read_to_string(moving.daemon.process().log().context("a log")?)?;
        ensure!(
            log.contains("the source is back"),
            "the cut was not noticed: nothing was tested"
        );
        Ok(())
    });
}

#[test]
fn held_processes_go_on_when_the_operator_tries_again() {
    with_criu(Suite::Trixie, |test_dir, criu| {
        let mut moving = served(
            test_dir,
            criu,
            &["--on-loss", "hold", "--reconnect-timeout", "0"],
        )?;
        wait_until_half_way(&mut moving)?;
        moving
            .proxy
            .as_ref()
            .context("a link")?
            .cut(ImpairmentKind::Reset);
        moving.wait_for_line("holding the processes")?;
        moving.daemon.process().signal(Signal::SIGUSR1)?;
        moving.daemon.process().succeed(GENEROUS)?;
        moving.reports().map(drop)
    });
}

#[test]
fn on_demand_brings_what_is_touched_and_streams_nothing() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let path = test_dir.path("summary.json");
        let options = ["--on-demand", "--summary-json", &path.to_string_lossy()];
        let plan = Plan::ours(criu, Source::PageServer(Make::Ours), &options);
        let mut moving = PostCopy::start(test_dir, &plan, spec(test_dir), &VERIFY)?;
        moving.reports()?;
        moving.finish()?;
        let summary = summary::whole(&path)?;
        ensure!(
            summary["pages"]["stream"] == 0,
            "pages were streamed: {summary}"
        );
        ensure!(
            summary["pages"]["fault"].as_u64() > Some(0),
            "no faults: {summary}"
        );
        Ok(())
    });
}

#[test]
fn summary_and_trace_tell_every_page_and_every_fault() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let (path, trace) = (test_dir.path("summary.json"), test_dir.path("faults.trace"));
        let options = [
            "--summary-json",
            &path.to_string_lossy(),
            "--trace",
            &trace.to_string_lossy(),
        ];
        let plan = Plan::ours(criu, Source::Dump, &options).over(slow_link());
        let mut moving = PostCopy::start(test_dir, &plan, spec(test_dir), &VERIFY)?;
        moving.reports()?;
        moving.finish()?;
        let summary = summary::whole(&path)?;
        let number = |value: &serde_json::Value| value.as_u64().context("a number");
        let mut settled = 0;
        for way in ["fault", "around", "stream", "local", "gone", "poisoned"] {
            settled += number(&summary["pages"][way])?;
        }
        ensure!(
            settled == number(&summary["total_pages"])?,
            "pages do not add up: {summary}"
        );
        ensure!(
            number(&summary["missing_pages"])? == 0,
            "pages are missing: {summary}"
        );
        let faults = TraceReader::open(&trace)?.collect::<Result<Vec<_>, _>>()?;
        ensure!(!faults.is_empty(), "no faults: nothing was tested");
        let told = number(&summary["fault_latency"]["count"])?;
        ensure!(
            faults.len() as u64 == told,
            "{} faults traced, {told} counted",
            faults.len()
        );
        let longest = Duration::from_micros(number(&summary["total_ms"])? * 1000 + 1000);
        for fault in &faults {
            ensure!(fault.address % 4096 == 0, "no page: {fault:?}");
            ensure!(
                Duration::from_micros(fault.time_us) <= longest,
                "after the end: {fault:?}"
            );
        }
        Ok(())
    });
}
