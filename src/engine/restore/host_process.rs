//! A restored process as this host sees it: its /proc directory. The kernel names the process when it hands its
//! userfaultfd over.
//!
//! What the userfaultfd does not tell is read there: guard regions that were installed over missing pages, mappings that
//! a fork wipes, and whether somebody traces or freezes the process, as a dump does. Nobody names the children that it
//! forks later: `owner_search` finds them.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use nix::libc::SIGKILL;

use crate::engine::smaps::{self, MISSING, NOT_INHERITED, SEALED};
use crate::sys::owned_process::{ProcessName, ProcessStat};
use crate::sys::pagemap::Pagemap;
use crate::units::PageRange;

/// A live process of this host.
#[derive(Debug)]
pub(super) struct HostProcess {
    pid: i32,
    /// /proc/PID. Its files say ESRCH once the process has ended, whoever has its pid by then.
    dir: File,
    /// `None` once it was found to tell nothing of guard regions.
    pagemap: Option<Pagemap>,
    watch: Watch,
}

impl HostProcess {
    /// The process `pid` of this process's PID namespace, if it is the one that has `started` at this clock tick; 0 is
    /// one of another namespace.
    pub(super) fn open(pid: i32, started: u64) -> Option<HostProcess> {
        if pid <= 0 || started == 0 {
            return None;
        }
        let dir = File::open(format!("/proc/{pid}")).ok()?;
        let mut process = HostProcess {
            pid,
            dir,
            pagemap: None,
            watch: Watch::default(),
        };
        let stat = ProcessStat::parse(&process.read("stat").ok()?)?;
        if stat.started != started {
            return None;
        }
        process.pagemap = Pagemap::open(&process.path("pagemap")).ok();
        Some(process)
    }

    /// Its pid on this host.
    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// A file of its directory.
    pub(super) fn path(&self, file: &str) -> PathBuf {
        Path::new("/proc/self/fd")
            .join(self.dir.as_raw_fd().to_string())
            .join(file)
    }

    fn read(&self, file: &str) -> io::Result<String> {
        fs::read_to_string(self.path(file))
    }

    /// The first guard region in `reach`, which begins as `range` does and has more, or at least in `range`, where the
    /// kernel tells.
    pub(super) fn first_guard(&mut self, range: PageRange, reach: PageRange) -> Option<PageRange> {
        let pagemap = self.pagemap.as_ref()?;
        let found = pagemap.first_guard(reach);
        // Above all memory nothing can be asked about.
        match found.or_else(|_| pagemap.first_guard(range)) {
            Ok(found) => found,
            Err(error) => {
                // An older kernel, or the process has ended: it will not tell later.
                tracing::debug!(
                    "guard regions of process {} are not known: {error}",
                    self.pid
                );
                self.pagemap = None;
                None
            }
        }
    }

    /// The guard regions in `span`, as far as the kernel tells.
    pub(super) fn guards(&self, span: PageRange) -> Vec<PageRange> {
        self.pagemap
            .as_ref()
            .map(|pagemap| guards_in(pagemap, span))
            .unwrap_or_default()
    }

    /// The mappings whose pages a fork does not give to the child, if they can be read.
    pub(super) fn wiped_on_fork(&self) -> Option<Vec<PageRange>> {
        let smaps = self.read("smaps").ok()?;
        Some(smaps::mappings_with_any(&NOT_INHERITED, &smaps))
    }

    /// Whether a part of `range` is sealed, as far as that can be read.
    pub(super) fn has_sealed(&self, range: PageRange) -> bool {
        let smaps = self.read("smaps").unwrap_or_default();
        let sealed = smaps::mappings_with(SEALED, &smaps);
        let meets =
            |mapping: &PageRange| mapping.start() < range.end() && range.start() < mapping.end();
        sealed.iter().any(meets)
    }

    /// Whether one of its first [`THREADS_MAX`] threads is in a system call that forks.
    pub(super) fn may_be_forking(&self) -> bool {
        let threads = fs::read_dir(self.path("task")).into_iter().flatten();
        threads.flatten().take(THREADS_MAX).any(|thread| {
            let call = fs::read_to_string(thread.path().join("syscall"));
            call.is_ok_and(|call| is_forking(&call))
        })
    }

    /// Who disturbs the process now as a dump does. `restored`: its restore has finished.
    pub(super) fn disturbed(&mut self, restored: bool) -> Option<Disturbance> {
        let status = self.read("status").ok()?;
        let tracer = smaps::tracer(&status)?;
        let frozen = || self.read("cgroup").is_ok_and(|groups| is_frozen(&groups));
        let frozen = restored && tracer == 0 && frozen();
        self.watch.look(tracer, frozen, restored)
    }
}

/// Most threads that are looked at for one that forks: a look takes some 10 µs.
pub(super) const THREADS_MAX: usize = 64;

/// Numbers of the system calls that fork (fork, vfork, clone, clone3), of 64-bit and of 32-bit programs. That some mean
/// another call to the other kind costs a look too many.
#[cfg(target_arch = "x86_64")]
const FORKING_CALLS: [i64; 7] = [57, 58, 56, 435, 2, 190, 120];
#[cfg(not(target_arch = "x86_64"))]
const FORKING_CALLS: [i64; 5] = [220, 435, 2, 190, 120];

/// Whether `call`, the text of /proc/PID/syscall, is of a thread that forks.
fn is_forking(call: &str) -> bool {
    let number = call.split_whitespace().next();
    number.is_some_and(|number| {
        number
            .parse()
            .is_ok_and(|n: i64| FORKING_CALLS.contains(&n))
    })
}

/// Where the kernel lets a thread wait until the message of what it does is read.
const WAITS_FOR_READER: &str = "userfaultfd_event_wait_completion";

/// Whether a thread of the process `pid` of this host forks, and waits until that is known.
pub(super) fn waits_for_its_fork(pid: i32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten();
    threads.flatten().take(THREADS_MAX).any(|thread| {
        let read = |file| fs::read_to_string(thread.path().join(file)).unwrap_or_default();
        is_forking(&read("syscall")) && read("wchan").contains(WAITS_FOR_READER)
    })
}

/// The mappings of the process `pid` of this host whose pages a fork does not give to the child, if they can be read.
pub(super) fn wiped_on_fork_of(pid: i32) -> Option<Vec<PageRange>> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    Some(smaps::mappings_with_any(&NOT_INHERITED, &smaps))
}

/// The guard regions in `span` of the process `pid` of this host, as far as the kernel tells.
pub(super) fn guards_of(pid: i32, span: PageRange) -> Vec<PageRange> {
    let pagemap = Pagemap::open(format!("/proc/{pid}/pagemap").as_ref());
    pagemap
        .map(|pagemap| guards_in(&pagemap, span))
        .unwrap_or_default()
}

fn guards_in(pagemap: &Pagemap, span: PageRange) -> Vec<PageRange> {
    let mut guards = Vec::new();
    let mut left = span;
    // An error: the process has ended, or the kernel does not tell.
    while !left.is_empty()
        && let Ok(Some(guard)) = pagemap.first_guard(left)
    {
        guards.push(guard);
        left = PageRange::new(guard.end().get(), span.end().get());
    }
    guards
}

/// When the process `pid` of this host started, clock ticks since that of the host; 0 if that is not known: /proc may
/// be that of another PID namespace, where the number is another process's.
pub(super) fn started(pid: i32) -> u64 {
    let own = fs::read_link("/proc/self").ok();
    if own.is_none_or(|own| own.as_os_str() != &*std::process::id().to_string()) {
        return 0;
    }
    ProcessStat::of(pid).map_or(0, |stat| stat.started)
}

/// Kills those of the processes (pid and start) and of their descendants that have memory under a userfaultfd.
pub(super) fn kill_families(roots: impl Iterator<Item = (i32, u64)>) {
    let mut families: Vec<ProcessName> = roots
        .map(|(pid, started)| ProcessName { pid, started })
        .filter(|name| name.pid > 0 && name.is_alive())
        .collect();
    let mut next = 0;
    while let Some(parent) = families.get(next).copied() {
        next += 1;
        let children = children(parent.pid).into_iter();
        families.extend(children.filter_map(|pid| ProcessName::of(pid).ok()));
    }
    for name in families {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", name.pid)).unwrap_or_default();
        if smaps::mappings_with(MISSING, &smaps).is_empty() {
            continue;
        }
        match name.signal(SIGKILL) {
            Ok(()) => tracing::warn!("killed process {}: it lacks memory", name.pid),
            Err(error) => {
                tracing::error!(
                    "cannot kill process {}, which lacks memory: {error}",
                    name.pid
                );
            }
        }
    }
}

/// The children of the process `pid`, whichever of its threads has forked them.
pub(super) fn children(pid: i32) -> Vec<i32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten();
    let listed = threads.flatten().map(|thread| {
        let listed = fs::read_to_string(thread.path().join("children"));
        listed.unwrap_or_default()
    });
    let listed: String = listed.collect();
    listed
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .collect()
}

/// What somebody does to a process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Disturbance {
    /// This process of the host traces it.
    Traced(i32),
    /// Its control group is frozen.
    Frozen,
}

/// Tells who comes after a restore from the CRIU that restores, which traces its processes too.
#[derive(Default, Debug)]
struct Watch {
    restored_by: Option<i32>,
    /// It was seen running by itself.
    ran: bool,
}

impl Watch {
    fn look(&mut self, tracer: i32, frozen: bool, restored: bool) -> Option<Disturbance> {
        match tracer {
            0 if frozen => self.ran.then_some(Disturbance::Frozen),
            0 => {
                self.ran |= restored;
                None
            }
            _ if !self.ran && *self.restored_by.get_or_insert(tracer) == tracer => None,
            _ => Some(Disturbance::Traced(tracer)),
        }
    }
}

/// Whether one of the control groups of a /proc/PID/cgroup is frozen: looked up where they usually are.
fn is_frozen(groups: &str) -> bool {
    groups.lines().any(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
            return false;
        };
        let says = |root: &str, file: &str, frozen: &str| {
            let text = fs::read_to_string(format!("{root}{path}/{file}"));
            text.is_ok_and(|text| text.lines().any(|line| line == frozen))
        };
        if controllers.is_empty() {
            let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
            return roots
                .iter()
                .any(|root| says(root, "cgroup.events", "frozen 1"));
        }
        controllers.split(',').any(|name| name == "freezer")
            && says("/sys/fs/cgroup/freezer", "freezer.state", "FROZEN")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tracer_counts_once_the_restore_is_over() {
        let mut watch = Watch::default();
        let criu = 100;
        // The restore itself, before and after its last message to us.
        assert_eq!(watch.look(0, false, false), None);
        assert_eq!(watch.look(criu, false, false), None);
        assert_eq!(watch.look(criu, false, true), None);
        // Another one right behind it, although the process was never seen to run.
        assert_eq!(watch.look(101, false, true), Some(Disturbance::Traced(101)));
        assert_eq!(watch.look(0, false, true), None);
        // The same pid again is not the restore any more.
        assert_eq!(
            watch.look(criu, false, true),
            Some(Disturbance::Traced(criu))
        );
        assert_eq!(watch.look(0, true, true), Some(Disturbance::Frozen));
    }

    #[test]
    fn a_process_that_is_restored_frozen_is_not_disturbed() {
        let mut watch = Watch::default();
        assert_eq!(watch.look(0, true, true), None);
        assert_eq!(watch.look(0, false, true), None);
        assert_eq!(watch.look(0, true, true), Some(Disturbance::Frozen));
    }

    #[test]
    fn a_call_that_forks_is_known() {
        assert!(is_forking(
            "435 0x7ffd 0x58 0x0 0x7f 0x8 0x0 0x7ffc 0x7f01\n"
        ));
        for other in ["running", "-1 0x7ffc 0x7f01", "202 0x7f 0x0", ""] {
            assert!(!is_forking(other), "{other}");
        }
    }

    #[test]
    fn this_process_is_seen_as_it_is() {
        let own = std::process::id().cast_signed();
        let started = started(own);
        let mut process = HostProcess::open(own, started).unwrap();
        assert!(HostProcess::open(own, started + 1).is_none());
        assert_eq!(process.disturbed(true), None);
        assert!(process.wiped_on_fork().is_some());
        assert!(HostProcess::open(0, 0).is_none());
    }
}
