//! `page-server --forward-lazy` beside a real `criu dump --lazy-pages`: it takes the memory over, serves
//! lazy clients from there, and ends the dump only when one of them has everything.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use testbed::criu::{Criu, Suite};
use testbed::daemons::{LazyDaemon, Make, Options};
use testbed::for_each_criu;
use testbed::load::Load;
use testbed::load::report::expect_faults;
use testbed::load::scenarios::{reading, reshaping, verifying};
use testbed::load::spec::LoadSpec;
use testbed::load::steps::Step;
use testbed::migration::Dump;
use testbed::net::free_port;
use testbed::pki::{Authority, Host};
use testbed::postcopy::{Plan, PostCopy, Source, slow_link};
use testbed::proxy::{Direction, Impairment, ImpairmentKind};
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};

for_each_criu!(
    reads_at_random_from_the_forwarder,
    criu_reads_at_random_from_the_forwarder,
    reads_at_random_over_ferry,
);

const MIB: u32 = 64;
/// About half of a post-copy of [`MIB`], bytes.
const HALF_WAY: u64 = 24 << 20;

/// A plan through a forwarder, with a link slow enough to find pages missing behind it.
fn plan<'a>(criu: &'a Criu, client: Make<'a>, options: &[&str]) -> Plan<'a> {
    let plan = Plan::new(criu, Source::Forwarder, client).over(slow_link());
    Plan {
        source_options: options.iter().map(ToString::to_string).collect(),
        ..plan
    }
}

/// Moves a process, lets it carry out `steps` on arrival, and compares all its memory at the end.
fn migrate(test_dir: &TestDir, plan: &Plan<'_>, spec: LoadSpec, steps: &[Step]) -> Result<()> {
    let mut moved = PostCopy::start(test_dir, plan, spec, steps)?;
    let reports = moved.reports()?;
    expect_faults(&reports)?;
    moved.finish()?;
    moved.expect_all_right()
}

fn reads_at_random_from_the_forwarder(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let spec = LoadSpec::mixed(test_dir.path("load"), MIB);
    migrate(test_dir, &plan(criu, Make::Ours, &[]), spec, &reading())
}

fn criu_reads_at_random_from_the_forwarder(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let spec = LoadSpec::mixed(test_dir.path("load"), MIB);
    migrate(
        test_dir,
        &plan(criu, Make::Criu(criu), &[]),
        spec,
        &reading(),
    )
}

/// A plan whose lazy-client speaks ferry.
fn over_ferry<'a>(criu: &'a Criu, options: &[&str], client_options: &[&str]) -> Plan<'a> {
    let client_options = client_options.iter().map(ToString::to_string);
    Plan {
        client_options: ["--ferry".to_owned()]
            .into_iter()
            .chain(client_options)
            .collect(),
        ..plan(criu, Make::Ours, options)
    }
}

fn reads_at_random_over_ferry(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let spec = LoadSpec::mixed(test_dir.path("load"), MIB);
    migrate(test_dir, &over_ferry(criu, &[], &[]), spec, &reading())
}

#[test]
fn memory_is_reshaped_while_it_is_pushed() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let spec = LoadSpec::mixed(test_dir.path("load"), MIB);
        migrate(test_dir, &over_ferry(criu, &[], &[]), spec, &reshaping())
    });
}

#[test]
fn memory_that_is_spilled_is_reshaped() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let spill = test_dir.path("spill");
        fs::create_dir(&spill)?;
        let plan = plan(criu, Make::Ours, &["--spill", &spill.to_string_lossy()]);
        migrate(
            test_dir,
            &plan,
            LoadSpec::mixed(test_dir.path("load"), MIB),
            &reshaping(),
        )
    });
}

fn careful(test_dir: &TestDir) -> LoadSpec {
    LoadSpec::mixed(test_dir.path("load"), MIB).careful()
}

fn wait_until_half_way(moving: &mut PostCopy) -> Result<()> {
    wait::until("half of the memory", GENEROUS, || {
        let over = moving.daemon.process().ended()?.is_some();
        ensure!(
            !over,
            "lazy-client is over{}",
            moving.daemon.process().log_tail()
        );
        Ok((moving.received() > HALF_WAY).then_some(()))
    })
}

fn expect_reconnected(moving: &mut PostCopy) -> Result<()> {
    let log = fs::read_to_string(moving.daemon.process().log().context("a log")?)?;
    ensure!(
        log.contains("the source is back"),
        "the connection did not break: nothing was tested"
    );
    Ok(())
}

fn cut_half_way(test_dir: &TestDir, plan: &Plan<'_>) -> Result<()> {
    let mut moving = PostCopy::start(test_dir, plan, careful(test_dir), &verifying())?;
    wait_until_half_way(&mut moving)?;
    moving
        .proxy
        .as_ref()
        .context("a link")?
        .cut(ImpairmentKind::Reset);
    moving.reports()?;
    moving.finish()?;
    expect_reconnected(&mut moving)
}

#[test]
fn a_cut_link_is_made_again_while_the_processes_wait() {
    with_criu(Suite::Sid, |test_dir, criu| {
        cut_half_way(test_dir, &plan(criu, Make::Ours, &[]))
    });
}

#[test]
fn a_cut_ferry_goes_on_where_it_was() {
    with_criu(Suite::Sid, |test_dir, criu| {
        cut_half_way(test_dir, &over_ferry(criu, &[], &[]))
    });
}

#[test]
fn a_flipped_bit_is_found_and_its_pages_come_again() {
    with_criu(Suite::Trixie, |test_dir, criu| {
        // Further than what is left to come behind the first of them.
        let impairment = Impairment {
            direction: Direction::ToClient,
            after_bytes: HALF_WAY,
            kind: ImpairmentKind::FlipBit,
        };
        let plan = over_ferry(criu, &[], &[]).with_impairment(slow_link(), impairment);
        let mut moving = PostCopy::start(test_dir, &plan, careful(test_dir), &verifying())?;
        moving.reports()?;
        moving.finish()?;
        expect_reconnected(&mut moving)
    });
}

fn restore_many_times(test_dir: &TestDir, plan: &Plan<'_>) -> Result<()> {
    let mut moved = PostCopy::start(test_dir, plan, careful(test_dir), &verifying())?;
    for _ in 0..2 {
        moved.reports()?;
        moved.daemon.process().succeed(GENEROUS)?;
        moved.source().context("the dump")?.succeed(GENEROUS)?;
        moved = moved.again(plan, &verifying())?;
    }
    moved.reports()?;
    moved.daemon.process().succeed(GENEROUS)?;
    let forwarder = moved.forwarder().context("the forwarder")?;
    forwarder.signal(Signal::SIGTERM)?;
    forwarder.succeed(GENEROUS)?;
    Ok(())
}

#[test]
fn one_dump_is_restored_many_times() {
    with_criu(Suite::Experimental, |test_dir, criu| {
        restore_many_times(test_dir, &plan(criu, Make::Ours, &["--keep"]))
    });
}

#[test]
fn one_dump_is_ferried_many_times() {
    with_criu(Suite::Sid, |test_dir, criu| {
        restore_many_times(test_dir, &over_ferry(criu, &["--keep"], &[]))
    });
}

#[test]
fn ferry_is_secured_by_tls() {
    with_criu(Suite::Experimental, |test_dir, criu| {
        let pki = test_dir.path("pki");
        fs::create_dir_all(&pki)?;
        let tls = Authority::new(&pki, "ca")?
            .issue(&Host::LOOPBACK)?
            .options();
        let plan = over_ferry(criu, &[], &[]).with(&tls);
        migrate(
            test_dir,
            &plan,
            LoadSpec::mixed(test_dir.path("load"), MIB),
            &reading(),
        )
    });
}

#[test]
fn a_dump_that_is_asked_for_ferry_goes_on_and_the_client_says_why() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let mut load = Load::start(careful(test_dir), None)?;
        let images = test_dir.path("dumped");
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        let mut dump = Dump::new(criu, load.pid(), &images).serve_lazily(address)?;
        let options = Options::new(&images).with(&["--ferry"]).log_to("lazy.log");
        let Err(error) = LazyDaemon::start(Make::Ours, &options, Some(address)) else {
            bail!("a dump does not speak ferry");
        };
        let message = format!("{error:#}");
        ensure!(message.contains("does not speak ferry"), "{message}");
        dump.fail(GENEROUS)?;
        load.expect_running()?;
        load.run(0, &verifying())?.expect_right()
    });
}

/// The dump fails, and its process goes on with all its memory.
fn expect_source_alive(moving: &mut PostCopy) -> Result<()> {
    moving.source().context("the dump")?.fail(GENEROUS)?;
    moving.restored.kill();
    moving.load.expect_running()?;
    moving.load.run(0, &verifying())?.expect_right()
}

fn kill_forwarder_half_way(test_dir: &TestDir, plan: &Plan<'_>) -> Result<()> {
    let mut moving = PostCopy::start(test_dir, plan, careful(test_dir), &[])?;
    wait_until_half_way(&mut moving)?;
    moving.forwarder().context("the forwarder")?.kill()?;
    moving.daemon.process().fail(GENEROUS)?;
    let report = moving.load.run(0, &verifying())?;
    ensure!(
        report.poisoned() > 0,
        "no page was lost: nothing was tested"
    );
    ensure!(report.wrong() == 0, "{} pages are wrong", report.wrong());
    expect_source_alive(&mut moving)
}

#[test]
fn a_forwarder_that_dies_costs_pages_but_fakes_none() {
    with_criu(Suite::Trixie, |test_dir, criu| {
        let mut plan = plan(criu, Make::Ours, &[]);
        plan.client_options = ["--reconnect-timeout", "0"].map(str::to_owned).into();
        kill_forwarder_half_way(test_dir, &plan)
    });
}

#[test]
fn a_forwarder_that_dies_under_ferry_fakes_no_page() {
    with_criu(Suite::Sid, |test_dir, criu| {
        kill_forwarder_half_way(
            test_dir,
            &over_ferry(criu, &[], &["--reconnect-timeout", "1"]),
        )
    });
}

#[test]
fn the_source_goes_on_when_no_client_comes_back() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let mut plan = plan(criu, Make::Ours, &["--reconnect-timeout", "1"]);
        plan.client_options = ["--no-standby".to_owned()].into();
        for_client_that_dies(test_dir, &plan)
    });
}

#[test]
fn the_source_goes_on_when_no_ferried_client_comes_back() {
    with_criu(Suite::Sid, |test_dir, criu| {
        for_client_that_dies(
            test_dir,
            &over_ferry(criu, &["--reconnect-timeout", "1"], &["--no-standby"]),
        )
    });
}

#[test]
fn the_source_goes_on_at_once_when_a_ferried_client_fails() {
    with_criu(Suite::Sid, |test_dir, criu| {
        // Longer than anybody here waits.
        let plan = over_ferry(criu, &["--reconnect-timeout", "3600"], &[]);
        let mut moving = PostCopy::start(test_dir, &plan, careful(test_dir), &[])?;
        wait_until_half_way(&mut moving)?;
        moving.daemon.process().signal(Signal::SIGTERM)?;
        moving.daemon.process().fail(GENEROUS)?;
        let forwarder = moving.forwarder().context("the forwarder")?;
        forwarder.fail(GENEROUS)?;
        let log_text = fs::read_to_string(forwarder.log().context("a log")?)?;
        ensure!(log_text.contains("stopped by SIGTERM"), "{log_text}");
        expect_source_alive(&mut moving)
    });
}

#[test]
fn a_ferried_client_fails_at_once_when_the_forwarder_is_stopped() {
    with_criu(Suite::Sid, |test_dir, criu| {
        // Longer than anybody here waits.
        let plan = over_ferry(criu, &[], &["--reconnect-timeout", "3600"]);
        let mut moving = PostCopy::start(test_dir, &plan, careful(test_dir), &[])?;
        wait_until_half_way(&mut moving)?;
        let forwarder = moving.forwarder().context("the forwarder")?;
        forwarder.signal(Signal::SIGTERM)?;
        forwarder.fail(GENEROUS)?;
        let client = moving.daemon.process();
        client.fail(GENEROUS)?;
        let log_text = fs::read_to_string(client.log().context("a log")?)?;
        ensure!(log_text.contains("stopped by a signal"), "{log_text}");
        expect_source_alive(&mut moving)
    });
}

#[test]
fn a_ferried_client_that_fails_while_the_link_is_cut_says_so_over_a_new_connection() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let plan = over_ferry(criu, &["--reconnect-timeout", "3600"], &[]);
        let mut moving = PostCopy::start(test_dir, &plan, careful(test_dir), &[])?;
        wait_until_half_way(&mut moving)?;
        let link = moving.proxy.as_ref().context("a link")?;
        link.cut(ImpairmentKind::Reset);
        moving.daemon.process().signal(Signal::SIGTERM)?;
        moving.daemon.process().fail(GENEROUS)?;
        moving
            .forwarder()
            .context("the forwarder")?
            .fail(GENEROUS)?;
        expect_source_alive(&mut moving)
    });
}

fn for_client_that_dies(test_dir: &TestDir, plan: &Plan<'_>) -> Result<()> {
    let mut moving = PostCopy::start(test_dir, plan, careful(test_dir), &[])?;
    wait_until_half_way(&mut moving)?;
    moving.daemon.process().kill()?;
    moving
        .forwarder()
        .context("the forwarder")?
        .fail(GENEROUS)?;
    expect_source_alive(&mut moving)
}
