//! Poisoning what cannot come: reading it raises SIGBUS instead of showing zeros.
//!
//! ```text
//! only the source had it -> poisoned, and settled
//! told to end            -> local images have a moment; what they have left is poisoned as well, and filled over that
//! cannot be poisoned     -> its process is killed; if that fails too, this one does not end
//! ```
//!
//! While a process forks, its memory cannot be poisoned before its child is received. Descriptors for that are kept in
//! reserve. Children that lack nothing any more are dropped to make room for others.

use std::time::{Duration, Instant};

use super::waking::Waiters;
use super::{OnLoss, Restore};
use crate::error::{Error, Kind, Result};
use crate::lazy::planner::{PageOutcome, SpaceId};
use crate::lazy::space::Space;
use crate::sys::uffd::Filled;
use crate::units::{PageRange, Vaddr};

/// Poisoned with one call at most, bytes: the process's memory is locked meanwhile.
const POISON_BYTES_MAX: u64 = 2 << 20;

/// How long local images may go on before what they have is poisoned for the time being.
const LOCAL_GRACE: Duration = Duration::from_millis(100);

/// Calls for one process that achieve nothing, until others have their turn.
const IDLE_CALLS_MAX: u32 = 64;

/// Passes over all processes that achieve nothing, until those that lack memory are killed: a fork under way on a busy
/// machine takes its time, and nothing can read zeros meanwhile.
const IDLE_PASSES_MAX: u32 = 500;

/// The same until they are held, which is all that is left.
const FAILED_PASSES_MAX: u32 = 600;

/// Between two passes that achieve nothing.
const PASS_PAUSE: Duration = Duration::from_millis(2);

/// After a process was killed, until it is looked whether it has ended.
pub(super) const LAST_PAUSE: Duration = Duration::from_millis(10);

/// See [`POISON_BYTES_MAX`].
pub(super) fn poison_limit() -> u64 {
    POISON_BYTES_MAX
}

/// What one call has done, bytes.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Done {
    /// Settled, whatever the outcome.
    pub(super) bytes: u64,
    /// Of these poisoned.
    pub(super) poisoned: u64,
}

impl Restore {
    /// Poisons all that only the source had, whatever else fails.
    pub(super) fn poison_lost(&mut self) {
        let mut idle = 0;
        while let Some(before) = self.left_to_poison() {
            if let Err(error) = self.poison_pass() {
                return self.cannot_poison(&error);
            }
            self.close_unneeded();
            if self.left_to_poison() != Some(before) {
                idle = 0;
                continue;
            }
            idle += 1;
            if idle > FAILED_PASSES_MAX {
                let text = "the processes can neither be poisoned nor killed";
                return self.hold_instead(&Error::new(Kind::Io, text));
            }
            if idle > IDLE_PASSES_MAX {
                self.kill_processes(Space::first_remote);
                std::thread::sleep(LAST_PAUSE);
                self.look_for_ended();
            } else {
                std::thread::sleep(PASS_PAUSE);
            }
        }
    }

    /// How many processes there are, and how many bytes are to be poisoned, if there are any.
    fn left_to_poison(&self) -> Option<(usize, u64)> {
        let spaces = self.planner.spaces().map(|(_, space)| space);
        let left = spaces.filter_map(|space| space.first_remote().map(|_| space.remote_bytes()));
        let (count, bytes) = left.fold((0, 0), |(count, sum), bytes| (count + 1, sum + bytes));
        (count > 0).then_some((self.processes.len(), bytes))
    }

    /// Poisons what can be poisoned now, once around. Fails if the kernel cannot.
    fn poison_pass(&mut self) -> Result<()> {
        let ids = self.processes.ids();
        for id in ids {
            match self.poison_process(id) {
                Err(error) if error.kind() == Kind::Unsupported => return Err(error),
                Err(error) => {
                    if let Some(left_out) = self.losses.may_log(self.clock.now_us()) {
                        tracing::error!("{error}: killing the process{left_out}");
                    }
                    let pid = self.processes.pid(id);
                    self.kill_processes(|space| {
                        (Some(space.pid()) == pid).then(|| space.first_remote())?
                    });
                }
                Ok(()) => {}
            }
        }
        Ok(())
    }

    fn poison_process(&mut self, id: SpaceId) -> Result<()> {
        let mut limit = POISON_BYTES_MAX;
        let mut idle = 0;
        while idle < IDLE_CALLS_MAX {
            self.read_events(id)?;
            let Some(piece) = self.planner.space(id).and_then(Space::first_remote) else {
                return Ok(());
            };
            let Some(pid) = self.processes.pid(id) else {
                return Ok(());
            };
            let before = limit;
            let done = self.poison_some(id, piece.at, &mut limit)?;
            idle = match done.bytes == 0 && limit == before {
                true => idle + 1,
                false => 0,
            };
            let pages = done.poisoned >> self.images.page().shift();
            self.losses.note_poisoned(pid, pages);
        }
        Ok(())
    }

    /// Poisons the start of `at`, at most `limit` bytes, which is lowered where that is too much.
    pub(super) fn poison_some(
        &mut self,
        id: SpaceId,
        at: PageRange,
        limit: &mut u64,
    ) -> Result<Done> {
        let page = self.images.page().bytes();
        let Some(process) = self.processes.get(id) else {
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
                self.settle(id, poisoned, PageOutcome::Poisoned, Waiters::Woken);
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
                self.settle(id, first, PageOutcome::Gone, Waiters::Asleep);
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
        let Some(pid) = self.processes.pid(id) else {
            return;
        };
        if let Some(left_out) = self.losses.may_log(self.clock.now_us()) {
            tracing::error!(
                "the lost pages of pid {pid} cannot be poisoned, for its control group is full: killing \
                 it{left_out}"
            );
        }
        self.kill_processes(|space| (space.pid() == pid).then(|| space.first_missing())?);
        std::thread::sleep(LAST_PAUSE);
        self.look_for_ended();
    }

    /// The kernel cannot poison: processes are held, or killed if this one was told to end.
    fn cannot_poison(&mut self, why: &Error) {
        if !self.losses.is_stopping() {
            return self.hold_instead(why);
        }
        tracing::error!("{why}: killing the processes instead, for this one was told to end");
        self.losses.decide(OnLoss::Kill);
        for _ in IDLE_PASSES_MAX..FAILED_PASSES_MAX {
            self.kill_processes(Space::first_remote);
            std::thread::sleep(LAST_PAUSE);
            self.look_for_ended();
            if self.left_to_poison().is_none() {
                return;
            }
        }
        self.hold_instead(why);
    }

    fn hold_instead(&mut self, why: &Error) {
        tracing::error!(
            "{why}: holding the processes instead; SIGUSR1 tries the source again, SIGUSR2 kills them"
        );
        self.losses.decide(OnLoss::Hold);
    }

    /// This process was told to end, and may be killed if it takes too long: what local images have not given in a
    /// moment is poisoned, and filled over that as long as there is time.
    pub(super) fn guard_local(&mut self) {
        let deadline = Instant::now() + LOCAL_GRACE;
        while Instant::now() < deadline {
            let served = self.serve_faults();
            if !matches!(served.and_then(|()| self.local_step()), Ok(true)) {
                break;
            }
        }
        let ids = self.processes.ids();
        for id in ids {
            self.poison_in_place(id);
        }
    }

    fn poison_in_place(&mut self, id: SpaceId) {
        let page = self.images.page();
        let (mut from, mut idle) = (Vaddr(0), 0);
        while idle < IDLE_CALLS_MAX {
            let next = self.planner.space(id);
            let next = next.and_then(|space| space.next_local_from(from));
            let (Some(at), Some(process)) = (next, self.processes.get(id)) else {
                return;
            };
            let start = at.start().get();
            let range = PageRange::new(start, start + at.bytes().min(POISON_BYTES_MAX));
            let past = match process.uffd.poison(range) {
                Ok(Filled::Bytes(bytes)) => bytes,
                Ok(Filled::Changing) => {
                    idle += 1;
                    from = Vaddr(0);
                    if self.read_events(id).is_err() {
                        return;
                    }
                    continue;
                }
                Ok(Filled::Exited) => return,
                // There already, or nothing can be there.
                Ok(_) => page.bytes(),
                Err(error) => {
                    tracing::warn!("cannot poison what local images have not given yet: {error}");
                    return;
                }
            };
            from = Vaddr(start + past);
        }
    }
}
