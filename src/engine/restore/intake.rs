//! `lazy-pages.socket`: `criu restore --lazy-pages` connects and sends a record for each process. Others may connect as
//! well: the restore is the connection whose first bytes are a record.
//!
//! ```text
//! listener ── accepted ──> undecided ── its first message is there ──> restore ── Finished, or its end ──> closed
//!     └──────── each is reported to whoever keeps copies (SocketChange), connections at once ────────┘
//! ```
//!
//! Invariants:
//!
//! - CRIU waits for no answer. So a message stays in the socket until it has been handled (`Intake::handled`): if this
//!   process is killed before, whoever has a copy of the socket sees it again.
//! - What waits in a socket does not wake the loop again: only what comes does.

mod connection;
mod copies;

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use socket2::SockRef;

use crate::engine::listening::listen::is_in_use;
use crate::error::{Error, Kind, Result};
use crate::sys::fdpass;
use connection::{Connection, Message};

pub(super) use connection::IntakeEvent;
pub(super) use copies::{IntakeCopies, SocketChange};

/// The socket's name in the work directory.
pub const SOCKET_NAME: &str = "lazy-pages.socket";

/// Connections that are looked at before one of them has sent anything.
const UNDECIDED_MAX: usize = 16;

/// Called for each change of the sockets; the one that is concerned comes along if there is a new one.
pub(super) type OnSocketChange<'a> = dyn FnMut(SocketChange, Option<BorrowedFd<'_>>) + 'a;

/// A message that was looked at and is still in its socket.
#[derive(Debug)]
struct Unhandled {
    bytes: usize,
    is_last: bool,
}

/// What is listened to.
#[derive(Debug)]
struct Open {
    /// Readable if anything has come.
    poll: Epoll,
    /// Until a restore has come.
    listener: Option<UnixListener>,
    /// Connections that have sent nothing yet.
    undecided: Vec<Connection>,
    restore: Option<Connection>,
    /// The number of the next connection.
    next_number: u32,
    /// The message of the restore's connection that is being handled.
    unhandled: Option<Unhandled>,
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
        if let (Some(path), Some(inode)) = (&self.path, self.inode) {
            remove_socket_file(path, inode);
        }
    }
}

/// Removes the socket at `path` if it is the file `inode`: the next lazy-client may have put its own in the place of it,
/// once the restore had come.
fn remove_socket_file(path: &Path, inode: (u64, u64)) {
    let found = std::fs::symlink_metadata(path);
    if found.is_ok_and(|found| (found.dev(), found.ino()) == inode) {
        // Nobody is there to connect to any more; a missing file is as good.
        let _ = std::fs::remove_file(path);
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
    pub(super) fn listen(dir: &Path, on_change: &mut OnSocketChange<'_>) -> Result<Intake> {
        let path = dir.join(SOCKET_NAME);
        let failed = |error| Error::file("listen on", &path, error);
        Intake::check_free(dir)?;
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let listener = UnixListener::bind(&path).map_err(failed)?;
        let found = std::fs::symlink_metadata(&path).map_err(failed)?;
        let (device, inode) = (found.dev(), found.ino());
        fdpass::ask_for_senders(listener.as_fd()).map_err(failed)?;
        let change = SocketChange::Listening { device, inode };
        on_change(change, Some(listener.as_fd()));
        let open = Open::new(Some(listener)).map_err(failed)?;
        Ok(Intake {
            open: Some(open),
            path: Some(path),
            inode: Some((device, inode)),
        })
    }

    /// Goes on in the directory `dir` with what another process had, of which `copies` were kept.
    pub(super) fn go_on(dir: &Path, copies: IntakeCopies) -> Result<Intake> {
        let path = dir.join(SOCKET_NAME);
        let failed = |error| Error::file("listen on", &path, error);
        let listener = copies.listener.map(UnixListener::from);
        let mut open = Open::new(listener).map_err(failed)?;
        for (number, socket) in copies.connections {
            let stream = UnixStream::from(socket);
            open.watch(&stream).map_err(failed)?;
            let connection = Connection::new(number, stream).map_err(failed)?;
            open.next_number = open.next_number.max(number.saturating_add(1));
            match copies.restore == Some(number) {
                true => open.restore = Some(connection),
                false => open.undecided.push(connection),
            }
        }
        Ok(Intake {
            open: Some(open),
            path: Some(path),
            inode: copies.file,
        })
    }

    /// The end of a conversation that another process had, in the directory `dir`: what that one listened at, `file` by
    /// its device and number, is removed.
    pub(super) fn clear_up(dir: &Path, file: Option<(u64, u64)>) {
        if let Some(inode) = file {
            remove_socket_file(&dir.join(SOCKET_NAME), inode);
        }
    }

    /// From which nothing comes.
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

    /// Whether a restore is there, which may have ended by now and left all its messages.
    pub(super) fn has_come(&mut self, on_change: &mut OnSocketChange<'_>) -> Result<bool> {
        let Some(open) = &mut self.open else {
            return Ok(false);
        };
        if let Err(error) = open.accept(on_change) {
            return Err(Error::file("read", self.path(), error));
        }
        let has_sent = |connection: &Connection| {
            let is_record = |message: Message| !matches!(message.event, IntakeEvent::End);
            let message = connection.look();
            message.is_ok_and(|message| message.is_some_and(is_record))
        };
        let mut undecided = open.undecided.iter();
        Ok(open.restore.is_some() || undecided.any(|one| one.may_be_restore || has_sent(one)))
    }

    /// What to poll for reading, until the end. Behind it [`Intake::next`] is to be asked until it has nothing.
    pub(super) fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.open.as_ref().map(|open| open.poll.0.as_fd())
    }

    /// The restore's next message, `None` if it has not come yet. It is the same one again until
    /// [`Intake::handled`].
    pub(super) fn next(
        &mut self,
        on_change: &mut OnSocketChange<'_>,
    ) -> Result<Option<IntakeEvent>> {
        let Some(open) = &mut self.open else {
            return Ok(Some(IntakeEvent::End));
        };
        let message = open.drain().and_then(|()| match &open.restore {
            Some(restore) => restore.look(),
            None => open.first_message(on_change),
        });
        let message = message.map_err(|error| Error::file("read", self.path(), error))?;
        let Some(Message { event, bytes }) = message else {
            return Ok(None);
        };
        if matches!(event, IntakeEvent::End) {
            self.close(on_change);
        } else if let Some(open) = &mut self.open {
            let is_last = matches!(event, IntakeEvent::Finished);
            open.unhandled = Some(Unhandled { bytes, is_last });
        }
        Ok(Some(event))
    }

    /// The last message is handled, and whoever would go on has been notified of it.
    pub(super) fn handled(&mut self, on_change: &mut OnSocketChange<'_>) -> Result<()> {
        let Some(open) = &mut self.open else {
            return Ok(());
        };
        let Some(Unhandled { bytes, is_last }) = open.unhandled.take() else {
            return Ok(());
        };
        if is_last {
            // A restore that is not detached (-d) keeps the connection for as long as the restored processes live: to
            // wait for its end would be to wait for theirs.
            self.close(on_change);
            return Ok(());
        }
        let restore = open.restore.as_ref();
        let taken = restore.map_or(Ok(()), |restore| restore.take(bytes));
        taken.map_err(|error| Error::file("read", self.path(), error))
    }

    /// Nothing more may be sent: a restore fails that has not finished. What was sent before can be read.
    pub(super) fn shut(&mut self, on_change: &mut OnSocketChange<'_>) {
        if let Some(open) = &mut self.open {
            open.shut(on_change);
        }
    }

    /// Reads nothing any more.
    pub(super) fn close(&mut self, on_change: &mut OnSocketChange<'_>) {
        if self.open.take().is_some() {
            on_change(SocketChange::Over, None);
        }
    }
}

impl Open {
    fn new(listener: Option<UnixListener>) -> io::Result<Open> {
        let poll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let mut open = Open {
            poll,
            listener: None,
            undecided: Vec::new(),
            restore: None,
            next_number: 0,
            unhandled: None,
        };
        if let Some(listener) = listener {
            listener.set_nonblocking(true)?;
            open.watch(&listener)?;
            open.listener = Some(listener);
        }
        Ok(open)
    }

    /// Each message wakes once, not for as long as it stays in the socket.
    fn watch(&self, socket: &impl AsFd) -> io::Result<()> {
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
        Ok(self.poll.add(socket, EpollEvent::new(flags, 0))?)
    }

    /// A socket of which there are copies stays in the poll when it is closed here.
    fn unwatch(&self, socket: &impl AsFd) {
        let _ = self.poll.delete(socket);
    }

    /// What has come is looked at now, and wakes nobody again.
    fn drain(&self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); UNDECIDED_MAX];
        loop {
            match self.poll.wait(&mut events, EpollTimeout::ZERO) {
                Ok(count) if count < events.len() => return Ok(()),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// The first message of one of the connections: it is the restore. Anybody may connect, for a look or by
    /// mistake, so a peer that leaves without a message, or sends what no restore does, changes nothing, unless it can be a
    /// restore that has failed.
    fn first_message(&mut self, on_change: &mut OnSocketChange<'_>) -> io::Result<Option<Message>> {
        self.accept(on_change)?;
        let mut at = 0;
        while at < self.undecided.len() {
            let connection = &self.undecided[at];
            let failed = match connection.look() {
                Ok(None) => {
                    at += 1;
                    continue;
                }
                Ok(Some(message)) if !matches!(message.event, IntakeEvent::End) => {
                    self.choose(at, on_change);
                    return Ok(Some(message));
                }
                Ok(Some(end)) if connection.may_be_restore => return Ok(Some(end)),
                Ok(Some(_)) => None,
                Err(error) if connection.may_be_restore => return Err(error),
                Err(error) => Some(error),
            };
            match failed {
                None => tracing::warn!("a connection to {SOCKET_NAME} has ended without a message"),
                Some(error) => {
                    tracing::warn!("a connection to {SOCKET_NAME} is from no restore: {error}");
                }
            }
            self.drop_undecided(at, on_change);
        }
        Ok(None)
    }

    /// The undecided connection at `at` is the restore. Nobody else is waited for.
    fn choose(&mut self, at: usize, on_change: &mut OnSocketChange<'_>) {
        let restore = self.undecided.swap_remove(at);
        let number = restore.number;
        self.restore = Some(restore);
        for other in std::mem::take(&mut self.undecided) {
            self.unwatch(&other);
        }
        if let Some(listener) = self.listener.take() {
            self.unwatch(&listener);
            shut_listener(&listener);
        }
        on_change(SocketChange::Chosen { number }, None);
    }

    fn drop_undecided(&mut self, at: usize, on_change: &mut OnSocketChange<'_>) {
        let connection = self.undecided.remove(at);
        self.unwatch(&connection);
        let number = connection.number;
        on_change(SocketChange::Dropped { number }, None);
    }

    /// Takes all that have connected.
    fn accept(&mut self, on_change: &mut OnSocketChange<'_>) -> io::Result<()> {
        while let Some(listener) = &self.listener {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // It was shut, and all that had connected before are taken.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => break,
                Err(error) => return Err(error),
            };
            // At once: a connection that was accepted, and of which there is no copy yet, ends with this process.
            let number = self.next_number;
            on_change(SocketChange::Accepted { number }, Some(stream.as_fd()));
            self.next_number += 1;
            self.watch(&stream)?;
            let stray = |connection: &Connection| !connection.may_be_restore;
            if self.undecided.len() >= UNDECIDED_MAX
                && let Some(oldest) = self.undecided.iter().position(stray)
            {
                self.drop_undecided(oldest, on_change);
            }
            self.undecided.push(Connection::new(number, stream)?);
        }
        Ok(())
    }

    fn shut(&mut self, on_change: &mut OnSocketChange<'_>) {
        if let Some(listener) = &self.listener {
            shut_listener(listener);
        }
        // Whoever has connected before may have sent all its messages.
        if let Err(error) = self.accept(on_change) {
            tracing::warn!("cannot look who has connected to {SOCKET_NAME}: {error}");
        }
        let connections = self.undecided.iter().chain(&self.restore);
        connections.for_each(Connection::shut);
    }
}

/// Lets nobody connect any more, whoever else has a copy.
fn shut_listener(listener: &UnixListener) {
    // One that is shut needs no end.
    let _ = SockRef::from(listener).shutdown(Shutdown::Both);
}

#[cfg(test)]
mod tests;
