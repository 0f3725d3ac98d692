//! Guard regions that a process has installed over missing pages (MADV_GUARD_INSTALL): looked for before pages are
//! filled, since UFFDIO_COPY takes a guard away and no event tells of one.
//!
//! ```text
//! fills     [==][==]   [==]      [==]
//! one scan  |---------- a reach ---------|      a call of about 0.8 µs, however much it scans
//! ```
//!
//! So a scan reaches beyond the first fill, and counts for those that follow at once. A process can install a guard
//! between any scan and its fill; that time stays what it is for the largest fill.
//!
//! Invariant: a scan counts for no more than [`FILLED_BYTES`] of fills, and neither over a wait nor over a message of a
//! userfaultfd.

use std::collections::BTreeMap;

use super::Restore;
use super::host_process::HostProcess;
use super::install::STEP_BYTES_MAX;
use super::owner_search::Guards;
use super::waking::Waiters;
use crate::lazy::planner::{PageOutcome, SpaceId};
use crate::units::PageRange;

/// How far a scan reaches, bytes. To scan 512 KiB takes 0.3 µs more than to scan a page.
const REACH_BYTES: u64 = 512 << 10;

/// What may be filled after one scan, bytes: as much as one call fills at most.
const FILLED_BYTES: u64 = STEP_BYTES_MAX;

/// Where the last scans have found no guards.
#[derive(Debug, Default)]
pub(super) struct GuardScans {
    /// By process, and how much had been filled then.
    free: BTreeMap<SpaceId, (PageRange, u64)>,
    /// Filled since the first of them, bytes.
    filled: u64,
}

impl GuardScans {
    /// Whether a scan counts for `at` of `id`, which is filled next.
    fn covers(&mut self, id: SpaceId, at: PageRange) -> bool {
        self.filled += at.bytes();
        self.free.get(&id).is_some_and(|(free, before)| {
            let within = free.start() <= at.start() && at.end() <= free.end();
            within && self.filled.saturating_sub(*before) <= FILLED_BYTES
        })
    }

    /// No guards are in `free` of `id`, of which `at` is filled next.
    fn found_free(&mut self, id: SpaceId, free: PageRange, at: PageRange) {
        let before = self.filled.saturating_sub(at.bytes());
        self.free.insert(id, (free, before));
    }

    /// Time has passed: guards may have been installed since.
    pub(super) fn forget(&mut self) {
        self.free.clear();
        self.filled = 0;
    }
}

impl Restore {
    /// Takes guard regions in `at` for gone, if there are any, and says so: UFFDIO_COPY would take them away,
    /// and their pages read as zero once the process removes them.
    pub(super) fn leave_guards(&mut self, id: SpaceId, at: PageRange) -> Guards {
        if self.guard_scans.covers(id, at) {
            return Guards::None;
        }
        if self
            .processes
            .get(id)
            .is_some_and(|process| process.search.is_some())
        {
            let guards = self.look_before_fill(id, at);
            if let Guards::At(guard) = guards {
                self.leave_guard(id, guard);
            }
            return guards;
        }
        let reach = at.start().get().saturating_add(REACH_BYTES);
        let reach = PageRange::new(at.start().get(), at.end().get().max(reach));
        let Some(host) = self.host_of(id) else {
            return Guards::None;
        };
        let first = host.first_guard(at, reach);
        let Some(mut guard) = first.and_then(|guard| guard.intersect(at)) else {
            let end = first.map_or(reach.end(), PageRange::start);
            let free = PageRange::new(at.start().get(), end.get());
            self.guard_scans.found_free(id, free, at);
            return Guards::None;
        };
        loop {
            self.leave_guard(id, guard);
            let left = PageRange::new(guard.end().get(), at.end().get());
            let next = self.host_of(id).filter(|_| !left.is_empty());
            match next.and_then(|host| host.first_guard(left, left)) {
                Some(next) => guard = next,
                None => return Guards::At(guard),
            }
        }
    }

    fn host_of(&mut self, id: SpaceId) -> Option<&mut HostProcess> {
        self.processes.get_mut(id)?.host.as_mut()
    }

    fn leave_guard(&mut self, id: SpaceId, guard: PageRange) {
        let pid = self.processes.pid(id).unwrap_or(0);
        tracing::debug!("pid {pid}, or a child of it, keeps the guard region {guard}");
        self.settle(id, guard, PageOutcome::Gone, Waiters::Asleep);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: SpaceId = SpaceId(1);

    /// Each fills `pages` pages from `start` on, in turn: how many scans that takes.
    fn count_scans(fills: impl IntoIterator<Item = (SpaceId, u64, u64)>) -> usize {
        let mut scans = GuardScans::default();
        let mut count = 0;
        for (id, start, pages) in fills {
            let at = PageRange::new(start << 12, (start + pages) << 12);
            if !scans.covers(id, at) {
                count += 1;
                let reach = at.start().get() + REACH_BYTES;
                let free = PageRange::new(at.start().get(), at.end().get().max(reach));
                scans.found_free(id, free, at);
            }
        }
        count
    }

    #[test]
    fn one_look_is_for_many_small_pieces_and_for_one_large_one() {
        let every_second = (0..64).map(|page| (ONE, 2 * page, 1));
        assert_eq!(count_scans(every_second), 1);
        let whole = (0..8).map(|step| (ONE, 64 * step, 64));
        assert_eq!(count_scans(whole), 8);
        let pages = STEP_BYTES_MAX >> 12;
        assert_eq!(count_scans((0..2 * pages).map(|page| (ONE, page, 1))), 2);
    }

    #[test]
    fn a_look_counts_for_its_process_and_its_reach_alone() {
        assert_eq!(count_scans([(ONE, 100, 1), (SpaceId(2), 101, 1)]), 2);
        let in_turn = (0..64).map(|page| (SpaceId(page % 4), u64::from(page), 1));
        assert_eq!(count_scans(in_turn), 4);
        assert_eq!(count_scans([(ONE, 100, 1), (ONE, 99, 1)]), 2);
        let reach = REACH_BYTES >> 12;
        assert_eq!(count_scans([(ONE, 100, 1), (ONE, 99 + reach, 1)]), 1);
        assert_eq!(count_scans([(ONE, 100, 1), (ONE, 99 + reach, 2)]), 2);
        let mut scans = GuardScans::default();
        let at = PageRange::new(0, 1 << 12);
        scans.found_free(ONE, PageRange::new(0, REACH_BYTES), at);
        assert!(scans.covers(ONE, at));
        scans.forget();
        assert!(!scans.covers(ONE, at));
    }
}
