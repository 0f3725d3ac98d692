//! What a fault asks for: the page that a thread waits for, and what goes with it.

use super::{Class, FaultAnswer, FetchLimits, Space, Wanted};
use crate::lazy::extents::Piece;
use crate::lazy::pattern::FaultAround;
use crate::units::{PageRange, Vaddr};

/// Faults whose neighbourhood the stream visits first, at most.
const RECENT_FAULTS_MAX: usize = 32;

/// Most bytes of a local image installed for one fault: beyond it other faults wait too long.
const LOCAL_FAULT_BYTES_MAX: u64 = 64 << 10;

/// So much in front of an awaited page is asked for behind it, bytes.
const DETOUR_BYTES: u64 = 16 << 10;

/// Runs of fragmented memory that a fault brings at most: each is a request of its own.
const FAULT_RUNS_MAX: usize = 16;

/// So many times as far as it brings pages a fault looks for runs of fragmented memory.
const FRAGMENT_REACH: u64 = 4;

/// A fault that brings so many pages ahead is one of a sequence that has been seen for a while.
const SEQUENCE_PAGES: u64 = 16;

impl Space {
    /// A thread touched `addr`.
    pub fn fault(&mut self, addr: Vaddr, limits: FetchLimits, now_us: u64) -> FaultAnswer {
        let start = Vaddr(self.page.floor(addr.get()));
        let is_new = !self.waiting.contains_key(&start.get());
        self.waiting.entry(start.get()).or_insert(now_us);
        if self.flight.find(start).is_some() {
            if is_new {
                // What it shows is of use; what it would bring is asked for when it is missed.
                self.note_fault(start);
            }
            return FaultAnswer::Wait;
        }
        if let Some(piece) = self.remote.find(start) {
            if self.lost {
                return FaultAnswer::Wait;
            }
            let around = self.note_fault(start);
            self.ask_around(start, piece, around, limits);
            let image = piece.image.get() + (start.get() - piece.at.start().get());
            // What is around a page of the working set comes with that, as far as it is needed.
            if !(self.has_first(false) && self.first.contains(Vaddr(image))) {
                self.remember(start);
            }
            return FaultAnswer::Wait;
        }
        if let Some(piece) = self.local.find(start) {
            let pages = match self.note_fault(start) {
                FaultAround::Up(pages) => pages,
                FaultAround::Alone | FaultAround::Down(_) | FaultAround::Stride { .. } => 1,
            };
            self.local_cursor = start;
            let bytes = (pages * self.page.bytes()).min(LOCAL_FAULT_BYTES_MAX);
            return FaultAnswer::Local(piece.part(self.run_from(start, bytes, piece)));
        }
        if self.unreadable.find(start).is_some() {
            return FaultAnswer::Wait;
        }
        if self.is_read_upwards(start) {
            // A sequence goes on over pages that no image has, and over such as have just come.
            self.note_fault(start);
        }
        FaultAnswer::Zero
    }

    /// What is to be brought with the page at `start`, which a thread touched.
    fn note_fault(&mut self, start: Vaddr) -> FaultAround {
        let number = start.get() >> self.page.shift();
        self.policy.around(&mut self.pattern, number)
    }

    /// Whether the thread that waits for `page` reads upwards, and so needs the next pages next.
    pub fn is_read_upwards(&self, page: Vaddr) -> bool {
        self.policy
            .reads_upwards(&self.pattern, page.get() >> self.page.shift())
    }

    /// Moves the faulting page and what goes with it from `remote` to `urgent`.
    fn ask_around(&mut self, start: Vaddr, piece: Piece, around: FaultAround, limits: FetchLimits) {
        let page = self.page.bytes();
        match around {
            FaultAround::Alone => {
                let first = start.get() - start.get() % limits.alone_bytes.max(page);
                let block =
                    PageRange::new(first, first.saturating_add(limits.alone_bytes.max(page)));
                if let Some(range) = piece.at.intersect(block) {
                    self.ask_awaited_first(range, start);
                }
                if self.is_fragment(piece, block.bytes()) {
                    self.ask_runs(block, block.bytes());
                }
            }
            FaultAround::Up(pages) => {
                let bytes = (pages * page).min(limits.sequential_bytes).max(page);
                let class = if pages < SEQUENCE_PAGES {
                    Class::Fault
                } else {
                    Class::Sequential
                };
                let range = self.run_from(start, bytes, piece);
                self.ask(range, class);
                if self.is_fragment(piece, bytes) {
                    let span = bytes.saturating_mul(FRAGMENT_REACH);
                    let end = start.get().saturating_add(span);
                    self.ask_runs(
                        PageRange::new(range.end().get(), end),
                        bytes - range.bytes(),
                    );
                }
            }
            FaultAround::Down(pages) => {
                self.ask(self.run_from(start, page, piece), Class::Fault);
                let bytes = (pages * page).min(limits.sequential_bytes).max(page) - page;
                let lowest = start.get().saturating_sub(bytes);
                let below = PageRange::new(lowest.max(piece.at.start().get()), start.get());
                self.ask(below, Class::Around);
            }
            FaultAround::Stride { step, count } => {
                self.ask(self.run_from(start, page, piece), Class::Fault);
                for multiple in 1..=count {
                    let distance = step
                        .saturating_mul(multiple)
                        .saturating_mul(page.cast_signed());
                    let Some(next) = start.get().checked_add_signed(distance) else {
                        break;
                    };
                    if let Some(there) = self.remote.find(Vaddr(next)) {
                        self.ask(self.run_from(Vaddr(next), page, there), Class::Around);
                    }
                }
            }
        }
    }

    /// Asks for `range`, beginning with `awaited` if much lies before that: answers come in order, and one
    /// more request takes less than what would come first.
    fn ask_awaited_first(&mut self, range: PageRange, awaited: Vaddr) {
        let before = PageRange::new(range.start().get(), awaited.get());
        if before.bytes() < DETOUR_BYTES {
            self.ask(range, Class::Fault);
            return;
        }
        self.ask(
            PageRange::new(awaited.get(), range.end().get()),
            Class::Fault,
        );
        self.ask(before, Class::Around);
    }

    /// Whether what the source had around `piece` in one run was less than `bytes`.
    fn is_fragment(&self, piece: Piece, bytes: u64) -> bool {
        self.origin(piece.image)
            .is_some_and(|run| run.bytes() < bytes)
    }

    /// Asks for what lies in `range`, up to `bytes` of it and no more than a few runs, behind what is awaited.
    fn ask_runs(&mut self, range: PageRange, bytes: u64) {
        let mut left = bytes;
        let mut at = range.start();
        for _ in 0..FAULT_RUNS_MAX {
            let Some(next) = self.remote.next_from(at) else {
                return;
            };
            let Some(part) = next.at.intersect(range).filter(|_| left > 0) else {
                return;
            };
            let start = part.start().get();
            let part = PageRange::new(start, start + part.bytes().min(left));
            self.ask(part, Class::Around);
            left -= part.bytes();
            at = part.end();
        }
    }

    fn ask(&mut self, range: PageRange, class: Class) {
        let (flight, urgent) = (&mut self.flight, &mut self.urgent);
        self.remote.take(range, |piece| {
            flight.insert(piece);
            urgent.push_back(Wanted {
                image: piece.image_range(),
                class,
            });
        });
    }

    /// What threads wait for of the pages `image` is asked for, unless it is on the way.
    pub fn ask_again(&mut self, image: PageRange) {
        let mut rest = image;
        while let Some(piece) = self.remote.find_image(rest) {
            self.ask_for_waiting(piece.at);
            rest = PageRange::new(piece.image_range().end().get(), rest.end().get());
        }
    }

    pub(super) fn ask_for_waiting(&mut self, at: PageRange) {
        if self.lost {
            return;
        }
        let waiting: Vec<u64> = self
            .waiting
            .range(at.start().get()..at.end().get())
            .map(|(page, _)| *page)
            .collect();
        for start in waiting {
            if let Some(piece) = self.remote.find(Vaddr(start)) {
                self.ask(
                    self.run_from(Vaddr(start), self.page.bytes(), piece),
                    Class::Fault,
                );
            }
        }
    }

    /// The page of `addr` comes before the stream, although no thread waits for it. What the images here have of
    /// it is to be installed by the caller.
    pub fn fetch_ahead(&mut self, addr: Vaddr) -> Option<Piece> {
        let start = self.page.floor(addr.get());
        let page = PageRange::new(start, start.checked_add(self.page.bytes())?);
        if !self.lost {
            self.ask(page, Class::Fault);
        }
        Some(self.local.find(page.start())?.part(page))
    }

    fn remember(&mut self, fault: Vaddr) {
        if self.recent.len() == RECENT_FAULTS_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back(fault);
    }

    /// The next pages that a fault asks for and that have not been sent for.
    pub fn next_urgent(&mut self) -> Option<Wanted> {
        loop {
            let wanted = self.urgent.pop_front()?;
            // Unmapped before it went out: nobody needs it any more.
            if self.flight.find_image(wanted.image).is_some() {
                return Some(wanted);
            }
        }
    }
}
