//! What an earlier round has left here: its pages stand for those that the far end would send.
//!
//! ```text
//! WANT_HASHES ──> questions ── a few pages at a time ──> HASHES
//! batch with "same" pages ──> fill ── read, hash, compare ──> installed from what was read
//! ```
//!
//! Others may write to the images at any time. So a page is read and hashed once more when it is to be
//! used, into the buffer that it is installed from: not from a mapping, in which it might change once
//! more. What is not what the far end means is left out; then these images are not believed any more,
//! and faults ask for contents.

use std::collections::{BTreeMap, VecDeque};

use super::Part;
use crate::criu::header::Target;
use crate::engine::ferry::base::{Base, HashStep};
use crate::ferry::batch::Batch;
use crate::ferry::hash::PageHasher;
use crate::ferry::message::{Hashes, StateId, WantHashes};
use crate::image::chain::Chain;
use crate::limits::{FERRY_HASHES_MAX, FERRY_QUESTIONS_MAX};
use crate::units::{PageRange, PageSize};

/// Hashed at once, bytes: no more than is installed at once, for faults wait as long.
const STEP_BYTES: u64 = 64 << 10;

/// Hashes that go into a frame.
const HASHES_A_FRAME: usize = 1024;

const _: () = assert!(HASHES_A_FRAME + (STEP_BYTES >> 12) as usize <= FERRY_HASHES_MAX);

/// How far ahead images are read, bytes.
const READAHEAD_BYTES: u64 = 16 << 20;

/// See the module's text.
#[derive(Debug)]
pub(super) struct Earlier {
    page: PageSize,
    hasher: PageHasher,
    /// Names what is here for the far end.
    state: StateId,
    /// By pid in the dump.
    bases: BTreeMap<u32, Base>,
    questions: VecDeque<WantHashes>,
    /// Hashes for the first question that have not been told yet.
    gathered: HashStep,
    distrusted: bool,
}

impl Earlier {
    /// Nothing so far, which the far end is to know as `state` and by the hashes of `hasher`.
    pub(super) fn new(page: PageSize, hasher: PageHasher, state: StateId) -> Earlier {
        Earlier {
            page,
            hasher,
            state,
            bases: BTreeMap::new(),
            questions: VecDeque::new(),
            gathered: HashStep::default(),
            distrusted: false,
        }
    }

    /// The pages `missing` of `pid`, which are sorted, may be in `chain`.
    pub(super) fn add(&mut self, pid: u32, chain: Chain, missing: Vec<PageRange>) {
        let base = Base::within(chain, self.hasher.clone(), missing);
        self.bases.insert(pid, base);
    }

    /// Gives all images up.
    pub(super) fn drop_images(&mut self) {
        self.bases.clear();
    }

    /// The name of what is here of `target`.
    pub(super) fn version_of(&self, target: Target) -> StateId {
        match target {
            Target::Process(pid) if self.bases.contains_key(&pid) => self.state,
            _ => StateId::NONE,
        }
    }

    /// The far end wants hashes.
    pub(super) fn ask(&mut self, wanted: WantHashes) -> Result<(), &'static str> {
        if self.questions.len() >= FERRY_QUESTIONS_MAX {
            return Err("too many questions for hashes at a time");
        }
        self.questions.push_back(wanted);
        Ok(())
    }

    /// The far end will ask again for what it has not heard.
    pub(super) fn forget_questions(&mut self) {
        self.questions.clear();
        self.gathered = HashStep::default();
    }

    /// Whether the far end waits for hashes.
    pub(super) fn is_asked(&self) -> bool {
        !self.questions.is_empty()
    }

    /// Whether a page was not what it had been.
    pub(super) fn is_distrusted(&self) -> bool {
        self.distrusted
    }

    /// Hashes a few more pages for the first question. Gives a frame when one is full, or the answer
    /// complete.
    pub(super) fn next_hashes(&mut self) -> Option<Vec<u8>> {
        let wanted = self.questions.front_mut()?;
        let base = match wanted.target {
            Target::Process(pid) => self.bases.get_mut(&pid),
            Target::Shmem(_) => None,
        };
        if let Some(base) = base {
            if self.gathered.hashes.is_empty() {
                let start = wanted.from.get();
                base.advise(PageRange::new(start, start.saturating_add(READAHEAD_BYTES)));
            }
            match base.hash_from(wanted.from, STEP_BYTES >> self.page.shift()) {
                Ok(step) => self.gathered.append(step),
                Err(error) => {
                    // Pages whose hashes are not told come over the wire.
                    tracing::warn!("hashing the earlier round of {}: {error}", wanted.target);
                    self.gathered.next = None;
                }
            }
        }
        let next = self.gathered.next;
        if let Some(from) = next {
            wanted.from = from;
            if self.gathered.hashes.len() < HASHES_A_FRAME {
                return None;
            }
        }
        let HashStep { runs, hashes, .. } = std::mem::take(&mut self.gathered);
        let mut frame = Vec::new();
        let last = next.is_none();
        Hashes::encode(wanted.target, self.page, &runs, &hashes, last, &mut frame);
        if last {
            self.questions.pop_front();
        }
        Some(frame)
    }

    /// Reads the local ones of `parts`, the pages of `batch` of `pid`, to their places in `plain`. Says
    /// whether all are what the far end means.
    pub(super) fn fill(
        &mut self,
        pid: u32,
        batch: &Batch<'_>,
        parts: &[Part],
        plain: &mut [u8],
    ) -> bool {
        let mut hashes = Vec::new();
        for part in parts.iter().filter(|part| part.local) {
            let pages = &mut plain[part.bytes.clone()];
            let base = self.bases.get(&pid);
            let read = base.map_or(Ok(false), |base| base.read_all(part.image, pages));
            match read {
                Ok(true) => {}
                Ok(false) => return self.distrust(batch, "they are not there any more"),
                Err(error) => return self.distrust(batch, &error.to_string()),
            }
            let pages = pages.chunks_exact(self.page.as_usize());
            hashes.extend(pages.map(|page| self.hasher.hash(page)));
        }
        match batch.agree(&self.hasher, hashes) {
            Ok(()) => true,
            Err(error) => self.distrust(batch, &error.to_string()),
        }
    }

    fn distrust(&mut self, batch: &Batch<'_>, why: &str) -> bool {
        if !self.distrusted && !self.bases.is_empty() {
            tracing::warn!(
                "pages of the earlier round of {} cannot be used, and are asked for: {why}",
                batch.target
            );
        }
        self.distrusted = true;
        false
    }
}
