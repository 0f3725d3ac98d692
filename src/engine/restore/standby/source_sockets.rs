//! Copies of the source's connections, to give them up when the process that used them was killed.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};

use crate::criu::header::GIVE_UP;
use crate::engine::restore::links::link::GIVE_UP_TIMEOUT;
use crate::sys::disconnect;

/// The stream's connection, and that for faults.
#[derive(Debug, Default)]
pub(in crate::engine) struct SourceSockets([Option<OwnedFd>; 2]);

impl SourceSockets {
    /// The only connection to a source.
    pub(in crate::engine) fn of_stream(socket: OwnedFd) -> SourceSockets {
        SourceSockets([Some(socket), None])
    }

    /// A new connection, in place of the one before.
    pub(in crate::engine) fn replace(&mut self, faults: bool, socket: Option<OwnedFd>) {
        self.0[usize::from(faults)] = socket;
    }

    /// Tells the source that nobody goes on with its connections, without waiting. A request may have been half
    /// sent; over TLS this breaks the record that is due. Either way the session fails.
    pub(in crate::engine) fn give_up(&self) {
        for socket in self.0.iter().flatten() {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            // One that is over needs no end.
            let _ = send(socket.as_raw_fd(), &GIVE_UP, flags);
        }
    }

    /// Waits a moment until the source has hung up, then resets the connections.
    pub(in crate::engine) fn reset(self) {
        let deadline = Instant::now() + GIVE_UP_TIMEOUT;
        let mut discarded = [0; 16 << 10];
        while let [Some(stream), _] = &self.0
            && Instant::now() < deadline
        {
            match recv(stream.as_raw_fd(), &mut discarded, MsgFlags::MSG_DONTWAIT) {
                Ok(1..) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    let rest = deadline.saturating_duration_since(Instant::now());
                    let rest = PollTimeout::try_from(rest).unwrap_or(PollTimeout::ZERO);
                    let mut polled = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
                    // What fails to be waited for is not waited for.
                    let _ = poll(&mut polled, rest);
                }
                Ok(0) | Err(_) => break,
            }
        }
        for socket in self.0.iter().flatten() {
            disconnect::reset(socket.as_fd());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_source_reads_what_was_sent_before_the_reset() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        let mut sockets = SourceSockets::default();
        sockets.replace(false, Some(client.try_clone().unwrap().into()));
        sockets.give_up();
        let mut bytes = [0; GIVE_UP.len()];
        server.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, GIVE_UP);
        let resets = std::thread::spawn(move || sockets.reset());
        // It hangs up, and reads no more.
        server.shutdown(std::net::Shutdown::Write).unwrap();
        resets.join().unwrap();
        let error = server.read(&mut bytes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
}
