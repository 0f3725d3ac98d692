//! The taker's base version of a target: its parent image, hashed page by page.
//!
//! The pusher asks for the hashes in the order of the addresses, and its batches come in the same
//! order behind them. So each page of the parent is read and hashed once, its hash is kept until a
//! batch has passed it, and 16 bytes for each page between question and batch are all that is kept.

use std::collections::BTreeMap;

use crate::error::Result;
use crate::ferry::hash::{PageHash, PageHasher};
use crate::image::chain::{Chain, Place};
use crate::limits::FERRY_HASHES_MAX;
use crate::units::{PageRange, PageSize, Vaddr};

/// Pages hashed at once: a piece of work of a few milliseconds.
const STEP_PAGES: u64 = 1024;

const _: () = assert!(STEP_PAGES <= FERRY_HASHES_MAX as u64);

/// Hashes of neighbouring pages.
#[derive(Debug)]
struct Hashed {
    range: PageRange,
    hashes: Vec<PageHash>,
}

/// Hashes of a part of the base version.
#[derive(Debug)]
pub(super) struct HashStep {
    /// Which pages, in the order of their addresses.
    pub(super) runs: Vec<PageRange>,
    /// Their hashes, one after another.
    pub(super) hashes: Vec<PageHash>,
    /// Where to go on; `None` when these were the last.
    pub(super) next: Option<Vaddr>,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Base {
    chain: Chain,
    hasher: PageHasher,
    page: PageSize,
    /// By address of the first page.
    known: BTreeMap<u64, Hashed>,
    buffer: Vec<u8>,
}

impl Base {
    pub(super) fn new(chain: Chain, hasher: PageHasher) -> Base {
        let page = chain.page();
        Base {
            chain,
            hasher,
            page,
            known: BTreeMap::new(),
            buffer: Vec::new(),
        }
    }

    /// Hashes the next pages from `from` on, and keeps the hashes.
    pub(super) fn hash_from(&mut self, from: Vaddr) -> Result<HashStep> {
        let mut step = HashStep {
            runs: Vec::new(),
            hashes: Vec::new(),
            next: None,
        };
        let found: Vec<_> = self.chain.extents_from(from).take(STEP_RUNS).collect();
        let more_extents = found.len() == STEP_RUNS;
        let mut room = STEP_PAGES;
        let mut end = from;
        for extent in found {
            let pages = extent.range.pages(self.page).get().min(room);
            if pages == 0 {
                step.next = Some(end);
                return Ok(step);
            }
            let start = extent.range.start().get();
            let range = PageRange::new(start, start + (pages << self.page.shift()));
            end = range.end();
            if !matches!(extent.place, Place::Absent { .. }) {
                self.hash_range(range, extent.place, &mut step)?;
                room -= pages;
            } else {
                end = extent.range.end();
            }
        }
        if more_extents || room == 0 {
            step.next = Some(end);
        }
        Ok(step)
    }

    /// The hash of the base version's page at `vaddr`, if it has one.
    pub(super) fn hash_of(&mut self, vaddr: Vaddr) -> Result<Option<PageHash>> {
        if let Some(hash) = self.known_hash(vaddr) {
            return Ok(Some(hash));
        }
        let mut page = vec![0; self.page.as_usize()];
        let there = self.read(vaddr, &mut page)?;
        Ok(there.then(|| self.hasher.hash(&page)))
    }

    /// Reads the base version's page at `vaddr`. Says whether there is one.
    pub(super) fn read(&self, vaddr: Vaddr, page: &mut [u8]) -> Result<bool> {
        match self.chain.find(vaddr) {
            Some(extent) if !matches!(extent.place, Place::Absent { .. }) => {
                self.chain.read(extent.place, page)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Forgets hashes below `vaddr`: batches have passed it.
    pub(super) fn passed(&mut self, vaddr: Vaddr) {
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
        let hashes: Vec<PageHash> = pages
            .map(|page| self.hasher.fingerprint(page))
            .filter_map(|print| print.hash)
            .collect();
        step.hashes.extend_from_slice(&hashes);
        match step.runs.last_mut() {
            Some(last) if last.end() == range.start() => {
                *last = PageRange::new(last.start().get(), range.end().get());
            }
            _ => step.runs.push(range),
        }
        let start = range.start().get();
        self.known.insert(start, Hashed { range, hashes });
        Ok(())
    }
}

/// Extents looked at in one step.
const STEP_RUNS: usize = 1024;
