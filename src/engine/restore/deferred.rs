//! Processes that can take no page now, and the pages that have come for them meanwhile.
//!
//! ```text
//! fill refused ──> pause: planner serves the others ──> after a moment once more ──> filled: as if nothing was
//!                  what has come is kept here                     │
//!                                                                 └─> no room for too long: given up
//! ```
//!
//! | the kernel says | because | it ends when |
//! |---|---|---|
//! | ENOMEM | the control group of the process, not ours, is full | there is room, or the kernel kills the process |
//! | EAGAIN | a fork is under way, and its event cannot be read yet | the event can be read |
//! | EMFILE | there is no descriptor for a child, so its parent waits in fork(2) | another child has ended |
//!
//! In the last case no page of the parent can be filled.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::Restore;
use crate::error::Result;
use crate::lazy::planner::{PageOutcome, SpaceId};
use crate::limits::STASH_BYTES_MAX;
use crate::units::PageRange;

/// The first pause after a refusal, µs; each one after it is twice as long.
const PAUSE_US: u64 = 500;

/// The longest pause, µs.
const PAUSE_US_MAX: u64 = 250_000;

/// While a fork is under way nobody waits for longer than this, µs.
const CHANGING_US_MAX: u64 = 5_000;

/// Why a process can take no page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum PauseReason {
    /// There is no memory for it.
    NoRoom,
    /// An event is in the way and not there to read yet.
    Changing,
    /// Its child's userfaultfd cannot be received.
    NoDescriptor,
}

#[derive(Debug)]
struct Pause {
    reason: PauseReason,
    since_us: u64,
    /// `None` while it is tried again.
    until_us: Option<u64>,
    pause_us: u64,
}

/// Pages that have come for a process that could not take them.
#[derive(Debug)]
struct DeferredPages {
    id: SpaceId,
    pid: u32,
    image: PageRange,
    bytes: Vec<u8>,
    outcome: PageOutcome,
}

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Deferred {
    paused: BTreeMap<SpaceId, Pause>,
    stash: VecDeque<DeferredPages>,
    stashed_bytes: u64,
    /// What was kept for processes that have ended: children may wait for it.
    left_over: Vec<DeferredPages>,
}

impl Deferred {
    pub(super) fn is_paused(&self, id: SpaceId) -> bool {
        let pause = self.paused.get(&id);
        pause.is_some_and(|pause| pause.until_us.is_some())
    }

    /// When the next process is to be tried again, µs.
    pub(super) fn until_us(&self) -> Option<u64> {
        let pauses = self.paused.values();
        pauses.filter_map(|pause| pause.until_us).min()
    }

    /// A page of `id` was filled.
    pub(super) fn filled(&mut self, id: SpaceId) {
        if !self.paused.is_empty() {
            self.paused.remove(&id);
        }
    }

    pub(super) fn forget(&mut self, id: SpaceId) {
        self.paused.remove(&id);
        let mut left_over = self.take_stashed(id);
        self.left_over.append(&mut left_over);
    }

    /// Everything is tried again now.
    pub(super) fn try_now(&mut self) {
        let pauses = self.paused.values_mut();
        pauses.for_each(|pause| pause.until_us = pause.until_us.and(Some(0)));
    }

    /// Begins a pause, longer than the last one if nothing was filled since. Says since when, µs.
    fn pause(&mut self, id: SpaceId, reason: PauseReason, now_us: u64) -> u64 {
        let pause = self.paused.entry(id).or_insert(Pause {
            reason,
            since_us: now_us,
            until_us: None,
            pause_us: PAUSE_US / 2,
        });
        if pause.reason != reason {
            (pause.reason, pause.since_us) = (reason, now_us);
        }
        if pause.until_us.is_none() {
            let most = match reason {
                PauseReason::Changing => CHANGING_US_MAX,
                PauseReason::NoRoom | PauseReason::NoDescriptor => PAUSE_US_MAX,
            };
            pause.pause_us = (pause.pause_us * 2).min(most);
            pause.until_us = Some(now_us + pause.pause_us);
        }
        pause.since_us
    }

    /// The processes whose pause is over: they are tried again.
    fn take_due(&mut self, now_us: u64) -> Vec<(SpaceId, PauseReason)> {
        let due = self.paused.iter_mut().filter_map(|(id, pause)| {
            pause.until_us.take_if(|until_us| *until_us <= now_us)?;
            Some((*id, pause.reason))
        });
        due.collect()
    }

    fn put(&mut self, deferred_pages: DeferredPages) {
        self.stashed_bytes += deferred_pages.bytes.len() as u64;
        self.stash.push_back(deferred_pages);
    }

    fn take_stashed(&mut self, id: SpaceId) -> Vec<DeferredPages> {
        let (own, others) = std::mem::take(&mut self.stash)
            .into_iter()
            .partition(|deferred_pages| deferred_pages.id == id);
        self.stash = others;
        let own: VecDeque<DeferredPages> = own;
        let bytes: u64 = own
            .iter()
            .map(|deferred_pages| deferred_pages.bytes.len() as u64)
            .sum();
        self.stashed_bytes -= bytes;
        own.into()
    }
}

impl Restore {
    /// The pages `image` of `id`, which are `bytes`, cannot be filled now: they are kept, or asked for again if
    /// too much is kept already.
    pub(super) fn stash(
        &mut self,
        id: SpaceId,
        image: PageRange,
        bytes: &[u8],
        outcome: PageOutcome,
    ) {
        if self.deferred.stashed_bytes + image.bytes() > STASH_BYTES_MAX {
            self.planner.give_back_for(id, image);
            return;
        }
        let bytes = bytes.to_vec();
        let Some(pid) = self.processes.pid(id) else {
            return;
        };
        self.deferred.put(DeferredPages {
            id,
            pid,
            image,
            bytes,
            outcome,
        });
    }

    /// Serves the others for a moment.
    pub(super) fn defer(&mut self, id: SpaceId, reason: PauseReason) -> Result<()> {
        let now_us = self.clock.now_us();
        self.planner.pause(id);
        let since_us = self.deferred.pause(id, reason, now_us);
        let pid = self.processes.pid(id).unwrap_or(0);
        let waits = Duration::from_micros(now_us - since_us);
        let text = match reason {
            PauseReason::Changing => return Ok(()),
            PauseReason::NoRoom => format!(
                "no memory for the pages of pid {pid}: its control group (or the file system of a mapping) is \
                 full; trying again for {} s",
                self.config.local_timeout.as_secs()
            ),
            PauseReason::NoDescriptor => format!(
                "no descriptor for a child that pid {pid} forks, which waits until one is free: a higher limit \
                 (ulimit -n, LimitNOFILE=) helps"
            ),
        };
        if let Some(left_out) = self.losses.may_log(now_us) {
            tracing::warn!("{text}{left_out}");
        }
        if reason == PauseReason::NoRoom && waits >= self.losses.local_retry_time() {
            let why = format!(
                "there was no memory for its pages for {} s",
                waits.as_secs()
            );
            return self.give_up_process(id, &why);
        }
        Ok(())
    }

    /// Tries again what was deferred for long enough.
    pub(super) fn resume_due(&mut self) -> Result<()> {
        for DeferredPages {
            pid,
            image,
            bytes,
            outcome,
            ..
        } in std::mem::take(&mut self.deferred.left_over)
        {
            self.install_in_family(pid, None, image, &bytes, outcome)?;
        }
        if self.deferred.paused.is_empty() {
            return Ok(());
        }
        let now_us = self.clock.now_us();
        for (id, reason) in self.deferred.take_due(now_us) {
            self.planner.resume(id);
            if reason == PauseReason::NoDescriptor {
                self.processes.watch_again(id);
                self.read_events(id)?;
            }
            for DeferredPages {
                id,
                pid,
                image,
                bytes,
                outcome,
            } in self.deferred.take_stashed(id)
            {
                // Children that were forked meanwhile wait for the same.
                self.planner.pushed(id, image);
                self.install(id, image, &bytes, outcome)?;
                self.install_in_family(pid, Some(id), image, &bytes, outcome)?;
            }
        }
        Ok(())
    }

    /// The userfaultfd of a child of `id` cannot be received: those that nobody needs are closed, and if
    /// there are none, the process waits.
    pub(super) fn lack_descriptor(&mut self, id: SpaceId) -> Result<()> {
        if self.close_unneeded() > 0 || self.forget_hosts_of_children() {
            return Ok(());
        }
        // It stays readable; that is no reason to look at it all the time.
        self.processes.unwatch(id);
        self.defer(id, PauseReason::NoDescriptor)
    }
}

/// Between two lines of one kind in the log, µs.
const COMPLAINT_US: u64 = 10_000_000;

/// Keeps what is said again and again from filling the log.
#[derive(Debug, Default)]
pub(super) struct LogLimiter {
    next_us: u64,
    left_out: u64,
}

/// How many lines were left out.
#[derive(Debug)]
pub(super) struct LeftOut(u64);

impl std::fmt::Display for LeftOut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            0 => Ok(()),
            lines => write!(f, " ({lines} lines like this were left out)"),
        }
    }
}

impl LogLimiter {
    /// Whether a line may be written now, and how many were not since the last one.
    pub(super) fn admit(&mut self, now_us: u64) -> Option<LeftOut> {
        if now_us < self.next_us {
            self.left_out += 1;
            return None;
        }
        self.next_us = now_us + COMPLAINT_US;
        Some(LeftOut(std::mem::take(&mut self.left_out)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: SpaceId = SpaceId(3);

    #[test]
    fn pauses_double_until_a_page_is_filled() {
        let mut deferred = Deferred::default();
        let mut now_us = 0;
        let mut pauses = Vec::new();
        for _ in 0..12 {
            assert_eq!(deferred.pause(ID, PauseReason::NoRoom, now_us), 0);
            assert!(deferred.is_paused(ID));
            let until_us = deferred.until_us().unwrap();
            assert_eq!(deferred.take_due(until_us - 1), []);
            pauses.push(until_us - now_us);
            now_us = until_us;
            assert_eq!(deferred.take_due(now_us), [(ID, PauseReason::NoRoom)]);
            assert!(!deferred.is_paused(ID));
        }
        assert_eq!((pauses[0], pauses[1]), (PAUSE_US, 2 * PAUSE_US));
        assert_eq!(pauses.last(), Some(&PAUSE_US_MAX));
        deferred.filled(ID);
        assert_eq!(deferred.pause(ID, PauseReason::NoRoom, now_us), now_us);
        assert_eq!(deferred.until_us(), Some(now_us + PAUSE_US));
    }

    #[test]
    fn what_is_kept_is_handed_out_once_and_in_order() {
        let mut deferred = Deferred::default();
        for (id, page) in [(3, 1), (4, 1), (3, 2)] {
            deferred.put(DeferredPages {
                id: SpaceId(id),
                pid: 1,
                image: PageRange::new(page << 12, (page + 1) << 12),
                bytes: vec![0; 4096],
                outcome: PageOutcome::Local,
            });
        }
        let pages = |deferred_pages: Vec<DeferredPages>| {
            let starts = deferred_pages
                .iter()
                .map(|one| one.image.start().get() >> 12);
            starts.collect::<Vec<_>>()
        };
        assert_eq!(pages(deferred.take_stashed(ID)), [1, 2]);
        assert_eq!(deferred.stashed_bytes, 4096);
        deferred.forget(SpaceId(4));
        assert_eq!(deferred.stashed_bytes, 0);
        assert_eq!(deferred.left_over.len(), 1, "its children may need it");
    }

    #[test]
    fn one_line_of_many_is_written() {
        let mut log_limiter = LogLimiter::default();
        let messages: Vec<String> = (0..30)
            .filter_map(|second| log_limiter.admit(second * 1_000_000))
            .map(|left_out| left_out.to_string())
            .collect();
        let after_nine = " (9 lines like this were left out)";
        assert_eq!(messages, ["", after_nine, after_nine]);
    }
}
