//! What a receiver does with the frames whose turn has come: images, page by page as the batch says.
//!
//! ```text
//! raw        ── body ──────────┐
//! packed     ── unpacked ──────┼─> pwritev at the place that the writer says
//! delta      ── unpacked ──────┘
//! zero       ── nothing: the file has a hole there, which reads as zero
//! shared     ── pwritev as well, once another target's page was read and hashed
//! same       ── a hole to the parent: the page takes no room at all
//!            └─ the parent's page, where CRIU would not look for it there
//! ```
//!
//! Where each page of a process tree is stored once, raw, packed, delta and zero pages go to `image::tree` one by one.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::IoSlice;
use std::ops::Range;
use std::sync::Arc;

use crate::criu::header::{PageFlags, Target};
use crate::engine::ferry::base::Base;
use crate::engine::ferry::lock;
use crate::engine::io::batch::write_all;
use crate::engine::receive::counters::SessionCounters;
use crate::engine::receive::session_pages::SessionPages;
use crate::error::{Error, Kind, Result};
use crate::ferry::batch::{Batch, PageKind, Place};
use crate::ferry::hash::{PageHash, PageHasher};
use crate::ferry::message::{Open, StateId};
use crate::ferry::unpack::Unpacker;
use crate::image::blocks::compressed_block;
use crate::image::chain::{Chain, Missing};
use crate::image::store::ImageStore;
use crate::image::tree::TreePlace;
use crate::image::writer::{CommittedImages, Destination, SessionImages};
use crate::observe::received::StoredPages;
use crate::sync::Mutex;
use crate::units::{PageRange, PageSize, Vaddr};

/// The base versions of the targets of a session that are still of use, shared with those who
/// answer the sender's questions for hashes.
pub(in crate::engine) type Bases = Mutex<BTreeMap<Target, Arc<Mutex<Base>>>>;

/// Images that a session's frames go to.
pub(in crate::engine) struct BatchApplier {
    images: SessionImages,
    store: Arc<ImageStore>,
    page: PageSize,
    hasher: PageHasher,
    /// Names the parent directory's version for the sender.
    parent_state: StateId,
    bases: Arc<Bases>,
    /// The open target's base version.
    base: Option<Arc<Mutex<Base>>>,
    unpacker: Unpacker,
    unpacked: Vec<u8>,
    old_pages: Vec<u8>,
    /// Where pages of targets lie that were opened before.
    session_pages: SessionPages,
    /// The batch's shared pages, one behind the other.
    shared: Vec<u8>,
    /// Whether pages are stored as CRIU 4.3 compresses them.
    compresses: bool,
    kept: StoredPages,
}

impl BatchApplier {
    pub(in crate::engine) fn new(
        store: &Arc<ImageStore>,
        hasher: PageHasher,
        parent_state: StateId,
        bases: Arc<Bases>,
        compresses: bool,
    ) -> BatchApplier {
        BatchApplier {
            images: store.begin(),
            store: Arc::clone(store),
            page: store.dir().page(),
            hasher,
            parent_state,
            bases,
            base: None,
            unpacker: Unpacker::default(),
            unpacked: Vec::new(),
            old_pages: Vec::new(),
            session_pages: SessionPages::new(store.dir().page()),
            shared: Vec::new(),
            compresses,
            kept: StoredPages::default(),
        }
    }

    /// From now on pages are those of another target. Returns the answer: whether there is a
    /// parent, and the name of its version.
    pub(in crate::engine) fn open(&mut self, open: Open) -> Result<(bool, StateId)> {
        self.images.open(open.target, open.wire)?;
        self.session_pages.open(open.target);
        let has_parent = self.images.has_parent(open.target)?;
        tracing::debug!("receiving {}, has_parent={has_parent}", open.target);
        self.base = None;
        if !has_parent {
            return Ok((false, StateId::NONE));
        }
        if let Some(parent) = self.store.dir().parent()? {
            let chain = Chain::open(&parent, open.target, Missing::Leave)?;
            let base = Arc::new(Mutex::new(Base::new(chain, self.hasher.clone())));
            self.base = Some(Arc::clone(&base));
            let mut bases = lock(&self.bases);
            // Nobody asks about a target whose pages have all come.
            bases.clear();
            bases.insert(open.target, base);
        }
        Ok((true, self.parent_state))
    }

    /// Checks `batch`, which lies in `body`, and stores its pages.
    pub(in crate::engine) fn store(
        &mut self,
        batch: &Batch<'_>,
        body: &[u8],
        counters: &mut SessionCounters<'_>,
    ) -> Result<()> {
        self.check(batch)?;
        let mut places = batch.places().map(|(_, place)| place).peekable();
        for run in batch.runs() {
            if !run.flags.has(PageFlags::PRESENT) {
                self.images.append(run.range, run.flags)?;
                counters.run(run.range.pages(self.page), run.flags);
                continue;
            }
            let mut start = run.range.start().get();
            let end = run.range.end().get();
            while start < end {
                let most = (end - start) >> self.page.shift();
                let same = places.peek() == Some(&Place::Same);
                let mut part = Vec::new();
                while (part.len() as u64) < most
                    && let Some(place) = places.next_if(|next| (*next == Place::Same) == same)
                {
                    part.push(place);
                }
                let bytes = (part.len() as u64) << self.page.shift();
                let range = PageRange::new(start, start + bytes);
                let hole = same && self.images.may_be_hole(run.flags);
                let flags = match hole {
                    true => run
                        .flags
                        .without(PageFlags::PRESENT)
                        .with(PageFlags::PARENT),
                    false => run.flags,
                };
                match same && !hole {
                    true => self.store_from_base(range, flags)?,
                    false => self.store_part(range, flags, &part, body)?,
                }
                counters.run(range.pages(self.page), flags);
                start += bytes;
            }
        }
        self.count(counters);
        Ok(())
    }

    fn count(&self, counters: &mut SessionCounters<'_>) {
        let shared = self.images.tree_counts();
        counters.kept(self.kept.with_tree(shared, self.page));
    }

    /// Gives every image its name.
    pub(in crate::engine) fn commit(
        mut self,
        counters: &mut SessionCounters<'_>,
    ) -> Result<CommittedImages> {
        self.images.end_target_in_tree()?;
        self.count(counters);
        self.images.commit()
    }

    /// Compares what the receiver has already, and verifies and unpacks all contents.
    fn check(&mut self, batch: &Batch<'_>) -> Result<()> {
        let differ = |error| Error::wrap(Kind::Image, "a batch cannot be used", error);
        self.old_pages.clear();
        self.shared.clear();
        let mut hashes: Vec<PageHash> = Vec::new();
        let mut shared = batch.shared();
        let base = self.base.clone();
        let mut base = base.as_deref().map(lock);
        for (range, kind) in self.runs_of_bases(batch) {
            if kind == PageKind::Shared {
                let of = shared.next().map(|(_, of)| of);
                let hash = self.read_shared(batch.target, of.unwrap_or_default(), range.start())?;
                hashes.push(hash);
                continue;
            }
            let base = base.as_mut().ok_or_else(|| {
                let text = format!(
                    "the far end builds on a parent of {} that is not here",
                    batch.target
                );
                Error::new(Kind::Protocol, text)
            })?;
            // A page that is not there has no hash: the digest will differ.
            base.hashes_of(range, &mut hashes)?;
            if kind == PageKind::Delta {
                let start = self.old_pages.len();
                self.old_pages.resize(start + self.page.as_usize(), 0);
                base.read(range.start(), &mut self.old_pages[start..])?;
            }
        }
        if let (Some(base), Some((vaddr, _))) = (&mut base, batch.pages().next()) {
            base.passed(vaddr);
        }
        drop(base);
        batch.agree(&self.hasher, hashes).map_err(differ)?;
        self.unpacker
            .unpack(batch, &self.old_pages, &mut self.unpacked)
            .map_err(|error| Error::wrap(Kind::Protocol, "a batch is damaged", error))
    }

    /// The pages that are told by what is here: neighbours that are the same together, others alone.
    fn runs_of_bases(&self, batch: &Batch<'_>) -> Vec<(PageRange, PageKind)> {
        let mut runs: Vec<(PageRange, PageKind)> = Vec::new();
        for (vaddr, kind) in batch.bases() {
            let (start, end) = (vaddr.get(), vaddr.get() + self.page.bytes());
            match runs.last_mut() {
                Some((last, PageKind::Same)) if kind == PageKind::Same && last.end() == vaddr => {
                    *last = PageRange::new(last.start().get(), end);
                }
                _ => runs.push((PageRange::new(start, end), kind)),
            }
        }
        runs
    }

    /// Appends the page at `vaddr` of the target with the number `of` to the shared pages. Returns its hash.
    fn read_shared(&mut self, target: Target, of: u16, vaddr: Vaddr) -> Result<PageHash> {
        let start = self.shared.len();
        self.shared.resize(start + self.page.as_usize(), 0);
        let page = &mut self.shared[start..];
        let other = self.session_pages.target(of);
        let there = match other {
            Some(_) if self.session_pages.read(of, vaddr, page)? => true,
            Some(other) => self.images.read_from_tree(other, vaddr, page)?,
            None => false,
        };
        match (there, other) {
            (true, _) => Ok(self.hasher.hash(page)),
            (false, Some(other)) => {
                let text = format!(
                    "the far end names {other}'s page at {vaddr} for {target}, which has not come in this session"
                );
                Err(Error::new(Kind::Protocol, text))
            }
            (false, None) => {
                let text = format!(
                    "the far end names a page of process number {of}, which was not opened"
                );
                Err(Error::new(Kind::Protocol, text))
            }
        }
    }

    /// Stores adjacent pages that are all holes to the parent, or all not.
    fn store_part(
        &mut self,
        range: PageRange,
        flags: PageFlags,
        places: &[Place],
        body: &[u8],
    ) -> Result<()> {
        if self.images.goes_to_tree(flags) {
            return self.share_part(range, flags, places, body);
        }
        let may_be_compressed = self.images.may_be_compressed(flags);
        if self.compresses && may_be_compressed && flags.has(PageFlags::PRESENT) {
            return self.store_compressed(range, flags, places, body);
        }
        let Some(to) = self.images.append(range, flags)? else {
            return Ok(());
        };
        self.session_pages.wrote(range, &to);
        let mut at = 0;
        while at < places.len() {
            let zero = places[at] == Place::Zero;
            let len = places[at..]
                .iter()
                .take_while(|place| (**place == Place::Zero) == zero)
                .count();
            let bytes = (len as u64) << self.page.shift();
            if zero {
                self.kept.zero += len as u64;
            } else {
                let offset = to.offset + ((at as u64) << self.page.shift());
                self.write(&to, offset, &places[at..at + len], body)?;
                self.kept.stored_bytes += bytes;
            }
            at += len;
        }
        Ok(())
    }

    /// Stores adjacent pages that processes of a tree may share.
    fn share_part(
        &mut self,
        range: PageRange,
        flags: PageFlags,
        places: &[Place],
        body: &[u8],
    ) -> Result<()> {
        let mut at = range.start().get();
        let mut first: Option<Destination> = None;
        let mut slices: Vec<IoSlice<'_>> = Vec::new();
        for place in places {
            let bytes = match place {
                Place::Body(range) => Some(&body[range.clone()]),
                Place::Unpacked(range) => Some(&self.unpacked[range.clone()]),
                Place::Shared(range) => Some(&self.shared[range.clone()]),
                Place::Zero | Place::Same => None,
            };
            let page = PageRange::new(at, at + self.page.bytes());
            at = page.end().get();
            let place = self.images.append_to_tree(page, flags, bytes)?;
            let (TreePlace::At(to), Some(bytes)) = (place, bytes) else {
                continue;
            };
            let filled = (slices.len() as u64) << self.page.shift();
            if let Some(first) = &first
                && first.offset + filled != to.offset
            {
                write_all(&mut slices, &first.part, first.offset)?;
                slices.clear();
            }
            if slices.is_empty() {
                first = Some(to);
            }
            slices.push(IoSlice::new(bytes));
        }
        match &first {
            Some(first) => write_all(&mut slices, &first.part, first.offset),
            None => Ok(()),
        }
    }

    /// Stores the base version's pages, which are what the process has.
    fn store_from_base(&mut self, range: PageRange, flags: PageFlags) -> Result<()> {
        // In a buffer of its own: later pages of the batch still lie in `unpacked`.
        let mut places = Vec::new();
        let mut bytes = Vec::new();
        let mut at = range.start().get();
        while at < range.end().get() {
            let page = PageRange::new(at, at + self.page.bytes());
            let start = bytes.len();
            bytes.resize(start + self.page.as_usize(), 0);
            if let Some(base) = &self.base {
                lock(base).read(page.start(), &mut bytes[start..])?;
            }
            places.push(Place::Body(start..bytes.len()));
            at = page.end().get();
        }
        self.store_part(range, flags, &places, &bytes)
    }

    /// Stores adjacent pages as one entry of blocks.
    fn store_compressed(
        &mut self,
        range: PageRange,
        flags: PageFlags,
        places: &[Place],
        body: &[u8],
    ) -> Result<()> {
        let mut blocks = Vec::new();
        let mut sizes = Vec::with_capacity(places.len());
        for place in places {
            let block = match place {
                Place::Body(range) => compressed_block(&body[range.clone()]),
                Place::Unpacked(range) => compressed_block(&self.unpacked[range.clone()]),
                Place::Shared(range) => compressed_block(&self.shared[range.clone()]),
                Place::Zero | Place::Same => Cow::Borrowed(&[][..]),
            };
            blocks.extend_from_slice(&block);
            sizes.push(u32::try_from(block.len()).expect("no more than a page"));
            self.kept.zero += u64::from(*place == Place::Zero);
        }
        let to = self.images.append_blocks(range, flags, sizes)?;
        self.kept.stored_bytes += blocks.len() as u64;
        write_all(&mut [IoSlice::new(&blocks)], &to.part, to.offset)
    }

    /// Writes adjacent pages that have contents.
    fn write(&self, to: &Destination, offset: u64, places: &[Place], body: &[u8]) -> Result<()> {
        let mut slices: Vec<IoSlice<'_>> = Vec::new();
        for (source, range) in joined(places) {
            let source = match source {
                Source::Body => body,
                Source::Unpacked => &self.unpacked,
                Source::Shared => &self.shared,
            };
            slices.push(IoSlice::new(&source[range]));
        }
        write_all(&mut slices, &to.part, offset)
    }
}

/// What the contents of a page are a range of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Body,
    Unpacked,
    Shared,
}

/// The places of pages, neighbours joined.
fn joined(places: &[Place]) -> Vec<(Source, Range<usize>)> {
    let mut joined: Vec<(Source, Range<usize>)> = Vec::new();
    for place in places {
        let (source, range) = match place {
            Place::Body(range) => (Source::Body, range.clone()),
            Place::Unpacked(range) => (Source::Unpacked, range.clone()),
            Place::Shared(range) => (Source::Shared, range.clone()),
            Place::Zero | Place::Same => continue,
        };
        match joined.last_mut() {
            Some((last_source, last)) if *last_source == source && last.end == range.start => {
                last.end = range.end;
            }
            _ => joined.push((source, range)),
        }
    }
    joined
}
