//! Getting packed and delta pages out of a batch, and verifying all its contents.

use crate::units::Vaddr;

use super::batch::{Batch, BatchError, PageKind};

/// Unpacks batches, one after another.
#[derive(Default)]
pub struct Unpacker {
    zstd: zstd::bulk::Decompressor<'static>,
}

impl Unpacker {
    /// Writes the packed pages of `batch`, then its delta pages, to `out`, which is emptied first,
    /// and verifies the contents of all pages.
    ///
    /// `bases` holds the contents of the base versions of all delta pages, one after another.
    pub fn unpack(
        &mut self,
        batch: &Batch<'_>,
        bases: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), BatchError> {
        let packed_bytes = batch.bytes_of(PageKind::Packed);
        let delta_bytes = batch.bytes_of(PageKind::Delta);
        assert_eq!(bases.len(), delta_bytes, "a base for every delta page");
        out.clear();
        out.resize(packed_bytes + delta_bytes, 0);
        let (packed, delta) = out.split_at_mut(packed_bytes);
        self.inflate("packed", &batch.body[batch.packed.clone()], packed)?;
        self.inflate("delta", &batch.body[batch.delta.clone()], delta)?;
        for (byte, base) in delta.iter_mut().zip(bases) {
            *byte ^= base;
        }
        let mut crc = crc32fast::Hasher::new();
        crc.update(&batch.body[batch.raw.clone()]);
        crc.update(out);
        if crc.finalize() != batch.plain_crc {
            let first = batch.pages().next();
            return Err(BatchError::Contents {
                target: batch.target,
                vaddr: first.map_or(Vaddr(0), |(vaddr, _)| vaddr),
            });
        }
        Ok(())
    }

    fn inflate(
        &mut self,
        part: &'static str,
        frame: &[u8],
        out: &mut [u8],
    ) -> Result<(), BatchError> {
        let expected = out.len();
        let bytes = match (frame.is_empty(), expected) {
            (true, _) => 0,
            (false, _) => self
                .zstd
                .decompress_to_buffer(frame, out)
                .map_err(|source| BatchError::Zstd { part, source })?,
        };
        if bytes == expected {
            Ok(())
        } else {
            Err(BatchError::Unpacked {
                part,
                bytes,
                expected,
            })
        }
    }
}
