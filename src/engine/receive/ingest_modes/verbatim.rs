//! Every page is stored at its place, whatever is in it: nobody looks at the bytes.

use std::ops::Range;

use super::side_buffer::{Blocks, SideBuffer, unpack};
use super::{IngestMode, IngestScope};
use crate::criu::header::PageFlags;
use crate::engine::io::session_io::SessionIo;
use crate::error::Result;
use crate::image::writer::{Destination, SessionImages};
use crate::observe::received::StoredPages;
use crate::units::{PageRange, PageSize};

/// See the module's text.
#[derive(Debug)]
pub(super) struct Verbatim {
    page: PageSize,
    /// Where the run's next bytes go.
    cursor: Option<Destination>,
    blocks: Blocks,
    side_buffer: SideBuffer,
    kept: StoredPages,
}

impl Verbatim {
    pub(super) fn new(page: PageSize) -> Verbatim {
        Verbatim {
            page,
            cursor: None,
            blocks: Blocks::default(),
            side_buffer: SideBuffer::default(),
            kept: StoredPages::default(),
        }
    }

    /// The run's next `bytes` bytes have their place.
    fn moved(&mut self, bytes: u64) {
        if let Some(to) = &mut self.cursor {
            to.offset += bytes;
        }
    }
}

impl IngestMode for Verbatim {
    fn begin_run(
        &mut self,
        scope: &mut IngestScope<'_>,
        range: PageRange,
        flags: PageFlags,
    ) -> Result<()> {
        self.cursor = scope.images.append(range, flags)?;
        if self.cursor.is_some() {
            self.kept.stored_bytes += range.bytes();
        }
        Ok(())
    }

    fn raw(&mut self, scope: &mut IngestScope<'_>, range: Range<usize>) -> Result<()> {
        let bytes = range.len() as u64;
        if let Some(to) = &self.cursor {
            scope.plan.push(&to.part, to.offset, range);
        }
        self.moved(bytes);
        Ok(())
    }

    fn place(&self) -> Option<Destination> {
        self.cursor.clone()
    }

    fn placed(&mut self, bytes: u64) {
        self.moved(bytes);
    }

    fn lz4(&mut self, scope: &mut IngestScope<'_>, range: Range<usize>, ends: bool) -> Result<()> {
        let Some(to) = &self.cursor else {
            return Ok(());
        };
        if let Some(block) = self.blocks.add(&scope.buffer[range], ends) {
            let page = self.page.as_usize();
            unpack(block, self.side_buffer.room(scope.session_io, page)?)?;
            self.side_buffer.place(page, to);
            self.moved(self.page.bytes());
        }
        Ok(())
    }

    /// It takes its room in the file, where nothing is written.
    fn zero_page(&mut self, _desk: &mut IngestScope<'_>) -> Result<()> {
        self.moved(self.page.bytes());
        Ok(())
    }

    fn end_target(
        &mut self,
        _images: &mut SessionImages,
        session_io: &mut SessionIo,
    ) -> Result<()> {
        self.side_buffer.flush(session_io)
    }

    fn stored(&self) -> StoredPages {
        self.kept
    }
}
