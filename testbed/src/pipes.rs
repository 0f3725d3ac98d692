//! `fs.pipe-max-size`, raised while someone needs it.
//!
//! `criu dump --lazy-pages` holds memory in pipes of more than 1 MiB, which a process without
//! CAP_SYS_RESOURCE may make only if this sysctl allows it.

use anyhow::Result;

use crate::sysctl::{Raised, Sysctl};

static PIPE_MAX_SIZE: Sysctl = Sysctl {
    path: "/proc/sys/fs/pipe-max-size",
    record: "pageferry-pipe-max-size.json",
    value: |original, _| original.max(NEEDED),
};

/// What CRIU needs, bytes.
const NEEDED: u64 = 4 << 20;

/// While one exists, pipes of 4 MiB are allowed.
#[derive(Debug)]
pub struct LargePipes {
    _raised: Option<Raised>,
}

impl LargePipes {
    /// Raises the sysctl, unless it is high enough.
    ///
    /// # Errors
    /// It cannot be written: not root, or a read-only /proc.
    pub fn allow() -> Result<LargePipes> {
        let _raised = PIPE_MAX_SIZE.raise(NEEDED)?;
        Ok(LargePipes { _raised })
    }
}
