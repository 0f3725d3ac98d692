//! Operations on their way: batches that are compressed and checked.
//!
//! ```text
//! u32 magic | u32 bytes | u32 packed bytes | u32 CRC-32 of the two lengths and the packed bytes | packed (zstd)
//! ```
//!
//! A batch holds whole operations. The last one is empty: a stream that ends without it was cut.

use std::io::{self, Read, Write};

use crc32fast::Hasher;
use pageferry::error::{Error, Kind, Result};
use pageferry::limits::FILE_BATCH_BYTES_MAX;
use zstd::bulk::{Compressor, Decompressor};

use super::operation::{Fields, Operation};

/// What each batch begins with: "PFFB".
const MAGIC: u32 = u32::from_le_bytes(*b"PFFB");

/// A batch is sent when it has so many bytes.
const BATCH_BYTES: usize = 256 << 10;

const HEAD_BYTES: usize = 16;

/// Level of zstd's compression: its own default.
const LEVEL: i32 = 3;

/// Writes operations.
pub(super) struct Sender<W> {
    to: W,
    compressor: Compressor<'static>,
    batch: Vec<u8>,
    /// Bytes that were written.
    pub(super) sent: u64,
}

impl<W: Write> Sender<W> {
    pub(super) fn new(to: W) -> Result<Sender<W>> {
        let compressor = Compressor::new(LEVEL).map_err(failed)?;
        Ok(Sender {
            to,
            compressor,
            batch: Vec::with_capacity(BATCH_BYTES),
            sent: 0,
        })
    }

    pub(super) fn add(&mut self, operation: &Operation) -> Result<()> {
        let before = self.batch.len();
        operation.encode(&mut self.batch);
        if self.batch.len() > FILE_BATCH_BYTES_MAX {
            let one = self.batch.split_off(before);
            self.flush()?;
            self.batch = one;
        }
        match self.batch.len() >= BATCH_BYTES {
            true => self.flush(),
            false => Ok(()),
        }
    }

    fn flush(&mut self) -> Result<()> {
        let packed = self.compressor.compress(&self.batch).map_err(failed)?;
        let length = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes();
        let lengths = [length(&self.batch), length(&packed)].concat();
        let mut sum = Hasher::new();
        sum.update(&lengths);
        sum.update(&packed);
        let sum = sum.finalize().to_le_bytes();
        for part in [&MAGIC.to_le_bytes()[..], &lengths, &sum, &packed] {
            self.to.write_all(part).map_err(failed)?;
            self.sent += part.len() as u64;
        }
        self.batch.clear();
        Ok(())
    }

    /// Ends the stream, and tells its bytes.
    pub(super) fn finish(mut self) -> Result<u64> {
        if !self.batch.is_empty() {
            self.flush()?;
        }
        self.flush()?;
        self.to.flush().map_err(failed)?;
        Ok(self.sent)
    }
}

fn failed(error: io::Error) -> Error {
    Error::wrap(Kind::PeerLost, "cannot send files", error)
}

/// Hands each operation of a stream to `each`. Fails if the stream is damaged, or ends before it is over.
pub(super) fn receive(
    mut from: impl Read,
    each: &mut dyn FnMut(Operation) -> Result<()>,
) -> Result<()> {
    let mut decompressor = Decompressor::new().map_err(failed)?;
    let mut packed = Vec::new();
    loop {
        let mut head = [0; HEAD_BYTES];
        from.read_exact(&mut head).map_err(cut)?;
        let number = |at: usize| {
            let bytes = head.get(at..at + 4).and_then(|part| part.try_into().ok());
            u32::from_le_bytes(bytes.unwrap_or_default())
        };
        let length = |at: usize| usize::try_from(number(at)).unwrap_or(usize::MAX);
        let (bytes, packed_bytes) = (length(4), length(8));
        let room = FILE_BATCH_BYTES_MAX + HEAD_BYTES;
        if number(0) != MAGIC
            || bytes > room
            || packed_bytes > zstd::zstd_safe::compress_bound(room)
        {
            return Err(damaged());
        }
        packed.resize(packed_bytes, 0);
        from.read_exact(&mut packed).map_err(cut)?;
        let mut sum = Hasher::new();
        sum.update(&head[4..12]);
        sum.update(&packed);
        if sum.finalize() != number(12) {
            return Err(damaged());
        }
        if bytes == 0 {
            return Ok(());
        }
        let batch = decompressor.decompress(&packed, bytes);
        let batch = batch.map_err(|_| damaged())?;
        let mut fields = Fields(&batch);
        while !fields.is_empty() {
            let operation = Operation::decode(&mut fields).map_err(|error| {
                Error::wrap(
                    Kind::Protocol,
                    "the stream of files is not understood",
                    error,
                )
            })?;
            each(operation)?;
        }
    }
}

fn cut(error: io::Error) -> Error {
    Error::wrap(Kind::Protocol, "the stream of files was cut", error)
}

fn damaged() -> Error {
    let text = "the stream of files was damaged on its way: a checksum or length is wrong";
    Error::new(Kind::Protocol, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operations() -> Vec<Operation> {
        let data = |first: u64| Operation::Data {
            path: b"some/file".to_vec(),
            first,
            data: (0..200_000_u32)
                .map(|at| (at >> 3).to_le_bytes()[0])
                .collect(),
        };
        vec![
            data(0),
            data(16),
            Operation::Remove {
                path: b"x".to_vec(),
            },
        ]
    }

    fn stream() -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut sender = Sender::new(&mut bytes).unwrap();
        for operation in operations() {
            sender.add(&operation).unwrap();
        }
        let sent = sender.finish().unwrap();
        assert_eq!(sent, bytes.len() as u64);
        bytes
    }

    fn received(bytes: &[u8]) -> Result<Vec<Operation>> {
        let mut all = Vec::new();
        receive(bytes, &mut |operation| {
            all.push(operation);
            Ok(())
        })?;
        Ok(all)
    }

    #[test]
    fn operations_arrive_packed() {
        let bytes = stream();
        assert!(bytes.len() < 200_000, "{} bytes", bytes.len());
        assert_eq!(received(&bytes).unwrap(), operations());
    }

    #[test]
    fn cut_and_damaged_streams_are_seen() {
        let whole = stream();
        for cut in 0..whole.len() {
            assert!(received(&whole[..cut]).is_err(), "{cut} bytes");
        }
        for at in (0..whole.len()).step_by(7) {
            let mut damaged = whole.clone();
            damaged[at] ^= 4;
            assert!(received(&damaged).is_err(), "byte {at}");
        }
    }
}
