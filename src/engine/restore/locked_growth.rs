//! Locked memory that mremap moves and lets grow.
//!
//! mremap brings the new pages of locked memory before it tells of the move, and until that is read the kernel refuses all
//! fills of the process. Nobody would ever go on:
//!
//! ```text
//! thread       mremap: moves | touches the first new page, and waits for it | would tell of the move
//! lazy-client                  a fault: EAGAIN, until the move is read
//! ```
//!
//! New pages are zero. Their mapping is taken out of the userfaultfd, and the kernel fills them by itself. The whole mapping
//! is if nothing of it is missing, as of locked memory nothing is: a part would become a mapping of its own, and the next
//! mremap over both would fail.
//!
//! Invariant: a page counts as new only if a thread of its process waits for a page within an mremap that has it behind the
//! old length. Nothing else in that call touches memory.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use nix::libc::{self, c_long};

use super::Restore;
use super::host_process::THREADS_MAX;
use super::owner_search::OwnerSearch;
use crate::engine::smaps;
use crate::lazy::planner::SpaceId;
use crate::units::{PageRange, PageSize, Vaddr};

/// Numbers of mremap, of 64-bit and of 32-bit programs.
const MREMAP: [c_long; 2] = [libc::SYS_mremap, 163];

/// Where the kernel lets a thread wait for a page under a userfaultfd.
const WAITS_FOR_PAGE: &str = "handle_userfault";

/// A call of mremap that lets memory grow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Growth {
    old: PageRange,
    /// Length of what is new, bytes.
    added: u64,
    /// Where it is to be, if the call says so.
    to: Option<Vaddr>,
}

impl Growth {
    /// `call` is the text of /proc/PID/syscall.
    fn parse(call: &str, page: PageSize) -> Option<Growth> {
        let mut words = call.split_whitespace();
        let number: c_long = words.next()?.parse().ok()?;
        if !MREMAP.contains(&number) {
            return None;
        }
        let mut argument = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
        let (at, old, new) = (argument()?, argument()?, argument()?);
        let (flags, to) = (argument()?, argument()?);
        let whole_pages = |bytes: u64| Some(page.floor(bytes.checked_add(page.bytes() - 1)?));
        let (old, new) = (whole_pages(old)?, whole_pages(new)?);
        let is_fixed = flags & u64::from(libc::MREMAP_FIXED.cast_unsigned()) != 0;
        let end = at.checked_add(old)?;
        Some(Growth {
            old: PageRange::new(at, end),
            added: new.checked_sub(old).filter(|added| *added > 0)?,
            to: is_fixed.then_some(Vaddr(to)),
        })
    }

    /// What is new, if the mappings are `mappings` now and `page` is a part of it; empty if only that is known.
    fn around(&self, page: Vaddr, mappings: &[PageRange]) -> Option<PageRange> {
        let behind = |start: u64| {
            let from = start.checked_add(self.old.bytes())?;
            let range = PageRange::new(from, from.checked_add(self.added)?);
            Some(range).filter(|range| range.contains(page))
        };
        let known = match self.to {
            Some(to) => behind(to.get()),
            None => behind(self.old.start().get()),
        };
        // The kernel has chosen a place: what has moved there is gone from where it was.
        let has_left = || {
            let stays = |mapping: &PageRange| mapping.contains(self.old.start());
            self.to.is_none() && !mappings.iter().any(stays)
        };
        known.or_else(|| has_left().then(|| PageRange::new(page.get(), page.get())))
    }
}

/// What `page` is a new part of, and the mapping around that, in the process whose directory `file` gives files of.
fn growth_at(
    file: impl Fn(&str) -> PathBuf,
    page: Vaddr,
    size: PageSize,
) -> Option<(Growth, PageRange, PageRange)> {
    let threads = fs::read_dir(file("task")).ok()?.flatten();
    let growths = threads
        .take(THREADS_MAX)
        .filter_map(|thread| growth_of(&thread.path(), size));
    let growths: Vec<Growth> = growths.collect();
    if growths.is_empty() {
        return None;
    }
    let mappings = smaps::mappings(&fs::read_to_string(file("maps")).ok()?);
    let mapping = *mappings.iter().find(|mapping| mapping.contains(page))?;
    growths.into_iter().find_map(|growth| {
        let new = growth.around(page, &mappings)?;
        Some((growth, new, mapping))
    })
}

/// The growth within which the thread waits for a page.
fn growth_of(thread: &Path, size: PageSize) -> Option<Growth> {
    let call = fs::read_to_string(thread.join("syscall")).ok()?;
    let growth = Growth::parse(&call, size)?;
    let place = fs::read_to_string(thread.join("wchan")).ok()?;
    place.contains(WAITS_FOR_PAGE).then_some(growth)
}

impl Restore {
    /// Whether `page` of `id`, which the kernel does not let anybody fill now, is a new page of locked memory that grows.
    /// It is taken out of the userfaultfd then.
    pub(super) fn release_locked_growth(&mut self, id: SpaceId, page: PageRange) -> bool {
        let Some(process) = self.processes.get(id) else {
            return false;
        };
        let (at, size) = (page.start(), self.images.page());
        let found = match &process.host {
            Some(host) => growth_at(|file| host.path(file), at, size),
            None => {
                let scope = process.search.as_ref().map(OwnerSearch::scope);
                let all = scope.and_then(|scope| scope.pids(&BTreeSet::new(), usize::MAX));
                let pids = all.unwrap_or_default();
                let dir = |pid: i32| PathBuf::from(format!("/proc/{pid}"));
                pids.into_iter()
                    .find_map(|pid| growth_at(|file| dir(pid).join(file), at, size))
            }
        };
        let Some((growth, new, mapping)) = found else {
            return false;
        };
        let lacks = |range| {
            let space = self.planner.space(id);
            space.is_some_and(|space| space.lacks(range))
        };
        let range = match lacks(mapping) || lacks(growth.old) {
            true => new.intersect(mapping),
            false => Some(mapping),
        };
        let range = range.unwrap_or(page);
        let pid = process.pid;
        match process.uffd.unregister(range) {
            Ok(()) => {
                tracing::debug!("pid {pid}, or a child of it, lets locked memory grow at {range}");
                true
            }
            Err(error) => {
                tracing::warn!(
                    "pid {pid}, or a child of it, lets locked memory grow, which waits for ever: \
                     cannot take {range} out of its userfaultfd: {error}"
                );
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: PageSize = PageSize::KIB_4;

    fn call(arguments: &str) -> String {
        format!("{} {arguments} 0x7ffd37dfffe0 0x7f481ac2ea00", MREMAP[0])
    }

    fn range(from: u64, to: u64) -> PageRange {
        PageRange::new(from, to)
    }

    #[test]
    fn what_is_new_lies_behind_the_old_length() {
        let fixed = call("0x10000 0x1000 0x4800 0x3 0x50000 0x1");
        let growth = Growth::parse(&fixed, PAGE).unwrap();
        let new = range(0x5_1000, 0x5_5000);
        assert_eq!(growth.around(Vaddr(0x5_1000), &[]), Some(new));
        assert_eq!(growth.around(Vaddr(0x5_4000), &[]), Some(new));
        for old in [0x5_0000, 0x5_5000, 0x1_0000, 0x1_1000] {
            assert_eq!(growth.around(Vaddr(old), &[]), None, "{old:#x}");
        }
    }

    #[test]
    fn where_the_kernel_chose_a_place_the_old_one_must_be_empty() {
        let moved = call("0x10000 0x2000 0x4000 0x1 0x0 0x1");
        let growth = Growth::parse(&moved, PAGE).unwrap();
        let (stayed, left) = ([range(0x1_0000, 0x1_2000)], [range(0x9_0000, 0x9_4000)]);
        assert_eq!(growth.around(Vaddr(0x9_2000), &stayed), None);
        let page = growth.around(Vaddr(0x9_2000), &left);
        assert_eq!(page.map(PageRange::start), Some(Vaddr(0x9_2000)));
        // In place.
        let new = range(0x1_2000, 0x1_4000);
        assert_eq!(growth.around(Vaddr(0x1_3000), &stayed), Some(new));
    }

    #[test]
    fn other_calls_and_other_moves_are_none() {
        let shorter = call("0x10000 0x4000 0x1000 0x1 0x0 0x1");
        let same = call("0x10000 0x4000 0x3001 0x1 0x0 0x1");
        for text in ["running", "-1 0x0 0x0", "9 0x0 0x1 0x2 0x3 0x4", ""] {
            assert_eq!(Growth::parse(text, PAGE), None, "{text}");
        }
        assert_eq!(Growth::parse(&shorter, PAGE), None);
        assert_eq!(Growth::parse(&same, PAGE), None);
    }
}
