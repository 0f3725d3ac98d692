//! Pagemap entries and what they mean: sorted extents, each with the place of its bytes.
//!
//! Pure. The bytes of the entries with PRESENT stand in the pages file in the order of the entries;
//! an entry without it takes no room there.

use std::sync::Arc;

use thiserror::Error;

use super::proto::{CompressedBlocks, PagemapEntry};
use crate::criu::header::{PageFlags, Wire};
use crate::units::{PageCount, PageRange, PageSize, Vaddr};

/// One entry of a pagemap, checked, with the place of its bytes in the pages file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Extent {
    /// The addresses in the dumped process (or offsets in the shared memory segment).
    pub range: PageRange,
    /// PARENT, LAZY, PRESENT.
    pub flags: PageFlags,
    /// Where the bytes are in this directory's pages file.
    pub payload: Payload,
}

/// Where an extent's bytes are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Payload {
    /// Not in this pages file.
    None,
    /// Page after page from `offset` (bytes) of the pages file on.
    Raw {
        /// Offset of the first page in bytes.
        offset: u64,
    },
    /// Blocks of one page each, one behind the other, from `ends[-1] = offset` on.
    Blocks {
        /// Offset of the first block in bytes.
        offset: u64,
        /// For each page the end of its block, in bytes behind `offset`.
        ends: Arc<[u64]>,
    },
}

/// An entry that no CRIU writes.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum PagemapError {
    /// The address is unaligned, the count is zero or the range overflows.
    #[error(
        "entry {index} covers {pages} pages at {vaddr:#x}, which is not a valid range of pages"
    )]
    Range {
        /// The entry's number, from 0.
        index: usize,
        /// Its address.
        vaddr: u64,
        /// Its page count.
        pages: u64,
    },
    /// An entry begins before the end of the one before it.
    #[error(
        "entry {index} at {vaddr:#x} begins before {previous_end:#x}, where the entry before it ends"
    )]
    Order {
        /// The entry's number, from 0.
        index: usize,
        /// Its address.
        vaddr: u64,
        /// Where the entry before it ends.
        previous_end: u64,
    },
    /// PRESENT and PARENT at once.
    #[error(
        "entry {index} at {vaddr:#x} has flags {flags:#x}: its pages can't be both here and in the parent"
    )]
    Flags {
        /// The entry's number, from 0.
        index: usize,
        /// Its address.
        vaddr: u64,
        /// Its flags.
        flags: u32,
    },
    /// A list of compressed blocks that does not fit the entry.
    #[error("entry {index} at {vaddr:#x}: {problem}")]
    Blocks {
        /// The entry's number, from 0.
        index: usize,
        /// Its address.
        vaddr: u64,
        /// What does not fit.
        problem: &'static str,
    },
}

/// Turns entries into extents, one after the other, in the order of the file.
#[derive(Debug)]
pub struct PagemapDecoder {
    page: PageSize,
    index: usize,
    previous_end: u64,
    /// Next byte of the pages file that no entry has used.
    offset: u64,
}

impl PagemapDecoder {
    /// A decoder at the first entry behind the head.
    pub fn new(page: PageSize) -> PagemapDecoder {
        PagemapDecoder {
            page,
            index: 0,
            previous_end: 0,
            offset: 0,
        }
    }

    /// The extent that `entry` describes.
    pub fn decode(&mut self, entry: &PagemapEntry) -> Result<Extent, PagemapError> {
        let index = self.index;
        let vaddr = entry.vaddr;
        let pages = entry.pages();
        let range = PageRange::checked(Vaddr(vaddr), PageCount(pages), self.page).ok_or(
            PagemapError::Range {
                index,
                vaddr,
                pages,
            },
        )?;
        if vaddr < self.previous_end {
            let previous_end = self.previous_end;
            return Err(PagemapError::Order {
                index,
                vaddr,
                previous_end,
            });
        }
        let flags = entry_flags(entry);
        if flags.has(PageFlags::PRESENT) && flags.has(PageFlags::PARENT) {
            return Err(PagemapError::Flags {
                index,
                vaddr,
                flags: flags.bits(),
            });
        }
        let payload = if flags.has(PageFlags::PRESENT) {
            let blocks = |problem| PagemapError::Blocks {
                index,
                vaddr,
                problem,
            };
            self.place(entry.blocks.as_ref(), range, flags)
                .map_err(blocks)?
        } else {
            Payload::None
        };
        self.index += 1;
        self.previous_end = range.end().get();
        Ok(Extent {
            range,
            flags,
            payload,
        })
    }

    /// Takes the room of an entry with PRESENT.
    fn place(
        &mut self,
        blocks: Option<&CompressedBlocks>,
        range: PageRange,
        flags: PageFlags,
    ) -> Result<Payload, &'static str> {
        const TOO_FAR: &str = "its bytes would lie beyond the end of any file";
        if flags.has(PageFlags::PAYLOAD_ALIGNED) {
            let up = self
                .offset
                .checked_add(self.page.bytes() - 1)
                .ok_or(TOO_FAR)?;
            self.offset = self.page.floor(up);
        }
        let offset = self.offset;
        let (payload, bytes) = match blocks {
            None => (Payload::Raw { offset }, range.bytes()),
            Some(blocks) => {
                let ends = block_ends(blocks, range, self.page)?;
                let bytes = ends.last().copied().unwrap_or(0);
                (Payload::Blocks { offset, ends }, bytes)
            }
        };
        self.offset = offset.checked_add(bytes).ok_or(TOO_FAR)?;
        Ok(payload)
    }
}

fn entry_flags(entry: &PagemapEntry) -> PageFlags {
    let old_parent = entry.in_parent == Some(true);
    match entry.flags {
        Some(bits) if old_parent => PageFlags::from_bits(bits).with(PageFlags::PARENT),
        Some(bits) => PageFlags::from_bits(bits),
        // Before there were flags an entry was here unless it was in the parent.
        None if old_parent => PageFlags::PARENT,
        None => PageFlags::PRESENT,
    }
}

fn block_ends(
    blocks: &CompressedBlocks,
    range: PageRange,
    page: PageSize,
) -> Result<Arc<[u64]>, &'static str> {
    if blocks.pages_per_block.unwrap_or(1) != 1 {
        return Err("it has blocks of several pages, which no CRIU up to 4.3 writes");
    }
    if blocks.block_sizes.len() as u64 != range.pages(page).get() {
        return Err("it has another number of compressed blocks than pages");
    }
    let mut end = 0;
    let ends = blocks.block_sizes.iter().map(|size| {
        end += u64::from(*size);
        end
    });
    let ends: Arc<[u64]> = ends.collect();
    if blocks
        .block_sizes
        .iter()
        .any(|size| u64::from(*size) > page.bytes())
    {
        return Err("a compressed block is larger than a page");
    }
    if blocks.total_payload_size.is_some_and(|total| total != end) {
        return Err("its compressed blocks do not add up to its payload size");
    }
    Ok(ends)
}

/// The entry that describes `range`, for every CRIU and every tool: the page count stands where CRIU up to
/// 4.1.1 writes it and looks for it, and where later ones do. Whose dump it is still shows, see
/// [`PagemapEntry::wire`].
///
/// More pages than 32 bits can count, and compressed pages, have no count for CRIU up to 4.1.1, as in
/// images of later ones: it must not take them for other pages than they are.
pub fn encode_entry(
    range: PageRange,
    flags: PageFlags,
    blocks: Option<CompressedBlocks>,
    wire: Wire,
    page: PageSize,
) -> PagemapEntry {
    let pages = range.pages(page).get();
    let compat_nr_pages = match &blocks {
        None => u32::try_from(pages).unwrap_or(0),
        Some(_) => 0,
    };
    PagemapEntry {
        vaddr: range.start().get(),
        compat_nr_pages,
        in_parent: (wire == Wire::V1).then_some(false),
        flags: Some(flags.bits()),
        nr_pages: Some(pages),
        blocks,
    }
}

impl PagemapEntry {
    /// How many pages it covers, for a CRIU that knows both counts.
    pub fn pages(&self) -> u64 {
        self.nr_pages.unwrap_or(u64::from(self.compat_nr_pages))
    }

    /// The layout of frames that the CRIU speaks from whose dump this entry is. Up to 4.1.1 it writes the
    /// page count in field 2, later ones in field 5. Entries that a page server of ours has written have
    /// both; field 3, which current CRIUs do not use and all of them understand, marks there what came
    /// from one up to 4.1.1.
    pub fn wire(&self) -> Wire {
        match (self.nr_pages, self.in_parent) {
            (None, _) | (Some(_), Some(false)) => Wire::V1,
            (Some(_), _) => Wire::V2,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: PageSize = PageSize::KIB_4;

    fn flags() -> impl Strategy<Value = PageFlags> {
        prop::sample::select(vec![
            PageFlags::PRESENT,
            PageFlags::PRESENT.with(PageFlags::LAZY),
            PageFlags::PARENT,
            PageFlags::LAZY,
        ])
    }

    proptest! {
        /// Whatever runs a sender says, both entry formats give the same extents back, and each
        /// PRESENT run's bytes begin where those of the runs before it end.
        #[test]
        fn entries_survive_the_file(runs in prop::collection::vec((0..9u64, 1..99u64, flags()), 0..40), v1: bool) {
            let wire = if v1 { Wire::V1 } else { Wire::V2 };
            let mut decoder = PagemapDecoder::new(PAGE);
            let (mut at, mut stored) = (0x1000, 0);
            for (gap, pages, flags) in runs {
                let range = PageRange::new(at + gap * 4096, at + (gap + pages) * 4096);
                at = range.end().get();
                let entry = encode_entry(range, flags, None, wire, PAGE);
                prop_assert_eq!(entry.wire(), wire);
                prop_assert_eq!(u64::from(entry.compat_nr_pages), pages);
                let extent = decoder.decode(&entry).unwrap();
                prop_assert_eq!((extent.range, extent.flags), (range, flags));
                if flags.has(PageFlags::PRESENT) {
                    prop_assert_eq!(extent.payload, Payload::Raw { offset: stored });
                    stored += range.bytes();
                } else {
                    prop_assert_eq!(extent.payload, Payload::None);
                }
            }
        }
    }

    #[test]
    fn entries_tell_whose_dump_they_are_of() {
        let entry = |nr_pages, in_parent| PagemapEntry {
            vaddr: 0x1000,
            compat_nr_pages: 1,
            in_parent,
            flags: Some(4),
            nr_pages,
            blocks: None,
        };
        // As each CRIU writes them, and very old ones with a parent.
        assert_eq!(entry(None, None).wire(), Wire::V1);
        assert_eq!(entry(None, Some(true)).wire(), Wire::V1);
        assert_eq!(entry(Some(1), None).wire(), Wire::V2);
    }

    #[test]
    fn old_criu_is_not_told_of_what_it_would_misread() {
        let entry = |pages: u64, blocks| {
            let range = PageRange::new(0x1000, 0x1000 + pages * 4096);
            encode_entry(range, PageFlags::PRESENT, blocks, Wire::V2, PAGE)
        };
        let most = u64::from(u32::MAX);
        assert_eq!(entry(most, None).compat_nr_pages, u32::MAX);
        assert_eq!(entry(most + 1, None).compat_nr_pages, 0);
        let blocks = CompressedBlocks {
            block_sizes: vec![7],
            total_payload_size: Some(7),
            pages_per_block: Some(1),
        };
        assert_eq!(entry(1, Some(blocks)).compat_nr_pages, 0);
    }

    #[test]
    fn compressed_entries_take_the_room_of_their_blocks() {
        let blocks = CompressedBlocks {
            block_sizes: vec![0, 100, 4096],
            total_payload_size: Some(4196),
            pages_per_block: Some(1),
        };
        let mut decoder = PagemapDecoder::new(PAGE);
        let first = PageRange::new(0x1000, 0x4000);
        let entry = encode_entry(first, PageFlags::PRESENT, Some(blocks), Wire::V2, PAGE);
        let extent = decoder.decode(&entry).unwrap();
        assert_eq!(
            extent.payload,
            Payload::Blocks {
                offset: 0,
                ends: [0, 100, 4196].into()
            }
        );
        let aligned = PageFlags::PRESENT.with(PageFlags::PAYLOAD_ALIGNED);
        let entry = encode_entry(
            PageRange::new(0x9000, 0xa000),
            aligned,
            None,
            Wire::V2,
            PAGE,
        );
        assert_eq!(
            decoder.decode(&entry).unwrap().payload,
            Payload::Raw { offset: 8192 }
        );
    }

    #[test]
    fn entries_that_no_criu_writes_are_refused() {
        let range = PageRange::new(0x5000, 0x7000);
        let good = encode_entry(range, PageFlags::PRESENT, None, Wire::V2, PAGE);
        let decode = |entries: &[PagemapEntry]| {
            let mut decoder = PagemapDecoder::new(PAGE);
            entries
                .iter()
                .map(|entry| decoder.decode(entry))
                .last()
                .unwrap()
        };
        let unaligned = PagemapEntry {
            vaddr: 0x5001,
            ..good.clone()
        };
        assert!(matches!(
            decode(&[unaligned]),
            Err(PagemapError::Range { .. })
        ));
        let endless = PagemapEntry {
            nr_pages: Some(u64::MAX),
            ..good.clone()
        };
        assert!(matches!(
            decode(&[endless]),
            Err(PagemapError::Range { .. })
        ));
        assert!(matches!(
            decode(&[good.clone(), good.clone()]),
            Err(PagemapError::Order { .. })
        ));
        let both = PagemapEntry {
            flags: Some(5),
            ..good.clone()
        };
        assert!(matches!(decode(&[both]), Err(PagemapError::Flags { .. })));
        let sizes = |block_sizes: Vec<u32>, total| CompressedBlocks {
            block_sizes,
            total_payload_size: Some(total),
            pages_per_block: None,
        };
        for blocks in [
            sizes(vec![1], 1),
            sizes(vec![1, 4097], 4098),
            sizes(vec![1, 2], 4),
        ] {
            let entry = PagemapEntry {
                blocks: Some(blocks),
                ..good.clone()
            };
            assert!(matches!(decode(&[entry]), Err(PagemapError::Blocks { .. })));
        }
    }

    #[test]
    fn entries_without_flags_are_here_or_in_the_parent() {
        let old = |in_parent| PagemapEntry {
            vaddr: 0x1000,
            compat_nr_pages: 1,
            in_parent,
            flags: None,
            nr_pages: None,
            blocks: None,
        };
        assert_eq!(entry_flags(&old(None)), PageFlags::PRESENT);
        assert_eq!(entry_flags(&old(Some(true))), PageFlags::PARENT);
    }
}
