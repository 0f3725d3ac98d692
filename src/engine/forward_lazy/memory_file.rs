//! Where the memory of a dump is kept: a sealed memfd, or a file without a name in `--spill DIR`.
//!
//! All of its room is known and asked for at the start, so that a host or a disk without it says so
//! before a page has moved.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::error::{Error, Kind, Result};

/// What messages call a memfd.
const MEMFD_NAME: &str = "the memory held for lazy clients (a memfd)";

/// What the kernel says that programs may still use, KiB.
const MEMORY_AVAILABLE: &str = "MemAvailable:";

/// See the module's text.
#[derive(Debug)]
pub(super) struct MemoryFile {
    file: File,
    name: PathBuf,
    in_memory: bool,
}

impl MemoryFile {
    /// Room for `bytes` bytes, in memory or in a file in `spill`.
    pub(super) fn new(bytes: u64, spill: Option<&Path>) -> Result<MemoryFile> {
        match spill {
            Some(dir) => MemoryFile::on_disk(bytes, dir),
            None => MemoryFile::in_memory(bytes),
        }
    }

    fn in_memory(bytes: u64) -> Result<MemoryFile> {
        if let Some(available) = available_memory().filter(|available| *available < bytes) {
            let text = format!(
                "the dump's lazy pages are {bytes} bytes, {available} bytes of memory are available: \
                 give --spill DIR to keep them on a disk"
            );
            return Err(Error::new(Kind::Usage, text));
        }
        let failed = |errno| Error::wrap(Kind::Io, "cannot make a memfd", io::Error::from(errno));
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create(c"pageferry-held", flags).map_err(failed)?);
        let file = MemoryFile {
            file,
            name: MEMFD_NAME.into(),
            in_memory: true,
        };
        file.set_len(bytes)?;
        file.add_seals(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW)?;
        Ok(file)
    }

    fn on_disk(bytes: u64, dir: &Path) -> Result<MemoryFile> {
        let made = tempfile::tempfile_in(dir);
        let file = made.map_err(|error| Error::file("make a file in", dir, error))?;
        let file = MemoryFile {
            file,
            name: dir.join("(spilled pages)"),
            in_memory: false,
        };
        let length = libc::off_t::try_from(bytes).unwrap_or(libc::off_t::MAX);
        match fallocate(&file.file, FallocateFlags::empty(), 0, length) {
            Ok(()) => {}
            // Not every file system can; a full disk is then noticed later.
            Err(Errno::EOPNOTSUPP | Errno::EINVAL) => file.set_len(bytes)?,
            Err(errno) => {
                let text = format!(
                    "there is no room for the {bytes} bytes of the dump's lazy pages in {} (--spill)",
                    dir.display()
                );
                return Err(Error::wrap(Kind::Usage, text, io::Error::from(errno)));
            }
        }
        Ok(file)
    }

    fn set_len(&self, bytes: u64) -> Result<()> {
        let set = self.file.set_len(bytes);
        set.map_err(|error| Error::file("set the length of", &self.name, error))
    }

    fn add_seals(&self, seals: SealFlag) -> Result<()> {
        let sealed = fcntl(&self.file, FcntlArg::F_ADD_SEALS(seals));
        sealed
            .map(drop)
            .map_err(|errno| Error::file("seal", &self.name, errno))
    }

    /// Nothing is written any more: memory is sealed against it.
    pub(super) fn seal(&self) -> Result<()> {
        match self.in_memory {
            // Not F_SEAL_WRITE: the kernel refuses that while pages are on their way to clients.
            true => self.add_seals(SealFlag::from_bits_retain(libc::F_SEAL_FUTURE_WRITE)),
            false => Ok(()),
        }
    }

    /// The file, for `sendfile` and the like.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// What messages call it.
    pub(super) fn name(&self) -> &Path {
        &self.name
    }

    /// Fills `out` from `offset` on.
    pub(super) fn read(&self, out: &mut [u8], offset: u64) -> Result<()> {
        let read = self.file.read_exact_at(out, offset);
        read.map_err(|error| Error::file("read", &self.name, error))
    }

    /// Writes `bytes` at `offset`.
    pub(super) fn write(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let written = self.file.write_all_at(bytes, offset);
        written.map_err(|error| Error::file("write", &self.name, error))
    }
}

/// Bytes of memory that are available on this host, if the kernel says.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(MEMORY_AVAILABLE))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_stay_where_they_were_written_and_memory_is_sealed() {
        let dir = tempfile::tempdir().unwrap();
        for spill in [None, Some(dir.path())] {
            let file = MemoryFile::new(3 << 12, spill).unwrap();
            file.write(&[7; 4096], 1 << 12).unwrap();
            file.seal().unwrap();
            let mut page = [0; 4096];
            file.read(&mut page, 1 << 12).unwrap();
            assert_eq!(page, [7; 4096]);
            file.read(&mut page, 2 << 12).unwrap();
            assert_eq!(page, [0; 4096]);
            assert_eq!(file.write(&[1], 0).is_err(), spill.is_none());
        }
        assert_eq!(
            dir.path().read_dir().unwrap().count(),
            0,
            "the file has no name"
        );
    }

    #[test]
    fn a_host_without_the_room_is_refused_with_advice() {
        let error = MemoryFile::new(1 << 60, None).unwrap_err();
        assert!(error.to_string().contains("--spill"), "{error}");
        let dir = tempfile::tempdir().unwrap();
        let error = MemoryFile::new(1 << 60, Some(dir.path())).unwrap_err();
        assert!(error.to_string().contains("--spill"), "{error}");
        assert!(MemoryFile::new(1, Some(&dir.path().join("none"))).is_err());
    }
}
