//! Interruptions: whatever breaks, nothing half looks whole, nothing hangs, and the process lives
//! on at exactly one place with its own memory.

use std::fs;
use std::path::Path;

use anyhow::{Result, bail, ensure};
use nix::sys::signal::Signal;
use testbed::criu::Criu;
use testbed::daemons::{Make, Options, PageServer};
use testbed::for_each_criu;
use testbed::load::Load;
use testbed::load::spec::{LoadSpec, OnLostPage};
use testbed::load::steps::{Order, Pass, Step};
use testbed::migration::Dump;
use testbed::postcopy::{Plan, PostCopy, Source, slow_link};
use testbed::proxy::{Direction, Impairment, ImpairmentKind, Link, Proxy};
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};

for_each_criu!(
    dump_cut_by_a_reset,
    dump_cut_by_a_clean_end,
    dumper_killed_half_way,
    client_killed_by_sigkill,
    client_ended_by_sigterm,
    source_killed_under_the_client,
    link_reset_under_the_client,
    link_ended_cleanly_under_the_client,
);

const MIB: u32 = 64;
/// Half of a dump or a post-copy of [`MIB`], bytes.
const HALF_WAY: u64 = 24 << 20;

/// Dumps through a proxy into our page server until `kind` befalls the connection.
fn cut_dump(test_dir: &TestDir, criu: &Criu, kind: ImpairmentKind) -> Result<()> {
    let mut load = Load::start(LoadSpec::mixed(test_dir.path("load"), MIB), None)?;
    let images = test_dir.path("images");
    let mut server = PageServer::receiving(Make::Ours, &Options::new(&images))?;
    let impairment = Impairment {
        direction: Direction::ToServer,
        after_bytes: HALF_WAY,
        kind,
    };
    let proxy = Proxy::start(server.address(), Link::default(), Some(impairment))?;
    let dump = Dump::new(criu, load.pid(), test_dir.path("dump")).to(proxy.address());
    dump.start()?.fail(GENEROUS)?;
    server.process().fail(GENEROUS)?;
    expect_no_image(&images)?;
    expect_alive_and_right(&mut load)
}

fn dump_cut_by_a_reset(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    cut_dump(test_dir, criu, ImpairmentKind::Reset)
}

fn dump_cut_by_a_clean_end(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    cut_dump(test_dir, criu, ImpairmentKind::End)
}

fn dumper_killed_half_way(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let mut load = Load::start(LoadSpec::mixed(test_dir.path("load"), MIB), None)?;
    let images = test_dir.path("images");
    let mut server = PageServer::receiving(Make::Ours, &Options::new(&images))?;
    let dump = Dump::new(criu, load.pid(), test_dir.path("dump"));
    dump.kill_half_way(server.address(), slow_link(), HALF_WAY)?;
    server.process().fail(GENEROUS)?;
    expect_no_image(&images)?;
    expect_alive_and_right(&mut load)
}

/// No file in the directory may be taken for an image of memory.
fn expect_no_image(images: &Path) -> Result<()> {
    for entry in fs::read_dir(images)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let image = name.ends_with(".img") && name.starts_with("page");
        ensure!(
            !image,
            "{name} looks like a whole image after an interrupted session"
        );
    }
    Ok(())
}

fn expect_alive_and_right(load: &mut Load) -> Result<()> {
    load.expect_running()?;
    for report in load.run_everywhere(&[Step::Verify(Pass::full(Order::Ascending))])? {
        report.expect_right()?;
    }
    Ok(())
}

/// A post-copy over a slow link that is half way, its process idle.
fn half_way(test_dir: &TestDir, criu: &Criu, impairment: Option<Impairment>) -> Result<PostCopy> {
    let plan = Plan::new(criu, Source::Dump, Make::Ours);
    let plan = Plan {
        link: Some((slow_link(), impairment)),
        ..plan
    };
    let spec = LoadSpec {
        on_lost_page: OnLostPage::Count,
        pin_own_memory: true,
        ..LoadSpec::mixed(test_dir.path("load"), MIB)
    };
    let mut moving = PostCopy::start(test_dir, &plan, spec, &[])?;
    wait::until("half of the memory", GENEROUS, || {
        let over = moving.daemon.process().ended()?.is_some();
        Ok((over || moving.received() > HALF_WAY).then_some(()))
    })?;
    Ok(moving)
}

/// The dump must fail, and the source run on, once the restored process is out of the way.
fn expect_source_alive(moving: &mut PostCopy) -> Result<()> {
    let Some(dump) = moving.source() else {
        bail!("the dump is the source")
    };
    dump.fail(GENEROUS)?;
    moving.restored.kill();
    expect_alive_and_right(&mut moving.load)
}

/// Reads everything: what has not come is lost, and must say so; nothing may be wrong or zero.
fn expect_losses_told(moving: &PostCopy) -> Result<()> {
    let report = moving
        .load
        .run(0, &[Step::Verify(Pass::full(Order::Random))])?;
    ensure!(
        report.poisoned() > 0,
        "no page was lost: nothing was tested"
    );
    ensure!(
        report.wrong() == 0,
        "{} pages wrong, {} of them zero",
        report.wrong(),
        report.wrong_zero()
    );
    Ok(())
}

fn client_killed_by_sigkill(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let mut moving = half_way(test_dir, criu, None)?;
    // CRIU's dump takes one connection in its life: who stood by can only tell what is lost.
    moving.daemon.kill_for_standby()?.fail()?;
    expect_losses_told(&moving)?;
    expect_source_alive(&mut moving)
}

fn client_ended_by_sigterm(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let mut moving = half_way(test_dir, criu, None)?;
    moving.daemon.process().signal(Signal::SIGTERM)?;
    moving.daemon.process().fail(GENEROUS)?;
    expect_losses_told(&moving)?;
    expect_source_alive(&mut moving)
}

fn source_killed_under_the_client(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let mut moving = half_way(test_dir, criu, None)?;
    let Some(dump) = moving.source() else {
        bail!("the dump is the source")
    };
    dump.kill()?;
    moving.daemon.process().fail(GENEROUS)?;
    expect_losses_told(&moving)
}

fn link_reset_under_the_client(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let impairment = Impairment {
        direction: Direction::ToClient,
        after_bytes: HALF_WAY,
        kind: ImpairmentKind::Reset,
    };
    let mut moving = half_way(test_dir, criu, Some(impairment))?;
    moving.daemon.process().fail(GENEROUS)?;
    expect_losses_told(&moving)?;
    expect_source_alive(&mut moving)
}

fn link_ended_cleanly_under_the_client(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let impairment = Impairment {
        direction: Direction::ToClient,
        after_bytes: HALF_WAY,
        kind: ImpairmentKind::End,
    };
    let mut moving = half_way(test_dir, criu, Some(impairment))?;
    moving.daemon.process().fail(GENEROUS)?;
    expect_losses_told(&moving)
}
