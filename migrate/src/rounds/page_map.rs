//! /proc/PID/pagemap: a word for each page of a process.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use pageferry::units::{PageRange, PageSize};

/// Bytes of a word.
const WORD: usize = 8;

/// Words that are read at once.
pub(super) const WINDOW_PAGES: u64 = 4096;

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
    let mut at = range.start().get();
    while at < range.end().get() {
        let pages = ((range.end().get() - at) >> page.shift()).min(WINDOW_PAGES);
        for (index, word) in (0..).zip(read_words(&mut pagemap, at >> page.shift(), pages)) {
            each(at + (index << page.shift()), word);
        }
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
