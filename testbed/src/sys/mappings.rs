//! The calls that make mappings of every kind, and reads of memory that cannot hurt.
//!
//! New mappings go where the kernel chooses: none can touch what Rust owns. What
//! changes a mapping is meant for those that were made here. Content is read and written by
//! process_vm_readv and process_vm_writev of the process itself, which say EFAULT where a load would raise a
//! signal.

use std::ffi::c_void;
use std::io::{IoSlice, IoSliceMut};
use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr;

use nix::errno::Errno;
use nix::sys::mman::{self, MRemapFlags, MapFlags, ProtFlags};
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::getpid;

/// MAP_DROPPABLE (Linux 6.11), in place of MAP_PRIVATE.
pub const MAP_DROPPABLE: i32 = 0x08;

/// MADV_GUARD_INSTALL (Linux 6.13).
pub const MADV_GUARD_INSTALL: i32 = 102;

/// MADV_GUARD_REMOVE (Linux 6.13).
pub const MADV_GUARD_REMOVE: i32 = 103;

/// Where mremap leaves a mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Remap {
    /// Where it is: it grows or becomes shorter.
    InPlace,
    /// At this address of the window, where nothing is.
    MoveTo(usize),
    /// The same, and an empty mapping stays behind (MREMAP_DONTUNMAP).
    LeaveEmpty(usize),
}

/// Number of the call mseal (Linux 6.10), the same on all architectures.
const SYS_MSEAL: libc::c_long = 462;

/// Maps `length` bytes, of `file` if one is given. `flags` are MAP_*; returns the address.
pub fn map(
    length: usize,
    writable: bool,
    flags: i32,
    file: Option<BorrowedFd<'_>>,
) -> Result<usize, Errno> {
    let length = NonZeroUsize::new(length).ok_or(Errno::EINVAL)?;
    let mut prot = ProtFlags::PROT_READ;
    prot.set(ProtFlags::PROT_WRITE, writable);
    let flags = MapFlags::from_bits_retain(flags);
    let mapped = match file {
        // SAFETY: no caller passes MAP_FIXED: the kernel chooses an address where nothing is mapped.
        Some(file) => unsafe { mman::mmap(None, length, prot, flags, file, 0) },
        None => {
            let flags = flags | MapFlags::MAP_ANONYMOUS;
            // SAFETY: as above. The type of the mapping is among the caller's flags.
            unsafe { libc_mmap(length, prot, flags) }
        }
    };
    mapped.map(|address| address.as_ptr().expose_provenance())
}

/// As `mmap_anonymous` of nix, which asks for private or shared memory alone.
unsafe fn libc_mmap(
    length: NonZeroUsize,
    prot: ProtFlags,
    flags: MapFlags,
) -> Result<ptr::NonNull<c_void>, Errno> {
    // SAFETY: the caller's flags replace no mapping.
    let mapped = unsafe {
        libc::mmap(
            ptr::null_mut(),
            length.get(),
            prot.bits(),
            flags.bits(),
            -1,
            0,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    ptr::NonNull::new(mapped).ok_or(Errno::EFAULT)
}

fn pointer(address: usize) -> *mut c_void {
    ptr::with_exposed_provenance_mut(address)
}

/// Maps private memory at `address` if nothing is there, else fails with EEXIST.
pub fn map_at(address: usize, length: usize) -> Result<usize, Errno> {
    map_kind_at(address, length, libc::MAP_PRIVATE, None)
}

/// The same with `flags` (MAP_*), of `file` if one is given.
pub fn map_kind_at(
    address: usize,
    length: usize,
    flags: i32,
    file: Option<BorrowedFd<'_>>,
) -> Result<usize, Errno> {
    let length = NonZeroUsize::new(length).ok_or(Errno::EINVAL)?;
    let address = NonZeroUsize::new(address).ok_or(Errno::EINVAL)?;
    let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let flags = MapFlags::from_bits_retain(flags) | MapFlags::MAP_FIXED_NOREPLACE;
    let mapped = match file {
        // SAFETY: FIXED_NOREPLACE replaces nothing.
        Some(file) => unsafe { mman::mmap(Some(address), length, prot, flags, file, 0) },
        // SAFETY: as above.
        None => unsafe { mman::mmap_anonymous(Some(address), length, prot, flags) },
    };
    mapped.map(|address| address.as_ptr().expose_provenance())
}

/// Takes a part of a mapping that was made here away.
pub fn unmap(address: usize, length: usize) -> Result<(), Errno> {
    let at = ptr::NonNull::new(pointer(address)).ok_or(Errno::EINVAL)?;
    // SAFETY: the range is one that nothing of Rust's lies in.
    unsafe { mman::munmap(at, length) }
}

/// Moves a mapping that was made here to another address, of the kernel's choice, and makes it longer;
/// returns the address. With an `old` length of 0 shared memory is mapped a second time.
pub fn move_away(address: usize, old: usize, new: usize) -> Result<usize, Errno> {
    let at = ptr::NonNull::new(pointer(address)).ok_or(Errno::EINVAL)?;
    let flags = MRemapFlags::MREMAP_MAYMOVE;
    // SAFETY: the range is one that nothing of Rust's lies in, and the kernel chooses a free address.
    let moved = unsafe { mman::mremap(at, old, new, flags, None) };
    moved.map(|address| address.as_ptr().expose_provenance())
}

/// Moves a mapping that was made here to another address, of the kernel's choice, and leaves an empty one behind
/// (MREMAP_DONTUNMAP); returns the address.
pub fn leave_empty(address: usize, length: usize) -> Result<usize, Errno> {
    let at = ptr::NonNull::new(pointer(address)).ok_or(Errno::EINVAL)?;
    let flags = MRemapFlags::MREMAP_MAYMOVE | MRemapFlags::from_bits_retain(libc::MREMAP_DONTUNMAP);
    // SAFETY: the range is one that nothing of Rust's lies in, and the kernel chooses a free address.
    let moved = unsafe { mman::mremap(at, length, length, flags, None) };
    moved.map(|address| address.as_ptr().expose_provenance())
}

/// Moves a mapping that was made here to `to`, where nothing is, or changes its length where it is: `old` bytes become
/// `new` bytes.
pub fn resize(address: usize, old: usize, new: usize, to: Option<usize>) -> Result<(), Errno> {
    let (flags, to) = match to {
        Some(to) => (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, to),
        None => (0, address),
    };
    // SAFETY: the caller made the range and knows that nothing is at the other one.
    let at = unsafe { libc::mremap(pointer(address), old, new, flags, pointer(to)) };
    match at {
        libc::MAP_FAILED => Err(Errno::last()),
        _ => Ok(()),
    }
}

/// Moves a mapping of the window or changes its length: `old` bytes at `address` become `new` bytes.
pub fn remap(address: usize, old: usize, new: usize, how: Remap) -> Result<(), Errno> {
    let (flags, to) = match how {
        Remap::InPlace => (0, super::pointer(address, new)),
        Remap::MoveTo(to) => (
            libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
            super::pointer(to, new),
        ),
        Remap::LeaveEmpty(to) => (
            libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP,
            super::pointer(to, new),
        ),
    };
    let from = super::pointer(address, old);
    // SAFETY: both ranges lie in the window, to which no Rust object belongs.
    let at = unsafe { libc::mremap(from.as_ptr(), old, new, flags, to.as_ptr()) };
    match at {
        libc::MAP_FAILED => Err(Errno::last()),
        _ => Ok(()),
    }
}

/// Gives a mapping that was made here a name, which /proc/PID/maps shows.
pub fn give_name(address: usize, length: usize, name: &std::ffi::CStr) -> Result<(), Errno> {
    let (what, option) = (libc::PR_SET_VMA, libc::PR_SET_VMA_ANON_NAME);
    // SAFETY: changes no content; the kernel copies the name.
    Errno::result(unsafe { libc::prctl(what, option, address, length, name.as_ptr()) }).map(drop)
}

/// Gives advice (MADV_*) about a mapping that was made here.
pub fn advise(address: usize, length: usize, advice: i32) -> Result<(), Errno> {
    // SAFETY: the range is one that nothing of Rust's lies in.
    Errno::result(unsafe { libc::madvise(pointer(address), length, advice) }).map(drop)
}

/// Makes a mapping inaccessible, readable, or writable too (PROT_*).
pub fn protect(address: usize, length: usize, prot: i32) -> Result<(), Errno> {
    // SAFETY: the range is one that nothing of Rust's lies in.
    Errno::result(unsafe { libc::mprotect(pointer(address), length, prot) }).map(drop)
}

/// Locks a mapping; `on_fault`: each page as it is touched.
pub fn lock(address: usize, length: usize, on_fault: bool) -> Result<(), Errno> {
    let flags = if on_fault { libc::MLOCK_ONFAULT } else { 0 };
    // SAFETY: changes no content.
    Errno::result(unsafe { libc::mlock2(pointer(address), length, flags as _) }).map(drop)
}

/// Takes the lock of a mapping away.
pub fn unlock(address: usize, length: usize) -> Result<(), Errno> {
    // SAFETY: changes no content.
    Errno::result(unsafe { libc::munlock(pointer(address), length) }).map(drop)
}

/// Seals a mapping.
pub fn seal(address: usize, length: usize) -> Result<(), Errno> {
    // SAFETY: changes no content; nobody unmaps what was made here.
    Errno::result(unsafe { libc::syscall(SYS_MSEAL, address, length, 0) }).map(drop)
}

/// Makes a System V segment and attaches it; `flags` beside IPC_CREAT.
pub fn attach_sysv(length: usize, flags: i32) -> Result<usize, Errno> {
    attach_segment(make_segment(length, flags)?, 0)
}

/// Makes a System V segment that nobody has attached: its number. `flags` beside IPC_CREAT.
pub fn make_segment(length: usize, flags: i32) -> Result<i32, Errno> {
    let flags = libc::IPC_CREAT | 0o600 | flags;
    // SAFETY: takes no pointer.
    Errno::result(unsafe { libc::shmget(libc::IPC_PRIVATE, length, flags) })
}

/// Attaches a System V segment where the kernel chooses; `flags` are SHM_*.
pub fn attach_segment(id: i32, flags: i32) -> Result<usize, Errno> {
    // SAFETY: the kernel chooses an address where nothing is mapped.
    let at = unsafe { libc::shmat(id, ptr::null(), flags) };
    match at.expose_provenance() {
        usize::MAX => Err(Errno::last()),
        address => Ok(address),
    }
}

/// Lets a System V segment go with the last process that has it (IPC_RMID).
pub fn remove_segment(id: i32) -> Result<(), Errno> {
    // SAFETY: IPC_RMID reads no buffer.
    Errno::result(unsafe { libc::shmctl(id, libc::IPC_RMID, ptr::null_mut()) }).map(drop)
}

/// Makes an AIO context: its number, which is the address of its ring.
pub fn aio_setup() -> Result<usize, Errno> {
    let mut context: usize = 0;
    // SAFETY: `context` is room for one number, which is 0 as it has to be.
    Errno::result(unsafe { libc::syscall(libc::SYS_io_setup, 8, &raw mut context) })?;
    Ok(context)
}

/// Asks an AIO context for finished work without waiting: 0 if it works and has none.
pub fn aio_finished(context: usize) -> Result<i64, Errno> {
    let mut none: [i64; 4 * 8] = [0; 4 * 8];
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: there is room for the eight events of 32 bytes that are asked for, and `now` is a valid time.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_io_getevents,
            context,
            0,
            8,
            none.as_mut_ptr(),
            &raw mut now,
        )
    })
}

/// Reads the memory at `address` of this process, or says EFAULT.
pub fn read(address: usize, bytes: &mut [u8]) -> Result<(), Errno> {
    let length = bytes.len();
    let from = [RemoteIoVec {
        base: address,
        len: length,
    }];
    let read = process_vm_readv(getpid(), &mut [IoSliceMut::new(bytes)], &from)?;
    if read == length {
        Ok(())
    } else {
        Err(Errno::EFAULT)
    }
}

/// Writes the memory at `address` of this process, or says EFAULT. For mappings that were made here.
pub fn write(address: usize, bytes: &[u8]) -> Result<(), Errno> {
    let to = [RemoteIoVec {
        base: address,
        len: bytes.len(),
    }];
    let written = process_vm_writev(getpid(), &[IoSlice::new(bytes)], &to)?;
    if written == bytes.len() {
        Ok(())
    } else {
        Err(Errno::EFAULT)
    }
}

/// Loads a byte, whatever that raises.
pub fn load(address: usize) -> u8 {
    let at = ptr::with_exposed_provenance::<u8>(address);
    // SAFETY: a mapping that was made here, in which nothing of Rust's lies; where it cannot be read a signal
    // ends the process, which the caller expects.
    unsafe { at.read_volatile() }
}

/// Gives the calling thread a list of robust futexes whose head is at `head`: three words, filled by the caller.
pub fn set_robust_list(head: usize) -> Result<(), Errno> {
    // SAFETY: the kernel reads the list at the end of the thread alone, and bears any content of it.
    let set = unsafe { libc::syscall(libc::SYS_set_robust_list, pointer(head), 24) };
    Errno::result(set).map(drop)
}
