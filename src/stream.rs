//! A connection to a peer, whatever carries it: the engines read, write and reset it in one way.
//!
//! Keep-alive probes are on for TCP, so that a peer whose host is gone is noticed, and the Nagle
//! algorithm is off: a small frame is always somebody's waiting. Whether TLS is in between is seen
//! here alone.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use libc::{MSG_MORE, MSG_NOSIGNAL};
use nix::errno::Errno;
use nix::sys::sendfile::sendfile64;
use nix::sys::socket::{MsgFlags, recv};
use socket2::{SockRef, Socket, TcpKeepalive};

use crate::error::{Error, Kind, Result};
use crate::tls::{Tls, TlsStream};

/// How long a TCP peer may be silent before it is probed, and how long between the probes.
const KEEPALIVE: Duration = Duration::from_secs(20);

/// Zeros that are skipped in one go, bytes.
const SKIPPED_BYTES_MAX: usize = 64;

/// An open connection.
pub struct Stream {
    carrier: Carrier,
    peer: String,
}

/// What carries a connection.
#[derive(Debug)]
pub enum Carrier {
    /// The socket alone.
    Plain(Socket),
    /// TLS over a socket.
    Secure(Box<TlsStream>),
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
        let carrier = Carrier::Plain(socket);
        Stream { carrier, peer }
    }

    /// Who is at the other end, for messages.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// The peer's address without its port, for messages and names.
    pub fn host(&self) -> String {
        let address = self.socket().peer_addr().ok();
        match address.and_then(|address| address.as_socket()) {
            Some(address) => address.ip().to_canonical().to_string(),
            None => "local".to_owned(),
        }
    }

    /// Waits for the first byte that the peer sends, which stays to be read. Whether one has come: the peer
    /// may leave without.
    pub fn begins(&mut self) -> io::Result<bool> {
        let first = &mut [0];
        let have = match &mut self.carrier {
            Carrier::Plain(socket) => peek(socket, first, &[]),
            Carrier::Secure(stream) => stream.peek(first),
        };
        match have {
            Ok(have) => Ok(have > 0),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether the first bytes that the peer sends are `bytes`; waits for as many as it takes to
    /// tell, which over a plain connection one may do. They stay to be read.
    pub fn begins_with<const N: usize>(&mut self, bytes: [u8; N]) -> io::Result<bool> {
        let mut first = [0; N];
        let have = match &mut self.carrier {
            Carrier::Plain(socket) => peek(socket, &mut first, &bytes)?,
            Carrier::Secure(stream) => stream.peek(&mut first)?,
        };
        Ok(have == N && first == bytes)
    }

    /// Takes up to `most` zero bytes off a plain connection, and leaves what is not zero.
    pub fn skip_zeros(&mut self, mut most: usize) -> io::Result<()> {
        let Carrier::Plain(socket) = &self.carrier else {
            return Ok(());
        };
        let mut bytes = [0; SKIPPED_BYTES_MAX];
        while most > 0 {
            let next = &mut bytes[..most.min(SKIPPED_BYTES_MAX)];
            let have = recv(socket.as_raw_fd(), next, MsgFlags::MSG_PEEK)?;
            let zeros = next[..have].iter().take_while(|byte| **byte == 0).count();
            recv(
                socket.as_raw_fd(),
                &mut next[..zeros],
                MsgFlags::MSG_DONTWAIT,
            )?;
            most -= zeros;
            if zeros == 0 || zeros < have {
                break;
            }
        }
        Ok(())
    }

    /// What carries the connection, for whoever reads and writes in another way.
    pub fn into_carrier(self) -> Carrier {
        self.carrier
    }

    /// The same connection secured by `tls`, if that is given, as its server: waits for the client's
    /// handshake.
    pub fn secure(self, tls: Option<&Tls>) -> Result<Stream> {
        let Stream { carrier, peer } = self;
        let carrier = match (carrier, tls) {
            (Carrier::Plain(socket), Some(tls)) => {
                Carrier::Secure(Box::new(tls.accept(socket, &peer)?))
            }
            (carrier, _) => carrier,
        };
        Ok(Stream { carrier, peer })
    }

    /// The same connection secured by `tls`, if that is given, as a client of the server `host`.
    pub fn secure_to(self, tls: Option<&Tls>, host: &str) -> Result<Stream> {
        let Stream { carrier, peer } = self;
        let carrier = match (carrier, tls) {
            (Carrier::Plain(socket), Some(tls)) => {
                Carrier::Secure(Box::new(tls.connect(socket, host)?))
            }
            (carrier, _) => carrier,
        };
        Ok(Stream { carrier, peer })
    }

    /// Whether what is written goes over the socket as it is, so that the kernel alone can move
    /// bytes between it and a file.
    pub fn is_plain(&self) -> bool {
        matches!(self.carrier, Carrier::Plain(_))
    }

    /// The socket, for its options and for engines that move bytes past this type.
    pub fn socket(&self) -> SockRef<'_> {
        match &self.carrier {
            Carrier::Plain(socket) => SockRef::from(socket),
            Carrier::Secure(stream) => stream.socket(),
        }
    }

    /// Writes all of `bytes`, which more bytes follow soon: the kernel may hold back what does not
    /// fill a packet.
    pub fn write_more(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        let Carrier::Plain(socket) = &self.carrier else {
            return self.write_all(bytes);
        };
        while !bytes.is_empty() {
            match socket.send_with_flags(bytes, MSG_MORE | MSG_NOSIGNAL) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sends `len` bytes of `file` from `offset` on over a plain connection, without a copy, and adds to `sent`
    /// what it has sent. Fails with [`io::ErrorKind::UnexpectedEof`] if the file ends before, and with
    /// [`io::ErrorKind::Unsupported`] over another connection.
    pub fn send_file(
        &mut self,
        file: &File,
        offset: u64,
        len: u64,
        sent: &mut u64,
    ) -> io::Result<()> {
        let ends = (
            i64::try_from(offset),
            offset.checked_add(len).map(i64::try_from),
        );
        let (Ok(mut at), Some(Ok(end))) = ends else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        let Carrier::Plain(socket) = &self.carrier else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        while at < end {
            let left = usize::try_from(end - at).unwrap_or(usize::MAX);
            match sendfile64(socket, file, Some(&mut at), left) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(bytes) => *sent += bytes as u64,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Ends the connection so that the peer sees a failure and no end of file, which CRIU takes for
    /// success in some roles.
    pub fn reset(self) {
        // A socket that is gone already needs no reset.
        let _ = self.socket().set_linger(Some(Duration::ZERO));
    }

    /// Tells the peer that nothing more will come, where the connection has a message for that.
    pub fn end(&mut self) -> io::Result<()> {
        match &mut self.carrier {
            Carrier::Plain(_) => Ok(()),
            Carrier::Secure(stream) => stream.close(),
        }
    }
}

/// Fills `first` with the next bytes that come over `socket`, which stay to be read, for as long as they
/// go on like `expected`; fewer at the end.
fn peek(socket: &Socket, first: &mut [u8], expected: &[u8]) -> io::Result<usize> {
    let mut flags = MsgFlags::MSG_PEEK;
    loop {
        match recv(socket.as_raw_fd(), first, flags) {
            Ok(have) if have > 0 && have < first.len() && expected.starts_with(&first[..have]) => {
                // More must come before anything is told, unless this was all.
                if flags.contains(MsgFlags::MSG_WAITALL) {
                    return Ok(have);
                }
                flags |= MsgFlags::MSG_WAITALL;
            }
            Ok(have) => return Ok(have),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// The error for a peer that says nothing for `time_limit`, which the user has set.
pub fn silent(time_limit: Option<Duration>) -> Error {
    let seconds = time_limit.unwrap_or_default().as_secs();
    Error::new(
        Kind::PeerLost,
        format!("the peer has said nothing for {seconds} s (--idle-timeout)"),
    )
}

impl Read for Stream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        match &mut self.carrier {
            Carrier::Plain(socket) => socket.read(out),
            Carrier::Secure(stream) => stream.read(out),
        }
    }
}

/// Over a secure connection each write begins a record of its own, and [`Write::flush`] sends what was
/// written.
impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.carrier {
            Carrier::Plain(socket) => socket.send_with_flags(bytes, MSG_NOSIGNAL),
            Carrier::Secure(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.carrier {
            Carrier::Plain(_) => Ok(()),
            Carrier::Secure(stream) => stream.flush(),
        }
    }
}
