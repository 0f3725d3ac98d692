//! Filling pages in pieces so small that a fault that waits behind one does not notice.

use std::io;

use super::Restore;
use super::deferred::PauseReason;
use super::owner_search::Guards;
use super::waking::Waiters;
use crate::error::Result;
use crate::image::chain::{Chain, Resolved, Stored};
use crate::lazy::extents::Piece;
use crate::lazy::planner::{PageOutcome, SpaceId};
use crate::sys::uffd::{Filled, Wake};
use crate::units::{PageRange, Vaddr};

/// Received or copied with one call at most while lone faults are about, bytes: about 25 µs that one
/// of them may wait.
const STEP_BYTES: u64 = 64 << 10;

/// The same while there are none: a reader in order has more before it waits again.
pub(super) const STEP_BYTES_MAX: u64 = 256 << 10;

/// How often a fill that an unread event refuses is tried before others get a turn.
const CHANGING_TRIES: usize = 64;

/// And how often at once, others having their turn in between, before it has to wait for its time.
const CHANGING_TRIES_MAX: usize = 256;

/// How far ahead local images are read at least, bytes.
pub(super) const READAHEAD_BYTES: u64 = 8 << 20;

/// What became of one fill.
enum Step {
    /// Look at what is left.
    On,
    /// An event is in the way and not there to read yet.
    Stuck,
    /// There is no memory for the page now.
    NoRoom,
    /// Not a page of it can be read where it lies.
    Unreadable,
    /// The process ended.
    Over,
}

/// What fills have in common.
#[derive(Debug, Default)]
pub(super) struct Filling {
    /// Kept for its room.
    scratch: Vec<u8>,
    /// Filled since faults were last looked for behind a fill, bytes.
    unlooked_bytes: u64,
}

impl Filling {
    /// Whether a step's worth was filled since this last said so; `filled` bytes were just now.
    fn is_time_to_look(&mut self, filled: u64) -> bool {
        self.unlooked_bytes += filled;
        let is_time = self.unlooked_bytes >= STEP_BYTES;
        if is_time {
            self.unlooked_bytes = 0;
        }
        is_time
    }
}

impl Restore {
    /// Installs the pages `image` (addresses in the dump) of `id`, which are `bytes`, wherever they
    /// are missing now.
    pub(super) fn install(
        &mut self,
        id: SpaceId,
        image: PageRange,
        bytes: &[u8],
        outcome: PageOutcome,
    ) -> Result<()> {
        if self.deferred.is_paused(id) {
            if self.planner.arrived(id, image).is_some() {
                self.stash(id, image, bytes, outcome);
            }
            return Ok(());
        }
        let mut limit = self.step_bytes();
        let mut stuck = 0;
        while let Some(piece) = self.planner.arrived(id, image) {
            let piece = self.awaited_first(id, piece, limit);
            let piece = match self.leave_guards(id, piece.at) {
                Guards::None => piece,
                Guards::At(_) => continue,
                Guards::Beside(free) => piece.part(free),
            };
            let at = piece.at;
            let wake = self.waking(id, at.start());
            let from = offset(piece.image.get() - image.start().get());
            let source = &bytes[from..from + offset(at.bytes())];
            match self.fill(id, at, outcome, &mut limit, wake, |uffd| {
                uffd.copy(at.start(), source, wake)
            })? {
                Step::On => stuck = 0,
                Step::Stuck => {
                    stuck += 1;
                    if stuck > CHANGING_TRIES {
                        std::thread::yield_now();
                    }
                    if stuck > CHANGING_TRIES_MAX {
                        self.stash(id, image, bytes, outcome);
                        return self.defer(id, PauseReason::Changing);
                    }
                }
                Step::NoRoom => {
                    self.stash(id, image, bytes, outcome);
                    return self.defer(id, PauseReason::NoRoom);
                }
                // It lies in our memory: the mapped file ends before it.
                Step::Unreadable => {
                    let page = PageRange::new(
                        at.start().get(),
                        at.start().get() + self.images.page().bytes(),
                    );
                    self.settle(id, page, PageOutcome::Gone, Waiters::Asleep);
                }
                Step::Over => return Ok(()),
            }
            self.release_due();
            self.look_for_faults(at.bytes())?;
        }
        Ok(())
    }

    /// Installs the pages `image` of `pid` wherever they are missing: in the process, and in children that it
    /// forked; not in `served`, which has them.
    pub(super) fn install_in_family(
        &mut self,
        pid: u32,
        served: Option<SpaceId>,
        image: PageRange,
        bytes: &[u8],
        outcome: PageOutcome,
    ) -> Result<()> {
        let mut next = self.planner.next_sibling(pid, None);
        while let Some(id) = next {
            if served != Some(id) && self.planner.shares(id, image) {
                self.install(id, image, bytes, outcome)?;
            }
            // Those who were forked meanwhile come behind.
            next = self.planner.next_sibling(pid, Some(id));
        }
        Ok(())
    }

    /// Looks for faults when a step's worth was filled since the last time; `filled` bytes were just now. To
    /// look behind each of many small pieces would take as long as to fill them.
    fn look_for_faults(&mut self, filled: u64) -> Result<()> {
        match self.filling.is_time_to_look(filled) {
            true => self.serve_faults(),
            false => Ok(()),
        }
    }

    /// How much to receive or to copy with one call now, bytes.
    pub(super) fn step_bytes(&self) -> u64 {
        if self.links.is_faulting(self.clock.now_us()) {
            STEP_BYTES
        } else {
            STEP_BYTES_MAX
        }
    }

    /// The part of `piece` to copy next: a page that a thread waits for, so that it runs while the
    /// rest is copied, else as much as one call may copy. A thread that reads up gets that much
    /// too: it would wait again for what a shorter call leaves out.
    fn awaited_first(&self, id: SpaceId, piece: Piece, limit: u64) -> Piece {
        let space = self.planner.space(id);
        let awaited = space.and_then(|space| space.first_awaited(piece.at));
        let is_sequential = |page| space.is_some_and(|space| space.is_read_upwards(page));
        let (start, longest) = match awaited {
            Some(page) if is_sequential(page) => (page.get(), limit),
            Some(page) => (page.get(), self.images.page().bytes()),
            None => (piece.at.start().get(), limit),
        };
        let end = piece.at.end().get().min(start + longest);
        piece.part(PageRange::new(start, end))
    }

    /// Fills `at` by `call`, which wakes as `wake` says, and settles what it filled. `limit` is lowered when the range seems to
    /// cross a mapping's border, and restored by success.
    fn fill(
        &mut self,
        id: SpaceId,
        at: PageRange,
        outcome: PageOutcome,
        limit: &mut u64,
        wake: Wake,
        call: impl Fn(&crate::sys::uffd::Uffd) -> io::Result<Filled>,
    ) -> Result<Step> {
        let page = self.images.page().bytes();
        let Some(process) = self.processes.get(id) else {
            return Ok(Step::Over);
        };
        let pid = process.pid;
        let first_page = PageRange::new(at.start().get(), at.start().get() + page);
        let filled = match call(&process.uffd) {
            Ok(filled) => filled,
            // Nobody knows what it is about; it shall not be about more than the page.
            Err(_) if at.bytes() > page => Filled::Unmapped,
            Err(error) => {
                let why = format!("cannot fill {at} of pid {pid}: {error}");
                self.give_up_pages(id, first_page, &why)?;
                return Ok(Step::On);
            }
        };
        match filled {
            Filled::Bytes(filled) => {
                self.deferred.filled(id);
                self.look_after_fill(id, at.start());
                *limit = STEP_BYTES.max(*limit);
                let at = PageRange::new(at.start().get(), at.start().get() + filled);
                self.batched_wakeup.filled(id, at, wake == Wake::Later);
                let waiters = match wake {
                    Wake::Now => Waiters::Woken,
                    Wake::Later => Waiters::Sequential,
                };
                self.settle(id, at, outcome, waiters);
            }
            Filled::Present => self.settle(id, first_page, outcome, Waiters::Asleep),
            Filled::Unmapped | Filled::Unreadable if at.bytes() > page => {
                *limit = self.images.page().floor(at.bytes() / 2).max(page);
            }
            Filled::Unmapped => self.settle(id, first_page, PageOutcome::Gone, Waiters::Asleep),
            Filled::Unreadable => return Ok(Step::Unreadable),
            Filled::NoRoom => return Ok(Step::NoRoom),
            Filled::Changing => {
                self.read_events(id)?;
                let space = self.planner.space(id);
                let is_awaited =
                    space.is_some_and(|space| space.first_awaited(first_page).is_some());
                if is_awaited && self.release_locked_growth(id, first_page) {
                    // What was there before has made room for the new page.
                    self.settle(id, first_page, PageOutcome::Gone, Waiters::Asleep);
                    return Ok(Step::On);
                }
                return Ok(Step::Stuck);
            }
            Filled::Exited => {
                self.forget(id);
                return Ok(Step::Over);
            }
        }
        Ok(Step::On)
    }

    /// Installs a piece that a local image has.
    pub(super) fn install_local(&mut self, id: SpaceId, piece: Piece) -> Result<()> {
        self.install_local_of(id, piece, &mut None)
    }

    /// The same; `whole_file` is the one that was found whole for a piece of `id` just before.
    fn install_local_of(
        &mut self,
        id: SpaceId,
        piece: Piece,
        whole_file: &mut Option<u32>,
    ) -> Result<()> {
        let Some(chain) = self
            .processes
            .get(id)
            .and_then(|process| process.chain.clone())
        else {
            return Ok(());
        };
        let Some((piece, extent, at)) = self.beside_guards(id, &chain, piece) else {
            return Ok(());
        };
        let length = at.bytes();
        let mut limit = length;
        if let Some(bytes) = chain.mapped(extent.place, offset(length), whole_file) {
            return match self.fill_from(id, at, &mut limit, bytes)? {
                // Which of them, and why, only a read tells.
                Step::Unreadable => self.read_single_pages(id, at, piece.image, &chain),
                _ => Ok(()),
            };
        }
        if chain.stored(extent.place) == Some(Stored::Zero) {
            let first = PageRange::new(
                at.start().get(),
                at.start().get() + self.images.page().bytes(),
            );
            let step = self.fill(
                id,
                first,
                PageOutcome::Local,
                &mut limit,
                Wake::Now,
                |uffd| uffd.zero(first),
            )?;
            return self.put_off(id, first, &step);
        }
        let mut scratch = std::mem::take(&mut self.filling.scratch);
        scratch.resize(offset(length), 0);
        let filled = match chain.read(extent.place, &mut scratch) {
            Ok(()) => self.fill_local(id, at, &mut limit, &scratch),
            Err(_) => self.read_single_pages(id, at, piece.image, &chain),
        };
        self.filling.scratch = scratch;
        filled
    }

    /// The part of `piece` that a step fills and that no guard region covers, with its place in the images. `None` if
    /// the images or the guards leave nothing.
    fn beside_guards(
        &mut self,
        id: SpaceId,
        chain: &Chain,
        piece: Piece,
    ) -> Option<(Piece, Resolved, PageRange)> {
        let within = |piece: Piece| {
            let extent = chain.find(piece.image)?;
            let length = piece.at.bytes().min(extent.range.bytes()).min(STEP_BYTES);
            let start = piece.at.start().get();
            Some((piece, extent, PageRange::new(start, start + length)))
        };
        let found = within(piece)?;
        let (_, _, whole) = found;
        let guards = self.leave_guards(id, whole);
        if guards != Guards::None {
            // What is beside is found missing again; a thread that waits for it must not wait longer.
            let awaited = self.planner.space(id);
            let awaited = awaited.and_then(|space| space.first_awaited(whole));
            if let Some(page) = awaited {
                self.processes.retry_later(id, page);
            }
        }
        match guards {
            Guards::None => Some(found),
            Guards::Beside(free) => within(piece.part(free)),
            Guards::At(_) => None,
        }
    }

    /// Copies `bytes`, which lie in our memory, to `at` as [`Restore::fill_from`] does.
    pub(super) fn fill_local(
        &mut self,
        id: SpaceId,
        at: PageRange,
        limit: &mut u64,
        bytes: &[u8],
    ) -> Result<()> {
        if let Step::Unreadable = self.fill_from(id, at, limit, bytes)? {
            // The mapped file ends before it.
            let page = self.images.page().bytes();
            let first = PageRange::new(at.start().get(), at.start().get() + page);
            self.settle(id, first, PageOutcome::Gone, Waiters::Asleep);
        }
        Ok(())
    }

    /// Copies `bytes` to `at`, once: what a border or an event leaves over stays missing, and is
    /// tried again by the background or by the fault that waits for it.
    fn fill_from(
        &mut self,
        id: SpaceId,
        at: PageRange,
        limit: &mut u64,
        bytes: &[u8],
    ) -> Result<Step> {
        loop {
            let range = PageRange::new(at.start().get(), at.start().get() + at.bytes().min(*limit));
            let part = &bytes[..offset(range.bytes())];
            let step = self.fill(id, range, PageOutcome::Local, limit, Wake::Now, |uffd| {
                uffd.copy(range.start(), part, Wake::Now)
            })?;
            // A border lowered the limit and nothing was filled: once more with less.
            if matches!(step, Step::On) && *limit < range.bytes() {
                continue;
            }
            self.put_off(id, at, &step)?;
            return Ok(step);
        }
    }

    /// What `step` could not fill of `at`, which a local image has, is tried again in a moment.
    fn put_off(&mut self, id: SpaceId, at: PageRange, step: &Step) -> Result<()> {
        let reason = match step {
            Step::Stuck => PauseReason::Changing,
            Step::NoRoom => PauseReason::NoRoom,
            Step::On | Step::Unreadable | Step::Over => return Ok(()),
        };
        let space = self.planner.space(id);
        if let Some(page) = space.and_then(|space| space.first_awaited(at)) {
            self.processes.retry_later(id, page);
        }
        self.defer(id, reason)
    }

    /// A step of background work from local images, if there is any to do now. Returns whether there was.
    pub(super) fn background_step(&mut self) -> Result<bool> {
        if self.losses.is_decided() {
            // What is here is all that will come: neither faults nor a link are in its way.
            return self.local_step();
        }
        if !self.handover.may_fill() && !self.losses.is_source_lost() || self.background.is_off() {
            return Ok(false);
        }
        if self.background.is_throttled(self.clock.now_us()) {
            return Ok(false);
        }
        self.local_step()
    }

    /// Installs the next pieces of local images in the background, a step's worth: fragmented memory has many
    /// in one. Returns whether there was one.
    pub(super) fn local_step(&mut self) -> Result<bool> {
        let Some((id, first)) = self.planner.next_local(STEP_BYTES) else {
            return Ok(false);
        };
        let (mut left, mut next, mut whole_file) = (STEP_BYTES, Some(first), None);
        while let Some(piece) = next {
            self.read_ahead(id, piece.image);
            self.background.spend(piece.at.bytes());
            self.install_local_of(id, piece, &mut whole_file)?;
            left = left.saturating_sub(piece.at.bytes());
            next = match left < self.images.page().bytes() {
                true => None,
                false => self.planner.more_local(id, left),
            };
        }
        Ok(true)
    }

    /// Asks for the images' bytes before they are needed.
    fn read_ahead(&mut self, id: SpaceId, image: Vaddr) {
        if let Some(process) = self.processes.get_mut(id)
            && let Some(chain) = &process.chain
        {
            process.ahead.pass(chain, image);
        }
    }
}

/// A length within a buffer: it was checked against one already.
pub(super) fn offset(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a length within memory")
}
