//! One process's missing memory: what a source far away has, what local images have, what is on
//! the way.
//!
//! ```text
//!   remote --fault or stream--> flight --installed--> (nothing: the page is there)
//!   local  --------------------------- installed--> (nothing)
//!   local  --cannot be read--> unreadable --read or fetched after all--> (nothing)
//!   any    --unmapped, removed, exited-----------> (gone)
//!   flight --short answer, connection lost--> remote
//! ```
//!
//! A page is in at most one of the four maps. The kernel's events (remap, unmap, remove) are
//! applied to all of them, so an answer that comes late finds the page where it is now, or nowhere.
//! `fault` decides what a fault asks for, `stream` what the background brings next; here is what moves pages
//! between the maps.

mod fault;
mod stream;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

pub use super::answer::{Class, FaultAnswer, FetchLimits, Served, Wanted};
use super::extents::{ExtentMap, ImageIndex, Index, Piece};
use super::first_pages::FirstPages;
use super::pattern::Pattern;
use super::policy::{ADAPTIVE, Policy};
use crate::units::{PageRange, PageSize, Vaddr};

/// The missing memory of one process.
#[derive(Debug)]
pub struct Space {
    pid: u32,
    page: PageSize,
    remote: ExtentMap<ImageIndex>,
    local: ExtentMap<Option<ImageIndex>>,
    /// What it does not need of the local images any more, by address in the dump, if that is wanted.
    unneeded: Option<Vec<PageRange>>,
    flight: ExtentMap<ImageIndex>,
    /// What the local images or the source should have and cannot give now: the background leaves it out.
    unreadable: ExtentMap<ImageIndex>,
    /// Whose pages children do not get, as far as it was known at the start (MADV_WIPEONFORK, MADV_DONTFORK). What has no
    /// mapping in a child may get one without an event, by mremap of another one.
    wiped: ExtentMap,
    /// What the source had at the start, sorted, by address in the dump: no request leaves one.
    origins: Arc<[PageRange]>,
    urgent: VecDeque<Wanted>,
    waiting: BTreeMap<u64, u64>,
    policy: &'static dyn Policy,
    pattern: Pattern,
    recent: VecDeque<Vaddr>,
    remote_cursor: Vaddr,
    local_cursor: Vaddr,
    /// What comes before all else.
    first: FirstPages,
    /// The last request of the stream was for some of that.
    first_was_last: bool,
    /// The source is gone for good: nothing is asked for any more.
    lost: bool,
}

impl Space {
    /// The memory of the process that the images call `pid`. `remote` and `local` are the runs that
    /// the source and the local images have, by address, cut at the borders of mappings.
    pub fn new(
        pid: u32,
        page: PageSize,
        remote: impl IntoIterator<Item = PageRange>,
        local: impl IntoIterator<Item = PageRange>,
    ) -> Space {
        let origins: Arc<[PageRange]> = remote.into_iter().collect();
        let in_place = |range: &PageRange| Piece {
            at: *range,
            image: range.start(),
        };
        let mut space = Space::empty(pid, page, Arc::clone(&origins));
        origins
            .iter()
            .for_each(|range| space.remote.insert(in_place(range)));
        local
            .into_iter()
            .for_each(|range| space.local.insert(in_place(&range)));
        space
    }

    fn empty(pid: u32, page: PageSize, origins: Arc<[PageRange]>) -> Space {
        Space {
            pid,
            page,
            remote: ExtentMap::default(),
            local: ExtentMap::default(),
            unneeded: None,
            flight: ExtentMap::default(),
            unreadable: ExtentMap::default(),
            wiped: ExtentMap::default(),
            origins,
            urgent: VecDeque::new(),
            waiting: BTreeMap::new(),
            policy: &ADAPTIVE,
            pattern: Pattern::default(),
            recent: VecDeque::new(),
            remote_cursor: Vaddr(0),
            local_cursor: Vaddr(0),
            first: FirstPages::default(),
            first_was_last: false,
            lost: false,
        }
    }

    /// Lets the pages `order`, by address in the dump, come before all others, in this order. Returns how many of them are
    /// missing.
    pub fn stream_first(&mut self, order: Vec<PageRange>) -> u64 {
        // By address in the dump it is looked for in local images too.
        let local = std::mem::take(&mut self.local);
        self.local = local.with_index(Some(ImageIndex::default()));
        self.first = FirstPages::new(order);
        let members = self.first.members().iter();
        let bytes: u64 = members
            .map(|range| bytes_of(&self.remote, *range) + bytes_of(&self.local, *range))
            .sum();
        bytes >> self.page.shift()
    }

    /// Where the page that a thread touches at `addr` was in the dump, and whether it is one of those that come first;
    /// `None` if it is not missing, or a thread waits for it already.
    pub fn first_touch(&self, addr: Vaddr) -> Option<(Vaddr, bool)> {
        let start = Vaddr(self.page.floor(addr.get()));
        if self.waiting.contains_key(&start.get()) {
            return None;
        }
        let found = self.flight.find(start).or_else(|| self.remote.find(start));
        let found = found.or_else(|| self.local.find(start));
        let found = found.or_else(|| self.unreadable.find(start))?;
        let image = found.image.get() + (start.get() - found.at.start().get());
        Some((Vaddr(image), self.first.contains(Vaddr(image))))
    }

    /// Whether pages that come first are missing and not on the way; as to `local` images, or the source.
    pub(super) fn has_first(&mut self, local: bool) -> bool {
        let next = match local {
            true => self.first.next_local(&self.local),
            false => self.first.next_remote(&self.remote),
        };
        next.is_some()
    }

    /// The memory of a child that was just forked: it lacks all that its parent lacks. What is on
    /// the way for the parent is for the child as well. What it does not inherit is to be settled: nothing is missing
    /// there then, and the advice of which its parent knew at the start says nothing about its own children.
    #[must_use]
    pub fn fork(&self) -> Space {
        let mut child = Space::empty(self.pid, self.page, Arc::clone(&self.origins));
        child.policy = self.policy;
        child.lost = self.lost;
        child.first = self.first.clone();
        child.remote = self.remote.clone();
        child.local = self.local.clone();
        child.unneeded = self.unneeded.as_ref().map(|_| Vec::new());
        child.unreadable = self.unreadable.clone();
        child.flight = self.flight.clone();
        // What has not been sent for may never be, if the parent ends or unmaps it first.
        for unsent in &self.urgent {
            child.give_back(unsent.image);
        }
        child
    }

    /// `ranges`, disjoint and by address, are not inherited by children: they find zeros there, or no mapping.
    pub fn wipe_on_fork(&mut self, ranges: &[PageRange]) {
        for range in ranges {
            self.wiped.insert(Piece {
                at: *range,
                image: range.start(),
            });
        }
    }

    /// What was given to [`Space::wipe_on_fork`], where it is now and as far as it has not been settled.
    pub fn wiped_on_fork(&self) -> Vec<PageRange> {
        self.wiped.iter().map(|piece| piece.at).collect()
    }

    /// The same, which keeps account of what it does not need of the local images any more.
    #[must_use]
    pub fn accounting(mut self) -> Space {
        self.local = self.local.with_index(Some(ImageIndex::default()));
        self.unneeded = Some(Vec::new());
        self
    }

    /// What it does not need of the local images any more, by address in the dump, since it was last asked.
    pub fn take_unneeded(&mut self) -> Vec<PageRange> {
        self.unneeded
            .as_mut()
            .map(std::mem::take)
            .unwrap_or_default()
    }

    /// All that it still needs of the local images is not needed any more: its process has ended.
    pub fn leave_local(&mut self) {
        if let Some(unneeded) = &mut self.unneeded {
            let local = self.local.iter().chain(self.unreadable.iter());
            unneeded.extend(local.map(Piece::image_range));
        }
        (self.local, self.unreadable) = Default::default();
    }

    /// The first of the pages `image` that it needs of the local images, if it keeps account.
    pub fn needs_local(&self, image: PageRange) -> Option<PageRange> {
        let firsts = [
            self.local.find_image(image),
            self.unreadable.find_image(image),
        ];
        let firsts = firsts.into_iter().flatten().map(Piece::image_range);
        firsts.min_by_key(|first| first.start())
    }

    /// The process's pid in the images; a forked child has its ancestor's.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What only the source had at the start, sorted, by address in the dump.
    pub fn origins(&self) -> &[PageRange] {
        &self.origins
    }

    /// Whether every page is installed or gone.
    pub fn is_complete(&self) -> bool {
        let here = self.local.is_empty() && self.unreadable.is_empty();
        here && self.remote.is_empty() && self.flight.is_empty()
    }

    /// Bytes that are not there yet.
    pub fn missing_bytes(&self) -> u64 {
        self.remote.bytes() + self.local.bytes() + self.flight.bytes() + self.unreadable.bytes()
    }

    /// Bytes that only the source has.
    pub fn remote_bytes(&self) -> u64 {
        self.remote.bytes() + self.flight.bytes()
    }

    /// How many separate runs are kept.
    pub fn runs(&self) -> usize {
        self.remote.len() + self.local.len() + self.flight.len() + self.unreadable.len()
    }

    /// Lets `policy` decide from now on.
    pub(super) fn set_policy(&mut self, policy: &'static dyn Policy) {
        self.policy = policy;
    }

    /// Up to `bytes` from `start` on, within `piece`.
    fn run_from(&self, start: Vaddr, bytes: u64, piece: Piece) -> PageRange {
        PageRange::new(
            start.get(),
            piece.at.end().get().min(start.get().saturating_add(bytes)),
        )
    }

    fn origin(&self, image: Vaddr) -> Option<PageRange> {
        let behind = self.origins.partition_point(|range| range.start() <= image);
        self.origins
            .get(behind.checked_sub(1)?)
            .copied()
            .filter(|range| range.contains(image))
    }

    /// The source sends the pages `image` unasked: what is missing of them is on the way.
    pub fn pushed(&mut self, image: PageRange) {
        let on_the_way = self.flight.find_image(image);
        if on_the_way.is_some_and(|piece| piece.image_range() == image) {
            // So it is nowhere else: most answers are to questions.
            return;
        }
        while let Some(piece) = self.remote.find_image(image) {
            let flight = &mut self.flight;
            self.remote.take(piece.at, |piece| flight.insert(piece));
        }
    }

    /// Where the first of the pages `image` that has come is to be installed now.
    pub fn arrived(&self, image: PageRange) -> Option<Piece> {
        let on_the_way = self.flight.find_image(image);
        on_the_way.or_else(|| self.unreadable.find_image(image))
    }

    /// Whether a thread waits for one of the pages `image`.
    pub fn awaits(&self, image: PageRange) -> bool {
        if self.waiting.is_empty() {
            return false;
        }
        let awaited_in = |map: &ExtentMap<ImageIndex>| {
            let mut rest = image;
            while let Some(piece) = map.find_image(rest) {
                if self.first_awaited(piece.at).is_some() {
                    return true;
                }
                rest = PageRange::new(piece.image_range().end().get(), rest.end().get());
            }
            false
        };
        awaited_in(&self.flight) || awaited_in(&self.remote) || awaited_in(&self.unreadable)
    }

    /// The first of the pages `image` that is on the way.
    pub fn on_the_way(&self, image: PageRange) -> Option<Piece> {
        self.flight.find_image(image)
    }

    /// Whether the source had the page at `image` in the dump at the start.
    pub fn is_with_source(&self, image: Vaddr) -> bool {
        self.origin(image).is_some()
    }

    /// Neither the local images nor the source, which was asked for them, can give the pages at `range` now.
    pub fn set_unreadable(&mut self, range: PageRange) {
        let unreadable = &mut self.unreadable;
        self.local.take(range, |piece| unreadable.insert(piece));
        self.flight.take(range, |piece| unreadable.insert(piece));
    }

    /// The first of the pages `image` that the local images could not give and that is still missing.
    pub fn first_unreadable(&self, image: PageRange) -> Option<Piece> {
        self.unreadable.find_image(image)
    }

    /// The first piece that only the source has and that is not on the way.
    pub fn first_remote(&self) -> Option<Piece> {
        self.remote.next_from(Vaddr(0))
    }

    /// The first pages from `addr` on that the local images have, or should have.
    pub fn next_local_from(&self, addr: Vaddr) -> Option<PageRange> {
        let rest = |piece: Piece| {
            PageRange::new(piece.at.start().get().max(addr.get()), piece.at.end().get())
        };
        let firsts = [self.local.next_from(addr), self.unreadable.next_from(addr)];
        let firsts = firsts.into_iter().flatten();
        firsts.map(rest).min_by_key(|range| range.start())
    }

    /// Whether a page at `range` is not there yet.
    pub fn lacks(&self, range: PageRange) -> bool {
        self.first_missing_in(range).is_some()
    }

    /// The first address of `range` at which a page is not there yet.
    pub fn first_missing_in(&self, range: PageRange) -> Option<Vaddr> {
        let piece = self.first_missing_from(range.start())?;
        let first = piece.at.start().max(range.start());
        (first < range.end()).then_some(first)
    }

    /// The first piece that is not there yet, whoever has it.
    pub fn first_missing(&self) -> Option<Piece> {
        self.first_missing_from(Vaddr(0))
    }

    fn first_missing_from(&self, from: Vaddr) -> Option<Piece> {
        let firsts = [
            self.remote.next_from(from),
            self.local.next_from(from),
            self.flight.next_from(from),
            self.unreadable.next_from(from),
        ];
        let firsts = firsts.into_iter().flatten();
        firsts.min_by_key(|piece| piece.at.start())
    }

    /// From the first page that is not there yet to the last one.
    pub fn missing_span(&self) -> Option<PageRange> {
        let ends = [
            self.remote.end(),
            self.local.end(),
            self.flight.end(),
            self.unreadable.end(),
        ];
        let end = ends.into_iter().flatten().max()?;
        let start = self.first_missing()?.at.start();
        Some(PageRange::new(start.get(), end.get()))
    }

    /// The source will not bring `image` with this answer: ask again. Threads that wait go first.
    pub fn give_back(&mut self, image: PageRange) {
        let mut returned = Vec::new();
        while let Some(piece) = self.flight.find_image(image) {
            let remote = &mut self.remote;
            self.flight.take(piece.at, |piece| remote.insert(piece));
            returned.push(piece.at);
        }
        returned.into_iter().for_each(|at| self.ask_for_waiting(at));
    }

    /// The pages `image` come, though not with an answer: nobody has asked for them any more.
    pub fn await_push(&mut self, image: PageRange) {
        while let Some(piece) = self.flight.find_image(image) {
            let remote = &mut self.remote;
            self.flight.take(piece.at, |piece| remote.insert(piece));
        }
    }

    /// Nothing is on the way any more.
    pub fn give_back_all(&mut self) {
        let everywhere = PageRange::new(0, u64::MAX);
        self.urgent.clear();
        let remote = &mut self.remote;
        self.flight.take(everywhere, |piece| remote.insert(piece));
        self.ask_for_waiting(everywhere);
    }

    /// The source is gone for good: what only it had stays missing until somebody settles it.
    pub fn lose(&mut self) {
        self.lost = true;
        self.give_back_all();
    }

    /// The source is back: what threads wait for is asked for again.
    pub fn recover(&mut self) {
        self.lost = false;
        self.give_back_all();
    }

    /// The pages at `range` are there, or gone: nobody has to bring them. Returns how many bytes
    /// of them were missing; `served` sees the threads that waited for one.
    pub fn settle(&mut self, range: PageRange, mut served: impl FnMut(Served)) -> u64 {
        let mut bytes = 0;
        self.flight.take(range, |piece| bytes += piece.at.bytes());
        // A page is in one map alone: to look for it in the others costs as much as to take it out.
        if bytes < range.bytes() {
            self.remote.take(range, |piece| bytes += piece.at.bytes());
        }
        let before = bytes;
        let unneeded = &mut self.unneeded;
        let mut count = |piece: Piece| {
            bytes += piece.at.bytes();
            if let Some(unneeded) = unneeded {
                unneeded.push(piece.image_range());
            }
        };
        if before < range.bytes() {
            self.local.take(range, &mut count);
            self.unreadable.take(range, &mut count);
        }
        self.wiped.take(range, |_| {});
        while let Some((page, since_us)) = self.next_waiting(range) {
            self.waiting.remove(&page);
            served(Served {
                page: Vaddr(page),
                since_us,
            });
        }
        bytes
    }

    fn next_waiting(&self, range: PageRange) -> Option<(u64, u64)> {
        let mut waiting = self.waiting.range(range.start().get()..range.end().get());
        waiting.next().map(|(page, since_us)| (*page, *since_us))
    }

    /// The memory at `from` moved to `to`. Threads that waited at the old addresses are returned by
    /// `served`: they must be woken to find out.
    pub fn remap(&mut self, from: PageRange, to: Vaddr, mut served: impl FnMut(Served)) {
        let Some(end) = to.get().checked_add(from.bytes()) else {
            return;
        };
        // What the kernel moves memory onto it has unmapped before.
        self.settle(PageRange::new(to.get(), end), &mut served);
        self.remote.shift(from, to);
        self.local.shift(from, to);
        self.flight.shift(from, to);
        self.unreadable.shift(from, to);
        self.wiped.shift(from, to);
        self.settle(from, served);
    }

    /// How many threads wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The first page of `range` that a thread waits for.
    pub fn first_awaited(&self, range: PageRange) -> Option<Vaddr> {
        self.next_waiting(range).map(|(page, _)| Vaddr(page))
    }
}

/// Bytes of the pages `image` of the dump that are in `map`.
fn bytes_of<I: Index>(map: &ExtentMap<I>, image: PageRange) -> u64 {
    let (mut bytes, mut rest) = (0, image);
    while let Some(piece) = map.find_image(rest) {
        bytes += piece.at.bytes();
        rest = PageRange::new(piece.image_range().end().get(), rest.end().get());
    }
    bytes
}
