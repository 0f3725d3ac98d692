//! A pages file while it is written, and places in it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::Error;

/// A pages file that is being written. An operation in flight keeps it open.
#[derive(Debug)]
pub struct PagesPart {
    file: File,
    path: PathBuf,
}

impl AsFd for PagesPart {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl PagesPart {
    /// The part at `path`, which is open as `file`.
    pub(super) fn new(file: File, path: PathBuf) -> PagesPart {
        PagesPart { file, path }
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it is, until it gets its final name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The error for a write that failed: names the file, and the usual way out.
    pub fn write_error(&self, error: impl Into<io::Error>) -> Error {
        let error = error.into();
        let doing = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                "store more pages (make room on the disk and dump again) in"
            }
            _ => "write",
        };
        Error::file(doing, &self.path, error)
    }
}

/// Where the bytes of appended pages go.
#[derive(Clone, Debug)]
pub struct Destination {
    /// The pages file.
    pub part: Arc<PagesPart>,
    /// Offset of the first page in bytes.
    pub offset: u64,
}
