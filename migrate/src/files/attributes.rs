//! What files have beside contents. Pure.

/// Extended attributes: names and values, sorted by name.
pub(super) type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// What files have beside contents.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Attributes {
    /// Permissions, with set-user-ID, set-group-ID and sticky.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds since 1970, rounded down, and nanoseconds beyond them.
    pub(super) mtime: (i64, u32),
    pub(super) xattrs: Xattrs,
}
