//! What the background brings next: from the source, and from local images.

use super::{Class, Space, Wanted};
use crate::lazy::extents::Piece;
use crate::lazy::policy::{StreamFrom, StreamState};
use crate::units::{PageRange, Vaddr};

impl Space {
    /// The next pages of the background stream, at most `chunk` bytes, in the order of
    /// [`Policy::stream_from`](crate::lazy::policy::Policy::stream_from). Pages that are there already are fetched again rather than asked around, up
    /// to `gap` bytes of them in a row.
    pub fn next_stream(&mut self, chunk: u64, gap: u64) -> Option<Wanted> {
        let first = self.next_in_order(chunk)?;
        let range = match self.first_was_last {
            // What is beside it is not needed so soon.
            true => first.at,
            false => self.join_over_gaps(first, chunk, gap),
        };
        let flight = &mut self.flight;
        self.remote.take(range, |piece| flight.insert(piece));
        let image = first.image.get();
        let image = PageRange::new(image, image + range.bytes());
        Some(Wanted {
            image,
            class: Class::Stream,
        })
    }

    fn next_in_order(&mut self, chunk: u64) -> Option<Piece> {
        loop {
            let last_fault = self.recent.back().copied();
            let in_first = self.first.next_remote(&self.remote);
            let from = self.policy.stream_from(&StreamState {
                working_set: in_first.map(|piece| piece.at.start()),
                working_set_was_last: self.first_was_last,
                last_fault,
                stopped: self.remote_cursor,
            });
            if let (StreamFrom::WorkingSet, Some(piece)) = (from, in_first) {
                self.first_was_last = true;
                let part = piece.part(self.run_from(piece.at.start(), chunk, piece));
                self.first.pass_remote(part);
                return Some(part);
            }
            self.first_was_last = false;
            match (from, last_fault) {
                (StreamFrom::LastFault, Some(fault)) => {
                    if let Some(part) = self.missing_of_block(fault, chunk) {
                        return Some(part);
                    }
                    self.recent.pop_back();
                }
                (StreamFrom::LastFault, None) | (StreamFrom::WorkingSet, _) => {
                    return self.ascending(self.remote_cursor, chunk);
                }
                (StreamFrom::Address(start), _) => return self.ascending(start, chunk),
            }
        }
    }

    /// What is missing first of the block of `chunk` bytes around `fault`.
    fn missing_of_block(&self, fault: Vaddr, chunk: u64) -> Option<Piece> {
        let start = fault.get() - fault.get() % chunk;
        let block = PageRange::new(start, start.saturating_add(chunk));
        let next = self.remote.next_from(block.start())?;
        next.at.intersect(block).map(|at| next.part(at))
    }

    fn ascending(&mut self, start: Vaddr, chunk: u64) -> Option<Piece> {
        let next = self
            .remote
            .next_from(start)
            .or_else(|| self.remote.next_from(Vaddr(0)))?;
        let part = next.part(self.run_from(next.at.start(), chunk, next));
        self.remote_cursor = part.at.end();
        Some(part)
    }

    /// Lengthens `first` over small gaps of pages that are there already, as long as the source had
    /// all of it in one run: one request then serves for several.
    fn join_over_gaps(&self, first: Piece, chunk: u64, gap: u64) -> PageRange {
        let start = first.at.start().get();
        let mut end = first.at.end().get();
        let shift = first.image.get().wrapping_sub(start);
        let origin = self.origin(first.image);
        while end - start < chunk {
            let Some(next) = self.remote.next_from(Vaddr(end)) else {
                break;
            };
            let longest = next.at.start().get() - start + self.page.bytes();
            let distance = next.at.start().get() - end;
            let same_run = next.image.get().wrapping_sub(next.at.start().get()) == shift
                && origin.is_some_and(|origin| origin.contains(next.image));
            if distance > gap || longest > chunk || !same_run {
                break;
            }
            end = next.at.end().get().min(start + chunk);
        }
        PageRange::new(start, end)
    }

    /// The next piece to install from local images in the background, at most `chunk` bytes.
    pub fn next_local(&mut self, chunk: u64) -> Option<Piece> {
        if let Some(piece) = self.first.next_local(&self.local) {
            let part = piece.part(self.run_from(piece.at.start(), chunk, piece));
            self.first.pass_local(part);
            return Some(part);
        }
        let next = self
            .local
            .next_from(self.local_cursor)
            .or_else(|| self.local.next_from(Vaddr(0)))?;
        let part = next.part(self.run_from(next.at.start(), chunk, next));
        self.local_cursor = part.at.end();
        Some(part)
    }
}
