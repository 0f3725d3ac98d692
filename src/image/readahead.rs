//! Bringing the bytes of images into the page cache before they are needed.
//!
//! ```text
//!   pages of the chain   ####.#.##.......#######.#.#.####.#    holes cost nothing, however many
//!                        |   half   |   half   |
//!                           ^ reader   ^ when it is here, the next half is asked for
//! ```
//!
//! What has been asked for once is not asked for again as long as the reader goes on upwards: the work grows
//! with the extents, not with extents times extents. Extents that are one run in the file are asked for
//! together. A reader who has just come from elsewhere is read ahead of by little at first: it may be
//! gone again soon.

use super::chain::{Chain, Resolved};
use crate::units::{PageRange, Vaddr};

/// Extents that are looked at for one half at most.
const EXTENTS_MAX: usize = 8192;

/// Asked for in each half when a reader has just come, bytes; twice as much each time it goes on.
const FIRST_BYTES: u64 = 256 << 10;

/// A run of bytes of a chain's pages file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Advice {
    /// Number of the pages file in its chain.
    pub file: u32,
    /// Offset in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// How far a reader who goes upwards is read ahead of. See the module's text.
#[derive(Clone, Debug)]
pub struct ReadAhead {
    /// Bytes of pages that are asked for together at most,
    most: u64,
    /// and in the next half.
    half: u64,
    /// What has been asked for last begins here,
    from: Vaddr,
    /// the next is asked for from a reader who is here or beyond,
    middle: Vaddr,
    /// and from here on.
    end: Vaddr,
}

impl ReadAhead {
    /// Keeps up to `most` and at most twice as many bytes of pages ahead of the reader.
    pub fn new(most: u64) -> ReadAhead {
        let nowhere = Vaddr(0);
        ReadAhead {
            most,
            half: 0,
            from: nowhere,
            middle: nowhere,
            end: nowhere,
        }
    }

    /// The reader is about to read the page at `at` of `chain`: asks the kernel for what follows.
    pub fn pass(&mut self, chain: &Chain, at: Vaddr) {
        for Advice {
            file,
            offset,
            bytes,
        } in self.advice(chain, at)
        {
            chain.file(file).advise(offset, bytes);
        }
    }

    /// What [`ReadAhead::pass`] asks for.
    pub fn advice(&mut self, chain: &Chain, at: Vaddr) -> Vec<Advice> {
        let mut advice = Vec::new();
        if at < self.from || at > self.end || self.end == Vaddr(0) {
            self.half = FIRST_BYTES.min(self.most);
            self.from = at;
            self.middle = next_half(chain, at, self.half, &mut advice);
            self.end = next_half(chain, self.middle, self.half, &mut advice);
        } else if at >= self.middle && self.middle < self.end {
            self.half = self.most.min(2 * self.half);
            self.from = self.middle;
            self.middle = self.end;
            self.end = next_half(chain, self.end, self.half, &mut advice);
        }
        advice
    }
}

/// Adds where the next `bytes` of pages from `from` on are. Returns how far that reaches.
fn next_half(chain: &Chain, from: Vaddr, bytes: u64, advice: &mut Vec<Advice>) -> Vaddr {
    let (mut room, mut end) = (bytes, from);
    for extent in chain.extents_from(from).take(EXTENTS_MAX) {
        if room == 0 {
            return end;
        }
        let start = extent.range.start().get();
        let range = PageRange::new(start, start + extent.range.bytes().min(room));
        end = range.end();
        let part = Resolved { range, ..extent };
        let Some((file, offset, bytes)) = chain.span(&part) else {
            continue;
        };
        room -= range.bytes();
        match advice.last_mut() {
            Some(last) if last.file == file && last.offset + last.bytes == offset => {
                last.bytes += bytes;
            }
            _ => advice.push(Advice {
                file,
                offset,
                bytes,
            }),
        }
    }
    end
}
