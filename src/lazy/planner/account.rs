//! What became of pages, and what nobody needs of the local images any more.

use super::{Member, Planner};
use crate::lazy::answer::SpaceId;
use crate::lazy::space::{Class, Served};
use crate::units::PageRange;

/// What became of a page that was missing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageOutcome {
    /// Brought from the source for this request.
    Fetched(Class),
    /// Installed from a local image.
    Local,
    /// No image had it.
    Zero,
    /// Unmapped or removed by its process, or its process ended.
    Gone,
    /// It could not be brought; its readers are told by SIGBUS.
    Poisoned,
}

/// Pages by their outcome.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, serde::Serialize)]
#[cfg_attr(feature = "engine", derive(schemars::JsonSchema))]
pub struct Counts {
    /// Pages that a thread waited for and that were fetched for it.
    pub fault: u64,
    /// Pages fetched along with a fault.
    pub around: u64,
    /// Pages brought by the background stream.
    pub stream: u64,
    /// Pages installed from local images.
    pub local: u64,
    /// Faults on pages that no image has.
    pub zero: u64,
    /// Pages that were unmapped, removed or whose process ended before they came.
    pub gone: u64,
    /// Pages that could not be brought and were poisoned.
    pub poisoned: u64,
    /// Pages filled in forked children besides: the other numbers count each page of the dump once.
    pub copied: u64,
}

impl Counts {
    /// Pages brought from the source.
    pub fn fetched(&self) -> u64 {
        self.fault + self.around + self.stream
    }

    /// Pages that are settled, whatever the outcome; zero pages were never missing.
    pub fn settled(&self) -> u64 {
        self.fetched() + self.local + self.gone + self.poisoned
    }
}

impl Planner {
    /// Pages by outcome so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Pages that were missing at the start: those that [`Counts`] tells apart, and those that are
    /// still missing. Pages of forked children are counted only if nobody older is left to have them.
    pub fn total_pages(&self) -> u64 {
        self.total_pages
    }

    /// Pages that are not there yet, in all processes.
    pub fn missing_pages(&self) -> u64 {
        self.spaces()
            .map(|(_, space)| space.missing_bytes() >> self.page.shift())
            .sum()
    }

    /// A counted process of the family of `pid` ended while it lacked `missing` pages: its oldest child
    /// is counted from now on.
    pub(super) fn count_inherited(&mut self, pid: u32, missing: u64) {
        let shift = self.page.shift();
        let uncounted = |id: &&SpaceId| self.spaces.get(id).is_some_and(|heir| !heir.counted);
        let family = self.families.get(&pid).into_iter().flatten();
        let heir = family.clone().find(uncounted).copied();
        let inherited = heir
            .and_then(|heir| self.spaces.get_mut(&heir))
            .map_or(0, |heir| {
                heir.counted = true;
                heir.space.missing_bytes() >> shift
            });
        self.counts.gone += missing.saturating_sub(inherited);
        self.total_pages += inherited.saturating_sub(missing);
    }

    /// The pages at `range` are settled with this `outcome`. `served` sees the threads that waited.
    pub fn settle(
        &mut self,
        id: SpaceId,
        range: PageRange,
        outcome: PageOutcome,
        mut served: impl FnMut(Served),
    ) {
        let Some(Member { space, counted, .. }) = self.spaces.get_mut(&id) else {
            return;
        };
        let mut waited = 0;
        let bytes = space.settle(range, |thread| {
            waited += 1;
            served(thread);
        });
        let (pid, unneeded) = (space.pid(), space.take_unneeded());
        let pages = bytes >> self.page.shift();
        match outcome {
            PageOutcome::Fetched(_) | PageOutcome::Local if !*counted => {
                self.counts.copied += pages;
            }
            PageOutcome::Gone | PageOutcome::Poisoned if !*counted => {}
            PageOutcome::Fetched(Class::Stream) => self.counts.stream += pages,
            PageOutcome::Fetched(Class::Around) => self.counts.around += pages,
            PageOutcome::Fetched(Class::Fault | Class::Sequential) => {
                let awaited = pages.min(waited);
                self.counts.fault += awaited;
                self.counts.around += pages - awaited;
            }
            PageOutcome::Local => self.counts.local += pages,
            PageOutcome::Zero => self.counts.zero += 1,
            PageOutcome::Gone => self.counts.gone += pages,
            PageOutcome::Poisoned => self.counts.poisoned += pages,
        }
        self.note_unneeded(pid, &unneeded);
    }

    /// Somebody in the family of `pid` does not need `ranges` of the local images any more.
    pub(super) fn note_unneeded(&mut self, pid: u32, ranges: &[PageRange]) {
        for range in ranges {
            let mut at = range.start();
            while at < range.end() {
                let rest = PageRange::new(at.get(), range.end().get());
                let family = self.families.get(&pid).into_iter().flatten();
                let needed = family.filter_map(|id| self.space(*id)?.needs_local(rest));
                let needed = needed.min_by_key(|needed| needed.start());
                let free_until = needed.map_or(range.end(), PageRange::start);
                if at < free_until {
                    let free = PageRange::new(at.get(), free_until.get());
                    self.unneeded.push((pid, free));
                }
                at = needed.map_or(range.end(), PageRange::end);
            }
        }
    }

    /// What no process needs of the local images any more, by the images' pids and addresses in the dump, since
    /// it was last asked: of processes that keep account ([`Space::accounting`](super::Space::accounting)).
    pub fn take_unneeded(&mut self) -> Vec<(u32, PageRange)> {
        std::mem::take(&mut self.unneeded)
    }
}
