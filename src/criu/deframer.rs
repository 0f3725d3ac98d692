//! Cuts the bytes of a page-server connection into headers and payload ranges.
//!
//! ```text
//! input   ...| header | payload ........ | header | hea      (a receive buffer, cut anywhere)
//! pieces       Header   Raw(range)         Header   -
//! ```
//!
//! Pure. Payload is never copied nor looked at: a piece says which bytes of the caller's buffer it
//! is. Only a header or a length word that is cut by the end of the buffer is kept here.

use std::ops::Range;

use super::header::{DETECT_BYTES, HEADER_BYTES_MAX, Header, HeaderError, Op, Wire};

/// Length of the word in front of each page of a compressed frame, bytes.
const BLOCK_WORD_BYTES: usize = 4;

/// What the next bytes of the input are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Piece {
    /// A frame's header. The caller checks it and says with [`Deframer::expect_raw`] or
    /// [`Deframer::expect_blocks`] what follows, before it asks for the next piece.
    Header(Header),
    /// Bytes of raw pages at these places of the input.
    Raw(Range<usize>),
    /// The length of the next page's block, in bytes. The caller checks it and says with
    /// [`Deframer::expect_block_bytes`] that it follows, before it asks for the next piece.
    BlockLength(u32),
    /// Bytes of the block at these places of the input. An empty range for an empty block.
    Block {
        /// The bytes' places.
        range: Range<usize>,
        /// Whether they end the block.
        ends: bool,
    },
}

/// Where in the stream the next byte belongs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    Header,
    Raw { bytes_left: u64 },
    BlockLength,
    Block { bytes_left: u32 },
}

/// How the layout of headers is found out.
#[derive(Clone, Copy, Debug)]
enum Layout {
    Known(Wire),
    /// Told by the first bytes of the stream.
    Detect {
        by: Detect,
        /// What they must tell, if that is given.
        given: Option<Wire>,
    },
    /// The first frame began alike in both layouts.
    Open {
        /// Bytes that would still belong to it in the longer one.
        rest: usize,
    },
}

/// Reads the layout from the first bytes of a stream, unless its first frame leaves it open.
type Detect = fn(&[u8; DETECT_BYTES]) -> Option<Wire>;

/// Length of a header's first word, which names the operation, bytes.
const COMMAND_BYTES: usize = 4;

/// The state of one connection. See the module's text.
#[derive(Clone, Debug)]
pub struct Deframer {
    layout: Layout,
    place: Place,
    /// Blocks of the frame that were not begun yet.
    blocks_left: u64,
    /// The part of a header or length word that has come in.
    kept: [u8; HEADER_BYTES_MAX],
    kept_bytes: usize,
}

impl Deframer {
    /// A deframer for a connection whose layout is known.
    pub fn new(wire: Wire) -> Deframer {
        Deframer::with_layout(Layout::Known(wire))
    }

    /// A deframer that takes the layout that `by` reads from the first bytes. If that is not what is
    /// `given`, the first header is an error.
    pub fn detecting(by: Detect, given: Option<Wire>) -> Deframer {
        Deframer::with_layout(Layout::Detect { by, given })
    }

    fn with_layout(layout: Layout) -> Deframer {
        Deframer {
            layout,
            place: Place::Header,
            blocks_left: 0,
            kept: [0; HEADER_BYTES_MAX],
            kept_bytes: 0,
        }
    }

    /// The layout, once it is known.
    pub fn wire(&self) -> Option<Wire> {
        match self.layout {
            Layout::Known(wire) => Some(wire),
            Layout::Detect { .. } | Layout::Open { .. } => None,
        }
    }

    /// How many bytes may still come that belong to the header that was read last: more than none if
    /// the first frame has left the layout open. Whether they come the peer decides, so they are not
    /// waited for before it has its answer.
    pub fn header_bytes_open(&self) -> usize {
        match self.layout {
            Layout::Open { rest } => rest,
            Layout::Known(_) | Layout::Detect { .. } => 0,
        }
    }

    /// Whether the stream may end here: no frame has begun that has not ended.
    pub fn is_between_frames(&self) -> bool {
        self.place == Place::Header && self.kept_bytes == 0
    }

    /// Bytes of raw pages that are still to come in this frame.
    pub fn raw_bytes_left(&self) -> u64 {
        match self.place {
            Place::Raw { bytes_left } => bytes_left,
            _ => 0,
        }
    }

    /// Notes that the caller has taken `bytes` bytes of raw pages from the connection by itself.
    pub fn skip_raw(&mut self, bytes: u64) {
        let left = self.raw_bytes_left();
        assert!(bytes <= left, "no more than the frame's bytes are skipped");
        self.expect_raw(left - bytes);
    }

    /// Notes that `bytes` bytes of raw pages follow.
    pub fn expect_raw(&mut self, bytes: u64) {
        self.place = match bytes {
            0 => Place::Header,
            bytes_left => Place::Raw { bytes_left },
        };
    }

    /// Notes that `count` blocks, each behind its length, follow.
    pub fn expect_blocks(&mut self, count: u64) {
        self.blocks_left = count;
        self.next_block();
    }

    /// Notes that the block of the length just read follows.
    pub fn expect_block_bytes(&mut self, bytes: u32) {
        self.place = Place::Block { bytes_left: bytes };
    }

    /// The next piece of `input` from `at` on, which moves behind it; `None` when the rest of the
    /// input holds no whole piece (it is then used up, and kept where necessary).
    pub fn next(&mut self, input: &[u8], at: &mut usize) -> Result<Option<Piece>, HeaderError> {
        match self.place {
            Place::Header => {
                let Some(wire) = self.keep_header(input, at)? else {
                    return Ok(None);
                };
                self.kept_bytes = 0;
                Header::decode(wire, &self.kept).map(|header| Some(Piece::Header(header)))
            }
            Place::Raw { bytes_left } => {
                let Some(range) = take(input, at, bytes_left) else {
                    return Ok(None);
                };
                self.expect_raw(bytes_left - range.len() as u64);
                Ok(Some(Piece::Raw(range)))
            }
            Place::BlockLength => {
                if !self.keep(input, at, BLOCK_WORD_BYTES) {
                    return Ok(None);
                }
                self.kept_bytes = 0;
                let word = std::array::from_fn(|i| self.kept[i]);
                Ok(Some(Piece::BlockLength(u32::from_le_bytes(word))))
            }
            Place::Block { bytes_left } => Ok(self.block(input, at, bytes_left)),
        }
    }

    fn block(&mut self, input: &[u8], at: &mut usize, bytes_left: u32) -> Option<Piece> {
        let range = match bytes_left {
            0 => *at..*at,
            left => take(input, at, u64::from(left))?,
        };
        let taken = u32::try_from(range.len()).unwrap_or(bytes_left);
        let ends = taken == bytes_left;
        if ends {
            self.next_block();
        } else {
            self.place = Place::Block {
                bytes_left: bytes_left - taken,
            };
        }
        Some(Piece::Block { range, ends })
    }

    fn next_block(&mut self) {
        self.place = match self.blocks_left.checked_sub(1) {
            Some(left) => {
                self.blocks_left = left;
                Place::BlockLength
            }
            None => Place::Header,
        };
    }

    fn header_bytes(&self) -> usize {
        match self.layout {
            Layout::Known(wire) => wire.header_bytes(),
            Layout::Detect { .. } | Layout::Open { .. } => DETECT_BYTES,
        }
    }

    /// Keeps bytes until a header is complete, and finds out the layout on the way. An unknown operation
    /// is an error as soon as it is there: nobody knows how long such a header is.
    fn keep_header(&mut self, input: &[u8], at: &mut usize) -> Result<Option<Wire>, HeaderError> {
        loop {
            let whole = self.keep(input, at, self.header_bytes());
            let known = matches!(self.layout, Layout::Known(_));
            if whole && known || self.kept_bytes < COMMAND_BYTES {
                return Ok(self.wire().filter(|_| whole));
            }
            let word = std::array::from_fn(|i| self.kept[i]);
            let op = Op::of_command(u32::from_le_bytes(word))?;
            match self.layout {
                _ if !whole => return Ok(None),
                // Nothing comes behind such a frame.
                Layout::Known(_) | Layout::Open { .. } => return Ok(Some(Wire::V1)),
                Layout::Detect { by, given } => {
                    let first = std::array::from_fn(|i| self.kept[i]);
                    let found = match by(&first) {
                        Some(found) => found,
                        None if op.is_close() => return Ok(Some(self.leave_open(input, at))),
                        None => Wire::unconfirmed(given),
                    };
                    if let Some(given) = given.filter(|given| *given != found) {
                        return Err(HeaderError::OtherWire { given, found });
                    }
                    self.layout = Layout::Known(found);
                }
            }
        }
    }

    /// The first header is whole in v1 and may be whole in v2: its end is skipped as far as it is here.
    fn leave_open(&mut self, input: &[u8], at: &mut usize) -> Wire {
        let rest = HEADER_BYTES_MAX - DETECT_BYTES;
        let there = take(input, at, rest as u64).map_or(0, |range| range.len());
        self.layout = Layout::Open { rest: rest - there };
        Wire::V1
    }

    /// Keeps bytes until there are `wanted`; whether there are.
    fn keep(&mut self, input: &[u8], at: &mut usize, wanted: usize) -> bool {
        let missing = (wanted - self.kept_bytes) as u64;
        if let Some(range) = take(input, at, missing) {
            let end = self.kept_bytes + range.len();
            self.kept[self.kept_bytes..end].copy_from_slice(&input[range]);
            self.kept_bytes = end;
        }
        self.kept_bytes == wanted
    }
}

/// Up to `most` bytes of `input` from `at` on, or `None` if there is not even one.
fn take(input: &[u8], at: &mut usize, most: u64) -> Option<Range<usize>> {
    let there = input.len().saturating_sub(*at);
    let taken = usize::try_from(most).unwrap_or(usize::MAX).min(there);
    let range = *at..*at + taken;
    *at = range.end;
    (taken > 0).then_some(range)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::criu::header::{Op, PageFlags};
    use crate::units::{PageCount, Vaddr};

    /// One frame of a made-up stream, and what reading it must give.
    #[derive(Clone, Debug)]
    enum Frame {
        Bare,
        Raw(Vec<u8>),
        Blocks(Vec<Vec<u8>>),
    }

    fn frames() -> impl Strategy<Value = Vec<Frame>> {
        let bytes = |most| prop::collection::vec(any::<u8>(), 0..most);
        let frame = prop_oneof![
            Just(Frame::Bare),
            prop::collection::vec(any::<u8>(), 1..90).prop_map(Frame::Raw),
            prop::collection::vec(bytes(40), 1..5).prop_map(Frame::Blocks),
        ];
        prop::collection::vec(frame, 1..6)
    }

    fn header(number: usize) -> Header {
        Header {
            op: Op::Open2,
            flags: PageFlags::default(),
            pages: PageCount(0),
            vaddr: Vaddr(0),
            dst_id: (number as u64) << 8 | 1,
        }
    }

    fn stream(frames: &[Frame], wire: Wire) -> Vec<u8> {
        let mut out = Vec::new();
        for (number, frame) in frames.iter().enumerate() {
            let mut bytes = [0; HEADER_BYTES_MAX];
            let len = header(number + 1).encode(wire, &mut bytes);
            out.extend_from_slice(&bytes[..len]);
            match frame {
                Frame::Bare => {}
                Frame::Raw(raw) => out.extend_from_slice(raw),
                Frame::Blocks(blocks) => {
                    for block in blocks {
                        out.extend_from_slice(&u32::try_from(block.len()).unwrap().to_le_bytes());
                        out.extend_from_slice(block);
                    }
                }
            }
        }
        out
    }

    /// Reads `buffers` and gives the frames back, told apart by what `like` says was sent.
    fn read(deframer: &mut Deframer, buffers: &[&[u8]], like: &[Frame]) -> Vec<Frame> {
        let mut got: Vec<Frame> = Vec::new();
        for input in buffers {
            let mut at = 0;
            while let Some(piece) = deframer.next(input, &mut at).unwrap() {
                match piece {
                    Piece::Header(found) => {
                        assert_eq!(found, header(got.len() + 1));
                        match &like[got.len()] {
                            Frame::Bare => got.push(Frame::Bare),
                            Frame::Raw(raw) => {
                                deframer.expect_raw(raw.len() as u64);
                                got.push(Frame::Raw(Vec::new()));
                            }
                            Frame::Blocks(blocks) => {
                                deframer.expect_blocks(blocks.len() as u64);
                                got.push(Frame::Blocks(Vec::new()));
                            }
                        }
                    }
                    Piece::Raw(range) => match got.last_mut() {
                        Some(Frame::Raw(raw)) => raw.extend_from_slice(&input[range]),
                        other => panic!("raw bytes in {other:?}"),
                    },
                    Piece::BlockLength(bytes) => match got.last_mut() {
                        Some(Frame::Blocks(blocks)) => {
                            blocks.push(Vec::new());
                            deframer.expect_block_bytes(bytes);
                        }
                        other => panic!("a block in {other:?}"),
                    },
                    Piece::Block { range, .. } => match got.last_mut() {
                        Some(Frame::Blocks(blocks)) => {
                            blocks.last_mut().unwrap().extend_from_slice(&input[range]);
                        }
                        other => panic!("block bytes in {other:?}"),
                    },
                }
            }
            assert_eq!(at, input.len(), "all input is used up");
        }
        got
    }

    proptest! {
        /// Cut at every point into two, a stream gives the same frames.
        #[test]
        fn every_split_point_gives_the_same_frames(frames in frames(), v1: bool) {
            let wire = if v1 { Wire::V1 } else { Wire::V2 };
            let bytes = stream(&frames, wire);
            for cut in 0..=bytes.len() {
                let mut deframer = Deframer::detecting(Wire::detect_receive, None);
                let (front, back) = bytes.split_at(cut);
                let got = read(&mut deframer, &[front, back], &frames);
                prop_assert_eq!(format!("{got:?}"), format!("{frames:?}"));
                prop_assert_eq!(deframer.wire(), Some(wire));
                prop_assert!(deframer.is_between_frames());
            }
        }

        /// And byte by byte.
        #[test]
        fn single_bytes_give_the_same_frames(frames in frames()) {
            let bytes = stream(&frames, Wire::V2);
            let single: Vec<&[u8]> = bytes.chunks(1).collect();
            let got = read(&mut Deframer::new(Wire::V2), &single, &frames);
            prop_assert_eq!(format!("{got:?}"), format!("{frames:?}"));
        }
    }

    #[test]
    fn bytes_taken_by_the_caller_are_skipped() {
        let frames = [Frame::Raw(vec![1; 50]), Frame::Bare];
        let bytes = stream(&frames, Wire::V2);
        let mut deframer = Deframer::new(Wire::V2);
        let mut at = 0;
        deframer.next(&bytes[..32], &mut at).unwrap();
        deframer.expect_raw(50);
        deframer.skip_raw(20);
        assert_eq!(deframer.raw_bytes_left(), 30);
        deframer.skip_raw(30);
        at = 82;
        let piece = deframer.next(&bytes, &mut at).unwrap();
        assert_eq!(piece, Some(Piece::Header(header(2))));
    }
}
