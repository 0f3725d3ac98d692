//! A `pages-*.img`: raw page data without any header, read by offset.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::open::open_regular;
use crate::error::{Error, Result};
use crate::sys::mapping::Mapping;

/// An open pages file.
#[derive(Debug)]
pub struct PagesFile {
    path: PathBuf,
    file: File,
    mapping: Mapping,
    len: u64,
}

impl PagesFile {
    /// Opens and maps the file. `Ok(None)` if there is none.
    pub fn open(path: &Path) -> Result<Option<PagesFile>> {
        let file = match open_regular(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::file("open", path, error)),
        };
        let measured = file.metadata().and_then(|metadata| {
            let len = metadata.len();
            Ok((len, Mapping::new(&file, len)?))
        });
        let (len, mapping) = measured.map_err(|error| Error::file("map", path, error))?;
        Ok(Some(PagesFile {
            path: path.to_path_buf(),
            file,
            mapping,
            len,
        }))
    }

    /// Where the file is, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file, for `sendfile` and the like.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Its length in bytes when it was opened.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it held nothing when it was opened.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether the file is as long as when it was opened: within the last page of a shorter one its mapping would
    /// show zeros.
    pub fn is_whole(&self) -> bool {
        let now = self.file.metadata().map_or(0, |metadata| metadata.len());
        now >= self.len
    }

    /// `len` bytes from `offset` on, for system calls alone: see [`crate::sys::mapping`].
    pub fn mapped(&self, offset: u64, len: usize) -> Option<&[u8]> {
        self.mapping.bytes(offset, len)
    }

    /// Fills `out` from `offset` on.
    pub fn read_at(&self, out: &mut [u8], offset: u64) -> Result<()> {
        self.file
            .read_exact_at(out, offset)
            .map_err(|error| Error::file(&format!("read at {offset} from"), &self.path, error))
    }

    /// Asks the kernel to bring `len` bytes from `offset` on into the page cache. A hint: nothing
    /// depends on its success.
    pub fn advise(&self, offset: u64, len: u64) {
        if let (Ok(offset), Ok(len)) = (offset.try_into(), len.try_into()) {
            let _ = posix_fadvise(
                &self.file,
                offset,
                len,
                PosixFadviseAdvice::POSIX_FADV_WILLNEED,
            );
        }
    }
}
