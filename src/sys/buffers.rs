//! Memory that an operation in flight owns.

use std::alloc::{Layout, handle_alloc_error};
use std::io;
use std::ops::{Deref, DerefMut};

use memmap2::{Advice, MmapMut};

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

/// Room for many small things that stay for long, all zeros at first: in huge pages where the kernel has them, so
/// that filling it costs a fault for each 2 MiB and not for each 4 KiB. Like any allocation it ends the process when
/// there is no memory.
#[derive(Debug)]
pub struct Slab(MmapMut);

impl Slab {
    /// A slab of `bytes` bytes.
    pub fn new(bytes: usize) -> Slab {
        let Ok(map) = MmapMut::map_anon(bytes) else {
            handle_alloc_error(Layout::array::<u8>(bytes).unwrap_or(Layout::new::<u8>()));
        };
        // A kernel without huge pages does it in small ones.
        let _ = map.advise(Advice::HugePage);
        Slab(map)
    }
}

impl Deref for Slab {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Slab {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}
