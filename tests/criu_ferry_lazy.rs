//! `page-server --forward-lazy` beside a real `criu dump --lazy-pages`: it takes the memory over, serves
//! lazy clients from there, and ends the dump only when one of them has everything.

use std::fs;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use testbed::bed::Bed;
use testbed::criu::{Criu, Suite};
use testbed::daemons::Make;
use testbed::for_each_criu;
use testbed::load::scenarios::{reading, reshaping};
use testbed::load::spec::{LoadSpec, OnLostPage};
use testbed::load::steps::{Order, Pass, Step};
use testbed::postcopy::{Plan, PostCopy, Source, slow_link};
use testbed::proxy::Harm;
use testbed::suite::with_criu;
use testbed::wait::{self, GENEROUS};

for_each_criu!(
    reads_at_random_from_the_forwarder,
    criu_reads_at_random_from_the_forwarder,
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
fn migrate(bed: &Bed, plan: &Plan<'_>, spec: LoadSpec, steps: &[Step]) -> Result<()> {
    let mut moved = PostCopy::start(bed, plan, spec, steps)?;
    let reports = moved.reports()?;
    let faults: u64 = reports[0].every_step().map(|step| step.faults.count).sum();
    ensure!(
        faults > 0,
        "the process found no page missing: nothing was tested"
    );
    moved.finish()?;
    for report in moved
        .load
        .run_everywhere(&[Step::Verify(Pass::full(Order::Ascending))])?
    {
        report.expect_right()?;
    }
    Ok(())
}

fn reads_at_random_from_the_forwarder(bed: &Bed, criu: &Criu) -> Result<()> {
    let spec = LoadSpec::mixed(bed.path("load"), MIB);
    migrate(bed, &plan(criu, Make::Ours, &[]), spec, &reading())
}

fn criu_reads_at_random_from_the_forwarder(bed: &Bed, criu: &Criu) -> Result<()> {
    let spec = LoadSpec::mixed(bed.path("load"), MIB);
    migrate(bed, &plan(criu, Make::Criu(criu), &[]), spec, &reading())
}

#[test]
fn memory_that_is_spilled_is_reshaped() {
    with_criu(Suite::Sid, |bed, criu| {
        let spill = bed.path("spill");
        fs::create_dir(&spill)?;
        let plan = plan(criu, Make::Ours, &["--spill", &spill.to_string_lossy()]);
        migrate(
            bed,
            &plan,
            LoadSpec::mixed(bed.path("load"), MIB),
            &reshaping(),
        )
    });
}

/// A process that counts lost pages instead of dying of them.
fn careful(bed: &Bed) -> LoadSpec {
    LoadSpec {
        on_lost_page: OnLostPage::Count,
        pin_own_memory: true,
        ..LoadSpec::mixed(bed.path("load"), MIB)
    }
}

fn verify() -> [Step; 1] {
    [Step::Verify(Pass::full(Order::Random))]
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

#[test]
fn a_cut_link_is_made_again_while_the_processes_wait() {
    with_criu(Suite::Sid, |bed, criu| {
        let plan = plan(criu, Make::Ours, &[]);
        let mut moving = PostCopy::start(bed, &plan, careful(bed), &verify())?;
        wait_until_half_way(&mut moving)?;
        moving.proxy.as_ref().context("a link")?.cut(Harm::Reset);
        moving.reports()?;
        moving.finish()?;
        let log = fs::read_to_string(moving.daemon.process().log().context("a log")?)?;
        ensure!(
            log.contains("the source is back"),
            "the cut was not noticed: nothing was tested"
        );
        Ok(())
    });
}

#[test]
fn one_dump_is_restored_many_times() {
    with_criu(Suite::Experimental, |bed, criu| {
        let plan = plan(criu, Make::Ours, &["--keep"]);
        let mut moved = PostCopy::start(bed, &plan, careful(bed), &verify())?;
        for _ in 0..2 {
            moved.reports()?;
            moved.daemon.process().succeed(GENEROUS)?;
            moved.source().context("the dump")?.succeed(GENEROUS)?;
            moved = moved.again(&plan, &verify())?;
        }
        moved.reports()?;
        moved.daemon.process().succeed(GENEROUS)?;
        let forwarder = moved.forwarder().context("the forwarder")?;
        forwarder.signal(Signal::SIGTERM)?;
        forwarder.succeed(GENEROUS)?;
        Ok(())
    });
}

/// The dump fails, and its process goes on with all its memory.
fn expect_source_alive(moving: &mut PostCopy) -> Result<()> {
    moving.source().context("the dump")?.fail(GENEROUS)?;
    moving.restored.kill();
    moving.load.expect_running()?;
    moving.load.run(0, &verify())?.expect_right()
}

#[test]
fn a_forwarder_that_dies_costs_pages_but_fakes_none() {
    with_criu(Suite::Trixie, |bed, criu| {
        let mut plan = plan(criu, Make::Ours, &[]);
        plan.client_options = ["--reconnect-timeout", "0"].map(str::to_owned).into();
        let mut moving = PostCopy::start(bed, &plan, careful(bed), &[])?;
        wait_until_half_way(&mut moving)?;
        moving.forwarder().context("the forwarder")?.kill()?;
        moving.daemon.process().fail(GENEROUS)?;
        let report = moving.load.run(0, &verify())?;
        ensure!(
            report.poisoned() > 0,
            "no page was lost: nothing was tested"
        );
        ensure!(report.wrong() == 0, "{} pages are wrong", report.wrong());
        expect_source_alive(&mut moving)
    });
}

#[test]
fn the_source_goes_on_when_no_client_comes_back() {
    with_criu(Suite::Sid, |bed, criu| {
        let plan = plan(criu, Make::Ours, &["--reconnect-timeout", "1"]);
        let mut moving = PostCopy::start(bed, &plan, careful(bed), &[])?;
        wait_until_half_way(&mut moving)?;
        moving.daemon.process().kill()?;
        moving
            .forwarder()
            .context("the forwarder")?
            .fail(GENEROUS)?;
        expect_source_alive(&mut moving)
    });
}
