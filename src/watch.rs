//! When a rule fires: after its condition has held for long enough, once each time, and not too often. Pure.
//!
//! ```text
//!           High                held for `hold`, cool-down over
//! Off ───────────────> On ──────────────────────────────────────> Fired
//!  ^                    │ Low                                       │ Low
//!  └────────────────────┴───────────────────────────────────────────┘
//! ```
//!
//! A value between the two thresholds changes nothing: that is the hysteresis.
//!
//! Invariants, which `tests/sim_watch.rs` checks with seeds: while a rule fires, no Low was seen for at least `hold`;
//! between two firings lie a Low and the cool-down; restarts at any moment add no firing.

use serde::{Deserialize, Serialize};

/// What a look at a condition says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Level {
    /// The condition is given.
    High,
    /// Neither: it stays as it was.
    Between,
    /// The condition is over.
    Low,
}

/// The times of a rule, milliseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timing {
    /// How long the condition must hold.
    pub hold_ms: u64,
    /// Least time between two firings.
    pub cool_down_ms: u64,
}

/// What is kept over a restart.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "engine", derive(schemars::JsonSchema))]
pub struct SavedState {
    /// The rule has fired, and its condition was not seen to be over since.
    pub has_fired: bool,
    /// When it fired last, milliseconds since 1970; null if it never did.
    pub fired_ms: Option<u64>,
}

/// The state of one rule. Times are milliseconds of one clock; one that was set back counts as standing still.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Trigger {
    timing: Timing,
    /// Since when the condition holds.
    since_ms: Option<u64>,
    saved: SavedState,
}

impl Trigger {
    /// One whose condition has not been looked at.
    pub fn new(timing: Timing, saved: SavedState) -> Trigger {
        Trigger {
            timing,
            since_ms: None,
            saved,
        }
    }

    /// The condition was looked at.
    pub fn observe(&mut self, now_ms: u64, level: Level) {
        match level {
            Level::High => {
                let since = self.since_ms.get_or_insert(now_ms);
                *since = (*since).min(now_ms);
            }
            Level::Between => {}
            Level::Low => {
                self.since_ms = None;
                self.saved.has_fired = false;
            }
        }
    }

    /// Whether the condition holds.
    pub fn is_on(&self) -> bool {
        self.since_ms.is_some()
    }

    /// From when on the rule may fire, if its condition goes on to hold.
    pub fn due_ms(&self) -> Option<u64> {
        let since = self.since_ms.filter(|_| !self.saved.has_fired)?;
        let held = since.saturating_add(self.timing.hold_ms);
        let cool = self
            .saved
            .fired_ms
            .map_or(0, |fired| fired.saturating_add(self.timing.cool_down_ms));
        Some(held.max(cool))
    }

    /// Whether the rule is to fire.
    pub fn is_due(&self, now_ms: u64) -> bool {
        self.due_ms().is_some_and(|due| due <= now_ms)
    }

    /// It has fired.
    pub fn fire(&mut self, now_ms: u64) {
        self.saved = SavedState {
            has_fired: true,
            fired_ms: Some(now_ms),
        };
    }

    /// What is to be kept over a restart.
    pub fn saved(&self) -> SavedState {
        self.saved
    }
}
