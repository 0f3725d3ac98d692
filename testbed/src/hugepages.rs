//! `vm.nr_hugepages`, raised while a test needs huge pages.

use anyhow::Result;

use crate::sysctl::{Raised, Sysctl};

static NR_HUGEPAGES: Sysctl = Sysctl {
    path: "/proc/sys/vm/nr_hugepages",
    record: "pageferry-nr-hugepages.json",
    // The pages of one are none of another's.
    value: |original, needed| original + needed.iter().sum::<u64>(),
};

/// So many huge pages of the default size, besides those that there were.
#[derive(Debug)]
pub struct HugePages {
    _raised: Option<Raised>,
}

impl HugePages {
    /// Sees to it that there are `count` more.
    ///
    /// # Errors
    /// Not root, or the kernel finds no room for them.
    pub fn allow(count: u64) -> Result<HugePages> {
        let _raised = NR_HUGEPAGES.raise(count)?;
        Ok(HugePages { _raised })
    }
}
