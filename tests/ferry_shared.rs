//! Pages that processes of a tree have in common go over ferry once, and each process has its own memory at the far end,
//! however that stores it.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;
#[path = "common/dump_bytes.rs"]
mod dump_bytes;
#[path = "common/ends.rs"]
mod ends;

use std::collections::BTreeMap;
use std::path::Path;

use common::{FIRST_PAGE, PAGE, Run, check_images, level, with_large_runs, with_true_holes};
use dump_bytes::dump;
use ends::{LONG, context, expected, far_end, far_end_with, forward, many_pages, store};
use pageferry::criu::header::{PageFlags, Target, Wire};
use pageferry::engine::receive::stores::StoreOptions;
use pageferry::image::chain::{Chain, Missing};
use pageferry::image::dir::ImageDir;
use pageferry::observe::ferried::Sent;
use proptest::prelude::*;

/// Processes that were forked from the first one.
const FORKS: u32 = 8;

/// A process and its forks, of which each has written every hundredth page, none the same as another.
fn forks() -> Vec<(Target, Vec<Run>)> {
    let parent = vec![Run::present(FIRST_PAGE, 600, PageFlags::LAZY, 100)];
    let of = |number: u32| {
        let mut runs = parent.clone();
        let written = runs[0].seeds.iter_mut().skip(number as usize);
        for seed in written.step_by(100).take(if number == 0 { 0 } else { 6 }) {
            *seed += 100_000 * number;
        }
        (Target::Process(7 + number), runs)
    };
    (0..=FORKS).map(of).collect()
}

/// Forwards `targets` to a page server that opens its directory as `options` say, and checks what it stores.
fn forwarded(targets: &[(Target, Vec<Run>)], options: &StoreOptions, compress: bool) -> Sent {
    let far = far_end_with(options, compress);
    let context = context(far.address, 2, 1 << 24, LONG);
    let (sent, _) = forward(&context, &dump(targets, Wire::V2), 60_000);
    let sent = sent.unwrap().sent;
    far.finish().unwrap();
    for (target, runs) in targets {
        check_images(&options.dir, *target, &expected(std::slice::from_ref(runs)));
    }
    sent
}

/// Bytes of frames, if no page had been compressed: how many are depends on how busy the machine is.
fn uncompressed_bytes(sent: &Sent) -> u64 {
    let pages = &sent.pages;
    sent.frame_bytes - pages.packed_bytes + pages.packed * PAGE.bytes()
}

#[test]
fn forks_cost_what_they_have_written() {
    let tmp = tempfile::tempdir().unwrap();
    let targets = forks();
    let alone = forwarded(
        &targets[..1],
        &store(&tmp.path().join("alone"), None),
        false,
    );
    for (name, dedup_tree) in [("plain", false), ("tree", true)] {
        let options = StoreOptions {
            dedup_tree,
            ..store(&tmp.path().join(name), None)
        };
        let sent = forwarded(&targets, &options, false);
        assert_eq!(sent.pages.shared, u64::from(FORKS) * 594, "{sent}");
        let most = uncompressed_bytes(&alone) * 115 / 100;
        assert!(uncompressed_bytes(&sent) <= most, "{sent} against {alone}");
    }
}

#[test]
fn a_far_end_that_cannot_read_pages_again_gets_all_of_them() {
    let tmp = tempfile::tempdir().unwrap();
    let sent = forwarded(&forks(), &store(tmp.path(), None), true);
    assert_eq!(sent.pages.shared, 0, "{sent}");
    assert_eq!(sent.page_count(), 600 * u64::from(FORKS + 1));
}

#[test]
fn pages_that_are_kept_apart_are_found_there() {
    let tmp = tempfile::tempdir().unwrap();
    let (dir, lazy) = (tmp.path().join("images"), tmp.path().join("lazy"));
    std::fs::create_dir(&lazy).unwrap();
    let targets: Vec<_> = [7, 8]
        .map(|pid| (Target::Process(pid), many_pages(100)))
        .into();
    let options = StoreOptions {
        split_lazy: Some(lazy.clone()),
        ..store(&dir, None)
    };
    let far = far_end_with(&options, false);
    let context = context(far.address, 2, 1 << 24, LONG);
    let (sent, _) = forward(&context, &dump(&targets, Wire::V2), 60_000);
    assert_eq!(sent.unwrap().sent.pages.shared, 540);
    far.finish().unwrap();
    expect_same(&lazy, 7, 8);
    expect_same(&dir, 7, 8);
}

/// Two processes have the same pages in `dir`.
fn expect_same(dir: &Path, one: u32, other: u32) {
    let read = |pid: u32| {
        let dir = ImageDir::open(dir, PAGE).unwrap();
        let chain = Chain::open(&dir, Target::Process(pid), Missing::Leave).unwrap();
        let extents = chain.extents().iter();
        let pages: Vec<_> = extents
            .map(|extent| {
                let mut bytes = vec![0; extent.range.bytes() as usize];
                let there = chain.stored(extent.place).is_some();
                if there {
                    chain.read(extent.place, &mut bytes).unwrap();
                }
                (extent.range, there, bytes)
            })
            .collect();
        pages
    };
    let first = read(one);
    assert!(first.iter().any(|(_, there, _)| *there));
    assert!(first == read(other), "{}", dir.display());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Two rounds of processes some of which are forks of others, with what is not the same anywhere.
    #[test]
    fn whatever_processes_have_in_common_their_images_are_what_was_said(
        levels in prop::collection::vec(level(), 2), later in prop::collection::vec(level(), 2), shmem in level(),
        large in 30..200_u64, dedup_tree: bool, streams in 1..4_u16,
        cache in prop::sample::select(vec![0, 20_000, 1 << 20, 1 << 30]),
        piece in prop::sample::select(vec![1000_usize, 60_000, 1 << 20]),
    ) {
        let alone = |runs: &Vec<Run>| with_true_holes(with_large_runs(runs.clone(), large), &BTreeMap::new());
        let mut first: Vec<(Target, Vec<Run>)> = (1..)
            .zip(levels.iter().cycle().take(6))
            .map(|(pid, runs)| (Target::Process(pid), alone(runs)))
            .collect();
        first.push((Target::Shmem(9), alone(&shmem)));
        let second: Vec<(Target, Vec<Run>)> = first
            .iter()
            .zip(later.iter().chain(&levels).cycle())
            .map(|((target, before), runs)| {
                let before = expected(std::slice::from_ref(before));
                (*target, with_true_holes(with_large_runs(runs.clone(), large), &before))
            })
            .collect();
        let tmp = tempfile::tempdir().unwrap();
        let dirs = ["old", "new"].map(|name| tmp.path().join(name));
        for (dir, previous, targets) in [(&dirs[0], None, &first), (&dirs[1], Some("../old"), &second)] {
            let options = StoreOptions { dedup_tree, ..store(dir, previous) };
            let far = far_end_with(&options, false);
            let context = context(far.address, streams, cache, LONG);
            let (sent, _) = forward(&context, &dump(targets, Wire::V2), piece);
            sent.unwrap();
            far.finish().unwrap();
        }
        for ((target, before), (_, after)) in first.iter().zip(&second) {
            check_images(&dirs[0], *target, &expected(std::slice::from_ref(before)));
            check_images(&dirs[1], *target, &expected(&[after.clone(), before.clone()]));
        }
    }
}

#[test]
fn shared_memory_and_a_process_may_have_a_page_in_common() {
    let tmp = tempfile::tempdir().unwrap();
    let runs = vec![Run::present(FIRST_PAGE, 20, PageFlags::default(), 100)];
    let targets = [
        (Target::Process(7), runs.clone()),
        (Target::Shmem(9), runs.clone()),
    ];
    let far = far_end(tmp.path(), None, LONG);
    let context = context(far.address, 1, 1 << 20, LONG);
    let (sent, _) = forward(&context, &dump(&targets, Wire::V2), 1 << 20);
    assert_eq!(sent.unwrap().sent.pages.shared, 20);
    far.finish().unwrap();
    for (target, runs) in targets {
        check_images(tmp.path(), target, &expected(&[runs]));
    }
}
