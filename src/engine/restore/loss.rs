//! When pages cannot come: no thread may read a zero page in place of a lost one.
//!
//! ```text
//! source lost, SIGTERM, SIGINT -> the connections are reset (CRIU's source lives on)
//!                              -> what only the source has: poisoned | held | its processes killed
//!                              -> what local images have is still installed
//!                              -> exit code 1, and the log says which process lacks how many pages
//! ```
//!
//! Held processes wait for an operator: SIGTERM or SIGINT poisons and ends, SIGUSR1 tries the source
//! again, SIGUSR2 kills them.

use std::collections::BTreeMap;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::waking::Waiters;
use super::{OnLoss, Restore};
use crate::error::{Error, Kind, Result};
use crate::lazy::extents::Piece;
use crate::lazy::planner::{SpaceId, Way};
use crate::lazy::space::Space;
use crate::sys::uffd::Filled;
use crate::units::PageRange;

/// Poisoned with one call at most, bytes: the process's memory is locked meanwhile.
const POISON_BYTES_MAX: u64 = 2 << 20;

/// After a process was killed, until it is looked whether it has ended.
const LAST_PAUSE: Duration = Duration::from_millis(10);

/// Rounds that may fail one after the other when all is lost already.
const FAILED_ROUNDS_MAX: u32 = 500;

/// See [`POISON_BYTES_MAX`].
pub(super) fn poison_limit() -> u64 {
    POISON_BYTES_MAX
}

/// What one call has done, bytes.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Done {
    /// Settled, in whatever way.
    pub(super) bytes: u64,
    /// Of these poisoned.
    pub(super) poisoned: u64,
}

/// What is lost, and what becomes of the processes.
#[derive(Debug)]
pub(super) struct Loss {
    cause: Error,
    policy: OnLoss,
    /// By pid, the pages that only the source had when it was lost.
    pages: BTreeMap<u32, u64>,
    /// By pid, the pages of which the kernel said that they were missing.
    poisoned: BTreeMap<u32, u64>,
    /// Processes run here, and those of the source may as well.
    twice: bool,
}

impl Loss {
    pub(super) fn waits_for_operator(&self) -> bool {
        self.policy == OnLoss::Hold
    }

    pub(super) fn into_error(self) -> Error {
        let pages = match self.policy {
            OnLoss::Poison => self.poisoned,
            OnLoss::Hold | OnLoss::Kill => self.pages,
        };
        let lost: u64 = pages.values().sum();
        if lost == 0 && self.twice {
            let text = "no page is lost, but the source was reset, not told: its processes may run on as well \
                        as the restored ones, and then one of the two must be ended";
            return self.cause.within(text);
        }
        if lost == 0 {
            return self.cause;
        }
        let each: Vec<String> = pages
            .iter()
            .map(|(pid, pages)| format!("pid {pid} lacks {pages} pages"))
            .collect();
        let fate = match self.policy {
            OnLoss::Poison => "reading one raises SIGBUS",
            OnLoss::Hold => "their readers were held",
            OnLoss::Kill => "its processes were killed",
        };
        Error::wrap(
            Kind::MemoryLost,
            format!("memory is lost: {} ({fate})", each.join(", ")),
            self.cause,
        )
    }
}

impl Restore {
    /// Gives the source up for good. An error here means that not even that could be done.
    pub(super) fn lose(&mut self, cause: Error) -> Result<()> {
        self.wake_held_threads();
        // An operator may still have it try again.
        if self.config.on_loss != OnLoss::Hold {
            self.fail_ferry(&cause);
        }
        self.links.reset();
        self.fallback = None;
        self.is_stopping |= cause.kind() == Kind::Interrupted;
        if self.is_stopping {
            self.unreadable.try_now();
        }
        // What has come already is not lost; what its process cannot take now either is poisoned with the rest.
        self.deferred.try_now();
        let _ = self.resume_due();
        self.planner.lose();
        // The restore's own end is all that is left to hear of it.
        self.intake_done = true;
        if self.loss.is_none() {
            let mut pages = BTreeMap::new();
            for (_, space) in self.planner.spaces() {
                *pages.entry(space.pid()).or_insert(0) +=
                    space.remote_bytes() >> self.images.page().shift();
            }
            pages.retain(|_, lost| *lost > 0);
            tracing::error!("{cause}");
            let at_most = if self.took_over { "up to " } else { "" };
            for (pid, lost) in &pages {
                tracing::error!("pid {pid} lacks {at_most}{lost} pages that only the source has");
            }
            self.loss = Some(Loss {
                cause,
                policy: self.config.on_loss,
                pages,
                poisoned: BTreeMap::new(),
                twice: self.finished && self.config.source.is_some() && !self.processes.is_empty(),
            });
        } else if let Some(left_out) = self.complaints.admit(self.clock.now_us()) {
            tracing::error!("{cause}{left_out}");
        }
        self.apply_policy()
    }

    /// Nothing works any more, `rounds` times in a row: neither the log nor the CPU is to suffer, a signal is
    /// an end, and after a while there is one without.
    pub(super) fn bear_failures(&mut self, rounds: u32) -> Result<()> {
        std::thread::sleep(LAST_PAUSE);
        let told_to_end = self.handle_signals();
        if rounds < FAILED_ROUNDS_MAX && told_to_end.is_ok() {
            return Ok(());
        }
        self.kill_processes(Space::first_missing);
        let text = "the restore cannot go on, and processes that lack memory were killed";
        told_to_end.map_err(|error| error.within(text))?;
        Err(Error::new(Kind::MemoryLost, text))
    }

    fn apply_policy(&mut self) -> Result<()> {
        match self.loss.as_ref().map(|loss| loss.policy) {
            None => Ok(()),
            Some(OnLoss::Poison) => self.poison_lost(),
            Some(OnLoss::Hold) => {
                tracing::warn!(
                    "holding the processes: send SIGTERM to poison their lost pages and end, SIGUSR1 to try the source again, SIGUSR2 to kill them"
                );
                Ok(())
            }
            Some(OnLoss::Kill) => {
                self.kill_processes(Space::first_remote);
                self.poison_lost()
            }
        }
    }

    /// Poisons all that only the source had. A kernel without UFFDIO_POISON holds instead.
    pub(super) fn poison_lost(&mut self) -> Result<()> {
        loop {
            let mut left = false;
            let ids: Vec<SpaceId> = self.processes.keys().copied().collect();
            for id in ids {
                match self.poison_process(id) {
                    Ok(()) => {}
                    Err(error) if error.kind() == Kind::Unsupported => {
                        return self.hold_instead(&error);
                    }
                    Err(error) => return Err(error),
                }
                // A fork that was read meanwhile has brought another process.
                left |= self
                    .planner
                    .spaces()
                    .any(|(_, space)| space.first_remote().is_some());
            }
            if !left {
                return Ok(());
            }
        }
    }

    fn hold_instead(&mut self, why: &Error) -> Result<()> {
        tracing::error!(
            "{why}: holding the processes instead; SIGUSR1 tries the source again, SIGUSR2 kills them"
        );
        if let Some(loss) = &mut self.loss {
            loss.policy = OnLoss::Hold;
        }
        Ok(())
    }

    fn poison_process(&mut self, id: SpaceId) -> Result<()> {
        let mut limit = POISON_BYTES_MAX;
        loop {
            self.read_events(id)?;
            let Some(piece) = self
                .planner
                .space(id)
                .and_then(crate::lazy::space::Space::first_remote)
            else {
                return Ok(());
            };
            let Some(pid) = self.processes.get(&id).map(|process| process.pid) else {
                return Ok(());
            };
            let done = self.poison_some(id, piece.at, &mut limit)?;
            if let Some(loss) = &mut self.loss {
                let pages = done.poisoned >> self.images.page().shift();
                *loss.poisoned.entry(pid).or_insert(0) += pages;
            }
        }
    }

    /// Poisons the start of `at`, at most `limit` bytes, which is lowered where that is too much.
    pub(super) fn poison_some(
        &mut self,
        id: SpaceId,
        at: PageRange,
        limit: &mut u64,
    ) -> Result<Done> {
        let page = self.images.page().bytes();
        let Some(process) = self.processes.get(&id) else {
            return Ok(Done::default());
        };
        let start = at.start().get();
        let range = PageRange::new(start, start + at.bytes().min(*limit));
        let first = PageRange::new(start, start + page);
        let gone = Done {
            bytes: page,
            poisoned: 0,
        };
        let pid = process.pid;
        let filled = process.uffd.poison(range).map_err(|error| {
            let kind = match error.kind() {
                std::io::ErrorKind::InvalidInput | std::io::ErrorKind::Unsupported => {
                    Kind::Unsupported
                }
                _ if error.raw_os_error() == Some(nix::libc::ENOTTY) => Kind::Unsupported,
                _ => Kind::Io,
            };
            let text =
                format!("cannot poison {range} of pid {pid} (UFFDIO_POISON needs Linux 6.6)");
            Error::wrap(kind, text, error)
        })?;
        match filled {
            Filled::Bytes(bytes) => {
                let poisoned = PageRange::new(start, start + bytes);
                self.settle(id, poisoned, Way::Poisoned, Waiters::Woken);
                *limit = POISON_BYTES_MAX;
                return Ok(Done {
                    bytes,
                    poisoned: bytes,
                });
            }
            Filled::Unmapped | Filled::Unreadable | Filled::NoRoom if range.bytes() > page => {
                *limit = self.images.page().floor(range.bytes() / 2).max(page);
                return Ok(Done::default());
            }
            // The page is there, or its mapping or file ends before it.
            Filled::Present | Filled::Unmapped | Filled::Unreadable => {
                self.settle(id, first, Way::Gone, Waiters::Asleep);
                return Ok(gone);
            }
            Filled::Changing => {
                std::thread::yield_now();
                self.read_events(id)?;
            }
            Filled::NoRoom => self.kill_unpoisonable(id),
            Filled::Exited => self.forget(id),
        }
        Ok(Done::default())
    }

    /// There is not even room to poison a page of `id`, as its control group is full: nothing but its end keeps
    /// it from reading zeros later.
    fn kill_unpoisonable(&mut self, id: SpaceId) {
        let Some(pid) = self.processes.get(&id).map(|process| process.pid) else {
            return;
        };
        if let Some(left_out) = self.complaints.admit(self.clock.now_us()) {
            tracing::error!(
                "the lost pages of pid {pid} cannot be poisoned, for its control group is full: killing \
                 it{left_out}"
            );
        }
        self.kill_processes(|space| (space.pid() == pid).then(|| space.first_missing())?);
        std::thread::sleep(LAST_PAUSE);
        self.look_for_ended();
    }

    pub(super) fn handle_signals(&mut self) -> Result<()> {
        while let Some(signal) = self.signals.next() {
            let held = self.loss.as_ref().is_some_and(Loss::waits_for_operator);
            let for_held = signal.is(Signal::SIGUSR1) || signal.is(Signal::SIGUSR2);
            match held {
                true if signal.is(Signal::SIGUSR1) => self.try_source_again(),
                true if signal.is(Signal::SIGUSR2) => self.decide(OnLoss::Kill)?,
                false if for_held => {
                    tracing::warn!("{signal} is for processes that are held; none is");
                }
                true => self.decide(OnLoss::Poison)?,
                false => {
                    let text = format!("stopped by {signal}");
                    return Err(Error::new(Kind::Interrupted, text));
                }
            }
        }
        Ok(())
    }

    fn decide(&mut self, policy: OnLoss) -> Result<()> {
        if let Some(loss) = &mut self.loss {
            loss.policy = policy;
        }
        self.apply_policy()
    }

    fn try_source_again(&mut self) {
        tracing::info!("trying to reach the source again");
        self.links
            .start_reconnecting(super::reconnect::RECONNECT_DEFAULT);
    }

    /// The source is back after it was given up, in time for processes that were held.
    pub(super) fn recover(&mut self) {
        if self.loss.take().is_some() {
            tracing::info!("the held processes go on");
            self.planner.recover();
        }
    }

    /// Kills the processes whose pages are lost: those that have a part of their memory under a
    /// userfaultfd where `lacks` finds something.
    pub(super) fn kill_processes(&mut self, lacks: impl Fn(&Space) -> Option<Piece>) {
        let lost: Vec<(u32, PageRange)> = self
            .planner
            .spaces()
            .filter_map(|(_, space)| Some((space.pid(), lacks(space)?.at)))
            .collect();
        for pid in super::owner_processes::find(&lost) {
            match kill(Pid::from_raw(pid), Signal::SIGKILL) {
                Ok(()) => tracing::warn!("killed process {pid}: its memory is lost"),
                Err(errno) => {
                    tracing::error!("cannot kill process {pid}, whose memory is lost: {errno}");
                }
            }
        }
    }
}
