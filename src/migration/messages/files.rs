//! What is said of files that move along.

use std::collections::HashSet;
use std::path::{Component, Path};

use serde::{Deserialize, Serialize};

use super::Digest;
use crate::limits::OCI_LAYERS_MAX;

/// A tree of files that is to arrive.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FileTree {
    /// Where it goes at the destination; `None`: it is the root file system of the container's bundle.
    pub path: Option<String>,
    /// Whether it takes the place of what is there, whoever made that.
    pub replace: bool,
    /// The layers below, if the tree is the writable one of an overlay; of a container's root alone.
    #[serde(default)]
    pub overlay: Option<OverlayRoot>,
}

/// What an overlay has besides its writable layer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct OverlayRoot {
    /// The layers below the writable one, lowest first, by the digests of all that they hold.
    pub layers: Vec<Digest>,
    /// Its marks are attributes `user.overlay.*`: the mount option `userxattr`.
    pub userxattr: bool,
    /// Directories that were renamed name their old place: the mount option `redirect_dir=on`.
    pub redirect_dir: bool,
}

impl OverlayRoot {
    /// Whether it can be mounted: a peer may have said anything.
    pub fn is_possible(&self) -> bool {
        let mut seen = HashSet::new();
        (1..=OCI_LAYERS_MAX).contains(&self.layers.len())
            && self.layers.iter().all(|layer| seen.insert(layer))
    }
}

impl FileTree {
    /// Whether it has a place at the destination: a peer may have said anything.
    pub fn is_possible(&self) -> bool {
        if let Some(overlay) = &self.overlay
            && (self.path.is_some() || !overlay.is_possible())
        {
            return false;
        }
        self.path.as_deref().is_none_or(is_plain_path)
    }
}

/// Whether a path is absolute, names something below the root, and leads nowhere by `..`.
pub(super) fn is_plain_path(path: &str) -> bool {
    let path = Path::new(path);
    let mut parts = path.components();
    let is_plain = |part: Component<'_>| matches!(part, Component::Normal(_));
    let has_name = path.file_name().is_some();
    parts.next() == Some(Component::RootDir) && has_name && parts.all(is_plain)
}

/// When the root file system of a container is sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RootFiles {
    /// Never: it is at the destination.
    #[default]
    Never,
    /// Unless the destination has one that was not made by a migration.
    Auto,
    /// Always; what is at the destination is replaced.
    Replace,
}

/// Files that are wanted at the destination.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct WantedFiles {
    /// The container's root file system.
    pub root: RootFiles,
    /// Further trees.
    pub volumes: Vec<FileTree>,
    /// The layers of the container's root, if it is an overlay.
    #[serde(default)]
    pub overlay: Option<OverlayRoot>,
}

/// Space where files are to go.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct TreeSpace {
    /// A number of the file system: trees with the same one share its space.
    pub device: u64,
    /// Space in it, bytes.
    pub available_bytes: u64,
    /// Of what is to come, bytes that may be there already: what the tree begins with.
    pub held_bytes: u64,
}

/// Ends the arrival of a tree.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Seal {
    /// SHA-256 of the tree's index, hexadecimal.
    pub digest: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_has_a_place_of_its_own() {
        let of = |path: &str| FileTree {
            path: Some(path.to_owned()),
            replace: true,
            overlay: None,
        };
        assert!(of("/srv/data").is_possible() && of("/a").is_possible());
        for bad in ["", "/", "data", "../x", "/srv/../etc", "/srv/..", "./a"] {
            assert!(!of(bad).is_possible(), "{bad}");
        }
        let root = FileTree {
            path: None,
            replace: false,
            overlay: None,
        };
        assert!(root.is_possible());
    }

    #[test]
    fn an_overlay_has_layers_of_which_none_is_there_twice() {
        let of = |layers: &[u8], path: Option<&str>| FileTree {
            path: path.map(str::to_owned),
            replace: false,
            overlay: Some(OverlayRoot {
                layers: layers.iter().map(|byte| Digest::of(&[*byte; 32])).collect(),
                userxattr: false,
                redirect_dir: false,
            }),
        };
        assert!(of(&[1, 2], None).is_possible());
        assert!(!of(&[1, 2, 1], None).is_possible() && !of(&[], None).is_possible());
        // Of a container's root alone.
        assert!(!of(&[1], Some("/srv/data")).is_possible());
        for bad in ["", "../../etc", "ABC", &"0".repeat(63), &"g".repeat(64)] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }
}
