//! The memory of the process that is carried: pages that are zero, random, text, or little
//! different from what they were.

use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use fastrand::Rng;
use pageferry::criu::header::Target;
use pageferry::units::{PageRange, PageSize, Vaddr};

pub(crate) const PAGE: PageSize = PageSize::KIB_4;

pub(crate) type Page = Rc<[u8]>;

/// Page number to contents.
pub(crate) type Pages = BTreeMap<u64, Page>;

pub(crate) type Memory = BTreeMap<Target, Pages>;

pub(crate) fn number_of(vaddr: Vaddr) -> u64 {
    vaddr.get() / PAGE.bytes()
}

pub(crate) fn page_range(number: u64) -> PageRange {
    PageRange::new(number * PAGE.bytes(), (number + 1) * PAGE.bytes())
}

pub(crate) fn numbers(range: PageRange) -> Range<u64> {
    number_of(range.start())..number_of(range.end())
}

fn contents(rng: &mut Rng) -> Page {
    let size = PAGE.as_usize();
    match rng.u8(0..4) {
        0 => vec![0; size].into(),
        1 => std::iter::repeat_with(|| rng.u8(..)).take(size).collect(),
        2 => vec![rng.u8(1..); size].into(),
        _ => {
            let word = rng.u64(..).to_le_bytes();
            let text = (0..size).map(|at| word[at % 7]);
            text.collect()
        }
    }
}

fn map_some(rng: &mut Rng, pages: &mut Pages) {
    let start = rng.u64(0..3000);
    for number in start..start + rng.u64(1..20) {
        pages.insert(number, contents(rng));
    }
}

/// A process with a few mappings and some shared memory.
pub(crate) fn first(rng: &mut Rng) -> Memory {
    let mut memory = Memory::new();
    for target in [Target::Process(7), Target::Process(8), Target::Shmem(1)] {
        let pages = memory.entry(target).or_default();
        for _ in 0..rng.usize(1..4) {
            map_some(rng, pages);
        }
    }
    memory
}

/// Lets the process run on: it writes a little, maps, unmaps, and now and then forks.
pub(crate) fn run_on(rng: &mut Rng, memory: &mut Memory) {
    for pages in memory.values_mut() {
        for page in pages.values_mut() {
            match rng.u8(0..20) {
                0 => *page = contents(rng),
                1..=3 => {
                    let mut changed = page.to_vec();
                    for _ in 0..rng.usize(1..200) {
                        let at = rng.usize(0..changed.len());
                        changed[at] = rng.u8(..);
                    }
                    *page = changed.into();
                }
                _ => {}
            }
        }
        if rng.u8(0..3) == 0 {
            map_some(rng, pages);
        }
        if rng.u8(0..3) == 0 {
            let start = rng.u64(0..3000);
            pages.retain(|number, _| !(start..start + 500).contains(number));
        }
    }
    if rng.u8(0..4) == 0 {
        let child = Target::Process(100 + rng.u32(0..3));
        let pages = memory[&Target::Process(7)].clone();
        memory.insert(child, pages);
    }
}
