//! Files mapped for reading, so that the kernel can take pages straight from the page cache.
//!
//! The bytes of a mapping are meant for system calls: `UFFDIO_COPY`, `writev`. If somebody cuts the
//! file while it is mapped, such a call fails with EFAULT, whereas a plain load would raise SIGBUS.
//! So code here and elsewhere hands the slices to the kernel and reads with `pread` what it must
//! look at itself.

use std::fs::File;
use std::io;

use memmap2::{Mmap, MmapOptions};

/// A file's first bytes, mapped read-only.
#[derive(Debug)]
pub struct Mapping {
    map: Mmap,
}

impl Mapping {
    /// Maps the first `len` bytes of `file`. Nothing is read yet. Fails as `mmap(2)` does, or if
    /// `len` does not fit the address space.
    pub fn new(file: &File, len: u64) -> io::Result<Mapping> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::FileTooLarge)?;
        // SAFETY: the file may change under the mapping. Nothing is derived from its content but
        // bytes (any value is valid), and they go to system calls alone, see the module's text.
        let map = unsafe { MmapOptions::new().len(len).map(file)? };
        Ok(Mapping { map })
    }

    /// The `len` bytes from `offset` on, or `None` where the mapping has none. For system calls:
    /// see the module's text.
    pub fn bytes(&self, offset: u64, len: usize) -> Option<&[u8]> {
        let start = usize::try_from(offset).ok()?;
        self.map.get(start..start.checked_add(len)?)
    }
}
