//! 512 neighbouring pages: their hashes, and where their contents are kept.

use crate::criu::header::Target;
use crate::ferry::hash::{HASH_BYTES, PageHash};

/// Pages of a chunk.
pub(super) const CHUNK_PAGES: usize = 512;

/// What a chunk takes, bytes: its hashes, bit sets and its place in a map.
pub(super) const CHUNK_BYTES: u64 = (CHUNK_PAGES * HASH_BYTES + 256) as u64;

/// What a chunk takes besides once contents of any of its pages are kept, bytes.
pub(super) const SLOTS_BYTES: u64 = (CHUNK_PAGES * 4) as u64;

/// Which page of whose memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct PageLocation {
    /// Whose.
    pub(super) target: Target,
    /// Page number: the address divided by the page size.
    pub(super) number: u64,
}

impl PageLocation {
    /// Number of the chunk that has the page.
    pub(super) fn chunk(self) -> u64 {
        self.number / CHUNK_PAGES as u64
    }

    /// The page's place in its chunk.
    pub(super) fn at(self) -> usize {
        usize::try_from(self.number % CHUNK_PAGES as u64).expect("a remainder is small")
    }
}

#[derive(Clone, Copy, Default)]
struct PageSet([u64; CHUNK_PAGES / 64]);

impl PageSet {
    fn has(&self, at: usize) -> bool {
        self.0[at / 64] & (1 << (at % 64)) != 0
    }

    fn add(&mut self, at: usize) {
        self.0[at / 64] |= 1 << (at % 64);
    }
}

/// Names kept contents: an index that is never the highest u32.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Slot(pub(super) u32);

const NO_SLOT: u32 = u32::MAX;

/// See the module's text.
pub(super) struct Chunk {
    hashes: Box<[PageHash; CHUNK_PAGES]>,
    slots: Option<Box<[u32; CHUNK_PAGES]>>,
    known: PageSet,
    seen: PageSet,
    /// Seen in this session, and its contents sent.
    sent: PageSet,
}

impl Chunk {
    pub(super) fn new() -> Chunk {
        Chunk {
            hashes: Box::new([PageHash::default(); CHUNK_PAGES]),
            slots: None,
            known: PageSet::default(),
            seen: PageSet::default(),
            sent: PageSet::default(),
        }
    }

    /// Memory in use, bytes.
    pub(super) fn bytes(&self) -> u64 {
        CHUNK_BYTES + self.slots.as_ref().map_or(0, |_| SLOTS_BYTES)
    }

    /// Hash of the base version, if that is known and was not replaced in this round.
    pub(super) fn base(&self, at: usize) -> Option<PageHash> {
        (self.known.has(at) && !self.seen.has(at)).then(|| self.hashes[at])
    }

    /// Sets the hash of the base version, unless this round's has its place.
    pub(super) fn set_base(&mut self, at: usize, hash: PageHash) {
        if !self.seen.has(at) {
            self.hashes[at] = hash;
            self.known.add(at);
        }
    }

    /// Puts this round's version of the page in the base version's place.
    pub(super) fn replace(&mut self, at: usize, hash: PageHash) {
        self.hashes[at] = hash;
        self.known.add(at);
        self.seen.add(at);
    }

    /// The contents of this round's version go to the receiver.
    pub(super) fn set_sent(&mut self, at: usize) {
        self.sent.add(at);
    }

    /// Whether the receiver got the contents of this page in this session, and they have this hash.
    pub(super) fn has_sent(&self, at: usize, hash: PageHash) -> bool {
        self.sent.has(at) && self.hashes[at] == hash
    }

    /// Another session begins: the receiver has got nothing in it.
    pub(super) fn forget_sent(&mut self) {
        self.sent = PageSet::default();
    }

    /// Nothing is known of any page.
    pub(super) fn forget(&mut self) {
        self.sent = PageSet::default();
        self.known = PageSet::default();
        self.seen = PageSet::default();
    }

    /// This round's version of the page is the base version.
    pub(super) fn keep(&mut self, at: usize) {
        self.seen.add(at);
    }

    /// Where the contents of the page are kept.
    pub(super) fn slot(&self, at: usize) -> Option<Slot> {
        let slot = self.slots.as_ref()?[at];
        (slot != NO_SLOT).then_some(Slot(slot))
    }

    /// Says where the contents of the page are kept from now on.
    pub(super) fn set_slot(&mut self, at: usize, slot: Option<Slot>) {
        if let Some(slot) = slot {
            let slots = self
                .slots
                .get_or_insert_with(|| Box::new([NO_SLOT; CHUNK_PAGES]));
            slots[at] = slot.0;
        } else if let Some(slots) = &mut self.slots {
            slots[at] = NO_SLOT;
        }
    }

    /// All slots in use.
    pub(super) fn slots(&self) -> impl Iterator<Item = Slot> {
        (0..CHUNK_PAGES).filter_map(|at| self.slot(at))
    }

    /// This round's versions are the new base version: forgets the pages that the round did not
    /// mention and names their slots to `dropped`. Returns whether anything is left.
    pub(super) fn commit(&mut self, mut dropped: impl FnMut(Slot)) -> bool {
        self.forget_sent();
        for at in 0..CHUNK_PAGES {
            if !self.seen.has(at)
                && let Some(slot) = self.slot(at)
            {
                dropped(slot);
                self.set_slot(at, None);
            }
        }
        for (known, seen) in self.known.0.iter_mut().zip(&mut self.seen.0) {
            *known &= std::mem::take(seen);
        }
        self.known.0.iter().any(|word| *word != 0)
    }
}
