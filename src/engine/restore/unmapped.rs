//! What the kernel says was unmapped, and was not.
//!
//! ```text
//! UNMAP ──> no page is missing there ─────────────────────────> gone
//!      └──> the first missing page has no userfaultfd any more ──> gone
//!      └──> else: something sealed in the range ──> the call failed, nothing is gone
//!                                            └────> gone
//! ```
//!
//! Linux (seen with 6.18) raises UNMAP for munmap and mmap with MAP_FIXED also where they fail since their range meets
//! sealed memory (mseal). Sealed memory cannot go: where there is some in the range, the call has failed. That is read in
//! smaps, which takes long in a large process, so it is read only where a userfaultfd is still there: the call has failed,
//! or a neighbour has grown to there in the meantime.

use std::thread;

use super::Restore;
use crate::lazy::planner::SpaceId;
use crate::units::PageRange;

/// How often a process is asked that has yet to take note that its event was read.
const TRIES: usize = 20;

impl Restore {
    /// Whether the memory `range` of `id` is there although the kernel says that it was unmapped.
    pub(super) fn is_still_mapped(&self, id: SpaceId, range: PageRange) -> bool {
        let missing = self.planner.space(id);
        let missing = missing.and_then(|space| space.first_missing_in(range));
        let (Some(missing), Some(process)) = (missing, self.processes.get(id)) else {
            return false;
        };
        let Some(host) = &process.host else {
            return false;
        };
        let page = PageRange::new(missing.get(), missing.get() + self.images.page().bytes());
        let mut answers = (0..TRIES).map(|tried| {
            if tried > 0 {
                thread::yield_now();
            }
            process.uffd.is_registered(page)
        });
        match answers.find_map(|registered| registered) {
            Some(false) => false,
            Some(true) | None => host.has_sealed(range),
        }
    }
}
