//! Filling pages, in the pieces that the kernel allows and that no waiting fault notices.

use std::io;

use super::Restore;
use super::waking::Waiters;
use crate::error::{Error, Kind, Result};
use crate::image::chain::Stored;
use crate::lazy::extents::Piece;
use crate::lazy::planner::{SpaceId, Way};
use crate::sys::uffd::{Filled, Wake};
use crate::units::{PageRange, Vaddr};

/// Received or copied with one call at most while lone faults are about, bytes: about 25 µs that one
/// of them may wait.
const STEP_BYTES: u64 = 64 << 10;

/// The same while there are none: a reader in order has more before it waits again.
pub(super) const STEP_BYTES_MAX: u64 = 256 << 10;

/// How often a fill that an unread event refuses is tried before others get a turn.
const CHANGING_TRIES: usize = 64;

/// How far ahead local images are read, bytes.
const READAHEAD_BYTES: u64 = 8 << 20;

/// What became of one fill.
enum Step {
    /// Look at what is left.
    On,
    /// An event is in the way and not there to read yet.
    Stuck,
    /// The process ended.
    Over,
}

impl Restore {
    /// Installs the pages `image` (addresses in the dump) of `id`, which are `bytes`, wherever they
    /// are missing now.
    pub(super) fn install(
        &mut self,
        id: SpaceId,
        image: PageRange,
        bytes: &[u8],
        way: Way,
    ) -> Result<()> {
        let mut limit = self.step_bytes();
        let mut stuck = 0;
        while let Some(piece) = self.planner.arrived(id, image) {
            let piece = self.awaited_first(id, piece, limit);
            let at = piece.at;
            let wake = self.waking(id, at.start());
            let from = offset(piece.image.get() - image.start().get());
            let source = &bytes[from..from + offset(at.bytes())];
            match self.fill(id, at, way, &mut limit, wake, |uffd| {
                uffd.copy(at.start(), source, wake)
            })? {
                Step::On => stuck = 0,
                Step::Stuck => {
                    stuck += 1;
                    if stuck > CHANGING_TRIES {
                        std::thread::yield_now();
                    }
                }
                Step::Over => return Ok(()),
            }
            self.release_due();
            self.serve_faults()?;
        }
        Ok(())
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
        way: Way,
        limit: &mut u64,
        wake: Wake,
        call: impl Fn(&crate::sys::uffd::Uffd) -> io::Result<Filled>,
    ) -> Result<Step> {
        let page = self.images.page().bytes();
        let Some(process) = self.processes.get(&id) else {
            return Ok(Step::Over);
        };
        let failed = |error| {
            Error::wrap(
                Kind::Io,
                format!("cannot fill {at} of pid {}", process.pid),
                error,
            )
        };
        let first_page = PageRange::new(at.start().get(), at.start().get() + page);
        match call(&process.uffd).map_err(failed)? {
            Filled::Bytes(filled) => {
                *limit = STEP_BYTES.max(*limit);
                let at = PageRange::new(at.start().get(), at.start().get() + filled);
                self.batched_wakeup.filled(id, at, wake == Wake::Later);
                let waiters = match wake {
                    Wake::Now => Waiters::Woken,
                    Wake::Later => Waiters::Sequential,
                };
                self.settle(id, at, way, waiters);
            }
            Filled::Present => self.settle(id, first_page, way, Waiters::Asleep),
            Filled::Unmapped if at.bytes() > page => {
                *limit = self.images.page().floor(at.bytes() / 2).max(page);
            }
            Filled::Unmapped => self.settle(id, first_page, Way::Gone, Waiters::Asleep),
            Filled::Changing => {
                self.read_events(id)?;
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
        let Some(chain) = self
            .processes
            .get(&id)
            .and_then(|process| process.chain.clone())
        else {
            return Ok(());
        };
        let Some(extent) = chain.find(piece.image) else {
            return Ok(());
        };
        let length = piece.at.bytes().min(extent.range.bytes()).min(STEP_BYTES);
        let at = PageRange::new(piece.at.start().get(), piece.at.start().get() + length);
        let mut limit = length;
        if let Some(bytes) = chain.mapped(extent.place, offset(length)) {
            return self.fill_local(id, at, &mut limit, bytes);
        }
        if chain.stored(extent.place) == Some(Stored::Zero) {
            let first = PageRange::new(
                at.start().get(),
                at.start().get() + self.images.page().bytes(),
            );
            self.fill(id, first, Way::Local, &mut limit, Wake::Now, |uffd| {
                uffd.zero(first)
            })?;
            return Ok(());
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.resize(offset(length), 0);
        let read = chain.read(extent.place, &mut scratch);
        let filled = read.and_then(|()| self.fill_local(id, at, &mut limit, &scratch));
        self.scratch = scratch;
        filled
    }

    /// Copies `bytes` to `at`, once: what a border or an event leaves over stays missing, and is
    /// tried again by the background or by the fault that waits for it.
    fn fill_local(
        &mut self,
        id: SpaceId,
        at: PageRange,
        limit: &mut u64,
        bytes: &[u8],
    ) -> Result<()> {
        loop {
            let range = PageRange::new(at.start().get(), at.start().get() + at.bytes().min(*limit));
            let part = &bytes[..offset(range.bytes())];
            match self.fill(id, range, Way::Local, limit, Wake::Now, |uffd| {
                uffd.copy(range.start(), part, Wake::Now)
            })? {
                // A border lowered the limit and nothing was filled: once more with less.
                Step::On if *limit < range.bytes() => {}
                Step::Stuck => {
                    let space = self.planner.space(id);
                    if let Some(page) = space.and_then(|space| space.first_awaited(at)) {
                        self.retries.push_back((id, page));
                    }
                    return Ok(());
                }
                Step::On | Step::Over => return Ok(()),
            }
        }
    }

    /// A step of background work from local images, if there is any to do now. Says whether there was.
    pub(super) fn background_step(&mut self) -> Result<bool> {
        if matches!(&self.loss, Some(loss) if !loss.waits_for_operator()) {
            // What is here is all that will come: neither faults nor a link are in its way.
            return self.local_step();
        }
        if !self.finished && self.loss.is_none() || self.config.on_demand {
            return Ok(false);
        }
        let now_us = self.clock.now_us();
        let limit = self.limit.as_mut();
        if limit.is_some_and(|limit| limit.wait_until_us(now_us).is_some()) {
            return Ok(false);
        }
        self.local_step()
    }

    /// Installs the next piece of local images in the background. Says whether there was one.
    fn local_step(&mut self) -> Result<bool> {
        let Some((id, piece)) = self.planner.next_local(STEP_BYTES) else {
            return Ok(false);
        };
        self.read_ahead(id, piece.image);
        if let Some(limit) = &mut self.limit {
            limit.spend(piece.at.bytes());
        }
        self.install_local(id, piece)?;
        Ok(true)
    }

    /// Asks for the images' bytes before they are needed, once for each window.
    fn read_ahead(&self, id: SpaceId, image: Vaddr) {
        let Some(chain) = self
            .processes
            .get(&id)
            .and_then(|process| process.chain.as_ref())
        else {
            return;
        };
        let into_window = image.get() % READAHEAD_BYTES;
        let begins_extent = chain.find(Vaddr(image.get().saturating_sub(1))).is_none();
        if into_window < STEP_BYTES || begins_extent {
            let end = image.get().saturating_add(2 * READAHEAD_BYTES);
            chain.advise(PageRange::new(image.get(), end));
        }
    }
}

/// A length within a buffer: it was checked against one already.
pub(super) fn offset(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a length within memory")
}
