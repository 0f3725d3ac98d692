//! A second process that takes over when the first one is killed. Otherwise the kernel would close the userfaultfds, and
//! the restored processes would read zeros.
//!
//! ```text
//! serving ── each process and its userfaultfd, each event of its memory ──> standby
//!     ├─ the sockets that CRIU speaks to, with what is unread in them ───> keeps copies
//!     ├─ ends, whatever its exit code ───────────────────────────────────> ends as well
//!     └─ is killed: the socket ends without a dismissal ─────────────────> takes over
//! ```
//!
//! The standby knows what was missing at the start and where it is now. It does not know what has come since: the kernel
//! says so when a page is filled that is present. It connects to the source again, as after a broken link, if the source
//! allows that. Else it treats the processes as [`OnLoss`] says.
//!
//! Invariants:
//!
//! - The standby reads nothing from a userfaultfd.
//! - It uses its copies of the source's connections only to give up by a message when the serving process is killed. So
//!   CRIU's source lives on where a relay hides a reset as well.
//! - A source is told of the end only if the restore had finished.
//! - CRIU sends userfaultfds and waits for no answer. So each message stays in its socket until the standby has been told
//!   of it. The standby reads on there if it takes over, and goes on with a restore that has not finished.
//! - The kernel hands out an event once, so events are read into memory that both processes share ([`RestoreState`]). The
//!   standby finds there what was read and not yet sent. If that was a fork, the userfaultfd of the child is lost:
//!   nobody can fill its memory, and the processes are killed.
//!
//! [`OnLoss`]: super::OnLoss

mod journal;
mod messages;
mod source_sockets;
mod stored;
mod takeover;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytemuck::Zeroable;
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, recv, shutdown, socketpair,
};
use socket2::SockRef;

use super::Restore;
use super::intake::SocketChange;
use crate::error::{Error, Kind, Result};
use crate::lazy::planner::SpaceId;
use crate::sys::fdpass;
use crate::sys::shared::{RestoreState, Shared};
use crate::sys::uffd::{Message, MessageBuffer};
use journal::Journal;
use messages::MessageBytes;
pub(super) use messages::StandbyMessage;
pub(in crate::engine) use source_sockets::SourceSockets;
pub use stored::{Received, StoredRestore};

/// How long the standby may take to receive a message, or to end: it has nothing else to do.
const TIMEOUT: Duration = Duration::from_secs(1);

/// The events that were read last, but for those that are among the first `sent` ever.
fn unsent_events(state: &RestoreState, sent: u64) -> impl Iterator<Item = io::Result<Message>> {
    let of_these = sent.saturating_sub(state.sent_before.load(Ordering::SeqCst));
    let events = state.room.messages();
    let events = events.filter(|message| !matches!(message, Ok(Message::Fault(_))));
    events.skip(usize::try_from(of_these).unwrap_or(usize::MAX))
}

/// Both ends of what connects the two processes, before there are two.
#[derive(Debug)]
pub struct Ends {
    serving: OwnedFd,
    standing_by: OwnedFd,
    shared: Shared<RestoreState>,
}

/// Who stands by, as seen from the one that serves. Dropping it lets that one end.
#[derive(Debug)]
pub struct Standby {
    successor: Successor,
    shared: Shared<RestoreState>,
    /// Events so far.
    events: u64,
}

/// Who goes on if this process is killed.
#[derive(Debug)]
enum Successor {
    /// A process at the other end of this socket.
    Process(OwnedFd),
    /// This service when it is started again.
    Restarted(Journal),
}

/// Who serves, as seen from the one that stands by.
#[derive(Debug)]
pub struct Watch {
    socket: OwnedFd,
    shared: Shared<RestoreState>,
}

impl Ends {
    /// To be made before the fork that makes two processes of this one.
    pub fn new() -> Result<Ends> {
        let failed = |error| {
            Error::wrap(
                Kind::Io,
                "cannot make a socket for the standby process",
                error,
            )
        };
        let (family, kind) = (AddressFamily::Unix, SockType::SeqPacket);
        let pair = socketpair(family, kind, None, SockFlag::SOCK_CLOEXEC);
        let (serving, standing_by) = pair.map_err(|errno| failed(errno.into()))?;
        let socket = SockRef::from(&serving);
        let timeouts = socket.set_write_timeout(Some(TIMEOUT));
        timeouts
            .and_then(|()| socket.set_read_timeout(Some(TIMEOUT)))
            .map_err(failed)?;
        Ok(Ends {
            serving,
            standing_by,
            shared: Shared::new().map_err(failed)?,
        })
    }

    /// What the process keeps that serves.
    pub fn serve(self) -> Standby {
        Standby {
            successor: Successor::Process(self.serving),
            shared: self.shared,
            events: 0,
        }
    }

    /// What the process keeps that stands by.
    pub fn stand_by(self) -> Watch {
        Watch {
            socket: self.standing_by,
            shared: self.shared,
        }
    }
}

impl Standby {
    fn send(&mut self, message: StandbyMessage, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let record = message.encode(self.events);
        if let StandbyMessage::Socket(SocketChange::Listening { device, inode }) = message {
            let [of_device, of_inode] = &self.shared.socket_file;
            of_device.store(device, Ordering::SeqCst);
            of_inode.store(inode, Ordering::SeqCst);
        }
        match &mut self.successor {
            Successor::Process(socket) => {
                fdpass::send(socket.as_fd(), bytemuck::bytes_of(&record), fd)
            }
            Successor::Restarted(journal) => journal.note(message, record, fd),
        }
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // As good as killed.
            return;
        }
        self.shared.dismissed.store(1, Ordering::SeqCst);
        match &mut self.successor {
            Successor::Process(socket) => {
                // Its copies of the userfaultfds are to be closed before this process ends. If it is gone, or does
                // not end in time, there is nothing left to do about it.
                let socket = socket.as_raw_fd();
                let told = shutdown(socket, Shutdown::Write);
                let _ended = told.and_then(|()| recv(socket, &mut [0], MsgFlags::empty()));
            }
            Successor::Restarted(journal) => journal.end(),
        }
    }
}

impl Watch {
    /// What the one that serves tells next, or `None` when it has ended.
    fn next(&self) -> io::Result<Option<(StandbyMessage, u64, Option<OwnedFd>)>> {
        let mut record = MessageBytes::zeroed();
        let bytes = bytemuck::bytes_of_mut(&mut record);
        let whole = bytes.len();
        let received = loop {
            match fdpass::receive(self.socket.as_fd(), bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                received => break received?,
            }
        };
        match received.bytes {
            0 => Ok(None),
            bytes if bytes == whole => {
                let message = StandbyMessage::decode(record)?;
                Ok(Some((message, record.events, received.fd)))
            }
            bytes => Err(io::Error::other(format!("a message of {bytes} bytes"))),
        }
    }
}

/// Notifies whoever stands by, if anybody does.
pub(super) fn notify(
    standing_by: &mut Option<Standby>,
    message: StandbyMessage,
    fd: Option<BorrowedFd<'_>>,
) {
    let Some(standby) = standing_by else {
        return;
    };
    if let Err(error) = standby.send(message, fd) {
        let what = match &standby.successor {
            Successor::Process(_) => "the standby process is lost",
            Successor::Restarted(_) => "the service manager does not keep descriptors any more",
        };
        *standing_by = None;
        tracing::warn!("{what} ({error}): if this process is killed, the restored ones read zeros");
    }
}

impl Restore {
    /// Notifies the standby, if there is one.
    pub(super) fn notify_standby(&mut self, message: StandbyMessage, fd: Option<BorrowedFd<'_>>) {
        notify(&mut self.standby, message, fd);
    }

    /// Where the next messages of process `id` are to be read to.
    pub(super) fn room_for(&self, id: SpaceId) -> &MessageBuffer {
        let Some(standby) = &self.standby else {
            self.room.clear();
            return &self.room;
        };
        let shared = &standby.shared;
        // In this order: messages that were sent are never taken for others.
        shared.room.clear();
        shared.sent_before.store(standby.events, Ordering::SeqCst);
        shared.read_of.store(id.0, Ordering::SeqCst);
        &shared.room
    }

    /// The next of the events that were read is handled now.
    pub(super) fn note_event(&mut self) {
        if let Some(standby) = &mut self.standby {
            standby.events += 1;
        }
    }

    /// The restore has finished.
    pub(super) fn note_finished(&self) {
        if let Some(standby) = &self.standby {
            standby.shared.finished.store(1, Ordering::SeqCst);
        }
    }

    /// The source can be reached again.
    pub(super) fn note_ours(&self) {
        if let Some(standby) = &self.standby {
            standby.shared.ours.store(1, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::uffd::Fault;
    use crate::units::{PageRange, Vaddr};

    fn read_at(address: u64) -> Message {
        Message::Fault(Fault {
            address: Vaddr(address),
            is_write: false,
            thread: 0,
        })
    }

    fn both() -> (Standby, Watch) {
        let ends = Ends::new().unwrap();
        let shared = ends.shared;
        let watch = Watch {
            socket: ends.standing_by,
            shared,
        };
        let standby = Standby {
            successor: Successor::Process(ends.serving),
            shared,
            events: 0,
        };
        (standby, watch)
    }

    #[test]
    fn messages_arrive_in_order() {
        let (mut standby, watch) = both();
        let (read, _write) = nix::unistd::pipe().unwrap();
        let uffd = read;
        let (id, parent) = (SpaceId(8), SpaceId(7));
        let range = PageRange::new(0x1000, 0x5000);
        let to = Vaddr(0x9000);
        let messages = [
            (StandbyMessage::Source { faults: true }, Some(&uffd)),
            (
                StandbyMessage::Process {
                    id,
                    pid: 12,
                    host: 4711,
                    started: 1 << 40,
                },
                Some(&uffd),
            ),
            (StandbyMessage::Fork { id, parent }, Some(&uffd)),
            (
                StandbyMessage::Remap {
                    id,
                    from: range,
                    to,
                },
                None,
            ),
            (StandbyMessage::Gone { id, range }, None),
            (StandbyMessage::Exited { id }, None),
            (
                StandbyMessage::Socket(SocketChange::Listening {
                    device: 1 << 40,
                    inode: 1 << 41,
                }),
                Some(&uffd),
            ),
            (
                StandbyMessage::Socket(SocketChange::Accepted { number: 3 }),
                Some(&uffd),
            ),
            (
                StandbyMessage::Socket(SocketChange::Dropped { number: 4 }),
                None,
            ),
            (
                StandbyMessage::Socket(SocketChange::Chosen { number: 5 }),
                None,
            ),
            (StandbyMessage::Socket(SocketChange::Over), None),
        ];
        for (message, uffd) in messages {
            standby.events += 3;
            standby.send(message, uffd.map(AsFd::as_fd)).unwrap();
            let (received, events, fd) = watch.next().unwrap().unwrap();
            assert_eq!((received, fd.is_some()), (message, uffd.is_some()));
            assert_eq!(events, standby.events);
        }
        let ended = std::thread::spawn(move || {
            let last = watch.next().unwrap();
            (
                last.is_none(),
                watch.shared.dismissed.load(Ordering::SeqCst),
            )
        });
        drop(standby);
        assert_eq!(ended.join().unwrap(), (true, 1));
    }

    #[test]
    fn events_that_were_read_and_not_told_are_found() {
        let shared = Shared::<RestoreState>::new().unwrap();
        let unsent_events = |told| {
            let events = unsent_events(&shared, told).map(io::Result::unwrap);
            events.collect::<Vec<_>>()
        };
        assert_eq!(unsent_events(40), []);
        shared.sent_before.store(40, Ordering::SeqCst);
        let range = PageRange::new(0x1000, 0x5000);
        shared.room.put(0, read_at(0x1000));
        shared.room.put(1, Message::Unmap(range));
        shared.room.put(2, Message::Fork(3));
        shared.room.put(3, read_at(0x2000));
        shared.room.put(4, Message::Remove(range));
        let all = [
            Message::Unmap(range),
            Message::Fork(3),
            Message::Remove(range),
        ];
        assert_eq!(unsent_events(40), all);
        assert_eq!(unsent_events(41), all[1..]);
        assert_eq!(unsent_events(43), []);
        shared.room.clear();
        assert_eq!(unsent_events(40), []);
    }

    #[test]
    fn who_panics_dismisses_nobody() {
        let (standby, watch) = both();
        let panicked = std::thread::spawn(move || {
            let _standby = standby;
            panic!("on purpose");
        });
        assert!(panicked.join().is_err());
        assert!(watch.next().unwrap().is_none());
        assert_eq!(watch.shared.dismissed.load(Ordering::SeqCst), 0);
    }
}
