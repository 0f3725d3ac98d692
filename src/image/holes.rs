//! Which blocks of a file can be given back when bytes of it have been used up.
//!
//! ```text
//!   used up   ....######.###########....
//!   blocks    |---|---|---|---|---|---|     a block goes when all of it is used up
//!                   ^^^     ^^^^^^^
//! ```
//!
//! Pages as they are fill blocks; compressed ones do not, and a hole in a part of a block frees nothing.

use std::collections::BTreeMap;
use std::ops::Range;

/// The bytes of a file that are used up.
#[derive(Clone, Debug)]
pub struct Holes {
    /// Bytes in a block.
    block: u64,
    /// Disjoint ranges that do not touch, by where they begin.
    used: BTreeMap<u64, u64>,
}

impl Holes {
    /// Nothing is used up of a file whose blocks have `block` bytes.
    pub fn new(block: u64) -> Holes {
        Holes {
            block: block.max(1),
            used: BTreeMap::new(),
        }
    }

    /// The bytes `range` are used up. Returns the blocks, all of which are used up by now, around and in it: they
    /// can be given back.
    pub fn add(&mut self, range: Range<u64>) -> Option<Range<u64>> {
        if range.is_empty() {
            return None;
        }
        let Range { mut start, mut end } = range;
        if let Some((&first, &behind)) = self.used.range(..start).next_back()
            && behind >= start
        {
            (start, end) = (first, end.max(behind));
            self.used.remove(&first);
        }
        while let Some((&first, &behind)) = self.used.range(start..=end).next() {
            end = end.max(behind);
            self.used.remove(&first);
        }
        self.used.insert(start, end);
        let up = |at: u64| at.div_ceil(self.block).saturating_mul(self.block);
        let down = |at: u64| at - at % self.block;
        let from = up(start).max(down(range.start));
        let to = down(end).min(up(range.end));
        (from < to).then_some(from..to)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BLOCK: u64 = 4;
    const LEN: u64 = 64;

    proptest! {
        #[test]
        fn a_block_goes_when_all_of_it_is_used_up(
            ranges in prop::collection::vec((0..LEN, 0..12_u64), 0..40),
        ) {
            let index = |at: u64| usize::try_from(at).expect("small");
            let block = index(BLOCK);
            let mut holes = Holes::new(BLOCK);
            let (mut used, mut gone) = (vec![false; 80], vec![false; 80]);
            for (start, len) in ranges {
                used[index(start)..index(start + len)].fill(true);
                if let Some(blocks) = holes.add(start..start + len) {
                    prop_assert_eq!((blocks.start % BLOCK, blocks.end % BLOCK), (0, 0));
                    gone[index(blocks.start)..index(blocks.end)].fill(true);
                }
                for (used, gone) in used.chunks(block).zip(gone.chunks(block)) {
                    let all = used.iter().all(|used| *used);
                    prop_assert!(gone.iter().all(|gone| *gone == all), "{used:?} {gone:?}");
                }
            }
        }
    }
}
