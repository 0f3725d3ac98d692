//! Contents of pages, kept as long as there is room; a clock hand chooses what goes first.
//!
//! They lie in slabs, one behind the other as they come: to allocate each page by itself took more time than to
//! copy it.

use std::ops::DerefMut;

use crate::units::PageSize;

use super::chunk::{PageLocation, Slot};

/// What kept contents take besides the page itself, bytes.
pub(super) const CACHED_EXTRA_BYTES: u64 = 64;

/// For how many turns of the clock hand the contents of a page that has just changed are safe.
const WARM: u8 = 2;

/// Memory for many pages that stay for long.
pub type Slab = Box<dyn DerefMut<Target = [u8]> + Send + Sync>;

/// Makes a slab of so many bytes.
pub type NewSlab = fn(usize) -> Slab;

/// Most bytes of a slab.
const SLAB_BYTES_MAX: u64 = 4 << 20;

/// No more than one of so many parts of the budget is in a slab that has just been begun.
const SLABS_MIN: u64 = 64;

struct CachedPage {
    location: PageLocation,
    warmth: u8,
}

/// See the module's text.
pub(super) struct ContentCache {
    page: usize,
    /// Pages in a slab.
    slab_pages: usize,
    new_slab: NewSlab,
    slabs: Vec<Slab>,
    slots: Vec<Option<CachedPage>>,
    free: Vec<Slot>,
    hand: usize,
    count: u64,
}

impl ContentCache {
    /// Nothing so far, of what is to take `budget_bytes` at most.
    pub(super) fn new(page: PageSize, budget_bytes: u64) -> ContentCache {
        let slab_bytes = SLAB_BYTES_MAX.min(budget_bytes / SLABS_MIN);
        let slab_pages = (slab_bytes >> page.shift()).max(1);
        ContentCache {
            page: page.as_usize(),
            slab_pages: usize::try_from(slab_pages).expect("a slab is small"),
            new_slab: |bytes| Box::new(vec![0; bytes]),
            slabs: Vec::new(),
            slots: Vec::new(),
            free: Vec::new(),
            hand: 0,
            count: 0,
        }
    }

    /// From now on slabs are made by `new_slab`.
    pub(super) fn set_new_slab(&mut self, new_slab: NewSlab) {
        self.new_slab = new_slab;
    }

    /// How many pages are kept.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// The contents in `slot`, which is in use.
    pub(super) fn contents(&self, slot: Slot) -> &[u8] {
        let at = index(slot);
        assert!(
            self.slots[at].is_some(),
            "slots are named as long as they are in use"
        );
        let start = at % self.slab_pages * self.page;
        &self.slabs[at / self.slab_pages][start..start + self.page]
    }

    fn put(&mut self, at: usize, contents: &[u8]) {
        let start = at % self.slab_pages * self.page;
        let slab = &mut self.slabs[at / self.slab_pages];
        slab[start..start + self.page].copy_from_slice(contents);
    }

    /// Keeps `contents` of the page at `location`. Pages that `changed` are likely to change again and
    /// stay longer.
    pub(super) fn insert(
        &mut self,
        location: PageLocation,
        contents: &[u8],
        changed: bool,
    ) -> Slot {
        let slot = self.free.pop().unwrap_or_else(|| {
            if self.slots.len() == self.slabs.len() * self.slab_pages {
                self.slabs
                    .push((self.new_slab)(self.slab_pages * self.page));
            }
            self.slots.push(None);
            let slot = u32::try_from(self.slots.len() - 1);
            Slot(slot.expect("2^32 pages are beyond any budget"))
        });
        let warmth = if changed { WARM } else { 0 };
        self.slots[index(slot)] = Some(CachedPage { location, warmth });
        self.put(index(slot), contents);
        self.count += 1;
        slot
    }

    /// Replaces the contents in `slot` by newer ones of the same page.
    pub(super) fn replace(&mut self, slot: Slot, contents: &[u8]) {
        let kept = self.slots[index(slot)].as_mut();
        kept.expect("slots are named as long as they are in use")
            .warmth = WARM;
        self.put(index(slot), contents);
    }

    /// Drops the contents in `slot`.
    pub(super) fn remove(&mut self, slot: Slot) {
        if self.slots[index(slot)].take().is_some() {
            self.count -= 1;
            self.free.push(slot);
        }
        if self.count == 0 {
            self.slabs.clear();
            self.slots.clear();
            self.free.clear();
            self.hand = 0;
        }
    }

    /// Drops one page: the next one under the hand that has not changed lately. If all have, it
    /// takes one of them only when `at_all_costs`. Returns whose contents are gone.
    pub(super) fn evict(&mut self, at_all_costs: bool) -> Option<PageLocation> {
        if self.count == 0 {
            return None;
        }
        let turns = if at_all_costs {
            usize::from(WARM) + 1
        } else {
            1
        };
        for _ in 0..self.slots.len() * turns {
            let at = self.hand;
            self.hand = (at + 1) % self.slots.len();
            match &mut self.slots[at] {
                Some(kept) if kept.warmth > 0 => kept.warmth -= 1,
                Some(kept) => {
                    let location = kept.location;
                    self.remove(Slot(u32::try_from(at).expect("slots are numbered by u32")));
                    return Some(location);
                }
                None => {}
            }
        }
        None
    }

    /// Whose contents are in `slot`.
    #[cfg(test)]
    pub(super) fn location(&self, slot: Slot) -> Option<PageLocation> {
        Some(self.slots[index(slot)].as_ref()?.location)
    }
}

fn index(slot: Slot) -> usize {
    usize::try_from(slot.0).expect("pointers have 32 bits and more")
}
