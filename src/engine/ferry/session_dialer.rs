//! The connecting side: dials the streams of a session, again and again, until it is over.

use std::sync::{Arc, Condvar, Mutex};
use std::thread::Scope;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::conn::{Conn, ConnError, Frame};
use super::connection_loop::{self, ConnectionEnd, ConnectionHandler, Waker};
use super::{SenderConfig, lock};
use crate::engine::io::transport::{Peer, transport};
use crate::engine::listening::stop::Stop;
use crate::error::{Error, Kind, Result};
use crate::ferry::frame;
use crate::ferry::hello::{Fail, FailCode, Hello};
use crate::ferry::link::{Dialer, RetryPolicy};
use crate::stream::Stream;
use crate::tls::Tls;

/// How long a peer may take for its first frame.
pub(super) const FIRST_WORD: Duration = Duration::from_secs(10);

/// Notifies when something has happened that a thread may be waiting for.
#[derive(Debug, Default)]
pub(super) struct ChangeNotifier {
    notified: Mutex<u64>,
    condition: Condvar,
}

impl ChangeNotifier {
    pub(super) fn notify(&self) {
        *lock(&self.notified) += 1;
        self.condition.notify_all();
    }

    /// How often it was notified.
    pub(super) fn notified(&self) -> u64 {
        *lock(&self.notified)
    }

    /// Waits until it was notified more often than `seen`, or for `timeout`.
    pub(super) fn wait(&self, seen: u64, timeout: Duration) {
        let notified = lock(&self.notified);
        // Woken or not, the caller looks again.
        drop(
            self.condition
                .wait_timeout_while(notified, timeout, |notified| *notified <= seen),
        );
    }
}

/// A handler that dials.
pub(super) trait DialingHandler: ConnectionHandler {
    /// Whether the session has ended here, so that the peer may hang up at any time.
    fn is_ending(&self) -> bool;
    /// The session cannot go on: the peer said so, or nobody could be reached for too long.
    fn lost(&self, why: Lost);
}

/// Why a session cannot go on.
#[derive(Debug)]
pub(super) enum Lost {
    /// The peer has refused or ended it.
    Refused(Fail),
    /// There was no progress for too long; what was wrong at last.
    GivenUp(String),
    /// A signal asked this process to stop.
    Stopped,
}

/// See the module's text.
pub(super) struct SessionDialer<'a> {
    peer: &'a Peer,
    tls: Option<&'a Tls>,
    stop: &'a Stop,
    handler: &'a dyn DialingHandler,
    notifier: &'a ChangeNotifier,
    dialer: Mutex<Dialer>,
    start: Instant,
    give_up_after: Duration,
    last_trouble: Mutex<String>,
}

/// Between two looks at the dialer at most, without a notification.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

impl<'a> SessionDialer<'a> {
    /// Dials as `config` and `hello` say, for `handler`. `notifier` notifies when the handler's state changes.
    pub(super) fn new(
        config: &'a SenderConfig,
        handler: &'a dyn DialingHandler,
        notifier: &'a ChangeNotifier,
        hello: Hello,
        retry: RetryPolicy,
    ) -> SessionDialer<'a> {
        SessionDialer {
            peer: &config.peer,
            tls: config.tls.as_ref(),
            stop: &config.stop,
            handler,
            notifier,
            dialer: Mutex::new(Dialer::new(hello, retry, Duration::ZERO)),
            start: Instant::now(),
            give_up_after: retry.give_up_after,
            last_trouble: Mutex::default(),
        }
    }

    /// Keeps the streams up, each in a thread of `scope`, until the session is over.
    pub(super) fn run<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) {
        while !self.handler.is_over() {
            let seen = self.notifier.notified();
            let now = self.start.elapsed();
            if self.stop.is_pulled() {
                self.handler.lost(Lost::Stopped);
                return;
            }
            let mut dialer = lock(&self.dialer);
            if dialer.has_given_up(now) {
                drop(dialer);
                let text = format!(
                    "no progress with {} for {} s (--reconnect-timeout): {}",
                    self.peer,
                    self.give_up_after.as_secs(),
                    lock(&self.last_trouble)
                );
                self.handler.lost(Lost::GivenUp(text));
                return;
            }
            while let Some(stream) = dialer.poll_dial(now) {
                scope.spawn(move || self.run_stream(stream));
            }
            let deadline = dialer.deadline().map(|at| at.saturating_sub(now));
            drop(dialer);
            self.notifier
                .wait(seen, deadline.unwrap_or(LOOK_AGAIN).min(LOOK_AGAIN));
        }
    }

    /// One connection, from dialling to its end.
    fn run_stream(&self, stream: u16) {
        let trouble = match self.connect(stream) {
            Ok((conn, peer)) => self.run_connection(conn, stream, &peer),
            Err(error) => Some(error.to_string()),
        };
        if let Some(trouble) = trouble
            && !self.handler.is_ending()
        {
            tracing::warn!("stream {stream} to {}: {trouble}", self.peer);
            *lock(&self.last_trouble) = trouble;
        }
        lock(&self.dialer).handle_lost(stream, self.start.elapsed());
        self.notifier.notify();
    }

    /// Runs a welcomed connection; returns what was wrong with it in the end.
    fn run_connection(&self, conn: Conn, stream: u16, peer: &Hello) -> Option<String> {
        let waker = match Waker::new() {
            Ok(waker) => waker,
            Err(error) => return Some(error.to_string()),
        };
        self.handler.stream_up(stream, peer, &waker);
        self.notifier.notify();
        let end = connection_loop::run(conn, stream, self.handler, &waker, || {
            lock(&self.dialer).handle_progress();
        });
        self.handler.stream_down(stream, &waker);
        match end {
            ConnectionEnd::Over | ConnectionEnd::Replaced => None,
            ConnectionEnd::Lost(error) => Some(error_text(error)),
            ConnectionEnd::Silent => Some("the far end has fallen silent".to_owned()),
        }
    }

    /// Dials and greets.
    fn connect(&self, stream: u16) -> Result<(Conn, Hello)> {
        let failed = |error: ConnError| Error::wrap(Kind::PeerLost, "greeting the far end", error);
        let socket = Stream::plain(self.peer.connect()?);
        let secured = socket.secure_to(self.tls, self.peer.host())?;
        let transport = transport(secured).map_err(|error| failed(ConnError::Socket(error)))?;
        // What the far end says is short.
        let mut conn = Conn::new(transport, Arc::default());
        connection_loop::prepare(&conn);
        let hello = lock(&self.dialer).handle_connected(stream);
        let mut words = Vec::new();
        hello.encode(frame::Kind::Hello, &mut words);
        conn.queue(Arc::new(words));
        let answer = first_frame(&mut conn).map_err(failed)?;
        let broken = |error: frame::FrameError| {
            Error::wrap(Kind::Protocol, "what the far end says is wrong", error)
        };
        match answer.kind {
            frame::Kind::Fail => {
                let fail = Fail::decode(&answer.body).map_err(broken)?;
                let text = fail.text.clone();
                if fail.code != FailCode::Superseded {
                    self.handler.lost(Lost::Refused(fail));
                }
                Err(Error::new(Kind::PeerLost, text))
            }
            kind => {
                let greeting = Hello::decode(kind, &answer.body).map_err(broken)?;
                let now = self.start.elapsed();
                let peer = lock(&self.dialer).handle_welcome(stream, greeting, now);
                let peer = peer.map_err(|fail| {
                    let text = fail.text.clone();
                    self.handler.lost(Lost::Refused(fail));
                    Error::new(Kind::Protocol, text)
                })?;
                Ok((conn, peer))
            }
        }
    }
}

fn error_text(error: ConnError) -> String {
    Error::wrap(Kind::PeerLost, "lost", error).to_string()
}

/// Sends what is queued and waits for the peer's first frame.
pub(super) fn first_frame(conn: &mut Conn) -> std::result::Result<Frame, ConnError> {
    let start = Instant::now();
    loop {
        let left_to_send = conn.flush()?;
        if let Some(frame) = conn.receive()? {
            return Ok(frame);
        }
        let Some(left) = FIRST_WORD.checked_sub(start.elapsed()) else {
            return Err(ConnError::Socket(std::io::ErrorKind::TimedOut.into()));
        };
        let mut events = PollFlags::POLLIN;
        events.set(PollFlags::POLLOUT, left_to_send);
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(conn.socket(), events)], timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(std::io::Error::from(errno).into()),
        }
    }
}
