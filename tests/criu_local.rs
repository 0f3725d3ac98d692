//! Lazy restores from images on the restoring host, alone and on top of a chain of parents.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use testbed::criu::{Criu, Suite};
use testbed::daemons::{LazyDaemon, Make, Options, PageServer};
use testbed::for_each_criu;
use testbed::images::{copy_without_lazy_pages, move_same_pages_to_parent};
use testbed::load::Load;
use testbed::load::report::Report;
use testbed::load::scenarios::{reading, reshaping, verifying};
use testbed::load::spec::LoadSpec;
use testbed::load::steps::{Order, Pass, Step};
use testbed::migration::{Dump, Restore};
use testbed::postcopy::{Plan, PostCopy, Source, slow_link};
use testbed::rounds::{pages_file_bytes, pages_files, pages_room_bytes};
use testbed::suite::{make, with_criu};
use testbed::summary;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};

for_each_criu!(
    reads_from_local_images,
    reshapes_memory_from_local_images,
    reads_from_a_chain_of_parents,
    reads_a_chain_of_parents_from_our_page_server,
    a_chain_of_parents_is_what_criu_restores,
    local_images_are_given_back_as_they_are_installed,
    what_is_lazy_of_a_chain_is_given_back,
);

const MIB: u32 = 64;

fn restore_locally(test_dir: &TestDir, criu: &Criu, steps: &[Step]) -> Result<()> {
    let plan = Plan::new(criu, Source::Local, make(criu));
    let mut moved = PostCopy::start(
        test_dir,
        &plan,
        LoadSpec::mixed(test_dir.path("load"), MIB),
        steps,
    )?;
    moved.reports()?;
    moved.finish()
}

fn reads_from_local_images(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    restore_locally(test_dir, criu, &reading())
}

fn reshapes_memory_from_local_images(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    restore_locally(test_dir, criu, &reshaping())
}

/// Dumps a load three times, with writes between; it is gone after the last dump, which is in the
/// directory `newest`.
fn dump_three_times(test_dir: &TestDir, criu: &Criu) -> Result<(Load, Vec<Report>)> {
    let mut load = Load::start(LoadSpec::mixed(test_dir.path("load"), MIB), None)?;
    let dump = |name: &str| Dump::new(criu, load.pid(), test_dir.path(name));
    dump("oldest").leave_running().run()?;
    load.run(
        0,
        &[Step::Write {
            every: 3,
            order: Order::Random,
        }],
    )?
    .expect_right()?;
    dump("older").leave_running().run()?;
    load.run(
        0,
        &[Step::Write {
            every: 5,
            order: Order::Ascending,
        }],
    )?
    .expect_right()?;
    let before = load.run_everywhere(&[Step::Status])?;
    dump("newest").run()?;
    load.wait_until_gone()?;
    Ok((load, before))
}

/// Makes a chain of the three dumps.
fn link_parents(dir: &Path) -> Result<()> {
    for (child, parent) in [("newest", "older"), ("older", "oldest")] {
        let moved = move_same_pages_to_parent(&dir.join(child), &dir.join(parent))?;
        ensure!(moved > 0, "{child} shares no page with {parent}");
    }
    Ok(())
}

fn reads_from_a_chain_of_parents(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let (load, before) = dump_three_times(test_dir, criu)?;
    link_parents(test_dir.dir())?;
    let plan = Plan::new(criu, Source::Local, make(criu));
    let newest = test_dir.path("newest");
    let mut moved = PostCopy::from_images(&plan, load, before, newest, None, &reading())?;
    moved.reports()?;
    moved.finish()
}

fn reads_a_chain_of_parents_from_our_page_server(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let (load, before) = dump_three_times(test_dir, criu)?;
    // The restoring host has none of it.
    let here = test_dir.path("here");
    copy_without_lazy_pages(&test_dir.path("newest"), &here)?;
    link_parents(test_dir.dir())?;
    let options = Options::new(test_dir.path("newest")).log_to("serve.log");
    let server = PageServer::serving(Make::Ours, &options)?;
    let plan = Plan::new(criu, Source::PageServer(Make::Ours), make(criu)).over(slow_link());
    let mut moved = PostCopy::from_images(&plan, load, before, here, Some(server), &reading())?;
    moved.reports()?;
    moved.finish()
}

/// The chains of these tests are what CRIU itself takes for chains.
fn a_chain_of_parents_is_what_criu_restores(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let (load, _) = dump_three_times(test_dir, criu)?;
    link_parents(test_dir.dir())?;
    let _restored = Restore::new(criu, test_dir.path("newest")).run()?;
    load.run(0, &[Step::Verify(Pass::full(Order::Ascending))])?
        .expect_right()
}

/// A plan of a local restore that gives its images back, with further `options`.
fn giving_back<'a>(criu: &'a Criu, options: &[&str]) -> Plan<'a> {
    let options = ["--auto-dedup"].iter().chain(options);
    Plan {
        client_options: options.map(ToString::to_string).collect(),
        ..Plan::new(criu, Source::Local, Make::Ours)
    }
}

/// Fails if somebody can still be served from `images`.
fn expect_refused(images: &Path) -> Result<()> {
    for serving in [false, true] {
        let options = Options::new(images).log_to("refused.log");
        let error = match serving {
            true => PageServer::serving(Make::Ours, &options).err(),
            false => LazyDaemon::start(Make::Ours, &options, None).err(),
        };
        let error = format!(
            "{:#}",
            error.context("images that are not whole are served")?
        );
        ensure!(error.contains("--auto-dedup"), "{error}");
    }
    Ok(())
}

fn local_images_are_given_back_as_they_are_installed(
    test_dir: &TestDir,
    criu: &Criu,
) -> Result<()> {
    let summary = test_dir.path("summary.json");
    let plan = giving_back(criu, &["--summary-json", &summary.to_string_lossy()]);
    let spec = LoadSpec::mixed(test_dir.path("load"), MIB);
    let mut moved = PostCopy::start(test_dir, &plan, spec, &reading())?;
    moved.reports()?;
    moved.finish()?;
    let images = test_dir.path("dumped");
    let (length, room) = (pages_file_bytes(&images)?, pages_room_bytes(&images)?);
    // What CRIU has restored itself stays.
    ensure!(room < length / 4, "{room} bytes of {length} are left");
    let summary = summary::whole(&summary)?;
    let freed = summary["freed_bytes"].as_u64();
    ensure!(
        freed.is_some_and(|freed| freed > length / 4 * 3),
        "{summary}"
    );
    expect_refused(&images)
}

/// CRIU itself restores what is in parents: only pages of the newest images are lazy.
fn what_is_lazy_of_a_chain_is_given_back(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let (load, before) = dump_three_times(test_dir, criu)?;
    link_parents(test_dir.dir())?;
    let newest = test_dir.path("newest");
    let room = pages_room_bytes(&newest)?;
    let plan = giving_back(criu, &[]);
    let from = newest.clone();
    let mut moved = PostCopy::from_images(&plan, load, before, from, None, &reading())?;
    moved.reports()?;
    moved.finish()?;
    let left = pages_room_bytes(&newest)?;
    ensure!(left < room / 2, "{left} bytes of {room} are left");
    expect_refused(&newest)
}

#[test]
fn children_find_what_their_parents_have_installed_before() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let spec = LoadSpec::mixed(test_dir.path("load"), MIB);
        let mut moved = PostCopy::start(test_dir, &giving_back(criu, &[]), spec, &reshaping())?;
        moved.reports()?;
        moved.finish()
    });
}

/// A load that is gone, what it said before, and its images.
fn dumped(test_dir: &TestDir, criu: &Criu) -> Result<(Load, Vec<Report>, PathBuf)> {
    let mut load = Load::start(LoadSpec::mixed(test_dir.path("load"), MIB), None)?;
    let before = load.run_everywhere(&[Step::Status])?;
    let images = test_dir.path("dumped");
    Dump::new(criu, load.pid(), &images).run()?;
    load.wait_until_gone()?;
    Ok((load, before, images))
}

#[test]
fn a_restore_that_fails_leaves_its_images_whole() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let (load, before, images) = dumped(test_dir, criu)?;
        let room = pages_room_bytes(&images)?;
        let options = Options::new(&images)
            .with(&["--auto-dedup"])
            .log_to("failed.log");
        let mut daemon = LazyDaemon::start(Make::Ours, &options, None)?;
        // A restore that comes, tells of a zombie, and goes.
        let mut restore = UnixStream::connect(images.join("lazy-pages.socket"))?;
        restore.write_all(&(-7i32).to_le_bytes())?;
        drop(restore);
        ensure!(daemon.process().succeed(GENEROUS).is_err(), "no failure");
        ensure!(pages_room_bytes(&images)? == room, "pages are gone");
        let plan = Plan::new(criu, Source::Local, Make::Ours);
        let mut moved = PostCopy::from_images(&plan, load, before, images, None, &verifying())?;
        moved.reports()?;
        moved.finish()
    });
}

#[test]
fn files_that_others_name_too_are_left_alone() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let (load, before, images) = dumped(test_dir, criu)?;
        let room = pages_room_bytes(&images)?;
        for (n, file) in pages_files(&images)?.iter().enumerate() {
            fs::hard_link(file, test_dir.path(&format!("copy-{n}")))?;
        }
        let plan = giving_back(criu, &[]);
        let from = images.clone();
        let mut moved = PostCopy::from_images(&plan, load, before, from, None, &verifying())?;
        moved.reports()?;
        moved.finish()?;
        ensure!(pages_room_bytes(&images)? == room, "pages are gone");
        Ok(())
    });
}

#[test]
fn who_takes_over_goes_on_with_what_is_left_of_the_images() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let spec = LoadSpec::mixed(test_dir.path("load"), MIB).careful();
        // Slow enough to be killed half-way.
        let plan = giving_back(criu, &["--max-bandwidth", "16M"]);
        let mut moved = PostCopy::start(test_dir, &plan, spec, &[])?;
        let images = test_dir.path("dumped");
        let length = pages_file_bytes(&images)?;
        wait::until("a part of the memory", GENEROUS, || {
            let over = moved.daemon.process().ended()?.is_some();
            ensure!(!over, "{}", moved.daemon.process().log_tail());
            Ok((pages_room_bytes(&images)? < length / 4 * 3).then_some(()))
        })?;
        let standby = moved.daemon.kill_for_standby()?;
        moved.expect_all_right()?;
        standby.succeed()
    });
}
