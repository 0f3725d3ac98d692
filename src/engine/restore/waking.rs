//! Wakes threads whose pages are there: at once, or a sequential reader after a whole [`BatchedWakeup`].
//!
//! Batches are used only with a nearby source, where waking costs more than the pages do. Threads are woken when the
//! batch is complete or its time is over, when nothing is on the way, before anything is given up, and at the end. So no
//! thread stays asleep.
//!
//! [`BatchedWakeup`]: crate::lazy::batched_wakeup::BatchedWakeup

use super::Restore;
use crate::lazy::planner::{PageOutcome, SpaceId};
use crate::lazy::space::Served;
use crate::sys::uffd::Wake;
use crate::units::{PageRange, Vaddr};

/// What those know who wait for a page that was filled or is gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Waiters {
    /// The kernel has woken them.
    Woken,
    /// Nobody has told them.
    Asleep,
    /// Nobody has told them, and those who read in order may wait for a batch.
    Sequential,
}

impl Restore {
    /// The pages of `range` are settled; `waiters` is what those who wait for one know of it.
    pub(super) fn settle(
        &mut self,
        id: SpaceId,
        range: PageRange,
        outcome: PageOutcome,
        waiters: Waiters,
    ) {
        let now_us = self.clock.now_us();
        let mut served = Vec::new();
        self.planner
            .settle(id, range, outcome, |thread| served.push(thread));
        self.observer.filled(now_us);
        for thread in served {
            self.observer.answered(id, thread.page, range, outcome);
            if waiters == Waiters::Sequential && self.is_sequential(id, thread.page) {
                self.batched_wakeup.hold(id, thread, now_us);
                continue;
            }
            self.note_served(id, thread, now_us);
            if waiters != Waiters::Woken {
                self.wake(id, thread);
            }
        }
    }

    /// Whether filling the page at `start` is to wake those who wait for it and what follows.
    pub(super) fn waking(&self, id: SpaceId, start: Vaddr) -> Wake {
        if self.links.is_near() && self.is_sequential(id, start) {
            Wake::Later
        } else {
            Wake::Now
        }
    }

    fn is_sequential(&self, id: SpaceId, page: Vaddr) -> bool {
        let space = self.planner.space(id);
        space.is_some_and(|space| space.is_read_upwards(page))
    }

    /// Wakes the sequences that were held up for long enough.
    pub(super) fn release_due(&mut self) {
        let now_us = self.clock.now_us();
        let nothing_comes = || !self.links.has_in_flight();
        if self.batched_wakeup.is_due(now_us)
            || self.batched_wakeup.until_us().is_some() && nothing_comes()
        {
            self.wake_held_threads();
        }
    }

    /// Wakes all sequences that are held up.
    pub(super) fn wake_held_threads(&mut self) {
        let now_us = self.clock.now_us();
        for (id, thread) in self.batched_wakeup.release() {
            self.note_served(id, thread, now_us);
            self.wake(id, thread);
        }
    }

    fn note_served(&mut self, id: SpaceId, thread: Served, now_us: u64) {
        let pid = self.processes.pid(id).unwrap_or(0);
        self.observer.served((id, pid), &thread, now_us);
    }

    /// Makes a thread look again at its page.
    pub(super) fn wake(&self, id: SpaceId, thread: Served) {
        let Some(process) = self.processes.get(id) else {
            return;
        };
        let start = thread.page.get();
        let range = PageRange::new(start, start + self.images.page().bytes());
        if let Err(error) = process.uffd.wake(range) {
            tracing::warn!(
                "cannot wake pid {} at {}: {error}",
                process.pid,
                thread.page
            );
        }
    }
}
