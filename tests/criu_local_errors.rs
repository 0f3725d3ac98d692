//! What fails on the restoring host, or while the source reads its own images, is not the loss of the source.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use testbed::criu::{Criu, Suite};
use testbed::daemons::{Make, Options, PageServer};
use testbed::disk::FailingDisk;
use testbed::load::Load;
use testbed::load::scenarios::verifying;
use testbed::load::spec::LoadSpec;
use testbed::load::steps::Step;
use testbed::memory_group::MemoryGroup;
use testbed::migration::Dump;
use testbed::postcopy::{Plan, PostCopy, Source, slow_link};
use testbed::suite::with_criu;
use testbed::summary;
use testbed::test_dir::TestDir;
use testbed::wait::{self, GENEROUS};

const MIB: u32 = 48;
/// So that there is time to make something fail.
const SLOWLY: [&str; 2] = ["--max-bandwidth", "16M"];

fn spec(test_dir: &TestDir) -> LoadSpec {
    LoadSpec::mixed(test_dir.path("load"), MIB).careful()
}

/// The largest pages file of a directory, which has the memory of the load.
fn pages_file(dir: &Path) -> Result<PathBuf> {
    let mut largest = (0, None);
    for entry in dir.read_dir()? {
        let entry = entry?;
        let name = entry.file_name();
        let bytes = entry.metadata()?.len();
        if name.to_string_lossy().starts_with("pages-") && bytes > largest.0 {
            largest = (bytes, Some(entry.path()));
        }
    }
    largest.1.context("a pages file")
}

fn cut(path: &Path, bytes: u64) -> Result<()> {
    Ok(File::options().write(true).open(path)?.set_len(bytes)?)
}

fn client_log(moving: &mut PostCopy) -> Result<String> {
    let log = moving.daemon.process().log().context("a log")?.to_owned();
    Ok(fs::read_to_string(log)?)
}

/// A load that was dumped to `test_dir/dumped`, all of it, and is gone.
fn dumped(test_dir: &TestDir, criu: &Criu) -> Result<(Load, PathBuf)> {
    let mut load = Load::start(spec(test_dir), None)?;
    let dir = test_dir.path("dumped");
    Dump::new(criu, load.pid(), &dir).run()?;
    load.wait_until_gone()?;
    Ok((load, dir))
}

#[test]
fn a_file_that_cannot_be_read_for_a_while_loses_nothing() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let plan = Plan::ours(criu, Source::Local, &SLOWLY);
        let mut moving = PostCopy::start(test_dir, &plan, spec(test_dir), &verifying())?;
        let file = pages_file(&test_dir.path("dumped"))?;
        let whole = fs::read(&file)?;
        // Not at the border of a page: the last one would look half empty.
        cut(&file, 12_345)?;
        moving.wait_for_line("trying again")?;
        fs::write(&file, &whole)?;
        moving.reports()?;
        moving.finish()?;
        moving.expect_all_right()?;
        let told = client_log(&mut moving)?.matches("trying again").count();
        ensure!(told < 5, "{told} lines");
        Ok(())
    });
}

#[test]
fn a_file_that_stays_cut_costs_its_pages_alone_and_ends() {
    with_criu(Suite::Experimental, |test_dir, criu| {
        let path = test_dir.path("summary.json");
        let mut options = SLOWLY.to_vec();
        let summary_path = path.to_string_lossy().into_owned();
        options.extend(["--local-timeout", "1", "--summary-json", &summary_path]);
        let plan = Plan::ours(criu, Source::Local, &options);
        let mut moving = PostCopy::start(test_dir, &plan, spec(test_dir), &[])?;
        let file = pages_file(&test_dir.path("dumped"))?;
        let bytes = file.metadata()?.len();
        cut(&file, bytes - (4 << 20))?;
        let seq = moving.load.send(0, &verifying())?;
        moving.daemon.process().fail(GENEROUS)?;
        let report = moving.load.receive(0, seq, GENEROUS)?;
        ensure!(report.wrong() == 0, "{} pages wrong", report.wrong());
        let lost = report.poisoned();
        ensure!(
            lost > 0 && lost <= 1024,
            "{lost} pages lost of 1024 that were cut off"
        );
        let log = client_log(&mut moving)?;
        ensure!(log.contains("memory is lost"), "{log}");
        ensure!(log.contains("pages-"), "the file is not named: {log}");
        ensure!(log.lines().count() < 200, "{} lines", log.lines().count());
        let summary = summary::whole(&path)?;
        ensure!(summary["missing_pages"] == 0, "{summary}");
        Ok(())
    });
}

#[test]
fn sigterm_ends_a_client_whose_file_stays_cut() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let plan = Plan::ours(criu, Source::Local, &SLOWLY);
        let mut moving = PostCopy::start(test_dir, &plan, spec(test_dir), &[])?;
        cut(&pages_file(&test_dir.path("dumped"))?, 0)?;
        moving.wait_for_line("trying again")?;
        let seq = moving.load.send(0, &verifying())?;
        moving.daemon.process().signal(Signal::SIGTERM)?;
        moving.daemon.process().fail(GENEROUS)?;
        let report = moving.load.receive(0, seq, GENEROUS)?;
        ensure!(report.wrong() == 0, "{} pages wrong", report.wrong());
        ensure!(report.poisoned() > 0, "nothing was lost");
        Ok(())
    });
}

#[test]
fn a_source_that_has_them_gives_pages_that_cannot_be_read_here() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let (load, dir) = dumped(test_dir, criu)?;
        let here = test_dir.path("here");
        fs::create_dir(&here)?;
        for entry in dir.read_dir()? {
            let entry = entry?;
            fs::copy(entry.path(), here.join(entry.file_name()))?;
        }
        let server = PageServer::serving(Make::Ours, &Options::new(&dir).log_to("serve.log"))?;
        let plan = Plan::ours(criu, Source::PageServer(Make::Ours), &SLOWLY);
        let mut moving =
            PostCopy::from_images(&plan, load, Vec::new(), here.clone(), Some(server), &[])?;
        let file = pages_file(&here)?;
        cut(&file, file.metadata()?.len() / 2)?;
        moving.daemon.process().succeed(GENEROUS)?;
        moving.expect_all_right()?;
        ensure!(
            client_log(&mut moving)?.contains("asking the source"),
            "nothing was tested"
        );
        moving.source().context("a source")?.succeed(GENEROUS)?;
        Ok(())
    });
}

#[test]
fn a_source_whose_file_is_cut_for_a_while_loses_nothing() {
    with_criu(Suite::Trixie, |test_dir, criu| {
        let plan = Plan::ours(criu, Source::PageServer(Make::Ours), &[]).over(slow_link());
        let mut moving = PostCopy::start(test_dir, &plan, spec(test_dir), &verifying())?;
        let file = pages_file(&test_dir.path("dumped"))?;
        let whole = fs::read(&file)?;
        cut(&file, 0)?;
        let log = test_dir.path("dumped").join("serve.log");
        wait::until("a read that fails", GENEROUS, || {
            Ok(fs::read_to_string(&log)?
                .contains("trying again")
                .then_some(()))
        })?;
        fs::write(&file, &whole)?;
        moving.reports()?;
        moving.finish()?;
        let log = fs::read_to_string(&log)?;
        ensure!(log.contains("pages-"), "the file is not named: {log}");
        ensure!(!log.contains("connection is lost"), "{log}");
        Ok(())
    });
}

#[test]
fn files_about_a_restore_that_cannot_be_written_cost_no_page() {
    with_criu(Suite::Sid, |test_dir, criu| {
        for option in ["--summary-json", "--trace"] {
            let test_dir = TestDir::new_in(test_dir.dir())?;
            let plan = Plan::ours(criu, Source::PageServer(Make::Ours), &[option, "/dev/full"]);
            let mut moving = PostCopy::start(&test_dir, &plan, spec(&test_dir), &verifying())?;
            moving.reports()?;
            moving.daemon.process().fail(GENEROUS)?;
            let log = client_log(&mut moving)?;
            ensure!(log.contains("/dev/full"), "{option}: {log}");
            // It has heard that all is well.
            moving.source().context("a source")?.succeed(GENEROUS)?;
        }
        Ok(())
    });
}

/// A disk that gives back only a part of what it holds, as one that is about to die.
#[test]
fn a_disk_that_fails_costs_what_is_on_it_alone() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let disk = FailingDisk::new(&test_dir.path("disk"), 128 << 20)?;
        let mut load = Load::start(spec(test_dir), None)?;
        let dir = disk.path().join("dumped");
        Dump::new(criu, load.pid(), &dir).run()?;
        load.wait_until_gone()?;
        let options = [&SLOWLY[..], &["--local-timeout", "1"]].concat();
        let plan = Plan::ours(criu, Source::Local, &options);
        let mut moving = PostCopy::from_images(&plan, load, Vec::new(), dir.clone(), None, &[])?;
        disk.fail_beyond(40 << 20, &pages_file(&dir)?)?;
        let seq = moving.load.send(0, &verifying())?;
        moving.daemon.process().fail(GENEROUS)?;
        let report = moving.load.receive(0, seq, GENEROUS)?;
        ensure!(report.wrong() == 0, "{} pages wrong", report.wrong());
        ensure!(report.poisoned() > 0, "nothing was lost");
        let log = client_log(&mut moving)?;
        for words in ["Input/output error", "pages-", "memory is lost"] {
            ensure!(log.contains(words), "{words}: {log}");
        }
        ensure!(log.lines().count() < 200, "{} lines", log.lines().count());
        // The mount must not be held when the disk goes.
        moving.restored.kill();
        drop(moving);
        drop(disk);
        Ok(())
    });
}

#[test]
fn a_full_control_group_is_waited_for() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let path = test_dir.path("summary.json");
        let options = ["--summary-json", &path.to_string_lossy()];
        let plan = Plan::ours(criu, Source::PageServer(Make::Ours), &options).over(slow_link());
        let mut moving = PostCopy::start(test_dir, &plan, spec(test_dir), &[])?;
        let group = MemoryGroup::new(4 << 20)?;
        // Who runs without memory for the kernel's own needs may end by itself.
        let pids = moving.restored.pids();
        for pid in &pids {
            kill(*pid, Signal::SIGSTOP)?;
            group.put_in(*pid)?;
        }
        moving.wait_for_line("no memory for the pages")?;
        let seq = moving.load.send(0, &verifying())?;
        group.limit(1 << 40)?;
        for pid in &pids {
            kill(*pid, Signal::SIGCONT)?;
        }
        moving.daemon.process().succeed(GENEROUS)?;
        moving.load.receive(0, seq, GENEROUS)?.expect_right()?;
        let summary = summary::whole(&path)?;
        ensure!(summary["pages"]["poisoned"] == 0, "{summary}");
        moving.restored.kill();
        drop(group);
        Ok(())
    });
}

/// What a post-copy of a process that forks all the time tells of itself.
fn fork_storm(
    test_dir: &TestDir,
    criu: &Criu,
    options: &[&str],
    step: Step,
) -> Result<serde_json::Value> {
    let path = test_dir.path("summary.json");
    let mut all = options.to_vec();
    let summary_path = path.to_string_lossy().into_owned();
    all.extend(["--summary-json", &summary_path]);
    let plan = Plan::ours(criu, Source::PageServer(Make::Ours), &all).over(slow_link());
    let mut moving = PostCopy::start(test_dir, &plan, spec(test_dir), &[step])?;
    let most = descriptors_while_it_runs(&mut moving)?;
    moving.reports()?;
    moving.finish()?;
    moving.expect_all_right()?;
    ensure!(
        most < 64,
        "{most} descriptors more were open than {OPEN_FOR_A_PROCESS} for each process"
    );
    summary::whole(&path)
}

/// Looks of which the lowest counts: children may begin and end between the two halves of one.
const LOOKS: usize = 8;

/// What the client has open for a living process: its userfaultfd, and of /proc its directory and its pagemap.
const OPEN_FOR_A_PROCESS: usize = 3;

/// How many more descriptors the client had open at most, over several looks, than the living processes account for.
fn descriptors_while_it_runs(moving: &mut PostCopy) -> Result<usize> {
    let open = format!("/proc/{}/fd", moving.daemon.process().pid());
    let mut excesses = Vec::new();
    wait::until("the end of the restore", GENEROUS, || {
        let descriptors = fs::read_dir(&open).map_or(0, Iterator::count);
        let living = moving.restored.pids().len();
        excesses.push(descriptors.saturating_sub(OPEN_FOR_A_PROCESS * living));
        Ok(moving.daemon.process().ended()?.map(|_| ()))
    })?;
    let lowest = |looks: &[usize]| looks.iter().copied().min();
    let most = excesses.windows(LOOKS).filter_map(lowest).max();
    Ok(most.unwrap_or(0))
}

#[test]
fn children_that_end_soon_cost_next_to_nothing() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let step = Step::ForkOften {
            per_s: 1000,
            children: 400,
            lifetime_ms: 5,
        };
        let summary = fork_storm(test_dir, criu, &[], step)?;
        let number = |path| summary::number(&summary, path);
        let pages = number("/total_pages")?;
        ensure!(pages <= u64::from(MIB) << 8, "{pages} pages were counted");
        let (bytes, once) = (number("/bytes_received")?, pages << 12);
        ensure!(
            bytes * 10 <= once * 11,
            "{bytes} bytes came where {once} are there"
        );
        // How many fall into the restore is a matter of speed.
        ensure!(number("/processes")? > 20, "nobody forked: {summary}");
        Ok(())
    });
}

/// For whoever wants to see it last: `cargo nextest run --run-ignored only -E 'test(a_minute_of_forks)'`.
#[test]
#[ignore = "takes more than a minute"]
fn a_minute_of_forks_costs_next_to_nothing() {
    with_criu(Suite::Sid, |test_dir, criu| {
        let step = Step::ForkOften {
            per_s: 500,
            children: 30_000,
            lifetime_ms: 2,
        };
        let summary = fork_storm(test_dir, criu, &["--max-bandwidth", "700K"], step)?;
        let number = |path| summary::number(&summary, path);
        let (bytes, once) = (number("/bytes_received")?, number("/total_pages")? << 12);
        eprintln!(
            "{bytes} bytes for {once}, {} processes",
            number("/processes")?
        );
        ensure!(
            bytes * 10 <= once * 11,
            "{bytes} bytes came where {once} are there"
        );
        Ok(())
    });
}
