//! The listening side of receivers: admits connections to their sessions.
//!
//! ```text
//! connection ── HELLO ──> ListenerSessions ── opened ──> ReceiverSession, applier thread, directory
//!                               └──────────── joined ──> one more connection of it
//! ```
//!
//! The thread whose connection opened a session owns it: when its own connection ends, it waits for
//! others, and for the applier, and gives the session up if nobody comes back.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::engine::ferry::buffer_pool::BufferPool;
use crate::engine::ferry::conn::{Conn, ConnError};
use crate::engine::ferry::handshake::{greeting, queue_welcome, refuse, run_admitted};
use crate::engine::ferry::listener_sessions::{Admitted, Greetings, ListenerSessions, Refused};
use crate::engine::ferry::{WINDOW, random_bits};
use crate::engine::listening::stop::{Stop, Watched};
use crate::engine::receive::batch_applier::{Bases, BatchApplier};
use crate::engine::receive::counters::SessionCounters;
use crate::engine::receive::receiver_session::ReceiverSession;
use crate::engine::receive::stores::SessionStore;
use crate::engine::receive::{ReceiveContext, punch_out_of_parents};
use crate::error::{Error, Kind, Result};
use crate::ferry::hash::{HashKey, PageHasher};
use crate::ferry::hello::{FailCode, Features, Greeting, Hello, LOOK_ATTEMPT, Role, SessionId};
use crate::ferry::message::StateId;
use crate::limits::FERRY_STREAMS_MAX;
use crate::observe::received::Received;
use crate::stream::Stream;
use crate::units::PageSize;

/// See the module's text.
pub struct PrecopyListener<'a> {
    context: &'a ReceiveContext,
    stop: &'a Stop,
    page: PageSize,
    reconnect_timeout: Duration,
    only_one: bool,
    hasher: PageHasher,
    pool: Arc<BufferPool>,
    sessions: ListenerSessions<ReceiverSession>,
}

/// What came of a connection.
#[derive(Debug)]
pub enum Handled {
    /// It opened a session, which is over: what came, and how it ended.
    Session(Box<Received>, Result<()>),
    /// It was one of the connections of a session.
    Joined,
}

impl<'a> PrecopyListener<'a> {
    /// Takes sessions, or `only_one`, into the stores of `context`. A session without a connection for
    /// `reconnect_timeout` is given up.
    pub fn new(
        context: &'a ReceiveContext,
        stop: &'a Stop,
        reconnect_timeout: Duration,
        only_one: bool,
    ) -> Result<PrecopyListener<'a>> {
        let page = context.stores.page();
        let hash_key = HashKey(random_bits()?);
        let features = Features::HASHES.with(Features::DELTA).with(Features::KNOWN);
        let features = match takes_shared(context) {
            true => features.with(Features::SHARED),
            false => features,
        };
        let own = Hello {
            hash_key,
            ..Hello::of_listener(Role::Receiver, page, features, WINDOW)
        };
        Ok(PrecopyListener {
            context,
            stop,
            page,
            reconnect_timeout,
            only_one,
            hasher: PageHasher::new(hash_key, page),
            pool: Arc::default(),
            sessions: ListenerSessions::new(
                own,
                &[Role::Receiver],
                FailCode::Receiver,
                reconnect_timeout,
            ),
        })
    }

    /// Whether a session has been opened.
    pub fn has_opened(&self) -> bool {
        self.sessions.has_opened()
    }

    /// Runs a connection that has just begun to speak ferry. If it opens a session, returns when
    /// that is over. New sessions are let in only with `open_to_new`.
    /// Until it has said who it is `watched` shuts it down.
    pub fn handle(&self, stream: Stream, watched: Watched, open_to_new: bool) -> Result<Handled> {
        let peer = stream.peer().to_owned();
        self.greet(stream, watched, open_to_new)
            .map_err(|error| error.within(format!("ferry from {peer}")))
    }

    fn greet(&self, stream: Stream, watched: Watched, open_to_new: bool) -> Result<Handled> {
        let lost = |error| Error::wrap(Kind::PeerLost, "no greeting came", error);
        let (peer, host) = (stream.peer().to_owned(), stream.host());
        let (conn, greeting) = match greeting(stream, Arc::clone(&self.pool)) {
            Ok(greeted) => greeted,
            // Damaged on the way: who sent it will come again.
            Err(ConnError::Frame(error)) if !error.is_damage() => {
                return Err(lost(ConnError::Frame(error)));
            }
            Err(error) => {
                tracing::warn!("a connection from {peer}: no greeting came: {error}");
                return Ok(Handled::Joined);
            }
        };
        // From here on a sender is told why it is left.
        drop(watched);
        let only_looks =
            matches!(greeting, Greeting::Hello(hello) if hello.attempt == LOOK_ATTEMPT);
        let admitted = self.sessions.admit(
            greeting,
            |opened| open_to_new && !(self.only_one && opened > 0),
            |peer| {
                let store = self.context.stores.for_session(&host)?;
                Session::begin(self, store, *peer)
            },
        );
        match admitted {
            Admitted::Refused(refused) => self.reject(conn, &peer, &refused, only_looks),
            Admitted::Joined(receiving, greetings) => {
                if let Some(receiving) = receiving {
                    self.run_connection(conn, &receiving, &greetings)?;
                }
                Ok(Handled::Joined)
            }
            Admitted::Opened(receiving, session, greetings) => {
                tracing::info!("session {} from {peer}", greetings.peer.session);
                Ok(self.count(&peer, |counters| {
                    self.own(conn, receiving, session, &greetings, counters)
                }))
            }
            Admitted::Failed(fail, error) => {
                refuse(conn, &fail);
                Ok(self.count(&peer, |_| Err(error)))
            }
        }
    }

    /// Says no to a connection. One that only looks, or that belongs to a session which is over, is nothing
    /// to report.
    fn reject(
        &self,
        conn: Conn,
        peer: &str,
        Refused { fail, others_open }: &Refused,
        only_looks: bool,
    ) -> Result<Handled> {
        refuse(conn, fail);
        if only_looks {
            tracing::info!("{peer} checked whether this server receives dumps");
            return Ok(Handled::Joined);
        }
        // A connection of an earlier session, or of an earlier server's, is not the one to come.
        let late = [FailCode::Superseded, FailCode::UnknownSession].contains(&fail.code);
        if *others_open || late {
            tracing::warn!("refused a connection from {peer}: {fail}");
            return Ok(Handled::Joined);
        }
        Err(Error::wrap(Kind::Protocol, "refused", fail.clone()))
    }

    /// Runs a session that `peer` has opened, and counts what comes.
    fn count(
        &self,
        peer: &str,
        run: impl FnOnce(&mut SessionCounters<'_>) -> Result<()>,
    ) -> Handled {
        let traffic = &self.context.traffic;
        let running = traffic.begin_session();
        let mut counters = SessionCounters::start(traffic);
        let ended = run(&mut counters);
        if ended.is_ok() {
            running.succeed();
        }
        Handled::Session(Box::new(counters.end(peer, self.page)), ended)
    }

    /// Runs the first connection of `session`, and then the session to its end.
    fn own(
        &self,
        conn: Conn,
        receiving: Arc<ReceiverSession>,
        session: Session,
        greetings: &Greetings,
        counters: &mut SessionCounters<'_>,
    ) -> Result<()> {
        let Session { applier, store } = session;
        let id = greetings.peer.session;
        let result = thread::scope(|scope| {
            let applier = self.sessions.spawn(scope, || {
                let images = receiving.apply_all(applier, counters);
                if images.is_ok() {
                    receiving.wait_for_sender_to_end();
                }
                images
            });
            if let Err(error) = self.run_connection(conn, &receiving, greetings) {
                receiving.lost(error.to_string());
            }
            let look = || self.end_if_given_up(id, &receiving);
            let joined = self.sessions.follow(applier, look).join();
            joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        self.sessions
            .end(id, receiving, &result, ReceiverSession::retire);
        match result {
            Ok(images) => {
                if self.context.auto_dedup {
                    punch_out_of_parents(&images);
                }
                Ok(())
            }
            Err(error) => {
                store.discard();
                Err(error)
            }
        }
    }

    /// Ends a session to which nobody comes back, or all if this process is to stop.
    fn end_if_given_up(&self, session: SessionId, receiving: &ReceiverSession) {
        if self.stop.is_requested() {
            receiving.stop();
        }
        if self.sessions.has_expired(session) {
            receiving.lost(format!(
                "the peer did not reconnect within {} s (--reconnect-timeout)",
                self.reconnect_timeout.as_secs()
            ));
        }
    }

    fn run_connection(
        &self,
        mut conn: Conn,
        receiving: &Arc<ReceiverSession>,
        Greetings { peer, welcome }: &Greetings,
    ) -> Result<()> {
        let stopped = Arc::clone(receiving);
        let _watched = self.stop.call(move || stopped.stop());
        queue_welcome(&mut conn, welcome);
        run_admitted(conn, receiving.as_ref(), peer)?;
        self.sessions.connection_lost(peer);
        Ok(())
    }
}

/// Whether pages can be read again that were stored in a session: compressed ones are not.
fn takes_shared(context: &ReceiveContext) -> bool {
    !context.ingest.compress
}

/// What only the owner of a session needs.
struct Session {
    applier: BatchApplier,
    store: SessionStore,
}

impl Session {
    fn begin(
        listener: &PrecopyListener<'_>,
        store: SessionStore,
        hello: Hello,
    ) -> Result<(Arc<ReceiverSession>, Session)> {
        let bases = Arc::new(Bases::default());
        let streams = hello.streams.clamp(1, FERRY_STREAMS_MAX);
        let (pool, known) = (Arc::clone(&listener.pool), Arc::clone(&bases));
        let shared = takes_shared(listener.context) && hello.features.has(Features::SHARED);
        let receiving = ReceiverSession::new(listener.page, streams, WINDOW, known, pool, shared);
        let parent_state = StateId(random_bits()?);
        let compresses = listener.context.ingest.compress;
        let hasher = match hello.features.has(Features::KNOWN) {
            // The sender remembers what is here by hashes of this key.
            true => PageHasher::new(hello.hash_key, listener.page),
            false => listener.hasher.clone(),
        };
        let applier = BatchApplier::new(&store.store, hasher, parent_state, bases, compresses);
        Ok((Arc::new(receiving), Session { applier, store }))
    }
}
