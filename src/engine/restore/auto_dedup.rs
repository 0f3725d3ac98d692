//! `--auto-dedup`: images lose the memory that has been installed.
//!
//! ```text
//!   settled in one process ──> planner: does another one that came from the same pid need it? ──> no
//!                                                              the restore has finished ──> its file loses it
//! ```
//!
//! Nothing is taken out before the restore has said that every process runs: a restore that fails can then be tried
//! again from the same images. Once something is taken out, it cannot: the directories are marked
//! (`image::consume`).
//!
//! If this process is killed, its standby installs from the same images. It may read zeros where pages were taken out.
//! Those pages were installed before, so the kernel refuses to install them again. Pages that are still missing
//! somewhere are still in the images.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Restore;
use crate::error::Result;
use crate::image::chain::Chain;
use crate::image::consume::Consumer;

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct AutoDedup {
    /// By pid in the images: processes may end before their last pages are taken out.
    chains: BTreeMap<u32, Arc<Chain>>,
    consumer: Consumer,
    /// It could not be done; the images stay as they are from then on.
    failed: bool,
}

impl AutoDedup {
    /// Pages of `pid` come from `chain`.
    pub(super) fn add(&mut self, pid: u32, chain: &Arc<Chain>) {
        self.chains.insert(pid, Arc::clone(chain));
    }

    /// Bytes that were taken out.
    pub(super) fn bytes(&self) -> u64 {
        self.consumer.bytes()
    }

    fn fail_softly(&mut self, result: Result<()>) {
        if let Err(error) = result {
            // The restore itself needs none of it.
            tracing::warn!("--auto-dedup: the images keep what is installed: {error}");
            self.failed = true;
        }
    }
}

impl Restore {
    /// Takes out of the images what nobody needs any more, unless the restore may still fail.
    pub(super) fn free_unneeded(&mut self) {
        let Some(auto_dedup) = &mut self.auto_dedup else {
            return;
        };
        if !self.handover.is_finished() {
            return;
        }
        let unneeded = self.planner.take_unneeded();
        if auto_dedup.failed {
            return;
        }
        for (pid, range) in unneeded {
            let Some(chain) = auto_dedup.chains.get(&pid) else {
                continue;
            };
            let consumed = auto_dedup.consumer.consume(chain, range);
            auto_dedup.fail_softly(consumed);
        }
    }

    /// Takes out what is left of it, and says what has become of the images.
    pub(super) fn end_auto_dedup(&mut self, result: &Result<()>) {
        self.free_unneeded();
        let Some(auto_dedup) = &mut self.auto_dedup else {
            return;
        };
        if self.handover.is_finished() && !auto_dedup.failed {
            let flushed = auto_dedup.consumer.flush();
            auto_dedup.fail_softly(flushed);
        }
        for dir in auto_dedup.consumer.dirs() {
            let text = "pages were taken out of the images in";
            let so = "they cannot be restored from again (--auto-dedup)";
            match result {
                Ok(()) => tracing::info!("{text} {}: {so}", dir.display()),
                Err(_) => tracing::error!("{text} {}: {so}", dir.display()),
            }
        }
    }
}
