//! Makes the two connections of a post-copy session: one for the stream, one for faults.

use std::sync::Arc;

use super::PostcopyClient;
use crate::engine::ferry::conn::{Conn, ConnError};
use crate::engine::ferry::handshake::first_frame;
use crate::engine::ferry::{WINDOW, connection_loop, lock, random_bits};
use crate::engine::io::transport::{Peer, transport};
use crate::error::{Error, Kind, Result};
use crate::ferry::frame;
use crate::ferry::hash::{HashKey, PageHasher};
use crate::ferry::hello::{Features, Hello, Role, SessionId, VERSION, Window};
use crate::ferry::link::{PairDialer, Refusal};
use crate::ferry::postcopy_receiver::window_at;
use crate::stream::Stream;
use crate::sync::Mutex;
use crate::tls::Tls;
use crate::units::PageSize;

/// What a caller wants to be sent besides the answers to its faults.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::engine) enum Pushed {
    /// Everything.
    All,
    /// Everything, so many bytes a second.
    AtRate(u64),
    /// Nothing.
    Nothing,
}

impl Pushed {
    fn window(self) -> Window {
        match self {
            Pushed::AtRate(bytes_per_second) => window_at(bytes_per_second, WINDOW),
            Pushed::All | Pushed::Nothing => WINDOW,
        }
    }

    fn features(self) -> Features {
        let features = Features::FAULTS
            .with(Features::HASHES)
            .with(Features::KNOWN)
            .with(Features::CONFIRMS_BYE);
        match self {
            Pushed::All | Pushed::AtRate(_) => features.with(Features::IN_PUSH),
            Pushed::Nothing => features.with(Features::ON_DEMAND),
        }
    }
}

/// Makes the connections of a session, from any thread.
#[derive(Clone, Debug)]
pub(in crate::engine) struct FerryDialer {
    peer: Peer,
    tls: Option<Tls>,
    page: PageSize,
    pushed: Pushed,
    session: SessionId,
    hash_key: HashKey,
    pairs: Arc<Mutex<PairDialer>>,
}

/// The two connections of a session, welcomed.
#[derive(Debug)]
pub(in crate::engine) struct FerryPair {
    pub(super) stream: Conn,
    pub(super) fault: Conn,
    /// Makes the hashes by which both ends know what an earlier round has left here.
    pub(super) hasher: PageHasher,
}

impl FerryDialer {
    /// For a new session with the forwarder at `peer`.
    pub(in crate::engine) fn new(
        peer: Peer,
        tls: Option<Tls>,
        page: PageSize,
        pushed: Pushed,
    ) -> Result<FerryDialer> {
        let (session, hash_key) = (SessionId(random_bits()?), HashKey(random_bits()?));
        let hello = Hello {
            version: VERSION,
            role: Role::Receiver,
            page,
            features: pushed.features(),
            session,
            stream: 0,
            streams: 1,
            attempt: 0,
            opening: true,
            window: pushed.window(),
            hash_key,
        };
        Ok(FerryDialer {
            peer,
            tls,
            page,
            pushed,
            session,
            hash_key,
            pairs: Arc::new(Mutex::new(PairDialer::new(hello))),
        })
    }

    /// The session, without connections.
    pub(in crate::engine) fn session<T>(&self) -> PostcopyClient<T> {
        let hasher = PageHasher::new(self.hash_key, self.page);
        let window = self.pushed.window();
        let mut client = PostcopyClient::new(self.page, window, hasher, self.session);
        if let Pushed::AtRate(_) = self.pushed {
            client.throttle();
        }
        client
    }

    /// Connects. An error of [`Kind::Protocol`] will not be another one the next time.
    pub(in crate::engine) fn dial(&self) -> Result<FerryPair> {
        let attempt = lock(&self.pairs).begin();
        let stream = self.connect(Role::Receiver, attempt)?;
        let fault = self.connect(Role::Requester, attempt)?;
        let known_key = lock(&self.pairs).known_key();
        let hasher = PageHasher::new(known_key.unwrap_or(self.hash_key), self.page);
        Ok(FerryPair {
            stream,
            fault,
            hasher,
        })
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
        connection_loop::prepare(&conn);
        let mut bytes = Vec::new();
        let hello = lock(&self.pairs).hello(role, attempt);
        hello.encode(frame::Kind::Hello, &mut bytes);
        conn.queue(Arc::new(bytes));
        let answer = first_frame(&mut conn).map_err(silent)?;
        let welcomed = lock(&self.pairs).handle_answer(role, answer.kind, &answer.body);
        welcomed.map_err(|refusal| match (refusal.is_final(), refusal) {
            (_, Refusal::Foreign(error)) => silent(ConnError::Frame(error)),
            (is_final, Refusal::Fail(fail)) => {
                let kind = match is_final {
                    true => Kind::Protocol,
                    false => Kind::PeerLost,
                };
                Error::wrap(kind, format!("{} refuses", self.peer), fail)
            }
        })?;
        Ok(conn)
    }
}
