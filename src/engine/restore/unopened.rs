//! Restored processes whose images cannot be opened: nobody knows which of their pages are missing, so none can be
//! poisoned.
//!
//! Invariant: the userfaultfd of one is closed only when its process has been ended or the restore gives way, for the
//! kernel fills with zeros what is missing under a closed one.

use super::host_process;
use crate::sys::owned_process::ProcessName;
use crate::sys::uffd::Uffd;

/// See the module's text.
#[derive(Default, Debug)]
pub(super) struct Unopened {
    members: Vec<(ProcessName, Uffd)>,
}

impl Unopened {
    /// Keeps the userfaultfd of process `name` of this host, of which the pid and the start are 0 if they are not known.
    pub(super) fn keep(&mut self, name: ProcessName, uffd: Uffd) {
        self.members.push((name, uffd));
    }

    /// Ends the processes and what they have forked. Says whether all were known to this host.
    pub(super) fn end_processes(&self) -> bool {
        let names = self.members.iter().map(|(name, _)| *name);
        host_process::kill_families(names.clone().map(|name| (name.pid, name.started)));
        let mut names = names;
        names.all(|name| name.pid > 0 && name.started > 0)
    }
}
