//! Memory that this process shares with those that it forks from now on, or with whoever has the same file.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::sync::atomic::{AtomicU32, AtomicU64};

use bytemuck::Zeroable;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous};

use super::uffd::MessageBuffer;

/// What two processes know of one restore at any time. Atomics alone, so that any bytes are a value.
#[derive(Zeroable, Debug)]
#[repr(C)]
pub struct RestoreState {
    /// In a file: [`RestoreState::MAGIC`].
    pub magic: AtomicU64,
    /// In a file: the hash of the images, by which they are known again.
    pub images: [AtomicU64; 2],
    /// Not 0: the restore has said that every process runs.
    pub finished: AtomicU32,
    /// Not 0: the source is one that can be reached again.
    pub ours: AtomicU32,
    /// Not 0: who serves has ended in order, or goes on alone.
    pub dismissed: AtomicU32,
    /// Whose userfaultfd was read last.
    pub read_of: AtomicU32,
    /// How many events had been told before that.
    pub sent_before: AtomicU64,
    /// What was read.
    pub room: MessageBuffer,
    /// Device and number of the file of the listening socket; 0 before there is one.
    pub socket_file: [AtomicU64; 2],
}

impl RestoreState {
    /// Says which layout this is, and of what follows it in a file.
    pub const MAGIC: u64 = u64::from_le_bytes(*b"pgferry1");
}

/// A value that a process and those that it forks later see alike, all zero at first. It stays for as long
/// as they live.
#[derive(Debug)]
pub struct Shared<T: 'static>(&'static T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Shared<T> {
        *self
    }
}

impl<T> Copy for Shared<T> {}

impl<T> Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0
    }
}

impl<T: Zeroable + Sync> Shared<T> {
    /// What is at most aligned as a page is, which a mapping always is.
    const ALIGNED: () = assert!(align_of::<T>() <= 4096);

    /// Makes one.
    ///
    /// # Errors
    ///
    /// There is no memory.
    pub fn new() -> io::Result<Shared<T>> {
        const { Self::ALIGNED };
        let length = NonZeroUsize::new(size_of::<T>()).unwrap_or(NonZeroUsize::MIN);
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses touches nothing that exists.
        let mapped = unsafe { mmap_anonymous(None, length, access, MapFlags::MAP_SHARED) }?;
        // SAFETY: the memory is mapped for good, aligned, large enough and zero, which is a value of `T`;
        // from now on it is reached by shared references to a `Sync` value alone, here and after a fork.
        Ok(Shared(unsafe { mapped.cast::<T>().as_ref() }))
    }
}

impl Shared<RestoreState> {
    /// The value at the start of `file`, a memfd that cannot shrink: seen alike by whoever else has the file.
    ///
    /// # Errors
    ///
    /// It is no such memfd, or shorter than the value.
    pub fn in_file(file: &File) -> io::Result<Shared<RestoreState>> {
        let length = NonZeroUsize::new(size_of::<RestoreState>()).unwrap_or(NonZeroUsize::MIN);
        let seals = fcntl(file, FcntlArg::F_GET_SEALS)?;
        let sealed = SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK);
        if !sealed || file.metadata()?.len() < length.get() as u64 {
            return Err(io::Error::other("the file is too short, or might shrink"));
        }
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses touches nothing that exists.
        let mapped = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, file, 0) }?;
        // SAFETY: the memory is mapped for good, aligned as a page is, and as long as the value for good, since
        // the file cannot shrink; the value consists of atomics of integers, of which any bytes are valid, and it
        // is reached by shared references alone.
        Ok(Shared(unsafe { mapped.cast::<RestoreState>().as_ref() }))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    #[test]
    fn copies_are_the_same_and_others_are_not() {
        let (one, other) = (
            Shared::<AtomicU64>::new().unwrap(),
            Shared::<AtomicU64>::new().unwrap(),
        );
        let copy = one;
        copy.store(7, Ordering::Relaxed);
        assert_eq!(one.load(Ordering::Relaxed), 7);
        assert_eq!(other.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_file_is_seen_alike_if_it_cannot_shrink() {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create(c"test", flags).unwrap());
        file.set_len(64).unwrap();
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
        assert!(Shared::in_file(&file).is_err());
        let file = File::from(memfd_create(c"test", flags).unwrap());
        file.set_len(4096).unwrap();
        assert!(Shared::in_file(&file).is_err());
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
        let one = Shared::in_file(&file).unwrap();
        let other = Shared::in_file(&file.try_clone().unwrap()).unwrap();
        one.sent_before.store(7, Ordering::Relaxed);
        assert_eq!(other.sent_before.load(Ordering::Relaxed), 7);
    }
}
