//! Odd kinds of memory: advice within other advice, borders of mappings, and what only one of several processes has.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, Result};
use nix::sys::memfd::{MFdFlags, memfd_create};
use testbed::sys::WORD_BYTES;
use testbed::sys::mappings;

use crate::guarded;
use crate::make::{
    Expect, HUGE_BYTES, Made, PAGES, PRIVATE, SHARED, Span, anonymous, content, fill, first_of,
    huge, keeping, of, of_file, page_bytes,
};
use crate::partner;

const PROT_RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Without access, but for little of it.
const RESERVED_BYTES: usize = 64 << 30;

/// Where the addresses of x86-64 programs end.
const ADDRESSES_END: usize = (1 << 47) - 4096;

/// Makes one of these kinds, or any other.
pub(crate) fn make_any(kind: &str, dir: &Path) -> Result<Made> {
    let first = first_of(kind);
    match kind {
        "wipe-moved" => wiped_and_moved(first),
        "left-empty" => left_empty(first),
        "growsdown-grown" => grown_down(first),
        "sysv-twice" => segment_twice(first),
        "sysv-removed" => {
            let id = mappings::make_segment(PAGES * page_bytes(), 0)?;
            let made = Made::filled(mappings::attach_segment(id, 0)?, PAGES, first)?;
            mappings::remove_segment(id)?;
            Ok(made)
        }
        "hugetlb-cow" => huge_copied_on_write(dir, first),
        "hugetlb-readonly" => {
            let made = huge(PRIVATE, None, first)?;
            mappings::protect(made.spans[0].address, 2 * HUGE_BYTES, libc::PROT_READ)?;
            Ok(made)
        }
        "thp-zero" => huge_zero_pages(first),
        "shared-grandchild" => shared_with_a_grandchild(dir, first),
        "child-none" => hidden_in_a_child(dir, first),
        "child-moved" => moved_in_a_child(dir, first),
        "child-wipe" => wiped_in_a_child(dir, first),
        "readonly" => {
            let made = Made::filled(anonymous(PRIVATE, PAGES)?, PAGES, first)?;
            mappings::protect(made.spans[0].address, PAGES * page_bytes(), libc::PROT_READ)?;
            Ok(made)
        }
        "write-only" => {
            let mut made = Made::filled(anonymous(PRIVATE, PAGES)?, PAGES, first)?;
            mappings::protect(
                made.spans[0].address,
                PAGES * page_bytes(),
                libc::PROT_WRITE,
            )?;
            made.spans[0].expect = Expect::Hidden;
            Ok(made.in_child(Expect::Hidden))
        }
        "protections" => alternating(first),
        "file-offset" => parts_of_a_file(dir, first),
        "file-odd" => odd_end_of_a_file(dir, first),
        "shm-deleted" => {
            let path = format!("/dev/shm/memkinds-{}-{first}", std::process::id());
            let mut file = File::create_new(&path).context("/dev/shm")?;
            fs::remove_file(&path)?;
            file.write_all(&of_file(first))?;
            Ok(keeping(of(file.as_fd(), false, first)?, file.into()))
        }
        "memfd-past-end" => beyond_a_memfd(first),
        "memfd-noexec" => {
            let memfd = memfd_create(c"noexec", MFdFlags::from_bits_retain(MFD_NOEXEC_SEAL))?;
            nix::unistd::write(&memfd, &of_file(first))?;
            Ok(keeping(of(memfd.as_fd(), false, first)?, memfd))
        }
        "lowest" => lowest(first),
        "highest" => {
            let at = ADDRESSES_END - 4 * page_bytes();
            Made::filled(mappings::map_at(at, 4 * page_bytes())?, 4, first)
        }
        "reservation-none" => reservation_without_access(first),
        other => guarded::make_any(other, dir),
    }
}

/// MFD_NOEXEC_SEAL (Linux 6.3).
const MFD_NOEXEC_SEAL: u32 = 8;

/// The advice is given about a half, which is moved and has grown since.
fn wiped_and_moved(first: u64) -> Result<Made> {
    let (page, half) = (page_bytes(), PAGES / 2);
    let at = anonymous(PRIVATE, PAGES)?;
    fill(at, PAGES, first)?;
    let wiped = at + half * page;
    mappings::advise(wiped, half * page, libc::MADV_WIPEONFORK)?;
    let wiped = mappings::move_away(wiped, half * page, PAGES * page)?;
    let own = first + PAGES as u64;
    fill(wiped + half * page, half, own)?;
    let mut made = Made::default();
    made.add(wiped, half, first + half as u64, Expect::Content);
    made.add(wiped + half * page, half, own, Expect::Content);
    let mut made = made.in_child(Expect::Zero);
    made.add(at, half, first, Expect::Content);
    Ok(made)
}

/// Moved, where an empty mapping stays behind (MREMAP_DONTUNMAP), of which a part is written since.
fn left_empty(first: u64) -> Result<Made> {
    let (page, half) = (page_bytes(), PAGES / 2);
    let at = anonymous(PRIVATE, PAGES)?;
    fill(at, PAGES, first)?;
    let moved = mappings::leave_empty(at, PAGES * page)?;
    let own = first + PAGES as u64;
    fill(at, half, own)?;
    let mut made = Made::default();
    made.add(moved, PAGES, first, Expect::Content);
    made.add(at, half, own, Expect::Content);
    made.add(at + half * page, PAGES - half, own, Expect::Zero);
    Ok(made)
}

/// A stack that has grown: it was touched below its mapping.
fn grown_down(first: u64) -> Result<Made> {
    let page = page_bytes();
    // The room below it is free, and so is the gap that the kernel wants below a stack.
    let room = anonymous(PRIVATE, 2048)?;
    mappings::unmap(room, 2048 * page)?;
    let top = room + 2048 * page;
    let at = top - 4 * page;
    mappings::map_kind_at(at, 4 * page, PRIVATE | libc::MAP_GROWSDOWN, None)?;
    for n in 1..=PAGES {
        mappings::load(at - n * page);
    }
    // Every second of the pages that came about.
    fill(at, 4, first)?;
    let mut made = Made::default();
    made.add(at, 4, first, Expect::Content);
    for n in 1..=PAGES {
        let (address, number) = (at - n * page, first + 4 + n as u64);
        if n % 2 == 0 {
            fill(address, 1, number)?;
        }
        let expect = if n % 2 == 0 {
            Expect::Content
        } else {
            Expect::Zero
        };
        made.add(address, 1, number, expect);
    }
    Ok(made)
}

/// Attached twice, the second time for reading alone; and another segment whose second half is detached memory never used.
fn segment_twice(first: u64) -> Result<Made> {
    let id = mappings::make_segment(PAGES * page_bytes(), 0)?;
    let at = mappings::attach_segment(id, 0)?;
    let again = mappings::attach_segment(id, libc::SHM_RDONLY)?;
    let mut made = Made::filled(at, PAGES, first)?;
    made.add(again, PAGES, first, Expect::Content);
    let other = mappings::make_segment(PAGES * page_bytes(), 0)?;
    let other = mappings::attach_segment(other, 0)?;
    let own = first + PAGES as u64;
    fill(other, 4, own)?;
    made.add(other, 4, own, Expect::Content);
    made.add(other + 4 * page_bytes(), PAGES - 4, own, Expect::Zero);
    Ok(made)
}

/// The child writes into the first huge page, this process into the second one.
fn huge_copied_on_write(dir: &Path, first: u64) -> Result<Made> {
    let pages = HUGE_BYTES / page_bytes();
    let flags = PRIVATE | libc::MAP_HUGETLB;
    let at = mappings::map(2 * HUGE_BYTES, true, flags, None)?;
    fill(at, 2 * pages, first)?;
    let write = |page: usize, own: u64| -> Result<Vec<Span>> {
        let span = |from: usize, count: usize, number: u64| {
            Span::new(at + from * page_bytes(), count, number, Expect::Content)
        };
        fill(at + page * page_bytes(), 1, own)?;
        let behind = page + 1;
        Ok(vec![
            span(0, page, first),
            span(page, 1, own),
            span(behind, 2 * pages - behind, first + behind as u64),
        ])
    };
    let own = first + 2 * pages as u64;
    partner::start("hugetlb-cow", dir, || write(3, own))?;
    Ok(Made {
        spans: write(pages + 5, own + 1)?,
        ..Made::default()
    })
}

/// All of it is read; then one page is written.
fn huge_zero_pages(first: u64) -> Result<Made> {
    let pages = 3 * HUGE_BYTES / page_bytes();
    let at = anonymous(PRIVATE, pages)?;
    mappings::advise(at, pages * page_bytes(), libc::MADV_HUGEPAGE)?;
    for n in 0..pages {
        mappings::load(at + n * page_bytes());
    }
    let written = pages / 2;
    fill(at + written * page_bytes(), 1, first)?;
    let mut made = Made::default();
    made.add(at, written, first, Expect::Zero);
    made.add(at + written * page_bytes(), 1, first, Expect::Content);
    let behind = at + (written + 1) * page_bytes();
    made.add(behind, pages - written - 1, first, Expect::Zero);
    Ok(made)
}

/// The child between them has unmapped it; the grandchild has filled the second half.
fn shared_with_a_grandchild(dir: &Path, first: u64) -> Result<Made> {
    let (page, half) = (page_bytes(), PAGES / 2);
    let at = anonymous(SHARED, PAGES)?;
    fill(at, half, first)?;
    let whole = vec![Span::new(at, PAGES, first, Expect::Content)];
    partner::start("shared-grandchild-parent", dir, || {
        partner::start("shared-grandchild", dir, || {
            fill(at + half * page, half, first + half as u64)?;
            Ok(whole.clone())
        })?;
        mappings::unmap(at, PAGES * page)?;
        Ok(Vec::new())
    })?;
    Ok(Made {
        spans: whole,
        ..Made::default()
    })
}

/// The child has written a half and may not touch it any more; of this process it can be read and written.
fn hidden_in_a_child(dir: &Path, first: u64) -> Result<Made> {
    let (page, half) = (page_bytes(), PAGES / 2);
    let at = anonymous(PRIVATE, PAGES)?;
    fill(at, PAGES, first)?;
    partner::start("child-none", dir, || {
        let own = first + PAGES as u64;
        fill(at, half, own)?;
        mappings::protect(at, PAGES * page, libc::PROT_NONE)?;
        Ok(vec![
            Span::new(at, half, own, Expect::Hidden),
            Span::new(at + half * page, half, first + half as u64, Expect::Hidden),
        ])
    })?;
    let mut made = Made::default();
    made.add(at, PAGES, first, Expect::Content);
    Ok(made)
}

/// The advice is the child's alone, which has written a part since.
fn wiped_in_a_child(dir: &Path, first: u64) -> Result<Made> {
    let (page, half) = (page_bytes(), PAGES / 2);
    let at = anonymous(PRIVATE, PAGES)?;
    fill(at, PAGES, first)?;
    partner::start("child-wipe", dir, || {
        mappings::advise(at, PAGES * page, libc::MADV_WIPEONFORK)?;
        let own = first + PAGES as u64;
        fill(at, half, own)?;
        let spans = [
            Span::new(at, half, own, Expect::Content),
            Span::new(at + half * page, half, first + half as u64, Expect::Content),
        ];
        Ok(spans.map(|span| span.in_child(Expect::Zero)).to_vec())
    })?;
    let mut made = Made::default();
    made.add(at, PAGES, first, Expect::Content);
    Ok(made)
}

/// The child has moved it, and something new is in its place there.
fn moved_in_a_child(dir: &Path, first: u64) -> Result<Made> {
    let page = page_bytes();
    let at = anonymous(PRIVATE, PAGES)?;
    fill(at, PAGES, first)?;
    partner::start("child-moved", dir, || {
        let moved = mappings::move_away(at, PAGES * page, 2 * PAGES * page)?;
        let own = first + PAGES as u64;
        mappings::map_at(at, PAGES * page)?;
        fill(at, 4, own)?;
        Ok(vec![
            Span::new(moved, PAGES, first, Expect::Content),
            Span::new(moved + PAGES * page, PAGES, first, Expect::Zero),
            Span::new(at, 4, own, Expect::Content),
            Span::new(at + 4 * page, PAGES - 4, own, Expect::Zero),
        ])
    })?;
    let mut made = Made::default();
    made.add(at, PAGES, first, Expect::Content);
    Ok(made)
}

/// Each page has another protection than its neighbours.
fn alternating(first: u64) -> Result<Made> {
    let pages = 16 * PAGES;
    let at = anonymous(PRIVATE, pages)?;
    fill(at, pages, first)?;
    let protections = [
        libc::PROT_READ,
        PROT_RW,
        libc::PROT_NONE,
        libc::PROT_READ | libc::PROT_EXEC,
        libc::PROT_NONE,
        PROT_RW | libc::PROT_EXEC,
    ];
    let mut made = Made::default();
    for n in 0..pages {
        let address = at + n * page_bytes();
        let protection = protections[n % protections.len()];
        mappings::protect(address, page_bytes(), protection)?;
        let expect = match protection {
            libc::PROT_NONE => Expect::Hidden,
            _ => Expect::Content,
        };
        made.add(address, 1, first + n as u64, expect);
    }
    Ok(made)
}

/// Two private mappings of one file that do not begin where it begins, and overlap in it; each has its own written pages.
fn parts_of_a_file(dir: &Path, first: u64) -> Result<Made> {
    let (page, quarter) = (page_bytes(), PAGES / 4);
    let path = dir.join("file-offset");
    fs::write(&path, of_file(first))?;
    let file = File::options().read(true).write(true).open(&path)?;
    let mut made = Made::default();
    for n in 0..2 {
        let skipped = (n + 1) * quarter;
        let whole = mappings::map(PAGES * page, true, PRIVATE, Some(file.as_fd()))?;
        mappings::unmap(whole, skipped * page)?;
        let at = whole + skipped * page;
        let own = first + ((n + 1) * PAGES) as u64;
        fill(at, 4, own)?;
        made.add(at, 4, own, Expect::Content);
        let number = first + (skipped + 4) as u64;
        made.add(at + 4 * page, PAGES - skipped - 4, number, Expect::Content);
    }
    Ok(made)
}

/// Its last page is none of the file's alone: what is behind the file's end in it was written, too.
fn odd_end_of_a_file(dir: &Path, first: u64) -> Result<Made> {
    let path = dir.join("file-odd");
    let mut bytes = of_file(first);
    bytes.truncate(3 * page_bytes() + 100 * WORD_BYTES);
    fs::write(&path, &bytes)?;
    let file = File::options().read(true).write(true).open(&path)?;
    let at = mappings::map(4 * page_bytes(), true, PRIVATE, Some(file.as_fd()))?;
    let own = first + PAGES as u64;
    mappings::write(at + 3 * page_bytes(), &content(own))?;
    let mut made = Made::default();
    made.add(at, 3, first, Expect::Content);
    made.add(at + 3 * page_bytes(), 1, own, Expect::Content);
    Ok(made)
}

/// Four pages of a memfd in a mapping of eight.
fn beyond_a_memfd(first: u64) -> Result<Made> {
    let memfd = memfd_create(c"past-end", MFdFlags::empty())?;
    nix::unistd::write(&memfd, &of_file(first)[..4 * page_bytes()])?;
    let at = mappings::map(8 * page_bytes(), true, SHARED, Some(memfd.as_fd()))?;
    let mut made = Made::default();
    made.add(at, 4, first, Expect::Content);
    made.add(at + 4 * page_bytes(), 4, first, Expect::Gone);
    Ok(keeping(made, memfd))
}

/// At the first address that may be mapped.
fn lowest(first: u64) -> Result<Made> {
    let minimum = fs::read_to_string("/proc/sys/vm/mmap_min_addr")?;
    let minimum: usize = minimum.trim().parse()?;
    let at = minimum.max(page_bytes()).next_multiple_of(page_bytes());
    Made::filled(mappings::map_at(at, 4 * page_bytes())?, 4, first)
}

fn reservation_without_access(first: u64) -> Result<Made> {
    let flags = PRIVATE | libc::MAP_NORESERVE;
    let at = mappings::map(RESERVED_BYTES, false, flags, None)?;
    mappings::protect(at, RESERVED_BYTES, libc::PROT_NONE)?;
    let mut made = Made::default();
    for n in 0..4 {
        let address = at + n * (RESERVED_BYTES / 4);
        mappings::protect(address, 4 * page_bytes(), PROT_RW)?;
        fill(address, 2, first + 2 * n as u64)?;
        made.add(address, 2, first + 2 * n as u64, Expect::Content);
        made.add(address + 2 * page_bytes(), 2, first, Expect::Zero);
    }
    Ok(made)
}
