//! `vm.nr_hugepages`, raised while a test needs huge pages.

use std::fs;

use anyhow::{Context, Result, ensure};

const SYSCTL: &str = "/proc/sys/vm/nr_hugepages";

/// So many huge pages of the default size; put back on drop. One test at a time may have them.
#[derive(Debug)]
pub struct HugePages {
    before: u64,
}

impl HugePages {
    /// Sees to it that there are `count` at least.
    ///
    /// # Errors
    /// Not root, or the kernel finds no room for them.
    pub fn allow(count: u64) -> Result<HugePages> {
        let before = current()?;
        // From here on it is put back, also when there are too few.
        let pages = HugePages { before };
        if before < count {
            fs::write(SYSCTL, count.to_string()).context(SYSCTL)?;
        }
        let now = current()?;
        ensure!(now >= count, "the kernel gives {now} of {count} huge pages");
        Ok(pages)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(SYSCTL, self.before.to_string());
    }
}

fn current() -> Result<u64> {
    let text = fs::read_to_string(SYSCTL).context(SYSCTL)?;
    text.trim().parse().context(SYSCTL)
}
