//! What goes wrong beside a migration, for its report.

use std::sync::{Mutex, PoisonError};

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Warnings(Mutex<Vec<String>>);

impl Warnings {
    /// Logs one, and keeps it.
    pub(super) fn add(&self, text: String) {
        tracing::warn!("{text}");
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(text);
    }

    /// Those so far.
    pub(super) fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
