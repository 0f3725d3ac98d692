//! Signals to processes and threads that are known by more than a number.
//!
//! A pid may be given to another process at any time after the end of its own. A pidfd names one process
//! for good: it is opened, the start time is compared, and only then is a signal sent through it.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A process as it can be written down and found again.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
pub struct ProcessName {
    /// Its pid, as this process sees it.
    pub pid: i32,
    /// When it started: clock ticks since the host's start, field 22 of /proc/PID/stat.
    pub started: u64,
}

/// What /proc/PID/stat says of a process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ProcessStat {
    /// Field 3: R, S, D, T, t, Z ...
    pub state: char,
    /// Field 22, clock ticks since the host's start.
    pub started: u64,
}

impl ProcessStat {
    /// Reads it; an error of kind `NotFound` if there is no such process.
    pub fn of(pid: i32) -> io::Result<ProcessStat> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        ProcessStat::parse(&text)
            .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat is not understood")))
    }

    /// Reads it off the text of /proc/PID/stat.
    pub fn parse(text: &str) -> Option<ProcessStat> {
        // The command's name may contain anything, a closing bracket too: count behind the last.
        let mut fields = text.rsplit_once(')')?.1.split_whitespace();
        let state = fields.next()?.chars().next()?;
        let started = fields.nth(18)?.parse().ok()?;
        Some(ProcessStat { state, started })
    }
}

impl ProcessName {
    /// The process that has `pid` now.
    pub fn of(pid: i32) -> io::Result<ProcessName> {
        let started = ProcessStat::of(pid)?.started;
        Ok(ProcessName { pid, started })
    }

    /// Whether it has not ended; a zombie has.
    pub fn is_alive(&self) -> bool {
        let stat = ProcessStat::of(self.pid);
        stat.is_ok_and(|stat| stat.started == self.started && !matches!(stat.state, 'Z' | 'X'))
    }

    /// Sends it a signal (a number of signal(7)); an error of kind `NotFound` if it has ended.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        let pidfd = pidfd_open(self.pid)?;
        if !self.is_alive() {
            return Err(io::ErrorKind::NotFound.into());
        }
        pidfd_send_signal(&pidfd, signal)
    }

    /// A copy of its descriptor `number`, which leads to the same open file.
    ///
    /// # Errors
    ///
    /// It has ended (kind `NotFound`), or has no such descriptor; or this process may not trace it.
    pub fn descriptor(&self, number: i32) -> io::Result<OwnedFd> {
        let pidfd = pidfd_open(self.pid)?;
        if !self.is_alive() {
            return Err(io::ErrorKind::NotFound.into());
        }
        // SAFETY: the call takes three numbers and touches no memory of this process.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) };
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        if fd < 0 {
            return Err(not_found(io::Error::last_os_error()));
        }
        // SAFETY: the kernel has just made this descriptor, and nobody else knows of it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Sends each of its threads a signal of its own, and tells how many there were.
    ///
    /// A thread that is stopped by its tracer takes such a signal before its next instruction, whatever the
    /// other threads do. A SIGSTOP for the process as a whole is taken by one thread only.
    pub fn signal_threads(&self, signal: i32) -> io::Result<usize> {
        if !self.is_alive() {
            return Err(io::ErrorKind::NotFound.into());
        }
        let mut count = 0;
        for entry in fs::read_dir(format!("/proc/{}/task", self.pid))? {
            let name = entry?.file_name();
            let Some(tid) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            tgkill(self.pid, tid, signal)?;
            count += 1;
        }
        Ok(count)
    }
}

/// Whether descriptors can be copied from other processes (pidfd_getfd, Linux 5.6; a seccomp profile may
/// refuse it).
///
/// # Errors
///
/// The kernel's, if not.
pub fn check_pidfd_getfd() -> io::Result<()> {
    let pidfd = pidfd_open(std::process::id().cast_signed())?;
    let own = pidfd.as_raw_fd();
    // SAFETY: the call takes no pointer.
    let copy = unsafe { libc::syscall(libc::SYS_pidfd_getfd, own, own, 0) };
    let number = i32::try_from(copy).map_err(io::Error::other)?;
    if number < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else knows its number.
    drop(unsafe { OwnedFd::from_raw_fd(number) });
    Ok(())
}

pub(super) fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes two numbers and touches no memory of this process.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(not_found(io::Error::last_os_error()));
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn pidfd_send_signal(pidfd: &OwnedFd, signal: i32) -> io::Result<()> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo is allowed by pidfd_send_signal(2): the kernel fills in its own.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            no_info,
            0,
        )
    };
    match sent {
        0 => Ok(()),
        _ => Err(not_found(io::Error::last_os_error())),
    }
}

fn tgkill(pid: i32, tid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: the call takes three numbers and touches no memory of this process.
    let sent = unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal) };
    match sent {
        0 => Ok(()),
        _ => Err(not_found(io::Error::last_os_error())),
    }
}

/// ESRCH under the kind that says so.
fn not_found(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::ESRCH) => io::Error::new(io::ErrorKind::NotFound, error),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_name_in_brackets_does_not_confuse() {
        let text = "7 (a) S b) T 1 7 7 0 -1 4 1 0 0 0 0 0 0 0 20 0 1 0 4242 9 9";
        let stat = ProcessStat::parse(text).unwrap();
        assert_eq!((stat.state, stat.started), ('T', 4242));
    }

    #[test]
    fn a_process_is_known_until_its_end() {
        let mut child = Command::new("sleep")
            .arg("600")
            .stdin(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let name = ProcessName::of(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(name.is_alive());
        let stdin = name.descriptor(0).unwrap();
        let path = fs::read_link(format!("/proc/self/fd/{}", stdin.as_raw_fd())).unwrap();
        assert_eq!(path, std::path::Path::new("/dev/null"));
        assert!(name.descriptor(i32::MAX).is_err());
        assert_eq!(name.signal_threads(0).unwrap(), 1);
        name.signal(libc::SIGKILL).unwrap();
        child.wait().unwrap();
        assert!(!name.is_alive());
        assert_eq!(name.signal(0).unwrap_err().kind(), io::ErrorKind::NotFound);
        let other = ProcessName {
            started: name.started + 1,
            pid: i32::try_from(std::process::id()).unwrap(),
        };
        assert_eq!(other.signal(0).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
