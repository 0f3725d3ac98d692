//! When a source was last in contact, and how long it may be silent.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// See the module's text.
#[derive(Debug)]
pub(super) struct Contact {
    limit: Duration,
    last: Mutex<Instant>,
}

impl Contact {
    /// A source that is in contact now.
    pub(super) fn new(limit: Duration) -> Contact {
        Contact {
            limit,
            last: Mutex::new(Instant::now()),
        }
    }

    /// Of a migration whose request names so many seconds.
    pub(super) fn of_seconds(timeout_s: u64) -> Contact {
        Contact::new(Duration::from_secs(timeout_s.max(1)))
    }

    /// Notes that the source was in contact.
    pub(super) fn note(&self) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// How long it may be silent.
    pub(super) fn limit(&self) -> Duration {
        self.limit
    }

    /// When it has been silent for too long.
    pub(super) fn deadline(&self) -> Instant {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) + self.limit
    }
}
