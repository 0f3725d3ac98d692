//! Decompresses the pages of compressed frames into buffers of their own, on their way to files.

use super::batch::Plan;
use super::mover::Mover;
use crate::error::{Error, Kind, Result};
use crate::image::writer::Destination;
use crate::sys::buffers::Buffer;
use crate::units::PageSize;

/// See the module's text.
#[derive(Debug)]
pub(super) struct Unpacker {
    page: PageSize,
    /// The bytes of a block that is cut by the end of a receive buffer.
    cut_block: Vec<u8>,
    filling: Option<Filling>,
}

/// A buffer that is being filled with pages.
#[derive(Debug)]
struct Filling {
    buffer: Buffer,
    filled: usize,
    plan: Plan,
}

impl Unpacker {
    pub(super) fn new(page: PageSize) -> Unpacker {
        Unpacker {
            page,
            cut_block: Vec::new(),
            filling: None,
        }
    }

    /// Takes bytes of an LZ4 block, at most a page in all. When they end it, its page goes to `to` and
    /// this says so.
    pub(super) fn add(
        &mut self,
        bytes: &[u8],
        ends: bool,
        to: &Destination,
        mover: &mut Mover,
    ) -> Result<bool> {
        if ends && self.cut_block.is_empty() {
            self.unpack(bytes, to, mover)?;
        } else {
            self.cut_block.extend_from_slice(bytes);
            if ends {
                let block = std::mem::take(&mut self.cut_block);
                self.unpack(&block, to, mover)?;
            }
        }
        Ok(ends)
    }

    /// Sends what was filled to its files.
    pub(super) fn flush(&mut self, mover: &mut Mover) -> Result<()> {
        match self.filling.take() {
            Some(Filling { buffer, plan, .. }) => mover.write(buffer, plan),
            None => Ok(()),
        }
    }

    fn unpack(&mut self, block: &[u8], to: &Destination, mover: &mut Mover) -> Result<()> {
        let page = self.page.as_usize();
        let is_full = |filling: &Filling| filling.filled + page > filling.buffer.len();
        if self.filling.as_ref().is_some_and(is_full) {
            self.flush(mover)?;
        }
        let filling = match &mut self.filling {
            Some(filling) => filling,
            empty @ None => empty.insert(Filling {
                buffer: mover.buffer()?,
                filled: 0,
                plan: Plan::default(),
            }),
        };
        let range = filling.filled..filling.filled + page;
        match lz4_flex::block::decompress_into(block, &mut filling.buffer[range.clone()]) {
            Ok(bytes) if bytes == page => {}
            Ok(bytes) => {
                let text = format!("a compressed page has {bytes} bytes instead of {page}");
                return Err(Error::new(Kind::Protocol, text));
            }
            Err(error) => {
                let text = "a compressed page is damaged";
                return Err(Error::wrap(Kind::Protocol, text, error));
            }
        }
        filling.plan.push(&to.part, to.offset, range);
        filling.filled += page;
        Ok(())
    }
}
