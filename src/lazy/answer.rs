//! What a fault may bring, what it asks for, and what becomes of it.

use super::extents::Piece;
use crate::units::{PageRange, Vaddr};

/// Names one userfaultfd: a restored process or a child that it forked since.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SpaceId(pub u32);

/// How many bytes are fetched for one fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FetchLimits {
    /// For a fault that stands alone: the aligned block of so many bytes around it (at least a page).
    pub alone_bytes: u64,
    /// For a fault of a sequential reader: so many bytes at most.
    pub sequential_bytes: u64,
}

/// Why pages are asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    /// A thread waits for the first page.
    Fault,
    /// A thread that reads upwards waits for the first page, and will come to the others.
    Sequential,
    /// Neighbours of a fault, or the next pages of a stride.
    Around,
    /// The background stream.
    Stream,
}

/// Pages to ask the source for, by their addresses in the dump.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wanted {
    /// Addresses in the dump.
    pub image: PageRange,
    /// Why.
    pub class: Class,
}

/// What a fault needs at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultAnswer {
    /// No image has the page: it is zero (or already there).
    Zero,
    /// The page is on the way, or will be asked for.
    Wait,
    /// Install this piece from a local image; the faulting page comes first.
    Local(Piece),
}

/// A thread that has got its page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Served {
    /// The page it waited for.
    pub page: Vaddr,
    /// When its fault was read, µs.
    pub since_us: u64,
}
