//! The connecting side of a session.

use std::time::Duration;

use crate::ferry::hello::{Fail, FailCode, Greeting, Hello};
use crate::limits::FERRY_STREAMS_MAX;

use super::{RetryPolicy, check};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Down { retry_at: Duration },
    Dialing,
    Greeting,
    Up { since: Duration },
}

#[derive(Clone, Copy, Debug)]
struct StreamState {
    phase: Phase,
    pause: Duration,
    attempt: u32,
}

/// The connecting side of a session.
#[derive(Clone, Debug)]
pub struct Dialer {
    hello: Hello,
    retry: RetryPolicy,
    streams: Vec<StreamState>,
    established: bool,
    troubled_since: Option<Duration>,
}

impl Dialer {
    /// Dials `hello.streams` connections that say `hello`, each with its own stream and attempt.
    pub fn new(hello: Hello, retry: RetryPolicy, now: Duration) -> Dialer {
        let streams = hello.streams.clamp(1, FERRY_STREAMS_MAX);
        let state = StreamState {
            phase: Phase::Down { retry_at: now },
            pause: retry.pause_first,
            attempt: 0,
        };
        Dialer {
            hello: Hello { streams, ..hello },
            retry,
            streams: vec![state; usize::from(streams)],
            established: false,
            troubled_since: Some(now),
        }
    }

    /// The next stream to be dialled now, if there is one.
    pub fn poll_dial(&mut self, now: Duration) -> Option<u16> {
        let candidates = self.candidates();
        let due = self.streams[..candidates].iter_mut().zip(0..);
        for (state, stream) in due {
            if matches!(state.phase, Phase::Down { retry_at } if retry_at <= now) {
                state.phase = Phase::Dialing;
                state.attempt += 1;
                return Some(stream);
            }
        }
        None
    }

    /// The connection of `stream` stands; returns what is to be said on it.
    pub fn handle_connected(&mut self, stream: u16) -> Hello {
        let opening = !self.established;
        let state = self.state(stream);
        state.phase = Phase::Greeting;
        let attempt = state.attempt;
        Hello {
            stream,
            attempt,
            opening,
            ..self.hello
        }
    }

    /// The peer has answered on `stream`: returns its hello, with the features that both have.
    pub fn handle_welcome(
        &mut self,
        stream: u16,
        greeting: Greeting,
        now: Duration,
    ) -> Result<Hello, Fail> {
        let peer = check(greeting, &self.hello, &[self.hello.role])?;
        let (session, streams) = (self.hello.session, self.hello.streams);
        if (peer.session, peer.stream, peer.streams) != (session, stream, streams) {
            let text = "the welcome is for another connection";
            return Err(Fail::new(FailCode::Protocol, text));
        }
        self.established = true;
        self.state(stream).phase = Phase::Up { since: now };
        Ok(peer)
    }

    /// The connection of `stream`, or the try to make one, has failed.
    pub fn handle_lost(&mut self, stream: u16, now: Duration) {
        let (steady_after, pause_max) = (self.retry.steady_after(), self.retry.pause_max);
        let state = self.state(stream);
        let steady = matches!(state.phase, Phase::Up { since } if now >= since + steady_after);
        state.phase = Phase::Down {
            retry_at: now + state.pause,
        };
        state.pause = (state.pause * 2).min(pause_max);
        if steady {
            self.handle_progress();
        }
        self.troubled_since.get_or_insert(now);
    }

    /// The peer has acknowledged something, or there is nothing that it could acknowledge.
    pub fn handle_progress(&mut self) {
        self.troubled_since = None;
        for state in &mut self.streams {
            state.pause = self.retry.pause_first;
        }
    }

    /// Whether it has been in vain for too long.
    pub fn has_given_up(&self, now: Duration) -> bool {
        self.gives_up_at().is_some_and(|at| at <= now)
    }

    /// When to call again at the latest, if nothing happens until then.
    pub fn deadline(&self) -> Option<Duration> {
        let retries = self.streams[..self.candidates()]
            .iter()
            .filter_map(|state| match state.phase {
                Phase::Down { retry_at } => Some(retry_at),
                _ => None,
            });
        retries.chain(self.gives_up_at()).min()
    }

    /// A living connection is never given up.
    fn gives_up_at(&self) -> Option<Duration> {
        let up = |state: &StreamState| matches!(state.phase, Phase::Up { .. });
        if self.streams.iter().any(up) {
            return None;
        }
        Some(self.troubled_since? + self.retry.give_up_after)
    }

    /// How many streams may be dialled.
    fn candidates(&self) -> usize {
        if self.established {
            self.streams.len()
        } else {
            1
        }
    }

    fn state(&mut self, stream: u16) -> &mut StreamState {
        &mut self.streams[usize::from(stream)]
    }
}
