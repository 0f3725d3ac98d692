//! Which memory of a restored process is to be huge pages again, and when it can be.
//!
//! A lazy restore fills pages one by one, so no huge page comes of it. Once all pages of a huge page's place (2 MiB on
//! x86-64) are there, the kernel can put them together again (MADV_COLLAPSE). The contents stay what they are,
//! whatever is decided here.
//!
//! ```text
//! mapping       |-------------------------------------------|
//! dumped pages      [=========================]   [=========]
//! regions           [   2 MiB   ][   2 MiB   ]                 whole, aligned, within one mapping
//! missing                           [==]                       the second one waits
//! ```
//!
//! Invariants: a region lies within one mapping of the dump and was wholly populated there, so no memory is used that
//! the process did not use before. A region follows moves of memory as long as it stays aligned, and is forgotten
//! with the first page of it that is unmapped or given back.

use std::collections::BTreeSet;

use crate::units::{PageRange, Vaddr};

/// What is to become huge again.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum HugePages {
    /// What was huge before, as far as that is known.
    #[default]
    AsBefore,
    /// Whatever can be.
    Always,
    /// Nothing.
    Never,
}

/// When the system makes huge pages by itself: `/sys/kernel/mm/transparent_hugepage/enabled`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SystemSetting {
    /// In all memory, unless it was advised against.
    Always,
    /// In memory for which it was advised.
    Advised,
    /// Not at all, or the kernel has no huge pages.
    Never,
}

impl SystemSetting {
    /// Reads the file's text: the word in brackets counts.
    pub fn parse(text: &str) -> SystemSetting {
        let chosen = text
            .split_once('[')
            .and_then(|(_, rest)| rest.split_once(']'));
        match chosen.map(|(word, _)| word) {
            Some("always") => SystemSetting::Always,
            Some("madvise") => SystemSetting::Advised,
            _ => SystemSetting::Never,
        }
    }
}

/// What a process has advised about huge pages in a mapping (madvise).
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum HugeAdvice {
    /// Nothing.
    #[default]
    None,
    /// MADV_HUGEPAGE.
    For,
    /// MADV_NOHUGEPAGE: the kernel refuses them.
    Against,
}

/// A mapping that can have transparent huge pages: private, anonymous, of ordinary pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HugeMapping {
    /// Its addresses in the dump.
    pub range: PageRange,
    /// What its process has advised.
    pub advice: HugeAdvice,
}

/// What is known of the time before the restore.
#[derive(Clone, Copy, Debug)]
pub struct Before<'a> {
    /// What the source was seen to hold as huge pages, by address; `None` if nobody looked.
    pub seen: Option<&'a [PageRange]>,
    /// When the system makes huge pages: this one's, if the source's is not known.
    pub system: SystemSetting,
}

/// The regions of `bytes` each that are to be huge again. `mappings` and `dumped` (the ranges whose pages the dump
/// has) are by address and disjoint each.
pub fn regions(
    wanted: HugePages,
    before: Before<'_>,
    mappings: &[HugeMapping],
    dumped: &[PageRange],
    bytes: u64,
) -> Regions {
    let mut found = Regions::new(bytes);
    if wanted == HugePages::Never || !bytes.is_power_of_two() {
        return found;
    }
    let runs = joined(dumped);
    for mapping in mappings {
        let was_huge = |region: PageRange| match (wanted, before.seen) {
            (HugePages::AsBefore, Some(seen)) => covers(seen, region),
            (HugePages::AsBefore, None) => match before.system {
                SystemSetting::Always => true,
                SystemSetting::Advised => mapping.advice == HugeAdvice::For,
                SystemSetting::Never => false,
            },
            (HugePages::Always, _) => true,
            (HugePages::Never, _) => false,
        };
        if mapping.advice == HugeAdvice::Against {
            continue;
        }
        for region in within(mapping.range, &runs, bytes) {
            if was_huge(region) {
                found.waiting.insert(region.start().get());
            }
        }
    }
    found
}

/// The aligned regions of `bytes` that lie wholly in `mapping` and in one of `runs`.
fn within(mapping: PageRange, runs: &[PageRange], bytes: u64) -> impl Iterator<Item = PageRange> {
    let first = runs.partition_point(|run| run.end() <= mapping.start());
    let behind = move |run: &&PageRange| run.start() < mapping.end();
    let parts = runs[first..].iter().take_while(behind);
    let parts = parts.filter_map(move |run| run.intersect(mapping));
    parts.flat_map(move |part| {
        let start = part.start().get().checked_next_multiple_of(bytes);
        let start = start.unwrap_or(u64::MAX);
        let count = part.end().get().saturating_sub(start) / bytes;
        (0..count).map(move |nth| PageRange::new(start + nth * bytes, start + (nth + 1) * bytes))
    })
}

/// The same ranges, those that touch as one.
fn joined(ranges: &[PageRange]) -> Vec<PageRange> {
    let mut runs: Vec<PageRange> = Vec::new();
    for range in ranges {
        match runs.last_mut() {
            Some(last) if last.end() == range.start() => {
                *last = PageRange::new(last.start().get(), range.end().get());
            }
            _ => runs.push(*range),
        }
    }
    runs
}

/// Whether one of `ranges`, which are by address and do not touch, covers `region`.
fn covers(ranges: &[PageRange], region: PageRange) -> bool {
    let next = ranges.partition_point(|range| range.end() < region.end());
    ranges
        .get(next)
        .is_some_and(|range| range.start() <= region.start())
}

/// The regions of one process that are not huge again yet, by their addresses now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Regions {
    bytes: u64,
    waiting: BTreeSet<u64>,
    /// Where the last look ended.
    looked_to: u64,
}

impl Regions {
    /// None yet, of `bytes` each.
    pub fn new(bytes: u64) -> Regions {
        Regions {
            bytes,
            waiting: BTreeSet::new(),
            looked_to: 0,
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Takes up to `most` regions that lack nothing, looking at so many more that do (`looks`) from where the last
    /// call ended. `lacks` says whether a page of a range is missing.
    pub fn take_complete(
        &mut self,
        most: usize,
        looks: usize,
        lacks: impl Fn(PageRange) -> bool,
    ) -> Vec<PageRange> {
        let ahead = self.waiting.range(self.looked_to..);
        let around = self.waiting.range(..self.looked_to);
        let mut complete = Vec::new();
        let mut looked_to = self.looked_to;
        for start in ahead.chain(around).take(looks) {
            if complete.len() == most {
                break;
            }
            let region = PageRange::new(*start, start.saturating_add(self.bytes));
            looked_to = region.end().get();
            if !lacks(region) {
                complete.push(region);
            }
        }
        self.looked_to = looked_to;
        for region in &complete {
            self.waiting.remove(&region.start().get());
        }
        complete
    }

    /// The pages of `range` are gone: unmapped, given back or replaced.
    pub fn gone(&mut self, range: PageRange) {
        for start in self.starts_in(range) {
            self.waiting.remove(&start);
        }
    }

    /// The memory at `from` is at `to` now.
    pub fn moved(&mut self, from: PageRange, to: Vaddr) {
        let Some(end) = to.get().checked_add(from.bytes()) else {
            return;
        };
        let within = |start: &u64| {
            let whole = start.checked_add(self.bytes);
            from.contains(Vaddr(*start)) && whole.is_some_and(|whole| whole <= from.end().get())
        };
        let moved = self.starts_in(from);
        let shift = to.get().wrapping_sub(from.start().get());
        let aligned = shift.is_multiple_of(self.bytes);
        let at_the_new = moved.iter().filter(|start| aligned && within(start));
        let at_the_new: Vec<u64> = at_the_new.map(|start| start.wrapping_add(shift)).collect();
        self.gone(from);
        self.gone(PageRange::new(to.get(), end));
        self.waiting.extend(at_the_new);
    }

    /// The regions of which a part lies in `range`.
    fn starts_in(&self, range: PageRange) -> Vec<u64> {
        if range.is_empty() {
            return Vec::new();
        }
        let first = range.start().get().saturating_sub(self.bytes - 1);
        let starts = self.waiting.range(first..range.end().get());
        starts.copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;
    const HUGE: u64 = 2 * MIB;

    fn range(start: u64, end: u64) -> PageRange {
        PageRange::new(start * MIB, end * MIB)
    }

    fn mapping(start: u64, end: u64, advice: HugeAdvice) -> HugeMapping {
        HugeMapping {
            range: range(start, end),
            advice,
        }
    }

    fn starts(regions: &Regions) -> Vec<u64> {
        regions.waiting.iter().map(|start| start / MIB).collect()
    }

    fn found(wanted: HugePages, system: SystemSetting, seen: Option<&[PageRange]>) -> Vec<u64> {
        let mappings = [
            mapping(1, 9, HugeAdvice::None),
            mapping(9, 16, HugeAdvice::For),
            mapping(16, 24, HugeAdvice::Against),
        ];
        // Two runs that touch are one.
        let dumped = [range(0, 3), range(3, 7), range(8, 30)];
        let before = Before { seen, system };
        starts(&regions(wanted, before, &mappings, &dumped, HUGE))
    }

    #[test]
    fn what_was_huge_before_is_judged_by_what_is_known() {
        use SystemSetting::{Advised, Always, Never};
        let as_before = HugePages::AsBefore;
        // Aligned, whole in one mapping, wholly populated: not 6 (a hole at 7), not 8 (two mappings).
        assert_eq!(found(as_before, Always, None), [2, 4, 10, 12, 14]);
        assert_eq!(found(as_before, Advised, None), [10, 12, 14]);
        assert_eq!(found(as_before, Never, None), [0; 0]);
        let seen = [range(4, 6), range(11, 14)];
        assert_eq!(found(as_before, Never, Some(&seen)), [4, 12]);
        assert_eq!(found(as_before, Always, Some(&[])), [0; 0]);
        assert_eq!(
            found(HugePages::Always, Never, Some(&[])),
            [2, 4, 10, 12, 14]
        );
        assert_eq!(found(HugePages::Never, Always, None), [0; 0]);
    }

    #[test]
    fn the_systems_setting_is_the_word_in_brackets() {
        let parse = SystemSetting::parse;
        assert_eq!(parse("[always] madvise never\n"), SystemSetting::Always);
        assert_eq!(parse("always [madvise] never\n"), SystemSetting::Advised);
        assert_eq!(parse("always madvise [never]\n"), SystemSetting::Never);
        assert_eq!(parse(""), SystemSetting::Never);
    }

    fn of(starts: &[u64]) -> Regions {
        let mut regions = Regions::new(HUGE);
        regions
            .waiting
            .extend(starts.iter().map(|start| start * MIB));
        regions
    }

    #[test]
    fn complete_regions_are_taken_in_turn_and_once() {
        let mut regions = of(&[2, 4, 8, 10]);
        let hole = range(5, 6);
        let lacks = |region: PageRange| region.intersect(hole).is_some();
        assert_eq!(regions.take_complete(2, 2, lacks), [range(2, 4)]);
        assert_eq!(regions.take_complete(1, 9, lacks), [range(8, 10)]);
        assert_eq!(regions.take_complete(9, 9, lacks), [range(10, 12)]);
        assert_eq!(regions.take_complete(9, 9, lacks), []);
        assert_eq!(regions.take_complete(9, 9, |_| false), [range(4, 6)]);
        assert!(regions.is_empty());
    }

    #[test]
    fn regions_follow_their_memory_or_are_forgotten() {
        let mut regions = of(&[2, 4, 8, 10, 20]);
        regions.gone(PageRange::new(5 * MIB, 5 * MIB + 4096));
        assert_eq!(starts(&regions), [2, 8, 10, 20]);
        // 8 moves; 10 is cut at 11; what was at 20 is replaced.
        regions.moved(range(8, 11), Vaddr(20 * MIB));
        assert_eq!(starts(&regions), [2, 20]);
        regions.moved(range(20, 22), Vaddr(31 * MIB));
        assert_eq!(starts(&regions), [2], "not aligned any more");
        regions.gone(range(4, 9));
        assert_eq!(regions.len(), 1);
    }

    proptest! {
        #[test]
        fn a_region_is_always_aligned_and_among_what_was_dumped(
            lengths in prop::collection::vec((0u64..5 * MIB / 4096, 1u64..5 * MIB / 4096), 0..12),
            cut in 1u64..64 * MIB / 4096,
        ) {
            let mut end = 0;
            let dumped: Vec<PageRange> = lengths
                .into_iter()
                .map(|(gap, length)| {
                    let start = end + gap * 4096;
                    end = start + length * 4096;
                    PageRange::new(start, end)
                })
                .collect();
            let cut = cut * 4096;
            let mappings = [(0, cut), (cut, 1 << 40)].map(|(start, end)| HugeMapping {
                range: PageRange::new(start, end),
                advice: HugeAdvice::None,
            });
            let before = Before { seen: None, system: SystemSetting::Always };
            let found = regions(HugePages::AsBefore, before, &mappings, &dumped, HUGE);
            for start in &found.waiting {
                prop_assert!(start.is_multiple_of(HUGE));
                prop_assert!(*start >= cut || start + HUGE <= cut);
                let region = PageRange::new(*start, start + HUGE);
                let there: u64 = dumped.iter().filter_map(|one| one.intersect(region)).map(PageRange::bytes).sum();
                prop_assert_eq!(there, HUGE);
            }
        }
    }
}
