//! Pages as CRIU 4.3 compresses them: a block a page, one behind the other in the pages file.
//!
//! A block of no bytes is a zero page, one of a page's size is the page itself, anything between is
//! LZ4 without a frame.

use std::borrow::Cow;
use std::sync::Arc;

use super::pages::PagesFile;
use crate::error::{Error, Kind, Result};
use crate::units::PageSize;

/// Pages decompressed between two reads of the file.
const BLOCKS_AT_ONCE: usize = 64;

/// The blocks of one compressed entry.
#[derive(Debug)]
pub(super) struct BlockList {
    /// Number of the pages file in its chain.
    pub(super) file: u32,
    /// Offset of the first block in bytes.
    pub(super) offset: u64,
    /// The end of each page's block, in bytes behind `offset`.
    pub(super) ends: Arc<[u64]>,
}

impl BlockList {
    /// Where a page's block begins, in bytes behind the list's offset, and its length.
    pub(super) fn block(&self, index: usize) -> (u64, usize) {
        let (start, bytes) = self.span(index, 1);
        let bytes = usize::try_from(bytes).expect("a block is no longer than a page");
        (start, bytes)
    }

    /// The same for the blocks of `pages` pages together.
    pub(super) fn span(&self, index: usize, pages: u64) -> (u64, u64) {
        let pages = usize::try_from(pages).expect("a list of blocks fits in memory");
        let start = match index {
            0 => 0,
            _ => self.ends[index - 1],
        };
        (start, self.ends[index + pages - 1] - start)
    }

    /// Fills `out`, whole pages, from the blocks from number `first` on, which are in `file`.
    pub(super) fn read(
        &self,
        file: &PagesFile,
        first: usize,
        out: &mut [u8],
        page: PageSize,
    ) -> Result<()> {
        let page = page.as_usize();
        let mut stored = Vec::new();
        let chunks = out.chunks_mut(page * BLOCKS_AT_ONCE);
        for (first, out) in (first..).step_by(BLOCKS_AT_ONCE).zip(chunks) {
            let (start, bytes) = self.span(first, (out.len() / page) as u64);
            let bytes = usize::try_from(bytes).expect("blocks are no longer than pages");
            stored.resize(bytes, 0);
            file.read_at(&mut stored, self.offset + start)?;
            for (index, out) in (first..).zip(out.chunks_mut(page)) {
                let (at, bytes) = self.block(index);
                let within = usize::try_from(at - start).expect("inside what was read");
                unpack(&stored[within..within + bytes], out).map_err(|problem| {
                    let (path, offset) = (file.path().display(), self.offset + at);
                    let text = format!("{path}: the compressed page at {offset} {problem}");
                    Error::new(Kind::Image, text)
                })?;
            }
        }
        Ok(())
    }
}

/// The block of a page that is not zero: compressed, or raw where that gains less than an eighth, as
/// CRIU does.
pub fn compressed_block(page: &[u8]) -> Cow<'_, [u8]> {
    let block = lz4_flex::block::compress(page);
    if block.len() >= page.len() / 8 * 7 {
        Cow::Borrowed(page)
    } else {
        Cow::Owned(block)
    }
}

/// Fills `out`, one page, from its stored block.
fn unpack(block: &[u8], out: &mut [u8]) -> std::result::Result<(), String> {
    if block.is_empty() {
        out.fill(0);
    } else if block.len() == out.len() {
        out.copy_from_slice(block);
    } else {
        let page = out.len();
        let bytes = lz4_flex::block::decompress_into(block, out)
            .map_err(|error| format!("cannot be decompressed: {error}"))?;
        if bytes != page {
            return Err(format!("decompresses to {bytes} bytes and not to {page}"));
        }
    }
    Ok(())
}
