//! Every page is stored at its place, whatever is in it: nobody looks at the bytes.

use std::ops::Range;

use super::spill::{Blocks, Spill, unpack};
use super::{Desk, Keep};
use crate::criu::header::PageFlags;
use crate::engine::mover::Mover;
use crate::error::Result;
use crate::image::writer::{Destination, SessionImages};
use crate::observe::received::KeptPages;
use crate::units::{PageRange, PageSize};

/// See the module's text.
#[derive(Debug)]
pub(super) struct AsReceived {
    page: PageSize,
    /// Where the run's next bytes go.
    cursor: Option<Destination>,
    blocks: Blocks,
    spill: Spill,
    kept: KeptPages,
}

impl AsReceived {
    pub(super) fn new(page: PageSize) -> AsReceived {
        AsReceived {
            page,
            cursor: None,
            blocks: Blocks::default(),
            spill: Spill::default(),
            kept: KeptPages::default(),
        }
    }

    /// The run's next `bytes` bytes have their place.
    fn moved(&mut self, bytes: u64) {
        if let Some(to) = &mut self.cursor {
            to.offset += bytes;
        }
    }
}

impl Keep for AsReceived {
    fn begin_run(&mut self, desk: &mut Desk<'_>, range: PageRange, flags: PageFlags) -> Result<()> {
        self.cursor = desk.images.append(range, flags)?;
        if self.cursor.is_some() {
            self.kept.stored_bytes += range.bytes();
        }
        Ok(())
    }

    fn raw(&mut self, desk: &mut Desk<'_>, range: Range<usize>) -> Result<()> {
        let bytes = range.len() as u64;
        if let Some(to) = &self.cursor {
            desk.plan.push(&to.part, to.offset, range);
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

    fn lz4(&mut self, desk: &mut Desk<'_>, range: Range<usize>, ends: bool) -> Result<()> {
        let Some(to) = &self.cursor else {
            return Ok(());
        };
        if let Some(block) = self.blocks.add(&desk.buffer[range], ends) {
            let page = self.page.as_usize();
            unpack(block, self.spill.room(desk.mover, page)?)?;
            self.spill.place(page, to);
            self.moved(self.page.bytes());
        }
        Ok(())
    }

    /// It takes its room in the file, where nothing is written.
    fn zero_page(&mut self, _desk: &mut Desk<'_>) -> Result<()> {
        self.moved(self.page.bytes());
        Ok(())
    }

    fn end_target(&mut self, _images: &mut SessionImages, mover: &mut Mover) -> Result<()> {
        self.spill.flush(mover)
    }

    fn kept(&self) -> KeptPages {
        self.kept
    }
}
