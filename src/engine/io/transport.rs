//! A byte stream that an event loop can use, whatever it runs over.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, Type};

use crate::error::{Error, Kind, Result};
use crate::stream::{Carrier, Stream};
use crate::tls::TlsStream;

/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A non-blocking stream.
pub trait Transport: Send + fmt::Debug {
    /// Receives what is there, at most `buffer.len()` bytes; 0 is the end of the stream.
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize>;

    /// Sends what it can of `bytes` and says how much that was.
    fn send(&mut self, bytes: &[u8]) -> io::Result<usize>;

    /// Whether [`Transport::receive`] has something although the socket may not be readable.
    fn has_buffered(&self) -> bool;

    /// How many of the bytes that were handed to [`Transport::send`] last, and not taken, are on their way all the
    /// same. `None` if nothing can be sent.
    fn begun(&self) -> Option<usize>;

    /// The socket, to poll.
    fn socket(&self) -> BorrowedFd<'_>;

    /// From now on closing ends the stream in order instead of resetting it.
    fn close_in_order(&mut self) -> io::Result<()>;
}

/// Takes an established connection into an event loop.
pub fn transport(stream: Stream) -> io::Result<Box<dyn Transport>> {
    Ok(match stream.into_carrier() {
        Carrier::Plain(socket) => Box::new(PlainTransport::new(socket)?),
        Carrier::Secure(stream) => Box::new(SecureTransport::new(*stream)?),
    })
}

/// A plain TCP or AF_UNIX socket.
#[derive(Debug)]
pub struct PlainTransport(Socket);

impl Transport for PlainTransport {
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        io::Read::read(&mut &self.0, buffer)
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        io::Write::write(&mut &self.0, bytes)
    }

    fn has_buffered(&self) -> bool {
        false
    }

    fn begun(&self) -> Option<usize> {
        Some(0)
    }

    fn socket(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn close_in_order(&mut self) -> io::Result<()> {
        self.0.set_linger(None)?;
        // By a message, for another process may hold the socket as well.
        self.0.shutdown(Shutdown::Write)
    }
}

/// A connection secured by TLS.
#[derive(Debug)]
pub struct SecureTransport {
    stream: TlsStream,
    /// Of the next bytes to send so many are encrypted already, and wait for the socket.
    encrypted: usize,
    /// What is to be sent when the handshake is over.
    early: Vec<u8>,
}

impl SecureTransport {
    /// Takes a connection into an event loop, before or after its handshake.
    pub fn new(stream: TlsStream) -> io::Result<SecureTransport> {
        stream.set_nonblocking(true)?;
        Ok(SecureTransport {
            stream,
            encrypted: 0,
            early: Vec::new(),
        })
    }

    fn send_early(&mut self) -> io::Result<()> {
        if !self.early.is_empty() && self.stream.is_established() {
            self.stream.write_all(&std::mem::take(&mut self.early))?;
            self.flush()?;
        }
        Ok(())
    }

    /// Sends as much of the ciphertext as the socket takes. True when none is left.
    fn flush(&mut self) -> io::Result<bool> {
        match self.stream.flush() {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl Transport for SecureTransport {
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let received = self.stream.read(buffer);
        self.send_early()?;
        received
    }

    /// Whoever was told [`io::ErrorKind::WouldBlock`] comes again with the same bytes in front.
    fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.stream.is_established() {
            self.early.extend_from_slice(bytes);
            return Ok(bytes.len());
        }
        if self.encrypted == 0 {
            self.encrypted = self.stream.write(bytes)?;
        }
        if !self.flush()? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(std::mem::take(&mut self.encrypted))
    }

    fn has_buffered(&self) -> bool {
        self.stream.has_buffered()
    }

    fn begun(&self) -> Option<usize> {
        self.stream.is_established().then_some(self.encrypted)
    }

    fn socket(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    fn close_in_order(&mut self) -> io::Result<()> {
        self.stream.socket().set_linger(None)?;
        self.stream.close()?;
        self.stream.socket().shutdown(Shutdown::Write)
    }
}

/// Where a source listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Peer {
    /// A TCP port at an address or name.
    Tcp {
        /// IPv4, IPv6 or a name.
        host: String,
        /// The port.
        port: u16,
    },
    /// A listening AF_UNIX socket.
    Unix(PathBuf),
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Peer::Tcp { host, port } => write!(f, "{host}:{port}"),
            Peer::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// The host that `--address` names: an address or a name, without a port. An IPv6 address may stand in
/// brackets.
pub fn parse_host(text: &str) -> std::result::Result<String, String> {
    let bracketed = text
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    let host = bracketed.unwrap_or(text);
    let scope = host.split_once('%').map_or(host, |(address, _)| address);
    if scope.parse::<std::net::Ipv6Addr>().is_ok() {
        return Ok(host.to_owned());
    }
    if let Ok(Peer::Tcp { host, port }) = Peer::parse(text) {
        return Err(format!(
            "it takes no port: give --address {host} --port {port}"
        ));
    }
    if bracketed.is_some() || host.is_empty() || host.contains([':', '/', ' ']) {
        return Err(format!(
            "{text:?} is neither an IP address nor the name of a host"
        ));
    }
    Ok(host.to_owned())
}

impl Peer {
    /// The peer that a command line names: `HOST:PORT`, with an IPv6 address in brackets.
    pub fn parse(text: &str) -> std::result::Result<Peer, String> {
        let wrong = || format!("{text:?} is not HOST:PORT");
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let bracketed = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'));
        let host = match bracketed {
            Some(address) => address,
            None if host.is_empty() || host.contains(':') => return Err(wrong()),
            None => host,
        };
        Ok(Peer::Tcp {
            host: host.to_owned(),
            port: port.parse().map_err(|_| wrong())?,
        })
    }

    /// The name or address that a certificate of the peer must be for.
    pub fn host(&self) -> &str {
        match self {
            Peer::Tcp { host, .. } => host,
            Peer::Unix(_) => "localhost",
        }
    }

    /// Connects, trying each address of a name. The socket resets its connection when it is closed,
    /// however that comes about, until [`Transport::close_in_order`]: a source that sees an orderly
    /// end takes it for success and gives up its memory.
    pub fn connect(&self) -> Result<Socket> {
        let failed = |error: io::Error| {
            Error::wrap(Kind::PeerLost, format!("cannot connect to {self}"), error)
        };
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in self.addresses().map_err(failed)? {
            match connect_to(&address) {
                Ok(socket) => return Ok(socket),
                Err(error) => last = error,
            }
        }
        Err(failed(last))
    }

    /// Finds the addresses of the peer's name.
    ///
    /// # Errors
    ///
    /// [`Kind::Usage`]: it has none. That will hardly change, unlike that nobody listens there.
    pub fn resolve(&self) -> Result<Vec<SockAddr>> {
        let found = self.addresses().and_then(|found| match found.is_empty() {
            true => Err(io::Error::other("the name has no address")),
            false => Ok(found),
        });
        found.map_err(|error| {
            let text = format!("the host {:?} cannot be found", self.host());
            Error::wrap(Kind::Usage, text, error)
        })
    }

    fn addresses(&self) -> io::Result<Vec<SockAddr>> {
        match self {
            Peer::Tcp { host, port } => {
                let found = std::net::ToSocketAddrs::to_socket_addrs(&(host.as_str(), *port))?;
                Ok(found.map(SockAddr::from).collect())
            }
            Peer::Unix(path) => Ok(vec![SockAddr::unix(path)?]),
        }
    }
}

fn connect_to(address: &SockAddr) -> io::Result<Socket> {
    let socket = Socket::new(address.domain(), Type::STREAM, None)?;
    socket.set_linger(Some(Duration::ZERO))?;
    if address.domain() == Domain::UNIX {
        socket.connect(address)?;
    } else {
        socket.connect_timeout(address, CONNECT_TIMEOUT)?;
        socket.set_tcp_nodelay(true)?;
        socket.set_keepalive(true)?;
    }
    Ok(socket)
}

impl PlainTransport {
    /// Takes a connected socket into an event loop.
    pub fn new(socket: Socket) -> io::Result<PlainTransport> {
        socket.set_nonblocking(true)?;
        Ok(PlainTransport(socket))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_no_port() {
        for host in ["host", "127.0.0.1", "::1", "fe80::1%eth0", "a-b.example"] {
            assert_eq!(parse_host(host), Ok(host.to_owned()));
        }
        assert_eq!(parse_host("[::1]"), Ok("::1".to_owned()));
        for text in ["host:27000", "127.0.0.1:7", "[::1]:7"] {
            let error = parse_host(text).unwrap_err();
            assert!(error.contains("--port"), "{error}");
        }
        for text in ["", "host:", "a b", "[host]", "http://host", "1:2:3"] {
            assert!(parse_host(text).is_err(), "{text}");
        }
    }

    #[test]
    fn peers_are_written_as_they_are_read() {
        for text in ["host:1", "127.0.0.1:65535", "[::1]:7"] {
            assert_eq!(Peer::parse(text).unwrap().to_string(), text);
        }
        for text in ["host", ":1", "::1:7", "host:", "host:65536", "host:x"] {
            assert!(Peer::parse(text).is_err(), "{text}");
        }
    }
}
