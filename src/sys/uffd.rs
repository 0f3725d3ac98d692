//! userfaultfd: reading what a process's memory does, and filling its pages.
//!
//! Layouts and numbers are those of linux/userfaultfd.h. Results of the filling calls stay signed
//! until they are told apart here: a call may fill a part and then be refused.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use crate::units::{PageRange, PageSize, Vaddr};

pub use super::uffd_messages::{Fault, MESSAGES_MAX, Message, MessageBuffer};

/// What the kernel says about a process's memory.
#[derive(Debug)]
pub enum Event {
    /// A thread touched a page that is missing and waits.
    Fault(Fault),
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

/// Memory of a process lies between 2 to the first and 2 to the last of these: vm.mmap_min_addr is 4096 where
/// programs need memory that low, as Wine does.
const ADDRESS_BITS: std::ops::Range<u32> = 12..57;

/// UFFDIO_COPY_MODE_DONTWAKE.
const COPY_MODE_DONTWAKE: u64 = 1;

/// UFFDIO_WRITEPROTECT_MODE_DONTWAKE.
const WRITEPROTECT_MODE_DONTWAKE: u64 = 2;

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
    /// There is no memory for the page: the process's control group or the file system of the
    /// mapped file is full (ENOMEM, ENOSPC). Room may come, or the process is being killed for it.
    NoRoom,
    /// The bytes to copy cannot be read, or the mapped file ends before the page (EFAULT).
    Unreadable,
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

/// Whether this process may have what `criu restore --lazy-pages` makes: a userfaultfd that tells of
/// faults in the kernel, and of forks.
pub fn check_permitted() -> io::Result<()> {
    handshake(FEATURE_EVENT_FORK).map(drop)
}

/// Names of the kernel's features (UFFD_FEATURE_*), in the order of their bits, from linux/userfaultfd.h.
pub const FEATURES: [&str; 17] = [
    "PAGEFAULT_FLAG_WP",
    "EVENT_FORK",
    "EVENT_REMAP",
    "EVENT_REMOVE",
    "MISSING_HUGETLBFS",
    "MISSING_SHMEM",
    "EVENT_UNMAP",
    "SIGBUS",
    "THREAD_ID",
    "MINOR_HUGETLBFS",
    "MINOR_SHMEM",
    "EXACT_ADDRESS",
    "WP_HUGETLBFS_SHMEM",
    "WP_UNPOPULATED",
    "POISON",
    "WP_ASYNC",
    "MOVE",
];

/// Which features this kernel has: bit N is [`FEATURES`]`[N]`.
///
/// # Errors
///
/// The kernel has no userfaultfd, or refuses it to this process.
pub fn features() -> io::Result<u64> {
    handshake(0)
}

/// Makes a userfaultfd with the features `wanted`; returns those that the kernel has.
fn handshake(wanted: u64) -> io::Result<u64> {
    agree(
        make(libc::O_NONBLOCK.cast_unsigned().into())?.as_fd(),
        wanted,
    )
}

/// Makes a userfaultfd of this process, closed by exec, with further `flags`. Nothing is agreed on yet.
pub(super) fn make(flags: u64) -> io::Result<OwnedFd> {
    let flags = u64::from(libc::O_CLOEXEC.cast_unsigned()) | flags;
    // SAFETY: the call takes one number and touches no memory.
    let made = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let number = i32::try_from(Errno::result(made)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor, and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Agrees on the version of the interface and the features `wanted` of a fresh userfaultfd; returns those that the
/// kernel has.
pub(super) fn agree(uffd: BorrowedFd<'_>, wanted: u64) -> io::Result<u64> {
    let mut call = Api {
        api: UFFD_API,
        features: wanted,
        ioctls: 0,
    };
    // SAFETY: `call` is a valid uffdio_api and outlives the call.
    unsafe { calls::api(uffd.as_raw_fd(), &raw mut call) }?;
    Ok(call.features)
}

impl Uffd {
    /// Reads up to [`MESSAGES_MAX`] messages into the empty `room`; `seen` gets them in order. Returns how
    /// many there were; 0 if there is nothing to read now.
    pub fn read(&self, room: &MessageBuffer, mut seen: impl FnMut(Event)) -> io::Result<usize> {
        let start = room.start().cast();
        // SAFETY: the kernel writes at most the size of the room to it, and all that looks at it are
        // atomics, of which any value is valid.
        let length = unsafe { libc::read(self.0.as_raw_fd(), start, size_of::<MessageBuffer>()) };
        match Errno::result(length) {
            Ok(_) => {}
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(0),
            Err(errno) => return Err(errno.into()),
        }
        let mut count = 0;
        for message in room.messages() {
            count += 1;
            seen(match message? {
                Message::Fault(fault) => Event::Fault(fault),
                // SAFETY: the kernel has just installed this descriptor for us with the message,
                // and nobody else knows its number.
                Message::Fork(number) => Event::Fork(Uffd(unsafe { OwnedFd::from_raw_fd(number) })),
                Message::Remap { from, to } => Event::Remap { from, to },
                Message::Remove(range) => Event::Remove(range),
                Message::Unmap(range) => Event::Unmap(range),
            });
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

    /// Wakes every thread of the process that waits for a page, wherever that is: they look again, so that
    /// faults which somebody else has read are told once more.
    pub fn wake_all(&self, page: PageSize) -> io::Result<()> {
        for bits in ADDRESS_BITS {
            let (start, end) = (1 << bits, 1 << (bits + 1));
            // Where addresses end the kernel refuses the range; on x86-64 they end a page below the power of two.
            let whole = self.wake(PageRange::new(start, end));
            let refused = |error: &io::Error| error.kind() == io::ErrorKind::InvalidInput;
            match whole {
                Err(error) if refused(&error) => {
                    let below = self.wake(PageRange::new(start, end - page.bytes()));
                    if let Err(error) = below
                        && !refused(&error)
                    {
                        return Err(error);
                    }
                }
                woken => woken?,
            }
        }
        Ok(())
    }

    /// Takes the mappings of `range` out of it: from now on the kernel fills what is missing there with zeros. Who waits
    /// for a page of them is woken.
    pub fn unregister(&self, range: PageRange) -> io::Result<()> {
        let mut call = Range {
            start: range.start().get(),
            len: range.bytes(),
        };
        // SAFETY: `call` is a valid uffdio_range and outlives the call.
        let result = unsafe { calls::unregister(self.0.as_raw_fd(), &raw mut call) };
        result.map(drop).map_err(io::Error::from)
    }

    /// Whether the process has ended: the kernel raises no event for that, and the descriptor does not hang
    /// up. Asks to take the write protection off a page at `anywhere`, an aligned address that a process may
    /// map: nothing is protected through this descriptor, so a process that lives refuses it and
    /// nothing of it changes. What a kernel before 5.7 answers, which lacks the call, is no end.
    pub fn has_ended(&self, anywhere: PageRange) -> bool {
        self.probe(anywhere) == Err(Errno::ESRCH)
    }

    /// Whether the process forks, or changes its mappings, and waits until the message of that is read; `anywhere` as
    /// for [`Uffd::has_ended`]. Kernels before 5.7 do not tell.
    pub fn is_changing(&self, anywhere: PageRange) -> bool {
        self.probe(anywhere) == Err(Errno::EAGAIN)
    }

    /// Whether the page `page` of private anonymous memory is in a mapping under a userfaultfd; `None` as long as the process
    /// changes its mappings. Asks for a page that only shared memory can have (UFFDIO_CONTINUE, Linux 5.13), which the kernel
    /// refuses in one way where there is a userfaultfd and in another where there is none. A kernel that lacks the call
    /// says that there is one.
    pub fn is_registered(&self, page: PageRange) -> Option<bool> {
        let mut call = RangeCall::new(page);
        // SAFETY: `call` is a valid uffdio_continue and outlives the call.
        match unsafe { calls::carry_on(self.0.as_raw_fd(), &raw mut call) } {
            Err(Errno::EAGAIN) => None,
            Err(Errno::ENOENT | Errno::ESRCH) => Some(false),
            _ => Some(true),
        }
    }

    /// Takes a write protection away that is not there.
    fn probe(&self, anywhere: PageRange) -> nix::Result<i32> {
        let mut call = WriteProtect {
            range: Range {
                start: anywhere.start().get(),
                len: anywhere.bytes(),
            },
            mode: WRITEPROTECT_MODE_DONTWAKE,
        };
        // SAFETY: `call` is a valid uffdio_writeprotect and outlives the call.
        unsafe { calls::writeprotect(self.0.as_raw_fd(), &raw mut call) }
    }
}

/// What a filling call came to that returned `result` and says that `done` bytes, or minus an errno, are filled.
pub(super) fn filled(result: nix::Result<i32>, done: i64) -> io::Result<Filled> {
    match (result, u64::try_from(done)) {
        // EAGAIN with a count is a part that was filled before a refusal.
        (_, Ok(bytes)) if bytes > 0 => Ok(Filled::Bytes(bytes)),
        (Err(Errno::EAGAIN), _) => Ok(Filled::Changing),
        (Err(Errno::EEXIST), _) => Ok(Filled::Present),
        (Err(Errno::ENOENT), _) => Ok(Filled::Unmapped),
        (Err(Errno::ESRCH), _) => Ok(Filled::Exited),
        (Err(Errno::ENOMEM | Errno::ENOSPC), _) => Ok(Filled::NoRoom),
        (Err(Errno::EFAULT), _) => Ok(Filled::Unreadable),
        (Err(errno), _) => Err(errno.into()),
        (Ok(_), _) => Ok(Filled::Changing),
    }
}

/// UFFD_API, the version of the interface.
const UFFD_API: u64 = 0xAA;

/// UFFD_FEATURE_EVENT_FORK.
const FEATURE_EVENT_FORK: u64 = 1 << 1;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) len: u64,
}

/// uffdio_copy and uffdio_move look alike.
#[repr(C)]
pub(super) struct Copy {
    pub(super) dst: u64,
    pub(super) src: u64,
    pub(super) len: u64,
    pub(super) mode: u64,
    pub(super) copied: i64,
}

#[repr(C)]
pub(super) struct WriteProtect {
    pub(super) range: Range,
    pub(super) mode: u64,
}

/// uffdio_zeropage, uffdio_poison and uffdio_continue look alike.
#[repr(C)]
pub(super) struct RangeCall {
    range: Range,
    mode: u64,
    pub(super) done: i64,
}

impl RangeCall {
    pub(super) fn new(range: PageRange) -> RangeCall {
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

pub(super) mod calls {
    #![allow(missing_docs)]
    use super::{Api, Copy, Range, RangeCall, WriteProtect};

    nix::ioctl_read!(unregister, 0xAA, 0x01, Range);
    nix::ioctl_read!(wake, 0xAA, 0x02, Range);
    nix::ioctl_readwrite!(copy, 0xAA, 0x03, Copy);
    nix::ioctl_readwrite!(zeropage, 0xAA, 0x04, RangeCall);
    nix::ioctl_readwrite!(api, 0xAA, 0x3F, Api);
    nix::ioctl_readwrite!(writeprotect, 0xAA, 0x06, WriteProtect);
    nix::ioctl_readwrite!(carry_on, 0xAA, 0x07, RangeCall);
    nix::ioctl_readwrite!(poison, 0xAA, 0x08, RangeCall);
}

const _: () = assert!(size_of::<Api>() == 24);
const _: () = assert!(size_of::<Range>() == 16);
const _: () = assert!(size_of::<Copy>() == 40);
const _: () = assert!(size_of::<WriteProtect>() == 24);
const _: () = assert!(size_of::<RangeCall>() == 32);
