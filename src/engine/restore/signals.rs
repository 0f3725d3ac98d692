//! The signals that steer a restore, read from a descriptor.

use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::signal::Signal;

use crate::error::{Error, Kind, Result};
use crate::sys::signals::{SignalNumber, SignalReader, SignalSet};

/// Keeps every signal that would end this process from doing so, in this thread and those that it starts. To
/// be called before any other thread is started.
pub fn block() -> Result<()> {
    let blocked = SignalSet::ending().and_then(SignalSet::block);
    blocked.map_err(|error| Error::wrap(Kind::Io, "cannot block signals", error))
}

/// The blocked signals, readable.
#[derive(Debug)]
pub(super) struct Signals(SignalReader);

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Signals {
    pub(super) fn new() -> Result<Signals> {
        let reader = SignalSet::ending().and_then(SignalReader::new);
        let reader = reader
            .map_err(|error| Error::wrap(Kind::Io, "cannot make a signal descriptor", error))?;
        Ok(Signals(reader))
    }

    /// The next signal, if one has come.
    pub(super) fn next(&self) -> Option<SignalNumber> {
        self.0.next()
    }

    /// Whether this process has been told to end, as an error.
    pub(super) fn check(&self) -> Result<()> {
        while let Some(signal) = self.next() {
            if !signal.is(Signal::SIGUSR1) && !signal.is(Signal::SIGUSR2) {
                let text = format!("stopped by {signal}");
                return Err(Error::new(Kind::Interrupted, text));
            }
        }
        Ok(())
    }
}
