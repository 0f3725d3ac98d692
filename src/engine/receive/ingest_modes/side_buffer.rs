//! Bytes that do not lie in a receive buffer as they are to be stored: decompressed pages, pages cut
//! by the end of a buffer.

use crate::engine::io::batch::Plan;
use crate::engine::io::session_io::SessionIo;
use crate::error::{Error, Kind, Result};
use crate::image::writer::Destination;
use crate::sys::buffers::Buffer;

/// A buffer that such bytes are gathered in on their way to files.
#[derive(Debug, Default)]
pub(super) struct SideBuffer(Option<Filling>);

#[derive(Debug)]
struct Filling {
    buffer: Buffer,
    filled: usize,
    plan: Plan,
}

impl SideBuffer {
    /// Room for the next `bytes` bytes, at most a buffer. They are taken by [`SideBuffer::place`].
    pub(super) fn room(&mut self, session_io: &mut SessionIo, bytes: usize) -> Result<&mut [u8]> {
        let is_full = |filling: &Filling| filling.filled + bytes > filling.buffer.len();
        if self.0.as_ref().is_some_and(is_full) {
            self.flush(session_io)?;
        }
        let filling = match &mut self.0 {
            Some(filling) => filling,
            empty @ None => empty.insert(Filling {
                buffer: session_io.buffer()?,
                filled: 0,
                plan: Plan::default(),
            }),
        };
        Ok(&mut filling.buffer[filling.filled..filling.filled + bytes])
    }

    /// The first `bytes` bytes of the room go to `to`.
    pub(super) fn place(&mut self, bytes: usize, to: &Destination) {
        if let Some(filling) = &mut self.0 {
            let range = filling.filled..filling.filled + bytes;
            filling.filled = range.end;
            filling.plan.push(&to.part, to.offset, range);
        }
    }

    /// Sends what was gathered to its files.
    pub(super) fn flush(&mut self, session_io: &mut SessionIo) -> Result<()> {
        match self.0.take() {
            Some(filling) => session_io.write(filling.buffer, filling.plan),
            None => Ok(()),
        }
    }
}

/// Puts the LZ4 blocks of pages together where the end of a buffer has cut them.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    cut: Vec<u8>,
    /// Whether `cut` was handed out and is over.
    used: bool,
}

impl Blocks {
    /// Takes bytes of a block, at most a page in all, and gives the whole block when they end it.
    pub(super) fn add<'a>(&'a mut self, bytes: &'a [u8], ends: bool) -> Option<&'a [u8]> {
        if std::mem::take(&mut self.used) {
            self.cut.clear();
        }
        if ends && self.cut.is_empty() {
            return Some(bytes);
        }
        self.cut.extend_from_slice(bytes);
        self.used = ends;
        ends.then_some(self.cut.as_slice())
    }
}

/// Decompresses the block of a page into `out`, a page long.
pub(in crate::engine) fn unpack(block: &[u8], out: &mut [u8]) -> Result<()> {
    let page = out.len();
    match lz4_flex::block::decompress_into(block, out) {
        Ok(bytes) if bytes == page => Ok(()),
        Ok(bytes) => {
            let text = format!("a compressed page has {bytes} bytes instead of {page}");
            Err(Error::new(Kind::Protocol, text))
        }
        Err(error) => Err(Error::wrap(
            Kind::Protocol,
            "a compressed page is damaged",
            error,
        )),
    }
}
