//! Gathers the first touches of a restore.

use std::collections::{BTreeMap, BTreeSet};

use super::{Extents, Mapping, Part, WorkingSet, names};
use crate::limits::WORKING_SET_PAGES_MAX;
use crate::units::{PageSize, Vaddr};

/// Takes notes of which pages are touched, in order.
#[derive(Debug)]
pub struct Recorder {
    page: PageSize,
    /// By place of the process: addresses in the dump, ms since the first touch.
    touches: BTreeMap<usize, Vec<(Vaddr, u32)>>,
    seen: BTreeSet<(usize, Vaddr)>,
    began_us: Option<u64>,
}

impl Recorder {
    /// One that has seen nothing.
    pub fn new(page: PageSize) -> Recorder {
        Recorder {
            page,
            touches: BTreeMap::new(),
            seen: BTreeSet::new(),
            began_us: None,
        }
    }

    /// A thread of the process at `place` of the tree touched the page that the dump has at `image`, or a child did that
    /// it has forked since. Only the first touch counts, and no more than
    /// [`WORKING_SET_PAGES_MAX`] of them.
    pub fn touch(&mut self, place: usize, image: Vaddr, now_us: u64) {
        let began_us = *self.began_us.get_or_insert(now_us);
        let has_room = (self.seen.len() as u64) < WORKING_SET_PAGES_MAX;
        if has_room && self.seen.insert((place, image)) {
            let at_ms = now_us.saturating_sub(began_us) / 1000;
            let at_ms = u32::try_from(at_ms).unwrap_or(u32::MAX);
            self.touches.entry(place).or_default().push((image, at_ms));
        }
    }

    /// How many pages were touched.
    pub fn pages(&self) -> usize {
        self.seen.len()
    }

    /// The working set, of processes that have these mappings, by place and address. A touch outside of them is left
    /// out.
    pub fn finish(self, mappings: &BTreeMap<usize, Vec<Mapping>>) -> WorkingSet {
        let places = self.touches.keys().next_back().map_or(0, |last| last + 1);
        let mut parts = vec![Part::default(); places];
        for (place, touches) in &self.touches {
            if let Some(mappings) = mappings.get(place) {
                parts[*place] = self.part(touches, mappings);
            }
        }
        WorkingSet {
            page: self.page,
            parts,
        }
    }

    fn part(&self, touches: &[(Vaddr, u32)], mappings: &[Mapping]) -> Part {
        let all = names(mappings, self.page);
        let mut extents = Extents::default();
        let mut used = BTreeMap::new();
        let mut kept = Vec::new();
        for (image, at_ms) in touches {
            let behind = mappings.partition_point(|mapping| mapping.range.start() <= *image);
            let Some(at) = behind.checked_sub(1) else {
                continue;
            };
            let Mapping { range, kind } = mappings[at];
            if !range.contains(*image) {
                continue;
            }
            let from_start = (image.get() - range.start().get()) >> self.page.shift();
            let page = match kind.is_stack() {
                true => range.pages(self.page).get() - 1 - from_start,
                false => from_start,
            };
            // Only what is named is kept.
            let number = *used.entry(at).or_insert_with(|| {
                kept.push(all[at]);
                u32::try_from(kept.len() - 1).unwrap_or(u32::MAX)
            });
            extents.add(number, page, *at_ms);
        }
        Part {
            names: kept,
            extents: extents.0,
        }
    }
}
