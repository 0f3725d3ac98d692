//! Transparent huge pages that a process had before a lazy restore are back when lazy-client has ended.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;
use serde_json::Value;
use testbed::criu::Criu;
use testbed::daemons::Make;
use testbed::debian::Suite;
use testbed::load::Load;
use testbed::load::content::Content;
use testbed::load::spec::{AreaSpec, LoadSpec, Mapping};
use testbed::load::steps::{Order, Part, Pass, Step};
use testbed::postcopy::{Plan, PostCopy, Source, slow_link};
use testbed::suite::with_criu;
use testbed::test_dir::TestDir;
use testbed::{for_each_criu, gate, summary};

for_each_criu!(
    huge_pages_are_back,
    huge_pages_survive_what_the_process_does
);

/// Pages of a huge page.
const HUGE: u32 = 512;

/// 32 MiB and 16 MiB with the advice, and some without.
fn spec(test_dir: &TestDir) -> LoadSpec {
    let area = |mapping, pages| AreaSpec::new(mapping, pages, Content::Random);
    LoadSpec {
        pin_own_memory: true,
        ..LoadSpec::new(
            test_dir.path("load"),
            vec![
                area(Mapping::Advised, 16 * HUGE),
                area(Mapping::Advised, 8 * HUGE),
                area(Mapping::Private, 4 * HUGE),
            ],
        )
    }
}

/// KiB of transparent huge pages of a process; none if it has ended.
fn huge_kib(pid: Pid) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let mut lines = text.lines();
    let line = lines.find_map(|line| line.strip_prefix("AnonHugePages:"));
    let kib = line.unwrap_or("0").trim().trim_end_matches(" kB");
    Ok(kib.parse()?)
}

/// Whether the system makes huge pages where it is advised to.
fn system_has_huge_pages() -> bool {
    let path = Path::new("/sys/kernel/mm/transparent_hugepage/enabled");
    let found = match fs::read_to_string(path) {
        Ok(text) if !text.contains("[never]") => Ok(()),
        Ok(text) => Err(anyhow::anyhow!("{}: {text}", path.display())),
        Err(error) => Err(error.into()),
    };
    gate::need("transparent huge pages", found).is_some()
}

/// A lazy restore in which the process carries out `steps`. Returns the KiB of huge pages before and after it, and the
/// client's summary.
fn moved(
    test_dir: &TestDir,
    criu: &Criu,
    source: Source<'_>,
    extra: &[&str],
    steps: &[Step],
) -> Result<(u64, u64, Value)> {
    let plan = Plan::new(criu, source, Make::Ours).over(slow_link());
    let summary = test_dir.path("summary.json");
    let options = ["--summary-json", summary.to_str().context("a path")?];
    let options = options.iter().chain(extra).map(|word| (*word).to_owned());
    let plan = Plan {
        client_options: options.collect(),
        ..plan
    };
    let load = Load::start(spec(test_dir), None)?;
    let before = huge_kib(load.pid())?;
    ensure!(
        before >= 24 * 2048,
        "only {before} KiB are huge pages at the start"
    );
    let mut moved = PostCopy::of(test_dir, &plan, load, steps)?;
    moved.reports()?;
    moved.finish()?;
    let after = moved.restored.pids().into_iter().map(huge_kib);
    let after = after.sum::<Result<u64>>()?;
    let verify = [Step::Verify(Pass::full(Order::Ascending))];
    moved.load.run(0, &verify)?.expect_right()?;
    Ok((before, after, summary::whole(&summary)?))
}

fn huge_pages_are_back(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    if !system_has_huge_pages() {
        return Ok(());
    }
    let steps = [
        Step::Dirty { pages_per_s: 2000 },
        Step::Verify(Pass::quick(Order::Random)),
    ];
    let (before, after, summary) = moved(test_dir, criu, Source::Dump, &[], &steps)?;
    ensure!(
        after * 100 >= before * 95,
        "{after} of {before} KiB are huge again: {summary}"
    );
    ensure!(
        summary::number(&summary, "/huge_pages/wanted")? == 24,
        "{summary}"
    );
    Ok(())
}

fn huge_pages_survive_what_the_process_does(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    if !system_has_huge_pages() {
        return Ok(());
    }
    let pass = Pass::quick(Order::Random);
    let steps = [
        Step::Dirty { pages_per_s: 2000 },
        Step::Fork { depth: 1, pass },
        Step::Move(Part::new(1, 0, 2 * HUGE)),
        Step::Unmap {
            part: Part::new(0, 3 * HUGE + 7, 20),
            map_again: false,
        },
        Step::Verify(pass),
    ];
    let (before, after, summary) =
        moved(test_dir, criu, Source::PageServer(Make::Ours), &[], &steps)?;
    // One region is cut, two may have moved to where no huge page can be.
    ensure!(
        after + 3 * 2048 >= before * 95 / 100,
        "{after} of {before} KiB: {summary}"
    );
    Ok(())
}

#[test]
fn no_huge_pages_are_made_where_none_are_wanted() {
    with_criu(Suite::Sid, |test_dir, criu| {
        if !system_has_huge_pages() {
            return Ok(());
        }
        let never = ["--huge-pages", "never"];
        let steps = [Step::Verify(Pass::quick(Order::Random))];
        // The kernel may make some by itself at any time.
        let (_, _, summary) = moved(test_dir, criu, Source::Local, &never, &steps)?;
        let wanted = summary::number(&summary, "/huge_pages/wanted")?;
        ensure!(wanted == 0, "{summary}");
        Ok(())
    });
}

#[test]
fn all_memory_that_was_used_whole_is_huge_if_that_is_wanted() {
    with_criu(Suite::Sid, |test_dir, criu| {
        if !system_has_huge_pages() {
            return Ok(());
        }
        let always = ["--huge-pages", "always"];
        let steps = [Step::Verify(Pass::quick(Order::Random))];
        let (before, after, summary) = moved(test_dir, criu, Source::Local, &always, &steps)?;
        ensure!(
            after > before,
            "{after} KiB are huge, {before} were: {summary}"
        );
        Ok(())
    });
}
