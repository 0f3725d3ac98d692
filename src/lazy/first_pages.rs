//! The pages of one process that come before all others: its part of a [`WorkingSet`](super::working_set::WorkingSet).

use std::sync::Arc;

use super::extents::{ExtentMap, Index, Piece};
use crate::units::{PageRange, Vaddr};

/// See the module's text. Copies, as forks have, share the list and go on by themselves.
#[derive(Clone, Default, Debug)]
pub(super) struct FirstPages {
    /// Addresses in the dump, in the order in which they come.
    order: Arc<[PageRange]>,
    /// The same, disjoint and by address.
    members: Arc<[PageRange]>,
    /// How far they have been asked of the source,
    remote: Cursor,
    /// and installed from local images.
    local: Cursor,
}

/// How far the list has been gone through: each page is brought once. What does not come then comes with the rest.
#[derive(Clone, Copy, Default, Debug)]
struct Cursor {
    /// Index of a range.
    at: usize,
    /// What lies below is done in that range.
    from: Vaddr,
}

impl FirstPages {
    /// These pages, by address in the dump, in the order in which they come.
    pub(super) fn new(order: Vec<PageRange>) -> FirstPages {
        let mut sorted = order.clone();
        sorted.sort_unstable_by_key(|range| range.start());
        let mut members: Vec<PageRange> = Vec::with_capacity(sorted.len());
        for range in sorted {
            match members.last_mut() {
                Some(last) if range.start() <= last.end() => {
                    let end = last.end().max(range.end());
                    *last = PageRange::new(last.start().get(), end.get());
                }
                _ => members.push(range),
            }
        }
        FirstPages {
            order: order.into(),
            members: members.into(),
            remote: Cursor::default(),
            local: Cursor::default(),
        }
    }

    /// All pages, disjoint and by address.
    pub(super) fn members(&self) -> &[PageRange] {
        &self.members
    }

    /// Whether the page of the dump at `image` is one of them.
    pub(super) fn contains(&self, image: Vaddr) -> bool {
        let behind = self.members.partition_point(|range| range.start() <= image);
        let before = behind.checked_sub(1).and_then(|at| self.members.get(at));
        before.is_some_and(|range| range.contains(image))
    }

    /// The next of them that the source has.
    pub(super) fn next_remote<I: Index>(&mut self, remote: &ExtentMap<I>) -> Option<Piece> {
        self.remote.next_of(&self.order, remote)
    }

    /// The part `asked` of what was next is asked of the source.
    pub(super) fn pass_remote(&mut self, asked: Piece) {
        self.remote.from = asked.image_range().end();
    }

    /// The next of them that the local images have. `local` must find pages by their addresses in the dump.
    pub(super) fn next_local<I: Index>(&mut self, local: &ExtentMap<I>) -> Option<Piece> {
        self.local.next_of(&self.order, local)
    }

    /// The part `installed` of what was next is installed from local images.
    pub(super) fn pass_local(&mut self, installed: Piece) {
        self.local.from = installed.image_range().end();
    }
}

impl Cursor {
    fn next_of<I: Index>(&mut self, order: &[PageRange], map: &ExtentMap<I>) -> Option<Piece> {
        while let Some(range) = order.get(self.at) {
            let start = range.start().max(self.from).min(range.end());
            let rest = PageRange::new(start.get(), range.end().get());
            if let Some(piece) = map.find_image(rest).filter(|_| !rest.is_empty()) {
                return Some(piece);
            }
            *self = Cursor {
                at: self.at + 1,
                from: Vaddr(0),
            };
        }
        None
    }
}
