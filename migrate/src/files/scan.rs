//! Looks at a tree on disk: which files have changed since the last scan, and what they hold.
//!
//! | a file | what is done |
//! |---|---|
//! | size, times and inode as before | nothing |
//! | anything else | its attributes are read, and the hashes of its blocks |
//! | changed within the last moments before a scan, or while it was read | read again the next time |
//! | mapped for writing by a process | the same: a write to a mapped page that is dirty already changes no time |
//! | gone, or shorter, while it is read | taken as it is then; the next scan finds the rest |

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::{Whence, lseek};
use pageferry::error::{Error, Kind as ErrorKind, Result};
use pageferry::limits::{EXPORT_DEPTH_MAX, FILE_BLOCKS_MAX};

use super::attributes::Attributes;
use super::hash::BlockHasher;
use super::index::{BLOCK_BYTES, BlockHash, Id, Index, Kind, Node, blocks_of, shown};
use super::path::joined;
use super::tree_dir::{TreeDir, open_beneath, path_at, xattrs};

/// Read at once, bytes.
const READ_BYTES: usize = 256 << 10;

/// The clock of file times goes in steps of up to 10 ms (CONFIG_HZ=100): a write soon after a scan may leave the times
/// as they were.
const FINE_STEP: Duration = Duration::from_millis(50);

/// The same for file systems that keep no nanoseconds.
const COARSE_STEP: Duration = Duration::from_secs(3);

/// What tells that a file has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stamp {
    mode: u32,
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl Stamp {
    fn of(meta: &Metadata) -> Stamp {
        Stamp {
            mode: meta.mode(),
            size: meta.len(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            ctime: (meta.ctime(), meta.ctime_nsec()),
        }
    }

    /// Whether a later change must show in the times.
    fn is_old(&self, now: SystemTime) -> bool {
        let (Ok(seconds), Ok(nanoseconds)) =
            (u64::try_from(self.ctime.0), u32::try_from(self.ctime.1))
        else {
            return true;
        };
        let step = match nanoseconds {
            0 => COARSE_STEP,
            _ => FINE_STEP,
        };
        let changed = UNIX_EPOCH + Duration::new(seconds, nanoseconds);
        // A time that is still to come is that of another host's clock.
        now.duration_since(changed).is_ok_and(|age| age > step)
    }
}

/// A file as it was at the last scan.
#[derive(Debug)]
struct Seen {
    id: Id,
    /// `None`: it is to be read again, whatever its times say.
    stamp: Option<Stamp>,
    node: Node,
    /// Number of the last scan at which it was there.
    scan: u64,
    /// Number of the scan at which it was read.
    read: u64,
}

/// What one scan has found.
#[derive(Debug, Default)]
pub(super) struct ScanResult {
    pub(super) index: Index,
    /// Bytes of contents that were read.
    pub(super) read_bytes: u64,
    /// Files that were read.
    pub(super) read_files: u64,
    /// Names where something else is mounted, which is no part of the tree.
    pub(super) mounts: Vec<String>,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Scanner {
    root: TreeDir,
    hasher: BlockHasher,
    seen: HashMap<(u64, u64), Seen>,
    next: Id,
    scan_number: u64,
    now: SystemTime,
    buffer: Vec<u8>,
}

impl Scanner {
    pub(super) fn new(root: TreeDir, hasher: BlockHasher) -> Scanner {
        Scanner {
            root,
            hasher,
            seen: HashMap::new(),
            next: 0,
            scan_number: 0,
            now: UNIX_EPOCH,
            buffer: vec![0; READ_BYTES],
        }
    }

    pub(super) fn root(&self) -> &TreeDir {
        &self.root
    }

    pub(super) fn hasher(&self) -> &BlockHasher {
        &self.hasher
    }

    /// Looks at all of the tree. Files whose names are `mapped` may change without a sign.
    pub(super) fn scan(&mut self, mapped: &HashSet<OsString>) -> Result<ScanResult> {
        self.scan_number += 1;
        self.now = SystemTime::now();
        let mut result = ScanResult::default();
        let root = || -> io::Result<_> {
            let dir = self.root.dir(b"")?;
            let meta = fs::metadata(path_at(&dir, b""))?;
            let attributes = attributes(&meta, &dir, b"")?;
            Ok((dir, attributes))
        };
        let (dir, attributes) = root().map_err(|error| self.failed(b"", error))?;
        let id = self.next_id();
        let node = Node {
            kind: Kind::Directory,
            attributes: Some(attributes),
        };
        result.index.add_as(id, Vec::new(), node);
        self.directory(&dir, b"", 0, mapped, &mut result)?;
        let now = self.scan_number;
        self.seen.retain(|_, seen| seen.scan == now);
        Ok(result)
    }

    fn failed(&self, path: &[u8], error: io::Error) -> Error {
        Error::file("look at", &self.root.shown(path), error)
    }

    fn next_id(&mut self) -> Id {
        self.next += 1;
        self.next
    }

    fn directory(
        &mut self,
        dir: &OwnedFd,
        path: &[u8],
        depth: usize,
        mapped: &HashSet<OsString>,
        result: &mut ScanResult,
    ) -> Result<()> {
        if depth > EXPORT_DEPTH_MAX {
            let text = format!(
                "{} lies more than {EXPORT_DEPTH_MAX} directories deep",
                self.root.shown(path).display()
            );
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        let entries = fs::read_dir(path_at(dir, b""));
        let names = entries.and_then(|all| {
            all.map(|entry| Ok(entry?.file_name()))
                .collect::<io::Result<Vec<_>>>()
        });
        let names = match names {
            Err(error) if is_gone(&error) => return Ok(()),
            names => names.map_err(|error| self.failed(path, error))?,
        };
        for name in names {
            let below = joined(path, name.as_bytes());
            let found = self.name(dir, &name, &below, mapped, result);
            let found = found.map_err(|error| self.failed(&below, error))?;
            if let Some(child) = found {
                self.directory(&child, &below, depth + 1, mapped, result)?;
            }
            result.index.expect_size().map_err(|error| {
                let text = format!("{} cannot travel", self.root.shown(b"").display());
                Error::wrap(ErrorKind::Unsupported, text, error)
            })?;
        }
        Ok(())
    }

    /// Takes one name in; returns it as a directory to go into if it is one.
    fn name(
        &mut self,
        dir: &OwnedFd,
        name: &OsStr,
        path: &[u8],
        mapped: &HashSet<OsString>,
        result: &mut ScanResult,
    ) -> io::Result<Option<OwnedFd>> {
        let at = path_at(dir, name.as_bytes());
        let meta = match fs::symlink_metadata(&at) {
            Err(error) if is_gone(&error) => return Ok(None),
            meta => meta?,
        };
        let key = (meta.dev(), meta.ino());
        let stamp = Stamp::of(&meta);
        let number = self.scan_number;
        let is_mapped = meta.is_file() && mapped.contains(name);
        if let Some(seen) = self.seen.get_mut(&key).filter(|_| !meta.is_dir()) {
            // Another name of a file that was looked at just now, or one that has not changed.
            let is_known = seen.scan == number || seen.stamp == Some(stamp);
            if is_known && (!is_mapped || seen.read == number) {
                seen.scan = number;
                result
                    .index
                    .add_as(seen.id, path.to_vec(), seen.node.clone());
                return Ok(None);
            }
        }
        let (node, settled, child) = match self.examine(dir, name, path, &meta, result) {
            Err(error) if is_gone(&error) => return Ok(None),
            examined => examined?,
        };
        let id = match self.seen.get(&key) {
            Some(seen) => seen.id,
            None => self.next_id(),
        };
        result.index.add_as(id, path.to_vec(), node.clone());
        let is_sure = settled && stamp.is_old(self.now) && !is_mapped;
        let seen = Seen {
            id,
            stamp: is_sure.then_some(stamp),
            node,
            scan: number,
            read: number,
        };
        self.seen.insert(key, seen);
        Ok(child)
    }

    /// Reads all of a file; tells whether nothing has changed meanwhile.
    fn examine(
        &mut self,
        dir: &OwnedFd,
        name: &OsStr,
        path: &[u8],
        meta: &Metadata,
        result: &mut ScanResult,
    ) -> io::Result<(Node, bool, Option<OwnedFd>)> {
        let name = name.as_bytes();
        let mut node = Node {
            kind: Kind::Fifo,
            attributes: Some(attributes(meta, dir, name)?),
        };
        let kind = meta.file_type();
        let mut settled = true;
        let mut child = None;
        node.kind = match kind {
            _ if kind.is_dir() => {
                match open_beneath(dir, name, OFlag::O_PATH | OFlag::O_DIRECTORY) {
                    Err(Errno::EXDEV) => result.mounts.push(shown(path)),
                    opened => child = Some(opened?),
                }
                Kind::Directory
            }
            _ if kind.is_symlink() => Kind::Symlink(
                fs::read_link(path_at(dir, name))?
                    .into_os_string()
                    .into_vec(),
            ),
            _ if kind.is_fifo() => Kind::Fifo,
            _ if kind.is_socket() => Kind::Socket,
            _ if kind.is_char_device() => Kind::CharDevice(meta.rdev()),
            _ if kind.is_block_device() => Kind::BlockDevice(meta.rdev()),
            _ => match open_beneath(dir, name, OFlag::O_RDONLY | OFlag::O_NONBLOCK) {
                Err(Errno::EXDEV) => {
                    result.mounts.push(shown(path));
                    Kind::empty_file()
                }
                opened => {
                    let file = File::from(opened?);
                    let before = file.metadata()?;
                    let read = self.contents(&file, before.len(), result)?;
                    settled = [&before, &file.metadata()?].map(Stamp::of) == [Stamp::of(meta); 2];
                    result.read_files += 1;
                    read
                }
            },
        };
        Ok((node, settled, child))
    }

    /// Hashes the blocks of a file of `size` bytes; holes are not read.
    fn contents(&mut self, file: &File, size: u64, result: &mut ScanResult) -> io::Result<Kind> {
        let mut size = size;
        if blocks_of(size) as u64 > FILE_BLOCKS_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let mut blocks = vec![BlockHash::ZEROS; blocks_of(size)];
        let mut at = 0;
        while at < size {
            let Some(data) = next_data(file, at)? else {
                break;
            };
            at = data - data % BLOCK_BYTES;
            let room = usize::try_from(size.saturating_sub(at)).unwrap_or(READ_BYTES);
            let wanted = room.min(READ_BYTES);
            let got = read_at(file, self.buffer.get_mut(..wanted).unwrap_or_default(), at)?;
            let block = usize::try_from(BLOCK_BYTES).unwrap_or(READ_BYTES);
            let chunks = self.buffer.get(..got).unwrap_or_default().chunks(block);
            for (hash, number) in chunks.zip(at / BLOCK_BYTES..) {
                let number = usize::try_from(number).unwrap_or(usize::MAX);
                if let Some(place) = blocks.get_mut(number) {
                    *place = self.hasher.hash(hash);
                }
            }
            at += got as u64;
            result.read_bytes += got as u64;
            if got < wanted {
                // It has become shorter.
                size = at;
                blocks.truncate(blocks_of(size));
            }
        }
        Ok(Kind::File(size, Arc::new(blocks)))
    }
}

/// Whether a name has gone while it was looked at, or has become something else.
fn is_gone(error: &io::Error) -> bool {
    let gone = [
        libc::ENOENT,
        libc::ESTALE,
        libc::ENOTDIR,
        libc::ELOOP,
        libc::ENXIO,
    ];
    error
        .raw_os_error()
        .is_some_and(|code| gone.contains(&code))
}

/// Where the next byte is that is in no hole; `None` if there is none.
pub(super) fn next_data(file: &File, at: u64) -> io::Result<Option<u64>> {
    let offset = i64::try_from(at).map_err(|_| io::ErrorKind::FileTooLarge)?;
    match lseek(file, offset, Whence::SeekData) {
        Ok(data) => Ok(u64::try_from(data).ok()),
        Err(Errno::ENXIO) => Ok(None),
        // Not every file system knows holes.
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(Some(at)),
        Err(errno) => Err(errno.into()),
    }
}

/// Reads until the buffer is full or the file ends.
pub(super) fn read_at(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut got = 0;
    while let Some(rest) = buffer.get_mut(got..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, at + got as u64) {
            Ok(0) => break,
            Ok(more) => got += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}

pub(super) fn attributes(
    meta: &Metadata,
    dir: &impl AsRawFd,
    name: &[u8],
) -> io::Result<Arc<Attributes>> {
    Ok(Arc::new(Attributes {
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        // The kernel tells less than a second's worth.
        mtime: (meta.mtime(), u32::try_from(meta.mtime_nsec()).unwrap_or(0)),
        xattrs: xattrs(&path_at(dir, name))?,
    }))
}
