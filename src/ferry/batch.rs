//! Batches of pages: their layout, and how a receiver gets the pages out again.
//!
//! ```text
//! body ── Batch::parse ──> counts, runs, kinds fit the body's length
//!            │
//!            ├─ bases() ───> addresses whose hashes (same, delta, shared) and contents (delta) are needed
//!            ├─ shared() ──> pages of other targets whose contents are needed
//!            ├─ agree() ───> the receiver's hashes are those that the sender meant
//!            └─ Unpacker ──> packed and delta pages as plain bytes, all contents verified
//!                 └─ places() ──> per page: zero, same, here in the body, there in the unpacked or the shared
//! ```
//!
//! Raw pages are never copied: their place is a range of the body. Invariant: `places` is of use
//! only after `agree` and `unpack` have said yes, which is what the engines do first.

use std::io;
use std::ops::Range;

use thiserror::Error;

use crate::criu::header::{PageFlags, Target};
use crate::limits::{FERRY_BATCH_BYTES_MAX, FERRY_RUNS_MAX, FRAME_PAGES_MAX};
use crate::units::{PageCount, PageRange, PageSize, Vaddr};

use super::fields::Fields;
use super::frame::{FrameError, Kind};
use super::gather::{Run, present_pages};
use super::hash::{PageHash, PageHasher};
use super::message::target;

/// How the contents of a page travel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum PageKind {
    /// All zeros.
    Zero = 0,
    /// The receiver's base version.
    Same = 1,
    /// As it is.
    Raw = 2,
    /// In the zstd frame of packed pages.
    Packed = 3,
    /// In the zstd frame of delta pages: XORed with the receiver's base version.
    Delta = 4,
    /// The page that a target which was opened before has at the same address.
    Shared = 5,
}

impl PageKind {
    fn from_number(number: u8) -> Option<PageKind> {
        Some(match number {
            0 => PageKind::Zero,
            1 => PageKind::Same,
            2 => PageKind::Raw,
            3 => PageKind::Packed,
            4 => PageKind::Delta,
            5 => PageKind::Shared,
            _ => return None,
        })
    }

    /// Whether the page is told by what the receiver has: by its base version, or by another target's page.
    pub const fn needs_base(self) -> bool {
        matches!(self, PageKind::Same | PageKind::Delta | PageKind::Shared)
    }
}

/// A batch that cannot be understood or does not hold what it promises.
#[derive(Debug, Error)]
pub enum BatchError {
    /// The layout is wrong.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The parts do not add up to the body.
    #[error("a batch of {body} bytes holds parts of {parts} bytes")]
    Length {
        /// Length of the body, bytes.
        body: usize,
        /// What its tables promise, bytes.
        parts: usize,
    },
    /// A run has an impossible place or flags.
    #[error("a batch names {pages} pages at {vaddr} with flags {flags:#x}, which cannot be")]
    Run {
        /// Address of the first page.
        vaddr: Vaddr,
        /// How many.
        pages: u32,
        /// Their flags.
        flags: u32,
    },
    /// The two ends have different base versions.
    #[error(
        "the two ends disagree about what the receiver has already of pages around {vaddr} of {target}"
    )]
    Disagreement {
        /// Whose pages.
        target: Target,
        /// The first page that builds on what the receiver has.
        vaddr: Vaddr,
    },
    /// zstd says no.
    #[error("the {part} pages of a batch cannot be unpacked")]
    Zstd {
        /// Which of the two zstd frames.
        part: &'static str,
        /// What zstd says.
        source: io::Error,
    },
    /// A zstd frame holds fewer bytes than it should.
    #[error("the {part} pages of a batch are {bytes} bytes, not {expected}")]
    Unpacked {
        /// Which of the two zstd frames.
        part: &'static str,
        /// What it holds, bytes.
        bytes: usize,
        /// What it should hold, bytes.
        expected: usize,
    },
    /// The unpacked pages are not those that were sent.
    #[error("pages of {target} around {vaddr} are not what was sent: their checksum differs")]
    Contents {
        /// Whose pages.
        target: Target,
        /// The first page of the batch.
        vaddr: Vaddr,
    },
}

/// Length of the fixed fields of a batch, bytes.
pub(super) const FIXED_BYTES: usize = 40;
/// Length of a run in a batch, bytes.
pub(super) const RUN_BYTES: usize = 16;

/// A batch in a receive buffer, its layout verified.
#[derive(Debug)]
pub struct Batch<'b> {
    /// Whose pages.
    pub target: Target,
    page: PageSize,
    pub(super) plain_crc: u32,
    digest: PageHash,
    runs: Vec<Run>,
    kinds: Vec<PageKind>,
    /// For each shared page whose it is: the number of a target in the order in which they were opened.
    shared: Vec<u16>,
    pub(super) body: &'b [u8],
    pub(super) raw: Range<usize>,
    pub(super) packed: Range<usize>,
    pub(super) delta: Range<usize>,
}

impl<'b> Batch<'b> {
    /// Reads the tables of `body` and compares all lengths. For a session in which no shared pages are sent.
    pub fn parse(body: &'b [u8], page: PageSize) -> Result<Batch<'b>, BatchError> {
        Batch::parse_behind(body, page, 0)
    }

    /// The same behind `others` targets that were opened before this one, whose pages may be named.
    pub fn parse_behind(
        body: &'b [u8],
        page: PageSize,
        others: usize,
    ) -> Result<Batch<'b>, BatchError> {
        let kind = Kind::Pages;
        let wrong = |field, value| FrameError::Field { kind, field, value };
        let mut fields = Fields::new(kind, body);
        let target = target(kind, &mut fields)?;
        let plain_crc = fields.u32()?;
        let (run_count, kind_count) = (usize::from(fields.u16()?), usize::from(fields.u16()?));
        let (packed_bytes, delta_bytes) = (usize_of(fields.u32()?), usize_of(fields.u32()?));
        let digest = PageHash(fields.array()?);
        if run_count > FERRY_RUNS_MAX {
            return Err(wrong("runs", run_count as u64).into());
        }
        if kind_count > FERRY_BATCH_BYTES_MAX >> page.shift() {
            return Err(wrong("kinds", kind_count as u64).into());
        }
        let runs = parse_runs(&mut fields, run_count, page)?;
        let kinds = fields.bytes(kind_count)?.iter().map(|number| {
            let value = u64::from(*number);
            PageKind::from_number(*number).ok_or(wrong("kind", value))
        });
        let kinds = kinds.collect::<Result<Vec<_>, _>>()?;
        let mut shared = Vec::new();
        for _ in kinds.iter().filter(|kind| **kind == PageKind::Shared) {
            let number = fields.u16()?;
            if usize::from(number) >= others {
                return Err(wrong("shared", number.into()).into());
            }
            shared.push(number);
        }
        if present_pages(&runs, page).count() != kinds.len() {
            return Err(wrong("kinds", kind_count as u64).into());
        }
        let batch = Batch {
            target,
            page,
            plain_crc,
            digest,
            runs,
            kinds,
            shared,
            body,
            raw: 0..0,
            packed: 0..0,
            delta: 0..0,
        };
        batch.with_parts(body.len() - fields.rest().len(), packed_bytes, delta_bytes)
    }

    /// Finds the three parts behind the tables, which end at `start`.
    fn with_parts(
        mut self,
        start: usize,
        packed: usize,
        delta: usize,
    ) -> Result<Batch<'b>, BatchError> {
        let raw_end = start + self.bytes_of(PageKind::Raw);
        // Both lengths came as u32, so the sums are far from overflow.
        let packed_end = raw_end + packed;
        let end = packed_end + delta;
        if end != self.body.len() {
            return Err(BatchError::Length {
                body: self.body.len(),
                parts: end,
            });
        }
        self.raw = start..raw_end;
        self.packed = raw_end..packed_end;
        self.delta = packed_end..end;
        Ok(self)
    }

    /// The runs, in address order.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// How many pages with contents the batch has.
    pub fn present(&self) -> PageCount {
        PageCount(self.kinds.len() as u64)
    }

    /// The pages with contents, in address order.
    pub fn pages(&self) -> impl Iterator<Item = (Vaddr, PageKind)> {
        present_pages(&self.runs, self.page).zip(self.kinds.iter().copied())
    }

    /// The pages that are told by what the receiver has.
    pub fn bases(&self) -> impl Iterator<Item = (Vaddr, PageKind)> {
        self.pages().filter(|(_, kind)| kind.needs_base())
    }

    /// The shared pages, and whose they are: the number of a target in the order in which they were opened.
    pub fn shared(&self) -> impl Iterator<Item = (Vaddr, u16)> {
        let shared = self.pages().filter(|(_, kind)| *kind == PageKind::Shared);
        shared
            .map(|(vaddr, _)| vaddr)
            .zip(self.shared.iter().copied())
    }

    /// One hash over the hashes of all [`Batch::bases`], in order, as the sender means them.
    pub(super) fn base_digest(&self) -> PageHash {
        self.digest
    }

    /// Compares the receiver's hashes of all [`Batch::bases`], in order, with what the sender meant.
    pub fn agree(
        &self,
        hasher: &PageHasher,
        hashes: impl IntoIterator<Item = PageHash>,
    ) -> Result<(), BatchError> {
        let Some((vaddr, _)) = self.bases().next() else {
            return Ok(());
        };
        if hasher.digest(hashes) == self.digest {
            Ok(())
        } else {
            Err(BatchError::Disagreement {
                target: self.target,
                vaddr,
            })
        }
    }

    /// Where the contents of each page are, once [`super::unpack::Unpacker::unpack`] has said yes.
    pub fn places(&self) -> impl Iterator<Item = (Vaddr, Place)> {
        let page = self.page.as_usize();
        let mut raw = self.raw.start;
        let mut packed = 0;
        let mut delta = self.bytes_of(PageKind::Packed);
        let mut shared = 0;
        self.pages().map(move |(vaddr, kind)| {
            let next = |at: &mut usize| {
                *at += page;
                *at - page..*at
            };
            let place = match kind {
                PageKind::Zero => Place::Zero,
                PageKind::Same => Place::Same,
                PageKind::Raw => Place::Body(next(&mut raw)),
                PageKind::Packed => Place::Unpacked(next(&mut packed)),
                PageKind::Delta => Place::Unpacked(next(&mut delta)),
                PageKind::Shared => Place::Shared(next(&mut shared)),
            };
            (vaddr, place)
        })
    }

    /// Plain bytes of all pages of `kind`.
    pub(super) fn bytes_of(&self, kind: PageKind) -> usize {
        let count = self.kinds.iter().filter(|other| **other == kind).count();
        count << self.page.shift()
    }
}

fn parse_runs(
    fields: &mut Fields<'_>,
    count: usize,
    page: PageSize,
) -> Result<Vec<Run>, BatchError> {
    let mut runs: Vec<Run> = Vec::with_capacity(count);
    for _ in 0..count {
        let (vaddr, pages, flags) = (Vaddr(fields.u64()?), fields.u32()?, fields.u32()?);
        let wrong = BatchError::Run {
            vaddr,
            pages,
            flags,
        };
        let range = PageRange::checked(vaddr, PageCount(pages.into()), page);
        let in_order = |range: &PageRange| {
            runs.last()
                .is_none_or(|last| last.range.end() <= range.start())
        };
        let Some(range) = range.filter(in_order) else {
            return Err(wrong);
        };
        let run = Run {
            range,
            flags: PageFlags::from_bits(flags),
        };
        let both = PageFlags::PRESENT.with(PageFlags::PARENT);
        let contents_cap = FERRY_BATCH_BYTES_MAX as u64;
        if !(1..=7).contains(&flags)
            || run.flags.has(both)
            || (run.has_contents() && run.range.bytes() > contents_cap)
            || u64::from(pages) > 2 * FRAME_PAGES_MAX
        {
            return Err(wrong);
        }
        runs.push(run);
    }
    Ok(runs)
}

fn usize_of(length: u32) -> usize {
    usize::try_from(length).expect("pointers have 32 bits and more")
}

/// Where the contents of a page are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Place {
    /// Nowhere: all zeros.
    Zero,
    /// In the receiver's base version.
    Same,
    /// In this range of the batch's body.
    Body(Range<usize>),
    /// In this range of what was unpacked.
    Unpacked(Range<usize>),
    /// In this range of the pages that [`Batch::shared`] names, one behind the other.
    Shared(Range<usize>),
}

#[cfg(test)]
mod tests;
