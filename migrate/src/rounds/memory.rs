//! Which pages of a running process a dump would hold, and their bytes.

use std::fs::{self, File};
use std::io::IoSliceMut;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::{Pid, Whence, lseek64};
use pageferry::error::Result;
use pageferry::units::{PageRange, PageSize, Vaddr};
use procfs::process::{MMPermissions, MMapPath, MemoryMap, Process};

use super::PageSink;
use super::page_map::{each_word, read_words, windows};
use super::track::{Tracker, Written};
use super::tree::Member;

/// Read from the process and sent at once, pages.
const RUN_PAGES: u64 = 256;

/// Of a word of /proc/PID/pagemap: the page is in memory.
const PRESENT: u64 = 1 << 63;
/// The page is swapped out.
const SWAPPED: u64 = 1 << 62;
/// The page is a file's or shared: the process has not written it.
const OF_FILE: u64 = 1 << 61;

/// What is mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Contents {
    /// Memory of the process's own.
    Private {
        /// Whether it is of no file: CRIU marks such pages as ones that a lazy restore may leave, and only they
        /// may be holes to an earlier round.
        anonymous: bool,
    },
    /// A segment of shared memory without a file: anonymous, memfd or System V.
    Shared {
        /// The inode, by which CRIU names the segment.
        id: u64,
        /// Where in the segment the mapping begins, bytes.
        offset: u64,
    },
}

/// One mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Area {
    pub(super) range: PageRange,
    pub(super) contents: Contents,
}

impl Area {
    /// The segment's id.
    pub(super) fn segment(&self) -> Option<u64> {
        match self.contents {
            Contents::Private { .. } => None,
            Contents::Shared { id, .. } => Some(id),
        }
    }
}

/// The mappings of a process whose pages a dump would hold; none if it has ended.
pub(super) fn areas(member: &Member) -> Vec<Area> {
    let maps = Process::new(member.pid).and_then(|process| process.maps());
    let maps = maps.map(|maps| maps.0).unwrap_or_default();
    maps.iter().filter_map(area).collect()
}

fn area(map: &MemoryMap) -> Option<Area> {
    let (start, end) = map.address;
    let path = match &map.pathname {
        MMapPath::Vdso | MMapPath::Vvar | MMapPath::Vsyscall => return None,
        MMapPath::Other(name) if name.starts_with("vvar") => return None,
        MMapPath::Path(path) => path.to_str().unwrap_or_default(),
        _ => "",
    };
    // CRIU restores huge pages of these kinds without asking a parent for them: they wait for the dump.
    if path.starts_with("/anon_hugepage") || path.starts_with("/dev/hugepages") {
        return None;
    }
    let contents = match map.perms.contains(MMPermissions::SHARED) {
        false => Contents::Private {
            anonymous: path.is_empty(),
        },
        true => {
            let is_segment = path.starts_with("/dev/zero (deleted)")
                || path.starts_with("/memfd:")
                || path.starts_with("/SYSV")
                || matches!(map.pathname, MMapPath::Vsys(_));
            if !is_segment {
                return None;
            }
            Contents::Shared {
                id: map.inode,
                offset: map.offset,
            }
        }
    };
    Some(Area {
        range: PageRange::new(start, end),
        contents,
    })
}

/// Sends the pages of a private mapping that a dump would hold. Of those, a tracker tells which the destination has
/// as they are.
pub(super) fn send_private(
    member: &Member,
    range: PageRange,
    page: PageSize,
    sink: &mut impl PageSink,
    mut tracker: Option<&mut Tracker>,
) -> Result<()> {
    let mut bytes = vec![0; usize::try_from(RUN_PAGES).unwrap_or(0) << page.shift()];
    let Ok(mut pagemap) = File::open(format!("/proc/{}/pagemap", member.pid)) else {
        // It has ended: so there is nothing to move.
        return Ok(());
    };
    // Before the pages are read: what is written from now on is the next round's.
    let written = match &tracker {
        Some(tracker) => tracker.written(range),
        None => Written::Unknown,
    };
    for (at, pages) in windows(member.pid, range, page) {
        let words = read_words(&mut pagemap, at >> page.shift(), pages);
        for (first, count) in runs(&words) {
            let start = at + ((first as u64) << page.shift());
            let is_there = |address: u64| match &tracker {
                Some(tracker) => !written.has(address) && tracker.was_sent(address),
                None => false,
            };
            for (start, count, there) in pieces(start, count, page, is_there) {
                if there {
                    sink.holes_at(Vaddr(start), count)?;
                    if let Some(tracker) = &mut tracker {
                        tracker.note(start, start + (count << page.shift()));
                    }
                } else {
                    let tracker = tracker.as_deref_mut();
                    send_run(member.pid, (start, count), page, &mut bytes, sink, tracker)?;
                }
            }
        }
    }
    Ok(())
}

/// Cuts a run of `count` pages at `start` where `is_there` changes: address, pages, and what it says of them.
fn pieces(
    start: u64,
    count: usize,
    page: PageSize,
    is_there: impl Fn(u64) -> bool,
) -> Vec<(u64, u64, bool)> {
    let mut pieces: Vec<(u64, u64, bool)> = Vec::new();
    for number in 0..count as u64 {
        let address = start + (number << page.shift());
        let there = is_there(address);
        match pieces.last_mut() {
            Some((_, count, same)) if *same == there => *count += 1,
            _ => pieces.push((address, 1, there)),
        }
    }
    pieces
}

/// Pages of a private mapping that a dump would hold.
pub(super) fn present_pages(pid: i32, range: PageRange, page: PageSize) -> u64 {
    let mut count = 0;
    each_word(pid, range, page, |_, word| {
        count += u64::from(is_private(word));
    });
    count
}

/// Mlocked memory of a process, bytes; 0 if it has ended.
pub(super) fn locked_bytes(pid: i32) -> u64 {
    let status = Process::new(pid).and_then(|process| process.status());
    status.ok().and_then(|status| status.vmlck).unwrap_or(0) << 10
}

/// Memory of a process that it shares with others since a fork, as far as others account for it, bytes; 0 if it has
/// ended. Summed over a tree: what the tree would need in addition if each of its processes had a copy.
pub(super) fn shared_since_fork_bytes(pid: i32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"));
    shared_of(&rollup.unwrap_or_default())
}

fn shared_of(rollup: &str) -> u64 {
    let field = |name: &str| {
        let line = rollup.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
        kib.and_then(|kib| kib.trim().parse::<u64>().ok())
            .unwrap_or(0)
            << 10
    };
    let in_memory = field("Anonymous:").saturating_sub(field("Pss_Anon:"));
    in_memory + field("Swap:").saturating_sub(field("SwapPss:"))
}

pub(super) fn is_private(word: u64) -> bool {
    word & (PRESENT | SWAPPED) != 0 && word & OF_FILE == 0
}

/// Runs of pages that a dump would hold: index of the first, and how many.
fn runs(words: &[u64]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (index, _) in words
        .iter()
        .enumerate()
        .filter(|(_, word)| is_private(**word))
    {
        match runs.last_mut() {
            Some((first, count)) if *first + *count == index => *count += 1,
            _ => runs.push((index, 1)),
        }
    }
    runs
}

fn send_run(
    pid: i32,
    (mut start, mut pages): (u64, u64),
    page: PageSize,
    bytes: &mut [u8],
    sink: &mut impl PageSink,
    mut tracker: Option<&mut Tracker>,
) -> Result<()> {
    while pages > 0 {
        let now = pages.min(RUN_PAGES);
        let length = usize::try_from(now).unwrap_or(0) << page.shift();
        let read = read_memory(pid, start, &mut bytes[..length]) >> page.shift();
        if read == 0 {
            // A guard, or memory that has been unmapped since: the dump knows more.
            start += page.bytes();
            pages -= 1;
            continue;
        }
        sink.pages_at(Vaddr(start), &bytes[..read << page.shift()])?;
        let end = start + ((read as u64) << page.shift());
        if let Some(tracker) = &mut tracker {
            tracker.note(start, end);
        }
        start = end;
        pages -= read as u64;
    }
    Ok(())
}

/// Reads what can be read; 0 if nothing can.
pub(crate) fn read_memory(pid: i32, start: u64, bytes: &mut [u8]) -> usize {
    let remote = [RemoteIoVec {
        base: usize::try_from(start).unwrap_or(0),
        len: bytes.len(),
    }];
    let mut local = [IoSliceMut::new(bytes)];
    loop {
        match process_vm_readv(Pid::from_raw(pid), &mut local, &remote) {
            Err(Errno::EINTR) => {}
            read => return read.unwrap_or(0),
        }
    }
}

/// Sends the pages of a segment that have ever been written, through the mapping's file: reading the mapping
/// itself would give memory to pages that have none.
pub(super) fn send_shared(
    pid: i32,
    area: &Area,
    page: PageSize,
    sink: &mut impl PageSink,
) -> Result<()> {
    let Some((file, data)) = data_of(pid, area) else {
        return Ok(());
    };
    let mut bytes = vec![0; usize::try_from(RUN_PAGES).unwrap_or(0) << page.shift()];
    for (start, end) in data {
        let mut at = page.floor(start);
        while at < end {
            let length = usize::try_from(end - at).unwrap_or(0).min(bytes.len());
            let length = length & !(page.as_usize() - 1);
            if length == 0 || file.read_exact_at(&mut bytes[..length], at).is_err() {
                // Cut since: the dump knows more.
                return Ok(());
            }
            // CRIU numbers a segment's pages from its own beginning.
            sink.pages_at(Vaddr(at), &bytes[..length])?;
            at += length as u64;
        }
    }
    Ok(())
}

/// Bytes of a segment that have memory.
pub(super) fn shared_bytes(pid: i32, area: &Area) -> u64 {
    let data = data_of(pid, area).map(|(_, data)| data).unwrap_or_default();
    data.iter().map(|(start, end)| end - start).sum()
}

/// The file of a mapped segment, and the parts of it that are mapped and have memory.
fn data_of(pid: i32, area: &Area) -> Option<(File, Vec<(u64, u64)>)> {
    let Contents::Shared { offset, .. } = area.contents else {
        return None;
    };
    let (start, end) = (area.range.start().get(), area.range.end().get());
    let path = format!("/proc/{pid}/map_files/{start:x}-{end:x}");
    let file = File::open(&path).ok()?;
    let length = fs::metadata(&path).map_or(0, |meta| meta.len());
    let last = length.min(offset + area.range.bytes());
    let mut data = Vec::new();
    let mut at = offset;
    while at < last
        && let Some(first) = seek(&file, at, Whence::SeekData).filter(|&first| first < last)
    {
        at = seek(&file, first, Whence::SeekHole)
            .unwrap_or(last)
            .min(last);
        data.push((first, at));
    }
    Some((file, data))
}

fn seek(file: &File, at: u64, whence: Whence) -> Option<u64> {
    let at = i64::try_from(at).ok()?;
    lseek64(file, at, whence)
        .ok()
        .and_then(|found| u64::try_from(found).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pages_of_the_process_make_runs() {
        let (own, swapped, of_file) = (PRESENT, SWAPPED, PRESENT | OF_FILE);
        let words = [own, own, 0, of_file, swapped, own];
        assert_eq!(runs(&words), [(0, 2), (4, 2)]);
        assert_eq!(runs(&[0, of_file]), []);
    }

    #[test]
    fn runs_are_cut_where_the_tracker_says_so() {
        let page = PageSize::new(4096).unwrap();
        let even = |address: u64| (address >> 13).is_multiple_of(2);
        let expected = [(4096, 1, true), (8192, 2, false), (16384, 1, true)];
        assert_eq!(pieces(4096, 4, page, even), expected);
        assert_eq!(pieces(4096, 0, page, even), []);
    }
}
