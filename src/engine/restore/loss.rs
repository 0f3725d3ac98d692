//! When pages cannot come: no thread may read a zero page in place of a lost one.
//!
//! ```text
//! source lost, or a signal that ends a process
//!     -> what only the source has: poisoned | held | its processes killed
//!     -> the connections are given up (CRIU's source lives on)
//!     -> what local images have is still installed
//!     -> exit code 1, and the log says which process lacks how many pages
//! ```
//!
//! | signal to a lazy-client that holds processes | what it does |
//! |---|---|
//! | SIGUSR1 | tries the source again |
//! | SIGUSR2 | kills the processes |
//! | any that would end lazy-client | poisons what is missing, and ends |
//!
//! A signal of the last kind is never a reason to hold: its sender may kill lazy-client a moment later. All descriptors
//! and memory that this needs were reserved at the start ([`super::reserve`]).

use std::collections::BTreeMap;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::deferred::{LeftOut, LogLimiter};
use super::given_up::GivenUp;
use super::poison::LAST_PAUSE;
use super::reserve::Reserve;
use super::{OnLoss, Restore, RestoreConfig};
use crate::error::{Error, Kind, Result};
use crate::lazy::extents::Piece;
use crate::lazy::space::Space;
use crate::units::PageRange;

/// Rounds that may fail one after the other when all is lost already.
const FAILED_ROUNDS_MAX: u32 = 500;

/// What is lost, and what becomes of the processes.
#[derive(Debug)]
struct Loss {
    cause: Error,
    policy: OnLoss,
    /// By pid, the pages that only the source had when it was lost.
    pages: BTreeMap<u32, u64>,
    /// By pid, the pages of which the kernel said that they were missing.
    poisoned: BTreeMap<u32, u64>,
    /// Processes run here, and those of the source may as well.
    twice: bool,
}

/// What was lost or given up so far, and what is to become of more.
///
/// Invariants: once a signal has asked for the end nothing waits for an operator; the reserve is there unless
/// something is lost.
#[derive(Debug)]
pub(super) struct Losses {
    /// What becomes of what is lost from now on.
    policy: OnLoss,
    /// How long what fails on this host is tried again.
    local_timeout: Duration,
    /// A signal has asked for the end: nothing is waited for any more.
    is_stopping: bool,
    /// The source is lost.
    source: Option<Loss>,
    given_up: GivenUp,
    reserve: Reserve,
    log_limiter: LogLimiter,
}

impl Losses {
    /// Nothing is lost yet.
    pub(super) fn new(config: &RestoreConfig) -> Result<Losses> {
        Ok(Losses {
            policy: config.on_loss,
            local_timeout: config.local_timeout,
            is_stopping: false,
            source: None,
            given_up: GivenUp::default(),
            reserve: Reserve::new()?,
            log_limiter: LogLimiter::default(),
        })
    }

    /// Whether the source is lost.
    pub(super) fn is_source_lost(&self) -> bool {
        self.source.is_some()
    }

    /// Whether nothing more can come from the source: it is lost, and no operator is asked.
    pub(super) fn is_decided(&self) -> bool {
        matches!(&self.source, Some(loss) if loss.policy != OnLoss::Hold)
    }

    /// Whether the processes are held until an operator decides.
    fn waits_for_operator(&self) -> bool {
        self.source.is_some() && !self.is_decided()
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.is_stopping
    }

    /// What becomes of what is lost from now on.
    pub(super) fn policy(&self) -> OnLoss {
        self.policy
    }

    /// From now on readers of what cannot be had wait for an operator.
    pub(super) fn hold_from_now_on(&mut self) {
        self.policy = OnLoss::Hold;
    }

    /// What becomes of the processes whose pages are lost with the source, if it is lost.
    pub(super) fn decide(&mut self, policy: OnLoss) {
        if let Some(loss) = &mut self.source {
            loss.policy = policy;
        }
    }

    /// Whether a line of a kind that may come again and again is to be written, and how many were not.
    pub(super) fn may_log(&mut self, now_us: u64) -> Option<LeftOut> {
        self.log_limiter.admit(now_us)
    }

    /// What is needed to lose in order is given to whoever needs it.
    pub(super) fn use_reserve(&mut self) {
        self.reserve.release();
    }

    /// How long what fails here is tried again. Whoever needs a page waits for an operator if it is so wished.
    pub(super) fn local_retry_time(&self) -> Duration {
        match self.policy {
            _ if self.is_stopping => Duration::ZERO,
            OnLoss::Hold => Duration::MAX,
            OnLoss::Poison | OnLoss::Kill => self.local_timeout,
        }
    }

    /// Something is being lost because of `cause`. If that is a signal, nothing is held.
    fn begin(&mut self, cause: &Error) {
        self.reserve.release();
        self.is_stopping |= cause.kind() == Kind::Interrupted;
        if self.is_stopping && self.policy == OnLoss::Hold {
            self.policy = OnLoss::Poison;
        }
        if let Some(loss) = &mut self.source
            && self.is_stopping
            && loss.policy == OnLoss::Hold
        {
            loss.policy = OnLoss::Poison;
        }
    }

    /// The source is back. Returns whether it was lost.
    fn recover(&mut self) -> bool {
        let was_lost = self.source.take().is_some();
        if was_lost {
            self.reserve.refill();
        }
        was_lost
    }

    /// So many pages of `pid` were missing, and are poisoned.
    pub(super) fn note_poisoned(&mut self, pid: u32, pages: u64) {
        if let Some(loss) = &mut self.source {
            *loss.poisoned.entry(pid).or_insert(0) += pages;
        }
    }

    /// So many pages of `pid` are given up because of `why`.
    pub(super) fn note_given_up(&mut self, pid: u32, pages: u64, why: &str) {
        self.given_up.note(pid, pages, why);
    }

    /// How the restore has ended. Nothing is lost any more afterwards.
    pub(super) fn conclude(&mut self) -> Result<()> {
        let outcome = match self.source.take() {
            None => Ok(()),
            Some(loss) => Err(loss.into_error()),
        };
        std::mem::take(&mut self.given_up).conclude(outcome)
    }
}

impl Loss {
    fn into_error(self) -> Error {
        let pages = match self.policy {
            OnLoss::Poison => self.poisoned,
            OnLoss::Hold | OnLoss::Kill => self.pages,
        };
        let lost: u64 = pages.values().sum();
        if lost == 0 && self.twice {
            let text = "no page is lost, but the source was reset, not notified: its processes may run on as well \
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
    /// Gives the source up for good. What could be read as zero is taken care of before anything else.
    pub(super) fn lose(&mut self, cause: Error) {
        self.losses.begin(&cause);
        self.wake_held_threads();
        if self.losses.is_stopping() {
            self.unreadable.try_now();
        }
        // An operator may have the restore go on.
        if self.losses.policy() != OnLoss::Hold {
            self.end_handover();
        }
        // What has come already is not lost; what its process cannot take now either is poisoned with the rest.
        self.deferred.try_now();
        let _ = self.resume_due();
        self.planner.lose();
        // All that can still come of it is the end of the restore.
        self.handover.end();
        let why = cause.to_string();
        self.note_loss(cause);
        self.apply_policy();
        if self.losses.is_stopping() {
            self.guard_local();
        }
        // An operator may still have it try again.
        if self.losses.policy() != OnLoss::Hold {
            self.fail_ferry(&why);
        }
        self.reset_links();
        self.links.drop_fallback();
    }

    fn note_loss(&mut self, cause: Error) {
        if self.losses.is_source_lost() {
            if let Some(left_out) = self.losses.may_log(self.clock.now_us()) {
                tracing::error!("{cause}{left_out}");
            }
            return;
        }
        let mut pages = BTreeMap::new();
        for (_, space) in self.planner.spaces() {
            *pages.entry(space.pid()).or_insert(0) +=
                space.remote_bytes() >> self.images.page().shift();
        }
        pages.retain(|_, lost| *lost > 0);
        tracing::error!("{cause}");
        let at_most = if self.handover.was_taken_over() {
            "up to "
        } else {
            ""
        };
        for (pid, lost) in &pages {
            tracing::error!("pid {pid} lacks {at_most}{lost} pages that only the source has");
        }
        self.losses.source = Some(Loss {
            cause,
            policy: self.losses.policy,
            pages,
            poisoned: BTreeMap::new(),
            twice: self.handover.is_finished()
                && self.config.source.is_some()
                && !self.processes.is_empty(),
        });
    }

    /// Nothing works any more, `rounds` times in a row: neither the log nor the CPU is to suffer, a signal is
    /// an end, and after a while there is one without.
    pub(super) fn tolerate_failures(&mut self, rounds: u32) -> Result<()> {
        std::thread::sleep(LAST_PAUSE);
        let told_to_end = self.handle_signals();
        if rounds < FAILED_ROUNDS_MAX && told_to_end.is_ok() {
            return Ok(());
        }
        self.kill_processes(Space::first_missing);
        let text = "the restore cannot continue, and processes that lack memory were killed";
        told_to_end.map_err(|error| error.within(text))?;
        Err(Error::new(Kind::MemoryLost, text))
    }

    fn apply_policy(&mut self) {
        match self.losses.source.as_ref().map(|loss| loss.policy) {
            None => {}
            Some(OnLoss::Poison) => self.poison_lost(),
            Some(OnLoss::Hold) => {
                tracing::warn!(
                    "holding the processes: send SIGTERM to poison their lost pages and end, SIGUSR1 to try the source again, SIGUSR2 to kill them"
                );
            }
            Some(OnLoss::Kill) => {
                self.kill_processes(Space::first_remote);
                self.poison_lost();
            }
        }
    }

    pub(super) fn handle_signals(&mut self) -> Result<()> {
        while let Some(signal) = self.signals.next() {
            let held = self.losses.waits_for_operator();
            let for_held = signal.is(Signal::SIGUSR1) || signal.is(Signal::SIGUSR2);
            match held {
                true if signal.is(Signal::SIGUSR1) => self.try_source_again(),
                true if signal.is(Signal::SIGUSR2) => self.decide(OnLoss::Kill),
                false if for_held => {
                    tracing::warn!("{signal} is for processes that are held; none is");
                }
                _ => {
                    let text = format!("stopped by {signal}");
                    return Err(Error::new(Kind::Interrupted, text));
                }
            }
        }
        Ok(())
    }

    fn decide(&mut self, policy: OnLoss) {
        self.losses.decide(policy);
        self.apply_policy();
    }

    fn try_source_again(&mut self) {
        tracing::info!("trying to reach the source again");
        let timeout = super::links::RECONNECT_DEFAULT;
        if let Err(error) = self.links.start_reconnecting(timeout) {
            tracing::error!("{error}");
        }
    }

    /// The source is back after it was given up, in time for processes that were held.
    pub(super) fn recover(&mut self) {
        if self.losses.recover() {
            tracing::info!("the held processes continue");
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
        self.losses.use_reserve();
        let owners = super::owner_processes::find(&lost);
        if !self.losses.is_source_lost() {
            self.losses.reserve.refill();
        }
        for pid in owners {
            match kill(Pid::from_raw(pid), Signal::SIGKILL) {
                Ok(()) => tracing::warn!("killed process {pid}: its memory is lost"),
                Err(errno) => {
                    tracing::error!("cannot kill process {pid}, whose memory is lost: {errno}");
                }
            }
        }
    }
}
