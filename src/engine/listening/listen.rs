//! Where sessions come from: a listening socket of some kind, or a connection that is there already.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::os::fd::RawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::engine::io::transport::Peer;
use crate::engine::service_manager::FIRST_PASSED_FD;
use crate::error::{Error, Kind, Result};
use crate::sys::process::inherited_descriptor;

/// How many peers may wait to be accepted.
const BACKLOG: i32 = 128;

/// Where to listen, as the command line says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Place {
    /// A TCP port. Without an address all IPv4 ones, as CRIU; port 0 picks a free one.
    Tcp {
        /// IPv4, IPv6 or a name.
        address: Option<String>,
        /// The port.
        port: u16,
    },
    /// An AF_UNIX stream socket.
    Unix(PathBuf),
    /// A descriptor that is a connection already.
    Connected(RawFd),
    /// A listening socket that systemd passed.
    Passed,
}

/// Where sessions come from.
#[derive(Debug)]
pub struct Source {
    /// The socket.
    pub socket: Socket,
    /// Whether it is one connection and not a listener.
    pub connected: bool,
    /// Whether the kernel chose the port.
    pub is_chosen: bool,
    name: Option<Name>,
}

/// The name of an AF_UNIX socket, removed when it is dropped.
#[derive(Debug)]
struct Name(PathBuf);

impl Source {
    /// Listens at `place`.
    pub fn open(place: &Place) -> Result<Source> {
        match place {
            Place::Tcp { address, port } => {
                let socket = listen_tcp(address.as_deref(), *port)?;
                Ok(Source {
                    is_chosen: *port == 0,
                    ..Source::listener(socket)
                })
            }
            Place::Unix(path) => listen_unix(path),
            Place::Connected(number) => Ok(Source {
                connected: true,
                ..Source::listener(inherited_socket(*number, "--ps-socket")?)
            }),
            Place::Passed => {
                inherited_socket(FIRST_PASSED_FD, "the socket of systemd").map(Source::listener)
            }
        }
    }

    fn listener(socket: Socket) -> Source {
        Source {
            socket,
            connected: false,
            is_chosen: false,
            name: None,
        }
    }

    /// Whether a connection to `peer` comes to this listener.
    pub fn is_at(&self, peer: &Peer) -> bool {
        let Some(own) = self
            .socket
            .local_addr()
            .ok()
            .and_then(|address| address.as_socket())
        else {
            return false;
        };
        let is_here = |address: SocketAddr| {
            let same_host = own.ip() == address.ip()
                // Addresses of other hosts cannot be bound.
                || own.ip().is_unspecified() && UdpSocket::bind((address.ip(), 0)).is_ok();
            address.port() == own.port() && same_host
        };
        let addresses = peer.resolve().unwrap_or_default();
        addresses
            .iter()
            .filter_map(SockAddr::as_socket)
            .any(is_here)
    }

    /// The TCP port, if there is one.
    pub fn port(&self) -> Option<u16> {
        let address = self.socket.local_addr().ok()?;
        address.as_socket().map(|address| address.port())
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inet = self
            .socket
            .local_addr()
            .ok()
            .and_then(|address| address.as_socket());
        match (inet, &self.name) {
            (Some(address), _) => write!(f, "{address}"),
            (None, Some(name)) => write!(f, "{}", name.0.display()),
            (None, None) => f.write_str("an inherited socket"),
        }
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::warn!("cannot remove {}: {error}", self.0.display());
        }
    }
}

/// Whether systemd started this process with a socket of its own: `LISTEN_PID` and `LISTEN_FDS`.
pub fn is_passed_by_systemd() -> bool {
    let number = |name| {
        std::env::var(name)
            .ok()
            .and_then(|text| text.parse::<u32>().ok())
    };
    number("LISTEN_PID") == Some(std::process::id())
        && number("LISTEN_FDS").is_some_and(|count| count > 0)
}

fn inherited_socket(number: RawFd, what: &str) -> Result<Socket> {
    let taken = inherited_descriptor(number).map(Socket::from);
    // Only sockets have a type.
    taken
        .and_then(|socket| socket.r#type().map(|_| socket))
        .map_err(|error| {
            let text = format!("{what}: descriptor {number} is not a socket");
            Error::wrap(Kind::Usage, text, error)
        })
}

fn listen_tcp(address: Option<&str>, port: u16) -> Result<Socket> {
    let failed = |error: io::Error| {
        let host = address.unwrap_or("all addresses");
        Error::wrap(
            Kind::Usage,
            format!("cannot listen on {host}, port {port}{}", advice(&error)),
            error,
        )
    };
    let addresses: Vec<SocketAddr> = match address {
        None => vec![SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port)],
        Some(host) => (host, port).to_socket_addrs().map_err(failed)?.collect(),
    };
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in addresses {
        match bind_tcp(address) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(failed(last))
}

/// What helps against a failure to listen.
fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            " (name another port, or 0 for a free one; `ss -ltnp` shows who has it)"
        }
        io::ErrorKind::AddrNotAvailable => " (no device of this host has the address)",
        io::ErrorKind::PermissionDenied => " (ports below 1024 need root)",
        _ => "",
    }
}

fn bind_tcp(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// Whether a living process has the socket at `path`. It does not notice the check: a datagram socket
/// finds out that it is of another type, or that there is nobody.
pub(in crate::engine) fn is_in_use(path: &Path) -> io::Result<bool> {
    let probe = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
    match probe.connect(&SockAddr::unix(path)?) {
        Ok(()) => Ok(true),
        Err(error) => match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EPROTOTYPE) => Ok(true),
            Some(Errno::ECONNREFUSED | Errno::ENOENT) => Ok(false),
            _ => Err(error),
        },
    }
}

/// Listens at `path`, in the place of a socket that nobody listens at any more.
fn listen_unix(path: &Path) -> Result<Source> {
    let failed = |error: io::Error| Error::file("listen at", path, error);
    let address = SockAddr::unix(path).map_err(failed)?;
    let is_socket =
        std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    if is_socket {
        if is_in_use(path).map_err(failed)? {
            return Err(failed(io::ErrorKind::AddrInUse.into()));
        }
        std::fs::remove_file(path).map_err(failed)?;
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(failed)?;
    socket.bind(&address).map_err(failed)?;
    let path = std::path::absolute(path).map_err(failed)?;
    let source = Source {
        name: Some(Name(path.clone())),
        ..Source::listener(socket)
    };
    let listening = source.socket.listen(BACKLOG);
    listening.map_err(|error| Error::file("listen at", &path, error))?;
    Ok(source)
}
