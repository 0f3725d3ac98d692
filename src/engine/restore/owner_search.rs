//! Finds the process of a userfaultfd that nobody has named. It is a child that was forked since the restore, or a
//! restored process in another PID namespace, which the kernel does not name here.
//!
//! The kernel does not say whose memory a userfaultfd is for. But a page that is filled through it is then present in its
//! process, and in no other one. So a few candidates are looked at before and after the first fill. The one in which the
//! page has come is the process.
//!
//! ```text
//! no candidate                         the child does not run yet: it can have no guards
//! none has a guard where it is filled  filled, and looked who has the page
//! some have guards there               what no candidate guards is filled first, and looked who has the page
//! nothing is left then                 they are guards if all candidates have them
//! ```
//!
//! Invariants: a guard region counts only if it cannot be another process's. A process that is not found after a few
//! fills is not looked for any more, and guard regions in its missing memory are lost. The candidates of one look at most
//! are open.

use std::collections::BTreeSet;
use std::fs;
use std::io;

use nix::libc::ESRCH;

use super::Restore;
use super::host_process::{HostProcess, children};
use crate::engine::smaps::{self, MISSING};
use crate::lazy::planner::SpaceId;
use crate::sys::owned_process::{ProcessName, ProcessStat};
use crate::sys::pagemap::Pagemap;
use crate::units::{PageRange, Vaddr};

/// Most candidates that are looked at.
const CANDIDATES_MAX: usize = 64;

/// Most descendants of a process that are searched for its children.
const DESCENDANTS_MAX: usize = 256;

/// What looking at candidates costs; to find that there are none costs 1.
const LOOK_COST: u32 = 32;

/// What may be spent on one process.
const COST_MAX: u32 = 1024;

/// Where a process is searched for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum SearchScope {
    /// The descendants of the process with this pid on this host.
    Descendants(i32),
    /// All that have this pid in their innermost namespace.
    Named(u32),
}

impl SearchScope {
    /// Pids of this host.
    pub(super) fn pids(self) -> Vec<i32> {
        match self {
            SearchScope::Descendants(pid) => descendants(pid),
            SearchScope::Named(inner) => named(inner),
        }
    }
}

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
    candidates: Vec<Candidate>,
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

/// A process that may be the one.
#[derive(Debug)]
struct Candidate {
    name: ProcessName,
    pagemap: Pagemap,
    /// The first one where it is to be filled.
    guard: Option<PageRange>,
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
        let mut free = at;
        for candidate in &mut candidates {
            // An error: it has ended, or the kernel cannot tell.
            candidate.guard = candidate.pagemap.first_guard(at).ok().flatten();
            free = candidate.guard.map_or(free, |guard| beside(free, guard));
        }
        if free.is_empty() {
            return common_guard(&candidates, at).map_or(Guards::None, Guards::At);
        }
        let page = self.images.page().bytes();
        let lacks = |candidate: &Candidate| {
            let there = candidate.pagemap.is_present(free.start(), page);
            there.is_ok_and(|there| !there)
        };
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
        let has = |one: &&Candidate| one.pagemap.is_present(start, page).unwrap_or(false);
        let mut found = lacked.candidates.iter().filter(has);
        let name = match (found.next(), found.next()) {
            (Some(found), None) => Some(found.name),
            _ if too_long => None,
            _ => return,
        };
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
        let mut count = usize::from(
            self.last_look
                .0
                .take()
                .is_some_and(|look| !look.candidates.is_empty()),
        );
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

    /// The processes of `scope` that are not known yet; `None` if not all of them can be seen.
    fn candidates(&self, scope: SearchScope) -> Option<Vec<Candidate>> {
        let mut pids = scope.pids();
        let hosts = self
            .processes
            .iter()
            .filter_map(|(_, process)| process.host.as_ref());
        // Hundreds of each, in a storm of forks, for each of their faults.
        let known: BTreeSet<i32> = hosts.map(HostProcess::pid).collect();
        pids.retain(|pid| !known.contains(pid));
        if pids.len() > CANDIDATES_MAX {
            return None;
        }
        let opened = pids.into_iter().map(Candidate::open);
        let opened: io::Result<Vec<_>> = opened.collect();
        Some(opened.ok()?.into_iter().flatten().collect())
    }
}

impl Candidate {
    /// `None` if it has ended.
    fn open(pid: i32) -> io::Result<Option<Candidate>> {
        let opened = ProcessStat::of(pid).and_then(|stat| {
            let started = stat.started;
            Ok(Candidate {
                name: ProcessName { pid, started },
                pagemap: Pagemap::open(format!("/proc/{pid}/pagemap").as_ref())?,
                guard: None,
            })
        });
        match opened {
            Ok(candidate) => Ok(Some(candidate)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) if error.raw_os_error() == Some(ESRCH) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether it has memory under a userfaultfd in `range`.
    fn is_watched(&self, range: PageRange) -> bool {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", self.name.pid));
        let watched = smaps::mappings_with(MISSING, &smaps.unwrap_or_default());
        watched
            .iter()
            .any(|mapping| mapping.intersect(range).is_some())
    }
}

/// The guard region in `at` that all candidates have which it could be filled for.
fn common_guard(candidates: &[Candidate], at: PageRange) -> Option<PageRange> {
    let mut watched = candidates.iter().filter(|one| one.is_watched(at));
    let guard = watched.next()?.guard?;
    watched
        .all(|other| other.guard == Some(guard))
        .then_some(guard)
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

/// The descendants of the process `pid`, as far as there are not too many.
fn descendants(pid: i32) -> Vec<i32> {
    let mut found = children(pid);
    let mut next = 0;
    while next < found.len() && found.len() <= DESCENDANTS_MAX {
        found.extend(children(found[next]));
        next += 1;
    }
    found
}

/// The processes with the pid `inner` in their innermost namespace.
fn named(inner: u32) -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let is_named = |pid: &i32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        smaps::inner_pid(&status) == Some(inner)
    };
    pids.filter(is_named).collect()
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

    #[test]
    fn who_is_sought_is_seen() {
        let mut child = std::process::Command::new("sleep")
            .arg("600")
            .spawn()
            .unwrap();
        let pid = child.id().cast_signed();
        assert!(descendants(std::process::id().cast_signed()).contains(&pid));
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(named(smaps::inner_pid(&status).unwrap()).contains(&pid));
        assert!(Candidate::open(pid).unwrap().is_some());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(Candidate::open(pid).unwrap().is_none());
    }
}
