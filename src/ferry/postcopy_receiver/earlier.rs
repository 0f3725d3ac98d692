//! What an earlier round has left at the receiver: its pages stand for those that the far end would send.
//!
//! ```text
//! WANT_HASHES ──> questions ── the caller hashes a few pages at a time ──> HASHES
//! batch with "same" pages ──> the caller reads them ── complete: hash, compare ──> installed from what was read
//! ```
//!
//! Others may write to the images at any time. So a page is read and hashed once more when it is to be
//! used, into the buffer that it is installed from. What is not what the far end means is left out; then
//! these images are not believed any more, and faults ask for contents.

use std::collections::{BTreeSet, VecDeque};

use super::PostcopyError;
use super::delivery::{Delivery, UnverifiedDelivery};
use crate::criu::header::Target;
use crate::ferry::hash::{HashStep, PageHasher};
use crate::ferry::message::{Hashes, StateId, WantHashes};
use crate::limits::{FERRY_HASHES_MAX, FERRY_QUESTIONS_MAX};
use crate::units::PageSize;

/// See the module's text.
#[derive(Debug)]
pub(super) struct Earlier {
    page: PageSize,
    hasher: PageHasher,
    /// Names what is here for the far end.
    state: StateId,
    /// Of whom there is something here, by pid in the dump.
    pids: BTreeSet<u32>,
    questions: VecDeque<WantHashes>,
    /// Hashes for the first question that have not been sent yet.
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
            pids: BTreeSet::new(),
            questions: VecDeque::new(),
            gathered: HashStep::default(),
            distrusted: false,
        }
    }

    /// From now on the far end knows pages by the hashes of `hasher`.
    pub(super) fn use_hasher(&mut self, hasher: PageHasher) {
        self.hasher = hasher;
    }

    /// There is something of `pid` here.
    pub(super) fn add(&mut self, pid: u32) {
        self.pids.insert(pid);
    }

    /// Gives all images up.
    pub(super) fn drop_images(&mut self) {
        self.pids.clear();
    }

    /// The name of what is here of `target`.
    pub(super) fn version_of(&self, target: Target) -> StateId {
        match target {
            Target::Process(pid) if self.pids.contains(&pid) => self.state,
            _ => StateId::NONE,
        }
    }

    /// The far end wants hashes.
    pub(super) fn ask(&mut self, wanted: WantHashes) -> Result<(), PostcopyError> {
        if self.questions.len() >= FERRY_QUESTIONS_MAX {
            return Err(PostcopyError::TooManyQuestions);
        }
        self.questions.push_back(wanted);
        Ok(())
    }

    /// The far end will ask again for what it has not received.
    pub(super) fn forget_questions(&mut self) {
        self.questions.clear();
        self.gathered = HashStep::default();
    }

    /// What the far end waits for.
    pub(super) fn wanted(&self) -> Option<WantHashes> {
        self.questions.front().copied()
    }

    /// Whether nothing was gathered for the next frame yet.
    pub(super) fn begins(&self) -> bool {
        self.gathered.hashes.is_empty()
    }

    /// Whether a page was not what it had been.
    pub(super) fn is_distrusted(&self) -> bool {
        self.distrusted
    }

    /// See [`PostcopyReceiver::send_hashes`](super::PostcopyReceiver::send_hashes).
    pub(super) fn send(&mut self, step: HashStep, full: usize) -> Option<Vec<u8>> {
        let most = full + step.hashes.len();
        assert!(most <= FERRY_HASHES_MAX, "steps and frames are small");
        let wanted = self.questions.front_mut()?;
        // Images that were given up have no more hashes.
        let known = matches!(wanted.target, Target::Process(pid) if self.pids.contains(&pid));
        if known {
            self.gathered.append(step);
        } else {
            self.gathered.next = None;
        }
        let next = self.gathered.next;
        if let Some(from) = next {
            wanted.from = from;
            if self.gathered.hashes.len() < full {
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

    /// See [`PostcopyReceiver::complete`](super::PostcopyReceiver::complete).
    pub(super) fn complete(
        &mut self,
        unverified: UnverifiedDelivery,
        read: bool,
    ) -> (Delivery, bool) {
        if !unverified.has_local() || (read && unverified.agrees(&self.hasher)) {
            return (unverified.whole(), true);
        }
        self.distrusted = true;
        (unverified.without_local(), false)
    }
}
