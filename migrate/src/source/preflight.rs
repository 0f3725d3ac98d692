//! What must hold before anything is frozen: one list of what is missing, and what to do about it.

use std::fs;

use pageferry::migration::messages::HostFacts;
use pageferry::sys::owned_process::ProcessStat;

use crate::rounds::{Member, Tree};

/// Space that a restore needs besides the memory itself, bytes.
const SPARE_BYTES: u64 = 64 << 20;

/// Flags of /proc/PID/smaps: a userfaultfd fills the mapping, or watches writes to it.
const UFFD_FLAGS: [&str; 2] = ["um", "uw"];

/// What a migration takes at the destination, bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct NeededSpace {
    /// Memory of the restored processes.
    pub(super) memory_bytes: u64,
    /// Images.
    pub(super) disk_bytes: u64,
}

/// Looks at both hosts and the tree. Each string is one thing that is in the way.
pub(super) fn problems(
    tree: &Tree,
    source: &HostFacts,
    destination: &HostFacts,
    space: NeededSpace,
    lazy: bool,
) -> Vec<String> {
    let mut problems = hosts(source, destination, space, lazy);
    for member in tree.members() {
        problems.extend(of_member(member));
    }
    problems
}

fn hosts(
    source: &HostFacts,
    destination: &HostFacts,
    needed: NeededSpace,
    lazy: bool,
) -> Vec<String> {
    let mut problems = programs(source, destination);
    problems.extend(machines(source, destination));
    if lazy && !destination.userfaultfd {
        problems
            .push("the destination's kernel has no userfaultfd: use --mode pre-copy".to_owned());
    }
    problems.extend(space(destination, needed));
    problems
}

/// What is wrong with the CRIUs of the two hosts.
fn programs(source: &HostFacts, destination: &HostFacts) -> Vec<String> {
    let mut problems = Vec::new();
    for (name, host) in [("this host", source), ("the destination", destination)] {
        match host.criu {
            None => problems.push(format!(
                "{name} has no CRIU that starts: install it, or name it by --criu"
            )),
            Some(_) if !host.criu_problems.is_empty() => {
                problems.push(format!(
                    "`criu check` on {name} says: {}",
                    host.criu_problems
                ));
            }
            Some(_) => {}
        }
    }
    if let (Some(here), Some(there)) = (source.criu, destination.criu)
        && there < here
    {
        problems.push(format!(
            "CRIU {there} at the destination is older than {here} here, whose images it may misread: \
             update the destination's"
        ));
    }
    problems
}

/// How the two machines differ.
fn machines(source: &HostFacts, destination: &HostFacts) -> Vec<String> {
    let mut problems = Vec::new();
    if source.page_bytes != destination.page_bytes {
        problems.push(format!(
            "pages have {} bytes here and {} at the destination",
            source.page_bytes, destination.page_bytes
        ));
    }
    if source.machine != destination.machine {
        problems.push(format!(
            "this host is a {}, the destination a {}",
            source.machine, destination.machine
        ));
    }
    let missing: Vec<&str> = source
        .cpu_flags
        .iter()
        .filter(|flag| !destination.cpu_flags.contains(flag))
        .map(String::as_str)
        .collect();
    if !missing.is_empty() {
        problems.push(format!(
            "the destination's processor lacks {}: programs that found them here fail there",
            missing.join(" ")
        ));
    }
    problems
}

/// Whether processes with so much memory fit into the destination's.
pub(super) fn fits(destination: &HostFacts, memory_bytes: u64) -> bool {
    destination.available_bytes >= memory_bytes + SPARE_BYTES
}

/// What the destination lacks.
fn space(destination: &HostFacts, needed: NeededSpace) -> Vec<String> {
    let mut problems = Vec::new();
    let NeededSpace {
        memory_bytes,
        disk_bytes,
    } = needed;
    for (what, there, bytes) in [
        ("memory", destination.available_bytes, memory_bytes),
        (
            "free space in its directory",
            destination.disk_bytes,
            disk_bytes,
        ),
    ] {
        let needed = bytes + SPARE_BYTES;
        if there < needed {
            problems.push(format!(
                "the destination has {} MiB of {what}, {} MiB are needed",
                there >> 20,
                needed >> 20
            ));
        }
    }
    problems
}

fn of_member(member: &Member) -> Vec<String> {
    let pid = member.pid;
    let mut problems = Vec::new();
    if ProcessStat::of(pid).is_ok_and(|stat| stat.state == 't') {
        problems.push(format!(
            "pid {pid} is being traced: end the debugger or the other dump"
        ));
    }
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let tracer = status
        .lines()
        .find_map(|line| line.strip_prefix("TracerPid:"));
    if tracer.is_some_and(|tracer| tracer.trim() != "0") {
        problems.push(format!("pid {pid} has a tracer (TracerPid): end it first"));
    }
    if has_userfaultfd(pid) {
        // Its own: that of a lazy restore is another process's.
        problems.push(format!(
            "pid {pid} has a userfaultfd of its own, which no CRIU dumps"
        ));
        return problems;
    }
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let watched = smaps
        .lines()
        .filter_map(|line| line.strip_prefix("VmFlags:"))
        .any(|flags| {
            flags
                .split_whitespace()
                .any(|flag| UFFD_FLAGS.contains(&flag))
        });
    if watched {
        problems.push(format!(
            "memory of pid {pid} is under a userfaultfd: an earlier restore has not filled it yet, and a dump \
             would lack those pages (wait for its lazy-client)"
        ));
    }
    problems
}

/// Whether the process has a userfaultfd open.
fn has_userfaultfd(pid: i32) -> bool {
    let open = fs::read_dir(format!("/proc/{pid}/fd"));
    open.into_iter().flatten().flatten().any(|entry| {
        let what = fs::read_link(entry.path());
        what.is_ok_and(|what| what.as_os_str() == "anon_inode:[userfaultfd]")
    })
}

#[cfg(test)]
mod tests {
    use pageferry::migration::messages::CriuVersion;

    use super::*;

    fn host() -> HostFacts {
        HostFacts {
            pageferry: "0".to_owned(),
            criu: Some(CriuVersion([4, 2, 1])),
            criu_problems: String::new(),
            kernel: "6".to_owned(),
            machine: "x86_64".to_owned(),
            cpu_flags: vec!["avx".to_owned()],
            page_bytes: 4096,
            available_bytes: 1 << 40,
            disk_bytes: 1 << 40,
            userfaultfd: true,
            clock_us: 0,
            copy_us_per_gib: 0,
        }
    }

    fn gib(gib: u64) -> NeededSpace {
        NeededSpace {
            memory_bytes: gib << 30,
            disk_bytes: gib << 30,
        }
    }

    #[test]
    fn equal_hosts_have_no_problem_and_each_difference_is_told() {
        assert_eq!(hosts(&host(), &host(), gib(1), true), Vec::<String>::new());
        let worse = [
            HostFacts {
                criu: None,
                ..host()
            },
            HostFacts {
                criu: Some(CriuVersion([4, 1, 1])),
                ..host()
            },
            HostFacts {
                criu_problems: "no".to_owned(),
                ..host()
            },
            HostFacts {
                machine: "aarch64".to_owned(),
                ..host()
            },
            HostFacts {
                cpu_flags: vec![],
                ..host()
            },
            HostFacts {
                page_bytes: 65_536,
                ..host()
            },
            HostFacts {
                available_bytes: 1 << 30,
                ..host()
            },
            HostFacts {
                disk_bytes: 0,
                ..host()
            },
            HostFacts {
                userfaultfd: false,
                ..host()
            },
        ];
        for there in worse {
            let found = hosts(&host(), &there, gib(1), true);
            assert_eq!(found.len(), 1, "{there:?}: {found:?}");
        }
        let newer = HostFacts {
            criu: Some(CriuVersion([4, 3, 0])),
            ..host()
        };
        assert!(hosts(&host(), &newer, gib(0), true).is_empty());
    }
}
