//! Kinds of frames, and what can be wrong with one.

use std::fmt;

use thiserror::Error;

use crate::limits::{FERRY_BODY_BYTES_MAX, FERRY_HELLO_BYTES_MAX, FERRY_TEXT_BYTES_MAX};

/// What a frame says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum Kind {
    /// The connecting side's first frame.
    Hello = 1,
    /// The listening side's answer.
    Welcome = 2,
    /// The session has failed, and why.
    Fail = 3,
    /// Numbered: the next pages belong to this target.
    Open = 16,
    /// Numbered: a batch of pages.
    Pages = 18,
    /// Numbered: all was said.
    Close = 19,
    /// The sender asks for the hashes of a target's base version.
    WantHashes = 20,
    /// The sender is through and leaves.
    Bye = 21,
    /// The receiver says what is safe, and its last answer.
    Ack = 32,
    /// Hashes of a target's base version.
    Hashes = 33,
    /// A thread waits for a page.
    Fault = 48,
    /// The pages that a fault asked for.
    FaultPages = 49,
    /// The page that a fault asked for is in the push already.
    FaultInPush = 50,
}

impl fmt::Display for Kind {
    /// The name in docs/ferry.md.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Hello => "HELLO",
            Kind::Welcome => "WELCOME",
            Kind::Fail => "FAIL",
            Kind::Open => "OPEN",
            Kind::Pages => "PAGES",
            Kind::Close => "CLOSE",
            Kind::WantHashes => "WANT_HASHES",
            Kind::Bye => "BYE",
            Kind::Ack => "ACK",
            Kind::Hashes => "HASHES",
            Kind::Fault => "FAULT",
            Kind::FaultPages => "FAULT_PAGES",
            Kind::FaultInPush => "FAULT_IN_PUSH",
        })
    }
}

impl Kind {
    pub(super) fn from_number(number: u16) -> Option<Kind> {
        Some(match number {
            1 => Kind::Hello,
            2 => Kind::Welcome,
            3 => Kind::Fail,
            16 => Kind::Open,
            18 => Kind::Pages,
            19 => Kind::Close,
            20 => Kind::WantHashes,
            21 => Kind::Bye,
            32 => Kind::Ack,
            33 => Kind::Hashes,
            48 => Kind::Fault,
            49 => Kind::FaultPages,
            50 => Kind::FaultInPush,
            _ => return None,
        })
    }

    /// Whether frames of this kind are numbered, kept until acknowledged, and put in order.
    pub const fn is_numbered(self) -> bool {
        matches!(self, Kind::Open | Kind::Pages | Kind::Close)
    }

    /// Longest body that a frame of this kind may have, bytes.
    pub(super) const fn body_bytes_max(self) -> usize {
        match self {
            Kind::Hello | Kind::Welcome => FERRY_HELLO_BYTES_MAX,
            Kind::Fail => 4 + FERRY_TEXT_BYTES_MAX,
            Kind::Pages | Kind::FaultPages | Kind::Hashes => FERRY_BODY_BYTES_MAX,
            Kind::Open | Kind::Close | Kind::WantHashes => 64,
            Kind::Ack | Kind::Fault => 64,
            Kind::Bye | Kind::FaultInPush => 0,
        }
    }
}

/// Bytes that are no frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum FrameError {
    /// A frame begins with other bytes than `PFRY`.
    #[error("a frame begins with {0:02x?} instead of PFRY")]
    Foreign([u8; 4]),
    /// The header's checksum does not fit.
    #[error("a frame header is damaged: its checksum does not fit")]
    HeaderDamaged,
    /// The body's checksum does not fit.
    #[error("the body of a {0} frame is damaged: its checksum does not fit")]
    BodyDamaged(Kind),
    /// The kind is not known.
    #[error("frames of kind {0} are not known here")]
    UnknownKind(u16),
    /// The body is longer than its kind allows.
    #[error("a {kind} frame of {bytes} bytes is longer than the {max} that are allowed")]
    TooLong {
        /// Kind of the frame.
        kind: Kind,
        /// Length of its body, bytes.
        bytes: usize,
        /// Longest body of this kind, bytes.
        max: usize,
    },
    /// The body ends within a field.
    #[error("a {0} frame ends within a field")]
    Short(Kind),
    /// The body goes on behind its last field.
    #[error("a {0} frame has bytes behind its last field")]
    Surplus(Kind),
    /// A field has a value that it may not have.
    #[error("a {kind} frame says {field} = {value}, which may not be")]
    Field {
        /// Kind of the frame.
        kind: Kind,
        /// Name of the field as in docs/ferry.md.
        field: &'static str,
        /// What it says.
        value: u64,
    },
}
