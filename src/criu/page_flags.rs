//! Flags of pages.

/// Flags of pages, the same on the wire and in pagemap entries.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PageFlags(u32);

impl PageFlags {
    /// The pages are in the parent image.
    pub const PARENT: PageFlags = PageFlags(1);
    /// The pages may be restored lazily.
    pub const LAZY: PageFlags = PageFlags(2);
    /// The pages' bytes are in this image (or follow on the wire).
    pub const PRESENT: PageFlags = PageFlags(4);
    /// The payload of a compressed entry begins at a page boundary of the pages file (4.3, images
    /// only).
    pub const PAYLOAD_ALIGNED: PageFlags = PageFlags(8);

    /// The flags as CRIU writes them.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Flags with the meaning of `bits`, whatever they are.
    pub const fn from_bits(bits: u32) -> PageFlags {
        PageFlags(bits)
    }

    /// Whether all of `other` are set.
    pub const fn has(self, other: PageFlags) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both sets together.
    #[must_use]
    pub const fn with(self, other: PageFlags) -> PageFlags {
        PageFlags(self.0 | other.0)
    }

    /// This set less `other`.
    #[must_use]
    pub const fn without(self, other: PageFlags) -> PageFlags {
        PageFlags(self.0 & !other.0)
    }
}
