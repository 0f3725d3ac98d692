//! Memory of this process's own, and userfaultfds over it: for measurements of the kernel's mechanisms.
//!
//! ```text
//!   Area      a mapping in which nothing of Rust's lies; read and written by atomics alone
//!   Watched   an Area, and a userfaultfd that it is registered with: `calls`
//!   RingReader  reads messages by io_uring
//! ```
//!
//! Parts of an area are ranges of bytes from its start. Each is checked to lie in the area.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{self, MapFlags, ProtFlags};

use super::uffd;
use super::write_tracking::USER_MODE_ONLY;
use crate::units::PageRange;

mod calls;
mod ring_reader;

pub use calls::{Modes, Watched};
pub use ring_reader::RingReader;

/// Areas begin at a multiple of this: the size of a huge page on x86-64 and, with pages of 4 KiB, on aarch64.
pub const HUGE_BYTES: usize = 2 << 20;

/// MADV_COLLAPSE of linux/mman.h (Linux 6.1).
const MADV_COLLAPSE: i32 = 25;

/// What is behind an area.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backing {
    /// Private anonymous memory.
    Private,
    /// A memfd, mapped shared.
    Shared,
}

/// A mapping of its own. See the module's text.
#[derive(Debug)]
pub struct Area {
    mapped: NonNull<libc::c_void>,
    mapped_length: usize,
    /// The first aligned byte.
    start: NonNull<u8>,
    length: usize,
    /// What is mapped stays as long as the mapping: kept for who looks at the descriptors of a measurement.
    _file: Option<File>,
}

// SAFETY: the memory belongs to the value, is not moved, and is reached by atomics and system calls alone.
unsafe impl Send for Area {}
// SAFETY: as above.
unsafe impl Sync for Area {}

impl Area {
    /// Maps `length` bytes, a multiple of the page size. No page is there yet, and none becomes huge unasked.
    ///
    /// # Errors
    ///
    /// There is no memory for it, or `length` is 0.
    pub fn new(length: usize, backing: Backing) -> io::Result<Area> {
        let room = length.checked_add(HUGE_BYTES).and_then(NonZeroUsize::new);
        let (Some(room), 1..) = (room, length) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let (mapped, file) = match backing {
            // SAFETY: a new mapping at an address that the kernel chooses touches nothing that exists.
            Backing::Private => unsafe {
                let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
                (mman::mmap_anonymous(None, room, access, flags)?, None)
            },
            Backing::Shared => {
                let file = File::from(memfd_create(c"laboratory", MFdFlags::MFD_CLOEXEC)?);
                file.set_len(room.get() as u64)?;
                // SAFETY: as above.
                let mapped =
                    unsafe { mman::mmap(None, room, access, MapFlags::MAP_SHARED, &file, 0) }?;
                (mapped, Some(file))
            }
        };
        let skipped = mapped.cast::<u8>().align_offset(HUGE_BYTES);
        // SAFETY: less than HUGE_BYTES are skipped, by which the mapping is longer than the area.
        let start = unsafe { mapped.cast::<u8>().add(skipped) };
        let area = Area {
            mapped,
            mapped_length: room.get(),
            start,
            length,
            _file: file,
        };
        // Kernels without huge pages refuse this, and make none.
        _ = area.advise(0..length, libc::MADV_NOHUGEPAGE);
        Ok(area)
    }

    /// Maps `length` bytes of private memory at `address`.
    #[cfg(test)]
    fn at(address: usize, length: usize) -> io::Result<Area> {
        let (address, room) = (NonZeroUsize::new(address), NonZeroUsize::new(length));
        let room = room.ok_or(io::ErrorKind::InvalidInput)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED_NOREPLACE;
        // SAFETY: a new mapping that replaces none touches nothing that exists.
        let mapped = unsafe { mman::mmap_anonymous(address, room, access, flags) }?;
        Ok(Area {
            mapped,
            mapped_length: length,
            start: mapped.cast(),
            length,
            _file: None,
        })
    }

    /// Its bytes.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Where a part lies.
    ///
    /// # Errors
    ///
    /// It does not lie in the area.
    pub fn range(&self, Range { start, end }: Range<usize>) -> io::Result<PageRange> {
        if start > end || end > self.length {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let first = self.start.as_ptr().expose_provenance() as u64;
        Ok(PageRange::new(first + start as u64, first + end as u64))
    }

    /// The byte at `offset`. If its page is missing the caller waits for it, or for whoever serves the userfaultfd.
    /// A poisoned page ends the process.
    ///
    /// # Panics
    ///
    /// `offset` lies outside.
    pub fn load(&self, offset: usize) -> u8 {
        self.byte(offset).load(Ordering::Relaxed)
    }

    /// Writes the byte at `offset`. What waits and ends is as for [`Area::load`].
    ///
    /// # Panics
    ///
    /// `offset` lies outside.
    pub fn store(&self, offset: usize, byte: u8) {
        self.byte(offset).store(byte, Ordering::Relaxed);
    }

    fn byte(&self, offset: usize) -> &AtomicU8 {
        assert!(offset < self.length, "{offset:#x} lies outside of the area");
        // SAFETY: checked to lie in the mapping, which lives as long as the value.
        let at = unsafe { self.start.add(offset) };
        // SAFETY: the byte is mapped for as long as `self` lives, and reached by atomics alone.
        unsafe { AtomicU8::from_ptr(at.as_ptr()) }
    }

    /// Makes all pages of a part missing. Shared memory stays in its file: only the mapping forgets it.
    pub fn forget(&self, part: Range<usize>) -> io::Result<()> {
        self.advise(part, libc::MADV_DONTNEED)
    }

    /// Lets a part be huge if it is asked for.
    pub fn allow_huge(&self, part: Range<usize>) -> io::Result<()> {
        self.advise(part, libc::MADV_HUGEPAGE)
    }

    /// Lets no page of a part become huge.
    pub fn forbid_huge(&self, part: Range<usize>) -> io::Result<()> {
        self.advise(part, libc::MADV_NOHUGEPAGE)
    }

    /// Puts the pages of a part together into huge ones.
    pub fn collapse(&self, part: Range<usize>) -> io::Result<()> {
        self.advise(part, MADV_COLLAPSE)
    }

    fn advise(&self, part: Range<usize>, advice: i32) -> io::Result<()> {
        let (start, length) = (part.start, part.len());
        self.range(part)?;
        // SAFETY: `range` has checked that the part lies in the mapping.
        let at = unsafe { self.start.add(start) };
        // SAFETY: the part lies in the area, where nothing of Rust's lies and any byte is a value.
        let advised = unsafe { libc::madvise(at.as_ptr().cast(), length, advice) };
        Ok(Errno::result(advised).map(drop)?)
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: the mapping is the value's own, and nobody refers to it any more.
        let unmapped = unsafe { mman::munmap(self.mapped, self.mapped_length) };
        debug_assert!(unmapped.is_ok());
    }
}

/// A userfaultfd of this process, with nothing agreed on: any user may have it, as it tells of faults in user mode
/// alone. Reads of it wait for a message.
///
/// # Errors
///
/// The kernel has none, or refuses it.
pub fn own_userfaultfd() -> io::Result<OwnedFd> {
    uffd::make(USER_MODE_ONLY)
}

/// The kernel's features, as [`uffd::features`] tells them, for any user.
///
/// # Errors
///
/// The kernel has no userfaultfd, or refuses it.
pub fn features() -> io::Result<u64> {
    use std::os::fd::AsFd;
    uffd::agree(own_userfaultfd()?.as_fd(), 0)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use bytemuck::Zeroable;

    use super::*;
    use crate::sys::uffd::{Filled, MessageBuffer, Wake};

    const PAGE: usize = 4096;

    #[test]
    fn parts_outside_are_refused() {
        let area = Area::new(4 * PAGE, Backing::Private).unwrap();
        assert!(area.range(0..4 * PAGE).is_ok());
        assert!(area.range(PAGE..5 * PAGE).is_err());
        assert!(area.forget(0..5 * PAGE).is_err());
        let start = area.range(0..PAGE).unwrap().start().get();
        assert_eq!(start % HUGE_BYTES as u64, 0);
        assert!(Area::new(0, Backing::Shared).is_err());
    }

    /// Where vm.mmap_min_addr lets memory begin, threads wait there too.
    #[test]
    fn who_waits_below_64_kib_is_woken_with_all() {
        let page = super::super::process::page_size().unwrap();
        let bytes = page.as_usize();
        let low = [0x4000, 0x8000].map(|at| Area::at(at, bytes).ok());
        for area in low.into_iter().flatten() {
            let Ok(watched) = Watched::new(area, 0, Modes::MISSING, false) else {
                eprintln!("skipped: no memory can be watched there");
                continue;
            };
            let messages = std::thread::scope(|scope| {
                let reader = scope.spawn(|| watched.area().load(0));
                let (mut messages, began) = (0, Instant::now());
                while messages < 2 && began.elapsed() < Duration::from_secs(10) {
                    let room = MessageBuffer::zeroed();
                    let read = watched.uffd().read(&room, |_| {}).unwrap();
                    if messages == 0 && read > 0 {
                        watched.uffd().wake_all(page).unwrap();
                    }
                    messages += read;
                    std::thread::sleep(Duration::from_millis(1));
                }
                let at = watched.area().range(0..bytes).unwrap().start();
                let filled = watched.uffd().copy(at, &vec![7; bytes], Wake::Now).unwrap();
                assert_eq!(filled, Filled::Bytes(page.bytes()));
                assert_eq!(reader.join().unwrap(), 7);
                messages
            });
            assert_eq!(messages, 2, "the thread was not woken");
        }
    }

    #[test]
    fn pages_are_copied_moved_and_continued() {
        let page = super::super::process::page_size().unwrap().as_usize();
        let Ok(has) = features() else {
            eprintln!("skipped: no userfaultfd here");
            return;
        };
        let area = Area::new(4 * page, Backing::Private).unwrap();
        let watched = Watched::new(area, 0, Modes::MISSING, true).unwrap();
        let at = watched.area().range(0..page).unwrap().start();
        let bytes = vec![7; page];
        let filled = watched.uffd().copy(at, &bytes, Wake::Now).unwrap();
        assert_eq!(filled, Filled::Bytes(page as u64));
        assert_eq!(watched.area().load(page - 1), 7);
        if has & Modes::FEATURE_MOVE != 0 {
            let source = Area::new(4 * page, Backing::Private).unwrap();
            source.store(2 * page, 9);
            let moved = watched.move_from(&source, 2 * page..3 * page).unwrap();
            assert_eq!(moved, Filled::Bytes(page as u64));
            assert_eq!(watched.area().load(2 * page), 9);
            assert_eq!(source.load(2 * page), 0);
        }
        if has & Modes::FEATURE_MINOR_SHMEM != 0 {
            let area = Area::new(2 * page, Backing::Shared).unwrap();
            area.store(page, 5);
            area.forget(0..2 * page).unwrap();
            let watched =
                Watched::new(area, Modes::FEATURE_MINOR_SHMEM, Modes::MINOR, true).unwrap();
            let continued = watched.resume(page..2 * page).unwrap();
            assert_eq!(continued, Filled::Bytes(page as u64));
            assert_eq!(watched.area().load(page), 5);
        }
    }
}
