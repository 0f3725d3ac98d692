//! Slows the processes of a tree while rounds do not shrink, by control groups of version 2.
//!
//! ```text
//! a group of the tree alone, with cpu.max     cpu.max is lowered
//! a group of the tree alone, without          frozen and let go in turn (cgroup.freeze)
//! any other                                   the same in a group that is made below, and removed again
//! ```
//!
//! Invariants: what was there before is on disk (fsync) before anything is changed, so whoever finishes the migration
//! undoes it; [`undo`] may be called at any time and again.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pageferry::error::{Error, Kind, Result};
use pageferry::sys::owned_process::ProcessName;
use procfs::process::Process;
use serde::{Deserialize, Serialize};

use crate::records;
use crate::rounds::Tree;

/// What was there before, in a migration's directory.
const KEPT: &str = "throttle.json";

/// Frozen and let go once in this time: the kernel's own period of cpu.max is 100 ms.
const PERIOD: Duration = Duration::from_millis(50);

/// The period of cpu.max, µs: the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;

/// The least CPU time in a period, µs: the kernel takes no less.
const CPU_LEAST_US: u64 = 1_000;

/// How long the CPU time of a tree is looked at.
const USAGE_TIME: Duration = Duration::from_millis(200);

/// Processes that are forked while others are moved are looked for so often.
const LOOKS_MAX: u32 = 20;

/// What must be put back.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct SavedState {
    /// The group whose files are written.
    group: PathBuf,
    /// Whether it was made for this.
    made: bool,
    /// What cpu.max held, if that is written.
    cpu_max: Option<String>,
    /// Where each process was, if they are moved.
    homes: Vec<(ProcessName, PathBuf)>,
}

/// A tree that is slowed until the value is dropped.
#[derive(Debug)]
pub(super) struct Throttle {
    dir: PathBuf,
    /// Ends the thread that freezes, when it is dropped.
    turns: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Throttle {
    /// Takes `percent` of their CPU time from the processes of `tree`. `dir` is the migration's, and `id` its name.
    ///
    /// # Errors
    /// There are no control groups of version 2, or they cannot be written. Nothing is changed then.
    pub(super) fn start(tree: &Tree, percent: u8, dir: &Path, id: &str) -> Result<Throttle> {
        let kept = plan(tree, id)?;
        records::write(&dir.join(KEPT), &kept)?;
        let mut throttle = Throttle {
            dir: dir.to_owned(),
            turns: None,
        };
        // From here on the drop undoes it.
        match &kept.cpu_max {
            Some(limit) => lower(&kept.group, limit, percent)?,
            None => {
                if kept.made {
                    make(&kept.group)?;
                    move_in(tree, &kept.group)?;
                }
                throttle.turns = Some(take_turns(&kept.group, percent)?);
            }
        }
        Ok(throttle)
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.turns.take() {
            drop(stop);
            // It has nothing to say.
            let _ = thread.join();
        }
        if let Err(error) = undo(&self.dir) {
            tracing::error!("{error}");
        }
    }
}

/// Gives the processes of a migration their time back, if they were slowed. `dir` is the migration's.
///
/// # Errors
/// A group cannot be written: the error names it.
pub(super) fn undo(dir: &Path) -> Result<()> {
    let path = dir.join(KEPT);
    let Some(kept) = records::read::<SavedState>(&path)? else {
        return Ok(());
    };
    if kept.group.exists() {
        match &kept.cpu_max {
            Some(limit) => write(&kept.group.join("cpu.max"), limit)?,
            None => write(&kept.group.join("cgroup.freeze"), "0")?,
        }
        if kept.made {
            move_out(&kept)?;
        }
    }
    fs::remove_file(&path).map_err(|error| Error::file("remove", &path, error))
}

fn plan(tree: &Tree, id: &str) -> Result<SavedState> {
    let root = mount_point()?;
    let mut homes = Vec::new();
    for member in tree.members() {
        if let Some(home) = group_of(&root, member.pid) {
            homes.push((member.name, home));
        }
    }
    let Some((_, home)) = homes.first().cloned() else {
        return Err(unavailable("the processes have no control group here"));
    };
    let pids: BTreeSet<i32> = tree.members().iter().map(|member| member.pid).collect();
    let is_own = home != root
        && homes.iter().all(|(_, other)| *other == home)
        && !has_children(&home)
        && members(&home)? == pids;
    Ok(match is_own {
        true => SavedState {
            cpu_max: fs::read_to_string(home.join("cpu.max")).ok(),
            group: home,
            made: false,
            homes: Vec::new(),
        },
        false => SavedState {
            group: home.join(format!("pageferry-{id}")),
            made: true,
            cpu_max: None,
            homes,
        },
    })
}

fn unavailable(why: &str) -> Error {
    let text = format!("--throttle: {why}; the processes are not slowed");
    Error::new(Kind::Usage, text)
}

/// Where control groups of version 2 are.
fn mount_point() -> Result<PathBuf> {
    let mounts = Process::myself().and_then(|process| process.mountinfo());
    let mounts = mounts.map_err(|error| unavailable(&error.to_string()))?;
    let found = mounts.into_iter().find(|mount| mount.fs_type == "cgroup2");
    found
        .map(|mount| mount.mount_point)
        .ok_or_else(|| unavailable("control groups of version 2 are not mounted"))
}

/// The group of a process; `None` if it has ended, or its group cannot be seen from here.
fn group_of(root: &Path, pid: i32) -> Option<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let seen = !path.split('/').any(|part| part == "..") && !path.ends_with(" (deleted)");
    seen.then(|| match path {
        "" => root.to_owned(),
        path => root.join(path),
    })
}

fn has_children(group: &Path) -> bool {
    let entries = fs::read_dir(group).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_type().ok())
        .any(|kind| kind.is_dir())
}

fn members(group: &Path) -> Result<BTreeSet<i32>> {
    let path = group.join("cgroup.procs");
    let text = fs::read_to_string(&path).map_err(|error| Error::file("read", &path, error))?;
    Ok(text.lines().filter_map(|pid| pid.parse().ok()).collect())
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|error| Error::file("write", path, error))
}

fn make(group: &Path) -> Result<()> {
    match fs::create_dir(group) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(Error::file("make the control group", group, error))
        }
        _ => Ok(()),
    }
}

/// Moves the processes of `tree` into `group`, with those that they fork meanwhile.
fn move_in(tree: &Tree, group: &Path) -> Result<()> {
    let root = tree.members().first().map_or(0, |root| root.pid);
    for _ in 0..LOOKS_MAX {
        let inside = members(group)?;
        let tree = Tree::of(root)?;
        let outside = tree.members().iter();
        let outside: Vec<i32> = outside
            .map(|member| member.pid)
            .filter(|pid| !inside.contains(pid))
            .collect();
        let mut moved = false;
        for pid in outside {
            // A zombie cannot be moved, and one that has ended is nowhere.
            moved |= put(group, pid)?;
        }
        if !moved {
            break;
        }
    }
    Ok(())
}

/// Puts a process into a group; false if it has ended.
fn put(group: &Path, pid: i32) -> Result<bool> {
    let path = group.join("cgroup.procs");
    match fs::write(&path, pid.to_string()) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(false),
        Err(error) => Err(Error::file("write", &path, error)),
    }
}

/// Moves all processes of a group back to where they were, and removes it. Those that were forked meanwhile go with
/// the root.
fn move_out(kept: &SavedState) -> Result<()> {
    let Some((_, first)) = kept.homes.first() else {
        return Ok(());
    };
    for _ in 0..LOOKS_MAX {
        let inside = members(&kept.group)?;
        if inside.is_empty() {
            break;
        }
        for pid in inside {
            let name = ProcessName::of(pid).ok();
            let home = kept.homes.iter().find(|(known, _)| Some(*known) == name);
            let home = home.map_or(first, |(_, home)| home);
            let home = if home.exists() { home } else { first };
            put(home, pid)?;
        }
    }
    fs::remove_dir(&kept.group)
        .map_err(|error| Error::file("remove the control group", &kept.group, error))
}

/// Lowers cpu.max of `group`, where `before` stands, to what the processes use now less `percent`.
fn lower(group: &Path, before: &str, percent: u8) -> Result<()> {
    let start = (Instant::now(), used_us(group)?);
    thread::sleep(USAGE_TIME);
    let time_us = u64::try_from(start.0.elapsed().as_micros()).unwrap_or(u64::MAX);
    let used = used_us(group)?.saturating_sub(start.1);
    let quota = quota_us(used, time_us, percent);
    let quota = limit_us(before).map_or(quota, |limit| quota.min(limit));
    write(&group.join("cpu.max"), &format!("{quota} {CPU_PERIOD_US}"))
}

fn used_us(group: &Path) -> Result<u64> {
    let path = group.join("cpu.stat");
    let text = fs::read_to_string(&path).map_err(|error| Error::file("read", &path, error))?;
    let used = text
        .lines()
        .find_map(|line| line.strip_prefix("usage_usec "));
    Ok(used
        .and_then(|used| used.trim().parse().ok())
        .unwrap_or_default())
}

/// CPU time of a period for processes that used `used_us` in `time_us`, less `percent`.
fn quota_us(used_us: u64, time_us: u64, percent: u8) -> u64 {
    let left = u64::from(100 - percent.min(99));
    let share = used_us.saturating_mul(CPU_PERIOD_US) / time_us.max(1);
    (share.saturating_mul(left) / 100).max(CPU_LEAST_US)
}

/// What a line of cpu.max allows in [`CPU_PERIOD_US`]; `None`: everything.
fn limit_us(cpu_max: &str) -> Option<u64> {
    let mut words = cpu_max.split_whitespace();
    let quota: u64 = words.next()?.parse().ok()?;
    let period: u64 = words.next()?.parse().ok()?;
    Some((quota.saturating_mul(CPU_PERIOD_US) / period.max(1)).max(CPU_LEAST_US))
}

/// Freezes the processes of `group` for `percent` of each period, until the sender is dropped.
fn take_turns(group: &Path, percent: u8) -> Result<(Sender<()>, JoinHandle<()>)> {
    let path = group.join("cgroup.freeze");
    // Whether it can be written is known before anybody relies on it.
    write(&path, "0")?;
    let frozen = PERIOD * u32::from(percent.min(99)) / 100;
    let (stop, stopped) = channel::<()>();
    let thread = thread::spawn(move || {
        let goes_on = |time| stopped.recv_timeout(time) == Err(RecvTimeoutError::Timeout);
        loop {
            let went = fs::write(&path, "1").is_ok() && goes_on(frozen);
            let thawed = fs::write(&path, "0").is_ok();
            if !went || !thawed || !goes_on(PERIOD - frozen) {
                return;
            }
        }
    });
    Ok((stop, thread))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_is_what_was_used_less_the_share() {
        // Half a processor, of which 80 % go.
        assert_eq!(quota_us(100_000, 200_000, 80), 10_000);
        assert_eq!(quota_us(400_000, 200_000, 50), 100_000);
        assert_eq!(quota_us(0, 200_000, 50), CPU_LEAST_US);
        assert_eq!(quota_us(5, 0, 99), 5_000);
    }

    #[test]
    fn limits_have_their_own_periods() {
        assert_eq!(limit_us("max 100000\n"), None);
        assert_eq!(limit_us("20000 100000\n"), Some(20_000));
        assert_eq!(limit_us("20000 50000\n"), Some(40_000));
        assert_eq!(limit_us(""), None);
    }

    #[test]
    fn what_was_never_begun_is_undone() {
        let tmp = tempfile::tempdir().unwrap();
        undo(tmp.path()).unwrap();
        let kept = SavedState {
            group: tmp.path().join("gone"),
            made: true,
            cpu_max: None,
            homes: Vec::new(),
        };
        records::write(&tmp.path().join(KEPT), &kept).unwrap();
        undo(tmp.path()).unwrap();
        assert!(!tmp.path().join(KEPT).exists());
    }
}
