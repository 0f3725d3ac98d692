//! Each page is looked at before it is stored.
//!
//! ```text
//! page --> all zero? ------------> entry, no bytes                     (dedup, compress)
//!      --> equals the parent's? -> entry with PARENT, no bytes         (dedup; where CRIU looks into parents)
//!      --> equals another process's?   likewise                        (dedup of a tree; `image::tree` decides)
//!      --> compress it? ---------> block of an entry with blocks       (compress)
//!      --> store it as it is
//! ```

use std::ops::Range;

use super::side_buffer::{Blocks, SideBuffer, unpack};
use super::{IngestMode, IngestOptions, IngestScope};
use crate::criu::header::PageFlags;
use crate::engine::io::batch::Plan;
use crate::engine::io::session_io::SessionIo;
use crate::error::Result;
use crate::image::blocks::compressed_block;
use crate::image::tree::{TreeCounts, TreePlace};
use crate::image::writer::{Destination, SessionImages};
use crate::limits::RECEIVE_BUFFER_BYTES;
use crate::observe::received::StoredPages;
use crate::sys::buffers::Buffer;
use crate::units::{PageRange, PageSize, Vaddr};

/// See the module's text.
#[derive(Debug)]
pub(super) struct Inspected {
    options: IngestOptions,
    page: PageSize,
    /// Address of the run's next page.
    next: Vaddr,
    flags: PageFlags,
    /// A page that a buffer's end has cut, or that was decompressed; never more than a page.
    carried: Vec<u8>,
    blocks: Blocks,
    side_buffer: SideBuffer,
    pack: Option<Pack>,
    kept: StoredPages,
    /// The pages that processes of a tree may share.
    shared: TreeCounts,
}

/// Where the bytes of a whole page are.
#[derive(Clone, Debug)]
enum Content {
    /// In this range of the receive buffer.
    Received(Range<usize>),
    /// In [`Inspected::carried`].
    Carried,
    /// Nowhere: they are zero.
    Zero,
}

/// An entry of compressed pages that is being filled.
#[derive(Debug)]
struct Pack {
    first: Vaddr,
    flags: PageFlags,
    /// Stored size of each page in bytes.
    sizes: Vec<u32>,
    buffer: Buffer,
    filled: usize,
}

impl Inspected {
    pub(super) fn new(options: IngestOptions, page: PageSize) -> Inspected {
        Inspected {
            options,
            page,
            next: Vaddr(0),
            flags: PageFlags::default(),
            carried: Vec::with_capacity(page.as_usize()),
            blocks: Blocks::default(),
            side_buffer: SideBuffer::default(),
            pack: None,
            kept: StoredPages::default(),
            shared: TreeCounts::default(),
        }
    }

    /// Stores the run's next page.
    fn page(&mut self, scope: &mut IngestScope<'_>, content: &Content) -> Result<()> {
        let start = self.next.get();
        let range = PageRange::new(start, start + self.page.bytes());
        self.next = range.end();
        let zero = match content {
            Content::Received(range) => is_zero(&scope.buffer[range.clone()]),
            Content::Carried => is_zero(&self.carried),
            Content::Zero => true,
        };
        let content = if zero { &Content::Zero } else { content };
        let may_be_hole = self.options.dedup_content && scope.images.may_be_hole(self.flags);
        if !zero && may_be_hole {
            let bytes = match content {
                Content::Received(range) => &scope.buffer[range.clone()],
                _ => &self.carried,
            };
            if scope.images.equals_parent(range.start(), bytes)? {
                self.end_pack(scope.images, scope.session_io)?;
                let in_parent = self.flags.without(PageFlags::PRESENT);
                scope
                    .images
                    .append(range, in_parent.with(PageFlags::PARENT))?;
                self.kept.same_as_parent += 1;
                return Ok(());
            }
        }
        if self.options.dedup_tree && scope.images.goes_to_tree(self.flags) {
            return self.share(scope, range, content);
        }
        self.kept.zero += u64::from(zero);
        if self.options.compress && scope.images.may_be_compressed(self.flags) {
            self.pack(scope, range.start(), content)
        } else {
            self.end_pack(scope.images, scope.session_io)?;
            self.store(scope, range, content)
        }
    }

    fn store(
        &mut self,
        scope: &mut IngestScope<'_>,
        range: PageRange,
        content: &Content,
    ) -> Result<()> {
        let Some(to) = scope.images.append(range, self.flags)? else {
            return Ok(());
        };
        if !matches!(content, Content::Zero) {
            self.kept.stored_bytes += range.bytes();
        }
        self.write(scope, &to, content)
    }

    /// Stores a page that processes of a tree may share.
    fn share(
        &mut self,
        scope: &mut IngestScope<'_>,
        range: PageRange,
        content: &Content,
    ) -> Result<()> {
        self.end_pack(scope.images, scope.session_io)?;
        let bytes = match content {
            Content::Zero => None,
            Content::Received(range) => Some(&scope.buffer[range.clone()]),
            Content::Carried => Some(self.carried.as_slice()),
        };
        let place = scope.images.append_to_tree(range, self.flags, bytes)?;
        self.shared = scope.images.tree_counts();
        match place {
            TreePlace::Settled => Ok(()),
            TreePlace::At(to) => self.write(scope, &to, content),
        }
    }

    fn write(
        &mut self,
        scope: &mut IngestScope<'_>,
        to: &Destination,
        content: &Content,
    ) -> Result<()> {
        match content {
            Content::Zero => {}
            Content::Received(range) => scope.plan.push(&to.part, to.offset, range.clone()),
            Content::Carried => {
                let bytes = self.carried.len();
                let room = self.side_buffer.room(scope.session_io, bytes)?;
                room.copy_from_slice(&self.carried);
                self.side_buffer.place(bytes, to);
            }
        }
        Ok(())
    }

    fn pack(&mut self, scope: &mut IngestScope<'_>, vaddr: Vaddr, content: &Content) -> Result<()> {
        let goes_on = |pack: &Pack| {
            let end = pack.first.get() + self.page.bytes() * pack.sizes.len() as u64;
            let has_room = pack.filled + self.page.as_usize() <= pack.buffer.len();
            end == vaddr.get() && pack.flags == self.flags && has_room && !pack.is_full(self.page)
        };
        if !self.pack.as_ref().is_some_and(goes_on) {
            self.end_pack(scope.images, scope.session_io)?;
        }
        let pack = match &mut self.pack {
            Some(pack) => pack,
            empty @ None => empty.insert(Pack {
                first: vaddr,
                flags: self.flags,
                sizes: Vec::new(),
                buffer: scope.session_io.buffer()?,
                filled: 0,
            }),
        };
        match content {
            Content::Zero => pack.sizes.push(0),
            Content::Received(range) => pack.add(&scope.buffer[range.clone()]),
            Content::Carried => pack.add(&self.carried),
        }
        Ok(())
    }

    fn end_pack(&mut self, images: &mut SessionImages, session_io: &mut SessionIo) -> Result<()> {
        let Some(pack) = self.pack.take() else {
            return Ok(());
        };
        let start = pack.first.get();
        let end = start + self.page.bytes() * pack.sizes.len() as u64;
        let range = PageRange::new(start, end);
        let to = images.append_blocks(range, pack.flags, pack.sizes)?;
        let mut plan = Plan::default();
        if pack.filled > 0 {
            plan.push(&to.part, to.offset, 0..pack.filled);
        }
        self.kept.stored_bytes += pack.filled as u64;
        session_io.write(pack.buffer, plan)
    }
}

impl Pack {
    /// Whether the entry has as many pages as it may: what fits in a buffer if none is compressible.
    fn is_full(&self, page: PageSize) -> bool {
        self.sizes.len() >= RECEIVE_BUFFER_BYTES / page.as_usize()
    }

    /// Adds a page.
    fn add(&mut self, bytes: &[u8]) {
        let stored = compressed_block(bytes);
        self.buffer[self.filled..self.filled + stored.len()].copy_from_slice(&stored);
        self.filled += stored.len();
        let size = u32::try_from(stored.len()).expect("no more than a page");
        self.sizes.push(size);
    }
}

impl IngestMode for Inspected {
    fn begin_run(
        &mut self,
        scope: &mut IngestScope<'_>,
        range: PageRange,
        flags: PageFlags,
    ) -> Result<()> {
        self.next = range.start();
        self.flags = flags;
        if !flags.has(PageFlags::PRESENT) {
            self.end_pack(scope.images, scope.session_io)?;
            scope.images.append(range, flags)?;
        }
        Ok(())
    }

    fn raw(&mut self, scope: &mut IngestScope<'_>, range: Range<usize>) -> Result<()> {
        let page = self.page.as_usize();
        let mut at = range.start;
        while at < range.end {
            let left = range.end - at;
            if self.carried.is_empty() && left >= page {
                self.page(scope, &Content::Received(at..at + page))?;
                at += page;
                continue;
            }
            let taken = left.min(page - self.carried.len());
            self.carried
                .extend_from_slice(&scope.buffer[at..at + taken]);
            at += taken;
            if self.carried.len() == page {
                self.page(scope, &Content::Carried)?;
                self.carried.clear();
            }
        }
        Ok(())
    }

    fn lz4(&mut self, scope: &mut IngestScope<'_>, range: Range<usize>, ends: bool) -> Result<()> {
        if let Some(block) = self.blocks.add(&scope.buffer[range], ends) {
            self.carried.resize(self.page.as_usize(), 0);
            unpack(block, &mut self.carried)?;
            self.page(scope, &Content::Carried)?;
            self.carried.clear();
        }
        Ok(())
    }

    fn zero_page(&mut self, scope: &mut IngestScope<'_>) -> Result<()> {
        self.page(scope, &Content::Zero)
    }

    fn end_target(&mut self, images: &mut SessionImages, session_io: &mut SessionIo) -> Result<()> {
        self.end_pack(images, session_io)?;
        images.end_target_in_tree()?;
        self.shared = images.tree_counts();
        self.side_buffer.flush(session_io)
    }

    fn stored(&self) -> StoredPages {
        self.kept.with_tree(self.shared, self.page)
    }
}

/// Whether all bytes of a page are zero.
fn is_zero(bytes: &[u8]) -> bool {
    let (front, words, back) = bytemuck::pod_align_to::<u8, u128>(bytes);
    words.iter().all(|word| *word == 0) && front.iter().chain(back).all(|byte| *byte == 0)
}
