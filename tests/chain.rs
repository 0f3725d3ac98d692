//! Image chains against a model that keeps every page in a map.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use common::{
    FIRST_PAGE, Images, PAGE, Run, TARGET, level, naive_memory, page_content, write_target,
};
use pageferry::criu::header::{PageFlags, Target, Wire};
use pageferry::error::Kind;
use pageferry::image::chain::{Absence, Chain, Missing, Place, Stored};
use pageferry::image::consume::{Consumer, refuse_consumed};
use pageferry::image::dir::ImageDir;
use pageferry::image::readahead::ReadAhead;
use pageferry::units::{PageRange, Vaddr};
use proptest::prelude::*;

fn open(images: &Images, missing: Missing) -> pageferry::error::Result<Chain> {
    let dir = ImageDir::open(&images.dirs[0], PAGE)?;
    Chain::open(&dir, TARGET, missing)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_chain_holds_what_the_naive_model_holds(
        levels in prop::collection::vec(level(), 1..4), v1: bool,
    ) {
        let images = Images::of(&levels, if v1 { Wire::V1 } else { Wire::V2 });
        let chain = open(&images, Missing::Leave).unwrap();
        let memory = naive_memory(&levels);

        // Extents: sorted, disjoint, covering just the model's pages.
        let extents = chain.extents();
        prop_assert!(extents.windows(2).all(|pair| pair[0].range.end() <= pair[1].range.start()));
        let pages: u64 = extents.iter().map(|extent| extent.range.pages(PAGE).get()).sum();
        prop_assert_eq!(pages, memory.len() as u64);

        for page in FIRST_PAGE - 1..FIRST_PAGE + 100 {
            let found = chain.find(Vaddr(page << PAGE.shift()));
            prop_assert_eq!(found.is_some(), memory.contains_key(&page));
            let Some(found) = found else { continue };
            prop_assert_eq!(found.range.start().get(), page << PAGE.shift());
            let run = levels[0].iter().find(|run| run.range().contains(found.range.start()));
            prop_assert_eq!(found.lazy, run.unwrap().flags.has(PageFlags::LAZY));

            // The whole tail of the extent reads as the model says.
            let tail = found.range.pages(PAGE).get();
            let seeds: Vec<_> = (page..page + tail).map(|page| memory[&page]).collect();
            if let Place::Absent { .. } = found.place {
                prop_assert!(seeds.iter().all(Option::is_none));
                prop_assert!(chain.stored(found.place).is_none());
                continue;
            }
            let mut content = vec![0xaa; found.range.bytes() as usize];
            chain.read(found.place, &mut content).unwrap();
            let expected = seeds.iter().flat_map(|seed| page_content(seed.unwrap()));
            prop_assert!(content.iter().copied().eq(expected));
            match chain.stored(found.place).unwrap() {
                Stored::Zero => prop_assert_eq!(seeds[0], Some(0)),
                Stored::Lz4 { bytes, .. } => prop_assert!(0 < bytes && bytes < PAGE.as_usize()),
                Stored::Raw { file, offset } => {
                    let mapped = chain.file(file).mapped(offset, PAGE.as_usize()).unwrap();
                    prop_assert_eq!(mapped, &content[..PAGE.as_usize()]);
                }
            }
            ReadAhead::new(1 << 20).pass(&chain, found.range.start());
        }
        let somewhere = memory.values().all(Option::is_some);
        prop_assert_eq!(open(&images, Missing::Refuse).is_ok(), somewhere);
    }
}

#[test]
fn entries_that_go_on_in_the_file_become_one_extent() {
    let lazy = PageFlags::LAZY;
    let runs = [
        Run::present(1, 4, lazy, 1),
        Run::present(5, 4, lazy, 5),
        Run::present(10, 1, lazy, 9),
        Run::present(11, 1, PageFlags::default(), 10),
    ];
    let images = Images::of(&[runs.to_vec()], Wire::V2);
    let chain = open(&images, Missing::Refuse).unwrap();
    let pages: Vec<_> = chain
        .extents()
        .iter()
        .map(|extent| extent.range.pages(PAGE).get())
        .collect();
    assert_eq!(pages, [8, 1, 1]);
    let far: Vec<_> = chain.extents_from(Vaddr(0x7000)).collect();
    assert_eq!(far.len(), 3);
    assert_eq!(far[0].range, PageRange::new(0x7000, 0x9000));
    assert_eq!(
        far[0].place,
        Place::Raw {
            file: 0,
            offset: 0x6000
        }
    );
}

#[test]
fn pages_that_no_file_has_are_named_with_the_reason() {
    let runs = vec![Run::present(1, 4, PageFlags::LAZY, 1)];
    let absences = |images: &Images| {
        let error = open(images, Missing::Refuse).unwrap_err();
        assert_eq!(error.kind(), Kind::Image);
        let text = error.to_string();
        assert!(text.contains("pid 7") && text.contains("0x1000"), "{text}");
        let dir = images.dirs[0].canonicalize().unwrap();
        assert!(text.contains(dir.to_str().unwrap()), "{text}");
        let Place::Absent { why, depth: 0 } =
            open(images, Missing::Leave).unwrap().extents()[0].place
        else {
            panic!("the pages are there");
        };
        why
    };
    let images = Images::of(std::slice::from_ref(&runs), Wire::V2);
    let file = images.dirs[0].join("pages-1.img");
    std::fs::OpenOptions::new()
        .write(true)
        .open(&file)
        .unwrap()
        .set_len(0x3fff)
        .unwrap();
    assert_eq!(absences(&images), Absence::CutShort);
    std::fs::remove_file(&file).unwrap();
    assert_eq!(absences(&images), Absence::NoPagesFile);

    let hole = vec![Run::absent(1, 4, PageFlags::PARENT)];
    assert_eq!(
        absences(&Images::of(std::slice::from_ref(&hole), Wire::V1)),
        Absence::NotInParent
    );
    let elsewhere = [hole, vec![Run::present(9, 4, PageFlags::LAZY, 1)]];
    assert_eq!(
        absences(&Images::of(&elsewhere, Wire::V2)),
        Absence::NotInParent
    );
    let lazy = vec![Run::absent(1, 4, PageFlags::LAZY)];
    assert_eq!(
        absences(&Images::of(&[lazy], Wire::V2)),
        Absence::WithSource
    );
}

#[test]
fn a_target_without_a_pagemap_and_damaged_images_are_errors() {
    let images = Images::of(&[vec![Run::present(1, 2, PageFlags::LAZY, 1)]], Wire::V2);
    let dir = ImageDir::open(&images.dirs[0], PAGE).unwrap();
    let error = Chain::open(&dir, Target::Shmem(7), Missing::Leave).unwrap_err();
    assert!(error.to_string().contains("shared memory 7"), "{error}");

    let twice = [
        Run::present(5, 2, PageFlags::LAZY, 1),
        Run::present(1, 2, PageFlags::LAZY, 1),
    ];
    write_target(&images.dirs[0], TARGET, Wire::V2, 1, &twice);
    let error = open(&images, Missing::Leave).unwrap_err();
    assert!(error.to_string().contains("pagemap-7.img"), "{error}");
}

#[test]
fn a_damaged_block_is_an_error_that_names_its_file() {
    let run = Run {
        compressed: true,
        ..Run::present(1, 1, PageFlags::LAZY, 1)
    };
    let images = Images::of(&[vec![run]], Wire::V2);
    let file = images.dirs[0].join("pages-1.img");
    let mut bytes = std::fs::read(&file).unwrap();
    bytes.fill(0xff);
    std::fs::write(&file, bytes).unwrap();
    let chain = open(&images, Missing::Refuse).unwrap();
    let mut out = vec![0; PAGE.as_usize()];
    let error = chain.read(chain.extents()[0].place, &mut out).unwrap_err();
    assert!(error.to_string().contains("pages-1.img"), "{error}");
}

/// Every second page, and the same pages in one run: what a reader in order asks the kernel for.
#[test]
fn reading_ahead_costs_no_more_for_pages_with_gaps() {
    const PAGES: u64 = 1 << 11;
    const MOST: u64 = 128 << 10;
    let advised = |step: u64| {
        let run =
            |n: u64| Run::present(FIRST_PAGE + n * step, 1, PageFlags::LAZY, 1 + n as u32 % 7);
        let runs: Vec<Run> = (0..PAGES).map(run).collect();
        let images = Images::of(&[runs], Wire::V2);
        let chain = open(&images, Missing::Refuse).unwrap();
        let mut ahead = ReadAhead::new(MOST);
        let mut advice = Vec::new();
        for n in 0..PAGES {
            let at = Vaddr((FIRST_PAGE + n * step) << PAGE.shift());
            advice.extend(ahead.advice(&chain, at));
            // What is read now was asked for before.
            let asked: u64 = advice.iter().map(|advice| advice.bytes).sum();
            assert!(asked > n << PAGE.shift(), "page {n}");
        }
        assert!(
            advice
                .windows(2)
                .all(|pair| pair[0].offset + pair[0].bytes == pair[1].offset),
            "twice, or never"
        );
        let bytes: u64 = advice.iter().map(|advice| advice.bytes).sum();
        assert_eq!(bytes, PAGES << PAGE.shift());
        advice.len()
    };
    let (whole, every_second) = (advised(1), advised(2));
    assert_eq!(whole, every_second);
    assert!(whole < 100, "{whole} calls for {PAGES} pages");
}

#[test]
fn a_reader_who_jumps_is_read_ahead_of_by_little() {
    let images = Images::of(
        &[vec![Run::present(FIRST_PAGE, 1 << 11, PageFlags::LAZY, 1)]],
        Wire::V2,
    );
    let chain = open(&images, Missing::Refuse).unwrap();
    let mut ahead = ReadAhead::new(8 << 20);
    let asked: u64 = [0, 1500, 200, 1000]
        .into_iter()
        .flat_map(|n| ahead.advice(&chain, Vaddr((FIRST_PAGE + n) << PAGE.shift())))
        .map(|advice| advice.bytes)
        .sum();
    assert!(asked <= 2 << 20, "{asked} bytes for four pages");
}

#[test]
fn pages_leave_the_files_of_parents_too() {
    let lazy = PageFlags::LAZY;
    let own = vec![
        Run::present(1, 2, lazy, 1),
        Run::absent(3, 6, PageFlags::PARENT.with(lazy)),
    ];
    let parent = vec![Run::present(1, 9, lazy, 21)];
    let images = Images::of(&[own, parent], Wire::V2);
    let chain = std::sync::Arc::new(open(&images, Missing::Refuse).unwrap());
    let blocks = |level: usize| {
        use std::os::unix::fs::MetadataExt;
        let file = images.dirs[level].join(format!("pages-{}.img", level + 1));
        std::fs::metadata(file).unwrap().blocks() * 512 / PAGE.bytes()
    };
    assert_eq!((blocks(0), blocks(1)), (2, 9));
    let dir = ImageDir::open_any(&images.dirs[0], PAGE).unwrap();
    refuse_consumed(&dir).unwrap();
    let mut consumer = Consumer::default();
    let page = |number: u64| number << PAGE.shift();
    let range = PageRange::new(page(2), page(6));
    consumer.consume(&chain, range).unwrap();
    consumer.flush().unwrap();
    // One of its own, and three of the parent; what nobody has said leaves nothing.
    assert_eq!((blocks(0), blocks(1)), (1, 6));
    assert_eq!(consumer.bytes(), 4 << PAGE.shift());
    let mut left = vec![0; PAGE.as_usize()];
    let kept = chain.find(Vaddr(page(6))).unwrap();
    chain.read(kept.place, &mut left).unwrap();
    assert_eq!(left, page_content(26));
    let error = refuse_consumed(&dir).unwrap_err();
    assert_eq!(error.kind(), Kind::Image);
    let parent = ImageDir::open_any(&images.dirs[1], PAGE).unwrap();
    assert!(refuse_consumed(&parent).is_err());
}
