//! The service manager that has started this process: what it is told, and what it keeps for the next start.
//!
//! The protocol is systemd's, as sd_notify(3), sd_listen_fds(3) and <https://systemd.io/FILE_DESCRIPTOR_STORE/>
//! describe it: datagrams with lines `NAME=value` to the socket that `NOTIFY_SOCKET` names, descriptors as SCM_RIGHTS;
//! what is kept comes back as descriptors from number 3 on, with their names in `LISTEN_FDNAMES`.

use std::env;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::pipe2;

use crate::error::{Error, Kind, Result};
use crate::sys::fdpass;
use crate::sys::process::inherited_descriptor;

/// How long the manager may take to receive a message, or to handle it.
const TIMEOUT: Duration = Duration::from_secs(1);

/// [`TIMEOUT`] as poll(2) takes it, ms.
const PATIENCE_MS: u16 = 1000;

/// The first descriptor that systemd passes (`SD_LISTEN_FDS_START`).
pub(in crate::engine) const FIRST_PASSED_FD: RawFd = 3;

/// Most descriptors that are believed to be passed: the kernel's limit of one process, as it is by default.
const PASSED_MAX: usize = 1 << 20;

/// The name under which it is found out whether the manager keeps descriptors.
const PROBE: &str = "pageferry-probe";

/// A connection to the manager. Nothing of it is inherited.
#[derive(Debug)]
pub struct ServiceManager(UnixDatagram);

impl ServiceManager {
    /// The manager that `NOTIFY_SOCKET` names, `None` if there is none that can be reached, or it has started another
    /// process (`SYSTEMD_EXEC_PID`) from which this one has inherited the variable.
    pub fn of_environment() -> Option<ServiceManager> {
        let own = std::process::id().to_string();
        if env::var_os("SYSTEMD_EXEC_PID").is_some_and(|pid| pid != *own) {
            return None;
        }
        let name = env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty())?;
        let connected = connect(name.as_bytes());
        if let Err(error) = &connected {
            tracing::warn!(
                "cannot reach the service manager at {} (NOTIFY_SOCKET): {error}",
                name.display()
            );
        }
        connected.ok().map(ServiceManager)
    }

    /// Tells it `state`, lines of `NAME=value`.
    pub fn notify(&self, state: &str) -> io::Result<()> {
        fdpass::send(self.0.as_fd(), state.as_bytes(), None)
    }

    /// Has it keep a copy of `fd` as `name`, whatever becomes of what `fd` leads to.
    pub fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        let state = format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0");
        fdpass::send(self.0.as_fd(), state.as_bytes(), Some(fd))
    }

    /// Has it close all that it keeps as `name`.
    pub fn release(&self, name: &str) -> io::Result<()> {
        self.notify(&format!("FDSTOREREMOVE=1\nFDNAME={name}"))
    }

    /// Waits until it has handled all that it was told. Returns whether it did so in time.
    pub fn settle(&self) -> io::Result<bool> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
        fdpass::send(self.0.as_fd(), b"BARRIER=1", Some(write.as_fd()))?;
        drop(write);
        Ok(hangs_up(&read, PATIENCE_MS)?)
    }

    /// Whether it keeps descriptors for this process: has it keep the end of a pipe and looks whether that stays
    /// open. No variable tells it before systemd 254, and `NotifyAccess=` may exclude this process.
    pub fn keeps_descriptors(&self) -> bool {
        let probe = || {
            let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
            self.keep(PROBE, write.as_fd())?;
            drop(write);
            let kept = self.settle()? && !hangs_up(&read, 0)?;
            self.release(PROBE)?;
            io::Result::Ok(kept)
        };
        probe().unwrap_or_else(|error| {
            tracing::warn!("cannot ask the service manager to keep descriptors: {error}");
            false
        })
    }

    /// One that is not there, and its other end.
    #[cfg(test)]
    pub(in crate::engine) fn pair() -> (ServiceManager, UnixDatagram) {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        (ServiceManager(ours), theirs)
    }
}

fn connect(name: &[u8]) -> io::Result<UnixDatagram> {
    let address = match name {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        path => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(path))?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    socket.set_write_timeout(Some(TIMEOUT))?;
    Ok(socket)
}

/// Whether nobody has the other end of the pipe `read` any more, or so within `timeout_ms`.
fn hangs_up(read: &OwnedFd, timeout_ms: u16) -> nix::Result<bool> {
    let mut polled = [PollFd::new(read.as_fd(), PollFlags::empty())];
    Ok(poll(&mut polled, PollTimeout::from(timeout_ms))? > 0)
}

/// A descriptor that the manager passed when it started this process.
#[derive(Debug)]
pub struct Passed {
    /// Its name.
    pub name: String,
    /// The descriptor, closed on exec.
    pub fd: OwnedFd,
}

/// Takes over the descriptors that were passed to this process and whose names begin with `prefix`. Others are left
/// as they are.
///
/// # Errors
///
/// One of those that are named is not there.
pub fn passed(prefix: &str) -> Result<Vec<Passed>> {
    let variable = |name: &str| env::var(name).unwrap_or_default();
    if variable("LISTEN_PID").parse() != Ok(std::process::id()) {
        return Ok(Vec::new());
    }
    let count = variable("LISTEN_FDS").parse().unwrap_or(0);
    named(&variable("LISTEN_FDNAMES"), count, prefix)
        .map(|(number, name)| {
            let fd = inherited_descriptor(number).map_err(|error| {
                let text = format!("descriptor {number}, {name}, was not passed (LISTEN_FDS)");
                Error::wrap(Kind::Usage, text, error)
            })?;
            let name = name.to_owned();
            Ok(Passed { name, fd })
        })
        .collect()
}

/// The numbers and names of `count` passed descriptors, of those whose names begin with `prefix`.
fn named<'a>(
    names: &'a str,
    count: usize,
    prefix: &'a str,
) -> impl Iterator<Item = (RawFd, &'a str)> {
    let numbered = (FIRST_PASSED_FD..).zip(names.split(':'));
    let believed = numbered.take(count.min(PASSED_MAX));
    believed.filter(move |(_, name)| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passed_descriptors_have_their_names_in_order() {
        let of = |count| named("x-1:unknown:x-2:x-3", count, "x-").collect::<Vec<_>>();
        assert_eq!(of(3), [(3, "x-1"), (5, "x-2")]);
        assert_eq!(of(4), [(3, "x-1"), (5, "x-2"), (6, "x-3")]);
        assert_eq!(of(usize::MAX), of(4));
        assert_eq!(of(0), []);
    }

    /// Handles messages as a manager does: keeps `most` descriptors, until what comes says that there are no more.
    fn manage(socket: &UnixDatagram, most: usize) -> Vec<String> {
        let mut kept: Vec<OwnedFd> = Vec::new();
        let mut received_texts = Vec::new();
        let mut message = [0; 4096];
        loop {
            let received = fdpass::receive(socket.as_fd(), &mut message).unwrap();
            let text = std::str::from_utf8(&message[..received.bytes]).unwrap();
            received_texts.push(text.to_owned());
            if text.is_empty() {
                return received_texts;
            }
            if text.starts_with("FDSTORE=1\n") && kept.len() < most {
                kept.extend(received.fd);
            }
        }
    }

    #[test]
    fn it_is_found_out_whether_descriptors_are_kept() {
        for most in [0, 1] {
            let (manager, theirs) = ServiceManager::pair();
            let manages = std::thread::spawn(move || manage(&theirs, most));
            assert_eq!(manager.keeps_descriptors(), most > 0);
            manager.notify("").unwrap();
            let received_texts = manages.join().unwrap();
            let barrier = "BARRIER=1".to_owned();
            let removed = "FDSTOREREMOVE=1\nFDNAME=pageferry-probe".to_owned();
            assert_eq!(received_texts[1..3], [barrier, removed]);
        }
        let (manager, theirs) = ServiceManager::pair();
        drop(theirs);
        assert!(!manager.keeps_descriptors());
    }
}
