//! userfaultfd: reading what a process's memory does, and filling its pages.
//!
//! Layouts and numbers are those of linux/userfaultfd.h. Results of the filling calls stay signed
//! until they are told apart here: a call may fill a part and then meet an obstacle.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use bytemuck::{Pod, Zeroable};
use nix::errno::Errno;

use crate::units::{PageRange, Vaddr};

/// Messages read with one call at most.
pub const MESSAGES_MAX: usize = 16;

/// What the kernel says about a process's memory.
#[derive(Debug)]
pub enum Event {
    /// A thread touched a page that is missing and waits.
    Fault(Vaddr),
    /// The process forked; the child's memory has this userfaultfd.
    Fork(Uffd),
    /// Memory moved: the pages of `from` are now at `to` and above.
    Remap {
        /// Where the memory was.
        from: PageRange,
        /// Where it begins now.
        to: Vaddr,
    },
    /// The pages were given back (madvise): from now on they read as zero.
    Remove(PageRange),
    /// The mapping is gone.
    Unmap(PageRange),
}

/// Whether filling pages wakes those who wait for them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wake {
    /// It does.
    Now,
    /// It does not: [`Uffd::wake`] will.
    Later,
}

/// UFFDIO_COPY_MODE_DONTWAKE.
const COPY_MODE_DONTWAKE: u64 = 1;

/// What became of an attempt to fill pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Filled {
    /// This many bytes from the start on are filled, and their waiters woken if that was asked for.
    Bytes(u64),
    /// The first page is there already (EEXIST). Its waiters were not woken.
    Present,
    /// An event is unread (EAGAIN): read it, look again where the pages are now, try again.
    Changing,
    /// The first page's mapping is gone, or the range crosses a mapping's border (ENOENT).
    Unmapped,
    /// The process ended (ESRCH).
    Exited,
}

/// A userfaultfd, its handshake done by whoever made it. Non-blocking.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl From<OwnedFd> for Uffd {
    fn from(fd: OwnedFd) -> Uffd {
        Uffd(fd)
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Uffd {
    /// Reads up to [`MESSAGES_MAX`] messages, which `seen` gets in order. Returns how many there
    /// were; 0 if there is nothing to read now.
    pub fn read(&self, mut seen: impl FnMut(Event)) -> io::Result<usize> {
        let mut messages = [Message::zeroed(); MESSAGES_MAX];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut messages);
        let length = match nix::unistd::read(&self.0, bytes) {
            Ok(length) => length,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(0),
            Err(errno) => return Err(errno.into()),
        };
        let count = length / size_of::<Message>();
        for message in &messages[..count] {
            seen(message.event()?);
        }
        Ok(count)
    }

    /// Copies `bytes` to the missing pages from `at` on. `bytes` need not be aligned; its length is
    /// a multiple of the page size.
    pub fn copy(&self, at: Vaddr, bytes: &[u8], wake: Wake) -> io::Result<Filled> {
        let mut call = Copy {
            dst: at.get(),
            src: bytes.as_ptr() as u64,
            len: bytes.len() as u64,
            mode: match wake {
                Wake::Now => 0,
                Wake::Later => COPY_MODE_DONTWAKE,
            },
            copied: 0,
        };
        // SAFETY: `call` is a valid uffdio_copy and outlives the call; the kernel reads `len` bytes
        // at `src`, which `bytes` holds, and writes only to the other process.
        let result = unsafe { calls::copy(self.0.as_raw_fd(), &raw mut call) };
        filled(result, call.copied)
    }

    /// Fills the missing pages of `range` with zero.
    pub fn zero(&self, range: PageRange) -> io::Result<Filled> {
        let mut call = RangeCall::new(range);
        // SAFETY: `call` is a valid uffdio_zeropage and outlives the call.
        let result = unsafe { calls::zeropage(self.0.as_raw_fd(), &raw mut call) };
        filled(result, call.done)
    }

    /// Makes reads of the missing pages of `range` raise SIGBUS (Linux 6.6). An error of kind
    /// `InvalidInput` means that the kernel is older.
    pub fn poison(&self, range: PageRange) -> io::Result<Filled> {
        let mut call = RangeCall::new(range);
        // SAFETY: `call` is a valid uffdio_poison and outlives the call.
        let result = unsafe { calls::poison(self.0.as_raw_fd(), &raw mut call) };
        filled(result, call.done)
    }

    /// Wakes the threads that wait for a page of `range`: they look again.
    pub fn wake(&self, range: PageRange) -> io::Result<()> {
        let mut call = Range {
            start: range.start().get(),
            len: range.bytes(),
        };
        // SAFETY: `call` is a valid uffdio_range and outlives the call.
        let result = unsafe { calls::wake(self.0.as_raw_fd(), &raw mut call) };
        match result {
            Ok(_) | Err(Errno::ENOENT | Errno::ESRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Whether the process lives: its end is not an event. `unused` is a page that is not missing.
    pub fn is_alive(&self, unused: PageRange) -> io::Result<bool> {
        Ok(self.zero(unused)? != Filled::Exited)
    }
}

fn filled(result: nix::Result<i32>, done: i64) -> io::Result<Filled> {
    match (result, u64::try_from(done)) {
        // EAGAIN with a count is a part that was filled before an obstacle.
        (_, Ok(bytes)) if bytes > 0 => Ok(Filled::Bytes(bytes)),
        (Err(Errno::EAGAIN), _) => Ok(Filled::Changing),
        (Err(Errno::EEXIST), _) => Ok(Filled::Present),
        (Err(Errno::ENOENT), _) => Ok(Filled::Unmapped),
        (Err(Errno::ESRCH), _) => Ok(Filled::Exited),
        (Err(errno), _) => Err(errno.into()),
        (Ok(_), _) => Ok(Filled::Changing),
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    arguments: [u64; 3],
}

impl Message {
    fn event(&self) -> io::Result<Event> {
        let [first, second, third] = self.arguments;
        let range = |start: u64, end: u64| {
            (start <= end)
                .then(|| PageRange::new(start, end))
                .ok_or_else(|| {
                    io::Error::other("the kernel says a range that ends below its start")
                })
        };
        match self.event {
            0x12 => Ok(Event::Fault(Vaddr(second))),
            0x13 => {
                let number = (first & 0xffff_ffff) as i32;
                // SAFETY: the kernel has just installed this descriptor for us with the message,
                // and nobody else knows its number.
                Ok(Event::Fork(Uffd(unsafe { OwnedFd::from_raw_fd(number) })))
            }
            0x14 => Ok(Event::Remap {
                from: range(first, first.saturating_add(third))?,
                to: Vaddr(second),
            }),
            0x15 => Ok(Event::Remove(range(first, second)?)),
            0x16 => Ok(Event::Unmap(range(first, second)?)),
            other => Err(io::Error::other(format!(
                "unknown userfaultfd event {other:#x}"
            ))),
        }
    }
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

/// uffdio_zeropage and uffdio_poison look alike.
#[repr(C)]
struct RangeCall {
    range: Range,
    mode: u64,
    done: i64,
}

impl RangeCall {
    fn new(range: PageRange) -> RangeCall {
        RangeCall {
            range: Range {
                start: range.start().get(),
                len: range.bytes(),
            },
            mode: 0,
            done: 0,
        }
    }
}

mod calls {
    #![allow(missing_docs)]
    use super::{Copy, Range, RangeCall};

    nix::ioctl_read!(wake, 0xAA, 0x02, Range);
    nix::ioctl_readwrite!(copy, 0xAA, 0x03, Copy);
    nix::ioctl_readwrite!(zeropage, 0xAA, 0x04, RangeCall);
    nix::ioctl_readwrite!(poison, 0xAA, 0x08, RangeCall);
}

const _: () = assert!(size_of::<Message>() == 32);
const _: () = assert!(size_of::<Range>() == 16);
const _: () = assert!(size_of::<Copy>() == 40);
const _: () = assert!(size_of::<RangeCall>() == 32);
