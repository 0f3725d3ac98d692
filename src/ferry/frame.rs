//! Frames: how a connection's bytes become pieces that can be believed.
//!
//! ```text
//!  0       4       6       8               16      20      24      28
//!  +-------+-------+-------+---------------+-------+-------+-------+------- - - -
//!  | PFRY  | kind  |   0   | number        | length| body  | header| body
//!  |       |  u16  |  u16  |  u64          |  u32  | crc32 | crc32 |
//!  +-------+-------+-------+---------------+-------+-------+-------+------- - - -
//! ```
//!
//! [`split`] looks at the front of a receive buffer and says where the first frame lies, at
//! whatever point the bytes were cut. It keeps no state and copies nothing.
//!
//! Invariants: a length is believed only after the header's checksum was verified and the length
//! compared with its cap; a body is handed out only after its own checksum was verified. So a
//! flipped bit anywhere in a frame is found here, as [`FrameError::is_damage`].

use std::ops::Range;

use crate::limits::FERRY_BODY_BYTES_MAX;

use super::fields::{Fields, PutFields};
pub use super::kind::{FrameError, Kind};

/// The first word of every frame: "PFRY".
pub const MAGIC: [u8; 4] = *b"PFRY";

/// Length of a frame's header, bytes.
pub const HEADER_BYTES: usize = 28;

/// Longest frame, bytes: a receive buffer of this length always makes progress.
pub const FRAME_BYTES_MAX: usize = HEADER_BYTES + FERRY_BODY_BYTES_MAX;

impl FrameError {
    /// Whether the bytes were changed on their way. Damage ends the connection alone: what was not
    /// acknowledged is sent again on the next one. All else is the peer's doing.
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            FrameError::Foreign(_) | FrameError::HeaderDamaged | FrameError::BodyDamaged(_)
        )
    }
}

/// One frame in a receive buffer. Its header and body have been verified.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frame {
    /// What it says.
    pub kind: Kind,
    /// Its number in the session, or the number of a question, or 0.
    pub number: u64,
    /// Where its body lies in the buffer.
    pub body: Range<usize>,
}

impl Frame {
    /// Length of header and body, bytes: where the next frame begins.
    pub fn end(&self) -> usize {
        self.body.end
    }
}

/// What the front of a receive buffer holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Split {
    /// Part of a frame: at least this many more bytes are needed.
    Need(usize),
    /// A whole frame.
    Frame(Frame),
}

/// Whether a connection that begins with these bytes speaks ferry.
pub fn is_ferry(first: [u8; 4]) -> bool {
    first == MAGIC
}

/// Finds the first frame in `buffer`, which begins where a frame begins.
pub fn split(buffer: &[u8]) -> Result<Split, FrameError> {
    let Some(header) = buffer.first_chunk::<HEADER_BYTES>() else {
        let seen = buffer.len().min(MAGIC.len());
        if buffer[..seen] != MAGIC[..seen] {
            return Err(foreign(buffer));
        }
        return Ok(Split::Need(HEADER_BYTES - buffer.len()));
    };
    let header = Header::decode(header)?;
    let end = HEADER_BYTES + header.body_bytes;
    let Some(body) = buffer.get(HEADER_BYTES..end) else {
        return Ok(Split::Need(end - buffer.len()));
    };
    header.verify(body)?;
    Ok(Split::Frame(Frame {
        kind: header.kind,
        number: header.number,
        body: HEADER_BYTES..end,
    }))
}

fn foreign(buffer: &[u8]) -> FrameError {
    FrameError::Foreign(std::array::from_fn(|at| {
        buffer.get(at).copied().unwrap_or(0)
    }))
}

/// A frame's header by itself, for those who receive the body into a place of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// What the frame says.
    pub kind: Kind,
    /// Its number in the session, or the number of a question, or 0.
    pub number: u64,
    /// Length of its body, bytes, within the cap of its kind.
    pub body_bytes: usize,
    body_crc: u32,
}

impl Header {
    /// Reads and verifies a header.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Header, FrameError> {
        // The kind is not known before the checksum is verified; errors of reading cannot occur.
        let mut fields = Fields::new(Kind::Hello, bytes);
        if fields.array()? != MAGIC {
            return Err(foreign(bytes));
        }
        let (kind, _reserved) = (fields.u16()?, fields.u16()?);
        let (number, body_bytes) = (fields.u64()?, fields.u32()?);
        let (body_crc, header_crc) = (fields.u32()?, fields.u32()?);
        if crc32fast::hash(&bytes[..HEADER_BYTES - 4]) != header_crc {
            return Err(FrameError::HeaderDamaged);
        }
        let kind = Kind::from_number(kind).ok_or(FrameError::UnknownKind(kind))?;
        let body_bytes = usize::try_from(body_bytes).unwrap_or(usize::MAX);
        let max = kind.body_bytes_max();
        if body_bytes > max {
            return Err(FrameError::TooLong {
                kind,
                bytes: body_bytes,
                max,
            });
        }
        Ok(Header {
            kind,
            number,
            body_bytes,
            body_crc,
        })
    }

    /// Verifies the body that belongs to it.
    pub fn verify(&self, body: &[u8]) -> Result<(), FrameError> {
        if body.len() == self.body_bytes && crc32fast::hash(body) == self.body_crc {
            Ok(())
        } else {
            Err(FrameError::BodyDamaged(self.kind))
        }
    }
}

/// A frame being written at the end of a buffer: room for the header stands, the body follows.
///
/// The header can be written long after the body, when the number is known.
#[derive(Debug)]
pub struct OpenFrame {
    start: usize,
}

impl OpenFrame {
    /// Leaves room for a header at the end of `out`.
    pub fn begin(out: &mut Vec<u8>) -> OpenFrame {
        let start = out.len();
        out.resize(start + HEADER_BYTES, 0);
        OpenFrame { start }
    }

    /// Writes the header of the frame, whose body is all that stands behind it in `out`.
    pub fn finish(self, out: &mut [u8], kind: Kind, number: u64) {
        self.seal(out).finish(out, kind, number);
    }

    /// The body, which is all that stands behind the header in `out`, is complete.
    pub fn seal(self, out: &[u8]) -> SealedFrame {
        SealedFrame {
            start: self.start,
            body_crc: crc32fast::hash(&out[self.start + HEADER_BYTES..]),
        }
    }
}

/// A frame whose body is complete and summed up: what is left to do takes no time.
#[derive(Debug)]
pub struct SealedFrame {
    start: usize,
    body_crc: u32,
}

impl SealedFrame {
    /// Writes the header of the frame in the same `out`.
    pub fn finish(self, out: &mut [u8], kind: Kind, number: u64) {
        let (header, body) = out[self.start..].split_at_mut(HEADER_BYTES);
        assert!(body.len() <= kind.body_bytes_max(), "bodies keep their cap");
        let length = u32::try_from(body.len()).expect("bodies keep their cap");
        let mut fields = Vec::with_capacity(HEADER_BYTES);
        fields.extend_from_slice(&MAGIC);
        fields.put_u16(kind as u16);
        fields.put_u16(0);
        fields.put_u64(number);
        fields.put_u32(length);
        fields.put_u32(self.body_crc);
        fields.put_u32(crc32fast::hash(&fields));
        header.copy_from_slice(&fields);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: Kind, number: u64, body: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        let open = OpenFrame::begin(&mut out);
        out.extend_from_slice(body);
        open.finish(&mut out, kind, number);
        out
    }

    #[test]
    fn first_word_is_no_word_of_criu() {
        let word = u32::from_le_bytes(MAGIC);
        assert!(word >> 16 > 7, "CRIU's flags end at 7");
        assert!(is_ferry(MAGIC));
        assert!(!is_ferry([7, 0, 0, 0]));
    }

    proptest! {
        #[test]
        fn frames_are_found_at_every_split_point(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..4),
        ) {
            let mut stream = Vec::new();
            for (number, body) in bodies.iter().enumerate() {
                stream.extend(frame(Kind::Pages, number as u64, body));
            }
            for cut in 0..=stream.len() {
                let (mut at, mut found) = (0, 0);
                // All that the first part holds, then the rest.
                for end in [cut, stream.len()] {
                    while let Split::Frame(frame) = split(&stream[at..end]).expect("undamaged") {
                        prop_assert_eq!(frame.number, found as u64);
                        prop_assert_eq!(&stream[at..end][frame.body.clone()], &bodies[found][..]);
                        at += frame.end();
                        found += 1;
                    }
                }
                prop_assert_eq!(found, bodies.len());
                prop_assert_eq!(at, stream.len());
            }
        }

        #[test]
        fn need_never_asks_for_more_than_the_frame(
            body in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let whole = frame(Kind::Pages, 1, &body);
            for cut in 0..whole.len() {
                let Split::Need(more) = split(&whole[..cut]).expect("undamaged") else {
                    panic!("a part was taken for a whole frame");
                };
                prop_assert!(more > 0 && cut + more <= whole.len());
            }
        }

        #[test]
        fn a_flipped_bit_anywhere_is_found(
            body in prop::collection::vec(any::<u8>(), 0..60),
            kind in prop::sample::select(vec![Kind::Hello, Kind::Open, Kind::Pages, Kind::Ack]),
        ) {
            let whole = frame(kind, 0x1_0203, &body);
            for bit in 0..whole.len() * 8 {
                let mut damaged = whole.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                let error = split(&damaged).expect_err("damage");
                prop_assert!(error.is_damage(), "bit {bit}: {error}");
            }
        }

        #[test]
        fn noise_is_never_a_frame(noise in prop::collection::vec(any::<u8>(), 28..200)) {
            prop_assert!(!matches!(split(&noise), Ok(Split::Frame(_))));
        }
    }

    #[test]
    fn lengths_are_capped_before_anything_waits_for_them() {
        let mut header = frame(Kind::Ack, 0, &[]);
        header[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
        let crc = crc32fast::hash(&header[..24]);
        header[24..28].copy_from_slice(&crc.to_le_bytes());
        assert!(matches!(
            split(&header),
            Err(FrameError::TooLong {
                kind: Kind::Ack,
                ..
            })
        ));
    }

    #[test]
    fn first_wrong_byte_is_seen_at_once() {
        assert_eq!(split(b"P"), Ok(Split::Need(27)));
        assert_eq!(split(b"PG"), Err(FrameError::Foreign(*b"PG\0\0")));
    }
}
