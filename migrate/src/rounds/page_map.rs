//! /proc/PID/pagemap: a word for each page of a process.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use pageferry::sys::pagemap::Pagemap;
use pageferry::units::{PageRange, PageSize};

/// Bytes of a word.
const WORD: usize = 8;

/// Words that are read at once.
const WINDOW_PAGES: u64 = 4096;

/// Calls `each` with the address and the word of every page of `range` in /proc/PID/pagemap.
pub(super) fn each_word(
    pid: i32,
    range: PageRange,
    page: PageSize,
    mut each: impl FnMut(u64, u64),
) {
    let Ok(mut pagemap) = File::open(format!("/proc/{pid}/pagemap")) else {
        return;
    };
    for (at, pages) in windows(pid, range, page) {
        for (index, word) in (0..).zip(read_words(&mut pagemap, at >> page.shift(), pages)) {
            each(at + (index << page.shift()), word);
        }
    }
}

/// The parts of `range` that are worth reading, as addresses and pages: in a reservation of terabytes only those with pages,
/// if this kernel can tell (Linux 6.7).
pub(super) fn windows(pid: i32, range: PageRange, page: PageSize) -> Vec<(u64, u64)> {
    let mut windows = Vec::new();
    if range.bytes() >> page.shift() > WINDOW_PAGES {
        let pagemap = Pagemap::open(Path::new(&format!("/proc/{pid}/pagemap")));
        let told = pagemap
            .and_then(|pagemap| pagemap.populated(range, |run| add(&mut windows, run, page)));
        if told.is_ok() {
            return windows;
        }
        windows.clear();
    }
    add(&mut windows, range, page);
    windows
}

fn add(windows: &mut Vec<(u64, u64)>, run: PageRange, page: PageSize) {
    let (mut at, end) = (run.start().get(), run.end().get());
    if let Some((last, pages)) = windows.last_mut() {
        // What lies between is read faster than it is left out.
        let together = (end - *last) >> page.shift();
        if together <= WINDOW_PAGES {
            *pages = together;
            return;
        }
    }
    while at < end {
        let pages = ((end - at) >> page.shift()).min(WINDOW_PAGES);
        windows.push((at, pages));
        at += pages << page.shift();
    }
}

/// So many words from that of the page `first` on; none if the process has ended.
pub(super) fn read_words(pagemap: &mut File, first: u64, count: u64) -> Vec<u64> {
    let mut bytes = vec![0; usize::try_from(count).unwrap_or(0) * WORD];
    let read = pagemap
        .seek(SeekFrom::Start(first * WORD as u64))
        .and_then(|_| pagemap.read_exact(&mut bytes));
    if read.is_err() {
        return Vec::new();
    }
    let word = |chunk: &[u8]| u64::from_le_bytes(chunk.try_into().unwrap_or_default());
    bytes.chunks_exact(WORD).map(word).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_far_apart_is_read_apart() {
        let page = PageSize::new(4096).unwrap();
        let mut windows = Vec::new();
        let runs = [(0, 1), (3, 4), (1 << 20, (1 << 20) + WINDOW_PAGES + 1)];
        for (start, end) in runs {
            add(&mut windows, PageRange::new(start << 12, end << 12), page);
        }
        let far = 1 << 32;
        let behind = far + (WINDOW_PAGES << 12);
        assert_eq!(windows, [(0, 4), (far, WINDOW_PAGES), (behind, 1)]);
    }

    #[test]
    fn a_small_range_is_read_whole() {
        let page = PageSize::new(4096).unwrap();
        let pid = i32::try_from(std::process::id()).unwrap();
        let range = PageRange::new(1 << 12, 9 << 12);
        assert_eq!(windows(pid, range, page), [(1 << 12, 8)]);
    }
}
