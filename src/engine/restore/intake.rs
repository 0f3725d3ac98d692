//! `lazy-pages.socket`: `criu restore --lazy-pages` connects and sends a record for each process. Others may connect as
//! well: the restore is the connection whose first bytes are a record.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;

use crate::criu::lazy_socket::{RECORD_BYTES, Record};
use crate::engine::listening::listen::is_in_use;
use crate::error::{Error, Kind, Result};
use crate::sys::fdpass;
use crate::sys::uffd::Uffd;

/// The socket's name in the work directory.
pub const SOCKET_NAME: &str = "lazy-pages.socket";

/// What the restore says.
#[derive(Debug)]
pub(super) enum IntakeEvent {
    /// A process is being restored; its memory has this userfaultfd. Its pid on this host stands behind; 0 if
    /// that cannot be told here.
    Process(u32, Uffd, i32),
    /// A zombie: it has no memory.
    Zombie(u32),
    /// Every process is restored.
    Finished,
    /// Nothing more will be said: the restore has finished, or hung up before.
    End,
}

/// Connections that are looked at before one of them has said anything.
const UNDECIDED_MAX: usize = 16;

/// A connection, and where its conversation stands.
#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    record: [u8; RECORD_BYTES],
    read: usize,
    /// A process's pid was read; the byte that carries its descriptor is next.
    awaits_fd_of: Option<u32>,
    /// Nothing is known that speaks against a restore at the other end.
    may_be_restore: bool,
}

/// What a connection has said.
enum ConnectionStep {
    Event(IntakeEvent),
    /// It has ended.
    Over,
}

/// What is listened to.
#[derive(Debug)]
struct Open {
    /// Readable if anything is.
    poll: Epoll,
    /// Until a restore has come.
    listener: Option<UnixListener>,
    /// Those who have not said anything yet.
    undecided: Vec<Connection>,
    restore: Option<Connection>,
}

/// The receiving end of `lazy-pages.socket`. The socket file goes when this does.
#[derive(Debug)]
pub struct Intake {
    /// Where the socket's file is, if this is its owner.
    path: Option<PathBuf>,
    /// Device and number of that file.
    inode: Option<(u64, u64)>,
    /// `None` behind the last message.
    open: Option<Open>,
}

impl Drop for Intake {
    fn drop(&mut self) {
        let Some(path) = &self.path else {
            return;
        };
        // The next lazy-client may have put its own in the place of it, once the restore had come.
        let found = std::fs::symlink_metadata(path).ok();
        if found.map(|found| (found.dev(), found.ino())) == self.inode {
            // Nobody is there to connect to any more; a missing file is as good.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Intake {
    /// Whether nobody listens in the directory `dir`.
    pub(super) fn check_free(dir: &Path) -> Result<()> {
        let path = dir.join(SOCKET_NAME);
        let failed = |error| Error::file("look at", &path, error);
        if is_in_use(&path).map_err(failed)? {
            let shown = std::path::absolute(&path).unwrap_or_else(|_| path.clone());
            let text = format!(
                "another process listens at {}: end it, or give another work directory (-W)",
                shown.display()
            );
            return Err(Error::new(Kind::Usage, text));
        }
        Ok(())
    }

    /// Listens in the directory `dir`, in place of whoever left a socket there.
    pub fn listen(dir: &Path) -> Result<Intake> {
        let path = dir.join(SOCKET_NAME);
        let failed = |error| Error::file("listen on", &path, error);
        Intake::check_free(dir)?;
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let listener = UnixListener::bind(&path).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        fdpass::ask_for_senders(listener.as_fd()).map_err(failed)?;
        let found = std::fs::symlink_metadata(&path).map_err(failed)?;
        let poll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
            .map_err(|errno| Error::wrap(Kind::Io, "cannot make an epoll descriptor", errno))?;
        let mut open = Open {
            poll,
            listener: None,
            undecided: Vec::new(),
            restore: None,
        };
        open.watch(&listener).map_err(failed)?;
        open.listener = Some(listener);
        Ok(Intake {
            open: Some(open),
            path: Some(path),
            inode: Some((found.dev(), found.ino())),
        })
    }

    /// The end of a conversation that another process had.
    pub(super) fn ended() -> Intake {
        Intake {
            path: None,
            inode: None,
            open: None,
        }
    }

    /// Where the restore must connect to.
    pub fn path(&self) -> &Path {
        self.path.as_deref().unwrap_or(Path::new(SOCKET_NAME))
    }

    /// Whether no restore has come yet.
    pub(super) fn is_listening(&self) -> bool {
        let Some(open) = &self.open else {
            return false;
        };
        open.restore.is_none()
            && !open
                .undecided
                .iter()
                .any(|connection| connection.may_be_restore)
    }

    /// What to poll for reading, until the end.
    pub(super) fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.open.as_ref().map(|open| open.poll.0.as_fd())
    }

    /// The next thing the restore says, `None` if it has not said more yet.
    pub(super) fn next(&mut self) -> Result<Option<IntakeEvent>> {
        let Some(open) = &mut self.open else {
            return Ok(Some(IntakeEvent::End));
        };
        let said = match &mut open.restore {
            Some(restore) => restore.next(),
            None => open.first_message(),
        };
        match said {
            Ok(None) => Ok(None),
            Ok(Some(ConnectionStep::Event(event))) => {
                if matches!(event, IntakeEvent::Finished) {
                    // Its last message. A restore that is not detached (-d) keeps the connection for as long as
                    // the restored processes live: to wait for its end would be to wait for theirs.
                    self.open = None;
                }
                Ok(Some(event))
            }
            Ok(Some(ConnectionStep::Over)) => {
                self.open = None;
                Ok(Some(IntakeEvent::End))
            }
            Err(error) => Err(Error::file("read", self.path(), error)),
        }
    }
}

impl Open {
    fn watch(&self, socket: &impl AsFd) -> io::Result<()> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, 0);
        Ok(self.poll.add(socket, event)?)
    }

    /// What one of those who have connected says first: it is the restore. Anybody may connect, for a look or by
    /// mistake, so a peer that leaves without a message, or sends what no restore does, changes nothing, unless it can be a
    /// restore that has failed.
    fn first_message(&mut self) -> io::Result<Option<ConnectionStep>> {
        self.accept()?;
        let mut at = 0;
        while at < self.undecided.len() {
            let connection = &mut self.undecided[at];
            let failed = match connection.next() {
                Ok(None) => {
                    at += 1;
                    continue;
                }
                Ok(Some(ConnectionStep::Event(event))) => {
                    self.restore = Some(self.undecided.swap_remove(at));
                    // Nobody else is waited for.
                    self.undecided.clear();
                    self.listener = None;
                    return Ok(Some(ConnectionStep::Event(event)));
                }
                Ok(Some(ConnectionStep::Over)) => None,
                Err(error) => Some(error),
            };
            match (connection.may_be_restore, failed) {
                (true, None) => return Ok(Some(ConnectionStep::Over)),
                (true, Some(error)) => return Err(error),
                (false, None) => {
                    tracing::warn!("a connection to {SOCKET_NAME} has ended without a message");
                }
                (false, Some(error)) => {
                    tracing::warn!("a connection to {SOCKET_NAME} is from no restore: {error}");
                }
            }
            drop(self.undecided.swap_remove(at));
        }
        Ok(None)
    }

    /// Takes all that have connected.
    fn accept(&mut self) -> io::Result<()> {
        while let Some(listener) = &self.listener {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            stream.set_nonblocking(true)?;
            self.watch(&stream)?;
            let stray = |connection: &Connection| !connection.may_be_restore;
            if self.undecided.len() >= UNDECIDED_MAX
                && let Some(oldest) = self.undecided.iter().position(stray)
            {
                drop(self.undecided.remove(oldest));
            }
            self.undecided.push(Connection {
                may_be_restore: may_be_restore(&stream),
                stream,
                record: [0; RECORD_BYTES],
                read: 0,
                awaits_fd_of: None,
            });
        }
        Ok(())
    }
}

impl Connection {
    /// The next thing that is said, `None` if there is nothing yet.
    fn next(&mut self) -> io::Result<Option<ConnectionStep>> {
        loop {
            match self.advance() {
                Ok(None) => {}
                Ok(said) => return Ok(said),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // It died in mid-sentence.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Ok(Some(ConnectionStep::Over));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads on; `None` if more is to be read.
    fn advance(&mut self) -> io::Result<Option<ConnectionStep>> {
        if let Some(pid) = self.awaits_fd_of {
            let received = fdpass::receive(self.stream.as_fd(), &mut [0])?;
            if received.bytes == 0 {
                return Ok(Some(ConnectionStep::Over));
            }
            self.awaits_fd_of = None;
            let fd: OwnedFd = received.fd.ok_or_else(|| {
                io::Error::other(format!("no userfaultfd came with the record of pid {pid}"))
            })?;
            // The process itself hands its userfaultfd over.
            let host = received.sender.unwrap_or(0);
            let event = IntakeEvent::Process(pid, Uffd::from(fd), host);
            return Ok(Some(ConnectionStep::Event(event)));
        }
        let bytes = io::Read::read(&mut self.stream, &mut self.record[self.read..])?;
        self.read += bytes;
        if bytes == 0 {
            return Ok(Some(ConnectionStep::Over));
        }
        if self.read < RECORD_BYTES {
            return Ok(None);
        }
        self.read = 0;
        let event = match Record::decode(self.record) {
            Record::Zombie(pid) => IntakeEvent::Zombie(pid),
            Record::Finished => IntakeEvent::Finished,
            Record::Process(pid) => {
                self.awaits_fd_of = Some(pid);
                return Ok(None);
            }
        };
        Ok(Some(ConnectionStep::Event(event)))
    }
}

/// Whether a restore can be at the other end of `stream`: by the command line of who connected. Where that is in
/// a PID namespace of its own nothing is known. Who is gone by now is none: a restore stays until it has spoken or
/// failed.
fn may_be_restore(stream: &UnixStream) -> bool {
    let Ok(who) = getsockopt(stream, PeerCredentials) else {
        return true;
    };
    if who.pid() <= 0 {
        return true;
    }
    let of = |name: &str| std::fs::read(format!("/proc/{}/{name}", who.pid())).unwrap_or_default();
    let line = of("cmdline");
    let words = ["restore", "swrk", "service"].map(str::as_bytes);
    of("comm").starts_with(b"criu")
        || line
            .split(|byte| *byte == 0)
            .any(|arg| words.contains(&arg))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn events(intake: &mut Intake) -> Vec<IntakeEvent> {
        let mut words = Vec::new();
        while let Some(event) = intake.next().unwrap() {
            let ended = matches!(event, IntakeEvent::End);
            words.push(event);
            if ended {
                break;
            }
        }
        words
    }

    #[test]
    fn the_word_that_all_is_restored_is_the_last_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut intake = Intake::listen(dir.path()).unwrap();
        assert!(events(&mut intake).is_empty());
        let mut restore = UnixStream::connect(intake.path()).unwrap();
        restore.write_all(&(-7i32).to_le_bytes()).unwrap();
        assert!(matches!(events(&mut intake)[..], [IntakeEvent::Zombie(7)]));
        restore.write_all(b"FTSR").unwrap();
        // The restore does not hang up.
        let last = events(&mut intake);
        assert!(
            matches!(last[..], [IntakeEvent::Finished, IntakeEvent::End]),
            "{last:?}"
        );
        assert!(intake.socket().is_none());
    }

    #[test]
    fn strangers_change_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut intake = Intake::listen(dir.path()).unwrap();
        let connect = || UnixStream::connect(dir.path().join(SOCKET_NAME)).unwrap();
        // This process is no restore, by its command line.
        drop(connect());
        let _silent = connect();
        for words in [&b"\x07"[..], b"GET / HTTP/1.1\r\n"] {
            connect().write_all(words).unwrap();
            assert!(events(&mut intake).is_empty());
            assert!(intake.is_listening());
        }
        let many: Vec<UnixStream> = (0..2 * UNDECIDED_MAX).map(|_| connect()).collect();
        assert!(events(&mut intake).is_empty());
        let mut restore = connect();
        restore.write_all(&(-7i32).to_le_bytes()).unwrap();
        assert!(matches!(events(&mut intake)[..], [IntakeEvent::Zombie(7)]));
        assert!(!intake.is_listening());
        drop(many);
        drop(restore);
        assert!(matches!(events(&mut intake)[..], [IntakeEvent::End]));
    }

    #[test]
    fn a_restore_that_hangs_up_has_ended_without_that_word() {
        let dir = tempfile::tempdir().unwrap();
        let mut intake = Intake::listen(dir.path()).unwrap();
        let mut restore = UnixStream::connect(intake.path()).unwrap();
        restore.write_all(&(-7i32).to_le_bytes()).unwrap();
        drop(restore);
        let all = events(&mut intake);
        assert!(
            matches!(all[..], [IntakeEvent::Zombie(7), IntakeEvent::End]),
            "{all:?}"
        );
    }
}
