//! Kinds of memory that come about by what a process did with it.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use testbed::sys::mappings;

use crate::make::{
    Expect, HUGE_BYTES, Made, PAGES, PRIVATE, SHARED, Span, advised, anonymous, fill, first_of,
    huge, keeping, make, of, of_file, page_bytes,
};
use crate::partner;

/// Makes one of these kinds, or any other.
pub(crate) fn make_any(kind: &str, dir: &Path) -> Result<Made> {
    let first = first_of(kind);
    match kind {
        "cow" => copied_on_write(dir, first),
        "shared-tree" => shared_with_a_child(dir, first),
        "zero-read" => {
            let at = anonymous(PRIVATE, PAGES)?;
            for n in 0..PAGES {
                mappings::load(at + n * page_bytes());
            }
            let mut made = Made::default();
            made.add(at, PAGES, first, Expect::Zero);
            Ok(made)
        }
        "lazyfree" => freed(first),
        "remapped" => remapped(first),
        "code" => {
            let made = Made::filled(anonymous(PRIVATE, PAGES)?, PAGES, first)?;
            let prot = libc::PROT_READ | libc::PROT_EXEC;
            mappings::protect(made.spans[0].address, PAGES * page_bytes(), prot)?;
            Ok(made)
        }
        "dontdump" => advised(first, libc::MADV_DONTDUMP),
        "named" => {
            let at = anonymous(PRIVATE, PAGES)?;
            mappings::give_name(at, PAGES * page_bytes(), c"kinds")?;
            Made::filled(at, PAGES, first)
        }
        "vdso" => beside_the_vdso(first),
        "shared-part" => shared_in_part(first),
        "shared-twice" => shared_twice(first),
        "hugetlb-sparse" => huge_sparse(first),
        "hugetlb-memfd-private" => {
            let memfd = memfd_create(c"huge-private", MFdFlags::MFD_HUGETLB)?;
            nix::unistd::ftruncate(&memfd, 2 * HUGE_BYTES as i64)?;
            let made = huge(PRIVATE, Some(memfd.as_fd()), first)?;
            Ok(keeping(made, memfd))
        }
        "huge-neighbours" => huge_neighbours(first),
        "thp-holes" => thp_with_holes(first),
        "file-past-end" => beyond_the_end(dir, first),
        "deleted-private" | "deleted-shared" => {
            let path = dir.join(kind);
            fs::write(&path, of_file(first))?;
            let file = File::options().read(true).write(true).open(&path)?;
            let made = of(file.as_fd(), kind == "deleted-private", first)?;
            fs::remove_file(&path)?;
            Ok(keeping(made, file.into()))
        }
        "dev-zero-shared" => {
            let zero = File::options().read(true).write(true).open("/dev/zero")?;
            let at = mappings::map(PAGES * page_bytes(), true, SHARED, Some(zero.as_fd()))?;
            Made::filled(at, PAGES, first)
        }
        "memfd-sealed" => {
            let memfd = memfd_create(c"sealed", MFdFlags::MFD_ALLOW_SEALING)?;
            nix::unistd::write(&memfd, &of_file(first))?;
            let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
            fcntl(&memfd, FcntlArg::F_ADD_SEALS(seals))?;
            let at = mappings::map(PAGES * page_bytes(), false, SHARED, Some(memfd.as_fd()))?;
            let mut made = Made::default();
            made.add(at, PAGES, first, Expect::Content);
            Ok(keeping(made, memfd))
        }
        other => make(other, dir),
    }
}

fn span(address: usize, pages: usize, first: u64) -> Span {
    Span::new(address, pages, first, Expect::Content)
}

/// After a fork the child writes every fourth page, and this process every third.
fn copied_on_write(dir: &Path, first: u64) -> Result<Made> {
    let at = anonymous(PRIVATE, PAGES)?;
    fill(at, PAGES, first)?;
    // Writes every `step`th page, with contents that nobody else has.
    let write = |step: usize, own: u64| -> Result<Vec<Span>> {
        let mut spans = Vec::new();
        for n in 0..PAGES {
            let address = at + n * page_bytes();
            let number = first + n as u64 + if n % step == 0 { own } else { 0 };
            if n % step == 0 {
                fill(address, 1, number)?;
            }
            spans.push(span(address, 1, number));
        }
        Ok(spans)
    };
    partner::start("cow", dir, || write(4, PAGES as u64))?;
    Ok(Made {
        spans: write(3, 2 * PAGES as u64)?,
        ..Made::default()
    })
}

/// The child has filled the second half.
fn shared_with_a_child(dir: &Path, first: u64) -> Result<Made> {
    let at = anonymous(SHARED, PAGES)?;
    let half = PAGES / 2;
    fill(at, half, first)?;
    let whole = vec![span(at, PAGES, first)];
    partner::start("shared-tree", dir, || {
        fill(at + half * page_bytes(), half, first + half as u64)?;
        Ok(whole.clone())
    })?;
    Ok(Made {
        spans: whole,
        ..Made::default()
    })
}

/// All pages may be dropped by the kernel; the first half was written again, and may not.
fn freed(first: u64) -> Result<Made> {
    let at = anonymous(PRIVATE, PAGES)?;
    fill(at, PAGES, first)?;
    mappings::advise(at, PAGES * page_bytes(), libc::MADV_FREE)?;
    let half = PAGES / 2;
    fill(at, half, first)?;
    let mut made = Made::default();
    made.add(at, half, first, Expect::Content);
    let rest = at + half * page_bytes();
    made.add(rest, half, first + half as u64, Expect::ContentOrZero);
    Ok(made)
}

/// Filled, moved to where it has room for twice as much, and filled there.
fn remapped(first: u64) -> Result<Made> {
    let page = page_bytes();
    let at = anonymous(PRIVATE, PAGES)?;
    fill(at, PAGES, first)?;
    let at = mappings::move_away(at, PAGES * page, 4 * PAGES * page)?;
    let mut made = Made::default();
    made.add(at, PAGES, first, Expect::Content);
    made.add(at + PAGES * page, 2 * PAGES, first, Expect::Zero);
    fill(at + 3 * PAGES * page, PAGES, first + PAGES as u64)?;
    made.add(
        at + 3 * PAGES * page,
        PAGES,
        first + PAGES as u64,
        Expect::Content,
    );
    Ok(made)
}

/// Right in front of what the kernel maps for the vDSO, and right behind it, where there is room.
fn beside_the_vdso(first: u64) -> Result<Made> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let of_kernel = maps
        .lines()
        .filter(|line| line.ends_with("[vdso]") || line.contains("[vvar"));
    let range = |line: &str| -> Option<(usize, usize)> {
        let (from, to) = line.split_once(' ')?.0.split_once('-')?;
        let number = |text| usize::from_str_radix(text, 16).ok();
        Some((number(from)?, number(to)?))
    };
    let ranges: Vec<(usize, usize)> = of_kernel.filter_map(range).collect();
    let begin = ranges.iter().map(|(from, _)| *from).min();
    let begin = begin.context("no vDSO")?;
    let end = ranges.iter().map(|(_, to)| *to).max().context("no vDSO")?;
    let mut made = Made::default();
    let pages = 4;
    for (n, at) in [begin - pages * page_bytes(), end].into_iter().enumerate() {
        if mappings::map_at(at, pages * page_bytes()).is_ok() {
            let number = first + (n * pages) as u64;
            fill(at, pages, number)?;
            made.add(at, pages, number, Expect::Content);
        }
    }
    if made.spans.is_empty() {
        bail!("no room beside the vDSO");
    }
    Ok(made)
}

/// The mapping begins and ends inside the segment.
fn shared_in_part(first: u64) -> Result<Made> {
    let (page, quarter) = (page_bytes(), PAGES / 4);
    let at = anonymous(SHARED, PAGES)?;
    fill(at, PAGES, first)?;
    mappings::unmap(at, quarter * page)?;
    mappings::unmap(at + 3 * quarter * page, quarter * page)?;
    let mut made = Made::default();
    made.add(
        at + quarter * page,
        2 * quarter,
        first + quarter as u64,
        Expect::Content,
    );
    Ok(made)
}

fn shared_twice(first: u64) -> Result<Made> {
    let at = anonymous(SHARED, PAGES)?;
    let again = mappings::move_away(at, 0, PAGES * page_bytes())?;
    let mut made = Made::filled(at, PAGES, first)?;
    made.add(again, PAGES, first, Expect::Content);
    Ok(made)
}

fn huge_sparse(first: u64) -> Result<Made> {
    let count = 3;
    let flags = PRIVATE | libc::MAP_HUGETLB;
    let at = mappings::map(count * HUGE_BYTES, true, flags, None)?;
    let pages = HUGE_BYTES / page_bytes();
    let mut made = Made::default();
    for n in 0..count {
        let (address, number) = (at + n * HUGE_BYTES, first + (n * pages) as u64);
        if n % 2 == 0 {
            fill(address, pages, number)?;
            made.add(address, pages, number, Expect::Content);
        } else {
            made.add(address, pages, number, Expect::Zero);
        }
    }
    Ok(made)
}

/// One huge page of hugetlbfs, two transparent ones, and one of a memfd, without a gap between them.
fn huge_neighbours(first: u64) -> Result<Made> {
    let memfd = memfd_create(c"huge-neighbour", MFdFlags::MFD_HUGETLB)?;
    nix::unistd::ftruncate(&memfd, HUGE_BYTES as i64)?;
    let room = 5 * HUGE_BYTES;
    let free = anonymous(PRIVATE, room / page_bytes())?;
    mappings::unmap(free, room)?;
    let at = free.next_multiple_of(HUGE_BYTES);
    let [thp, shared] = [1, 3].map(|n| at + n * HUGE_BYTES);
    mappings::map_kind_at(at, HUGE_BYTES, PRIVATE | libc::MAP_HUGETLB, None)?;
    mappings::map_at(thp, 2 * HUGE_BYTES)?;
    mappings::advise(thp, 2 * HUGE_BYTES, libc::MADV_HUGEPAGE)?;
    mappings::map_kind_at(shared, HUGE_BYTES, SHARED, Some(memfd.as_fd()))?;
    let made = Made::filled(at, 4 * HUGE_BYTES / page_bytes(), first)?;
    Ok(keeping(made, memfd))
}

/// Every eighth page is given back.
fn thp_with_holes(first: u64) -> Result<Made> {
    let pages = 2 * HUGE_BYTES / page_bytes();
    let at = anonymous(PRIVATE, pages)?;
    mappings::advise(at, pages * page_bytes(), libc::MADV_HUGEPAGE)?;
    fill(at, pages, first)?;
    let mut made = Made::default();
    for n in (0..pages).step_by(8) {
        let address = at + n * page_bytes();
        mappings::advise(address, page_bytes(), libc::MADV_DONTNEED)?;
        made.add(address, 1, first + n as u64, Expect::Zero);
        let rest = address + page_bytes();
        made.add(rest, 7, first + n as u64 + 1, Expect::Content);
    }
    Ok(made)
}

/// A half of the mapping is behind the end of the file, which was cut: it cannot be read.
fn beyond_the_end(dir: &Path, first: u64) -> Result<Made> {
    let (page, half) = (page_bytes(), PAGES / 2);
    let path = dir.join("file-past-end");
    fs::write(&path, of_file(first))?;
    let file = File::options().read(true).write(true).open(&path)?;
    let at = mappings::map(PAGES * page, true, PRIVATE, Some(file.as_fd()))?;
    let own = first + PAGES as u64;
    fill(at, 4, own)?;
    file.set_len((half * page) as u64)?;
    let mut made = Made::default();
    made.add(at, 4, own, Expect::Content);
    made.add(at + 4 * page, half - 4, first + 4, Expect::Content);
    made.add(at + half * page, PAGES - half, first, Expect::Gone);
    Ok(made)
}
