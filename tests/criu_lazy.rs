//! Post-copy: real processes use their memory in every way while it is still missing.

use std::collections::HashSet;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;

use anyhow::{Result, ensure};
use nix::unistd::Pid;
use testbed::criu::Criu;
use testbed::daemons::{LazyDaemon, Make, Options};
use testbed::for_each_criu;
use testbed::load::Load;
use testbed::load::report::expect_faults;
use testbed::load::scenarios::{reading, reshaping};
use testbed::load::spec::LoadSpec;
use testbed::load::steps::{Order, Pass, Step};
use testbed::migration::{Dump, Restore};
use testbed::net::free_port;
use testbed::postcopy::{Plan, PostCopy, Source, slow_link};
use testbed::suite::make;
use testbed::test_dir::TestDir;
use testbed::wait::GENEROUS;

for_each_criu!(
    reads_at_random_from_the_dump,
    reshapes_memory_from_the_dump,
    forks_in_a_tree_from_the_dump,
    exits_while_pages_are_missing,
    reads_at_random_from_our_page_server,
    reads_at_random_from_criu_page_server,
    reshapes_memory_from_our_page_server,
    reshapes_memory_from_criu_page_server,
    a_refused_connection_is_watched_no_more,
);

const MIB: u32 = 64;

/// Moves a mixed process over a slow link and lets it carry out `steps` on arrival.
fn migrate(test_dir: &TestDir, criu: &Criu, source: Source<'_>, steps: &[Step]) -> Result<()> {
    let plan = Plan::new(criu, source, make(criu)).over(slow_link());
    let mut moved = PostCopy::start(
        test_dir,
        &plan,
        LoadSpec::mixed(test_dir.path("load"), MIB),
        steps,
    )?;
    let reports = moved.reports()?;
    expect_faults(&reports)?;
    moved.finish()?;
    // Once everything has come, everything is still right.
    let last = moved
        .load
        .run(0, &[Step::Verify(Pass::full(Order::Ascending))])?;
    last.expect_right()
}

fn reads_at_random_from_the_dump(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    migrate(test_dir, criu, Source::Dump, &reading())
}

fn reshapes_memory_from_the_dump(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    migrate(test_dir, criu, Source::Dump, &reshaping())
}

fn reads_at_random_from_our_page_server(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    migrate(test_dir, criu, Source::PageServer(Make::Ours), &reading())
}

fn reads_at_random_from_criu_page_server(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    migrate(
        test_dir,
        criu,
        Source::PageServer(Make::Criu(criu)),
        &reading(),
    )
}

fn reshapes_memory_from_our_page_server(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    migrate(test_dir, criu, Source::PageServer(Make::Ours), &reshaping())
}

fn reshapes_memory_from_criu_page_server(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    migrate(
        test_dir,
        criu,
        Source::PageServer(Make::Criu(criu)),
        &reshaping(),
    )
}

fn forks_in_a_tree_from_the_dump(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let plan = Plan::new(criu, Source::Dump, make(criu)).over(slow_link());
    let fork = Step::Fork {
        depth: 2,
        pass: Pass::full(Order::Random).threads(2),
    };
    let verify = Step::Verify(Pass::full(Order::Strided(7)));
    let spec = LoadSpec::tree(test_dir.path("load"), MIB / 2, 4);
    let mut moved = PostCopy::start(test_dir, &plan, spec, &[fork, verify])?;
    for report in moved.reports()? {
        let digest = moved.load.spec().initial_digest(report.process);
        let last = report.steps.last().and_then(|step| step.digest);
        ensure!(
            last == Some(digest),
            "process {}: not the memory dumped",
            report.process
        );
        let counting = report.thread_counters.iter().all(|&counter| counter > 0);
        ensure!(
            counting,
            "a thread of process {} has lost its count",
            report.process
        );
    }
    moved.finish()
}

fn exits_while_pages_are_missing(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let plan = Plan::new(criu, Source::Dump, make(criu)).over(slow_link());
    let spec = LoadSpec::mixed(test_dir.path("load"), MIB);
    let mut moved = PostCopy::start(test_dir, &plan, spec, &[Step::Exit { code: 7 }])?;
    let pid = u32::try_from(moved.load.pid().as_raw())?;
    let ended = moved.restored.wait_for_end(pid, GENEROUS)?;
    ensure!(ended == "exited 7", "the restored process {ended}");
    moved.finish()
}

/// What an epoll of a process watches by inode, in hexadecimal, though the process has closed it.
fn watched_after_closing(pid: Pid) -> Result<Vec<String>> {
    let mut open = HashSet::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        open.extend(fs::metadata(entry?.path()).map(|file| format!("ino:{:x}", file.ino())));
    }
    let mut closed = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        let info = fs::read_to_string(entry?.path()).unwrap_or_default();
        let watched = info.lines().filter(|line| line.starts_with("tfd:"));
        let inodes = watched.flat_map(|line| {
            line.split_whitespace()
                .find(|word| word.starts_with("ino:"))
        });
        closed.extend(
            inodes
                .filter(|inode| !open.contains(*inode))
                .map(str::to_owned),
        );
    }
    Ok(closed)
}

/// criu dump takes one connection, and refuses the one for faults. The standby's copy of that keeps it in the
/// client's poll, where it would end each wait at once until the restore comes, and as long as pages are missing.
fn a_refused_connection_is_watched_no_more(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let load = Load::start(LoadSpec::mixed(test_dir.path("load"), 8), None)?;
    let images = test_dir.path("images");
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
    let _source = Dump::new(criu, load.pid(), &images).serve_lazily(address)?;
    let options = Options::new(&images)
        .log_to("lazy.log")
        .with(&["--on-demand"]);
    let mut client = LazyDaemon::start(Make::Ours, &options, Some(address))?;
    let _restored = Restore::new(criu, &images).lazily().run()?;
    let closed = watched_after_closing(client.process().pid())?;
    ensure!(closed.is_empty(), "still watched: {closed:?}");
    Ok(())
}
