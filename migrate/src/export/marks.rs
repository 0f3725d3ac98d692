//! What overlayfs has marked in a layer of its own, and what that means in a layer of an image. Pure.
//!
//! | overlayfs | layer of an image |
//! |---|---|
//! | character device 0:0 | `.wh.NAME`, empty |
//! | empty file with `overlay.whiteout`, in a directory with `overlay.opaque=x` | `.wh.NAME`, empty |
//! | directory with `overlay.opaque=y` | the directory, and `.wh..wh..opq` in it |
//! | `overlay.redirect`, `overlay.metacopy` | what the mount shows at this place |
//! | `overlay.overlay.NAME` (an overlay within the overlay) | `overlay.NAME` |
//!
//! The marks are in the namespace `trusted.`, or in `user.` where the mount has the option `userxattr`.

use std::fmt;

/// What a name in a layer of an image begins with that hides what lies below.
pub(super) const WHITEOUT: &[u8] = b".wh.";

/// The name that hides all that lies below a directory.
pub(super) const OPAQUE: &[u8] = b".wh..wh..opq";

/// The name of an extended attribute of the host's policy, which is no part of a file system's contents.
const LABEL: &[u8] = b"security.selinux";

/// Where overlayfs keeps its marks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Marks {
    /// `trusted.overlay.`: mounts of the administrator.
    Trusted,
    /// `user.overlay.`: mounts with `userxattr`.
    User,
    /// It is not known how it was mounted: both.
    Either,
    /// No layer of overlayfs at all.
    None,
    /// One of overlayfs that is to be one again: whiteouts and marks are contents, but for notes of its own host.
    Raw,
}

/// Attributes of overlayfs that have a meaning on their own host alone: file handles and counts.
const OVERLAY_NOTES: [&[u8]; 5] = [b"origin", b"impure", b"nlink", b"upper", b"uuid"];

/// Whether an extended attribute belongs to what it is set on, and not to the host: labels of SELinux are the policy of a
/// host.
pub(crate) fn travels(name: &[u8]) -> bool {
    let overlay = [&b"trusted.overlay."[..], b"user.overlay."];
    let own = overlay.iter().find_map(|prefix| name.strip_prefix(*prefix));
    name != LABEL && own.is_none_or(|own| !OVERLAY_NOTES.contains(&own))
}

/// Extended attributes: names and values.
pub(super) type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// What kind of file it is, as far as marks go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Directory,
    /// A plain file of so many bytes.
    File(u64),
    /// A character device: major and minor number.
    Device(u64, u64),
    Other,
}

/// What becomes of a file of a layer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    /// It hides the file of this name below.
    Whiteout,
    /// It is part of the layer.
    Keep(LayerEntry),
}

/// A file that is part of the layer.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct LayerEntry {
    /// A directory that hides what lies below it.
    pub(super) opaque: bool,
    /// A directory whose whiteouts are empty files with an attribute.
    pub(super) attribute_whiteouts: bool,
    /// Its contents are elsewhere: only the mount shows them.
    pub(super) from_mount: bool,
    /// Its extended attributes without those of overlayfs, sorted by name.
    pub(super) xattrs: Xattrs,
}

/// Why a name cannot be part of a layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct ReservedName;

impl fmt::Display for ReservedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("names that begin with .wh. mean a deletion in a layer of an image: rename it")
    }
}

/// Whether a name may stand in a layer.
pub(super) fn allowed(name: &[u8]) -> Result<(), ReservedName> {
    match name.starts_with(WHITEOUT) {
        true => Err(ReservedName),
        false => Ok(()),
    }
}

/// An attribute as overlayfs reads it.
enum Attribute<'a> {
    /// One of its own, without its prefix.
    Own(&'a [u8]),
    /// One that a process has set in the mount: its name there.
    Escaped(Vec<u8>),
    /// One that has nothing to do with it.
    Foreign,
}

impl Marks {
    /// The marks of a mount with or without `userxattr`.
    pub(super) fn of_mount(userxattr: bool) -> Marks {
        match userxattr {
            true => Marks::User,
            false => Marks::Trusted,
        }
    }

    fn read(self, name: &[u8]) -> Attribute<'_> {
        let prefixes: &[&[u8]] = match self {
            Marks::Trusted => &[b"trusted.overlay."],
            Marks::User => &[b"user.overlay."],
            Marks::Either => &[b"trusted.overlay.", b"user.overlay."],
            Marks::None | Marks::Raw => &[],
        };
        for prefix in prefixes {
            if let Some(own) = name.strip_prefix(*prefix) {
                return match own.strip_prefix(b"overlay.") {
                    Some(escaped) => Attribute::Escaped([*prefix, escaped].concat()),
                    None => Attribute::Own(own),
                };
            }
        }
        Attribute::Foreign
    }

    /// What becomes of a file of this kind with these attributes. `attribute_whiteouts`: its directory has them.
    pub(super) fn judge(self, kind: Kind, found: Xattrs, attribute_whiteouts: bool) -> Verdict {
        if !matches!(self, Marks::None | Marks::Raw) && kind == Kind::Device(0, 0) {
            return Verdict::Whiteout;
        }
        let mut kept = LayerEntry::default();
        for (name, value) in found {
            match self.read(&name) {
                Attribute::Own(b"whiteout") if attribute_whiteouts && kind == Kind::File(0) => {
                    return Verdict::Whiteout;
                }
                Attribute::Own(b"opaque") if kind == Kind::Directory => {
                    kept.opaque |= value == b"y";
                    kept.attribute_whiteouts |= value == b"x";
                }
                Attribute::Own(b"redirect" | b"metacopy") => kept.from_mount = true,
                Attribute::Own(_) => {}
                Attribute::Escaped(name) => kept.xattrs.push((name, value)),
                Attribute::Foreign if self == Marks::Raw && !travels(&name) => {}
                Attribute::Foreign if name == LABEL => {}
                Attribute::Foreign => kept.xattrs.push((name, value)),
            }
        }
        kept.xattrs.sort();
        Verdict::Keep(kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn xattrs(list: &[(&str, &str)]) -> Xattrs {
        let own =
            |(name, value): &(&str, &str)| (name.as_bytes().to_vec(), value.as_bytes().to_vec());
        list.iter().map(own).collect()
    }

    fn kept(verdict: Verdict) -> LayerEntry {
        match verdict {
            Verdict::Keep(kept) => kept,
            Verdict::Whiteout => panic!("a whiteout"),
        }
    }

    #[test]
    fn a_device_of_number_zero_is_a_whiteout_in_a_layer_alone() {
        let device = Kind::Device(0, 0);
        for marks in [Marks::Trusted, Marks::User, Marks::Either] {
            assert_eq!(marks.judge(device, Vec::new(), false), Verdict::Whiteout);
            let null = kept(marks.judge(Kind::Device(1, 3), Vec::new(), false));
            assert_eq!(null, LayerEntry::default());
        }
        assert_eq!(
            kept(Marks::None.judge(device, Vec::new(), false)),
            LayerEntry::default()
        );
    }

    #[test]
    fn whiteouts_by_attribute_count_where_the_directory_says_so() {
        let file = || xattrs(&[("trusted.overlay.whiteout", "")]);
        let judge = |kind, dir| Marks::Trusted.judge(kind, file(), dir);
        assert_eq!(judge(Kind::File(0), true), Verdict::Whiteout);
        assert_eq!(kept(judge(Kind::File(0), false)), LayerEntry::default());
        assert_eq!(kept(judge(Kind::File(1), true)), LayerEntry::default());
        let dir = xattrs(&[("trusted.overlay.opaque", "x")]);
        let dir = kept(Marks::Trusted.judge(Kind::Directory, dir, false));
        assert!(dir.attribute_whiteouts && !dir.opaque);
    }

    #[test]
    fn marks_of_the_other_namespace_are_contents() {
        let both = || {
            xattrs(&[
                ("user.overlay.opaque", "y"),
                ("trusted.overlay.opaque", "y"),
            ])
        };
        let trusted = kept(Marks::Trusted.judge(Kind::Directory, both(), false));
        assert!(trusted.opaque);
        assert_eq!(trusted.xattrs, xattrs(&[("user.overlay.opaque", "y")]));
        let user = kept(Marks::User.judge(Kind::Directory, both(), false));
        assert_eq!(user.xattrs, xattrs(&[("trusted.overlay.opaque", "y")]));
        assert!(
            kept(Marks::Either.judge(Kind::Directory, both(), false))
                .xattrs
                .is_empty()
        );
        for marks in [Marks::None, Marks::Raw] {
            let none = kept(marks.judge(Kind::Directory, both(), false));
            assert_eq!((none.opaque, none.xattrs.len()), (false, 2));
            kept(marks.judge(Kind::Device(0, 0), Vec::new(), false));
        }
        let note = || xattrs(&[("trusted.overlay.origin", "handle")]);
        let raw = kept(Marks::Raw.judge(Kind::Directory, note(), false));
        assert!(raw.xattrs.is_empty());
    }

    #[test]
    fn what_an_inner_overlay_set_is_told_by_its_own_name() {
        let found = xattrs(&[
            ("trusted.overlay.overlay.opaque", "y"),
            ("trusted.overlay.origin", "handle"),
            ("security.capability", "caps"),
            ("security.selinux", "label"),
        ]);
        let kept = kept(Marks::Trusted.judge(Kind::Directory, found, false));
        let wanted = [
            ("security.capability", "caps"),
            ("trusted.overlay.opaque", "y"),
        ];
        assert_eq!(kept.xattrs, xattrs(&wanted));
        assert!(!kept.opaque);
    }

    #[test]
    fn notes_of_overlayfs_and_labels_stay() {
        assert!(!travels(b"security.selinux") && !travels(b"trusted.overlay.origin"));
        for name in [
            &b"trusted.overlay.opaque"[..],
            b"user.overlay.redirect",
            b"security.capability",
            b"trusted.overlay.overlay.origin",
        ] {
            assert!(travels(name));
        }
    }

    #[test]
    fn contents_that_are_elsewhere_are_told() {
        for mark in ["trusted.overlay.redirect", "trusted.overlay.metacopy"] {
            let found = xattrs(&[(mark, "")]);
            assert!(kept(Marks::Trusted.judge(Kind::File(9), found, false)).from_mount);
        }
    }

    #[test]
    fn names_that_mean_deletions_are_refused() {
        assert!(allowed(b".wh.a").is_err() && allowed(OPAQUE).is_err());
        assert!(allowed(b".whale").is_ok() && allowed(b"a.wh.").is_ok());
    }
}
