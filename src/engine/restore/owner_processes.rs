//! Which processes of this host a userfaultfd belongs to. The kernel does not say, so it is read off
//! /proc: a process with the image's pid in its innermost PID namespace (or a descendant of one,
//! for children that it forked since) and with memory under a userfaultfd where pages are missing.

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
    /// Its mappings that a userfaultfd watches.
    watched: Vec<PageRange>,
}

/// The host pids of the processes that lack `lost`: each a pid of the images and some memory that it
/// lacks. A child of theirs that lacks memory is among them.
pub(super) fn find(lost: &[(u32, PageRange)]) -> Vec<i32> {
    let candidates = candidates();
    let lacks = |candidate: &Candidate, pid: Option<u32>| {
        lost.iter().any(|(image_pid, range)| {
            pid.is_none_or(|pid| pid == *image_pid)
                && candidate
                    .watched
                    .iter()
                    .any(|watched| watched.intersect(*range).is_some())
        })
    };
    let mut owners: Vec<i32> = candidates
        .iter()
        .filter(|(_, candidate)| lacks(candidate, Some(candidate.inner_pid)))
        .map(|(pid, _)| *pid)
        .collect();
    let mut next = 0;
    while let Some(parent) = owners.get(next).copied() {
        next += 1;
        let children = candidates.iter().filter(|(pid, candidate)| {
            candidate.parent == parent && lacks(candidate, None) && !owners.contains(pid)
        });
        let children: Vec<i32> = children.map(|(pid, _)| *pid).collect();
        owners.extend(children);
    }
    owners
}

fn candidates() -> BTreeMap<i32, Candidate> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return BTreeMap::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, candidate(pid)?)))
        .collect()
}

fn candidate(pid: i32) -> Option<Candidate> {
    // Either file may be gone by now, with its process.
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    let watched = smaps::mappings_with(MISSING, &smaps);
    let (parent, inner_pid) = family(&status)?;
    (!watched.is_empty()).then_some(Candidate {
        parent,
        inner_pid,
        watched,
    })
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
