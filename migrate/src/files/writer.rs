//! Carries operations out on a tree on disk. Nothing is written outside of it, whatever an operation says.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, FallocateFlags, OFlag, fallocate, openat, renameat};
use nix::sys::stat::{
    FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmodat, mkdirat, mknodat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, syncfs, unlinkat};
use pageferry::error::{Error, Kind as ErrorKind, Result};

use super::attributes::Attributes;
use super::hash::BlockHasher;
use super::index::{BLOCK_BYTES, Index, Kind};
use super::operation::{Made, Operation};
use super::path::{parent, split};
use super::tree_dir::{TreeDir, path_at, xattrs};

/// Permissions of what is made, until its attributes are set.
const FILE_MODE: Mode = Mode::from_bits_truncate(0o600);
const DIRECTORY_MODE: Mode = Mode::from_bits_truncate(0o700);

/// See the module's text.
#[derive(Debug)]
pub(super) struct Writer {
    root: TreeDir,
    /// Where files are that have no name in the tree for a while: on the same file system.
    parking: TreeDir,
    hasher: BlockHasher,
    /// What the tree holds; `None` after an operation that failed half-way.
    index: Option<Index>,
    /// The directory and the file of the last operation.
    dir: Option<(Vec<u8>, OwnedFd)>,
    file: Option<(Vec<u8>, File)>,
}

impl Writer {
    /// Of the tree at `root`, which holds what `index` says.
    pub(super) fn new(
        root: TreeDir,
        parking: TreeDir,
        hasher: BlockHasher,
        index: Index,
    ) -> Writer {
        Writer {
            root,
            parking,
            hasher,
            index: Some(index),
            dir: None,
            file: None,
        }
    }

    /// What the tree holds; `None` if it must be looked at again.
    pub(super) fn index(&self) -> Option<&Index> {
        self.index.as_ref()
    }

    /// Carries an operation out.
    pub(super) fn apply(&mut self, operation: &Operation) -> Result<()> {
        let Some(index) = &mut self.index else {
            let text = "an earlier operation on the tree failed: ask for its index again";
            return Err(Error::new(ErrorKind::Usage, text));
        };
        let hasher = &self.hasher;
        index
            .apply(operation, &|block| hasher.hash(block))
            .map_err(|error| Error::wrap(ErrorKind::Protocol, "an operation on files", error))?;
        self.carry_out(operation).map_err(|error| {
            self.index = None;
            Error::file("change", &self.root.shown(operation.path()), error)
        })
    }

    /// Ends a series of operations.
    pub(super) fn settle(&mut self) {
        (self.dir, self.file) = (None, None);
        if let Some(index) = &mut self.index {
            index.forget_nameless();
        }
    }

    /// Returns when all that was written is on the disk.
    pub(super) fn sync(&self) -> Result<()> {
        // One call for all files and all names. It reports errors of earlier writing too (Linux 5.8).
        let synced = syncfs(self.root.fd());
        synced.map_err(|errno| Error::file("sync", &self.root.shown(b""), errno))
    }

    fn carry_out(&mut self, operation: &Operation) -> io::Result<()> {
        use Operation::{Data, Size, Zeros};
        if !matches!(operation, Size { .. } | Data { .. } | Zeros { .. }) {
            // Its name may be another file's from here on.
            self.file = None;
        }
        match operation {
            Operation::Park { path, slot } => {
                let to = slot.to_string();
                let parking = self.parking.fd().try_clone()?;
                let (from, name) = self.place(path)?;
                renameat(from, name, parking, to.as_bytes())?;
            }
            Operation::Place { slot, path } => {
                let parked = slot.to_string();
                let parking = self.parking.fd().try_clone()?;
                let (to, name) = self.place(path)?;
                renameat(parking, parked.as_bytes(), to, name)?;
            }
            Operation::Remove { path } => self.remove(path)?,
            Operation::Make { path, made } => self.make(path, made)?,
            Operation::Link { from, path } => {
                let old = self.root.dir(parent(from).unwrap_or_default())?;
                let (_, old_name) = split(from).unwrap_or_default();
                let (to, name) = self.place(path)?;
                linkat(old, old_name, to, name, AtFlags::empty())?;
            }
            Operation::Size { path, size } => self.open(path)?.set_len(*size)?,
            Operation::Data { path, first, data } => {
                self.open(path)?.write_all_at(data, first * BLOCK_BYTES)?;
            }
            Operation::Zeros {
                path,
                first,
                blocks,
            } => self.zero(path, first * BLOCK_BYTES, blocks * BLOCK_BYTES)?,
            Operation::Attributes { path, attributes } => self.describe(path, attributes)?,
        }
        Ok(())
    }

    /// The open directory of a path, and the name in it.
    fn place<'a>(&mut self, path: &'a [u8]) -> io::Result<(&OwnedFd, &'a [u8])> {
        let (parent, name) = split(path).unwrap_or((b"", b"."));
        if self.dir.as_ref().is_none_or(|(open, _)| open != parent) {
            self.dir = Some((parent.to_vec(), self.root.dir(parent)?));
        }
        match &self.dir {
            Some((_, fd)) => Ok((fd, name)),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Opens a plain file for writing.
    fn open(&mut self, path: &[u8]) -> io::Result<&File> {
        if self.file.as_ref().is_none_or(|(open, _)| open != path) {
            let file = self.root.file(path, OFlag::O_WRONLY)?;
            self.file = Some((path.to_vec(), file));
        }
        match &self.file {
            Some((_, file)) => Ok(file),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn remove(&mut self, path: &[u8]) -> io::Result<()> {
        // Either may be what is removed here.
        (self.dir, self.file) = (None, None);
        let (dir, name) = self.place(path)?;
        match unlinkat(dir, name, UnlinkatFlags::NoRemoveDir) {
            Err(Errno::EISDIR) => unlinkat(dir, name, UnlinkatFlags::RemoveDir)?,
            removed => removed?,
        }
        Ok(())
    }

    fn make(&mut self, path: &[u8], made: &Made) -> io::Result<()> {
        let (dir, name) = self.place(path)?;
        match made {
            Made::Directory => mkdirat(dir, name, DIRECTORY_MODE)?,
            Made::File => {
                let flags = OFlag::O_CREAT
                    | OFlag::O_EXCL
                    | OFlag::O_WRONLY
                    | OFlag::O_NOFOLLOW
                    | OFlag::O_CLOEXEC;
                let file = openat(dir, name, flags, FILE_MODE)?;
                self.file = Some((path.to_vec(), File::from(file)));
            }
            Made::Symlink(target) => symlinkat(target.as_slice(), dir, name)?,
            Made::Fifo => mknodat(dir, name, SFlag::S_IFIFO, FILE_MODE, 0)?,
            Made::Socket => mknodat(dir, name, SFlag::S_IFSOCK, FILE_MODE, 0)?,
            Made::CharDevice(number) => mknodat(dir, name, SFlag::S_IFCHR, FILE_MODE, *number)?,
            Made::BlockDevice(number) => mknodat(dir, name, SFlag::S_IFBLK, FILE_MODE, *number)?,
        }
        Ok(())
    }

    /// Makes a hole.
    fn zero(&mut self, path: &[u8], at: u64, length: u64) -> io::Result<()> {
        let file = self.open(path)?;
        let size = file.metadata()?.len();
        let length = length.min(size.saturating_sub(at));
        if length == 0 {
            return Ok(());
        }
        let offset = |bytes: u64| i64::try_from(bytes).map_err(|_| io::ErrorKind::FileTooLarge);
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match fallocate(file, flags, offset(at)?, offset(length)?) {
            Err(Errno::EOPNOTSUPP) => {}
            punched => return Ok(punched?),
        }
        let zeros = vec![0; usize::try_from(BLOCK_BYTES.min(length)).unwrap_or(0)];
        let (mut at, end) = (at, at + length);
        while at < end {
            let part = usize::try_from(end - at)
                .unwrap_or(usize::MAX)
                .min(zeros.len());
            file.write_all_at(zeros.get(..part).unwrap_or_default(), at)?;
            at += part as u64;
        }
        Ok(())
    }

    fn describe(&mut self, path: &[u8], attributes: &Attributes) -> io::Result<()> {
        let is_link = {
            let node = self.index.as_ref().and_then(|index| index.at(path));
            node.is_some_and(|node| matches!(node.kind, Kind::Symlink(_)))
        };
        let (dir, name) = self.place(path)?;
        let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
        // Each takes something away from those that follow: a new owner file capabilities, a mode entries of an ACL.
        fchownat(
            dir,
            name,
            Some(uid),
            Some(gid),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        )?;
        if !is_link {
            let mode = Mode::from_bits_truncate(attributes.mode);
            fchmodat(dir, name, mode, FchmodatFlags::FollowSymlink)?;
        }
        set_xattrs(&path_at(dir, name), attributes)?;
        let (seconds, nanoseconds) = attributes.mtime;
        let mtime = TimeSpec::new(seconds, i64::from(nanoseconds));
        let flags = UtimensatFlags::NoFollowSymlink;
        utimensat(dir, name, &TimeSpec::UTIME_OMIT, &mtime, flags)?;
        Ok(())
    }
}

/// Makes the extended attributes of a file those that are wanted.
fn set_xattrs(path: &PathBuf, wanted: &Attributes) -> io::Result<()> {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    let now = xattrs(path)?;
    for (name, _) in &now {
        if !wanted.xattrs.iter().any(|(wanted, _)| wanted == name) {
            xattr::remove(path, OsStr::from_bytes(name))?;
        }
    }
    for pair in &wanted.xattrs {
        // One that is there already may not be allowed to be set again.
        if !now.contains(pair) {
            xattr::set(path, OsStr::from_bytes(&pair.0), &pair.1)?;
        }
    }
    Ok(())
}
