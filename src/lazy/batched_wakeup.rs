//! When a thread that reads in order is woken: once a batch is there for it to read.
//!
//! Such a thread is faster than any source: wherever it is woken it soon waits again, just behind
//! what has come, and each time costs the fault, its message and two threads that are woken. So the
//! pages that a sequence is about to come to are filled without waking it, and it is woken when a whole
//! batch is there, or after a while, or when nothing more is on the way.
//!
//! ```text
//!   filled   |====|====|====|====|          a batch, then it is woken
//!   reader   ^ waits        . . . >>>>>> ^  and waits again behind the next one
//! ```
//!
//! It loses nothing by that: while it sleeps the pages go on coming, and awake it is faster than
//! they. After the last page it is behind by at most the time that one batch may take.

use super::answer::{Served, SpaceId};
use crate::units::{PageRange, Vaddr};

/// A batch, bytes. Of 1 and 2 MiB the latter wakes a reader half as often and measured best.
pub const WAKEUP_BATCH_BYTES: u64 = 2 << 20;

/// A sequence is held up for this long at most, µs: what CRIU's daemon takes between two looks at faults.
pub const WAKEUP_BATCH_US: u64 = 2_000;

/// The sequences that are held up. All times are µs on one clock.
#[derive(Debug, Default)]
pub struct BatchedWakeup {
    threads: Vec<(SpaceId, Served)>,
    /// Filled since the first of them was held up, bytes.
    filled_bytes: u64,
    until_us: u64,
    /// What was last filled without waking: a fault that was raised meanwhile is read later.
    quiet: Option<(SpaceId, PageRange)>,
}

impl BatchedWakeup {
    /// The pages at `range` were filled. `quietly`: without waking anybody.
    pub fn filled(&mut self, id: SpaceId, range: PageRange, quietly: bool) {
        self.filled_bytes += range.bytes();
        if !quietly {
            return;
        }
        let start = match self.quiet {
            Some((other, before)) if other == id && before.end() == range.start() => before.start(),
            _ => range.start(),
        };
        self.quiet = Some((id, PageRange::new(start.get(), range.end().get())));
    }

    /// Holds up a thread whose page is there.
    pub fn hold(&mut self, id: SpaceId, thread: Served, now_us: u64) {
        if self.threads.is_empty() {
            self.filled_bytes = 0;
            self.until_us = now_us + WAKEUP_BATCH_US;
        }
        self.threads.push((id, thread));
    }

    /// Whether `page` was filled quietly since threads were last woken: who waits for it reads in order.
    pub fn was_quiet(&self, id: SpaceId, page: Vaddr) -> bool {
        self.quiet.is_some_and(|(other, range)| {
            other == id && (range.start()..range.end()).contains(&page)
        })
    }

    /// The memory of `id` changed: a fault may be one for a page that is missing again.
    pub fn forget_quiet(&mut self, id: SpaceId) {
        self.quiet = self.quiet.filter(|(other, _)| *other != id);
    }

    /// When the threads are to be woken at the latest, µs; `None`: nobody is held up.
    pub fn until_us(&self) -> Option<u64> {
        (!self.threads.is_empty()).then_some(self.until_us)
    }

    /// Whether the batch is long enough, or has taken long enough.
    pub fn is_due(&self, now_us: u64) -> bool {
        self.until_us()
            .is_some_and(|until_us| now_us >= until_us || self.filled_bytes >= WAKEUP_BATCH_BYTES)
    }

    /// The threads to wake now. Nobody is held up afterwards.
    pub fn release(&mut self) -> Vec<(SpaceId, Served)> {
        self.quiet = None;
        std::mem::take(&mut self.threads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READER: SpaceId = SpaceId(1);

    fn waits_for(page: u64) -> Served {
        Served {
            page: Vaddr(page),
            since_us: 0,
        }
    }

    #[test]
    fn a_sequence_is_woken_after_a_batch() {
        let mut wakeup = BatchedWakeup::default();
        wakeup.filled(READER, PageRange::new(0, WAKEUP_BATCH_BYTES), true);
        assert!(!wakeup.is_due(u64::MAX), "nobody is held up");
        let step = WAKEUP_BATCH_BYTES / 2;
        wakeup.hold(READER, waits_for(WAKEUP_BATCH_BYTES), 100);
        let first = PageRange::new(WAKEUP_BATCH_BYTES, WAKEUP_BATCH_BYTES + step);
        wakeup.filled(READER, first, true);
        assert!(!wakeup.is_due(101), "what came before does not count");
        let second = PageRange::new(first.end().get(), first.end().get() + step);
        wakeup.filled(READER, second, false);
        assert!(wakeup.is_due(102));
        assert_eq!(
            wakeup.release(),
            [(READER, waits_for(WAKEUP_BATCH_BYTES))],
            "and once"
        );
        assert!(wakeup.release().is_empty());
        assert!(!wakeup.is_due(u64::MAX));
    }

    #[test]
    fn a_slow_batch_does_not_hold_a_sequence_up_for_long() {
        let mut wakeup = BatchedWakeup::default();
        wakeup.hold(READER, waits_for(0), 100);
        wakeup.hold(READER, waits_for(4096), 1_500);
        assert_eq!(wakeup.until_us(), Some(100 + WAKEUP_BATCH_US));
        assert!(!wakeup.is_due(99 + WAKEUP_BATCH_US));
        assert!(wakeup.is_due(100 + WAKEUP_BATCH_US));
        assert_eq!(wakeup.release().len(), 2);
    }

    #[test]
    fn quiet_pages_are_known_until_threads_are_woken_or_the_memory_changes() {
        let mut wakeup = BatchedWakeup::default();
        let other = SpaceId(2);
        wakeup.filled(READER, PageRange::new(0, 8192), true);
        wakeup.filled(READER, PageRange::new(8192, 16384), true);
        assert!(wakeup.was_quiet(READER, Vaddr(4096)));
        assert!(wakeup.was_quiet(READER, Vaddr(12288)));
        assert!(!wakeup.was_quiet(READER, Vaddr(16384)), "not filled yet");
        assert!(!wakeup.was_quiet(other, Vaddr(4096)));
        wakeup.forget_quiet(other);
        assert!(wakeup.was_quiet(READER, Vaddr(4096)));
        wakeup.forget_quiet(READER);
        assert!(!wakeup.was_quiet(READER, Vaddr(4096)));
        wakeup.filled(READER, PageRange::new(0, 4096), true);
        wakeup.filled(other, PageRange::new(4096, 8192), true);
        assert!(!wakeup.was_quiet(READER, Vaddr(0)), "the last one alone");
        wakeup.release();
        assert!(!wakeup.was_quiet(other, Vaddr(4096)));
    }
}
