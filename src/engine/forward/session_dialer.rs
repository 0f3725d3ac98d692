//! The connecting side: dials the streams of a session, again and again, until it is over.

use std::sync::Arc;
use std::thread::Scope;
use std::time::{Duration, Instant};

use super::SenderConfig;
use crate::engine::ferry::change_notifier::ChangeNotifier;
use crate::engine::ferry::conn::{Conn, ConnError};
use crate::engine::ferry::connection_loop::{self, ConnectionEnd, DialingHandler, Lost};
use crate::engine::ferry::handshake::first_frame;
use crate::engine::ferry::lock;
use crate::engine::ferry::wakers::Waker;
use crate::engine::io::transport::{Peer, transport};
use crate::engine::listening::stop::Stop;
use crate::error::{Error, Kind, Result};
use crate::ferry::frame;
use crate::ferry::hello::{Fail, FailCode, Hello};
use crate::ferry::link::{Dialer, RetryPolicy};
use crate::stream::Stream;
use crate::sync::Mutex;
use crate::tls::Tls;

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
        loop {
            // What changes from here on ends the wait below.
            let seen = self.notifier.notified();
            if self.handler.is_done() {
                return;
            }
            let now = self.start.elapsed();
            if self.stop.is_requested() {
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
            let mut last = lock(&self.last_trouble);
            // What goes on being wrong is said once.
            match *last == trouble {
                true => tracing::debug!("stream {stream} to {}: {trouble}", self.peer),
                false => tracing::warn!("stream {stream} to {}: {trouble}", self.peer),
            }
            *last = trouble;
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
