//! A lost source, and the attempts to reach it again.
//!
//! ```text
//!   link_failed / source_lost -> reset -> start_reconnecting -> a thread dials until the deadline
//!                                   |                                   | eventfd
//!                                   |                                   v
//!                                   +-- no more attempts: the error   take_reconnected -> watch_links
//! ```
//!
//! Faults wait meanwhile. Time out of reach counts until a byte comes, not until a connection stands:
//! a source that takes connections and says nothing is as lost as one that takes none.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel};
use std::time::{Duration, Instant};

use super::Links;
use super::source_dialer::{Dialed, Which};
use crate::engine::restore::signals::Signals;
use crate::engine::restore::{Restore, unwatch};
use crate::error::{Error, Kind, Result};

/// How long a lost source that is ours is tried again, if the user says nothing.
pub(in crate::engine::restore) const RECONNECT_DEFAULT: Duration = Duration::from_secs(30);

/// Between two attempts to reach a lost source.
pub(super) const RECONNECT_PAUSE: Duration = Duration::from_millis(200);

impl Links {
    /// Who the source is, for messages.
    pub(in crate::engine::restore) fn peer(&self) -> String {
        let dialer = self.dialer.as_ref();
        dialer
            .map(|dialer| dialer.peer.to_string())
            .unwrap_or_default()
    }

    fn may_reconnect(&self) -> Option<Duration> {
        let timeout = self
            .reconnect_timeout
            .or(self.ours.then_some(RECONNECT_DEFAULT))?;
        let used = self
            .down_since
            .map_or(Duration::ZERO, |since| since.elapsed());
        timeout.checked_sub(used).filter(|left| !left.is_zero())
    }

    /// Tries in the background to reach the source again for `timeout`.
    pub(in crate::engine::restore) fn start_reconnecting(
        &mut self,
        timeout: Duration,
    ) -> Result<()> {
        let Some(dialer) = self.dialer.clone() else {
            return Ok(());
        };
        self.down_since.get_or_insert_with(Instant::now);
        let (sender, receiver) = channel();
        let wake = Arc::clone(&self.reconnected);
        let deadline = Instant::now() + timeout;
        let ferry = self.ferry.as_ref().map(|ferry| ferry.dialer.clone());
        let attempt = move || {
            let dial = || match &ferry {
                Some(ferry) => ferry.dial().map(Box::new).map(Dialed::Ferry),
                None => dialer.dial_pair().map(Box::new).map(Dialed::Criu),
            };
            let result = loop {
                match dial() {
                    // What a source of another kind says will not change.
                    Err(error) if error.kind() != Kind::Protocol && Instant::now() < deadline => {
                        std::thread::sleep(RECONNECT_PAUSE);
                    }
                    result => break result,
                }
            };
            // A receiver that is gone has given up; a full eventfd has been told.
            let _ = sender.send(result);
            let _ = wake.write(1);
        };
        let named = std::thread::Builder::new().name("reconnect".to_owned());
        named
            .spawn(attempt)
            .map_err(|error| Error::wrap(Kind::Io, "cannot start a thread", error))?;
        self.attempt = Some(receiver);
        Ok(())
    }

    /// Waits for an attempt that is under way: a source must be told of the end also when it was lost
    /// behind the last page.
    pub(super) fn await_attempt(&mut self, signals: &Signals) -> Result<()> {
        let Some(attempt) = self.attempt.take() else {
            return Ok(());
        };
        // The attempt has a deadline of its own.
        let outcome = loop {
            match attempt.recv_timeout(RECONNECT_PAUSE) {
                Err(RecvTimeoutError::Timeout) => signals.check()?,
                outcome => break outcome.unwrap_or_else(|_| Err(attempt_lost())),
            }
        };
        self.attach(outcome?);
        Ok(())
    }

    /// Waits no longer than `most` for the source to be reached, for a last message. Returns whether it is.
    pub(super) fn reach_once(&mut self, most: Duration) -> bool {
        if self.attempt.is_none()
            && let Err(error) = self.start_reconnecting(most)
        {
            tracing::warn!("cannot notify the source: {error}");
        }
        let attempt = self.attempt.take();
        let Some(Ok(Ok(dialed))) = attempt.map(|attempt| attempt.recv_timeout(most)) else {
            tracing::warn!("could not notify the source: it cannot be reached");
            return false;
        };
        self.attach(dialed);
        true
    }

    fn attach(&mut self, dialed: Dialed) {
        tracing::info!("the source is back");
        match (dialed, &mut self.ferry) {
            (Dialed::Ferry(pair), Some(ferry)) => ferry.client.attach(*pair),
            (Dialed::Ferry(_), None) => {}
            (Dialed::Criu(pair), _) => self.pair = Some(*pair),
        }
    }
}

impl Restore {
    pub(in crate::engine::restore) fn bad_source(
        &self,
        error: impl std::error::Error + Send + Sync + 'static,
    ) -> Error {
        let peer = self.links.peer();
        Error::wrap(
            Kind::Protocol,
            format!("the source at {peer} cannot be used"),
            error,
        )
    }

    /// A connection is gone. `cause` is `None` if the source ended it in order.
    pub(super) fn link_failed(
        &mut self,
        which: Which,
        cause: Option<std::io::Error>,
    ) -> Result<()> {
        let Some(pair) = &mut self.links.pair else {
            return Ok(());
        };
        if which == Which::Fault && pair.fault.as_ref().is_some_and(|fault| !fault.proven) {
            tracing::debug!("the source takes one connection: faults share it with the stream");
            if let Some(fault) = pair.fault.take() {
                unwatch(&self.poll, &fault.link.socket());
            }
            return Ok(());
        }
        let peer = self.links.peer();
        let never_spoke = self.links.bytes_received() == 0;
        let what = if never_spoke {
            format!(
                "the source at {peer} hung up without sending a page: its dump has failed or was killed (its \
                 log says why), or it is a page server that receives (without --lazy-pages)"
            )
        } else {
            format!(
                "the source at {peer} hung up before all pages had arrived: it has failed or was killed (its log \
                 says why), or the network broke"
            )
        };
        let error = match cause {
            Some(cause) => Error::wrap(Kind::PeerLost, what, cause),
            None => Error::new(Kind::PeerLost, what),
        };
        self.source_lost(error)
    }

    /// All connections to the source are given up, and made again if it may come back.
    pub(super) fn source_lost(&mut self, error: Error) -> Result<()> {
        self.reset_links();
        self.reach_again(error)
    }

    /// Connections to the source, of which there are none because of `error`, are made again if it may
    /// come back.
    pub(in crate::engine::restore) fn reach_again(&mut self, error: Error) -> Result<()> {
        match self.links.may_reconnect() {
            Some(timeout) if !self.losses.is_source_lost() => {
                tracing::warn!(
                    "{error}; trying to reach it again for {} s",
                    timeout.as_secs()
                );
                self.planner.give_back_all();
                let started = self.links.start_reconnecting(timeout);
                started.map_err(|thread| thread.within(error))
            }
            _ => Err(error),
        }
    }

    /// The same for whoever takes over before the source has shown by a page whether it can be reached again: it is tried
    /// once. A dump of CRIU's has been given up by now, and refuses.
    pub(in crate::engine::restore) fn reach_unproven(&mut self, error: Error) -> Result<()> {
        if self.links.ours || self.links.reconnect_timeout.is_some() {
            return self.reach_again(error);
        }
        tracing::warn!("{error}; trying once to reach the source again");
        self.planner.give_back_all();
        let started = self.links.start_reconnecting(Duration::ZERO);
        started.map_err(|thread| thread.within(error))
    }

    /// An attempt to reach the source again has ended.
    pub(in crate::engine::restore) fn take_reconnected(&mut self) -> Result<()> {
        // Not readable again is all that matters.
        let _ = self.links.reconnected.read();
        let outcome = match self.links.attempt.as_ref().map(Receiver::try_recv) {
            Some(Ok(outcome)) => outcome,
            Some(Err(TryRecvError::Empty)) | None => return Ok(()),
            Some(Err(TryRecvError::Disconnected)) => Err(attempt_lost()),
        };
        self.links.attempt = None;
        match outcome {
            Ok(dialed) => self.links.attach(dialed),
            Err(error) if self.losses.is_source_lost() => {
                tracing::error!("the source could not be reached: {error}");
                return Ok(());
            }
            Err(error) => {
                return Err(error.within(format!(
                    "the source at {} could not be reached again",
                    self.links.peer()
                )));
            }
        }
        self.recover();
        self.watch_links()
    }
}

fn attempt_lost() -> Error {
    let text = "the attempt to reach the source again was lost";
    Error::new(Kind::PeerLost, text)
}
