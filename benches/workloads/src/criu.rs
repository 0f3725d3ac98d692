//! CRIU's frames.

use pageferry::criu::deframer::{Deframer, Piece};
use pageferry::criu::header::{HEADER_BYTES_MAX, Header, Op, PageFlags, Target, Wire};
use pageferry::units::{PageCount, PageSize, Vaddr};

use crate::Run;

const PAGE: PageSize = PageSize::KIB_4;

/// Frames of one page: the most headers that a stream can have.
const FRAMES: u64 = 4096;

/// What one read of a socket brings, bytes.
const READ_BYTES: usize = 256 << 10;

pub(crate) fn deframer() -> Run {
    let mut stream = Vec::new();
    for number in 0..FRAMES {
        let header = Header {
            op: Op::AddFlags,
            flags: PageFlags::PRESENT,
            pages: PageCount(1),
            vaddr: Vaddr(0x10_0000 + (number << PAGE.shift())),
            dst_id: Target::Process(7).dst_id(),
        };
        let mut bytes = [0; HEADER_BYTES_MAX];
        let length = header.encode(Wire::V2, &mut bytes);
        stream.extend_from_slice(&bytes[..length]);
        stream.resize(stream.len() + PAGE.as_usize(), 7);
    }
    Box::new(move || {
        let mut deframer = Deframer::new(Wire::V2);
        let mut seen = 0;
        for input in stream.chunks(READ_BYTES) {
            let mut at = 0;
            while let Some(piece) = deframer.next(input, &mut at).expect("an honest stream") {
                match piece {
                    Piece::Header(header) => {
                        seen += header.vaddr.get();
                        deframer.expect_raw(header.pages.get() << PAGE.shift());
                    }
                    Piece::Raw(range) => seen += range.len() as u64,
                    Piece::BlockLength(_) | Piece::Block { .. } => {}
                }
            }
        }
        seen
    })
}
