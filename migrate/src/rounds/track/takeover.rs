//! A userfaultfd of another process: made there by an injected system call, copied by pidfd_getfd(2), and closed there
//! again.
//!
//! ```text
//! SIGSTOP ──> injection.json ──> userfaultfd ──> pidfd_getfd ──> close ──> registers back ──> no file ──> SIGCONT
//! ```
//!
//! Whoever is killed in between leaves a stopped process and the file. [`undo`] then puts the thread's registers back,
//! closes the descriptor and lets the process go on. While the file exists, no thread of the process has made an
//! instruction of its own; without the file, there is nothing to put back. What is registered belongs to the copy of
//! the descriptor, and the kernel ends it with the process that holds that.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use pageferry::error::Result;
use pageferry::sys::inject::{ThreadState, Tracee};
use pageferry::sys::owned_process::{ProcessName, ProcessStat};
use pageferry::sys::write_tracking::USER_MODE_ONLY;
use procfs::process::{FDTarget, Process};
use serde::{Deserialize, Serialize};

use super::super::tree::Member;
use crate::records;

/// Where a takeover under way is written down, in a migration's directory.
const FILE: &str = "injection.json";

/// How long a process may take to stop: one that waits for a disk does not.
const STOP_LIMIT: Duration = Duration::from_secs(1);

/// How often it is looked whether it has.
const LOOK_AGAIN: Duration = Duration::from_micros(200);

/// A takeover under way.
#[derive(Debug, Serialize, Deserialize)]
struct Injection {
    process: ProcessName,
    state: ThreadState,
    /// Userfaultfds that the process had of its own.
    own: BTreeSet<i32>,
}

/// Lets `member` make a userfaultfd, and takes it over. `dir` is the migration's directory.
pub(super) fn userfaultfd_of(member: &Member, dir: &Path) -> io::Result<OwnedFd> {
    let process = member.name;
    if !may_call(process.pid)? {
        return Err(io::Error::other("its system calls are filtered (seccomp)"));
    }
    if ProcessStat::of(process.pid)?.state == 'T' {
        return Err(io::Error::other("it is stopped"));
    }
    let stopped = Stopped::new(process)?;
    let taken = take(process, &dir.join(FILE));
    drop(stopped);
    taken
}

fn take(process: ProcessName, file: &Path) -> io::Result<OwnedFd> {
    let own = userfaultfds(process.pid)?;
    let tracee = Tracee::attach(process.pid)?;
    let state = tracee.state()?;
    let injection = Injection {
        process,
        state,
        own,
    };
    records::write(file, &injection).map_err(io::Error::other)?;
    let state = &injection.state;
    let flags = u64::try_from(libc::O_CLOEXEC | libc::O_NONBLOCK).unwrap_or(0) | USER_MODE_ONLY;
    let made = tracee.call(state, libc::SYS_userfaultfd, [flags, 0, 0]);
    let copied = made.and_then(|number| {
        let number = i32::try_from(number).map_err(io::Error::other)?;
        let copied = process.descriptor(number);
        close(&tracee, state, number)?;
        copied
    });
    tracee.restore(state)?;
    // It does not run yet: it is stopped.
    drop(tracee);
    fs::remove_file(file)?;
    copied
}

fn close(tracee: &Tracee, state: &ThreadState, number: i32) -> io::Result<()> {
    let number = u64::try_from(number).map_err(io::Error::other)?;
    tracee
        .call(state, libc::SYS_close, [number, 0, 0])
        .map(drop)
}

/// Puts back what a takeover has left in the migration's directory `dir`, whoever was killed in it.
pub(crate) fn undo(dir: &Path) -> Result<()> {
    let file: PathBuf = dir.join(FILE);
    let Some(injection) = records::read::<Injection>(&file)? else {
        return Ok(());
    };
    let process = injection.process;
    if process.is_alive()
        && let Err(error) = put_back(&injection)
    {
        tracing::error!("pid {} cannot be put back: {error}", process.pid);
    }
    let _ = fs::remove_file(&file);
    // It may have ended.
    let _ = process.signal(Signal::SIGCONT as i32);
    Ok(())
}

fn put_back(injection: &Injection) -> io::Result<()> {
    let Injection {
        process,
        state,
        own,
    } = injection;
    let tracee = Tracee::attach(process.pid)?;
    for number in userfaultfds(process.pid)?.difference(own) {
        close(&tracee, state, *number)?;
    }
    tracee.restore(state)
}

/// Numbers of a process's userfaultfds.
fn userfaultfds(pid: i32) -> io::Result<BTreeSet<i32>> {
    let process = Process::new(pid).map_err(io::Error::other)?;
    let all = process.fd().map_err(io::Error::other)?;
    let is_one = |target: &FDTarget| matches!(target, FDTarget::AnonInode(name) if name.contains("userfaultfd"));
    Ok(all
        .flatten()
        .filter(|fd| is_one(&fd.target))
        .map(|fd| fd.fd)
        .collect())
}

/// Whether no filter might end the process for a system call that it does not make by itself.
fn may_call(pid: i32) -> io::Result<bool> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let filter = status
        .lines()
        .find_map(|line| line.strip_prefix("Seccomp:"));
    Ok(filter.is_none_or(|mode| mode.trim() == "0"))
}

/// A stopped process, which goes on when the value is dropped.
struct Stopped(ProcessName);

impl Stopped {
    fn new(process: ProcessName) -> io::Result<Stopped> {
        process.signal(Signal::SIGSTOP as i32)?;
        let stopped = Stopped(process);
        let start = Instant::now();
        while ProcessStat::of(process.pid)?.state != 'T' {
            if start.elapsed() > STOP_LIMIT {
                return Err(io::Error::other("it does not stop: it waits for a device"));
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        Ok(stopped)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.signal(Signal::SIGCONT as i32);
    }
}

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests {
    use std::io::Read;
    use std::process::{Child, Command, Stdio};

    use pageferry::sys::write_tracking::{WriteTracking, is_supported};

    use super::*;
    use crate::rounds::Tree;

    fn counting() -> (Child, Member) {
        let script = "i=0; echo begins; while [ $i -lt 100000 ]; do i=$((i+1)); done; echo $i";
        let mut child = Command::new("sh")
            .args(["-c", script])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut [0; 7])
            .unwrap();
        let tree = Tree::of(i32::try_from(child.id()).unwrap()).unwrap();
        let member = tree.members()[0];
        (child, member)
    }

    fn expect_count(mut child: Child) {
        let mut text = String::new();
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text.trim(), "100000");
        assert!(child.wait().unwrap().success());
    }

    #[test]
    fn a_userfaultfd_is_taken_over_and_leaves_nothing() {
        if !is_supported() {
            eprintln!("skipped: this kernel has no WP_ASYNC");
            return;
        }
        let tmp = tempfile::tempdir().unwrap();
        let (child, member) = counting();
        for _ in 0..5 {
            let uffd = userfaultfd_of(&member, tmp.path()).unwrap();
            WriteTracking::begin(uffd, member.pid).unwrap();
            assert_eq!(userfaultfds(member.pid).unwrap(), BTreeSet::new());
            assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0);
        }
        expect_count(child);
    }

    /// As if this program had been killed behind each of the steps.
    #[test]
    fn what_was_interrupted_is_undone() {
        if !is_supported() {
            eprintln!("skipped: this kernel has no WP_ASYNC");
            return;
        }
        for step in 0..4 {
            let tmp = tempfile::tempdir().unwrap();
            let (child, member) = counting();
            let process = member.name;
            std::mem::forget(Stopped::new(process).unwrap());
            let file = tmp.path().join(FILE);
            std::thread::spawn(move || {
                let tracee = Tracee::attach(process.pid).unwrap();
                let state = tracee.state().unwrap();
                let own = BTreeSet::new();
                let injection = Injection {
                    process,
                    state,
                    own,
                };
                records::write(&file, &injection).unwrap();
                let state = &injection.state;
                let mut number = 0;
                if step > 0 {
                    number = tracee
                        .call(state, libc::SYS_userfaultfd, [1, 0, 0])
                        .unwrap();
                }
                if step > 1 {
                    close(&tracee, state, i32::try_from(number).unwrap()).unwrap();
                }
                if step > 2 {
                    tracee.restore(state).unwrap();
                }
            })
            .join()
            .unwrap();
            undo(tmp.path()).unwrap();
            assert_eq!(
                userfaultfds(process.pid).unwrap(),
                BTreeSet::new(),
                "step {step}"
            );
            assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0);
            expect_count(child);
        }
    }
}
