//! The listening side of receivers: admits connections to their sessions.
//!
//! ```text
//! connection ── HELLO ──> SessionTable ── opened ──> session: ReceiverSession, applier thread, directory
//!                            └───── joined ──> one more connection of it
//! ```
//!
//! The thread whose connection opened a session owns it: when its own connection ends, it waits for
//! others, and for the applier, and gives the session up if nobody comes back.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::engine::ferry::buffer_pool::BufferPool;
use crate::engine::ferry::change_notifier::ChangeNotifier;
use crate::engine::ferry::conn::{Conn, ConnError};
use crate::engine::ferry::connection_loop::{self, Waker};
use crate::engine::ferry::handshake::{first_frame, refuse};
use crate::engine::ferry::{WINDOW, lock, random_bits};
use crate::engine::io::transport::transport;
use crate::engine::listening::stop::Stop;
use crate::engine::receive::batch_applier::{Bases, BatchApplier};
use crate::engine::receive::counters::SessionCounters;
use crate::engine::receive::receiver_session::ReceiverSession;
use crate::engine::receive::stores::SessionStore;
use crate::engine::receive::{ReceiveContext, punch_out_of_parents};
use crate::error::{Error, Kind, Result};
use crate::ferry::frame;
use crate::ferry::hash::{HashKey, PageHasher};
use crate::ferry::hello::{Fail, FailCode, Features, Greeting, Hello, Role, SessionId, VERSION};
use crate::ferry::link::{Admission, ConnectionId, SessionTable};
use crate::ferry::message::StateId;
use crate::limits::FERRY_STREAMS_MAX;
use crate::observe::received::Received;
use crate::stream::Stream;
use crate::units::PageSize;

/// How often the owner of a session looks for what nobody is notified of.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// See the module's text.
pub struct PrecopyListener<'a> {
    context: &'a ReceiveContext,
    stop: &'a Stop,
    page: PageSize,
    reconnect_timeout: Duration,
    only_one: bool,
    hasher: PageHasher,
    pool: Arc<BufferPool>,
    state: Mutex<State>,
    notifier: ChangeNotifier,
    start: Instant,
}

struct State {
    table: SessionTable,
    opened: u64,
    sessions: BTreeMap<SessionId, Arc<ReceiverSession>>,
    /// Sessions that went well, as long as the table remembers them.
    finished: BTreeMap<SessionId, Arc<ReceiverSession>>,
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
        let own = Hello {
            version: VERSION,
            role: Role::Receiver,
            page,
            features: Features::HASHES.with(Features::DELTA),
            session: SessionId::default(),
            stream: 0,
            streams: FERRY_STREAMS_MAX,
            attempt: 0,
            opening: false,
            window: WINDOW,
            hash_key,
        };
        Ok(PrecopyListener {
            context,
            stop,
            page,
            reconnect_timeout,
            only_one,
            hasher: PageHasher::new(hash_key, page),
            pool: Arc::default(),
            state: Mutex::new(State {
                table: SessionTable::new(own, &[Role::Receiver], reconnect_timeout),
                opened: 0,
                sessions: BTreeMap::new(),
                finished: BTreeMap::new(),
            }),
            notifier: ChangeNotifier::default(),
            start: Instant::now(),
        })
    }

    /// Whether a session has been opened.
    pub fn has_opened(&self) -> bool {
        lock(&self.state).opened > 0
    }

    /// Runs a connection that has just begun to speak ferry. If it opens a session, returns when
    /// that is over. New sessions are let in only with `open_to_new`.
    pub fn handle(&self, stream: Stream, open_to_new: bool) -> Result<Handled> {
        let peer = stream.peer().to_owned();
        self.greet(stream, open_to_new)
            .map_err(|error| error.within(format!("ferry from {peer}")))
    }

    fn greet(&self, stream: Stream, open_to_new: bool) -> Result<Handled> {
        let lost = |error| Error::wrap(Kind::PeerLost, "no greeting came", error);
        let (peer, host) = (stream.peer().to_owned(), stream.host());
        let transport = transport(stream).map_err(|error| lost(ConnError::Socket(error)))?;
        let mut conn = Conn::new(transport, Arc::clone(&self.pool));
        connection_loop::prepare(&conn);
        let hello = match first_frame(&mut conn) {
            Ok(hello) => hello,
            // Damaged on the way: who sent it will come again.
            Err(ConnError::Frame(error)) if !error.is_damage() => {
                return Err(lost(ConnError::Frame(error)));
            }
            Err(error) => {
                tracing::warn!("a connection from {peer}: no greeting came: {error}");
                return Ok(Handled::Joined);
            }
        };
        let greeting = Hello::decode(hello.kind, &hello.body)
            .map_err(|error| lost(ConnError::Frame(error)))?;
        let mut state = lock(&self.state);
        let open_to_new = open_to_new && !(self.only_one && state.opened > 0);
        let only_looks = matches!(greeting, Greeting::Hello(hello) if hello.attempt == 0);
        match state.table.admit(greeting, open_to_new) {
            Admission::Refused(fail) if only_looks => {
                drop(state);
                refuse(conn, &fail);
                tracing::info!("{peer} has asked whether dumps are received here");
                Ok(Handled::Joined)
            }
            Admission::Refused(fail) => {
                let serves = !state.sessions.is_empty();
                drop(state);
                refuse(conn, &fail);
                // A connection of an earlier session, or of an earlier server's, is not the one to come.
                let late = [FailCode::Superseded, FailCode::UnknownSession].contains(&fail.code);
                if serves || late {
                    tracing::warn!("refused a connection from {peer}: {fail}");
                    return Ok(Handled::Joined);
                }
                Err(Error::wrap(Kind::Protocol, "refused", fail))
            }
            Admission::Joined { peer, welcome } => {
                let living = state.sessions.get(&peer.session);
                let receiving = living
                    .or_else(|| state.finished.get(&peer.session))
                    .cloned();
                drop(state);
                if let Some(receiving) = receiving {
                    self.run_connection(conn, &receiving, &peer, &welcome)?;
                }
                Ok(Handled::Joined)
            }
            Admission::Opened {
                peer: theirs,
                welcome,
            } => {
                let traffic = &self.context.traffic;
                let running = traffic.begin_session();
                let mut counters = SessionCounters::start(traffic);
                let store = self.context.stores.for_session(&host);
                let ended = match store.and_then(|store| Session::begin(self, store, theirs)) {
                    Ok(session) => {
                        state.opened += 1;
                        let receiving = Arc::clone(&session.receiving);
                        state.sessions.insert(theirs.session, receiving);
                        drop(state);
                        tracing::info!("session {} from {peer}", theirs.session);
                        self.own(session, conn, &welcome, &mut counters)
                    }
                    Err(error) => {
                        let fail = Fail::new(FailCode::Receiver, error.to_string());
                        state.table.fail(theirs.session, fail.clone());
                        drop(state);
                        refuse(conn, &fail);
                        Err(error)
                    }
                };
                if ended.is_ok() {
                    running.succeed();
                }
                let received = counters.end(&peer, self.page);
                Ok(Handled::Session(Box::new(received), ended))
            }
        }
    }

    /// Runs the first connection of `session`, and then the session to its end.
    fn own(
        &self,
        session: Session,
        conn: Conn,
        welcome: &Hello,
        counters: &mut SessionCounters<'_>,
    ) -> Result<()> {
        let Session {
            receiving,
            applier,
            store,
            hello,
        } = session;
        let result = thread::scope(|scope| {
            let applier = scope.spawn(|| {
                let images = receiving.apply_all(applier, counters);
                if images.is_ok() {
                    receiving.wait_for_goodbye();
                }
                self.notifier.notify();
                images
            });
            if let Err(error) = self.run_connection(conn, &receiving, &hello, welcome) {
                receiving.lost(error.to_string());
            }
            loop {
                let seen = self.notifier.notified();
                if applier.is_finished() {
                    break;
                }
                self.end_if_given_up(hello.session, &receiving);
                self.notifier.wait(seen, LOOK_AGAIN);
            }
            let joined = applier.join();
            joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        let mut state = lock(&self.state);
        state.sessions.remove(&hello.session);
        match &result {
            Ok(_) => {
                let forgotten = state.table.finish(hello.session);
                receiving.retire();
                state.finished.insert(hello.session, receiving);
                if let Some(oldest) = forgotten {
                    state.finished.remove(&oldest);
                }
            }
            Err(error) => {
                let text = format!("the session has failed: {error}");
                let fail = Fail::new(FailCode::Receiver, text);
                state.table.fail(hello.session, fail);
            }
        }
        drop(state);
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
        if self.stop.is_pulled() {
            receiving.lost("stopped by a signal".to_owned());
        }
        let now = self.start.elapsed();
        if lock(&self.state).table.has_expired(session, now) {
            receiving.lost(format!(
                "the far end did not come back for {} s (--reconnect-timeout)",
                self.reconnect_timeout.as_secs()
            ));
        }
    }

    fn run_connection(
        &self,
        mut conn: Conn,
        receiving: &ReceiverSession,
        peer: &Hello,
        welcome: &Hello,
    ) -> Result<()> {
        let waker = Waker::new()?;
        let mut words = Vec::new();
        welcome.encode(frame::Kind::Welcome, &mut words);
        conn.queue(Arc::new(words));
        connection_loop::ConnectionHandler::stream_up(receiving, peer.stream, peer, &waker);
        let end = connection_loop::run(conn, peer.stream, receiving, &waker, || {});
        connection_loop::ConnectionHandler::stream_down(receiving, peer.stream, &waker);
        tracing::debug!(
            "stream {} of session {}: {end:?}",
            peer.stream,
            peer.session
        );
        let connection = ConnectionId {
            session: peer.session,
            for_faults: false,
            stream: peer.stream,
        };
        let now = self.start.elapsed();
        lock(&self.state)
            .table
            .handle_lost(connection, peer.attempt, now);
        self.notifier.notify();
        Ok(())
    }
}

/// A session that is about to begin.
struct Session {
    receiving: Arc<ReceiverSession>,
    applier: BatchApplier,
    store: SessionStore,
    hello: Hello,
}

impl Session {
    fn begin(port: &PrecopyListener<'_>, store: SessionStore, hello: Hello) -> Result<Session> {
        let bases = Arc::new(Bases::default());
        let streams = hello.streams.clamp(1, FERRY_STREAMS_MAX);
        let (pool, known) = (Arc::clone(&port.pool), Arc::clone(&bases));
        let receiving = ReceiverSession::new(port.page, streams, WINDOW, known, pool);
        let parent_state = StateId(random_bits()?);
        let compresses = port.context.ingest.compress;
        let hasher = port.hasher.clone();
        let applier = BatchApplier::new(&store.store, hasher, parent_state, bases, compresses);
        Ok(Session {
            receiving: Arc::new(receiving),
            applier,
            store,
            hello,
        })
    }
}
