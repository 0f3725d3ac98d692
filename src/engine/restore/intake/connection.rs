//! A connection to `lazy-pages.socket`, whose messages stay in the socket until they have been handled: whoever has a copy
//! of it finds what a killed process had not handled.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;

use crate::criu::lazy_socket::{RECORD_BYTES, Record};
use crate::sys::fdpass;
use crate::sys::uffd::Uffd;

/// A record, and the byte that a descriptor rides on.
const PROCESS_BYTES: usize = RECORD_BYTES + 1;

/// What a message of the restore means.
#[derive(Debug)]
pub(in crate::engine::restore) enum IntakeEvent {
    /// A process is being restored; its memory has this userfaultfd. Its pid on this host stands behind; 0 if
    /// that cannot be told here.
    Process(u32, Uffd, i32),
    /// A zombie: it has no memory.
    Zombie(u32),
    /// Every process is restored.
    Finished,
    /// Nothing more will come: the restore has finished, or hung up before.
    End,
}

/// A message, and how many bytes of the socket it takes.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) event: IntakeEvent,
    pub(super) bytes: usize,
}

impl Message {
    /// Nothing more comes.
    const END: Message = Message {
        event: IntakeEvent::End,
        bytes: 0,
    };
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Connection {
    /// By which whoever keeps a copy knows it.
    pub(super) number: u32,
    stream: UnixStream,
    /// Nothing is known that speaks against a restore at the other end.
    pub(super) may_be_restore: bool,
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Connection {
    pub(super) fn new(number: u32, stream: UnixStream) -> io::Result<Connection> {
        stream.set_nonblocking(true)?;
        Ok(Connection {
            number,
            may_be_restore: may_be_restore(&stream),
            stream,
        })
    }

    /// The next message, `None` if it is not there as a whole yet. It stays in the socket.
    pub(super) fn look(&self) -> io::Result<Option<Message>> {
        // In this order: what has come before the end is seen.
        let ends = fdpass::hangs_up(self.as_fd())?;
        let incomplete = || Ok(ends.then_some(Message::END));
        let mut bytes = [0; PROCESS_BYTES];
        let peeked = loop {
            match fdpass::peek(self.as_fd(), &mut bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                // It died within a message.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Ok(Some(Message::END));
                }
                peeked => break peeked?,
            }
        };
        if peeked.bytes == 0 {
            return Ok(Some(Message::END));
        }
        let Some(record) = bytes[..peeked.bytes].first_chunk::<RECORD_BYTES>() else {
            return incomplete();
        };
        let (event, bytes) = match Record::decode(*record) {
            Record::Zombie(pid) => (IntakeEvent::Zombie(pid), RECORD_BYTES),
            Record::Finished => (IntakeEvent::Finished, RECORD_BYTES),
            Record::Process(_) if peeked.bytes < PROCESS_BYTES => return incomplete(),
            Record::Process(pid) => {
                let fd = peeked.fd.ok_or_else(|| {
                    io::Error::other(format!("the record of pid {pid} has no userfaultfd"))
                })?;
                // The process itself hands its userfaultfd over.
                let host = peeked.sender.unwrap_or(0);
                (
                    IntakeEvent::Process(pid, Uffd::from(fd), host),
                    PROCESS_BYTES,
                )
            }
        };
        Ok(Some(Message { event, bytes }))
    }

    /// Takes what was handled, `bytes` long, out of the socket.
    pub(super) fn take(&self, bytes: usize) -> io::Result<()> {
        fdpass::discard(self.as_fd(), bytes)
    }

    /// Nothing more may be sent: what the other end sends from now on fails there, whoever else has a copy. What was
    /// sent before can be read.
    pub(super) fn shut(&self) {
        // One that has ended needs no end.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

/// Whether a restore can be at the other end of `stream`: by the command line of who connected. Where that is in
/// a PID namespace of its own nothing is known. Who is gone by now is none: a restore stays until it has sent something or
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
    let actions = ["restore", "swrk", "service"].map(str::as_bytes);
    of("comm").starts_with(b"criu")
        || line
            .split(|byte| *byte == 0)
            .any(|arg| actions.contains(&arg))
}
