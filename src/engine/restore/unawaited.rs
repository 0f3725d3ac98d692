//! Pages that the kernel reads without waiting for them: they must be there before (seen with Linux 6.18).
//!
//! | when | what it reads | where that is missing |
//! |---|---|---|
//! | a thread ends | its list of robust futexes, and the word of `set_tid_address` | a lock that it held stays locked without FUTEX_OWNER_DIED, and others wait for it for ever |
//! | /proc/PID/cmdline and environ are read | the command line, the environment | they are empty: `ps` shows a name in brackets, as for a thread of the kernel, and `pgrep -f` finds nothing |

use super::Restore;
use crate::error::Result;
use crate::image::dir::ImageDir;
use crate::lazy::planner::SpaceId;
use crate::units::Vaddr;

/// What a process has of such pages, by its pid in the images.
type Pages = fn(&ImageDir, u32) -> Result<Vec<Vaddr>>;

impl Restore {
    /// Brings these pages before all others, with `--on-demand` too. Not before the restore is finished: until then
    /// CRIU may not have moved a process's memory to its place.
    pub(super) fn fetch_unawaited(&mut self) -> Result<()> {
        let spaces = self.planner.spaces();
        let processes: Vec<(SpaceId, u32)> = spaces.map(|(id, space)| (id, space.pid())).collect();
        // A lock that is lost stays so, a command line can be read again.
        let kinds: [Pages; 2] = [ImageDir::touched_at_exit, ImageDir::command_line];
        for pages in kinds {
            for (id, pid) in &processes {
                for addr in pages(&self.images, *pid)? {
                    if let Some(piece) = self.planner.fetch_ahead(*id, addr) {
                        self.install_local(*id, piece)?;
                    }
                }
            }
        }
        self.send_urgent()
    }
}
