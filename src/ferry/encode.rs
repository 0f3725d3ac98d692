//! Packing a batch: which of its pages go as they are, and which through zstd.
//!
//! ```text
//! verdicts (delta) ──> zero, same        a byte
//!                      shared            three bytes
//!                      delta ──> zstd    unless that gains too little: then as below
//!                      fresh ──> probe ── looks random ──> raw   (tried again at growing distances)
//!                                   └──── else ──> zstd ── gains too little ──> raw
//! ```
//!
//! The probe counts the different bytes in a sample of the page; what it takes for random is tried
//! with zstd now and then all the same, because repetition over longer distances escapes it. Both
//! sorts back off by themselves (`Trial`), so memory that cannot be compressed costs a sample per
//! page and one try in 256 batches.

use std::io;

use crate::criu::header::Target;
use crate::limits::FERRY_BATCH_BYTES_MAX;
use crate::units::PageSize;

use super::batch::{FIXED_BYTES, PageKind, RUN_BYTES};
use super::fields::PutFields;
use super::gather::{Run, put_runs};
use super::hash::{PageHash, PageHasher};
use super::level_control::Level;
use super::probe::{Trial, looks_random};

/// A batch to be packed.
#[derive(Clone, Copy, Debug)]
pub struct PlainBatch<'a> {
    /// Whose pages.
    pub target: Target,
    /// Which pages, in address order.
    pub runs: &'a [Run],
    /// The contents of the PRESENT ones, one after another.
    pub plain: &'a [u8],
}

/// What the sender's memory of earlier rounds says of a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// All zeros.
    Zero,
    /// The receiver's base version, which has this hash.
    Same(PageHash),
    /// Little different from the receiver's base version, which has this hash. The next page of
    /// [`Verdicts::xor`] is the difference.
    Delta(PageHash),
    /// What another target of the session has at this address.
    Shared {
        /// The page's hash.
        hash: PageHash,
        /// Whose page: the number of the target in the order in which they were opened.
        of: u16,
    },
    /// To be sent in full.
    Fresh,
}

/// The verdicts on all PRESENT pages of a batch.
#[derive(Clone, Debug, Default)]
pub struct Verdicts {
    /// One per page, in address order.
    pub pages: Vec<Verdict>,
    /// The delta pages, one after another, each XORed with its base version.
    pub xor: Vec<u8>,
}

impl Verdicts {
    /// Makes it empty again.
    pub fn clear(&mut self) {
        self.pages.clear();
        self.xor.clear();
    }

    /// Sends differences in full, for a receiver that does not take them.
    pub fn send_deltas_in_full(&mut self) {
        self.xor.clear();
        for verdict in &mut self.pages {
            if let Verdict::Delta(_) = verdict {
                *verdict = Verdict::Fresh;
            }
        }
    }
}

/// How many pages of a batch went which way, and what they cost.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct EncodeCounters {
    /// Pages of zeros.
    pub zero: u64,
    /// Pages that the receiver has already.
    pub same: u64,
    /// Pages sent as they are.
    pub raw: u64,
    /// Pages sent through zstd.
    pub packed: u64,
    /// Pages sent as differences.
    pub delta: u64,
    /// Pages that the receiver has of another target.
    pub shared: u64,
    /// Length of the zstd frame with the packed pages, bytes.
    pub packed_bytes: u64,
    /// Length of the zstd frame with the delta pages, bytes.
    pub delta_bytes: u64,
    /// Length of the body, bytes.
    pub body_bytes: u64,
    /// What was given to zstd at the batch's level, with or without gain, bytes.
    pub tried_bytes: u64,
    /// What became of it, bytes.
    pub tried_packed_bytes: u64,
}

/// A zstd frame is kept if it saves at least this part (one in ...) of its pages.
const GAIN_AT_LEAST_ONE_IN: usize = 8;

/// Differences are mostly zeros: a higher level gains nothing on them.
const DELTA_LEVEL: i32 = 1;

/// Packs batches, one after another.
pub struct Encoder {
    page: PageSize,
    fresh_zstd: zstd::bulk::Compressor<'static>,
    fresh_level: Option<i32>,
    delta_zstd: zstd::bulk::Compressor<'static>,
    likely: Trial,
    unlikely: Trial,
    kinds: Vec<PageKind>,
    gathered: Vec<u8>,
    packed: Vec<u8>,
    delta: Vec<u8>,
}

impl Encoder {
    /// An encoder for pages of `page` bytes. Fails only if zstd itself does.
    pub fn new(page: PageSize) -> io::Result<Encoder> {
        Ok(Encoder {
            page,
            fresh_zstd: zstd::bulk::Compressor::default(),
            fresh_level: None,
            delta_zstd: zstd::bulk::Compressor::new(DELTA_LEVEL)?,
            likely: Trial::new(true),
            unlikely: Trial::new(false),
            kinds: Vec::new(),
            gathered: Vec::new(),
            packed: Vec::new(),
            delta: Vec::new(),
        })
    }

    /// Appends the body of a PAGES frame with `batch` to `out`.
    ///
    /// `verdicts` has one verdict per PRESENT page; `hasher` is the one that made their hashes.
    /// Fails only if zstd itself does.
    pub fn encode(
        &mut self,
        batch: PlainBatch<'_>,
        verdicts: &Verdicts,
        hasher: &PageHasher,
        level: Level,
        out: &mut Vec<u8>,
    ) -> io::Result<EncodeCounters> {
        assert!(
            batch.plain.len() <= FERRY_BATCH_BYTES_MAX,
            "batches keep their cap"
        );
        assert_eq!(
            verdicts.pages.len() << self.page.shift(),
            batch.plain.len(),
            "a verdict for every page"
        );
        let mut counters = EncodeCounters::default();
        self.pack_deltas(verdicts)?;
        self.pack_fresh(batch.plain, level, &mut counters)?;
        self.write(batch, verdicts, hasher, out, &mut counters);
        Ok(counters)
    }

    /// Decides the kinds of all pages but the fresh ones, which stay raw for now, and packs the
    /// differences.
    fn pack_deltas(&mut self, verdicts: &Verdicts) -> io::Result<()> {
        self.delta.clear();
        if !verdicts.xor.is_empty() {
            compress(&mut self.delta_zstd, &verdicts.xor, &mut self.delta)?;
        }
        let gains = has_gained(verdicts.xor.len(), self.delta.len());
        if !gains {
            self.delta.clear();
        }
        self.kinds.clear();
        self.kinds
            .extend(verdicts.pages.iter().map(|verdict| match verdict {
                Verdict::Zero => PageKind::Zero,
                Verdict::Same(_) => PageKind::Same,
                Verdict::Shared { .. } => PageKind::Shared,
                Verdict::Delta(_) if gains => PageKind::Delta,
                Verdict::Delta(_) | Verdict::Fresh => PageKind::Raw,
            }));
        Ok(())
    }

    /// Gives those fresh pages to zstd that are likely to gain by it, or whose turn it is.
    fn pack_fresh(
        &mut self,
        plain: &[u8],
        level: Level,
        counters: &mut EncodeCounters,
    ) -> io::Result<()> {
        self.packed.clear();
        let Level::Zstd(level) = level else {
            return Ok(());
        };
        let try_likely = self.likely.pays || self.likely.is_due();
        let check_unlikely = self.unlikely.is_due();
        if !try_likely && !check_unlikely && !self.unlikely.pays {
            return Ok(());
        }
        self.set_level(level)?;
        let (mut likely, mut unlikely) = (Vec::new(), Vec::new());
        for (at, (kind, page)) in self.kinds.iter().zip(pages(plain, self.page)).enumerate() {
            if *kind == PageKind::Raw {
                let sort = if looks_random(page) {
                    &mut unlikely
                } else {
                    &mut likely
                };
                sort.push(at);
            }
        }
        if check_unlikely && !unlikely.is_empty() {
            let gained = self.pack(plain, &unlikely, counters)?;
            self.unlikely.learn(gained);
        }
        let measures_likely = try_likely && !likely.is_empty();
        let mut chosen = if try_likely { likely } else { Vec::new() };
        if self.unlikely.pays {
            chosen.append(&mut unlikely);
            chosen.sort_unstable();
        }
        let gained = !chosen.is_empty() && self.pack(plain, &chosen, counters)?;
        if measures_likely {
            self.likely.learn(gained);
        }
        if gained {
            for at in chosen {
                self.kinds[at] = PageKind::Packed;
            }
        } else {
            self.packed.clear();
        }
        Ok(())
    }

    /// Compresses the pages `chosen` (their places in the batch, ascending) to `self.packed` and
    /// tells whether that is worth sending.
    fn pack(
        &mut self,
        plain: &[u8],
        chosen: &[usize],
        counters: &mut EncodeCounters,
    ) -> io::Result<bool> {
        let shift = self.page.shift();
        let (first, last) = (chosen[0], chosen[chosen.len() - 1]);
        let source = if last - first + 1 == chosen.len() {
            &plain[first << shift..(last + 1) << shift]
        } else {
            self.gathered.clear();
            for at in chosen {
                let page = &plain[at << shift..(at + 1) << shift];
                self.gathered.extend_from_slice(page);
            }
            &self.gathered
        };
        compress(&mut self.fresh_zstd, source, &mut self.packed)?;
        counters.tried_bytes += source.len() as u64;
        counters.tried_packed_bytes += self.packed.len() as u64;
        Ok(has_gained(source.len(), self.packed.len()))
    }

    fn set_level(&mut self, level: i32) -> io::Result<()> {
        if self.fresh_level != Some(level) {
            self.fresh_zstd.set_compression_level(level)?;
            self.fresh_level = Some(level);
        }
        Ok(())
    }

    /// Writes the body as decided.
    fn write(
        &self,
        batch: PlainBatch<'_>,
        verdicts: &Verdicts,
        hasher: &PageHasher,
        out: &mut Vec<u8>,
        counters: &mut EncodeCounters,
    ) {
        let start = out.len();
        let of_kind = |wanted: PageKind| {
            let kinds = self.kinds.iter().zip(pages(batch.plain, self.page));
            kinds.filter_map(move |(kind, page)| (*kind == wanted).then_some(page))
        };
        let mut crc = crc32fast::Hasher::new();
        for kind in [PageKind::Raw, PageKind::Packed, PageKind::Delta] {
            of_kind(kind).for_each(|page| crc.update(page));
        }
        let length = |part: &[u8]| u32::try_from(part.len()).expect("a batch is small");
        let count = |number: usize| u16::try_from(number).expect("a batch is small");
        out.reserve(FIXED_BYTES + batch.runs.len() * RUN_BYTES + batch.plain.len());
        out.put_u64(batch.target.dst_id());
        out.put_u32(crc.finalize());
        out.put_u16(count(batch.runs.len()));
        out.put_u16(count(self.kinds.len()));
        out.put_u32(length(&self.packed));
        out.put_u32(length(&self.delta));
        out.extend_from_slice(&self.digest(verdicts, hasher).0);
        put_runs(batch.runs, self.page, out);
        out.extend(self.kinds.iter().map(|kind| *kind as u8));
        for verdict in &verdicts.pages {
            if let Verdict::Shared { of, .. } = verdict {
                out.put_u16(*of);
            }
        }
        of_kind(PageKind::Raw).for_each(|page| out.extend_from_slice(page));
        out.extend_from_slice(&self.packed);
        out.extend_from_slice(&self.delta);

        let number = |wanted| self.kinds.iter().filter(|kind| **kind == wanted).count() as u64;
        counters.zero = number(PageKind::Zero);
        counters.same = number(PageKind::Same);
        counters.raw = number(PageKind::Raw);
        counters.packed = number(PageKind::Packed);
        counters.delta = number(PageKind::Delta);
        counters.shared = number(PageKind::Shared);
        counters.packed_bytes = self.packed.len() as u64;
        counters.delta_bytes = self.delta.len() as u64;
        counters.body_bytes = (out.len() - start) as u64;
    }

    /// One hash over those of the pages of its own that the receiver will need.
    fn digest(&self, verdicts: &Verdicts, hasher: &PageHasher) -> PageHash {
        if !self.kinds.iter().any(|kind| kind.needs_base()) {
            return PageHash::default();
        }
        let pages = self.kinds.iter().zip(&verdicts.pages);
        hasher.digest(pages.filter_map(|(kind, verdict)| match verdict {
            Verdict::Same(base) | Verdict::Delta(base) if kind.needs_base() => Some(*base),
            Verdict::Shared { hash, .. } => Some(*hash),
            _ => None,
        }))
    }
}

fn compress(
    zstd: &mut zstd::bulk::Compressor<'static>,
    source: &[u8],
    out: &mut Vec<u8>,
) -> io::Result<()> {
    out.clear();
    out.reserve(zstd::zstd_safe::compress_bound(source.len()));
    zstd.compress_to_buffer(source, out)?;
    Ok(())
}

fn has_gained(plain: usize, packed: usize) -> bool {
    packed + plain / GAIN_AT_LEAST_ONE_IN <= plain && plain > 0
}

fn pages(plain: &[u8], page: PageSize) -> impl Iterator<Item = &[u8]> {
    plain.chunks_exact(page.as_usize())
}

#[cfg(test)]
mod tests;
