//! Pages that must be there before a thread ends.
//!
//! When a thread ends, the kernel reads its list of robust futexes and clears the word of `set_tid_address`. It waits
//! for no userfaultfd then (seen with Linux 6.18): where such a page is missing, a lock that the thread held stays
//! locked without FUTEX_OWNER_DIED, and other processes wait for it for ever.

use super::Restore;
use crate::error::Result;
use crate::lazy::planner::SpaceId;

impl Restore {
    /// Brings these pages before all others, with `--on-demand` too. Not before the restore is finished: until then
    /// CRIU may not have moved a process's memory to its place.
    pub(super) fn fetch_what_thread_ends_touch(&mut self) -> Result<()> {
        let spaces = self.planner.spaces();
        let processes: Vec<(SpaceId, u32)> = spaces.map(|(id, space)| (id, space.pid())).collect();
        for (id, pid) in processes {
            for addr in self.images.touched_at_exit(pid)? {
                if let Some(piece) = self.planner.fetch_ahead(id, addr) {
                    self.install_local(id, piece)?;
                }
            }
        }
        self.send_urgent()
    }
}
