//! Which kinds of memory are tried together, and when.

/// Kinds that every run tries with [`ODD_WITH`] alone: all of them with all versions take minutes.
pub(crate) const ODD: &[&str] = &[
    "readonly",
    "write-only",
    "protections",
    "child-none",
    "child-moved",
    "left-empty",
    "lowest",
    "highest",
    "shared-grandchild",
    "guard-edges",
    "guard-many",
    "guard-readonly",
    "guard-thp",
    "guard-wipe",
    "guard-locked",
    "guard-shared",
    "guard-file",
    "child-guard",
    "parent-guard",
    "hugetlb-readonly",
    "hugetlb-cow",
    "sysv-twice",
    "sysv-removed",
    "thp-zero",
    "wipe-moved",
    "child-wipe",
    "growsdown-grown",
    "file-offset",
    "file-odd",
    "shm-deleted",
    "memfd-past-end",
    "memfd-noexec",
    "reservation-none",
];

/// See [`ODD`].
pub(crate) const ODD_WITH: &str = "4.2";

/// Kinds that some versions cannot dump, and others restore together.
pub(crate) const GUARDS: &[&str] = &[
    "guard",
    "guard-edges",
    "guard-many",
    "guard-readonly",
    "guard-thp",
    "guard-wipe",
    "guard-shared",
    "guard-file",
    "child-guard",
    "parent-guard",
];
