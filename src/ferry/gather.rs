//! Runs of pages, and how they are gathered into batches.

use crate::criu::header::PageFlags;
use crate::limits::{FERRY_BATCH_BYTES_MAX, FERRY_RUNS_MAX, FRAME_PAGES_MAX};
use crate::units::{PageCount, PageRange, PageSize, Vaddr};

use super::fields::PutFields;

/// Adjacent pages with the same flags.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// Where they are.
    pub range: PageRange,
    /// PARENT, LAZY, PRESENT, as in CRIU's pagemaps.
    pub flags: PageFlags,
}

impl Run {
    pub(super) fn has_contents(&self) -> bool {
        self.flags.has(PageFlags::PRESENT)
    }
}

/// The runs of a batch that is being gathered, within the caps of a batch.
#[derive(Clone, Debug)]
pub struct Gathered {
    page: PageSize,
    runs: Vec<Run>,
    present: u64,
}

impl Gathered {
    /// An empty batch.
    pub fn new(page: PageSize) -> Gathered {
        Gathered {
            page,
            runs: Vec::new(),
            present: 0,
        }
    }

    /// Adds the pages of `run` and returns those that did not fit, which belong into the next
    /// batch. Nothing fits into a full batch; into an empty one at least a page.
    pub fn push(&mut self, run: Run) -> Option<Run> {
        let most = if run.has_contents() {
            let batch = FERRY_BATCH_BYTES_MAX as u64 >> self.page.shift();
            batch - self.present
        } else {
            FRAME_PAGES_MAX
        };
        let continued = self.runs.last().is_some_and(|last| {
            last.flags == run.flags
                && last.range.end() == run.range.start()
                && last.range.pages(self.page).get() + most <= 2 * FRAME_PAGES_MAX
        });
        let out_of_order = self
            .runs
            .last()
            .is_some_and(|last| run.range.start() < last.range.end());
        if most == 0 || out_of_order || (!continued && self.runs.len() == FERRY_RUNS_MAX) {
            return Some(run);
        }
        let (start, end) = (run.range.start().get(), run.range.end().get());
        let cut = start + run.range.bytes().min(most << self.page.shift());
        if run.has_contents() {
            self.present += (cut - start) >> self.page.shift();
        }
        match self.runs.last_mut() {
            Some(last) if continued => {
                last.range = PageRange::new(last.range.start().get(), cut);
            }
            _ => self.runs.push(Run {
                range: PageRange::new(start, cut),
                flags: run.flags,
            }),
        }
        (cut < end).then(|| Run {
            range: PageRange::new(cut, end),
            flags: run.flags,
        })
    }

    /// The runs so far, in address order.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// How many pages with contents the batch has.
    pub fn present(&self) -> PageCount {
        PageCount(self.present)
    }

    /// Makes it empty again.
    pub fn clear(&mut self) {
        self.runs.clear();
        self.present = 0;
    }
}

/// Addresses of the pages with contents in `runs`, in order.
pub fn present_pages(runs: &[Run], page: PageSize) -> impl Iterator<Item = Vaddr> {
    let with_contents = runs.iter().filter(|run| run.has_contents());
    with_contents.flat_map(move |run| {
        let start = run.range.start().get();
        (0..run.range.pages(page).get()).map(move |n| Vaddr(start + (n << page.shift())))
    })
}

/// Appends the table of runs.
pub(super) fn put_runs(runs: &[Run], page: PageSize, out: &mut Vec<u8>) {
    for run in runs {
        out.put_u64(run.range.start().get());
        out.put_u32(u32::try_from(run.range.pages(page).get()).expect("runs keep their cap"));
        out.put_u32(run.flags.bits());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: PageSize = PageSize::KIB_4;

    fn run(first: u64, pages: u64, flags: PageFlags) -> Run {
        let range = PageRange::new(first * PAGE.bytes(), (first + pages) * PAGE.bytes());
        Run { range, flags }
    }

    proptest! {
        #[test]
        fn gathered_runs_are_the_pages_that_were_pushed(
            pushes in prop::collection::vec((0_u64..3, 1_u64..150, 0_usize..3), 1..12),
        ) {
            let flags = [PageFlags::PRESENT, PageFlags::PARENT, PageFlags::LAZY];
            let (mut at, mut expected, mut seen) = (0, Vec::new(), Vec::new());
            let mut gathered = Gathered::new(PAGE);
            let take = |gathered: &mut Gathered, seen: &mut Vec<(u64, PageFlags)>| {
                assert!(gathered.present().get() <= 64);
                for run in gathered.runs() {
                    let first = run.range.start().get() / PAGE.bytes();
                    let pages = run.range.pages(PAGE).get();
                    seen.extend((first..first + pages).map(|number| (number, run.flags)));
                }
                gathered.clear();
            };
            for (gap, pages, flag) in pushes {
                at += gap;
                expected.extend((at..at + pages).map(|number| (number, flags[flag])));
                let mut rest = Some(run(at, pages, flags[flag]));
                while let Some(more) = rest {
                    rest = gathered.push(more);
                    if rest.is_some() {
                        take(&mut gathered, &mut seen);
                    }
                }
                at += pages;
            }
            take(&mut gathered, &mut seen);
            prop_assert_eq!(seen, expected);
        }
    }

    #[test]
    fn pages_before_those_gathered_begin_another_batch() {
        let mut gathered = Gathered::new(PAGE);
        assert_eq!(gathered.push(run(5, 2, PageFlags::PRESENT)), None);
        let earlier = run(4, 1, PageFlags::PRESENT);
        assert_eq!(gathered.push(earlier), Some(earlier));
    }
}
