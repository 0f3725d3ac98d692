//! A lazy-client that is killed: who stood by takes over, and no page is wrong.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use testbed::criu::{Criu, Suite};
use testbed::daemons::Make;
use testbed::load::scenarios::{reshaping, verifying};
use testbed::load::spec::LoadSpec;
use testbed::load::steps::Step;
use testbed::orphan::Orphan;
use testbed::postcopy::{Plan, PostCopy, Source, slow_link};
use testbed::process::descendants;
use testbed::suite::with_criu;
use testbed::summary;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};

const MIB: u32 = 64;
/// About half of a post-copy of [`MIB`], bytes.
const HALF_WAY: u64 = 24 << 20;

/// A post-copy over a slow link from a page server of ours that stays for several sessions.
fn served(test_dir: &TestDir, criu: &Criu, options: &[&str], steps: &[Step]) -> Result<PostCopy> {
    let plan = Plan {
        source_options: vec!["--keep".to_owned()],
        ..Plan::ours(criu, Source::PageServer(Make::Ours), options).over(slow_link())
    };
    PostCopy::start(test_dir, &plan, careful(test_dir), steps)
}

fn careful(test_dir: &TestDir) -> LoadSpec {
    LoadSpec::mixed(test_dir.path("load"), MIB).careful()
}

fn wait_until_received(moving: &mut PostCopy, bytes: u64) -> Result<()> {
    wait::until("a part of the memory", GENEROUS, || {
        if moving.daemon.process().ended()?.is_some() {
            bail!("lazy-client is over{}", moving.daemon.process().log_tail());
        }
        Ok((moving.received() > bytes).then_some(()))
    })
}

fn expect_all_came(path: &Path) -> Result<()> {
    let summary = summary::whole(path)?;
    for field in ["missing_pages", "trace_left_out"] {
        ensure!(summary[field] == 0, "{field}: {summary}");
    }
    ensure!(summary["pages"]["poisoned"] == 0, "lost pages: {summary}");
    Ok(())
}

#[test]
fn a_source_that_serves_again_is_gone_on_with() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let path = test_dir.path("summary.json");
        let options = ["--summary-json", &path.to_string_lossy()];
        let mut moving = served(test_dir, criu, &options, &verifying())?;
        wait_until_received(&mut moving, HALF_WAY)?;
        let standby = moving.daemon.kill_for_standby()?;
        moving.reports()?;
        standby.succeed()?;
        expect_all_came(&path)?;
        let log = moving.daemon.process().log().map(fs::read_to_string);
        let log = log.context("a log")??;
        let (_, behind) = log.split_once("takes over").context("a takeover")?;
        // It gave up before all that it does not need.
        ensure!(!behind.contains("sandbox:"), "a second sandbox: {behind}");
        moving.expect_all_right()
    });
}

/// The process forks, moves, unmaps and gives back memory meanwhile: who takes over must know where it is.
fn killed_while_memory_is_reshaped(suite: Suite, received: u64) {
    with_criu(suite, |test_dir, criu| {
        let mut moving = served(test_dir, criu, &[], &reshaping())?;
        wait_until_received(&mut moving, received)?;
        let standby = moving.daemon.kill_for_standby()?;
        moving.reports()?;
        standby.succeed()
    });
}

#[test]
fn memory_is_reshaped_early() {
    killed_while_memory_is_reshaped(Suite::Trixie, 4 << 20);
}

#[test]
fn memory_is_reshaped_half_way() {
    killed_while_memory_is_reshaped(Suite::Sid, HALF_WAY);
}

#[test]
fn memory_is_reshaped_late() {
    killed_while_memory_is_reshaped(Suite::Experimental, 40 << 20);
}

#[test]
fn a_forwarder_pushes_to_who_takes_over() {
    with_criu(Suite::Sid, |test_dir, criu| {
        // The session of the one that was killed is waited for as well.
        let plan = Plan {
            source_options: ["--reconnect-timeout", "2"].map(str::to_owned).into(),
            ..Plan::ours(criu, Source::Forwarder, &["--ferry"]).over(slow_link())
        };
        let mut moving = PostCopy::start(test_dir, &plan, careful(test_dir), &verifying())?;
        wait_until_received(&mut moving, HALF_WAY)?;
        let standby = moving.daemon.kill_for_standby()?;
        moving.reports()?;
        standby.succeed()?;
        // The dump has heard that everything is there: it has succeeded, and its processes are gone.
        moving.source().context("the dump")?.succeed(GENEROUS)?;
        moving
            .forwarder()
            .context("the forwarder")?
            .succeed(GENEROUS)?;
        moving.load.wait_until_gone()
    });
}

#[test]
fn local_images_are_gone_on_with() {
    with_criu(Suite::Sid, |test_dir, criu| {
        // So slow that it has brought next to nothing when it is killed.
        let plan = Plan::ours(criu, Source::Local, &["--max-bandwidth", "16K"]);
        let mut moving = PostCopy::start(test_dir, &plan, careful(test_dir), &[])?;
        let standby = moving.daemon.kill_for_standby()?;
        moving.expect_all_right()?;
        standby.succeed()
    });
}

#[test]
fn a_restore_that_ends_in_order_leaves_nobody() {
    with_criu(Suite::Trixie, |test_dir, criu| {
        let mut moving = served(test_dir, criu, &[], &verifying())?;
        let standby = descendants(moving.daemon.process().pid());
        ensure!(standby.len() == 1, "{} processes stand by", standby.len());
        moving.reports()?;
        moving.daemon.process().succeed(GENEROUS)?;
        let log = fs::read_to_string(moving.daemon.process().log().context("a log")?)?;
        ensure!(!log.contains("takes over"), "{log}");
        let orphan = Orphan::new(standby[0].as_raw())?;
        orphan.succeed()
    });
}
