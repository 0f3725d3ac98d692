//! A summary of a tree of files: what shows that something has changed, without the contents.

use std::collections::{HashSet, VecDeque};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use pageferry::error::{Error, Result};
use sha2::{Digest as _, Sha256};

/// A tree of files as it was at a time, without their contents.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct TreeSummary {
    /// Of all paths, inodes, sizes, owners, modes and times.
    pub(crate) sum: [u8; 32],
    /// Of all files.
    pub(crate) bytes: u64,
    /// The last change of any file, seconds since 1970.
    pub(crate) changed_s: i64,
}

/// Looks at all files of the tree at `root` once. What changes meanwhile may be seen or not.
pub(crate) fn summarize(root: &Path) -> Result<TreeSummary> {
    let mut sum = Sha256::new();
    let (mut bytes, mut changed_s) = (0, i64::MIN);
    let device = fs::symlink_metadata(root).map_err(|error| Error::file("look at", root, error))?;
    let mut todo = VecDeque::from([root.to_owned()]);
    while let Some(dir) = todo.pop_front() {
        let names = match fs::read_dir(&dir) {
            Ok(names) => names,
            // It was removed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound && dir != root => continue,
            Err(error) => return Err(Error::file("read", &dir, error)),
        };
        let mut paths: Vec<PathBuf> = names.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths {
            let meta = match fs::symlink_metadata(&path) {
                Ok(meta) => meta,
                // It was removed meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(Error::file("look at", &path, error)),
            };
            sum.update(path.as_os_str().as_bytes());
            changed_s = changed_s.max(meta.ctime());
            let numbers = [
                i128::from(meta.ino()),
                i128::from(meta.mode()),
                i128::from(meta.uid()) << 32 | i128::from(meta.gid()),
                i128::from(meta.size()),
                i128::from(meta.mtime()) << 32 | i128::from(meta.mtime_nsec()),
                i128::from(meta.ctime()) << 32 | i128::from(meta.ctime_nsec()),
            ];
            for number in numbers {
                sum.update(number.to_le_bytes());
            }
            if meta.is_file() {
                bytes += meta.size();
            }
            // What is mounted there is no part of the image.
            if meta.is_dir() && meta.dev() == device.dev() {
                todo.push_back(path);
            }
        }
    }
    Ok(TreeSummary {
        sum: sum.finalize().into(),
        bytes,
        changed_s,
    })
}

/// Bytes that the tree at `root` takes on its disk; what cannot be looked at takes none.
pub(crate) fn disk_bytes(root: &Path) -> u64 {
    let Ok(top) = fs::symlink_metadata(root) else {
        return 0;
    };
    let (mut bytes, mut seen) = (0_u64, HashSet::new());
    let mut todo = vec![root.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let Ok(meta) = fs::symlink_metadata(entry.path()) else {
                continue;
            };
            // What is mounted there is no part of the tree, and a file with two names takes its room once.
            if meta.dev() != top.dev()
                || !(meta.nlink() < 2 || meta.is_dir() || seen.insert(meta.ino()))
            {
                continue;
            }
            bytes += meta.blocks() * 512;
            if meta.is_dir() {
                todo.push(entry.path());
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_sees_each_change() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path();
        fs::create_dir(dir.join("sub")).unwrap();
        fs::write(dir.join("sub/file"), "one").unwrap();
        let mut last = summarize(dir).unwrap();
        assert_eq!((last, last.bytes), (summarize(dir).unwrap(), 3));
        let changes: [&dyn Fn(); 4] = [
            &|| fs::write(dir.join("sub/file"), "four").unwrap(),
            &|| fs::write(dir.join("more"), "").unwrap(),
            &|| fs::rename(dir.join("more"), dir.join("sub/more")).unwrap(),
            &|| fs::remove_file(dir.join("sub/file")).unwrap(),
        ];
        for change in changes {
            change();
            let now = summarize(dir).unwrap();
            assert_ne!(now, last);
            last = now;
        }
    }

    #[test]
    fn the_room_of_a_tree_is_that_of_its_blocks() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path();
        fs::write(dir.join("file"), vec![1; 1 << 20]).unwrap();
        fs::hard_link(dir.join("file"), dir.join("again")).unwrap();
        let holes = fs::File::create(dir.join("holes")).unwrap();
        holes.set_len(1 << 40).unwrap();
        fs::File::open(dir.join("file"))
            .unwrap()
            .sync_all()
            .unwrap();
        let bytes = disk_bytes(dir);
        assert!((1 << 20..2 << 20).contains(&bytes), "{bytes}");
        assert_eq!(disk_bytes(&dir.join("missing")), 0);
    }
}
