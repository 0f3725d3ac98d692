//! Taking a dump's memory over: which pages have come, which are on the way, which are asked for next.
//!
//! ```text
//! runs of all processes   | pid 7      | pid 7 |  pid 9          |
//! page numbers            0            40      52               90     their place where they are held
//! ```
//!
//! Pages are numbered from 0 through all runs. What somebody waits for is asked for first, then all
//! the rest in the order of the numbers.
//!
//! Invariants: a page that is held was asked for; a page that was asked for and does not come is given
//! back, and asked for again.

use std::collections::VecDeque;
use std::ops::Range;

use super::pageset::PageSet;
use crate::units::{PageCount, PageRange, PageSize};

/// A run of pages of one process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DrainRun {
    /// Whose pages, as the images call it.
    pub pid: u32,
    /// Their addresses in the dump.
    pub range: PageRange,
    /// Number of the first page.
    pub first: u64,
}

/// See the module's text.
#[derive(Debug)]
pub struct DrainPlan {
    page: PageSize,
    /// By pid and address.
    runs: Vec<DrainRun>,
    asked: PageSet,
    held: PageSet,
    wanted: VecDeque<Range<u64>>,
    /// No page below was left out.
    cursor: u64,
}

impl DrainPlan {
    /// A plan for these runs, sorted by pid and address and not overlapping.
    pub fn new(page: PageSize, sorted: impl IntoIterator<Item = (u32, PageRange)>) -> DrainPlan {
        let mut runs: Vec<DrainRun> = Vec::new();
        let mut first = 0;
        for (pid, range) in sorted {
            runs.push(DrainRun { pid, range, first });
            first += range.pages(page).get();
        }
        DrainPlan {
            page,
            runs,
            asked: PageSet::new(first),
            held: PageSet::new(first),
            wanted: VecDeque::new(),
            cursor: 0,
        }
    }

    /// Size of a page.
    pub fn page(&self) -> PageSize {
        self.page
    }

    /// All runs, by pid and address.
    pub fn runs(&self) -> impl Iterator<Item = (u32, PageRange)> + '_ {
        self.runs.iter().map(|run| (run.pid, run.range))
    }

    /// How many pages there are.
    pub fn pages(&self) -> PageCount {
        PageCount(self.runs.last().map_or(0, |run| self.end_of(run)))
    }

    /// How many pages have come.
    pub fn held(&self) -> PageCount {
        PageCount(self.held.count())
    }

    /// Whether every page has come.
    pub fn is_complete(&self) -> bool {
        self.held.is_full()
    }

    /// The numbers of those pages of `range` that the run around its first page has; `None` if no run
    /// has that page.
    pub fn locate(&self, pid: u32, range: PageRange) -> Option<Range<u64>> {
        let start = range.start();
        let at = self
            .runs
            .partition_point(|run| (run.pid, run.range.start()) <= (pid, start));
        let run = self.runs.get(at.checked_sub(1)?)?;
        if run.pid != pid || !run.range.contains(start) {
            return None;
        }
        let both = run.range.intersect(range)?;
        let first =
            run.first + ((both.start().get() - run.range.start().get()) >> self.page.shift());
        Some(first..first + both.pages(self.page).get())
    }

    /// Whose page `number` is, and the addresses of the pages from there to `end`, as far as they are of
    /// the same run. `number` is below [`DrainPlan::pages`].
    pub fn addresses(&self, number: u64, end: u64) -> (u32, PageRange) {
        let at = self.runs.partition_point(|run| run.first <= number);
        let run = &self.runs[at - 1];
        let end = end.min(self.end_of(run));
        let address =
            |number: u64| run.range.start().get() + ((number - run.first) << self.page.shift());
        (run.pid, PageRange::new(address(number), address(end)))
    }

    /// The part of `numbers` from its start on that is there.
    pub fn held_part(&self, numbers: Range<u64>) -> Range<u64> {
        numbers.start..self.held.next_in(numbers, false)
    }

    /// Somebody waits for the pages `numbers`. With `first`, he goes before all others.
    pub fn want(&mut self, numbers: Range<u64>, first: bool) {
        if self.asked.next_in(numbers.clone(), false) >= numbers.end {
            return;
        }
        if first {
            self.wanted.push_front(numbers);
        } else {
            self.wanted.push_back(numbers);
        }
    }

    /// The next pages to ask for, at most `most`.
    pub fn next_request(&mut self, most: PageCount) -> Option<(u32, PageRange)> {
        while let Some(wanted) = self.wanted.front_mut() {
            let start = self.asked.next_in(wanted.clone(), false);
            if start < wanted.end {
                let end = wanted.end;
                wanted.start = start;
                return Some(self.ask(start, end.min(start + most.get())));
            }
            self.wanted.pop_front();
        }
        let start = self.asked.next(self.cursor, false);
        self.cursor = start;
        (start < self.pages().get()).then(|| self.ask(start, start + most.get()))
    }

    fn ask(&mut self, start: u64, end: u64) -> (u32, PageRange) {
        let end = self.asked.next_in(start..end, true);
        let (pid, range) = self.addresses(start, end);
        self.asked
            .insert(start..start + range.pages(self.page).get());
        (pid, range)
    }

    /// The pages `range`, which were asked for, have come.
    pub fn arrived(&mut self, pid: u32, range: PageRange) {
        if let Some(numbers) = self.locate(pid, range) {
            self.held.insert(numbers);
        }
    }

    /// The pages `range`, which were asked for, did not come with their answer.
    pub fn give_back(&mut self, pid: u32, range: PageRange) {
        let Some(numbers) = self.locate(pid, range) else {
            return;
        };
        self.cursor = self.cursor.min(numbers.start);
        self.asked.remove(numbers.clone());
        // Whoever waits for a part of it was first before and stays it.
        self.wanted.push_front(numbers);
    }

    fn end_of(&self, run: &DrainRun) -> u64 {
        run.first + run.range.pages(self.page).get()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::lazy::pageset::tests::words_seen;

    const PAGE: PageSize = PageSize::KIB_4;

    fn range(page: u64, pages: u64) -> PageRange {
        PageRange::new(page << 12, (page + pages) << 12)
    }

    fn plan() -> DrainPlan {
        DrainPlan::new(
            PAGE,
            [(7, range(10, 40)), (7, range(100, 12)), (9, range(10, 38))],
        )
    }

    #[test]
    fn pages_are_found_by_address_and_by_number() {
        let plan = plan();
        assert_eq!(plan.pages(), PageCount(90));
        assert_eq!(plan.locate(7, range(45, 20)), Some(35..40));
        assert_eq!(plan.locate(7, range(100, 1)), Some(40..41));
        assert_eq!(plan.locate(9, range(12, 3)), Some(54..57));
        for (pid, range) in [
            (7, range(9, 1)),
            (7, range(50, 1)),
            (8, range(10, 1)),
            (9, range(48, 1)),
        ] {
            assert_eq!(plan.locate(pid, range), None);
        }
        assert_eq!(plan.addresses(39, 90), (7, range(49, 1)));
        assert_eq!(plan.addresses(52, 60), (9, range(10, 8)));
    }

    #[test]
    fn what_somebody_waits_for_comes_first_and_is_asked_for_once() {
        let mut plan = plan();
        let most = PageCount(16);
        assert_eq!(plan.next_request(most), Some((7, range(10, 16))));
        plan.want(54..57, false);
        plan.want(20..22, true);
        assert_eq!(plan.next_request(most), Some((7, range(30, 2))));
        assert_eq!(plan.next_request(most), Some((9, range(12, 3))));
        assert_eq!(
            plan.next_request(most),
            Some((7, range(26, 4))),
            "up to what is asked for"
        );
        plan.want(20..22, true);
        assert_eq!(plan.next_request(most), Some((7, range(32, 16))));
    }

    #[test]
    fn the_work_grows_with_the_pages_whatever_somebody_waits_for() {
        // Every second page, each a run of its own, and one run of as many pages.
        let fragments = |pages: u64| (0..pages).map(|n| (7, range(10 + 2 * n, 1))).collect();
        let whole = |pages: u64| vec![(7, range(10, pages))];
        let shapes: [&dyn Fn(u64) -> Vec<(u32, PageRange)>; 2] = [&fragments, &whole];
        for shape in shapes {
            let words_for = |pages: u64| {
                let mut plan = DrainPlan::new(PAGE, shape(pages));
                let before = words_seen();
                let mut asked = 0;
                while let Some((pid, range)) = plan.next_request(PageCount(64)) {
                    let first = plan.locate(pid, range).unwrap().start;
                    plan.arrived(pid, range);
                    assert_eq!(plan.held_part(first..first + 1), first..first + 1);
                    // What is there is waited for again and again.
                    plan.want(0..1, true);
                    plan.want(asked / 2..asked / 2 + 1, false);
                    asked += range.pages(PAGE).get();
                }
                assert!(plan.is_complete());
                words_seen() - before
            };
            let (few, many) = (words_for(1 << 11), words_for(1 << 14));
            assert!(many <= 9 * few, "8 times the pages: {few} and {many} words");
        }
    }

    proptest! {
        #[test]
        fn everything_comes_whatever_is_given_back(
            wants in prop::collection::vec((0..90_u64, 1..20_u64, any::<bool>()), 0..20),
            cuts in prop::collection::vec(0..20_u64, 1..200),
            most in 1..30_u64,
        ) {
            let mut plan = plan();
            let mut wants = wants.into_iter();
            let mut cuts = cuts.into_iter();
            while let Some((pid, asked)) = plan.next_request(PageCount(most)) {
                let cut = cuts.next().unwrap_or(0).min(asked.pages(PAGE).get());
                let end = asked.end().get() - (cut << 12);
                let came = PageRange::new(asked.start().get(), end);
                if !came.is_empty() {
                    plan.arrived(pid, came);
                }
                if cut > 0 {
                    plan.give_back(pid, PageRange::new(end, asked.end().get()));
                }
                if let Some((start, pages, first)) = wants.next() {
                    plan.want(start..(start + pages).min(90), first);
                }
            }
            prop_assert!(plan.is_complete());
            prop_assert_eq!(plan.held(), plan.pages());
            prop_assert_eq!(plan.held_part(3..80), 3..80);
        }
    }
}
