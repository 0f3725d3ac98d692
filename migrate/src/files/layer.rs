//! What a layer below a container's writable one is called: a digest of all that it holds, which both ends compute.
//!
//! SHA-256 of one record for each name, a directory before what is in it, names in order: string path, u32 number of
//! the earlier name of the same file (from 1; 0: it is the first). Behind a first name: the attributes, a byte for the
//! kind, and what that has. The digest of an archive of the layer would need the archive that it was unpacked from.

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use pageferry::error::{Error, Kind, Result};
use pageferry::limits::{EXPORT_DEPTH_MAX, FILE_BLOCKS_MAX, FILE_NAMES_MAX};
use pageferry::migration::messages::Digest;
use sha2::{Digest as _, Sha256};

use super::index::{BLOCK_BYTES, blocks_of};
use super::operation::{put_attributes, put_string};
use super::path::joined;
use super::scan::{attributes, next_data, read_at};
use super::tree_dir::{TreeDir, open_beneath, path_at};

/// A layer, by what it holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct LayerName {
    pub(crate) digest: Digest,
    /// Of all its files.
    pub(crate) bytes: u64,
}

/// Reads all of the layer in `dir`, which nobody changes.
pub(crate) fn name(dir: &Path) -> Result<LayerName> {
    let failed = |error| Error::file("read", dir, error);
    let root = TreeDir::open(dir).map_err(failed)?;
    let mut walk = Walk {
        root: &root,
        sum: Sha256::new(),
        first: HashMap::new(),
        names: 0,
        bytes: 0,
        blocks: 0,
        block: vec![0; usize::try_from(BLOCK_BYTES).unwrap_or(1 << 14)],
    };
    let top = root.dir(b"").map_err(|errno| failed(errno.into()))?;
    let meta = fs::metadata(path_at(&top, b"")).map_err(failed)?;
    let mut record = Vec::new();
    put_string(&mut record, b"");
    record.extend(0_u32.to_le_bytes());
    put_attributes(&mut record, &*attributes(&meta, &top, b"").map_err(failed)?);
    record.push(DIRECTORY);
    walk.sum.update(&record);
    walk.directory(&top, b"", 0)?;
    Ok(LayerName {
        digest: Digest::of(&walk.sum.finalize().into()),
        bytes: walk.bytes,
    })
}

/// Kinds, as they stand in records.
const DIRECTORY: u8 = 1;
const FILE: u8 = 2;
const SYMLINK: u8 = 3;
const FIFO: u8 = 4;
const SOCKET: u8 = 5;
const CHAR_DEVICE: u8 = 6;
const BLOCK_DEVICE: u8 = 7;

struct Walk<'a> {
    root: &'a TreeDir,
    sum: Sha256,
    /// The numbers of the first names of files, by device and inode.
    first: HashMap<(u64, u64), u32>,
    names: usize,
    bytes: u64,
    blocks: u64,
    block: Vec<u8>,
}

impl Walk<'_> {
    fn failed(&self, path: &[u8], error: io::Error) -> Error {
        Error::file("read", &self.root.shown(path), error)
    }

    fn directory(&mut self, dir: &OwnedFd, path: &[u8], depth: usize) -> Result<()> {
        let names = fs::read_dir(path_at(dir, b"")).and_then(|entries| {
            let names = entries.map(|entry| Ok(entry?.file_name()));
            names.collect::<io::Result<Vec<_>>>()
        });
        let mut names = names.map_err(|error| self.failed(path, error))?;
        names.sort();
        for name in names {
            let below = joined(path, name.as_bytes());
            let child = self.name(dir, name.as_bytes(), &below);
            let child = child.map_err(|error| self.failed(&below, error))?;
            if self.names > FILE_NAMES_MAX
                || self.blocks > FILE_BLOCKS_MAX
                || depth > EXPORT_DEPTH_MAX
            {
                let text = format!(
                    "{} is too large for a layer",
                    self.root.shown(b"").display()
                );
                return Err(Error::new(Kind::Unsupported, text));
            }
            if let Some(child) = child {
                self.directory(&child, &below, depth + 1)?;
            }
        }
        Ok(())
    }

    /// Takes one name in; returns it as a directory to go into if it is one.
    fn name(&mut self, dir: &OwnedFd, name: &[u8], path: &[u8]) -> io::Result<Option<OwnedFd>> {
        self.names += 1;
        let number = u32::try_from(self.names).unwrap_or(u32::MAX);
        let meta = fs::symlink_metadata(path_at(dir, name))?;
        let mut record = Vec::new();
        put_string(&mut record, path);
        let known = match meta.is_dir() {
            true => number,
            false => *self.first.entry((meta.dev(), meta.ino())).or_insert(number),
        };
        if known != number {
            record.extend(known.to_le_bytes());
            self.sum.update(&record);
            return Ok(None);
        }
        record.extend(0_u32.to_le_bytes());
        put_attributes(&mut record, &*attributes(&meta, dir, name)?);
        let child = self.contents(dir, name, &meta, &mut record)?;
        self.sum.update(&record);
        Ok(child)
    }

    fn contents(
        &mut self,
        dir: &OwnedFd,
        name: &[u8],
        meta: &Metadata,
        record: &mut Vec<u8>,
    ) -> io::Result<Option<OwnedFd>> {
        let kind = meta.file_type();
        match kind {
            _ if kind.is_dir() => {
                record.push(DIRECTORY);
                match open_beneath(dir, name, OFlag::O_PATH | OFlag::O_DIRECTORY) {
                    // What is mounted there is no part of the layer.
                    Err(Errno::EXDEV) => {}
                    opened => return Ok(Some(opened?)),
                }
            }
            _ if kind.is_symlink() => {
                record.push(SYMLINK);
                put_string(
                    record,
                    fs::read_link(path_at(dir, name))?.as_os_str().as_bytes(),
                );
            }
            _ if kind.is_fifo() => record.push(FIFO),
            _ if kind.is_socket() => record.push(SOCKET),
            _ if kind.is_char_device() || kind.is_block_device() => {
                record.push(if kind.is_char_device() {
                    CHAR_DEVICE
                } else {
                    BLOCK_DEVICE
                });
                record.extend(meta.rdev().to_le_bytes());
            }
            _ => {
                record.push(FILE);
                record.extend(meta.len().to_le_bytes());
                let opened = open_beneath(dir, name, OFlag::O_RDONLY | OFlag::O_NONBLOCK);
                record.extend(self.file(&File::from(opened?), meta.len())?);
            }
        }
        Ok(None)
    }

    /// The digest of a file's blocks that are not all zeros, each behind its number: the same with holes and without.
    fn file(&mut self, file: &File, size: u64) -> io::Result<[u8; 32]> {
        let mut sum = Sha256::new();
        self.bytes += size;
        self.blocks += blocks_of(size) as u64;
        let mut at = 0;
        while at < size && self.blocks <= FILE_BLOCKS_MAX {
            let Some(data) = next_data(file, at)? else {
                break;
            };
            at = data - data % BLOCK_BYTES;
            let room = usize::try_from(size.saturating_sub(at)).unwrap_or(usize::MAX);
            let wanted = room.min(self.block.len());
            let block = self.block.get_mut(..wanted).unwrap_or_default();
            if read_at(file, block, at)? < wanted {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if block.iter().any(|byte| *byte != 0) {
                sum.update((at / BLOCK_BYTES).to_le_bytes());
                sum.update(block);
            }
            at += BLOCK_BYTES;
        }
        Ok(sum.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn sample(dir: &Path) {
        fs::create_dir_all(dir.join("sub")).unwrap();
        fs::write(dir.join("sub/file"), vec![7; 40_000]).unwrap();
        fs::hard_link(dir.join("sub/file"), dir.join("again")).unwrap();
        symlink("sub", dir.join("link")).unwrap();
        for name in ["sub/file", "sub", "link", ""] {
            let at = dir.join(name);
            let then = std::time::UNIX_EPOCH + std::time::Duration::new(5, 7);
            if name != "link" {
                File::open(&at).unwrap().set_modified(then).unwrap();
            }
        }
        let never = nix::sys::time::TimeSpec::new(1, 0);
        let flag = nix::sys::stat::UtimensatFlags::NoFollowSymlink;
        let link = dir.join("link");
        nix::sys::stat::utimensat(nix::fcntl::AT_FDCWD, &link, &never, &never, flag).unwrap();
    }

    #[test]
    fn equal_layers_have_one_name_and_each_change_makes_another() {
        let tmp = tempfile::tempdir().unwrap();
        let (one, two) = (tmp.path().join("one"), tmp.path().join("two"));
        sample(&one);
        sample(&two);
        let named = name(&one).unwrap();
        assert_eq!((&named, named.bytes), (&name(&two).unwrap(), 40_000));
        let holes = |dir: &Path, whole: bool| {
            let file = File::create(dir.join("holes")).unwrap();
            file.set_len(1 << 20).unwrap();
            if whole {
                fs::write(dir.join("holes"), vec![0; 1 << 20]).unwrap();
            }
            let then = std::time::UNIX_EPOCH;
            file.set_modified(then).unwrap();
            File::open(dir).unwrap().set_modified(then).unwrap();
        };
        holes(&one, false);
        holes(&two, true);
        assert_eq!(name(&one).unwrap(), name(&two).unwrap());
        let mut last = name(&one).unwrap();
        let changes: [&dyn Fn(); 4] = [
            &|| drop(fs::write(one.join("sub/file"), vec![8; 40_000])),
            &|| fs::remove_file(one.join("again")).unwrap(),
            &|| {
                fs::set_permissions(
                    one.join("sub"),
                    std::os::unix::fs::PermissionsExt::from_mode(0o700),
                )
                .unwrap();
            },
            &|| fs::rename(one.join("sub"), one.join("sup")).unwrap(),
        ];
        for change in changes {
            change();
            let now = name(&one).unwrap();
            assert_ne!(now.digest, last.digest);
            last = now;
        }
    }
}
