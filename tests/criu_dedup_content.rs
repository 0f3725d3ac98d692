//! `--dedup-content` with a real CRIU: dumps of a running process, all of them whole as a kernel
//! without soft-dirty makes them, become a chain whose rounds hold what changed.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::criu::Criu;
use testbed::daemons::Make;
use testbed::for_each_criu;
use testbed::images::page_size;
use testbed::load::content::Content;
use testbed::load::spec::{AreaSpec, LoadSpec, Mapping};
use testbed::load::steps::{Order, Step};
use testbed::rounds::{Rounds, pages_file_bytes, pages_room_bytes};
use testbed::stats;
use testbed::test_dir::TestDir;

for_each_criu!(
    rounds_of_one_process_hold_what_changed,
    rounds_of_a_tree_with_shared_memory,
    written_zeros_take_no_room,
);

const SUMMARY: &str = "summary.json";
/// Pages of the process itself that may change from round to round (heap, stacks), or are stored in each
/// (written pages of file mappings, as libraries' data).
const OWN_PAGES_MAX: u64 = 768;

/// What became of the pages of one round.
#[derive(Clone, Copy, Debug)]
struct Inspected {
    received: u64,
    same_as_parent: u64,
    zero: u64,
    stored: u64,
}

/// Carries out the next round and reads what the server says of it; the files must agree.
fn dump(rounds: &mut Rounds<'_>, round: usize) -> Result<Inspected> {
    let images = rounds.images(round);
    let summary = images.join(SUMMARY);
    let summary_path = summary.to_string_lossy();
    rounds.dump(
        Make::Ours,
        &["--dedup-content", "--summary-json", &summary_path],
    )?;
    let inspected = read_summary(&summary)?;
    let page_bytes = page_size()?.bytes();
    let stats = stats::of_dump(&images)?;
    let sent = stats.pages_written + stats.shared_pages_written.unwrap_or(0);
    ensure!(
        inspected.received == sent,
        "{inspected:?}, and the dump sent {sent}"
    );
    ensure!(
        inspected.received == inspected.same_as_parent + inspected.zero + inspected.stored,
        "{inspected:?}"
    );
    // Zero pages have a place in the files, and no room there.
    let length = pages_file_bytes(&images)?;
    ensure!(
        length == (inspected.stored + inspected.zero) * page_bytes,
        "{length} bytes of {inspected:?}"
    );
    let room = pages_room_bytes(&images)?;
    let most = (inspected.stored + OWN_PAGES_MAX) * page_bytes;
    ensure!(room <= most, "{inspected:?} take {room} bytes");
    Ok(inspected)
}

fn read_summary(path: &Path) -> Result<Inspected> {
    let line: Value = serde_json::from_slice(&fs::read(path)?)?;
    let count = |field: &Value, name: &str| field[name].as_u64().context(name.to_owned());
    let (pages, kept) = (&line["pages"], &line["kept"]);
    Ok(Inspected {
        received: count(pages, "received")?,
        same_as_parent: count(kept, "same_as_parent")?,
        zero: count(kept, "zero")?,
        stored: count(kept, "stored_bytes")? / page_size()?.bytes(),
    })
}

/// Every process rewrites every `every`th page of its own.
fn rewrite(rounds: &Rounds<'_>, every: u32) -> Result<()> {
    let order = Order::Ascending;
    for report in rounds
        .load
        .run_everywhere(&[Step::Write { every, order }])?
    {
        report.expect_right()?;
    }
    Ok(())
}

/// Three rounds with some pages rewritten in between; from the second on just these are stored.
/// `changed` says how many they are at least and at most, beside the processes' own. Any round can
/// be restored.
fn three_rounds(mut rounds: Rounds<'_>, every: u32, changed: (u64, u64)) -> Result<()> {
    let whole = dump(&mut rounds, 1)?;
    ensure!(whole.same_as_parent == 0, "{whole:?} without a parent");
    for round in [2, 3] {
        rewrite(&rounds, every)?;
        let part = dump(&mut rounds, round)?;
        let (least, most) = changed;
        let processes = u64::from(rounds.load.spec().processes);
        let stored = part.stored + part.zero;
        ensure!(stored >= least, "{part:?}, and {least} changed at least");
        ensure!(
            stored <= most + processes * OWN_PAGES_MAX,
            "{part:?}, and {most} changed at most"
        );
        ensure!(part.stored < whole.stored / 2, "{part:?} after {whole:?}");
    }
    drop(rounds.expect_restored(3)?);
    rounds.expect_restored(2).map(drop)
}

fn rounds_of_one_process_hold_what_changed(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let spec = LoadSpec::new(
        test_dir.path("load"),
        vec![
            AreaSpec::new(Mapping::Private, 12_000, Content::Random),
            AreaSpec::new(Mapping::ReadOnly, 2_000, Content::Mixed),
        ],
    );
    // Of both areas together every eighth page is asked for; the read-only ones stay as they are.
    let changed = 12_000 / 8;
    let rounds = Rounds::start(test_dir, criu, spec)?;
    three_rounds(rounds, 8, (changed, changed + 1))
}

fn rounds_of_a_tree_with_shared_memory(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    const PROCESSES: u32 = 3;
    let area = AreaSpec::new;
    let spec = LoadSpec {
        processes: PROCESSES,
        ..LoadSpec::new(
            test_dir.path("load"),
            vec![
                area(Mapping::Private, 3_000, Content::Random),
                area(Mapping::SharedAnon, 4_000, Content::Mixed).untouched_every(5),
                area(Mapping::Memfd, 4_000, Content::Text),
            ],
        )
    };
    let changed = u64::from(PROCESSES) * 3_000 / 6;
    let rounds = Rounds::start(test_dir, criu, spec)?;
    three_rounds(rounds, 6, (changed, changed + u64::from(PROCESSES)))
}

fn written_zeros_take_no_room(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    const ZEROS: u32 = 8_000;
    let area = AreaSpec::new;
    let spec = LoadSpec::new(
        test_dir.path("load"),
        vec![
            area(Mapping::Private, ZEROS, Content::Zero),
            area(Mapping::Private, 500, Content::Random),
        ],
    );
    let mut rounds = Rounds::start(test_dir, criu, spec)?;
    let inspected = dump(&mut rounds, 1)?;
    ensure!(inspected.zero >= u64::from(ZEROS), "{inspected:?}");
    ensure!(
        (500..500 + OWN_PAGES_MAX).contains(&inspected.stored),
        "{inspected:?}"
    );
    rounds.expect_restored(1).map(drop)
}
