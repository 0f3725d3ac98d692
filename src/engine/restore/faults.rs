//! Reads faults and events from the userfaultfds, and asks the source for a fault's page at once.

use nix::errno::Errno;

use super::Restore;
use super::deferred::PauseReason;
use super::processes::Process;
use super::standby::StandbyMessage;
use super::waking::Waiters;
use crate::error::{Error, Kind, Result};
use crate::lazy::planner::{PageOutcome, SpaceId};
use crate::lazy::space::FaultAnswer;
use crate::sys::uffd::{Event, Filled};
use crate::units::{PageRange, Vaddr};

/// Reads of one userfaultfd in one round, so that no process starves another.
const READS_MAX: usize = 4;

impl Restore {
    /// Answers every fault that there is, and sends for what they need.
    pub(super) fn serve_faults(&mut self) -> Result<()> {
        let mut has_messages = false;
        let with_messages = self.processes.with_messages()?;
        self.family.forget();
        for id in with_messages {
            has_messages = true;
            self.read_events(id)?;
        }
        let retries = self.processes.retries().len();
        if !has_messages && retries == 0 {
            return Ok(());
        }
        for _ in 0..retries {
            let Some((id, addr)) = self.processes.next_retry() else {
                break;
            };
            if self.deferred.is_paused(id) {
                self.processes.retry_later(id, addr);
            } else {
                self.answer(id, addr)?;
            }
        }
        self.send_urgent()
    }

    /// Reads what the memory of `id` does. Its events are handled before its faults, although the
    /// kernel says faults first: a fault at an address that memory has moved to makes sense only
    /// after the move.
    pub(super) fn read_events(&mut self, id: SpaceId) -> Result<()> {
        let mut faults = Vec::new();
        for _ in 0..READS_MAX {
            let withheld_before = self.withheld_by_pending_fork(id);
            let Some(process) = self.processes.get(id) else {
                return Ok(());
            };
            let (pid, mut events) = (process.pid, Vec::new());
            let failed = |error| {
                Error::wrap(
                    Kind::Io,
                    format!("cannot read the userfaultfd of pid {pid}"),
                    error,
                )
            };
            let room = self.room_for(id);
            let read = process.uffd.read(room, |event| events.push(event));
            match read {
                Ok(0) => break,
                Ok(_) => self.guard_scans.forget(),
                Err(error) if lacks_descriptor(&error) => {
                    self.lack_descriptor(id)?;
                    break;
                }
                Err(error) => return Err(failed(error)),
            }
            for event in events {
                if !matches!(event, Event::Fault(_)) {
                    self.note_event();
                    self.batched_wakeup.forget_quiet(id);
                }
                match event {
                    Event::Fault(fault) => {
                        let page = Vaddr(self.images.page().floor(fault.address.get()));
                        self.observer
                            .faulted(id, page, fault.is_write, fault.thread);
                        faults.push(fault.address);
                    }
                    Event::Fork(uffd) => {
                        let withheld = match &withheld_before {
                            Some(withheld) => withheld.clone(),
                            None => self.withheld_by_fork(id),
                        };
                        if let Some(child) = self.handle_fork(id, uffd)? {
                            self.withhold(child, &withheld);
                        }
                    }
                    Event::Remap { from, to } => {
                        self.notify_standby(StandbyMessage::Remap { id, from, to }, None);
                        self.handle_remap(id, from, to);
                    }
                    Event::Unmap(range) if self.is_still_mapped(id, range) => {}
                    Event::Remove(range) | Event::Unmap(range) => {
                        self.notify_standby(StandbyMessage::Gone { id, range }, None);
                        self.handle_gone(id, range);
                    }
                }
            }
        }
        if !faults.is_empty() {
            self.handover.note_fault();
        }
        for addr in faults {
            self.answer(id, addr)?;
        }
        Ok(())
    }

    fn answer(&mut self, id: SpaceId, addr: Vaddr) -> Result<()> {
        let now_us = self.clock.now_us();
        let limits = self.fetch_limits(now_us);
        let page = self.images.page();
        let start = page.floor(addr.get());
        let at = PageRange::new(start, start + page.bytes());
        self.note_touch(id, addr, now_us);
        match self.planner.handle_fault(id, addr, limits, now_us) {
            FaultAnswer::Wait => {
                self.huge_pages.hold(true);
                Ok(())
            }
            FaultAnswer::Zero if self.batched_wakeup.was_quiet(id, at.start()) => {
                self.settle(id, at, PageOutcome::Gone, Waiters::Sequential);
                Ok(())
            }
            FaultAnswer::Zero | FaultAnswer::Local(_) if self.deferred.is_paused(id) => {
                self.processes.retry_later(id, addr);
                Ok(())
            }
            FaultAnswer::Zero => self.fill_zero(id, addr),
            FaultAnswer::Local(piece) => self.install_local(id, piece),
        }
    }

    fn fill_zero(&mut self, id: SpaceId, addr: Vaddr) -> Result<()> {
        let page = self.images.page();
        let start = page.floor(addr.get());
        let range = PageRange::new(start, start + page.bytes());
        let Some(process) = self.processes.get(id) else {
            return Ok(());
        };
        let filled = match process.uffd.zero(range) {
            Ok(filled) => filled,
            Err(error) => {
                let pid = process.pid;
                let why = format!("cannot fill {range} of pid {pid} with zeros: {error}");
                return self.give_up_pages(id, range, &why);
            }
        };
        match filled {
            Filled::Bytes(_) => {
                self.deferred.filled(id);
                self.settle(id, range, PageOutcome::Zero, Waiters::Woken);
            }
            // Another thread's fault brought it, or its mapping or file ends before it: let the reader
            // look again.
            Filled::Present | Filled::Unmapped | Filled::Unreadable => {
                self.settle(id, range, PageOutcome::Gone, Waiters::Asleep);
            }
            Filled::Changing if self.release_locked_growth(id, range) => {
                self.settle(id, range, PageOutcome::Gone, Waiters::Asleep);
            }
            Filled::Changing => self.processes.retry_later(id, addr),
            Filled::NoRoom => {
                self.processes.retry_later(id, addr);
                return self.defer(id, PauseReason::NoRoom);
            }
            Filled::Exited => self.forget(id),
        }
        Ok(())
    }

    /// The pages of `range` were unmapped or given back.
    pub(super) fn handle_gone(&mut self, id: SpaceId, range: PageRange) {
        self.huge_pages.gone(id, range);
        self.settle(id, range, PageOutcome::Gone, Waiters::Asleep);
    }

    pub(super) fn handle_remap(&mut self, id: SpaceId, from: PageRange, to: Vaddr) {
        let mut woken = Vec::new();
        self.huge_pages.moved(id, from, to);
        self.planner
            .handle_remap(id, from, to, |served| woken.push(served));
        for thread in woken {
            // It faults again, where the page is now.
            self.observer.moved(id, thread.page);
            self.wake(id, thread);
        }
    }

    /// The process ended: nobody needs its pages.
    pub(super) fn forget(&mut self, id: SpaceId) {
        if let Some(process) = self.processes.get(id) {
            tracing::debug!("pid {}, or a child of it, ended", process.pid);
        }
        self.close(id);
    }

    /// Closes the userfaultfd of `id`, here and where somebody stands by.
    fn close(&mut self, id: SpaceId) {
        if self.processes.remove(id) {
            self.notify_standby(StandbyMessage::Exited { id }, None);
        }
        self.planner.handle_exit(id);
        self.observer.forget(id);
        self.deferred.forget(id);
        self.huge_pages.forget(id);
    }

    /// Forgets processes that ended: their end is no event, and only a fill would tell.
    pub(super) fn look_for_ended(&mut self) {
        let ended = |(id, process): (SpaceId, &Process)| self.has_ended(process).then_some(id);
        let ended: Vec<SpaceId> = self.processes.iter().filter_map(ended).collect();
        ended.into_iter().for_each(|id| self.forget(id));
    }

    /// The same for a few of them, others each time: who forks often has many that ended.
    pub(super) fn look_for_some_ended(&mut self) {
        for id in self.processes.next_to_look_at(LOOKED_AT_A_FORK) {
            self.forget_if_ended(id);
        }
    }

    /// Whether `id` has ended; it is forgotten then. Asked before bytes are spent on it.
    pub(super) fn forget_if_ended(&mut self, id: SpaceId) -> bool {
        let process = self.processes.get(id);
        let ended = process.is_some_and(|process| self.has_ended(process));
        if ended {
            self.forget(id);
        }
        ended
    }

    fn has_ended(&self, process: &Process) -> bool {
        process.uffd.has_ended(self.anywhere())
    }

    pub(super) fn anywhere(&self) -> PageRange {
        PageRange::new(ANYWHERE, ANYWHERE + self.images.page().bytes())
    }

    /// Closes what is open and of no use: processes that ended, and forked children that have all
    /// their memory, of which the kernel takes care from then on. Says how many.
    pub(super) fn close_unneeded(&mut self) -> usize {
        let before = self.processes.len();
        self.look_for_ended();
        self.wake_held_threads();
        let mut filled = self.processes.ids();
        filled.retain(|id| self.planner.is_filled_child(*id));
        filled.into_iter().for_each(|id| self.close(id));
        before - self.processes.len()
    }
}

/// Looked at after each fork: as many as this times what lives have ended at most, unseen.
const LOOKED_AT_A_FORK: usize = 4;

/// An aligned address that the kernel accepts to be asked about: above vm.mmap_min_addr, which some raise, and within the
/// memory of 32-bit programs.
const ANYWHERE: u64 = 1 << 30;

/// Whether a child's userfaultfd cannot be had for want of descriptors or memory. Its event stays to be read.
fn lacks_descriptor(error: &std::io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM))
}
