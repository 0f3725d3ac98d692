//! Memory that this process shares with those that it forks from now on.

use std::io;
use std::num::NonZeroUsize;
use std::ops::Deref;

use bytemuck::Zeroable;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};

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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

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
}
