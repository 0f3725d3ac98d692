//! `--auto-dedup` with a real CRIU: what a finished session brought anew leaves the parents' files,
//! and nothing does before the session is finished.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use pageferry::image::chain::{Chain, Missing, Place};
use pageferry::image::dir::ImageDir;
use pageferry::units::Vaddr;
use testbed::criu::Criu;
use testbed::daemons::Make;
use testbed::for_each_criu;
use testbed::images::page_size;
use testbed::load::spec::LoadSpec;
use testbed::load::steps::{Advice, Order, Part, Step};
use testbed::postcopy::slow_link;
use testbed::rounds::{Rounds, pages_files, pages_room_bytes};
use testbed::suite::make;
use testbed::test_dir::TestDir;
use testbed::wait::GENEROUS;

for_each_criu!(
    a_finished_session_is_taken_out_of_its_parent,
    what_a_chain_still_needs_stays_in_it,
    a_killed_dump_leaves_the_parent_whole,
);

const MIB: u32 = 64;
/// Half of a dump of [`MIB`], bytes.
const HALF_WAY: u64 = 24 << 20;
/// Pages that the process gives back between two dumps: the second one has no word about them.
const GIVEN_BACK: Part = Part {
    area: 0,
    first: 100,
    pages: 500,
};
/// What a file system may need for itself to say where a file with holes is, bytes.
const MAP_BYTES_MAX: u64 = 1 << 20;

/// The process rewrites every `every`th page.
fn rewrite(rounds: &Rounds<'_>, every: u32) -> Result<()> {
    let order = Order::Ascending;
    let report = rounds.load.run(0, &[Step::Write { every, order }])?;
    report.expect_right()
}

fn give_back(rounds: &Rounds<'_>) -> Result<()> {
    let advice = Advice::DontNeed;
    let part = GIVEN_BACK;
    let report = rounds.load.run(0, &[Step::Drop { part, advice }])?;
    report.expect_right()
}

/// The pages files of an image directory with all their bytes.
fn contents(images: &Path) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
    let files = pages_files(&images.canonicalize()?)?;
    let read = |path: PathBuf| Ok((path.clone(), fs::read(path)?));
    files.into_iter().map(read).collect()
}

/// Pages of a directory and its parents, after a session on top of them.
#[derive(Debug, Default)]
struct Parents {
    /// Pages that the session brought anew.
    punched: u64,
    /// All others.
    kept: u64,
}

/// Fails unless just those pages of `parent`, and what is above it, read as zero that `images` itself
/// has, and all others as they did `before`.
fn expect_punched(
    images: &Path,
    parent: &Path,
    before: &BTreeMap<PathBuf, Vec<u8>>,
) -> Result<Parents> {
    let page = page_size()?;
    let child = ImageDir::open(images, page)?;
    let parent = ImageDir::open(parent, page)?;
    let mut counted = Parents::default();
    for target in parent.targets()? {
        let old = Chain::open(&parent, target, Missing::Leave)?;
        let new = match child.has_pagemap(target) {
            true => Some(Chain::open(&child, target, Missing::Leave)?),
            false => None,
        };
        let is_new = |addr: Vaddr| {
            let found = new
                .as_ref()
                .and_then(|new| Some((new, new.find(addr)?.place)));
            matches!(found, Some((new, Place::Raw { file, .. }))
                if new.file(file).path().starts_with(child.path()))
        };
        let mut now = vec![0; page.as_usize()];
        for extent in old.extents() {
            let Place::Raw { file, offset } = extent.place else {
                continue;
            };
            let path = old.file(file).path();
            let then = before.get(path).context("a file that nobody looked at")?;
            for at in (0..extent.range.bytes()).step_by(page.as_usize()) {
                let addr = Vaddr(extent.range.start().get() + at);
                old.read(extent.place.behind(at, page), &mut now)?;
                let start = usize::try_from(offset + at)?;
                let was = &then[start..start + page.as_usize()];
                if is_new(addr) {
                    let zero = now.iter().all(|byte| *byte == 0);
                    ensure!(
                        zero,
                        "{target}'s page at {addr} is still in {}",
                        path.display()
                    );
                    counted.punched += 1;
                } else {
                    let same = now == was;
                    ensure!(
                        same,
                        "{target}'s page at {addr} is gone from {}",
                        path.display()
                    );
                    counted.kept += 1;
                }
            }
        }
    }
    Ok(counted)
}

fn a_finished_session_is_taken_out_of_its_parent(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let rounds = Rounds::start(test_dir, criu, LoadSpec::mixed(test_dir.path("load"), MIB))?;
    let mut rounds = rounds.known_to_dumps();
    rounds.dump(make(criu), &[])?;
    let parent = rounds.images(1);
    let before = contents(&parent)?;
    rewrite(&rounds, 4)?;
    give_back(&rounds)?;
    rounds.dump(make(criu), &["--auto-dedup"])?;
    let Parents { punched, kept } = expect_punched(&rounds.images(2), &parent, &before)?;
    ensure!(kept >= u64::from(GIVEN_BACK.pages), "{kept} pages kept");
    ensure!(punched > 10 * kept, "{punched} pages punched, {kept} kept");
    let room = pages_room_bytes(&parent)?;
    let most = kept * page_size()?.bytes() + MAP_BYTES_MAX;
    ensure!(room <= most, "{kept} pages take {room} bytes");
    rounds.expect_restored(2).map(drop)
}

fn what_a_chain_still_needs_stays_in_it(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let mut rounds = Rounds::start(test_dir, criu, LoadSpec::mixed(test_dir.path("load"), MIB))?;
    rounds.dump(Make::Ours, &[])?;
    rewrite(&rounds, 8)?;
    rounds.dump(Make::Ours, &["--dedup-content"])?;
    let mut before = contents(&rounds.images(1))?;
    before.extend(contents(&rounds.images(2))?);
    rewrite(&rounds, 5)?;
    give_back(&rounds)?;
    rounds.dump(Make::Ours, &["--dedup-content", "--auto-dedup"])?;
    let Parents { punched, kept } = expect_punched(&rounds.images(3), &rounds.images(2), &before)?;
    // What is not LAZY (written pages of a file's mapping) is stored in each round, and needs no parent.
    ensure!(kept > 2 * punched, "{punched} pages punched, {kept} kept");
    ensure!(
        punched > u64::from(MIB) * 256 / 16,
        "{punched} pages punched"
    );
    rounds.expect_restored(3).map(drop)
}

fn a_killed_dump_leaves_the_parent_whole(test_dir: &TestDir, criu: &Criu) -> Result<()> {
    let rounds = Rounds::start(test_dir, criu, LoadSpec::mixed(test_dir.path("load"), MIB))?;
    let mut rounds = rounds.known_to_dumps();
    rounds.dump(Make::Ours, &[])?;
    let parent = rounds.images(1);
    let (before, room) = (contents(&parent)?, pages_room_bytes(&parent)?);
    rewrite(&rounds, 4)?;
    let (mut server, dump) = rounds.begin(Make::Ours, &["--auto-dedup"])?;
    dump.kill_half_way(server.address(), slow_link(), HALF_WAY)?;
    server.process().fail(GENEROUS)?;
    ensure!(contents(&parent)? == before, "the parent has changed");
    ensure!(pages_room_bytes(&parent)? == room, "the parent was punched");
    rounds.expect_running()?;
    rounds.expect_restored(1).map(drop)
}
