//! Directories of a tree on disk, opened so that no link and no mount point leads out of it.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;

use super::attributes::Xattrs;
use crate::export::travels;

/// Where a tree begins.
#[derive(Debug)]
pub(super) struct TreeDir {
    fd: OwnedFd,
    path: PathBuf,
}

/// How paths within a tree are resolved.
fn beneath(flags: OFlag) -> OpenHow {
    let resolve = ResolveFlag::RESOLVE_BENEATH
        | ResolveFlag::RESOLVE_NO_SYMLINKS
        | ResolveFlag::RESOLVE_NO_MAGICLINKS
        | ResolveFlag::RESOLVE_NO_XDEV;
    let how = OpenHow::new().flags(flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC);
    how.resolve(resolve)
}

/// Opens what `path` leads to below the directory `dir`.
pub(super) fn open_beneath(dir: impl AsFd, path: &[u8], flags: OFlag) -> nix::Result<OwnedFd> {
    let path: &[u8] = if path.is_empty() { b"." } else { path };
    loop {
        match openat2(dir.as_fd(), path, beneath(flags)) {
            // The kernel saw a rename while it looked.
            Err(Errno::EAGAIN) => {}
            other => return other,
        }
    }
}

impl TreeDir {
    pub(super) fn open(path: &Path) -> io::Result<TreeDir> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(TreeDir {
            fd: open(path, flags, Mode::empty())?,
            path: path.to_owned(),
        })
    }

    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// A path of the tree, for messages.
    pub(super) fn shown(&self, path: &[u8]) -> PathBuf {
        self.path.join(OsStr::from_bytes(path))
    }

    /// A directory of the tree, to make and look for names in.
    pub(super) fn dir(&self, path: &[u8]) -> nix::Result<OwnedFd> {
        open_beneath(&self.fd, path, OFlag::O_PATH | OFlag::O_DIRECTORY)
    }

    /// A plain file of the tree.
    pub(super) fn file(&self, path: &[u8], flags: OFlag) -> nix::Result<File> {
        open_beneath(&self.fd, path, flags | OFlag::O_NONBLOCK).map(File::from)
    }
}

/// A path by which a name in an open directory is found, whatever becomes of the directory's own path.
pub(super) fn path_at(dir: &impl AsRawFd, name: &[u8]) -> PathBuf {
    let dir = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
    dir.join(OsStr::from_bytes(if name.is_empty() { b"." } else { name }))
}

/// The extended attributes of a file that travel, sorted by name. Links are not followed.
pub(super) fn xattrs(path: &Path) -> io::Result<Xattrs> {
    let names = match xattr::list(path) {
        // A file system without attributes has none.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(Vec::new()),
        names => names?,
    };
    let mut found = Vec::new();
    for name in names.filter(|name| travels(name.as_bytes())) {
        // One that has been taken away since is none.
        if let Some(value) = xattr::get(path, &name)? {
            found.push((name.as_bytes().to_vec(), value));
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn no_link_leads_out_of_a_tree() {
        let tmp = tempfile::tempdir().unwrap();
        let root = tmp.path().join("tree");
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::write(tmp.path().join("secret"), "outside").unwrap();
        symlink("/etc", root.join("a/absolute")).unwrap();
        symlink("../..", root.join("a/up")).unwrap();
        symlink("b", root.join("a/inside")).unwrap();
        let tree = TreeDir::open(&root).unwrap();
        tree.dir(b"a/b").unwrap();
        tree.dir(b"").unwrap();
        for path in [
            &b"a/absolute"[..],
            b"a/up",
            b"a/inside",
            b"a/up/x",
            b"..",
            b"a/../..",
        ] {
            assert!(tree.dir(path).is_err(), "{path:?}");
        }
        for path in [&b"a/up/secret"[..], b"../secret", b"/etc/passwd"] {
            assert!(tree.file(path, OFlag::O_RDONLY).is_err(), "{path:?}");
        }
    }
}
