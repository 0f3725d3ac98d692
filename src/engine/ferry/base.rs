//! The receiver's base version of a target: images of an earlier round, hashed page by page.
//!
//! The sender asks for hashes in the order of addresses, and its batches follow in the same order. A hash is kept until a
//! batch has passed its page. So each page is read and hashed once, if nobody else writes to the images, and only 16
//! bytes are kept for each page between question and batch.

use std::collections::BTreeMap;

use crate::error::Result;
use crate::ferry::hash::{HashStep, PageHash, PageHasher};
use crate::image::chain::{Chain, Place};
use crate::image::readahead::ReadAhead;
use crate::units::{PageRange, PageSize, Vaddr};

/// How far ahead images are read at least, bytes.
const READAHEAD_BYTES: u64 = 8 << 20;

/// Hashes of neighbouring pages.
#[derive(Debug)]
struct Hashed {
    range: PageRange,
    hashes: Vec<PageHash>,
}

/// See the module's text.
#[derive(Debug)]
pub(in crate::engine) struct Base {
    chain: Chain,
    hasher: PageHasher,
    page: PageSize,
    /// The pages of which the sender is told, by address.
    told: Vec<PageRange>,
    /// By address of the first page.
    known: BTreeMap<u64, Hashed>,
    buffer: Vec<u8>,
    ahead: ReadAhead,
}

impl Base {
    /// A base version all pages of which are of use.
    pub(in crate::engine) fn new(chain: Chain, hasher: PageHasher) -> Base {
        let everywhere = PageRange::new(0, chain.page().floor(u64::MAX));
        Base::within(chain, hasher, vec![everywhere])
    }

    /// A base version of which only the pages `told`, which are sorted, are of use.
    pub(in crate::engine) fn within(
        chain: Chain,
        hasher: PageHasher,
        told: Vec<PageRange>,
    ) -> Base {
        let page = chain.page();
        Base {
            chain,
            hasher,
            page,
            told,
            known: BTreeMap::new(),
            buffer: Vec::new(),
            ahead: ReadAhead::new(READAHEAD_BYTES),
        }
    }

    /// From now on pages are hashed by `hasher`: hashes of another are forgotten.
    pub(in crate::engine) fn use_hasher(&mut self, hasher: PageHasher) {
        self.hasher = hasher;
        self.known.clear();
    }

    /// Reads and hashes up to `most` of the next pages from `from` on.
    pub(in crate::engine) fn hash_from(&mut self, from: Vaddr, most: u64) -> Result<HashStep> {
        let (pieces, next) = self.next_pieces(from, most);
        let mut step = HashStep {
            runs: Vec::new(),
            hashes: Vec::new(),
            next,
        };
        for (range, place) in pieces {
            self.hash_range(range, place, &mut step)?;
        }
        Ok(step)
    }

    /// Up to `most` of the next pages from `from` on: where they are, and where to go on.
    fn next_pieces(&self, from: Vaddr, most: u64) -> (Vec<(PageRange, Place)>, Option<Vaddr>) {
        let mut pieces = Vec::new();
        let mut room = most;
        let first = self.told.partition_point(|told| told.end() <= from);
        for told in &self.told[first..] {
            for extent in self.chain.extents_from(told.start().max(from)) {
                let Some(range) = extent.range.intersect(*told) else {
                    break;
                };
                if matches!(extent.place, Place::Absent { .. }) {
                    continue;
                }
                let start = range.start().get();
                let pages = range.pages(self.page).get().min(room);
                if pages > 0 {
                    let end = start + (pages << self.page.shift());
                    pieces.push((PageRange::new(start, end), extent.place));
                    room -= pages;
                }
                if pages < range.pages(self.page).get() {
                    return (pieces, Some(Vaddr(start + (pages << self.page.shift()))));
                }
            }
        }
        (pieces, None)
    }

    /// Keeps the hashes of `step` until batches have passed its pages.
    pub(in crate::engine) fn remember(&mut self, step: &HashStep) {
        let mut rest = &step.hashes[..];
        for run in &step.runs {
            let pages = usize::try_from(run.pages(self.page).get()).expect("a step is small");
            let (hashes, behind) = rest.split_at(pages);
            rest = behind;
            let hashed = Hashed {
                range: *run,
                hashes: hashes.to_vec(),
            };
            self.known.insert(run.start().get(), hashed);
        }
    }

    /// The hash of the base version's page at `vaddr`, if it has one.
    pub(in crate::engine) fn hash_of(&mut self, vaddr: Vaddr) -> Result<Option<PageHash>> {
        if let Some(hash) = self.known_hash(vaddr) {
            return Ok(Some(hash));
        }
        let mut page = vec![0; self.page.as_usize()];
        let there = self.read(vaddr, &mut page)?;
        Ok(there.then(|| self.hasher.hash(&page)))
    }

    /// Appends the hash of each of the base version's pages `range` to `out`; of a page that it does not have, none that
    /// any page has.
    pub(in crate::engine) fn hashes_of(
        &mut self,
        range: PageRange,
        out: &mut Vec<PageHash>,
    ) -> Result<()> {
        if self.known_hash(range.start()).is_none() {
            // One read for many pages, which nobody has asked for before.
            let bytes = usize::try_from(range.bytes()).expect("no more than a batch");
            let mut buffer = std::mem::take(&mut self.buffer);
            buffer.resize(bytes.max(buffer.len()), 0);
            let there = self.read_all(range, &mut buffer[..bytes]);
            let pages = buffer[..bytes].chunks_exact(self.page.as_usize());
            if let Ok(true) = there {
                out.extend(pages.map(|page| self.hasher.hash(page)));
            }
            self.buffer = buffer;
            if there? {
                return Ok(());
            }
        }
        for at in (range.start().get()..range.end().get()).step_by(self.page.as_usize()) {
            out.push(self.hash_of(Vaddr(at))?.unwrap_or_default());
        }
        Ok(())
    }

    /// Reads the base version's page at `vaddr`. Returns whether there is one.
    pub(in crate::engine) fn read(&self, vaddr: Vaddr, page: &mut [u8]) -> Result<bool> {
        let range = PageRange::new(vaddr.get(), vaddr.get() + self.page.bytes());
        self.read_all(range, page)
    }

    /// Reads the base version's pages `range`. Returns whether all of them are there.
    pub(in crate::engine) fn read_all(&self, range: PageRange, out: &mut [u8]) -> Result<bool> {
        let mut rest = out;
        let mut at = range.start();
        for extent in self.chain.extents_from(range.start()) {
            let there = !matches!(extent.place, Place::Absent { .. });
            let Some(part) = extent.range.intersect(range) else {
                break;
            };
            if !there || part.start() != at {
                return Ok(false);
            }
            let bytes = usize::try_from(part.bytes()).expect("no more than the buffer");
            let (front, behind) = rest.split_at_mut(bytes);
            self.chain.read(extent.place, front)?;
            (rest, at) = (behind, part.end());
        }
        Ok(at == range.end())
    }

    /// Asks the kernel to bring what follows `vaddr` into the page cache.
    pub(in crate::engine) fn read_ahead(&mut self, vaddr: Vaddr) {
        self.ahead.pass(&self.chain, vaddr);
    }

    /// Forgets hashes below `vaddr`: batches have passed it.
    pub(in crate::engine) fn passed(&mut self, vaddr: Vaddr) {
        while let Some(first) = self.known.first_entry()
            && first.get().range.end() <= vaddr
        {
            first.remove();
        }
    }

    fn known_hash(&self, vaddr: Vaddr) -> Option<PageHash> {
        let (_, hashed) = self.known.range(..=vaddr.get()).next_back()?;
        if !hashed.range.contains(vaddr) {
            return None;
        }
        let behind = vaddr.get() - hashed.range.start().get();
        let at = usize::try_from(behind >> self.page.shift()).ok()?;
        hashed.hashes.get(at).copied()
    }

    fn hash_range(&mut self, range: PageRange, place: Place, step: &mut HashStep) -> Result<()> {
        let bytes = usize::try_from(range.bytes()).expect("a step is small");
        self.buffer.resize(bytes.max(self.buffer.len()), 0);
        self.chain.read(place, &mut self.buffer[..bytes])?;
        let pages = self.buffer[..bytes].chunks_exact(self.page.as_usize());
        step.hashes.extend(pages.map(|page| self.hasher.hash(page)));
        step.add_run(range);
        Ok(())
    }
}
