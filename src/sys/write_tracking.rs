//! Which pages of another process are written, by userfaultfd's write protection without messages (WP_ASYNC).
//!
//! A userfaultfd belongs to the memory of the process that made it, whoever holds it. The kernel takes the protection
//! away when its last holder closes it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use super::pagemap::Pagemap;
use super::uffd;
use crate::units::PageRange;

/// UFFD_USER_MODE_ONLY: every user may make such a one. Faults of the kernel's own accesses raise no message, and
/// with WP_ASYNC none does.
pub const USER_MODE_ONLY: u64 = 1;

/// UFFD_FEATURE_WP_ASYNC: a write takes the protection away, and nobody is asked. Linux 6.7.
const WP_ASYNC: u64 = 1 << 15;

/// Bit of a word of /proc/PID/pagemap: the page is protected, so it was not written since it was taken.
pub const PROTECTED: u64 = 1 << 57;

/// UFFDIO_REGISTER_MODE_WP.
pub(super) const MODE_WP: u64 = 1 << 1;

/// The write tracking of one process: it ends when the value is dropped.
#[derive(Debug)]
pub struct WriteTracking {
    uffd: OwnedFd,
    pagemap: Pagemap,
}

impl WriteTracking {
    /// Takes over a fresh userfaultfd of the process with `pid`.
    pub fn begin(uffd: OwnedFd, pid: i32) -> io::Result<WriteTracking> {
        uffd::agree(uffd.as_fd(), WP_ASYNC)?;
        let pagemap = Pagemap::open(Path::new(&format!("/proc/{pid}/pagemap")))?;
        Ok(WriteTracking { uffd, pagemap })
    }

    /// Calls `each` for every run of pages in `range` that has been written since the last call. The pages of a mapping
    /// that is new since then count as written. After an error what was written is not known any more.
    pub fn take_written(&self, range: PageRange, each: impl FnMut(PageRange)) -> io::Result<()> {
        let mut register = Register {
            start: range.start().get(),
            length: range.bytes(),
            mode: MODE_WP,
            ioctls: 0,
        };
        // Where it is registered already, nothing changes.
        // SAFETY: `register` is a valid uffdio_register and outlives the call.
        unsafe { calls::register(self.uffd.as_raw_fd(), &raw mut register) }?;
        self.pagemap.take_written(range, each)
    }
}

/// Whether this kernel has such a tracking: asked of a userfaultfd of this process's own.
pub fn is_supported() -> bool {
    let Ok(uffd) = uffd::make(USER_MODE_ONLY) else {
        return false;
    };
    let pid = std::process::id();
    i32::try_from(pid).is_ok_and(|pid| WriteTracking::begin(uffd, pid).is_ok())
}

/// struct uffdio_register.
#[repr(C)]
pub(super) struct Register {
    pub(super) start: u64,
    pub(super) length: u64,
    pub(super) mode: u64,
    pub(super) ioctls: u64,
}

pub(super) mod calls {
    #![allow(missing_docs)]
    use super::Register;

    nix::ioctl_readwrite!(register, 0xaa, 0x00, Register);
}

/// Whether this kernel marks pages that are written (CONFIG_MEM_SOFT_DIRTY): a page that was just written says so.
pub fn has_soft_dirty(page_shift: u32) -> bool {
    let word = Box::new(std::sync::atomic::AtomicU64::new(1));
    word.store(2, std::sync::atomic::Ordering::SeqCst);
    let address = (&raw const *word).expose_provenance() as u64;
    let mut bytes = [0; 8];
    let read = File::open("/proc/self/pagemap").and_then(|file| {
        use std::os::unix::fs::FileExt;
        file.read_exact_at(&mut bytes, (address >> page_shift) * 8)
    });
    read.is_ok() && u64::from_le_bytes(bytes) & SOFT_DIRTY != 0
}

/// Of a word of /proc/PID/pagemap: written since /proc/PID/clear_refs was.
pub const SOFT_DIRTY: u64 = 1 << 55;

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;
    use std::os::fd::FromRawFd;

    use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

    use super::*;

    #[test]
    fn only_what_is_written_is_told() {
        if !is_supported() {
            eprintln!("skipped: this kernel has no WP_ASYNC");
            return;
        }
        let page = crate::sys::process::page_size().unwrap().bytes();
        let room = NonZeroUsize::new(usize::try_from(64 * page).unwrap()).unwrap();
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses touches nothing that exists.
        let mapped = unsafe { mmap_anonymous(None, room, access, MapFlags::MAP_PRIVATE) }.unwrap();
        let start = mapped.as_ptr().expose_provenance() as u64;
        let range = PageRange::new(start, start + 64 * page);
        let write = |number: u64| {
            let at = mapped
                .as_ptr()
                .wrapping_byte_add(usize::try_from(number * page).unwrap());
            // SAFETY: the page lies in the new mapping, to which nobody else refers.
            unsafe { at.cast::<u8>().write_volatile(1) };
        };
        // SAFETY: the call takes one number and touches no memory.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | 1) };
        // SAFETY: the kernel has just made this descriptor, and nobody else knows of it.
        let uffd = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).unwrap()) };
        let tracking =
            WriteTracking::begin(uffd, i32::try_from(std::process::id()).unwrap()).unwrap();
        let written = || {
            let mut pages = Vec::new();
            let number = |at: u64| (at - start) / page;
            let each = |run: PageRange| {
                pages.extend(number(run.start().get())..number(run.end().get()));
            };
            tracking.take_written(range, each).unwrap();
            pages
        };
        (0..40).for_each(write);
        // A page without memory may count as written, until it has been told.
        let first = written();
        assert!((0..40).all(|page| first.contains(&page)), "{first:?}");
        assert!(written().is_empty());
        // A page that had been written, and one that had none.
        [3, 50].into_iter().for_each(write);
        assert_eq!(written(), [3, 50]);
        assert!(written().is_empty());
        drop(tracking);
        // SAFETY: nobody refers to the mapping any more.
        unsafe { munmap(mapped, room.get()) }.unwrap();
    }
}
