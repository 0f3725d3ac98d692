//! Images of an earlier round at the receiver: what is hashed and read of them is decided by
//! [`crate::ferry::postcopy_receiver`].
//!
//! They are read and not mapped: in a mapping a page might change between its hash and its use.

use std::collections::BTreeMap;

use crate::criu::header::Target;
use crate::engine::ferry::base::Base;
use crate::error::Result;
use crate::ferry::hash::{HashStep, PageHasher};
use crate::ferry::message::WantHashes;
use crate::ferry::postcopy_receiver::UnverifiedDelivery;
use crate::image::chain::Chain;
use crate::units::{PageRange, PageSize};

/// Hashed at once, bytes: no more than is installed at once, for faults wait as long.
const STEP_BYTES: u64 = 64 << 10;

/// See the module's text.
#[derive(Debug)]
pub(super) struct Earlier {
    page: PageSize,
    hasher: PageHasher,
    /// By pid in the dump.
    bases: BTreeMap<u32, Base>,
    complained: bool,
}

impl Earlier {
    /// No images so far; those that come are hashed by `hasher`.
    pub(super) fn new(page: PageSize, hasher: PageHasher) -> Earlier {
        Earlier {
            page,
            hasher,
            bases: BTreeMap::new(),
            complained: false,
        }
    }

    /// The pages `missing` of `pid`, which are sorted, may be in `chain`.
    pub(super) fn add(&mut self, pid: u32, chain: Chain, missing: Vec<PageRange>) {
        let base = Base::within(chain, self.hasher.clone(), missing);
        self.bases.insert(pid, base);
    }

    /// From now on pages are hashed by `hasher`.
    pub(super) fn use_hasher(&mut self, hasher: &PageHasher) {
        self.hasher = hasher.clone();
        for base in self.bases.values_mut() {
            base.use_hasher(hasher.clone());
        }
    }

    /// Gives all images up.
    pub(super) fn drop_images(&mut self) {
        self.bases.clear();
    }

    /// Hashes a few more pages for the question `wanted`, the first ones of it for a frame if it `begins`.
    pub(super) fn hash(&mut self, wanted: WantHashes, begins: bool) -> HashStep {
        let base = match wanted.target {
            Target::Process(pid) => self.bases.get_mut(&pid),
            Target::Shmem(_) => None,
        };
        let Some(base) = base else {
            return HashStep::default();
        };
        if begins {
            base.read_ahead(wanted.from);
        }
        let step = base.hash_from(wanted.from, STEP_BYTES >> self.page.shift());
        step.unwrap_or_else(|error| {
            // Pages whose hashes are not told come over the wire.
            tracing::warn!("hashing the earlier round of {}: {error}", wanted.target);
            HashStep::default()
        })
    }

    /// Reads the local pages of `unverified` to their places. Returns whether all are there.
    pub(super) fn read(&self, unverified: &mut UnverifiedDelivery) -> Result<bool> {
        let base = self.bases.get(&unverified.pid());
        for (range, bytes) in unverified.local() {
            let Some(base) = base else {
                return Ok(false);
            };
            if !base.read_all(range, bytes)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Tells, once, that pages of `pid` cannot be used, unless all images were given up on purpose.
    pub(super) fn log_unusable(&mut self, pid: u32, why: &str) {
        if !self.bases.is_empty() && !self.complained {
            tracing::warn!(
                "pages of the earlier round of pid {pid} cannot be used, and are asked for: {why}"
            );
            self.complained = true;
        }
    }
}
