//! What the background stream may do: fetch and install what no fault has asked for, at what rate.
//!
//! Invariant: while somebody traces or freezes a process, as a dump does, the background stream runs at full speed. Then
//! neither a rate nor `--on-demand` limits it.

use super::RestoreConfig;
use crate::lazy::window::RateLimit;
use crate::units::PageSize;

/// See the module's text.
#[derive(Debug)]
pub(super) struct Background {
    on_demand: bool,
    /// It leaves everything to faults for a while.
    held_back: bool,
    limit: Option<RateLimit>,
    full_speed: bool,
}

impl Background {
    pub(super) fn new(config: &RestoreConfig) -> Background {
        Background {
            on_demand: config.on_demand,
            held_back: config.record_working_set.is_some(),
            limit: config.max_bandwidth.map(RateLimit::new),
            full_speed: false,
        }
    }

    /// Whether it leaves everything to faults.
    pub(super) fn is_off(&self) -> bool {
        (self.on_demand || self.held_back) && !self.full_speed
    }

    /// Leaves everything to faults from now on, or no longer.
    pub(super) fn leave_to_faults(&mut self, now: bool) {
        self.held_back = now;
    }

    /// Runs at full speed from now on, or no longer.
    pub(super) fn set_full_speed(&mut self, now: bool) {
        self.full_speed = now;
        if let Some(limit) = &mut self.limit {
            limit.lift(now);
        }
    }

    /// Until when it waits for its rate, µs.
    pub(super) fn waits_until_us(&mut self, now_us: u64) -> Option<u64> {
        self.limit.as_mut()?.wait_until_us(now_us)
    }

    /// Whether it waits for its rate.
    pub(super) fn is_throttled(&mut self, now_us: u64) -> bool {
        self.waits_until_us(now_us).is_some()
    }

    /// It has brought so many bytes, or asked for them.
    pub(super) fn spend(&mut self, bytes: u64) {
        if let Some(limit) = &mut self.limit {
            limit.spend(bytes);
        }
    }

    /// The rate, which a sender is held to as well.
    pub(super) fn limit(&mut self) -> Option<&mut RateLimit> {
        self.limit.as_mut()
    }

    /// What it asks for at once, and over what it goes on rather than asking again: as the `window` says, or less
    /// where bytes are what is dear.
    pub(super) fn chunk_and_gap(&self, window: (u64, u64), page: PageSize) -> (u64, u64) {
        match &self.limit {
            None => window,
            Some(limit) => {
                let chunk = page.floor(limit.chunk_bytes().min(window.0));
                (chunk.max(page.bytes()), 0)
            }
        }
    }
}
