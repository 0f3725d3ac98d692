//! Makes the two connections of a fetching session: one for the stream, one for faults.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::Fetching;
use crate::engine::ferry::conn::{Conn, ConnError};
use crate::engine::ferry::dialing::first_frame;
use crate::engine::ferry::{WINDOW, lane, random_bits};
use crate::engine::transport::{Peer, transport};
use crate::error::{Error, Kind, Result};
use crate::ferry::frame;
use crate::ferry::hash::{HashKey, PageHasher};
use crate::ferry::hello::{Fail, FailCode, Features, Greeting, Hello, Role, SessionId, VERSION};
use crate::stream::Stream;
use crate::tls::Tls;
use crate::units::PageSize;

/// Makes the connections of a session, from any thread.
#[derive(Clone, Debug)]
pub(in crate::engine) struct FerryDialer {
    peer: Peer,
    tls: Option<Tls>,
    page: PageSize,
    session: SessionId,
    hash_key: HashKey,
    attempts: Arc<AtomicU32>,
    opened: Arc<AtomicBool>,
}

/// The two connections of a session, welcomed.
#[derive(Debug)]
pub(in crate::engine) struct FerryPair {
    pub(super) stream: Conn,
    pub(super) fault: Conn,
}

impl FerryDialer {
    /// For a new session with the forwarder at `peer`.
    pub(in crate::engine) fn new(
        peer: Peer,
        tls: Option<Tls>,
        page: PageSize,
    ) -> Result<FerryDialer> {
        Ok(FerryDialer {
            peer,
            tls,
            page,
            session: SessionId(random_bits()?),
            hash_key: HashKey(random_bits()?),
            attempts: Arc::default(),
            opened: Arc::default(),
        })
    }

    /// The session, without connections.
    pub(in crate::engine) fn session<T>(&self) -> Fetching<T> {
        let hasher = PageHasher::new(self.hash_key, self.page);
        Fetching::new(self.page, hasher, self.session)
    }

    /// Connects. An error of [`Kind::Protocol`] will not be another one the next time.
    pub(in crate::engine) fn dial(&self) -> Result<FerryPair> {
        let attempt = self.attempts.fetch_add(1, Ordering::SeqCst) + 1;
        let stream = self.connect(Role::Taker, attempt)?;
        self.opened.store(true, Ordering::SeqCst);
        let fault = self.connect(Role::Asker, attempt)?;
        Ok(FerryPair { stream, fault })
    }

    fn connect(&self, role: Role, attempt: u32) -> Result<Conn> {
        let silent = |error: ConnError| {
            let text = format!(
                "{} does not speak ferry: is it a page-server with --forward-lazy? (--ferry is for that \
                 alone)",
                self.peer
            );
            Error::wrap(Kind::PeerLost, text, error)
        };
        let socket = Stream::plain(self.peer.connect()?);
        let secured = socket.secure_to(self.tls.as_ref(), self.peer.host())?;
        let transport = transport(secured).map_err(|error| silent(ConnError::Socket(error)))?;
        let mut conn = Conn::new(transport, Arc::default());
        lane::prepare(&conn);
        let mut words = Vec::new();
        self.hello(role, attempt)
            .encode(frame::Kind::Hello, &mut words);
        conn.queue(Arc::new(words));
        let answer = first_frame(&mut conn).map_err(silent)?;
        let refused = |fail: Fail| {
            let kind = match fail.code {
                FailCode::Superseded | FailCode::Busy => Kind::PeerLost,
                _ => Kind::Protocol,
            };
            Error::wrap(kind, format!("{} refuses", self.peer), fail)
        };
        let broken = |error| silent(ConnError::Frame(error));
        match answer.kind {
            frame::Kind::Fail => Err(refused(Fail::decode(&answer.body).map_err(broken)?)),
            kind => match Hello::decode(kind, &answer.body).map_err(broken)? {
                Greeting::Hello(hello) if hello.role == role.opposite() => Ok(conn),
                Greeting::Hello(hello) => {
                    let text = format!("it is a {:?}", hello.role);
                    Err(refused(Fail::new(FailCode::Role, text)))
                }
                Greeting::OtherVersion(version) => {
                    let text = format!("it speaks version {version} of ferry, not {VERSION}");
                    Err(refused(Fail::new(FailCode::Version, text)))
                }
            },
        }
    }

    fn hello(&self, role: Role, attempt: u32) -> Hello {
        Hello {
            version: VERSION,
            role,
            page: self.page,
            features: Features::FAULTS.with(Features::HASHES),
            session: self.session,
            stream: 0,
            streams: 1,
            attempt,
            opening: role == Role::Taker && !self.opened.load(Ordering::SeqCst),
            window: WINDOW,
            hash_key: self.hash_key,
        }
    }
}
