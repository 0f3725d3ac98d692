//! Pages as the caller of a fetching session gets them: checked, and as plain bytes.

use std::ops::Range;

use crate::units::{PageRange, Vaddr};

/// Pages of one process.
#[derive(Debug)]
pub(in crate::engine) struct Delivery {
    /// Whose they are in the dump.
    pub(in crate::engine) pid: u32,
    /// What is there of them, by address.
    pub(in crate::engine) parts: Vec<Part>,
    /// Pages that an earlier round's images were to have and do not, at their addresses in the dump.
    pub(in crate::engine) lacking: Vec<PageRange>,
    /// The bytes.
    pub(in crate::engine) plain: Vec<u8>,
}

/// Neighbouring pages that came the same way.
#[derive(Debug)]
pub(in crate::engine) struct Part {
    /// Their addresses in the dump.
    pub(in crate::engine) image: PageRange,
    /// Where their bytes are in [`Delivery::plain`].
    pub(in crate::engine) bytes: Range<usize>,
    /// They were read from an earlier round's images, and are what the far end has.
    pub(in crate::engine) local: bool,
}

impl Delivery {
    /// Whether the far end has spoken of the page at `vaddr`.
    pub(in crate::engine) fn tells_of(&self, vaddr: Vaddr) -> bool {
        let there = self.parts.iter().map(|part| &part.image);
        there
            .chain(&self.lacking)
            .any(|range| range.contains(vaddr))
    }
}
