//! Trees of files, to be compared.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// Attributes and contents of all files of a tree, as text. Directories of commands are left out.
fn describe(root: &Path) -> Result<BTreeMap<PathBuf, String>> {
    let (mut found, mut first) = (BTreeMap::new(), BTreeMap::new());
    let mut left = vec![PathBuf::new()];
    while let Some(path) = left.pop() {
        let at = root.join(&path);
        let meta = fs::symlink_metadata(&at).with_context(|| at.display().to_string())?;
        let mut contents = Vec::new();
        if meta.is_dir() && path != Path::new("control") {
            let names = fs::read_dir(&at)?.map(|entry| Ok(path.join(entry?.file_name())));
            let mut names = names.collect::<Result<Vec<_>>>()?;
            names.sort();
            left.extend(names.into_iter().rev());
        } else if meta.is_file() {
            contents = fs::read(&at)?;
        } else if meta.is_symlink() {
            contents = fs::read_link(&at)?.as_os_str().as_bytes().to_vec();
        }
        let xattrs: Vec<_> = xattr::list(&at)?.collect();
        let key = (meta.dev(), meta.ino());
        let same_as = first.entry(key).or_insert_with(|| path.clone()).clone();
        // Runtimes make a mount point in the root for a moment, CRIU a deleted file in `data`, and commands are written to
        // `control`.
        let is_touched = ["", "data", "control"].map(Path::new).contains(&&*path);
        let mtime = match is_touched {
            true => (0, 0),
            false => (meta.mtime(), meta.mtime_nsec()),
        };
        let sum = contents.iter().fold(7_u64, |sum, byte| {
            (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let text = format!(
            "{:o} {}:{} {mtime:?} {xattrs:?} {} {sum:x} {same_as:?}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            contents.len()
        );
        found.insert(path, text);
    }
    Ok(found)
}

/// Fails unless both trees hold the same files.
pub(crate) fn expect_same_trees(a: &Path, b: &Path) -> Result<()> {
    let (wanted, found) = (describe(a)?, describe(b)?);
    for (path, wanted) in &wanted {
        let found = found.get(path);
        ensure!(
            found == Some(wanted),
            "{}: {found:?} instead of {wanted}",
            path.display()
        );
    }
    ensure!(
        found.len() == wanted.len(),
        "{found:?} instead of {wanted:?}"
    );
    Ok(())
}
