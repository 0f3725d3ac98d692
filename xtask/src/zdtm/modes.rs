//! The ways of zdtm in which memory passes through a page server or a lazy-pages daemon.

/// A way of running a test.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mode {
    pub(super) name: &'static str,
    pub(super) options: &'static [&'static str],
    /// In which flavours: on the host, in namespaces, in namespaces with one of users.
    pub(super) flavors: &'static [&'static str],
    /// Whether the restored process is there before the dumped one has ended.
    pub(super) at_once: bool,
    /// Whether the kernel must track dirty pages for stock CRIU.
    pub(super) tracks: bool,
}

const fn mode(
    name: &'static str,
    options: &'static [&'static str],
    flavors: &'static [&'static str],
) -> Mode {
    Mode {
        name,
        options,
        flavors,
        at_once: false,
        tracks: false,
    }
}

/// All, in the order in which they are run. The first serves for comparison where CRIU lacks dirty tracking.
pub(super) const MODES: &[Mode] = &[
    mode("page-server", &["--page-server"], &["h", "ns", "uns"]),
    mode("page-server-dedup", &["--page-server", "--dedup"], &["h"]),
    mode("page-server-tls", &["--page-server", "--tls"], &["h"]),
    Mode {
        tracks: true,
        ..mode("pre-dump", &["--page-server", "--pre", "2"], &["h"])
    },
    Mode {
        tracks: true,
        ..mode(
            "pre-dump-dedup",
            &["--page-server", "--dedup", "--pre", "2"],
            &["h"],
        )
    },
    mode("lazy-pages", &["--lazy-pages"], &["h", "ns", "uns"]),
    mode("remote-lazy-pages", &["--remote-lazy-pages"], &["h", "ns"]),
    mode(
        "remote-lazy-pages-tls",
        &["--remote-lazy-pages", "--tls"],
        &["h"],
    ),
    // On the host its pids are taken until the dump has ended.
    Mode {
        at_once: true,
        ..mode("lazy-migrate", &["--lazy-migrate"], &["ns"])
    },
    Mode {
        at_once: true,
        ..mode("lazy-migrate-tls", &["--lazy-migrate", "--tls"], &["ns"])
    },
];

/// Tests that change control groups of the machine.
pub(super) const OF_THE_MACHINE: &str = "cgroup";

/// Tests that wait for ever, for a lock, a port or a device that the dumped process still has.
pub(super) const WAITING: &[&str] = &[
    "file_lease",
    "file_locks",
    "ofd_file_locks",
    "veth",
    "macvlan",
];
