//! Contents of pages, kept as long as there is room; a clock hand chooses what goes first.

use super::chunk::{Slot, Spot};

/// What kept contents take besides the page itself, bytes.
pub(super) const KEPT_EXTRA_BYTES: u64 = 64;

/// For how many turns of the clock hand the contents of a page that has just changed are safe.
const WARM: u8 = 2;

struct Kept {
    spot: Spot,
    warmth: u8,
    contents: Box<[u8]>,
}

/// See the module's text.
#[derive(Default)]
pub(super) struct KeptPages {
    slots: Vec<Option<Kept>>,
    free: Vec<Slot>,
    hand: usize,
    count: u64,
}

impl KeptPages {
    /// How many pages are kept.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// The contents in `slot`, which is in use.
    pub(super) fn contents(&self, slot: Slot) -> &[u8] {
        let kept = self.slots[index(slot)].as_ref();
        &kept
            .expect("slots are named as long as they are in use")
            .contents
    }

    /// Keeps `contents` of the page at `spot`. Pages that `changed` are likely to change again and
    /// stay longer.
    pub(super) fn insert(&mut self, spot: Spot, contents: &[u8], changed: bool) -> Slot {
        let kept = Some(Kept {
            spot,
            warmth: if changed { WARM } else { 0 },
            contents: contents.into(),
        });
        self.count += 1;
        if let Some(slot) = self.free.pop() {
            self.slots[index(slot)] = kept;
            return slot;
        }
        self.slots.push(kept);
        let slot = u32::try_from(self.slots.len() - 1);
        Slot(slot.expect("2^32 pages are beyond any budget"))
    }

    /// Replaces the contents in `slot` by newer ones of the same page.
    pub(super) fn replace(&mut self, slot: Slot, contents: &[u8]) {
        let kept = self.slots[index(slot)].as_mut();
        let kept = kept.expect("slots are named as long as they are in use");
        kept.contents.copy_from_slice(contents);
        kept.warmth = WARM;
    }

    /// Drops the contents in `slot`.
    pub(super) fn remove(&mut self, slot: Slot) {
        if self.slots[index(slot)].take().is_some() {
            self.count -= 1;
            self.free.push(slot);
        }
    }

    /// Drops one page: the next one under the hand that has not changed lately. If all have, it
    /// takes one of them only when `at_all_costs`. Returns whose contents are gone.
    pub(super) fn evict(&mut self, at_all_costs: bool) -> Option<Spot> {
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
                    let spot = kept.spot;
                    self.remove(Slot(u32::try_from(at).expect("slots are numbered by u32")));
                    return Some(spot);
                }
                None => {}
            }
        }
        None
    }

    /// Whose contents are in `slot`.
    #[cfg(test)]
    pub(super) fn spot(&self, slot: Slot) -> Option<Spot> {
        Some(self.slots[index(slot)].as_ref()?.spot)
    }
}

fn index(slot: Slot) -> usize {
    usize::try_from(slot.0).expect("pointers have 32 bits and more")
}
