//! What moves bytes for a session: one trait, two drivers that behave the same.
//!
//! ```text
//! ingest --submit--> driver --wait--> completion
//!            |
//!            +- Receive   socket -> buffer                  one at a time
//!            +- Write     buffer -> files                   many at a time, meanwhile
//! ```
//!
//! An operation owns its buffer and keeps its file open until it completes. The engine never waits
//! for a write unless all its buffers are on the way, so that receiving and writing overlap.

use std::fmt;
use std::io;
use std::num::NonZero;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::Socket;

use crate::engine::io::batch::Batch;
use crate::error::{Error, Kind, Result};
use crate::stream::silent;
use crate::sys::buffers::Buffer;

/// What a driver is to do.
#[derive(Debug)]
pub enum Operation {
    /// Receive what there is, at least a byte, into the window of the buffer.
    Receive {
        /// Where to.
        buffer: Buffer,
        /// Which part of it may be filled.
        window: Range<usize>,
    },
    /// Write a batch.
    Write(Batch),
}

/// What a driver has done.
#[derive(Debug)]
pub enum Completion {
    /// A receive: the buffer, and how many bytes came into its window. 0 is the end of the stream.
    Received {
        /// The operation's buffer.
        buffer: Buffer,
        /// Bytes received.
        bytes: usize,
    },
    /// A batch is in the files.
    Written(Batch),
}

/// A driver for one session. Errors name the peer or the file, and end the session: whatever is in
/// flight then is given up when the driver is dropped.
pub trait Driver: fmt::Debug {
    /// Begins an operation. At most one that uses the socket may be in flight.
    fn submit(&mut self, operation: Operation) -> Result<()>;

    /// Waits for an operation to complete.
    fn wait(&mut self) -> Result<Completion>;

    /// Waits until everything is in the files. Batches that complete meanwhile are dropped.
    fn drain(&mut self) -> Result<()>;
}

/// The connection that a driver receives from.
#[derive(Clone, Debug)]
pub struct Link {
    /// The socket.
    pub socket: Arc<Socket>,
    /// How long the peer may be silent.
    pub idle_timeout: Option<Duration>,
}

impl Link {
    /// Receives what is there now; fails with `WouldBlock` if nothing is.
    pub(in crate::engine) fn receive_now(&self, into: &mut [u8]) -> io::Result<usize> {
        nix::sys::socket::recv(
            std::os::fd::AsRawFd::as_raw_fd(self.socket.as_ref()),
            into,
            nix::sys::socket::MsgFlags::MSG_DONTWAIT,
        )
        .map_err(io::Error::from)
    }

    /// Waits until the socket has something, or its end.
    pub(in crate::engine) fn await_readable(&self) -> Result<()> {
        let timeout = match self.idle_timeout {
            None => PollTimeout::NONE,
            Some(most) => PollTimeout::try_from(most).unwrap_or(PollTimeout::MAX),
        };
        let mut sockets = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut sockets, timeout) {
                Ok(0) => return Err(self.silent()),
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(self.lost(errno.into())),
            }
        }
    }

    /// The error for a socket that fails.
    pub(in crate::engine) fn lost(&self, error: io::Error) -> Error {
        Error::wrap(Kind::PeerLost, "the connection is lost", error)
    }

    /// The error for a peer that says nothing any more.
    pub(in crate::engine) fn silent(&self) -> Error {
        silent(self.idle_timeout)
    }
}

/// CPUs that are busy while a dump is received: the one that its sender, or the network, needs, and the
/// session's own.
const BUSY_CPUS: usize = 2;

/// When files are written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Writes {
    /// While bytes are received.
    Beside,
    /// Before more bytes are received.
    Between,
}

impl Writes {
    /// What is better on this machine.
    pub fn of_machine() -> Writes {
        match available_parallelism().map(NonZero::get) {
            Ok(..=BUSY_CPUS) => Writes::Between,
            _ => Writes::Beside,
        }
    }
}

/// Whether a call only asks to be made again.
pub(in crate::engine) fn is_retryable(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, WouldBlock};
    matches!(error.kind(), Interrupted | WouldBlock)
}
