//! The test process's raw memory, and the other calls that need `unsafe`.
//!
//! All memory under test lies in one window of addresses that nothing else in the process uses:
//! the Rust heap, stacks and statics are elsewhere. Every function here checks that the range it is
//! given lies in the window, so no call can touch memory that Rust owns. A page of the window that
//! is not mapped, or not writable, raises a signal that ends the process: for a test process that
//! is an answer, not undefined behaviour.
//!
//! This folder has all `unsafe` code of the tests. It is not in the library's `sys`: no program of pageferry makes
//! mappings of every kind, loads from addresses that may fault, or forks in a thread.

#![allow(unsafe_code)]

pub mod mappings;

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::ptr::{self, NonNull};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::mman::{self, MRemapFlags, MapFlags, MmapAdvise, ProtFlags};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::{self, ForkResult};

use crate::load::content::POISON_MARK;

/// Where the memory under test lies. Below 2^39, so that it exists on aarch64 kernels with 39-bit
/// addresses too.
pub const WINDOW: Range<usize> = 0x20_0000_0000..0x60_0000_0000;

/// Bytes of a word of page content.
pub const WORD_BYTES: usize = size_of::<u64>();

/// What backs a new mapping.
#[derive(Clone, Copy, Debug)]
pub enum Backing<'a> {
    /// Private anonymous memory.
    Private,
    /// Shared anonymous memory.
    SharedAnon,
    /// A file, mapped privately.
    PrivateFile(BorrowedFd<'a>),
    /// A file or memfd, mapped shared.
    SharedFile(BorrowedFd<'a>),
    /// Private anonymous memory of huge pages.
    PrivateHuge,
}

fn pointer(address: usize, length: usize) -> NonNull<c_void> {
    let inside = WINDOW.contains(&address)
        && address
            .checked_add(length)
            .is_some_and(|end| end <= WINDOW.end);
    assert!(
        inside,
        "{address:#x}+{length:#x} lies outside of the memory under test"
    );
    NonNull::new(ptr::with_exposed_provenance_mut(address)).expect("the window begins above zero")
}

/// Maps `length` bytes at `address`, readable and writable, where nothing is mapped yet.
pub fn map(address: usize, length: usize, backing: Backing<'_>) -> Result<(), Errno> {
    let at = NonZeroUsize::new(pointer(address, length).as_ptr().addr());
    let length = NonZeroUsize::new(length).ok_or(Errno::EINVAL)?;
    let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let fixed = MapFlags::MAP_FIXED_NOREPLACE;
    let mapped = match backing {
        // SAFETY: the range lies in the window, and FIXED_NOREPLACE replaces nothing.
        Backing::Private => unsafe {
            mman::mmap_anonymous(at, length, prot, fixed | MapFlags::MAP_PRIVATE)
        },
        // SAFETY: as above.
        Backing::SharedAnon => unsafe {
            mman::mmap_anonymous(at, length, prot, fixed | MapFlags::MAP_SHARED)
        },
        // SAFETY: as above.
        Backing::PrivateFile(file) => unsafe {
            mman::mmap(at, length, prot, fixed | MapFlags::MAP_PRIVATE, file, 0)
        },
        // SAFETY: as above.
        Backing::PrivateHuge => unsafe {
            let huge = MapFlags::MAP_PRIVATE | MapFlags::MAP_HUGETLB;
            mman::mmap_anonymous(at, length, prot, fixed | huge)
        },
        // SAFETY: as above.
        Backing::SharedFile(file) => unsafe {
            mman::mmap(at, length, prot, fixed | MapFlags::MAP_SHARED, file, 0)
        },
    };
    mapped.map(drop)
}

/// Makes a System V segment of `length` bytes and attaches it at `address`, where nothing is mapped yet.
/// It goes with the last process that has it. Returns its id.
pub fn map_sysv(address: usize, length: usize) -> Result<i32, Errno> {
    let at = pointer(address, length);
    // SAFETY: takes no pointer.
    let id = unsafe { libc::shmget(libc::IPC_PRIVATE, length, libc::IPC_CREAT | 0o600) };
    Errno::result(id)?;
    // SAFETY: without SHM_REMAP it replaces nothing; the range lies in the window.
    let attached = unsafe { libc::shmat(id, at.as_ptr(), 0) };
    match attached.addr() == address {
        true => Ok(id),
        false => Err(Errno::last()),
    }
}

/// Unmaps a range of the window.
pub fn unmap(address: usize, length: usize) -> Result<(), Errno> {
    // SAFETY: the range lies in the window, to which no Rust object belongs.
    unsafe { mman::munmap(pointer(address, length), length) }
}

/// Moves `old_length` bytes to `to`, making them `new_length` bytes long.
pub fn move_to(
    address: usize,
    old_length: usize,
    new_length: usize,
    to: usize,
) -> Result<(), Errno> {
    let target = Some(pointer(to, new_length));
    let flags = MRemapFlags::MREMAP_MAYMOVE | MRemapFlags::MREMAP_FIXED;
    let from = pointer(address, old_length);
    // SAFETY: both ranges lie in the window, to which no Rust object belongs.
    unsafe { mman::mremap(from, old_length, new_length, flags, target) }.map(drop)
}

/// Makes a range of the window read-only, or writable again.
pub fn protect(address: usize, length: usize, writable: bool) -> Result<(), Errno> {
    let write = if writable {
        ProtFlags::PROT_WRITE
    } else {
        ProtFlags::empty()
    };
    // SAFETY: the range lies in the window, to which no Rust object belongs.
    unsafe {
        mman::mprotect(
            pointer(address, length),
            length,
            ProtFlags::PROT_READ | write,
        )
    }
}

/// Gives the content of a range of the window back, by `MADV_FREE` or `MADV_DONTNEED`.
pub fn give_back(address: usize, length: usize, keep_until_needed: bool) -> Result<(), Errno> {
    let advice = if keep_until_needed {
        MmapAdvise::MADV_FREE
    } else {
        MmapAdvise::MADV_DONTNEED
    };
    // SAFETY: the range lies in the window, to which no Rust object belongs.
    unsafe { mman::madvise(pointer(address, length), length, advice) }
}

/// Reads one word of the window: the access that faults if the page is missing.
pub fn read_word(address: usize) -> u64 {
    let from = pointer(address, WORD_BYTES).cast::<u64>().as_ptr();
    // SAFETY: the word lies in the window; callers give word-aligned addresses of mapped pages.
    unsafe { ptr::read_volatile(from) }
}

/// Copies words out of the window.
pub fn read_words(address: usize, words: &mut [u64]) {
    let from = pointer(address, size_of_val(words)).cast::<u64>().as_ptr();
    // SAFETY: `from` lies in the window, `words` outside of it, and both are that long.
    unsafe { ptr::copy_nonoverlapping(from, words.as_mut_ptr(), words.len()) }
}

/// Copies words into the window.
pub fn write_words(address: usize, words: &[u64]) {
    let to = pointer(address, size_of_val(words)).cast::<u64>().as_ptr();
    // SAFETY: `to` lies in the window, `words` outside of it, and both are that long.
    unsafe { ptr::copy_nonoverlapping(words.as_ptr(), to, words.len()) }
}

/// Locks what is mapped now and what will be, page by page as it is touched.
pub fn lock_everything_on_fault() -> Result<(), Errno> {
    let flags = libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT;
    // SAFETY: takes no pointer and changes no content.
    Errno::result(unsafe { libc::mlockall(flags) }).map(drop)
}

/// Locks a range of the window.
pub fn lock(address: usize, length: usize) -> Result<(), Errno> {
    // SAFETY: changes no content.
    unsafe { mman::mlock(pointer(address, length), length) }
}

/// Asks for transparent huge pages in a range of the window.
pub fn advise_huge(address: usize, length: usize) -> Result<(), Errno> {
    let advice = mman::MmapAdvise::MADV_HUGEPAGE;
    // SAFETY: changes no content.
    unsafe { mman::madvise(pointer(address, length), length, advice) }
}

/// Unlocks a range of the window.
pub fn unlock(address: usize, length: usize) -> Result<(), Errno> {
    // SAFETY: changes no content.
    unsafe { mman::munlock(pointer(address, length), length) }
}

/// A userfaultfd that child processes inherit: an open file that no CRIU can dump.
pub fn undumpable_descriptor() -> Result<OwnedFd, Errno> {
    // SAFETY: takes no pointer.
    let number = unsafe { libc::syscall(libc::SYS_userfaultfd, 0) };
    let number = i32::try_from(Errno::result(number)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just opened it, for nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Forks.
pub fn fork() -> Result<ForkResult, Errno> {
    // SAFETY: the child goes on with ordinary code, which glibc supports after a fork of a process
    // with threads as well (its allocator is made consistent); other threads hold no lock of ours.
    unsafe { unistd::fork() }
}

/// Ends the process without running exit handlers, which belong to the parent of a fork.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: `_exit` has no preconditions.
    unsafe { libc::_exit(code) }
}

/// From now on a SIGBUS at a page of the window puts a page marked with [`POISON_MARK`] there, and
/// the access goes on; a SIGBUS elsewhere ends the process as ever.
pub fn mark_lost_pages() -> Result<(), Errno> {
    let handler = SigHandler::SigAction(mark_lost_page);
    let action = SigAction::new(handler, SaFlags::SA_SIGINFO, SigSet::empty());
    // SAFETY: the handler makes system calls and writes to the window only.
    unsafe { sigaction(Signal::SIGBUS, &action) }.map(drop)
}

extern "C" fn mark_lost_page(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel hands a SA_SIGINFO handler a valid siginfo.
    let info = unsafe { &*info };
    // SAFETY: SIGBUS fills in the address.
    let address = unsafe { info.si_addr() }.addr();
    // SAFETY: `sysconf` is a lookup without side effects.
    let page_bytes = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    let page = address & !(page_bytes - 1);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let at = ptr::with_exposed_provenance_mut::<c_void>(page);
    let replaced = WINDOW.contains(&page)
        // SAFETY: the page lies in the window, to which no Rust object belongs.
        && unsafe { libc::mmap(at, page_bytes, prot, flags, -1, 0) } == at;
    if replaced {
        // SAFETY: the page was just mapped, writable and longer than the mark.
        unsafe { at.cast::<[u64; 2]>().write(POISON_MARK) };
    } else {
        // The access is repeated on return, and the default action ends the process.
        // SAFETY: SIG_DFL needs no handler.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    }
}

/// How a child ended, and what it used.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    /// Its wait status.
    pub status: ExitStatus,
    /// User and system time of the process, and of those of its children that it waited for.
    pub cpu: Duration,
    /// Most memory that it had resident, bytes.
    pub peak_rss_bytes: u64,
}

/// Reaps the child `pid` if it has ended; `None` while it runs.
///
/// # Errors
/// It is not a child of this process, or was reaped before.
pub fn reap(pid: i32) -> Result<Option<Ended>, Errno> {
    let mut status = 0;
    // SAFETY: all-zero is a valid `rusage`: it holds integers only.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are valid for the call.
    let reaped = unsafe { libc::wait4(pid, &raw mut status, libc::WNOHANG, &raw mut usage) };
    if Errno::result(reaped)? == 0 {
        return Ok(None);
    }
    let time = |value: libc::timeval| {
        let micros = i128::from(value.tv_sec) * 1_000_000 + i128::from(value.tv_usec);
        Duration::from_micros(u64::try_from(micros).unwrap_or(0))
    };
    Ok(Some(Ended {
        status: ExitStatus::from_raw(status),
        cpu: time(usage.ru_utime) + time(usage.ru_stime),
        peak_rss_bytes: u64::try_from(usage.ru_maxrss).unwrap_or(0) * 1024,
    }))
}
