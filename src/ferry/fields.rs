//! Reading and writing the little-endian fields of bodies.
//!
//! A reader never looks behind the end of its bytes: what is missing is an error that names the
//! frame.

use super::kind::{FrameError, Kind};

/// The fields of one body, read from its front.
pub(super) struct Fields<'b> {
    kind: Kind,
    rest: &'b [u8],
}

impl<'b> Fields<'b> {
    /// The fields of `body`, which belongs to a frame of `kind`.
    pub(super) fn new(kind: Kind, body: &'b [u8]) -> Fields<'b> {
        Fields { kind, rest: body }
    }

    /// The next `len` bytes.
    pub(super) fn bytes(&mut self, len: usize) -> Result<&'b [u8], FrameError> {
        let short = FrameError::Short(self.kind);
        let (front, rest) = self.rest.split_at_checked(len).ok_or(short)?;
        self.rest = rest;
        Ok(front)
    }

    /// The next `N` bytes.
    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], FrameError> {
        let bytes = self.bytes(N)?;
        Ok(std::array::from_fn(|at| bytes[at]))
    }

    /// The next two bytes.
    pub(super) fn u16(&mut self) -> Result<u16, FrameError> {
        self.array().map(u16::from_le_bytes)
    }

    /// The next four bytes.
    pub(super) fn u32(&mut self) -> Result<u32, FrameError> {
        self.array().map(u32::from_le_bytes)
    }

    /// The next four bytes, signed.
    pub(super) fn i32(&mut self) -> Result<i32, FrameError> {
        self.array().map(i32::from_le_bytes)
    }

    /// The next eight bytes.
    pub(super) fn u64(&mut self) -> Result<u64, FrameError> {
        self.array().map(u64::from_le_bytes)
    }

    /// All that is left.
    pub(super) fn rest(self) -> &'b [u8] {
        self.rest
    }

    /// Notes that nothing may be left.
    pub(super) fn end(self) -> Result<(), FrameError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(FrameError::Surplus(self.kind))
        }
    }
}

/// Appends little-endian fields to a body.
pub(super) trait PutFields {
    /// Appends two bytes.
    fn put_u16(&mut self, value: u16);
    /// Appends four bytes.
    fn put_u32(&mut self, value: u32);
    /// Appends eight bytes.
    fn put_u64(&mut self, value: u64);
}

impl PutFields for Vec<u8> {
    fn put_u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn put_u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn put_u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_le_bytes());
    }
}
