//! A relay between lazy-client and the dump turns a reset into an orderly end, which CRIU takes for success:
//! whoever gives up says so in words before, so that the dump fails and its processes live.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use testbed::criu::{Criu, Suite};
use testbed::daemons::{Make, Options, PageServer};
use testbed::for_each_criu;
use testbed::load::Load;
use testbed::load::scenarios::verifying;
use testbed::load::spec::LoadSpec;
use testbed::migration::Dump;
use testbed::net::free_port;
use testbed::pki::{Authority, Host};
use testbed::postcopy::{Plan, PostCopy, Source, slow_link};
use testbed::proxy::{Direction, Link, Proxy};
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};

for_each_criu!(
    client_ended_by_a_signal,
    client_killed,
    forwarder_ended,
    forwarder_killed,
);

const MIB: u32 = 64;
/// A part of a post-copy of [`MIB`], bytes.
const A_PART: u64 = 16 << 20;

fn relay() -> Link {
    Link {
        hides_resets: true,
        ..slow_link()
    }
}

fn spec(test_dir: &TestDir) -> LoadSpec {
    LoadSpec::mixed(test_dir.path("load"), MIB).careful()
}

fn under_way(test_dir: &TestDir, plan: &Plan<'_>) -> Result<PostCopy> {
    let mut moving = PostCopy::start(test_dir, plan, spec(test_dir), &[])?;
    wait::until("a part of the memory", GENEROUS, || {
        let over = moving.daemon.process().ended()?.is_some();
        Ok((over || moving.received() > A_PART).then_some(()))
    })?;
    Ok(moving)
}

fn expect_source_alive(moving: &mut PostCopy) -> Result<()> {
    moving.source().context("the dump")?.fail(GENEROUS)?;
    moving.restored.kill();
    expect_alive(&mut moving.load)
}

fn expect_alive(load: &mut Load) -> Result<()> {
    load.expect_running()?;
    for report in load.run_everywhere(&verifying())? {
        report.expect_right()?;
    }
    Ok(())
}

fn client_ended_by_a_signal(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let plan = Plan::new(criu, Source::Dump, Make::Ours).over(relay());
    let mut moving = under_way(test_dir, &plan)?;
    moving.daemon.process().signal(Signal::SIGTERM)?;
    moving.daemon.process().fail(GENEROUS)?;
    expect_source_alive(&mut moving)
}

/// Nobody but the process that stands by can say anything.
fn client_killed(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let plan = Plan::new(criu, Source::Dump, Make::Ours).over(relay());
    let mut moving = under_way(test_dir, &plan)?;
    moving.daemon.kill_for_standby()?.fail()?;
    expect_source_alive(&mut moving)
}

fn forwarder_ended(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    end_forwarder(test_dir, criu, Signal::SIGHUP)
}

/// Nobody but its guard can say anything.
fn forwarder_killed(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    end_forwarder(test_dir, criu, Signal::SIGKILL)
}

fn end_forwarder(test_dir: &TestDir, criu: &Criu, signal: Signal) -> Result<()> {
    let mut load = Load::start(spec(test_dir), None)?;
    let images = test_dir.path("dumped");
    let address = (std::net::Ipv4Addr::LOCALHOST, free_port()?).into();
    let mut dump = Dump::new(criu, load.pid(), &images).serve_lazily(address)?;
    let relay = Proxy::start(address, relay(), None)?;
    let kept = relay.address().to_string();
    let options = Options::new(&images).with(&["--forward-lazy", &kept]);
    let mut forwarder = PageServer::receiving(Make::Ours, &options.log_to("forward.log"))?;
    wait::until("a part of the memory", GENEROUS, || {
        Ok((relay.carried(Direction::ToClient) > A_PART).then_some(()))
    })?;
    forwarder.process().signal(signal)?;
    let ended = forwarder.process().wait(GENEROUS)?;
    ensure!(!ended.status.success(), "the forwarder {}", ended.status);
    dump.fail(GENEROUS)?;
    expect_alive(&mut load)
}

#[test]
fn a_client_that_cannot_begin_says_so() {
    with_criu(Suite::Trixie, |test_dir, criu| {
        let mut load = Load::start(spec(test_dir), None)?;
        let images = test_dir.path("dumped");
        let address = (std::net::Ipv4Addr::LOCALHOST, free_port()?).into();
        let mut dump = Dump::new(criu, load.pid(), &images).serve_lazily(address)?;
        let relay = Proxy::start(address, relay(), None)?;
        let options = Options::new(&images).with(&["--summary-json", "missing/summary.json"]);
        let daemon = testbed::daemons::LazyDaemon::start(
            Make::Ours,
            &options.log_to("lazy.log"),
            Some(relay.address()),
        );
        ensure!(daemon.is_err(), "it began without a summary");
        dump.fail(GENEROUS)?;
        expect_alive(&mut load)
    });
}

#[test]
fn a_client_over_tls_says_so() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let dir = test_dir.path("pki");
        std::fs::create_dir_all(&dir)?;
        let tls = Authority::new(&dir, "ca")?.issue(&Host::LOOPBACK)?;
        let plan = Plan::new(criu, Source::Dump, Make::Ours).over(relay());
        let mut moving = under_way(test_dir, &plan.with(&tls.options()))?;
        moving.daemon.process().signal(Signal::SIGINT)?;
        moving.daemon.process().fail(GENEROUS)?;
        expect_source_alive(&mut moving)
    });
}
