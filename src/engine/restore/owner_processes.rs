//! Which processes of this host a userfaultfd belongs to. The kernel does not say, so /proc is searched.
//!
//! An owner has the image's pid in its innermost PID namespace, or descends from such a process, since it may have been
//! forked later. And it has memory under a userfaultfd where pages are missing.

use std::collections::BTreeMap;
use std::fs;

use crate::engine::smaps::{self, MISSING};
use crate::units::PageRange;

/// What /proc says of one process.
#[derive(Debug)]
struct Candidate {
    parent: i32,
    /// Its pid in its innermost namespace.
    inner_pid: u32,
}

/// The host pids of the processes that lack `lost`: each a pid of the images and some memory that it
/// lacks. A child of theirs that lacks memory is among them.
pub(super) fn find(lost: &[(u32, PageRange)]) -> Vec<i32> {
    if lost.is_empty() {
        return Vec::new();
    }
    let candidates = candidates();
    let may_own = |candidate: &Candidate| lost.iter().any(|(pid, _)| *pid == candidate.inner_pid);
    let named = candidates.iter().filter(|(_, one)| may_own(one));
    let mut owners: Vec<i32> = named
        .filter(|(pid, one)| lacks(**pid, lost, Some(one.inner_pid)))
        .map(|(pid, _)| *pid)
        .collect();
    let mut next = 0;
    while let Some(parent) = owners.get(next).copied() {
        next += 1;
        let children = candidates.iter().filter(|(pid, candidate)| {
            candidate.parent == parent && !owners.contains(pid) && lacks(**pid, lost, None)
        });
        let children: Vec<i32> = children.map(|(pid, _)| *pid).collect();
        owners.extend(children);
    }
    owners
}

/// Whether the process `pid` of this host watches a part of what is lost, of the pid `inner` in the images if that
/// is given.
fn lacks(pid: i32, lost: &[(u32, PageRange)], inner: Option<u32>) -> bool {
    // Either file may be gone by now, with its process.
    let Ok(smaps) = fs::read_to_string(format!("/proc/{pid}/smaps")) else {
        return false;
    };
    let watched = smaps::mappings_with(MISSING, &smaps);
    let lost = lost
        .iter()
        .filter(|(of, _)| inner.is_none_or(|inner| inner == *of));
    let mut lost = lost.map(|(_, range)| range);
    lost.any(|range| {
        watched
            .iter()
            .any(|mapping| mapping.intersect(*range).is_some())
    })
}

fn candidates() -> BTreeMap<i32, Candidate> {
    let entries = match fs::read_dir("/proc") {
        Ok(entries) => entries,
        Err(error) => {
            tracing::error!("cannot look for the processes that lack memory: /proc: {error}");
            return BTreeMap::new();
        }
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, candidate(pid)?)))
        .collect()
}

fn candidate(pid: i32) -> Option<Candidate> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let (parent, inner_pid) = family(&status)?;
    Some(Candidate { parent, inner_pid })
}

/// Parent and innermost pid, from /proc/PID/status.
fn family(status: &str) -> Option<(i32, u32)> {
    let parent = smaps::field(status, "PPid:")?.trim().parse().ok()?;
    Some((parent, smaps::inner_pid(status)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_pid_counts() {
        let status = "Name:\tx\nPPid:\t55\nNSpid:\t4711\t12\t1\n";
        assert_eq!(family(status), Some((55, 1)));
    }
}
