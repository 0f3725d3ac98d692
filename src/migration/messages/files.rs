//! What is said of files that move along.

use std::path::{Component, Path};

use serde::{Deserialize, Serialize};

/// A tree of files that is to arrive.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FileTree {
    /// Where it goes at the destination; `None`: it is the root file system of the container's bundle.
    pub path: Option<String>,
    /// Whether it takes the place of what is there, whoever made that.
    pub replace: bool,
}

impl FileTree {
    /// Whether it has a place at the destination: a peer may have said anything.
    pub fn is_possible(&self) -> bool {
        let Some(path) = self.path.as_deref().map(Path::new) else {
            return true;
        };
        let mut parts = path.components();
        let is_plain = |part: Component<'_>| matches!(part, Component::Normal(_));
        let has_name = path.file_name().is_some();
        parts.next() == Some(Component::RootDir) && has_name && parts.all(is_plain)
    }
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
        };
        assert!(of("/srv/data").is_possible() && of("/a").is_possible());
        for bad in ["", "/", "data", "../x", "/srv/../etc", "/srv/..", "./a"] {
            assert!(!of(bad).is_possible(), "{bad}");
        }
        let root = FileTree {
            path: None,
            replace: false,
        };
        assert!(root.is_possible());
    }
}
