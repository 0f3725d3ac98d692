//! Finds the process of a userfaultfd that nobody has named. It is a child that was forked since the restore, or a
//! restored process in another PID namespace, which the kernel does not name here.
//!
//! The kernel does not say whose memory a userfaultfd is for. But a page that is filled through it is then present in its
//! process, and in no other one. So a few candidates are looked at before and after the first fill. The one in which the
//! page has come is the process.
//!
//! ```text
//! no candidate                         the child does not run yet: its only guards are its parent's (`forks`)
//! none has a guard where it is filled  filled, and looked who has the page
//! some have guards there               what no candidate guards is filled first, and looked who has the page
//! nothing is left then                 they are guards if all candidates have them
//! ```
//!
//! Invariants: a guard region counts only if it cannot be another process's. A process that is not found after a few
//! fills is not looked for any more, and guard regions in its missing memory are lost. The candidates of one look, and of
//! one family, at most are open.

use std::sync::Arc;

use super::Restore;
use super::candidates::{Candidate, SearchScope};
use super::host_process::HostProcess;
use crate::lazy::planner::SpaceId;
use crate::units::{PageRange, Vaddr};

/// What looking at candidates costs; to find that there are none costs 1.
const LOOK_COST: u32 = 32;

/// What may be spent on one process.
const COST_MAX: u32 = 1024;

/// The search for the process of a userfaultfd.
#[derive(Debug)]
pub(super) struct OwnerSearch {
    scope: SearchScope,
    cost: u32,
}

/// The last look at candidates, one for all searches: each holds a descriptor for every candidate, and a fill that is
/// refused leaves its look behind. In a storm of forks each child would hold as many descriptors as there are children.
#[derive(Debug, Default)]
pub(super) struct LastLook(Option<MissingPage>);

/// Before a page of `id` is filled: who lacks it.
#[derive(Debug)]
struct MissingPage {
    id: SpaceId,
    page: Vaddr,
    candidates: Vec<Arc<Candidate>>,
    cost: u32,
}

impl OwnerSearch {
    pub(super) fn new(scope: SearchScope) -> OwnerSearch {
        OwnerSearch { scope, cost: 0 }
    }

    pub(super) fn scope(&self) -> SearchScope {
        self.scope
    }
}

/// What is to be done before a fill.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Guards {
    /// Nothing: no guards are there.
    None,
    /// These are guards.
    At(PageRange),
    /// Filling this alone.
    Beside(PageRange),
}

impl Restore {
    /// Looks at the candidates for `id` before `at` is filled.
    pub(super) fn look_before_fill(&mut self, id: SpaceId, at: PageRange) -> Guards {
        let process = self.processes.get(id);
        let Some(scope) = process.and_then(|process| Some(process.search.as_ref()?.scope)) else {
            return Guards::None;
        };
        let Some(mut candidates) = self.candidates(scope) else {
            return Guards::None;
        };
        // An error: it has ended, or the kernel cannot tell.
        let guards: Vec<Option<PageRange>> = candidates
            .iter()
            .map(|candidate| candidate.first_guard(at))
            .collect();
        let free = guards.iter().flatten().copied().fold(at, beside);
        if free.is_empty() {
            return common_guard(&candidates, &guards, at).map_or(Guards::None, Guards::At);
        }
        let page = self.images.page().bytes();
        let lacks = |candidate: &Arc<Candidate>| candidate.has(free.start(), page) == Some(false);
        let cost = if candidates.is_empty() { 1 } else { LOOK_COST };
        candidates.retain(lacks);
        self.last_look = LastLook(Some(MissingPage {
            id,
            page: free.start(),
            candidates,
            cost,
        }));
        match free == at {
            true => Guards::None,
            false => Guards::Beside(free),
        }
    }

    /// `id` was filled at `start`: whoever has this page now, and lacked it before, is the process.
    pub(super) fn look_after_fill(&mut self, id: SpaceId, start: Vaddr) {
        let page = self.images.page().bytes();
        let Some(search) = self
            .processes
            .get_mut(id)
            .and_then(|process| process.search.as_mut())
        else {
            return;
        };
        let look = self.last_look.0.take();
        let Some(lacked) = look.filter(|look| look.id == id && look.page == start) else {
            return;
        };
        search.cost += lacked.cost;
        let too_long = search.cost > COST_MAX;
        let has = |one: &&Arc<Candidate>| one.has(start, page) == Some(true);
        let mut found = lacked.candidates.iter().filter(has);
        let name = match (found.next(), found.next()) {
            (Some(found), None) => Some(found.name()),
            _ if too_long => None,
            _ => return,
        };
        if let Some(name) = name {
            self.family.found(name.pid);
        }
        let Some(process) = self.processes.get_mut(id) else {
            return;
        };
        process.search = None;
        process.host = name.and_then(|name| HostProcess::open(name.pid, name.started));
        match &process.host {
            Some(host) => tracing::debug!(
                "pid {}, or a child of it, is process {} of this host",
                process.pid,
                host.pid()
            ),
            None => tracing::debug!(
                "pid {}, or a child of it, is not found on this host: its guard regions are not looked at",
                process.pid
            ),
        }
    }

    /// Gives the descriptors back by which children are looked at. Returns whether there were any.
    pub(super) fn forget_hosts_of_children(&mut self) -> bool {
        let look = self.last_look.0.take();
        let looked_at = look.is_some_and(|look| !look.candidates.is_empty());
        let mut count = usize::from(self.family.forget() || looked_at);
        for id in self.processes.ids() {
            let Some(process) = self.processes.get_mut(id) else {
                continue;
            };
            if self.planner.is_child(id) && (process.host.is_some() || process.search.is_some()) {
                process.host = None;
                process.search = None;
                count += 1;
            }
        }
        count > 0
    }

    /// The processes of `scope` that are not known yet; `None` if there are too many, or not all of them can be seen.
    fn candidates(&mut self, scope: SearchScope) -> Option<Vec<Arc<Candidate>>> {
        let processes = &self.processes;
        self.family.of(scope, || processes.host_pids())
    }
}

/// The guard region in `at` that all candidates have which it could be filled for; `guards` are theirs, in the same order.
fn common_guard(
    candidates: &[Arc<Candidate>],
    guards: &[Option<PageRange>],
    at: PageRange,
) -> Option<PageRange> {
    let both = candidates.iter().zip(guards);
    let mut watched = both.filter(|(one, _)| one.is_watched(at));
    let (_, guard) = watched.next()?;
    watched
        .all(|(_, other)| other == guard)
        .then_some(*guard)
        .flatten()
}

/// The longer part of `free` beside `guard`.
fn beside(free: PageRange, guard: PageRange) -> PageRange {
    let Some(guard) = free.intersect(guard) else {
        return free;
    };
    let before = PageRange::new(free.start().get(), guard.start().get());
    let behind = PageRange::new(guard.end().get(), free.end().get());
    if before.bytes() >= behind.bytes() {
        before
    } else {
        behind
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_beside_a_guard_is_filled_first() {
        let range = PageRange::new;
        let at = range(0x1000, 0x9000);
        assert_eq!(beside(at, range(0x2000, 0x3000)), range(0x3000, 0x9000));
        assert_eq!(beside(at, range(0x8000, 0xf000)), range(0x1000, 0x8000));
        assert_eq!(beside(at, range(0x9000, 0xf000)), at);
        assert!(beside(at, range(0x1000, 0x9000)).is_empty());
    }
}
