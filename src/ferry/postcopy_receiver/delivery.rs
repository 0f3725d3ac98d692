//! Pages as the caller of a fetching session gets them: checked, and as plain bytes.

use std::ops::Range;

use crate::ferry::batch::{Batch, Place};
use crate::ferry::hash::{PageHash, PageHasher};
use crate::units::{PageRange, PageSize, Vaddr};

/// Pages of one process.
#[derive(Debug)]
pub struct Delivery {
    /// Whose they are in the dump.
    pub pid: u32,
    /// What is there of them, by address.
    pub parts: Vec<Part>,
    /// Pages that an earlier round was to have and does not, at their addresses in the dump.
    pub absent: Vec<PageRange>,
    /// The bytes.
    pub plain: Vec<u8>,
}

/// Neighbouring pages from the same place.
#[derive(Debug)]
pub struct Part {
    /// Their addresses in the dump.
    pub image: PageRange,
    /// Where their bytes are in [`Delivery::plain`].
    pub bytes: Range<usize>,
    /// They were read from an earlier round, and are what the far end has.
    pub local: bool,
}

impl Delivery {
    /// Whether it says of the page at `vaddr`.
    pub fn covers(&self, vaddr: Vaddr) -> bool {
        let there = self.parts.iter().map(|part| &part.image);
        there.chain(&self.absent).any(|range| range.contains(vaddr))
    }
}

/// A delivery whose local pages have not been read and verified yet: nothing of it can be used before
/// [`PostcopyReceiver::complete`](super::PostcopyReceiver::complete).
#[derive(Debug)]
pub struct UnverifiedDelivery {
    delivery: Delivery,
    /// Over the hashes of all local pages, as the far end means them.
    digest: PageHash,
    page: PageSize,
}

impl UnverifiedDelivery {
    /// The pages of `batch`, which lies in `body`, with `unpacked` what was packed of them; laid out in
    /// `room`.
    pub(super) fn of(
        pid: u32,
        batch: &Batch<'_>,
        body: &[u8],
        unpacked: &[u8],
        page: PageSize,
        room: Vec<u8>,
    ) -> UnverifiedDelivery {
        let mut plain = room;
        let mut filled = 0;
        let mut parts: Vec<Part> = Vec::new();
        for (vaddr, place) in batch.places() {
            let start = filled;
            filled += page.as_usize();
            // What is there of the batch before is written over: to clear it first took as long as the copy.
            if plain.len() < filled {
                plain.resize(filled, 0);
            }
            let local = place == Place::Same;
            match place {
                Place::Body(range) => plain[start..filled].copy_from_slice(&body[range]),
                Place::Unpacked(range) => plain[start..filled].copy_from_slice(&unpacked[range]),
                Place::Zero => plain[start..filled].fill(0),
                // The caller reads it, or it is left out. Shared pages are refused where batches are read.
                Place::Same | Place::Shared(_) => {}
            }
            let end = vaddr.get() + page.bytes();
            match parts.last_mut() {
                Some(part) if part.image.end() == vaddr && part.local == local => {
                    part.image = PageRange::new(part.image.start().get(), end);
                    part.bytes.end = filled;
                }
                _ => parts.push(Part {
                    image: PageRange::new(vaddr.get(), end),
                    bytes: start..filled,
                    local,
                }),
            }
        }
        plain.truncate(filled);
        UnverifiedDelivery {
            delivery: Delivery {
                pid,
                parts,
                absent: Vec::new(),
                plain,
            },
            digest: batch.base_digest(),
            page,
        }
    }

    /// Whose pages these are in the dump.
    pub fn pid(&self) -> u32 {
        self.delivery.pid
    }

    /// The pages that an earlier round has, and where they are to be read to.
    pub fn local(&mut self) -> impl Iterator<Item = (PageRange, &mut [u8])> {
        let mut rest = &mut self.delivery.plain[..];
        let mut at = 0;
        self.delivery.parts.iter().filter_map(move |part| {
            let (_, behind) = std::mem::take(&mut rest).split_at_mut(part.bytes.start - at);
            let (bytes, behind) = behind.split_at_mut(part.bytes.len());
            (rest, at) = (behind, part.bytes.end);
            part.local.then_some((part.image, bytes))
        })
    }

    pub(super) fn has_local(&self) -> bool {
        self.delivery.parts.iter().any(|part| part.local)
    }

    /// Whether what was read of the local pages is what the far end means.
    pub(super) fn agrees(&self, hasher: &PageHasher) -> bool {
        let local = self.delivery.parts.iter().filter(|part| part.local);
        let pages = local.flat_map(|part| {
            self.delivery.plain[part.bytes.clone()].chunks_exact(self.page.as_usize())
        });
        hasher.digest(pages.map(|page| hasher.hash(page))) == self.digest
    }

    pub(super) fn whole(self) -> Delivery {
        self.delivery
    }

    /// What is left without the local pages.
    pub(super) fn without_local(self) -> Delivery {
        let mut delivery = self.delivery;
        let absent = &mut delivery.absent;
        delivery.parts.retain(|part| {
            if part.local {
                absent.push(part.image);
            }
            !part.local
        });
        delivery
    }
}
