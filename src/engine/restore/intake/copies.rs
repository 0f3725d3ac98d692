//! What another process, or the service manager, keeps of an intake: copies of its sockets, with all that was not read.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;

/// What happens to the sockets of an intake, as whoever keeps copies is notified of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::engine::restore) enum SocketChange {
    /// There is the listening socket, which comes along, with the device and the number of its file.
    Listening { device: u64, inode: u64 },
    /// A connection, which comes along, was accepted and has this number.
    Accepted { number: u32 },
    /// The connection of this number is closed: it is no restore.
    Dropped { number: u32 },
    /// The connection of this number is the restore: it alone stays, and nobody listens any more.
    Chosen { number: u32 },
    /// Nothing is read any more.
    Over,
}

/// See the module's text.
#[derive(Debug, Default)]
pub(in crate::engine::restore) struct IntakeCopies {
    pub(in crate::engine::restore) listener: Option<OwnedFd>,
    /// Device and number of the socket's file.
    pub(in crate::engine::restore) file: Option<(u64, u64)>,
    /// By their numbers.
    pub(in crate::engine::restore) connections: BTreeMap<u32, OwnedFd>,
    /// Which of them is the restore.
    pub(in crate::engine::restore) restore: Option<u32>,
}

impl IntakeCopies {
    /// Does what was done to the sockets themselves.
    pub(in crate::engine::restore) fn apply(&mut self, change: SocketChange, fd: Option<OwnedFd>) {
        match change {
            SocketChange::Listening { device, inode } => {
                self.listener = fd;
                self.file = Some((device, inode));
            }
            SocketChange::Accepted { number } => {
                self.connections.extend(fd.map(|fd| (number, fd)));
            }
            SocketChange::Dropped { number } => drop(self.connections.remove(&number)),
            SocketChange::Chosen { number } => {
                self.listener = None;
                self.connections.retain(|other, _| *other == number);
                self.restore = Some(number);
            }
            SocketChange::Over => {
                self.listener = None;
                self.connections.clear();
                self.restore = None;
            }
        }
    }

    /// The same sockets once more. They leave the file alone.
    pub(in crate::engine::restore) fn copy(&self) -> io::Result<IntakeCopies> {
        let connections = self.connections.iter();
        let connections = connections.map(|(number, socket)| Ok((*number, socket.try_clone()?)));
        Ok(IntakeCopies {
            listener: self.listener.as_ref().map(OwnedFd::try_clone).transpose()?,
            file: None,
            connections: connections.collect::<io::Result<_>>()?,
            restore: self.restore,
        })
    }

    /// Whether nothing can come any more.
    pub(in crate::engine::restore) fn is_over(&self) -> bool {
        self.listener.is_none() && self.connections.is_empty()
    }
}
