//! Signals that ask a program to end.

use pageferry::error::{Error, Kind, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGTERM and SIGINT, from when this is made.
#[derive(Debug)]
pub(crate) struct EndSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl EndSignals {
    /// From now on the signals do not kill this process.
    pub(crate) fn new() -> Result<EndSignals> {
        let failed = |error| Error::wrap(Kind::Io, "cannot wait for signals", error);
        Ok(EndSignals {
            terminate: signal(SignalKind::terminate()).map_err(failed)?,
            interrupt: signal(SignalKind::interrupt()).map_err(failed)?,
        })
    }

    /// Waits for the next one.
    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// What a user or the system stops a command by: SIGINT, SIGTERM and SIGHUP, from when this is made.
#[derive(Debug)]
pub(crate) struct StopSignals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
}

impl StopSignals {
    /// From now on the signals do not kill this process.
    pub(crate) fn new() -> Result<StopSignals> {
        let failed = |error| Error::wrap(Kind::Io, "signals cannot be received", error);
        Ok(StopSignals {
            interrupt: signal(SignalKind::interrupt()).map_err(failed)?,
            terminate: signal(SignalKind::terminate()).map_err(failed)?,
            hang_up: signal(SignalKind::hangup()).map_err(failed)?,
        })
    }

    /// Waits for the next one. Returns the error that says which it was.
    pub(crate) async fn stopped(&mut self) -> Error {
        let by = tokio::select! {
            _ = self.interrupt.recv() => "Ctrl-C",
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.hang_up.recv() => "SIGHUP",
        };
        Error::new(Kind::Interrupted, format!("stopped by {by}"))
    }
}
