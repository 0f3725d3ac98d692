//! Processes of this host that may be the unknown one of a userfaultfd: see `owner_search`.
//!
//! To list them takes several files of /proc for each process of a family, and an unknown process is looked for before each of
//! its fills. So they are listed once for all that comes at once, and not to the end if there are too many.
//!
//! Invariant: a list counts until faults are looked for again, or somebody forks. Whoever raises a message runs by then, so
//! that it is in a list that is made afterwards.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::sync::Arc;

use nix::libc::ESRCH;

use super::host_process::children;
use crate::engine::smaps::{self, MISSING};
use crate::sys::owned_process::{ProcessName, ProcessStat};
use crate::sys::pagemap::Pagemap;
use crate::units::{PageRange, Vaddr};

/// Most candidates that are looked at.
const CANDIDATES_MAX: usize = 64;

/// Most descendants of a process that are searched for its children.
const DESCENDANTS_MAX: usize = 256;

/// Where a process is searched for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum SearchScope {
    /// The descendants of the process with this pid on this host.
    Descendants(i32),
    /// All that have this pid in their innermost namespace.
    Named(u32),
}

impl SearchScope {
    /// Pids of this host, without those that are `known`; `None` if there are more than `most`.
    pub(super) fn pids(self, known: &BTreeSet<i32>, most: usize) -> Option<Vec<i32>> {
        match self {
            SearchScope::Descendants(pid) => descendants(pid, known, most, children),
            SearchScope::Named(inner) => {
                let mut pids = named(inner);
                pids.retain(|pid| !known.contains(pid));
                (pids.len() <= most).then_some(pids)
            }
        }
    }
}

/// A process that may be the one.
#[derive(Debug)]
pub(super) struct Candidate {
    name: ProcessName,
    pagemap: Pagemap,
}

impl Candidate {
    /// `None` if it has ended.
    fn open(pid: i32) -> io::Result<Option<Candidate>> {
        let opened = ProcessStat::of(pid).and_then(|stat| {
            let started = stat.started;
            Ok(Candidate {
                name: ProcessName { pid, started },
                pagemap: Pagemap::open(format!("/proc/{pid}/pagemap").as_ref())?,
            })
        });
        match opened {
            Ok(candidate) => Ok(Some(candidate)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) if error.raw_os_error() == Some(ESRCH) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) fn name(&self) -> ProcessName {
        self.name
    }

    /// The first guard region that it has in `range`; none if it has ended, or the kernel cannot tell.
    pub(super) fn first_guard(&self, range: PageRange) -> Option<PageRange> {
        self.pagemap.first_guard(range).ok().flatten()
    }

    /// Whether it has the page of `page` bytes at `at`, unless it has ended.
    pub(super) fn has(&self, at: Vaddr, page: u64) -> Option<bool> {
        self.pagemap.is_present(at, page).ok()
    }

    /// Whether it has memory under a userfaultfd in `range`.
    pub(super) fn is_watched(&self, range: PageRange) -> bool {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", self.name.pid));
        let watched = smaps::mappings_with(MISSING, &smaps.unwrap_or_default());
        watched
            .iter()
            .any(|mapping| mapping.intersect(range).is_some())
    }
}

/// The candidates that were listed last. See the module's text.
#[derive(Debug, Default)]
pub(super) struct Family(Option<Listed>);

#[derive(Debug)]
struct Listed {
    scope: SearchScope,
    candidates: Option<Vec<Arc<Candidate>>>,
}

impl Family {
    /// The processes of `scope` that are not `known`; `None` if there are too many, or not all of them can be seen.
    pub(super) fn of(
        &mut self,
        scope: SearchScope,
        known: impl FnOnce() -> BTreeSet<i32>,
    ) -> Option<Vec<Arc<Candidate>>> {
        let list = || {
            let pids = scope.pids(&known(), CANDIDATES_MAX)?;
            let opened: io::Result<Vec<_>> = pids.into_iter().map(Candidate::open).collect();
            Some(opened.ok()?.into_iter().flatten().map(Arc::new).collect())
        };
        if self.0.as_ref().is_none_or(|listed| listed.scope != scope) {
            let candidates = list();
            self.0 = Some(Listed { scope, candidates });
        }
        self.0.as_ref()?.candidates.clone()
    }

    /// The process `pid` is known from now on.
    pub(super) fn found(&mut self, pid: i32) {
        let listed = self.0.as_mut();
        if let Some(candidates) = listed.and_then(|listed| listed.candidates.as_mut()) {
            candidates.retain(|candidate| candidate.name.pid != pid);
        }
    }

    /// Time has passed: they are listed anew. Says whether there were any.
    pub(super) fn forget(&mut self) -> bool {
        let candidates = self.0.take().and_then(|listed| listed.candidates);
        candidates.is_some_and(|candidates| !candidates.is_empty())
    }
}

/// The descendants of the process `pid` that are not `known`, of whom `children` tells, as far as there are not too many;
/// `None` if there are more than `most`.
fn descendants(
    pid: i32,
    known: &BTreeSet<i32>,
    most: usize,
    mut children: impl FnMut(i32) -> Vec<i32>,
) -> Option<Vec<i32>> {
    let (mut found, mut unknown) = (children(pid), Vec::new());
    let (mut next, mut counted) = (0, 0);
    loop {
        let new = found[counted..].iter();
        unknown.extend(new.filter(|pid| !known.contains(pid)));
        counted = found.len();
        if unknown.len() > most {
            return None;
        }
        if next == found.len() || found.len() > DESCENDANTS_MAX {
            return Some(unknown);
        }
        found.extend(children(found[next]));
        next += 1;
    }
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
    use std::cell::Cell;

    use super::*;

    /// Every process of the family 1, 2, ... has its next `children` as children. Returns who is unknown, and how many
    /// processes were asked for their children.
    fn listed(children: i32, known: &[i32], most: usize) -> (Option<usize>, u32) {
        let asked = Cell::new(0);
        let of = |pid: i32| {
            asked.set(asked.get() + 1);
            match pid {
                1 => (2..2 + children).collect(),
                _ => Vec::new(),
            }
        };
        let known = known.iter().copied().collect();
        let found = descendants(1, &known, most, of);
        (found.as_ref().map(Vec::len), asked.get())
    }

    #[test]
    fn a_family_with_too_many_unknown_members_is_not_read_to_its_end() {
        assert_eq!(listed(3, &[], 64), (Some(3), 4));
        assert_eq!(listed(64, &[], 64), (Some(64), 65));
        assert_eq!(listed(65, &[], 64), (None, 1));
        assert_eq!(listed(400, &[], 64), (None, 1));
        assert_eq!(listed(65, &[7], 64), (Some(64), 66));
        // Children of children count.
        let line = |pid: i32| if pid < 10 { vec![pid + 1] } else { Vec::new() };
        let known = BTreeSet::new();
        assert_eq!(
            descendants(1, &known, 9, line).as_ref().map(Vec::len),
            Some(9)
        );
        assert_eq!(descendants(1, &known, 8, line), None);
    }

    #[test]
    fn one_list_is_for_all_that_comes_at_once() {
        let own = std::process::id().cast_signed();
        let (one, other) = (SearchScope::Descendants(own), SearchScope::Descendants(1));
        let (mut family, lists) = (Family::default(), Cell::new(0));
        let known = || {
            lists.set(lists.get() + 1);
            BTreeSet::new()
        };
        for _ in 0..400 {
            family.of(one, known);
        }
        assert_eq!(lists.get(), 1);
        family.of(other, known);
        family.of(other, known);
        assert_eq!(lists.get(), 2);
        family.forget();
        family.of(other, known);
        assert_eq!(lists.get(), 3);
    }

    #[test]
    fn who_is_sought_is_seen_until_it_is_known() {
        let mut child = std::process::Command::new("sleep")
            .arg("600")
            .spawn()
            .unwrap();
        let pid = child.id().cast_signed();
        let scope = SearchScope::Descendants(std::process::id().cast_signed());
        let mut family = Family::default();
        let has = |family: &mut Family, known: &[i32]| {
            let known = known.iter().copied().collect();
            let listed = family.of(scope, || known).unwrap();
            listed.iter().any(|one| one.name().pid == pid)
        };
        assert!(has(&mut family, &[]));
        family.found(pid);
        assert!(!has(&mut family, &[]));
        family.forget();
        assert!(!has(&mut family, &[pid]));
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(named(smaps::inner_pid(&status).unwrap()).contains(&pid));
        assert!(Candidate::open(pid).unwrap().is_some());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(Candidate::open(pid).unwrap().is_none());
    }
}
