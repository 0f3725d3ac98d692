//! Memory that an operation in flight owns.

use std::io;
use std::ops::{Deref, DerefMut};

use memmap2::MmapMut;

/// Bytes that begin at a page boundary and never move in memory, however the value is moved.
#[derive(Debug)]
pub struct Buffer(MmapMut);

impl Buffer {
    /// A buffer of `bytes` zero bytes.
    pub fn new(bytes: usize) -> io::Result<Buffer> {
        MmapMut::map_anon(bytes).map(Buffer)
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}
