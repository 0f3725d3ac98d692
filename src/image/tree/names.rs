//! The directory of a tree and the link to it: whether they may be made, and how they are removed.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::super::dir::{ImageDir, PARENT_LINK};
use crate::error::{Error, Kind, Result};

/// Name of the directory with the pages of a tree.
pub(in crate::image) const TREE: &str = "tree";

/// Its name while it is made.
pub(in crate::image) const TREE_PART: &str = ".tree.part";

/// How far it is from a directory of the tree to the directory that the tree is in.
pub(super) const UP: &str = "../..";

/// A parent link while it is made.
const LINK_PART: &str = ".parent.part";

/// Whether `dir` can receive a dump with a tree of its own.
///
/// # Errors
///
/// [`Kind::Usage`]: it has images already.
pub(in crate::image) fn check_empty(dir: &ImageDir) -> Result<()> {
    if dir.path().join(TREE).exists() || !dir.targets()?.is_empty() {
        let there = dir.path().display();
        let text = format!(
            "{there} has images already, and --dedup-tree lays the pages of one dump out in a directory: give an \
             empty one (or --images-dir-template)"
        );
        return Err(Error::new(Kind::Usage, text));
    }
    Ok(())
}

/// Removes what a session that was killed left in `dir`. Nobody else may be writing there.
///
/// The link to a tree is made before the tree has its name, and is on the disk by then. So a tree without the link is
/// somebody else's.
pub(in crate::image) fn remove_stale(dir: &ImageDir) -> Result<()> {
    let (tree, part) = (dir.path().join(TREE), dir.path().join(TREE_PART));
    if leads_into_tree(dir.path())? && dir.targets()?.is_empty() {
        tracing::warn!(
            "removing {}: the session that made it was killed before its pagemaps were there",
            tree.display()
        );
        undo(dir)?;
    }
    if part.exists() {
        tracing::warn!(
            "removing {}, which a session that was killed left behind",
            part.display()
        );
        remove_all(&part)?;
    }
    Ok(())
}

/// Removes the tree that is the parent of `dir`, whose images do not need it. What the parent was before is the parent
/// again.
pub(in crate::image) fn remove_tree(dir: &ImageDir) -> Result<()> {
    let tree = dir.path().join(TREE);
    match leads_into_tree(dir.path())? {
        true => unlink(dir.path(), &tree).and_then(|()| remove_all(&tree)),
        // Whatever has this name is somebody else's.
        false => Ok(()),
    }
}

/// Removes the tree of a session that has failed, whether it has its name or not, if the parent of `dir` leads there.
///
/// Whatever is left if this is cut short is found by [`remove_stale`]: the tree loses its name before the link changes.
pub(super) fn undo(dir: &ImageDir) -> Result<()> {
    let (tree, part) = (dir.path().join(TREE), dir.path().join(TREE_PART));
    if !leads_into_tree(dir.path())? {
        return Ok(());
    }
    if tree.exists() {
        remove_all(&part)?;
        fs::rename(&tree, &part).map_err(|error| Error::file("rename", &tree, error))?;
        sync_names(dir.path())?;
    }
    unlink(dir.path(), &part)?;
    sync_names(dir.path())?;
    remove_all(&part)
}

/// Makes the names in the directory `path` survive a power cut.
pub(super) fn sync_names(path: &Path) -> Result<()> {
    let synced = fs::File::open(path).and_then(|dir| dir.sync_all());
    synced.map_err(|error| Error::file("sync", path, error))
}

/// Removes a directory with all that is in it, if it is there.
pub(super) fn remove_all(path: &Path) -> Result<()> {
    // An empty one goes without being listed, so also when there is no descriptor left.
    if fs::remove_dir(path).is_ok() {
        return Ok(());
    }
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(Error::file("remove", path, error))
        }
        _ => Ok(()),
    }
}

/// What the link at `path` leads to, as it is written; `None` if there is none.
pub(super) fn target_of(path: &Path) -> Result<Option<PathBuf>> {
    match fs::read_link(path) {
        Ok(target) => Ok(Some(target)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::file("read the link", path, error)),
    }
}

/// Makes `target` the parent of the directory `dir`, whatever its parent is.
pub(super) fn link(dir: &Path, target: &Path) -> Result<()> {
    let (part, link) = (dir.join(LINK_PART), dir.join(PARENT_LINK));
    if part.is_symlink() {
        remove(&part)?;
    }
    symlink(target, &part).map_err(|error| Error::file("make the link", &part, error))?;
    fs::rename(&part, &link).map_err(|error| Error::file("rename", &part, error))
}

/// Whether the parent of `dir` is the tree in it.
fn leads_into_tree(dir: &Path) -> Result<bool> {
    let target = target_of(&dir.join(PARENT_LINK))?;
    Ok(target.is_some_and(|target| target.starts_with(TREE)))
}

/// Makes what is behind the tree in `tree` the parent of `dir`.
fn unlink(dir: &Path, tree: &Path) -> Result<()> {
    let mut layer = 1;
    while tree.join((layer + 1).to_string()).is_dir() {
        layer += 1;
    }
    let behind = target_of(&tree.join(layer.to_string()).join(PARENT_LINK))?;
    match behind {
        Some(path) => link(dir, path.strip_prefix(UP).unwrap_or(&path)),
        None => remove(&dir.join(PARENT_LINK)),
    }
}

fn remove(path: &Path) -> Result<()> {
    fs::remove_file(path).map_err(|error| Error::file("remove", path, error))
}
