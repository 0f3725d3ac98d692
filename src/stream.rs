//! A connection to a peer, whatever carries it: the engines read, write and reset it in one way.
//!
//! Keep-alive probes are on for TCP, so that a peer whose host is gone is noticed, and the Nagle
//! algorithm is off: a small frame is always somebody's waiting.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;

use libc::{MSG_MORE, MSG_NOSIGNAL};
use nix::errno::Errno;
use nix::sys::sendfile::sendfile64;
use socket2::{SockRef, Socket, TcpKeepalive};

/// How long a TCP peer may be silent before it is probed, and how long between the probes.
const KEEPALIVE: Duration = Duration::from_secs(20);

/// An open connection.
pub struct Stream {
    socket: Socket,
    peer: String,
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream to {}", self.peer)
    }
}

impl Stream {
    /// A connection over `socket`, a connected TCP or AF_UNIX stream socket in blocking mode.
    pub fn plain(socket: impl Into<OwnedFd>) -> Stream {
        let socket = Socket::from(socket.into());
        let inet = socket.peer_addr().ok().and_then(|addr| addr.as_socket());
        let peer = match inet {
            Some(addr) => {
                // Both are improvements that a connection can do without.
                let _ = socket.set_tcp_nodelay(true);
                let probes = TcpKeepalive::new()
                    .with_time(KEEPALIVE)
                    .with_interval(KEEPALIVE);
                let _ = socket.set_tcp_keepalive(&probes);
                addr.to_string()
            }
            None => "a local socket".to_owned(),
        };
        Stream { socket, peer }
    }

    /// Who is at the other end, for messages.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// The socket, for its options and for engines that move bytes past this type.
    pub fn socket(&self) -> SockRef<'_> {
        SockRef::from(&self.socket)
    }

    /// Writes all of `bytes`, which more bytes follow soon: the kernel may hold back what does not
    /// fill a packet.
    pub fn write_more(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.socket.send_with_flags(bytes, MSG_MORE | MSG_NOSIGNAL) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sends `len` bytes of `file` from `offset` on, without a copy where the connection allows.
    /// Fails with [`io::ErrorKind::UnexpectedEof`] if the file ends before.
    pub fn send_file(&mut self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        let ends = (
            i64::try_from(offset),
            offset.checked_add(len).map(i64::try_from),
        );
        let (Ok(mut at), Some(Ok(end))) = ends else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        while at < end {
            let left = usize::try_from(end - at).unwrap_or(usize::MAX);
            match sendfile64(&self.socket, file, Some(&mut at), left) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Ends the connection so that the peer sees a failure and no end of file, which CRIU takes for
    /// success in some roles.
    pub fn reset(self) {
        // A socket that is gone already needs no reset.
        let _ = self.socket.set_linger(Some(Duration::ZERO));
    }
}

impl Read for Stream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.socket.read(out)
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.send_with_flags(bytes, MSG_NOSIGNAL)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
