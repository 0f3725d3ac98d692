//! Paths within a tree, as a peer may say them. Pure.

use pageferry::limits::{FILE_NAME_BYTES_MAX, FILE_PATH_BYTES_MAX};
use thiserror::Error;

/// A path that leads elsewhere, or that no file can have.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("{0:?} is not a path within a tree of files")]
pub(super) struct BadPath(String);

/// Checks a path: names joined by slashes, none of them empty, `.` or `..`. The empty path is the tree's root.
pub(super) fn check(path: &[u8]) -> Result<(), BadPath> {
    let bad = || BadPath(String::from_utf8_lossy(path).chars().take(80).collect());
    if path.len() > FILE_PATH_BYTES_MAX || path.contains(&0) {
        return Err(bad());
    }
    if path.is_empty() {
        return Ok(());
    }
    let is_bad = |name: &[u8]| {
        name.is_empty() || name == b"." || name == b".." || name.len() > FILE_NAME_BYTES_MAX
    };
    match path.split(|byte| *byte == b'/').any(is_bad) {
        true => Err(bad()),
        false => Ok(()),
    }
}

/// The directory of a path; `None` for the root.
pub(super) fn parent(path: &[u8]) -> Option<&[u8]> {
    split(path).map(|(parent, _)| parent)
}

/// The directory of a path, and the name in it; `None` for the root.
pub(super) fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    if path.is_empty() {
        return None;
    }
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => Some((&path[..at], &path[at + 1..])),
        None => Some((b"", path)),
    }
}

/// A name in a directory.
pub(super) fn joined(dir: &[u8], name: &[u8]) -> Vec<u8> {
    match dir.is_empty() {
        true => name.to_vec(),
        false => [dir, b"/", name].concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_leads_out_of_a_tree_is_no_path() {
        for good in ["", "a", "a/b", "...", "a b/\u{fc}"] {
            check(good.as_bytes()).unwrap();
        }
        check(b"a/\xff\xfe").unwrap();
        let long = "n".repeat(FILE_NAME_BYTES_MAX + 1);
        let deep = "d/".repeat(FILE_PATH_BYTES_MAX) + "f";
        for bad in [
            "/", "/a", "a/", "a//b", "..", "a/../b", "./a", "a/.", "a\0b", &long, &deep,
        ] {
            assert!(check(bad.as_bytes()).is_err(), "{bad:.40}");
        }
    }

    #[test]
    fn paths_are_split_at_their_last_slash() {
        assert_eq!(split(b"a/b/c"), Some((&b"a/b"[..], &b"c"[..])));
        assert_eq!(split(b"a"), Some((&b""[..], &b"a"[..])));
        assert_eq!(split(b""), None);
        assert_eq!(joined(b"", b"a"), b"a");
        assert_eq!(joined(b"a/b", b"c"), b"a/b/c");
    }
}
