//! An area under a userfaultfd: what can be asked of the kernel for it, beyond what lazy-client asks.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use super::super::uffd::{self, Filled, Uffd};
use super::super::write_tracking::{self, MODE_WP};
use super::{Area, own_userfaultfd};
use crate::units::PageSize;

/// What a userfaultfd is to tell of an area: UFFDIO_REGISTER_MODE_*.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Modes(u64);

impl Modes {
    /// Accesses to missing pages.
    pub const MISSING: Modes = Modes(1);
    /// Writes to pages that are protected.
    pub const WRITE_PROTECTED: Modes = Modes(MODE_WP);
    /// Accesses to pages that the file has and the mapping has not.
    pub const MINOR: Modes = Modes(1 << 2);

    /// UFFD_FEATURE_PAGEFAULT_FLAG_WP (Linux 5.7).
    pub const FEATURE_WP: u64 = 1;
    /// UFFD_FEATURE_MINOR_SHMEM (Linux 5.14).
    pub const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
    /// UFFD_FEATURE_POISON (Linux 6.6).
    pub const FEATURE_POISON: u64 = 1 << 14;
    /// UFFD_FEATURE_MOVE (Linux 6.8).
    pub const FEATURE_MOVE: u64 = 1 << 16;
}

/// UFFDIO_WRITEPROTECT_MODE_WP: protects; without it the protection is taken away, and who waits is woken.
const PROTECT: u64 = 1;

/// An area and the userfaultfd that it is registered with.
#[derive(Debug)]
pub struct Watched {
    // Before the area: nobody waits for an area that is gone.
    uffd: Uffd,
    area: Area,
}

impl Watched {
    /// Registers all of `area` with a new userfaultfd that has the `features`. Reads of that wait for a message
    /// if it `blocks`.
    ///
    /// # Errors
    ///
    /// Of kind `InvalidInput`: the kernel lacks a feature. Else it refuses userfaultfds to this process.
    pub fn new(area: Area, features: u64, modes: Modes, blocks: bool) -> io::Result<Watched> {
        let fd = match blocks {
            true => own_userfaultfd()?,
            false => {
                let flags = libc::O_NONBLOCK.cast_unsigned();
                uffd::make(write_tracking::USER_MODE_ONLY | u64::from(flags))?
            }
        };
        uffd::agree(fd.as_fd(), features)?;
        let range = area.range(0..area.length())?;
        let mut register = write_tracking::Register {
            start: range.start().get(),
            length: range.bytes(),
            mode: modes.0,
            ioctls: 0,
        };
        // SAFETY: `register` is a valid uffdio_register and outlives the call; the range is the area, where nothing of
        // Rust's lies.
        unsafe { write_tracking::calls::register(fd.as_raw_fd(), &raw mut register) }?;
        Ok(Watched {
            uffd: Uffd::from(fd),
            area,
        })
    }

    /// The area.
    pub fn area(&self) -> &Area {
        &self.area
    }

    /// The userfaultfd.
    pub fn uffd(&self) -> &Uffd {
        &self.uffd
    }

    /// Lets the mapping have the pages of a part that the file has (UFFDIO_CONTINUE), and wakes who waits.
    pub fn resume(&self, part: Range<usize>) -> io::Result<Filled> {
        let mut call = uffd::RangeCall::new(self.area.range(part)?);
        // SAFETY: `call` is a valid uffdio_continue and outlives the call.
        let result = unsafe { numbers::resume(self.uffd.as_fd().as_raw_fd(), &raw mut call) };
        uffd::filled(result, call.done)
    }

    /// Takes the pages of a part of `source` away and puts them into the same part of this area (UFFDIO_MOVE).
    pub fn move_from(&self, source: &Area, part: Range<usize>) -> io::Result<Filled> {
        let (to, from) = (self.area.range(part.clone())?, source.range(part)?);
        let mut call = uffd::Copy {
            dst: to.start().get(),
            src: from.start().get(),
            len: to.bytes(),
            mode: 0,
            copied: 0,
        };
        // SAFETY: `call` is a valid uffdio_move and outlives the call; both ranges lie in areas, where nothing of
        // Rust's lies and any byte is a value.
        let result = unsafe { numbers::move_pages(self.uffd.as_fd().as_raw_fd(), &raw mut call) };
        uffd::filled(result, call.copied)
    }

    /// Protects a part from writes, or takes the protection away and wakes who waits (UFFDIO_WRITEPROTECT).
    pub fn protect(&self, part: Range<usize>, on: bool) -> io::Result<()> {
        let range = self.area.range(part)?;
        let mut call = uffd::WriteProtect {
            range: uffd::Range {
                start: range.start().get(),
                len: range.bytes(),
            },
            mode: if on { PROTECT } else { 0 },
        };
        // SAFETY: `call` is a valid uffdio_writeprotect and outlives the call.
        let result =
            unsafe { uffd::calls::writeprotect(self.uffd.as_fd().as_raw_fd(), &raw mut call) };
        result?;
        Ok(())
    }

    /// Ends the registration (UFFDIO_UNREGISTER): who waits goes on, as if there were no userfaultfd.
    pub fn release(&self) -> io::Result<()> {
        let range = self.area.range(0..self.area.length())?;
        let mut call = uffd::Range {
            start: range.start().get(),
            len: range.bytes(),
        };
        // SAFETY: `call` is a valid uffdio_range and outlives the call.
        let result = unsafe { numbers::unregister(self.uffd.as_fd().as_raw_fd(), &raw mut call) };
        result?;
        Ok(())
    }

    /// The part that is the page of an address that a message tells of; `None` if it lies elsewhere.
    pub fn page_at(&self, at: crate::units::Vaddr, page: PageSize) -> Option<Range<usize>> {
        let start = self.area.range(0..0).ok()?.start().get();
        let offset = usize::try_from(page.floor(at.get()).checked_sub(start)?).ok()?;
        let part = offset..offset.checked_add(page.as_usize())?;
        (part.end <= self.area.length()).then_some(part)
    }
}

mod numbers {
    #![allow(missing_docs)]
    use super::uffd::{Copy, Range, RangeCall};

    nix::ioctl_read!(unregister, 0xAA, 0x01, Range);
    nix::ioctl_readwrite!(move_pages, 0xAA, 0x05, Copy);
    nix::ioctl_readwrite!(resume, 0xAA, 0x07, RangeCall);
}
