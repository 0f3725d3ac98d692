//! What the kernel knows of the pages of another process, by PAGEMAP_SCAN on its /proc/PID/pagemap.
//!
//! Layouts and numbers are those of linux/fs.h.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::units::{PageRange, Vaddr};

/// PAGE_IS_PRESENT or PAGE_IS_SWAPPED: the page is in memory, or swapped out.
const POPULATED: u64 = 1 << 3 | 1 << 4;

/// PAGE_IS_GUARD: the page lies in a guard region (MADV_GUARD_INSTALL).
const GUARD: u64 = 1 << 8;

/// Of an entry of the file: present (bit 63), or swapped out (bit 62).
const THERE: u64 = 3 << 62;

/// The page is in memory (bit 63), not swapped out.
const IN_MEMORY: u64 = 1 << 63;

/// The page is mapped by this process alone (bit 56): neither shared since a fork nor merged (KSM).
const EXCLUSIVE: u64 = 1 << 56;

/// The length of an entry of the file, one for each page.
const ENTRY_BYTES: usize = 8;

/// PAGE_IS_WRITTEN: the page is under write protection no more.
const WRITTEN: u64 = 1 << 1;

/// PM_SCAN_WP_MATCHING: pages that are told are protected again, in one step.
const PROTECT: u64 = 1;

/// PM_SCAN_CHECK_WPASYNC: fail where the memory is not tracked.
const ONLY_TRACKED: u64 = 1 << 1;

/// Runs that are told by one call.
const RUNS: usize = 512;

/// Which pages to look for.
#[derive(Clone, Copy, Debug)]
struct Categories {
    /// All of these.
    all: u64,
    /// One of these, if it is not 0.
    any: u64,
}

/// An open /proc/PID/pagemap. It stays with the memory that the process had when it was opened.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Opens the file `path`. That takes the right to trace the process.
    pub fn open(path: &Path) -> io::Result<Pagemap> {
        File::open(path).map(Pagemap)
    }

    /// Whether the page of `page` bytes at `at` is there, in memory or swapped out.
    pub fn is_present(&self, at: Vaddr, page: u64) -> io::Result<bool> {
        let mut entry = [0; ENTRY_BYTES];
        self.0
            .read_exact_at(&mut entry, at.get() / page * ENTRY_BYTES as u64)?;
        Ok(u64::from_ne_bytes(entry) & THERE != 0)
    }

    /// How many pages of `page` bytes of `range` are in memory, and how many of these the process alone maps.
    pub fn count(&self, range: PageRange, page: u64) -> io::Result<(u64, u64)> {
        let pages = usize::try_from(range.bytes() / page).map_err(io::Error::other)?;
        let mut entries = vec![0; pages * ENTRY_BYTES];
        let at = range.start().get() / page * ENTRY_BYTES as u64;
        self.0.read_exact_at(&mut entries, at)?;
        let entries = entries.as_chunks::<ENTRY_BYTES>().0.iter();
        let there = entries
            .map(|entry| u64::from_ne_bytes(*entry))
            .filter(|entry| entry & IN_MEMORY != 0);
        Ok(there.fold((0, 0), |(there, alone), entry| {
            (there + 1, alone + u64::from(entry & EXCLUSIVE != 0))
        }))
    }

    /// The first run of pages in `range` that lie in guard regions. An error of kind `InvalidInput` or a
    /// bare ENOTTY means that this kernel cannot tell.
    pub fn first_guard(&self, range: PageRange) -> io::Result<Option<PageRange>> {
        let mut found = [Region::default()];
        let (start, end) = (range.start().get(), range.end().get());
        let guards = Categories { all: GUARD, any: 0 };
        let (regions, _) = self.scan(start, end, guards, 0, &mut found)?;
        let [found] = found;
        let within =
            |found: &Region| start <= found.start && found.start < found.end && found.end <= end;
        let found = (regions > 0 && within(&found)).then_some(found);
        Ok(found.map(|found| PageRange::new(found.start, found.end)))
    }

    /// Calls `each` for every run of pages in `range` that are in memory or swapped out. Where none ever was, that takes no
    /// time. An error of kind `InvalidInput` or a bare ENOTTY means that this kernel cannot tell.
    pub fn populated(&self, range: PageRange, each: impl FnMut(PageRange)) -> io::Result<()> {
        let wanted = Categories {
            all: 0,
            any: POPULATED,
        };
        self.each_run(range, wanted, 0, each)
    }

    /// Calls `each` for every run of pages in `range` that are there and not write-protected by a userfaultfd, and protects
    /// them. All of `range` must be registered. After an error some pages may be protected that were not told.
    ///
    /// Of other pages it protects none: the kernel would make page tables for them, 2 GiB for a reservation of 1 TiB, and
    /// they would look like pages that are swapped out. One that comes later counts as written then.
    pub(super) fn take_written(
        &self,
        range: PageRange,
        each: impl FnMut(PageRange),
    ) -> io::Result<()> {
        let wanted = Categories {
            all: WRITTEN,
            any: POPULATED,
        };
        self.each_run(range, wanted, PROTECT | ONLY_TRACKED, each)
    }

    /// Calls `each` for every run of pages in `range` that are of the categories `wanted`.
    fn each_run(
        &self,
        range: PageRange,
        wanted: Categories,
        flags: u64,
        mut each: impl FnMut(PageRange),
    ) -> io::Result<()> {
        let mut found = [Region::default(); RUNS];
        let (mut at, end) = (range.start().get(), range.end().get());
        while at < end {
            let (regions, walk_end) = self.scan(at, end, wanted, flags, &mut found)?;
            for run in &found[..regions] {
                if run.start >= at && run.start < run.end && run.end <= end {
                    each(PageRange::new(run.start, run.end));
                }
            }
            if walk_end <= at {
                return Err(io::Error::other("PAGEMAP_SCAN makes no progress"));
            }
            at = walk_end;
        }
        Ok(())
    }

    /// Looks for pages of the categories `wanted` from `start` to `end`. Returns how many runs of them are in `found` now, and where
    /// the look ended.
    fn scan(
        &self,
        start: u64,
        end: u64,
        wanted: Categories,
        flags: u64,
        found: &mut [Region],
    ) -> io::Result<(usize, u64)> {
        let mut call = Scan {
            size: size_of::<Scan>() as u64,
            flags,
            start,
            end,
            vec: found.as_mut_ptr().expose_provenance() as u64,
            vec_len: found.len() as u64,
            category_mask: wanted.all,
            category_anyof_mask: wanted.any,
            return_mask: wanted.all | wanted.any,
            ..Scan::default()
        };
        // SAFETY: `call` is a valid pm_scan_arg whose `vec` is room for the regions that `vec_len` tells; both
        // outlive the call.
        let regions = unsafe { calls::scan(self.0.as_raw_fd(), &raw mut call) }?;
        let regions = usize::try_from(regions).unwrap_or(0).min(found.len());
        Ok((regions, call.walk_end))
    }
}

/// struct page_region.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// struct pm_scan_arg.
#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

mod calls {
    #![allow(missing_docs)]
    use super::Scan;

    nix::ioctl_readwrite!(scan, b'f', 16, Scan);
}

const _: () = assert!(size_of::<Region>() == 24);
const _: () = assert!(size_of::<Scan>() == 96);

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

    use super::*;

    #[test]
    fn guard_regions_are_found_where_they_are() {
        let page = crate::sys::process::page_size().unwrap().bytes();
        let length = usize::try_from(16 * page).unwrap();
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let room = NonZeroUsize::new(length).unwrap();
        // SAFETY: a new mapping at an address that the kernel chooses touches nothing that exists.
        let mapped = unsafe { mmap_anonymous(None, room, access, MapFlags::MAP_PRIVATE) }.unwrap();
        let start = mapped.as_ptr().expose_provenance() as u64;
        let range = |from: u64, to: u64| PageRange::new(start + from * page, start + to * page);
        let pagemap = Pagemap::open(Path::new("/proc/self/pagemap")).unwrap();
        let is_present = |at: u64| pagemap.is_present(Vaddr(start + at * page), page).unwrap();
        let last = mapped.cast::<u8>().as_ptr().wrapping_add(length - 1);
        // SAFETY: the byte is the last of the new mapping, and nobody refers to it.
        unsafe { last.write_volatile(1) };
        assert!(is_present(15) && !is_present(14));
        assert_eq!(pagemap.count(range(0, 16), page).unwrap(), (1, 1));
        let mut populated = Vec::new();
        if pagemap
            .populated(range(0, 16), |run| populated.push(run))
            .is_ok()
        {
            assert_eq!(populated, [range(15, 16)]);
        }
        let install = |from: u64, pages: u64| {
            let at = mapped
                .as_ptr()
                .wrapping_byte_add(usize::try_from(from * page).unwrap());
            // SAFETY: the pages lie in the new mapping, which nobody reads or writes.
            unsafe { libc::madvise(at, usize::try_from(pages * page).unwrap(), 102) }
        };
        if install(3, 2) == 0 && pagemap.first_guard(range(0, 16)).is_ok() {
            assert_eq!(pagemap.first_guard(range(0, 3)).unwrap(), None);
            assert_eq!(
                pagemap.first_guard(range(0, 16)).unwrap(),
                Some(range(3, 5))
            );
            assert_eq!(
                pagemap.first_guard(range(4, 16)).unwrap(),
                Some(range(4, 5))
            );
            assert_eq!(pagemap.first_guard(range(5, 16)).unwrap(), None);
        } else {
            eprintln!("skipped: this kernel has no guard regions, or does not tell them");
        }
        // SAFETY: nobody refers to the mapping any more.
        unsafe { munmap(mapped, length) }.unwrap();
    }
}
