//! Forks of restored processes: the child lacks what its parent lacks, but for what it does not inherit.
//!
//! | memory of the parent | what the child finds there | who tells |
//! |---|---|---|
//! | MADV_WIPEONFORK, MADV_DONTFORK | zeros, or no mapping | smaps; the images, if that cannot be read |
//! | a guard region over missing pages | a guard, and zeros once it is removed | PAGEMAP_SCAN |
//!
//! Both are looked for before the message of the fork is read: the thread that forks waits for that, and the child is in no
//! list of processes yet. To look for its guards before its pages are filled, as elsewhere, would be too late: pages may
//! come for it before anybody can find it, and filling a page takes a guard away.

use std::os::fd::AsFd;

use super::Restore;
use super::host_process::{self, HostProcess};
use super::owner_search::OwnerSearch;
use super::processes::Process;
use super::standby::StandbyMessage;
use super::waking::Waiters;
use crate::error::Result;
use crate::lazy::planner::{PageOutcome, SpaceId};
use crate::lazy::space::Space;
use crate::sys::uffd::Uffd;
use crate::units::PageRange;

impl Restore {
    /// Takes care of the child that `parent` forked, unless the parent is not known any more.
    pub(super) fn handle_fork(&mut self, parent: SpaceId, uffd: Uffd) -> Result<Option<SpaceId>> {
        let Some(process) = self.processes.get(parent) else {
            return Ok(None);
        };
        let child = Process {
            search: process.children_scope().map(OwnerSearch::new),
            ..Process::new(process.pid, uffd, process.chain.clone())
        };
        let Some(id) = self.planner.handle_fork(parent) else {
            return Ok(None);
        };
        tracing::debug!("pid {} forked", child.pid);
        self.notify_standby(
            StandbyMessage::Fork { id, parent },
            Some(child.uffd.as_fd()),
        );
        self.family.forget();
        self.processes.adopt(id, child)?;
        self.look_for_some_ended();
        Ok(Some(id))
    }

    /// What the child that `id` is forking does not inherit, if it is: seen before its message is read. The kernel lets the
    /// parent go on with that, which may then give other advice about its memory, or move it, before it is looked at.
    pub(super) fn withheld_by_pending_fork(&self, id: SpaceId) -> Option<Vec<PageRange>> {
        let process = self.processes.get(id)?;
        let space = self.planner.space(id)?;
        if space.is_complete() || !process.uffd.is_changing(self.anywhere()) {
            return None;
        }
        match &process.host {
            Some(host) => host.may_be_forking().then(|| self.withheld_by_fork(id)),
            None => self.withheld_by_unknown(process, space),
        }
    }

    /// The same where it is not known which process it is: of those that it may be one alone waits until its fork is known.
    fn withheld_by_unknown(&self, process: &Process, space: &Space) -> Option<Vec<PageRange>> {
        let scope = process.search.as_ref().map(OwnerSearch::scope)?;
        let pids = scope.pids(&self.processes.host_pids(), usize::MAX)?;
        let mut forking = pids
            .into_iter()
            .filter(|pid| host_process::waits_for_its_fork(*pid));
        let pid = forking.next().filter(|_| forking.next().is_none())?;
        let mut withheld = host_process::wiped_on_fork_of(pid)?;
        if let Some(span) = space.missing_span() {
            withheld.extend(host_process::guards_of(pid, span));
        }
        Some(withheld)
    }

    /// What the children that `id` forks now do not inherit: as its mappings say, else as the images did.
    pub(super) fn withheld_by_fork(&self, id: SpaceId) -> Vec<PageRange> {
        let space = self.planner.space(id).filter(|space| !space.is_complete());
        let Some(space) = space else {
            return Vec::new();
        };
        let process = self.processes.get(id);
        let host = process.and_then(|process| process.host.as_ref());
        let mut withheld = host
            .and_then(HostProcess::wiped_on_fork)
            .unwrap_or_else(|| space.wiped_on_fork());
        if let (Some(host), Some(span)) = (host, space.missing_span()) {
            withheld.extend(host.guards(span));
        }
        withheld
    }

    /// Nothing of `ranges` comes to the child `id`: there it is zero, guarded, or not mapped. Without this, a mapping that
    /// the child lets grow to there would show what was there in its parent.
    pub(super) fn withhold(&mut self, id: SpaceId, ranges: &[PageRange]) {
        for &range in ranges {
            let space = self.planner.space(id);
            if !space.is_some_and(|space| space.lacks(range)) {
                continue;
            }
            self.notify_standby(StandbyMessage::Gone { id, range }, None);
            self.settle(id, range, PageOutcome::Gone, Waiters::Asleep);
        }
    }
}
