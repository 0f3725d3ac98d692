//! Signals as something to read: no handler runs in the middle of anything.

use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::error::{Error, Kind, Result};

/// The signals that are read.
fn handled() -> SigSet {
    [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
    ]
    .into_iter()
    .collect()
}

/// Keeps the signals from their default effects in this thread and those that it starts. To be
/// called before any other thread is started.
pub fn block() -> Result<()> {
    handled()
        .thread_block()
        .map_err(|errno| Error::wrap(Kind::Io, "cannot block signals", errno))
}

/// The blocked signals, readable.
#[derive(Debug)]
pub(super) struct Signals(SignalFd);

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Signals {
    pub(super) fn new() -> Result<Signals> {
        SignalFd::with_flags(&handled(), SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
            .map(Signals)
            .map_err(|errno| Error::wrap(Kind::Io, "cannot make a signal descriptor", errno))
    }

    /// The next signal, if one has come.
    pub(super) fn next(&mut self) -> Option<Signal> {
        let info = self.0.read_signal().ok().flatten()?;
        Signal::try_from(i32::try_from(info.ssi_signo).ok()?).ok()
    }
}
