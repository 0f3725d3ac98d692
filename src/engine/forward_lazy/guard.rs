//! A second process that gives the dump up by a message when the forwarder is killed.
//!
//! ```text
//! forwarder ── a copy of the dump's connection ──> guard
//!     ├─ is about to send CLOSE ─────────────────> has nothing to send from then on
//!     ├─ ends, whatever its exit code ───────────> ends as well
//!     └─ is killed: the socket ends ─────────────> GIVE_UP, then the reset
//! ```
//!
//! The kernel resets the connection of a process that is killed. Behind a relay (`ssh -L`, a TCP proxy) the dump
//! sees an orderly end instead, takes it for success and kills its processes. Only a message prevents that, and only a
//! process that lives can send it. The connection stays open in the guard until it has.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::engine::restore::SourceSockets;
use crate::error::{Error, Kind, Result};
use crate::sys::fdpass;

/// The dump's connection comes with this message.
const HOLD: u8 = b'h';
/// The dump is told next that a client has everything.
const CLOSING: u8 = b'c';
/// The forwarder has told the dump itself.
const DISMISSED: u8 = b'd';

/// How long the guard may take to end: it has nothing else to do.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Both ends of what connects the two processes, before there are two.
#[derive(Debug)]
pub struct GuardEnds {
    forwarder: UnixStream,
    guard: UnixStream,
}

/// The guard, as seen from the forwarder. Dropping it lets the guard end.
#[derive(Debug)]
pub struct DumpGuard(UnixStream);

impl GuardEnds {
    /// To be made before the fork that makes two processes of this one.
    pub fn new() -> Result<GuardEnds> {
        let pair = UnixStream::pair().map_err(|error| {
            let text = "cannot reach a process that guards the dump";
            Error::wrap(Kind::Io, text, error)
        });
        let (forwarder, guard) = pair?;
        Ok(GuardEnds { forwarder, guard })
    }

    /// What the forwarder keeps.
    pub fn forward(self) -> DumpGuard {
        DumpGuard(self.forwarder)
    }

    /// What the guard does, until the forwarder has ended.
    pub fn guard(self) -> Result<()> {
        drop(self.forwarder);
        let killed = follow(&self.guard).map_err(|error| {
            let text = "the process that guards the dump cannot receive from the forwarder";
            Error::wrap(Kind::Io, text, error)
        })?;
        if let Some(dump) = killed {
            tracing::error!("the forwarder was killed: the dump fails, its processes continue");
            dump.give_up();
            dump.reset();
        }
        Ok(())
    }
}

/// Does as the forwarder says. When that has ended without a message, the dump is given up.
fn follow(forwarder: &UnixStream) -> io::Result<Option<SourceSockets>> {
    let mut held = None;
    let mut message = [0];
    loop {
        let received = match fdpass::receive(forwarder.as_fd(), &mut message) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(held),
            received => received?,
        };
        match (received.bytes, message[0]) {
            (0, _) => return Ok(held),
            (_, HOLD) => held = received.fd.map(SourceSockets::of_stream),
            (_, CLOSING | DISMISSED) => held = None,
            (_, other) => return Err(io::Error::other(format!("message {other}"))),
        }
        if message[0] == DISMISSED {
            return Ok(None);
        }
    }
}

impl DumpGuard {
    /// The guard holds a copy of `dump` from now on.
    pub(super) fn hold(&self, dump: BorrowedFd<'_>) {
        self.send(HOLD, Some(dump));
    }

    /// The dump is about to be told that a client has everything: nothing may contradict that.
    pub(super) fn note_closing(&self) {
        self.send(CLOSING, None);
    }

    fn send(&self, message: u8, fd: Option<BorrowedFd<'_>>) {
        if let Err(error) = fdpass::send(self.0.as_fd(), &[message], fd) {
            tracing::warn!(
                "the process that guards the dump is lost ({error}): if this one is killed behind a relay, the \
                 dump may take that for success"
            );
        }
    }
}

impl Drop for DumpGuard {
    fn drop(&mut self) {
        // Its copy of the connection is to be closed now. If it is gone, or does not end in time, there is nothing
        // left to do about it.
        let sent = fdpass::send(self.0.as_fd(), &[DISMISSED], None);
        let patient = sent.and_then(|()| self.0.set_read_timeout(Some(TIMEOUT)));
        let _ended = patient.and_then(|()| self.0.read(&mut [0]));
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::thread::spawn;

    use super::*;
    use crate::criu::header::GIVE_UP;

    /// What the dump receives when the forwarder has done as `ends` says.
    fn received(ends: impl FnOnce(DumpGuard)) -> Vec<u8> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut dump, _) = listener.accept().unwrap();
        let GuardEnds { forwarder, guard } = GuardEnds::new().unwrap();
        let ended = spawn(move || follow(&guard).map(|held| held.inspect(SourceSockets::give_up)));
        let forwarder = DumpGuard(forwarder);
        forwarder.hold(client.as_fd());
        drop(client);
        ends(forwarder);
        drop(ended.join().unwrap().unwrap());
        let mut words = Vec::new();
        dump.read_to_end(&mut words).unwrap();
        words
    }

    #[test]
    fn a_dump_is_notified_of_a_forwarder_that_is_gone_and_of_no_other() {
        let killed = |guard: DumpGuard| {
            guard.0.shutdown(std::net::Shutdown::Both).unwrap();
            std::mem::forget(guard);
        };
        assert_eq!(received(killed), GIVE_UP);
        assert_eq!(received(drop), b"");
        let closing = |guard: DumpGuard| {
            guard.note_closing();
            killed(guard);
        };
        assert_eq!(received(closing), b"");
    }
}
