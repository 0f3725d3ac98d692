//! Addresses, counts and lengths that cannot be mistaken for one another.
//!
//! The page size is a value ([`PageSize`]), never the literal 4096: aarch64 kernels run with 4, 16
//! or 64 KiB. Everything that a peer or a file supplies is converted by the checked constructors.

use std::fmt;

/// The size of a page in bytes: a power of two of at least 4 KiB.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageSize {
    shift: u8,
}

impl PageSize {
    /// 4 KiB pages, as on x86_64.
    pub const KIB_4: PageSize = PageSize { shift: 12 };

    /// A page size of `bytes`, if that is a power of two from 4 KiB to 64 KiB.
    pub const fn new(bytes: u64) -> Option<PageSize> {
        match bytes {
            0x1000 => Some(PageSize { shift: 12 }),
            0x2000 => Some(PageSize { shift: 13 }),
            0x4000 => Some(PageSize { shift: 14 }),
            0x8000 => Some(PageSize { shift: 15 }),
            0x1_0000 => Some(PageSize { shift: 16 }),
            _ => None,
        }
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        1 << self.shift
    }

    /// The size in bytes, for lengths of buffers.
    pub const fn as_usize(self) -> usize {
        1 << self.shift
    }

    /// How far an address is shifted right to give its page number.
    pub const fn shift(self) -> u32 {
        self.shift as u32
    }

    /// Whether `value` (an address or a length in bytes) is a multiple of the page size.
    pub const fn divides(self, value: u64) -> bool {
        value & (self.bytes() - 1) == 0
    }

    /// The largest multiple of the page size that is not above `value`.
    pub const fn floor(self, value: u64) -> u64 {
        value & !(self.bytes() - 1)
    }
}

/// A virtual address in some process.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Vaddr(pub u64);

impl Vaddr {
    /// The address as a number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Vaddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for Vaddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A number of pages.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct PageCount(pub u64);

impl PageCount {
    /// The count as a number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The pages' length in bytes, or `None` beyond 2^64.
    pub const fn checked_bytes(self, page: PageSize) -> Option<u64> {
        self.0.checked_mul(page.bytes())
    }
}

impl fmt::Display for PageCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// A half-open range of addresses, `start..end`, aligned to pages by its maker.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRange {
    start: u64,
    end: u64,
}

impl PageRange {
    /// The range `start..end`. `start` may not lie above `end`.
    pub fn new(start: u64, end: u64) -> PageRange {
        assert!(start <= end, "a range cannot end below its start");
        PageRange { start, end }
    }

    /// The `pages` pages from `start` on, as a peer or a file says: `None` if `start` is not
    /// aligned, `pages` is 0, or the end overflows.
    pub fn checked(start: Vaddr, pages: PageCount, page: PageSize) -> Option<PageRange> {
        if pages.0 == 0 || !page.divides(start.0) {
            return None;
        }
        let end = start.0.checked_add(pages.checked_bytes(page)?)?;
        Some(PageRange {
            start: start.0,
            end,
        })
    }

    /// First address.
    pub const fn start(self) -> Vaddr {
        Vaddr(self.start)
    }

    /// First address behind the range.
    pub const fn end(self) -> Vaddr {
        Vaddr(self.end)
    }

    /// Length in bytes.
    pub const fn bytes(self) -> u64 {
        self.end - self.start
    }

    /// Length in pages of `page`.
    pub const fn pages(self, page: PageSize) -> PageCount {
        PageCount((self.end - self.start) >> page.shift())
    }

    /// Whether the range holds no page.
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Whether `addr` lies inside.
    pub const fn contains(self, addr: Vaddr) -> bool {
        self.start <= addr.0 && addr.0 < self.end
    }

    /// What both ranges cover, if that is not empty.
    pub fn intersect(self, other: PageRange) -> Option<PageRange> {
        let start = self.start.max(other.start);
        let end = self.end.min(other.end);
        (start < end).then_some(PageRange { start, end })
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start, self.end)
    }
}

impl fmt::Debug for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start, self.end)
    }
}

/// Reads a number of bytes as a user writes it: digits, then nothing or a suffix K, M or G (powers
/// of 1024).
pub fn parse_bytes_or_none(text: &str) -> Result<u64, String> {
    let (digits, factor) = match text.to_ascii_uppercase().strip_suffix(['K', 'M', 'G']) {
        None => (text, 1),
        Some(digits) => {
            let factor = match text.as_bytes()[digits.len()].to_ascii_uppercase() {
                b'K' => 1 << 10,
                b'M' => 1 << 20,
                _ => 1 << 30,
            };
            (&text[..digits.len()], factor)
        }
    };
    let number: Option<u64> = digits.parse().ok();
    number
        .and_then(|number| number.checked_mul(factor))
        .ok_or_else(|| {
            format!("{text:?} is not a number of bytes (digits, then perhaps K, M or G)")
        })
}

/// The same where no bytes at all make no sense.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    match parse_bytes_or_none(text) {
        Ok(0) => Err(format!("{text:?} is too small: give at least 1 byte")),
        parsed => parsed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_with_their_suffix() {
        assert_eq!(parse_bytes("17"), Ok(17));
        assert_eq!(parse_bytes("100M"), Ok(100 << 20));
        assert_eq!(parse_bytes("2g"), Ok(2 << 30));
        for wrong in ["", "M", "-1", "0", "1T", "99999999999G", "1,5M", "µM"] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn checked_range_refuses_what_a_peer_may_not_say() {
        let page = PageSize::KIB_4;
        let at = |start, pages| PageRange::checked(Vaddr(start), PageCount(pages), page);
        assert_eq!(at(0x1000, 2), Some(PageRange::new(0x1000, 0x3000)));
        assert_eq!(at(0x1001, 2), None);
        assert_eq!(at(0x1000, 0), None);
        assert_eq!(at(0x1000, u64::MAX), None);
        assert_eq!(at(!0xfff, 1), None);
    }

    #[test]
    fn intersection_is_none_where_ranges_only_touch() {
        let a = PageRange::new(0x1000, 0x3000);
        assert_eq!(a.intersect(PageRange::new(0x3000, 0x4000)), None);
        assert_eq!(
            a.intersect(PageRange::new(0x2000, 0x4000)),
            Some(PageRange::new(0x2000, 0x3000))
        );
    }
}
