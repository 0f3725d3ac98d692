//! Tells waiting threads that something has changed.

use std::time::Duration;

use crate::engine::ferry::lock;
use crate::sync::{Condvar, Mutex};

/// Notifies when something has happened that a thread may be waiting for.
#[derive(Debug, Default)]
pub(in crate::engine) struct ChangeNotifier {
    notified: Mutex<u64>,
    condition: Condvar,
}

impl ChangeNotifier {
    pub(in crate::engine) fn notify(&self) {
        *lock(&self.notified) += 1;
        self.condition.notify_all();
    }

    /// How often it was notified.
    pub(in crate::engine) fn notified(&self) -> u64 {
        *lock(&self.notified)
    }

    /// Waits until it was notified more often than `seen`, or for `timeout`.
    pub(in crate::engine) fn wait(&self, seen: u64, timeout: Duration) {
        let notified = lock(&self.notified);
        // Woken or not, the caller looks again.
        drop(
            self.condition
                .wait_timeout_while(notified, timeout, |notified| *notified <= seen),
        );
    }
}

#[cfg(all(test, feature = "shuttle"))]
mod schedules;
