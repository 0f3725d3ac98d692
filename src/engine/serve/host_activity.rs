//! Which hosts have a session that has asked for a page: their other connections may be idle, for a
//! restore makes more than one and need not use them all.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::PoisonError;

use crate::sync::{Mutex, MutexGuard};

/// Hosts that ask for pages now, with how many of their sessions do.
#[derive(Debug, Default)]
pub(in crate::engine) struct ActiveHosts(Mutex<HashMap<String, usize>>);

/// A session that has asked for a page, until this is dropped.
#[derive(Debug)]
pub(in crate::engine) struct HostActivity<'a> {
    hosts: &'a ActiveHosts,
    host: String,
}

impl ActiveHosts {
    fn sessions(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        // Poisoned or not, the counts are right: they are changed in single steps.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a session of `host` has asked for a page.
    pub(in crate::engine) fn contains(&self, host: &str) -> bool {
        self.sessions().contains_key(host)
    }

    /// A session of `host` asks for its first page.
    pub(in crate::engine) fn begin(&self, host: String) -> HostActivity<'_> {
        *self.sessions().entry(host.clone()).or_default() += 1;
        HostActivity { hosts: self, host }
    }
}

impl Drop for HostActivity<'_> {
    fn drop(&mut self) {
        let mut sessions = self.hosts.sessions();
        if let Entry::Occupied(mut count) = sessions.entry(std::mem::take(&mut self.host)) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}
