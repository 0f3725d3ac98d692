//! The sender's memory of what the receiver has: hashes of all pages, contents of some.
//!
//! ```text
//! target ──> chunks of 512 pages ──> per page: hash (16 bytes), known?, seen in this round?
//!                                              slot of kept contents, if there is one
//! kept contents ── a clock hand goes round and drops what has not changed for longest
//! ```
//!
//! A round compares each page with what is known of its base version and puts the page itself in
//! its place: so the memory needs no second copy while the round goes on. The base version stays
//! what it is until the receiver has the whole round. So:
//!
//! - [`PageMemory::commit`] when the round is safe at the receiver: pages that the round did not
//!   mention are forgotten, for the receiver's new image does not have them;
//! - [`PageMemory::forget`] when it failed: the hashes are ahead of the receiver and worth nothing.
//!   They are learned again from the receiver.
//!
//! Processes of a tree have pages in common. A page whose contents went to the receiver in this session, for a target
//! that was opened before, is named and not sent again ([`PageMemory::begin_session`]).
//!
//! Cached contents are never taken on trust: before they serve as the base of a difference their hash
//! is compared with that of the base version. So they outlive rounds that fail and receivers that
//! restart.
//!
//! Invariants: a page is compared at most once a round, the second time it counts as fresh; memory
//! in use never exceeds the budget; hashes push out contents, contents never push out hashes.

mod chunk;
mod content_cache;
mod others;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::criu::header::{PageFlags, Target};
use crate::units::{PageRange, PageSize, Vaddr};

use super::encode::{PlainBatch, Verdict, Verdicts};
use super::gather::present_pages;
use super::hash::{Fingerprint, HASH_BYTES, HashKey, HashStep, PageHash, PageHasher};
use super::message::StateId;
use chunk::{CHUNK_BYTES, CHUNK_PAGES, Chunk, PageLocation, SLOTS_BYTES};
use content_cache::{CACHED_EXTRA_BYTES, ContentCache};
pub use content_cache::{NewSlab, Slab};
use others::Others;

/// What is remembered, in numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CacheUsage {
    /// Memory in use, bytes.
    pub bytes: u64,
    /// Pages whose contents are kept.
    pub kept_pages: u64,
    /// Pages of this round for which there was no room.
    pub left_out_pages: u64,
}

/// The memory of what the receiver has. See the module's text.
pub struct PageMemory {
    page: PageSize,
    budget_bytes: u64,
    /// Names the receiver's version that is remembered.
    state: StateId,
    /// Key of all hashes.
    key: HashKey,
    /// While the memory is being rebuilt from the receiver's hashes: whose were asked for.
    asked: Option<BTreeSet<Target>>,
    targets: BTreeMap<Target, BTreeMap<u64, Chunk>>,
    chunk_bytes: u64,
    keeps_contents: bool,
    cache: ContentCache,
    left_out_pages: u64,
    /// The targets of the session whose pages may be named for others.
    others: Others,
}

impl fmt::Debug for PageMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageMemory({:?})", self.remembered())
    }
}

impl PageMemory {
    /// An empty memory that uses up to `budget_bytes`.
    pub fn new(page: PageSize, budget_bytes: u64) -> PageMemory {
        PageMemory {
            page,
            budget_bytes,
            state: StateId::NONE,
            key: HashKey::default(),
            asked: None,
            targets: BTreeMap::new(),
            chunk_bytes: 0,
            keeps_contents: true,
            cache: ContentCache::new(page, budget_bytes),
            left_out_pages: 0,
            others: Others::default(),
        }
    }

    /// The same, which keeps contents in what `new_slab` makes.
    #[must_use]
    pub fn with_slabs(mut self, new_slab: NewSlab) -> PageMemory {
        self.cache.set_new_slab(new_slab);
        self
    }

    /// An empty memory that has room for the hashes of `runs` and keeps no contents: for a receiver that
    /// has one round only.
    pub fn for_hashes_of(
        page: PageSize,
        runs: impl IntoIterator<Item = (Target, PageRange)>,
    ) -> PageMemory {
        let chunks = |range: PageRange| {
            let chunk_bytes = (CHUNK_PAGES as u64) << page.shift();
            range.start().get() / chunk_bytes..range.end().get().div_ceil(chunk_bytes)
        };
        let mut count = 0;
        let mut before = None;
        for (target, range) in runs {
            let mut touched = chunks(range);
            if let Some((last_target, end)) = before
                && last_target == target
            {
                touched.start = touched.start.max(end);
            }
            count += touched.end.saturating_sub(touched.start);
            before = Some((target, touched.end.max(touched.start)));
        }
        PageMemory {
            keeps_contents: false,
            ..PageMemory::new(page, count * CHUNK_BYTES)
        }
    }

    /// Size of a page.
    pub fn page(&self) -> PageSize {
        self.page
    }

    /// Names the receiver's version that is remembered.
    pub fn state(&self) -> StateId {
        self.state
    }

    /// The key of all hashes.
    pub fn key(&self) -> HashKey {
        self.key
    }

    /// What is remembered, in numbers.
    pub fn remembered(&self) -> CacheUsage {
        CacheUsage {
            bytes: self.chunk_bytes + self.cache.count() * self.cached_page_bytes(),
            kept_pages: self.cache.count(),
            left_out_pages: self.left_out_pages,
        }
    }

    /// Forgets all hashes: nothing is known of what the receiver has.
    pub fn forget(&mut self) {
        let targets: Vec<Target> = self.targets.keys().copied().collect();
        for target in targets {
            self.forget_target(target);
        }
        self.state = StateId::NONE;
        self.asked = None;
        self.left_out_pages = 0;
    }

    /// From now on the receiver's hashes are made with `key`: those of another are worth nothing.
    pub fn use_key(&mut self, key: HashKey) {
        if key != self.key {
            self.forget();
            self.key = key;
        }
    }

    /// A session begins. With `names_others` pages are named that the receiver got of other targets in it; with
    /// `keeps_contents` contents are kept for sessions that follow.
    pub fn begin_session(&mut self, names_others: bool, keeps_contents: bool) {
        self.others = Others::new(names_others);
        self.keeps_contents = keeps_contents;
        let chunks = self.targets.values_mut().flat_map(BTreeMap::values_mut);
        chunks.for_each(Chunk::forget_sent);
    }

    /// The next pages are those of `target`. The receiver's base version of it is the one named `state`. Returns whether
    /// its hashes have to be asked for.
    pub fn adopt(&mut self, target: Target, state: StateId) -> bool {
        self.others.open(target);
        if state == StateId::NONE {
            self.forget_target(target);
            return false;
        }
        if state != self.state {
            self.forget();
            self.state = state;
            self.asked = Some(BTreeSet::new());
        }
        self.asked
            .as_mut()
            .is_some_and(|asked| asked.insert(target))
    }

    /// The receiver's base version that was adopted last has these hashes at `run` of `target`. Pages
    /// beyond the budget are left out, as is what comes when the base version is another already.
    pub fn learn(&mut self, target: Target, run: PageRange, hashes: &[[u8; HASH_BYTES]]) {
        let asked = self.asked.as_ref();
        if !asked.is_some_and(|asked| asked.contains(&target)) {
            return;
        }
        self.set_bases(target, run, hashes.iter().map(|hash| PageHash(*hash)));
    }

    /// Hands out the hashes of all pages of the receiver's base version, by target and address: neighbouring ones
    /// together, no more than a frame of the protocol takes.
    pub fn each_known(&self, mut take: impl FnMut(Target, &[PageRange], &[PageHash])) {
        for (target, chunks) in &self.targets {
            for (number, chunk) in chunks {
                let mut step = HashStep::default();
                for at in 0..CHUNK_PAGES {
                    let Some(hash) = chunk.base(at) else {
                        continue;
                    };
                    let start = (number * CHUNK_PAGES as u64 + at as u64) << self.page.shift();
                    step.add_run(PageRange::new(start, start + self.page.bytes()));
                    step.hashes.push(hash);
                }
                if !step.hashes.is_empty() {
                    take(*target, &step.runs, &step.hashes);
                }
            }
        }
    }

    /// Begins with what another sender knew of the receiver's base version, which is the one named `state`: the hashes under
    /// `key` of the pages of these runs.
    pub fn begin_with<'h>(
        &mut self,
        state: StateId,
        key: HashKey,
        known: impl Iterator<Item = (Target, PageRange, &'h [PageHash])>,
    ) {
        self.forget();
        self.key = key;
        for (target, run, hashes) in known {
            self.set_bases(target, run, hashes.iter().copied());
        }
        self.state = state;
    }

    fn set_bases(
        &mut self,
        target: Target,
        run: PageRange,
        hashes: impl Iterator<Item = PageHash>,
    ) {
        let first = run.start().get() >> self.page.shift();
        for (number, hash) in (first..).zip(hashes) {
            let location = PageLocation { target, number };
            if let Some(chunk) = self.chunk(location) {
                chunk.set_base(location.at(), hash);
            }
        }
    }

    /// The hash of the receiver's base version of the page at `vaddr`, if it is known and nothing newer
    /// was sent.
    pub fn base_of(&self, target: Target, vaddr: Vaddr) -> Option<PageHash> {
        let number = vaddr.get() >> self.page.shift();
        let location = PageLocation { target, number };
        let chunk = self.targets.get(&target)?.get(&location.chunk())?;
        chunk.base(location.at())
    }

    /// Judges the PRESENT pages of `batch` and remembers them. `prints` has their fingerprints,
    /// made with `hasher`.
    pub fn judge(
        &mut self,
        batch: PlainBatch<'_>,
        prints: &[Fingerprint],
        hasher: &PageHasher,
        verdicts: &mut Verdicts,
    ) {
        let PlainBatch {
            target,
            runs,
            plain,
        } = batch;
        verdicts.clear();
        self.others.begin_batch(target);
        let pages = plain.chunks_exact(self.page.as_usize());
        let with_prints = present_pages(runs, self.page).zip(pages).zip(prints);
        for ((vaddr, contents), print) in with_prints {
            let number = vaddr.get() >> self.page.shift();
            let location = PageLocation { target, number };
            let verdict = self.judge_page(location, contents, *print, hasher, &mut verdicts.xor);
            verdicts.pages.push(verdict);
        }
        for run in runs {
            if run.flags.has(PageFlags::PARENT) {
                self.keep_holes(target, run.range);
            }
        }
    }

    /// The round is safe at the receiver under the name `state`: it is the new base version.
    pub fn commit(&mut self, state: StateId) {
        let cache = &mut self.cache;
        for chunks in self.targets.values_mut() {
            chunks.retain(|_, chunk| chunk.commit(|slot| cache.remove(slot)));
        }
        self.targets.retain(|_, chunks| !chunks.is_empty());
        let chunks = self.targets.values().flat_map(BTreeMap::values);
        self.chunk_bytes = chunks.map(Chunk::bytes).sum();
        self.left_out_pages = 0;
        self.asked = None;
        self.state = state;
    }

    /// Forgets the hashes of `target`; kept contents stay.
    fn forget_target(&mut self, target: Target) {
        let Some(chunks) = self.targets.get_mut(&target) else {
            return;
        };
        chunks.retain(|_, chunk| {
            chunk.forget();
            let keeps = chunk.slots().next().is_some();
            if !keeps {
                self.chunk_bytes -= chunk.bytes();
            }
            keeps
        });
    }

    fn judge_page(
        &mut self,
        location: PageLocation,
        contents: &[u8],
        print: Fingerprint,
        hasher: &PageHasher,
        xor: &mut Vec<u8>,
    ) -> Verdict {
        let otherwise = if print.zero {
            Verdict::Zero
        } else {
            Verdict::Fresh
        };
        let Some(hash) = print.hash else {
            return otherwise;
        };
        let Some(chunk) = self.chunk(location) else {
            self.left_out_pages += 1;
            return otherwise;
        };
        let (base, slot) = (chunk.base(location.at()), chunk.slot(location.at()));
        chunk.replace(location.at(), hash);
        if base == Some(hash) {
            return Verdict::Same(hash);
        }
        let shared = (!print.zero)
            .then(|| self.find_shared(location, hash))
            .flatten();
        let verdict = match (shared, base, slot) {
            (Some(of), ..) => Verdict::Shared { hash, of },
            (None, Some(base), Some(slot)) if !print.zero => {
                let old = self.cache.contents(slot);
                if hasher.hash(old) == base && put_difference(old, contents, xor) {
                    Verdict::Delta(base)
                } else {
                    otherwise
                }
            }
            _ => otherwise,
        };
        match slot {
            Some(slot) if print.zero => {
                self.cache.remove(slot);
                self.set_slot(location, None);
            }
            Some(slot) => self.cache.replace(slot, contents),
            None if print.zero || shared.is_some() => {}
            None => self.keep(location, contents, base.is_some()),
        }
        if matches!(verdict, Verdict::Fresh | Verdict::Delta(_)) && self.others.are_named() {
            let chunks = self.targets.get_mut(&location.target);
            if let Some(chunk) = chunks.and_then(|chunks| chunks.get_mut(&location.chunk())) {
                chunk.set_sent(location.at());
            }
        }
        verdict
    }

    /// Whose page at the same address has this hash, and was sent in this session.
    fn find_shared(&mut self, location: PageLocation, hash: PageHash) -> Option<u16> {
        let (chunk, at) = (location.chunk(), location.at());
        let targets = &self.targets;
        self.others.find(|other| {
            let chunk = targets.get(&other).and_then(|chunks| chunks.get(&chunk));
            chunk.is_some_and(|chunk| chunk.has_sent(at, hash))
        })
    }

    /// Pages that the source leaves to the parent stay what they are.
    fn keep_holes(&mut self, target: Target, range: PageRange) {
        let Some(chunks) = self.targets.get_mut(&target) else {
            return;
        };
        let (first, end) = (
            range.start().get() >> self.page.shift(),
            range.end().get() >> self.page.shift(),
        );
        let per_chunk = CHUNK_PAGES as u64;
        // Only chunks that exist: a hole may be far longer than what is remembered of it.
        for (number, chunk) in chunks.range_mut(first / per_chunk..end.div_ceil(per_chunk)) {
            for at in 0..CHUNK_PAGES {
                if (first..end).contains(&(number * per_chunk + at as u64)) {
                    chunk.keep(at);
                }
            }
        }
    }

    /// The chunk of `location`, made if need be and budget allows.
    fn chunk(&mut self, location: PageLocation) -> Option<&mut Chunk> {
        let chunks = self.targets.get(&location.target);
        if !chunks.is_some_and(|chunks| chunks.contains_key(&location.chunk())) {
            if !self.make_room(CHUNK_BYTES, true) {
                return None;
            }
            self.chunk_bytes += CHUNK_BYTES;
        }
        let chunks = self.targets.entry(location.target).or_default();
        Some(chunks.entry(location.chunk()).or_insert_with(Chunk::new))
    }

    /// Keeps the contents of the page at `location` if that is worth the room: a page that has
    /// `changed` may push out others, one that is new only fills room that is free.
    fn keep(&mut self, location: PageLocation, contents: &[u8], changed: bool) {
        if !self.keeps_contents {
            return;
        }
        let bytes = self.cached_page_bytes() + SLOTS_BYTES;
        let fits = self.remembered().bytes + bytes <= self.budget_bytes;
        if fits || (changed && self.make_room(bytes, false)) {
            let slot = self.cache.insert(location, contents, changed);
            self.set_slot(location, Some(slot));
        }
    }

    /// Drops kept contents until `bytes` more fit into the budget.
    fn make_room(&mut self, bytes: u64, at_all_costs: bool) -> bool {
        while self.remembered().bytes + bytes > self.budget_bytes {
            let Some(location) = self.cache.evict(at_all_costs) else {
                return false;
            };
            self.set_slot(location, None);
        }
        true
    }

    fn cached_page_bytes(&self) -> u64 {
        self.page.bytes() + CACHED_EXTRA_BYTES
    }

    /// Says where the contents of a page in an existing chunk are kept.
    fn set_slot(&mut self, location: PageLocation, slot: Option<chunk::Slot>) {
        let chunks = self.targets.get_mut(&location.target);
        if let Some(chunk) = chunks.and_then(|chunks| chunks.get_mut(&location.chunk())) {
            let before = chunk.bytes();
            chunk.set_slot(location.at(), slot);
            self.chunk_bytes += chunk.bytes() - before;
        }
    }
}

/// Appends the XOR of both pages to `out` if at most half of their bytes differ.
fn put_difference(old: &[u8], new: &[u8], out: &mut Vec<u8>) -> bool {
    let start = out.len();
    out.extend(old.iter().zip(new).map(|(old, new)| old ^ new));
    let differ = out[start..].iter().filter(|byte| **byte != 0).count();
    let keep = differ <= new.len() / 2;
    if !keep {
        out.truncate(start);
    }
    keep
}

#[cfg(test)]
mod tests;
