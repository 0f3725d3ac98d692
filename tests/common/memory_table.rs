//! The ways of carrying memory in the first table of docs/compatibility.md.

use testbed::kinds::KINDS;

use crate::kinds_table::{COLUMNS, Layout, Way};

/// A way of carrying memory from a dump to a restore.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transfer {
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    /// Whether the processes run before their memory is there.
    pub(crate) lazy: bool,
    /// With which CRIUs every run of the tests tries it; with the others the long ones do.
    pub(crate) often: &'static [&'static str],
    /// CRIUs whose dumps it refuses, as the documentation says.
    pub(crate) refuses: &'static [&'static str],
}

impl Transfer {
    /// Whether the images that are restored have a parent.
    pub(crate) fn has_parent(self) -> bool {
        matches!(self.name, "dedup-content" | "auto-dedup" | "dedup-tree")
    }
}

const fn transfer(
    name: &'static str,
    title: &'static str,
    lazy: bool,
    often: &'static [&'static str],
) -> Transfer {
    Transfer {
        name,
        title,
        lazy,
        often,
        refuses: &[],
    }
}

/// All transfers, in the order of the table.
pub(crate) const TRANSFERS: &[Transfer] = &[
    transfer("plain", "received", false, &COLUMNS),
    transfer("dedup-content", "`--dedup-content`", false, &["4.2"]),
    transfer("auto-dedup", "`--auto-dedup`", false, &["4.2"]),
    transfer("dedup-tree", "`--dedup-tree`", false, &["4.2"]),
    Transfer {
        refuses: &["4.1"],
        ..transfer("compress", "`--compress`", false, &["4.2"])
    },
    transfer("forward", "`--forward`", false, &["4.1", "4.2"]),
    transfer("served", "served to CRIU", true, &["4.2"]),
    transfer("lazy-dump", "lazy, from a dump", true, &COLUMNS),
    transfer(
        "lazy-page-server",
        "lazy, from a page-server",
        true,
        &["4.2"],
    ),
    transfer("lazy-local", "lazy, local", true, &["4.2"]),
    transfer("split-lazy", "`--split-lazy`", true, &["4.2"]),
    transfer("forward-lazy", "`--forward-lazy`", true, &["4.2"]),
    transfer("ferry", "`--ferry`", true, &COLUMNS),
    transfer("hybrid", "hybrid", true, &["4.2"]),
];

/// The table of all kinds by all transfers.
pub(crate) fn layout() -> Layout {
    let way = |transfer: &Transfer| Way {
        name: transfer.name,
        title: transfer.title,
    };
    Layout {
        begin: "<!-- memory kinds: written by tests/criu_memory_kinds.rs -->\n",
        end: "<!-- end of memory kinds -->\n",
        rows: KINDS.to_vec(),
        ways: TRANSFERS.iter().map(way).collect(),
    }
}
