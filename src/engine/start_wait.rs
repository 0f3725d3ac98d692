//! Waiting at the start for what a dump is about to make: its images, and the port on which it listens.
//!
//! Who starts `criu dump --lazy-pages` and the other side together need not know which of the two is quicker. The
//! wait is bounded, and is said at once, so that a wrong directory or address shows as well.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::error::{Error, Kind, Result};

/// Between two looks, ms.
const PAUSE_MS: u16 = 100;

/// A wait that ends at its limit or by a signal. See the module's text.
#[derive(Debug)]
pub struct StartWait {
    limit: Duration,
    start: Instant,
    signals: SignalFd,
    said: bool,
}

/// What an attempt has come to.
pub(super) enum Attempt<T> {
    /// There it is.
    Done(T),
    /// It may come.
    NotYet(Error),
}

impl StartWait {
    /// A wait of at most `limit`, with SIGTERM and SIGINT blocked.
    pub(super) fn new(limit: Duration) -> Result<StartWait> {
        let ending: SigSet = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let signals = SignalFd::with_flags(&ending, flags)
            .map_err(|errno| Error::wrap(Kind::Io, "cannot make a signal descriptor", errno))?;
        Ok(StartWait {
            limit,
            start: Instant::now(),
            signals,
            said: false,
        })
    }

    /// Waits no longer than `limit` from now on.
    pub(super) fn shorten(&mut self, limit: Duration) {
        self.limit = self.limit.min(self.start.elapsed() + limit);
    }

    /// Tries until it is there.
    ///
    /// # Errors
    ///
    /// An attempt has failed for good, the limit is reached, or a signal has come.
    pub(super) fn until<T>(
        &mut self,
        mut attempt: impl FnMut() -> Result<Attempt<T>>,
    ) -> Result<T> {
        loop {
            let missing = match attempt()? {
                Attempt::Done(done) => return Ok(done),
                Attempt::NotYet(missing) => missing,
            };
            let seconds = self.limit.as_secs();
            if self.start.elapsed() >= self.limit {
                return Err(match seconds {
                    0 => missing,
                    _ => missing.within(format!("gave up after {seconds} s (--wait)")),
                });
            }
            if !std::mem::replace(&mut self.said, true) {
                tracing::warn!("{missing}: waiting for up to {seconds} s (--wait)");
            }
            self.pause()?;
        }
    }

    fn pause(&self) -> Result<()> {
        let mut signals = [PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut signals, PollTimeout::from(PAUSE_MS)) {
            Ok(0) | Err(Errno::EINTR) => Ok(()),
            Ok(_) => {
                // Read, so that nobody takes it for one that came later.
                let _ = self.signals.read_signal();
                let text = "stopped by a signal while it waited for the dump";
                Err(Error::new(Kind::Interrupted, text))
            }
            Err(errno) => Err(Error::wrap(Kind::Io, "cannot wait for signals", errno)),
        }
    }
}

/// Nobody could be connected to yet: somebody may listen there soon.
pub(super) fn not_yet<T>(connected: Result<T>) -> Result<Attempt<T>> {
    match connected {
        Ok(done) => Ok(Attempt::Done(done)),
        Err(error) if error.is_unreachable() => Ok(Attempt::NotYet(error)),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::raise;

    use super::*;

    fn missing() -> Error {
        Error::new(Kind::Image, "the images are missing")
    }

    #[test]
    fn it_is_waited_for_until_it_comes_or_cannot_come() {
        let mut wait = StartWait::new(Duration::from_secs(60)).unwrap();
        let mut tries = 0;
        let came = wait.until(|| {
            tries += 1;
            Ok(match tries {
                3 => Attempt::Done("it"),
                _ => Attempt::NotYet(missing()),
            })
        });
        assert_eq!(came.unwrap(), "it");
        let failed: Result<()> = wait.until(|| Err(Error::new(Kind::Usage, "wrong")));
        assert_eq!(failed.unwrap_err().to_string(), "wrong");
    }

    #[test]
    fn the_limit_is_named() {
        let wait = |seconds| {
            let mut wait = StartWait::new(Duration::from_secs(seconds)).unwrap();
            let waited: Result<()> = wait.until(|| Ok(Attempt::NotYet(missing())));
            waited.unwrap_err().to_string()
        };
        assert_eq!(wait(0), "the images are missing");
        assert_eq!(
            wait(1),
            "gave up after 1 s (--wait): the images are missing"
        );
    }

    #[test]
    fn a_signal_ends_it() {
        SigSet::from(Signal::SIGTERM).thread_block().unwrap();
        let mut wait = StartWait::new(Duration::from_secs(600)).unwrap();
        raise(Signal::SIGTERM).unwrap();
        let waited: Result<()> = wait.until(|| Ok(Attempt::NotYet(missing())));
        assert_eq!(waited.unwrap_err().kind(), Kind::Interrupted);
    }
}
