//! Making the connections of a session, the first time and again.

use socket2::Socket;

use super::link::Link;
use crate::criu::header::Wire;
use crate::engine::io::transport::{Peer, PlainTransport, SecureTransport, Transport};
use crate::engine::restore::Token;
use crate::engine::restore::postcopy_client::FerryPair;
use crate::error::{Error, Kind, Result};
use crate::lazy::policy::Policy;
use crate::tls::{Tls, TlsStream};
use crate::units::PageSize;

/// The two connections of one session.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) stream: Link,
    pub(super) fault: Option<FaultLink>,
}

#[derive(Debug)]
pub(super) struct FaultLink {
    pub(super) link: Link,
    pub(super) asked: bool,
    /// It has answered: faults go over it.
    pub(super) proven: bool,
}

/// New connections to a source.
#[derive(Debug)]
pub(super) enum Dialed {
    Criu(Box<Pair>),
    Ferry(Box<FerryPair>),
}

/// Which of the two.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Which {
    Stream,
    Fault,
}

impl Which {
    pub(super) fn token(self) -> Token {
        match self {
            Which::Stream => Token::StreamLink,
            Which::Fault => Token::FaultLink,
        }
    }
}

/// How sockets are made and what speaks over them.
#[derive(Clone, Debug)]
pub(super) struct SourceDialer {
    pub(super) peer: Peer,
    pub(super) tls: Option<Tls>,
    pub(super) wire: Wire,
    pub(super) page: PageSize,
    /// Decides when the stream of a connection yields to faults.
    pub(super) policy: &'static dyn Policy,
}

impl SourceDialer {
    /// `secure` makes a secured connection of the socket.
    fn dial(&self, secure: impl FnOnce(&Tls, Socket, &str) -> Result<TlsStream>) -> Result<Link> {
        let socket = self.peer.connect()?;
        let failed = |error| {
            Error::wrap(
                Kind::Io,
                format!("cannot use the connection to {}", self.peer),
                error,
            )
        };
        let transport: Box<dyn Transport> = match &self.tls {
            None => Box::new(PlainTransport::new(socket).map_err(failed)?),
            Some(tls) => {
                let stream = secure(tls, socket, self.peer.host())?;
                Box::new(SecureTransport::new(stream).map_err(failed)?)
            }
        };
        Ok(Link::new(transport, self.wire, self.page, self.policy))
    }

    pub(super) fn dial_pair(&self) -> Result<Pair> {
        let stream = self.dial(Tls::connect)?;
        // A source that takes one connection refuses the second, or never looks at it: its handshake
        // is not waited for.
        let fault = self.dial(Tls::begin).ok().map(|link| FaultLink {
            link,
            asked: false,
            proven: false,
        });
        Ok(Pair { stream, fault })
    }
}

impl Pair {
    pub(super) fn link(&mut self, which: Which) -> Option<&mut Link> {
        match which {
            Which::Stream => Some(&mut self.stream),
            Which::Fault => self.fault.as_mut().map(|fault| &mut fault.link),
        }
    }

    /// Both connections, or the one that there is.
    pub(super) fn links(&self) -> impl Iterator<Item = &Link> {
        std::iter::once(&self.stream).chain(self.fault.as_ref().map(|fault| &fault.link))
    }

    /// Whether faults have a connection of their own.
    pub(super) fn has_fault_link(&self) -> bool {
        self.fault.as_ref().is_some_and(|fault| fault.proven)
    }

    /// Whether requests wait for room in a socket.
    pub(super) fn awaits_room(&self) -> bool {
        self.links().any(|link| link.awaits_room)
    }

    pub(super) fn bytes_received(&self) -> u64 {
        self.links().map(Link::bytes_received).sum()
    }
}
