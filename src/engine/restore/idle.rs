//! What the loop does when there is nothing to do: it polls for a moment, then sleeps.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll, ppoll};
use nix::sched::sched_yield;
use nix::sys::time::TimeSpec;

use super::{Restore, TICK};
use crate::error::{Error, Kind, Result};

/// How long to look for a fault or an answer that is due before sleeping, µs.
const SPIN_US: u64 = 50;

/// After this long an answer that the kernel refused is tried again, µs.
const RETRY_US: u64 = 1_000;

impl Restore {
    /// Waits until something happens or it is time for something. With ppoll, since what the
    /// background waits for is often less than the millisecond that epoll_wait can tell.
    pub(super) fn wait(&mut self) -> Result<()> {
        self.guard_scans.forget();
        if self.busy_poll()? {
            return Ok(());
        }
        let timeout = TimeSpec::from_duration(self.wait_time());
        let mut polled = [PollFd::new(self.poll.0.as_fd(), PollFlags::POLLIN)];
        match ppoll(&mut polled, Some(timeout), None) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(Error::wrap(Kind::Io, "cannot wait for events", errno)),
        }
    }

    /// Looks again and again for a short time, as long as a fault or its answer is due: to sleep and
    /// be woken takes a third of the time of a fault. Others that want the CPU have it. Returns whether
    /// something happened.
    fn busy_poll(&mut self) -> Result<bool> {
        let mut now_us = self.clock.now_us();
        let until_us = now_us + SPIN_US;
        let mut polled = [PollFd::new(self.poll.0.as_fd(), PollFlags::POLLIN)];
        while now_us < until_us && self.links.is_fault_due(now_us) {
            match poll(&mut polled, PollTimeout::ZERO) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(true),
                Err(errno) => return Err(Error::wrap(Kind::Io, "cannot wait for events", errno)),
            }
            sched_yield().map_err(|errno| Error::wrap(Kind::Io, "cannot yield the CPU", errno))?;
            now_us = self.clock.now_us();
        }
        Ok(false)
    }

    fn wait_time(&mut self) -> Duration {
        let now_us = self.clock.now_us();
        let limited = self.background.waits_until_us(now_us);
        let held = self.links.holds_until_us(now_us);
        let mut retries = self.processes.retries().iter();
        let retry = retries
            .any(|(id, _)| !self.deferred.is_paused(*id))
            .then_some(now_us + RETRY_US);
        let deferred = self.deferred.until_us();
        let unreadable = self.unreadable.until_us();
        let look = self.next_look().unwrap_or(TICK);
        let wakeup = self.batched_wakeup.until_us();
        [limited, held, retry, wakeup, deferred, unreadable]
            .into_iter()
            .flatten()
            .map(|until_us| Duration::from_micros(until_us.saturating_sub(now_us)))
            .chain(self.handover.fills_in().filter(|left| !left.is_zero()))
            .fold(TICK.min(look), Duration::min)
    }
}
