//! A working set as bytes. docs/working-set.md draws the format.

use super::{Extent, MappingKind, Name, Part, WorkingSet};
use crate::limits::{SESSION_TARGETS_MAX, WORKING_SET_PAGES_MAX};
use crate::units::PageSize;

const MAGIC: [u8; 8] = *b"PFWSET01";

const NAME_BYTES: usize = 32;
const EXTENT_BYTES: usize = 24;

/// Why bytes are no working set.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Damage {
    /// It begins otherwise.
    #[error("it is not a working set: lazy-client --record-working-set writes them")]
    Magic,
    /// It ends early.
    #[error("it is damaged: it ends too early")]
    Short,
    /// Something stands behind the end.
    #[error("it is damaged: bytes stand behind its end")]
    Long,
    /// The bytes are not those that were written.
    #[error("it is damaged: its checksum does not fit")]
    Checksum,
    /// A page size that no machine has.
    #[error("it is damaged: pages of {0} bytes")]
    PageBytes(u32),
    /// A number that cannot be.
    #[error("it is damaged: its {0} is out of range")]
    Value(&'static str),
}

/// The fields that are left.
struct Fields<'b>(&'b [u8]);

impl<'b> Fields<'b> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], Damage> {
        let (front, rest) = self.0.split_first_chunk().ok_or(Damage::Short)?;
        self.0 = rest;
        Ok(*front)
    }

    fn u32(&mut self) -> Result<u32, Damage> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Damage> {
        self.array().map(u64::from_le_bytes)
    }

    /// A number of records of `bytes` each, all of which are there.
    fn count(&mut self, bytes: usize) -> Result<usize, Damage> {
        let count = self.u32()? as usize;
        self.has(count, bytes)?;
        Ok(count)
    }

    fn has(&self, count: usize, bytes: usize) -> Result<(), Damage> {
        let needed = count.checked_mul(bytes).ok_or(Damage::Short)?;
        match needed <= self.0.len() {
            true => Ok(()),
            false => Err(Damage::Short),
        }
    }
}

impl WorkingSet {
    /// The bytes of a file.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        let count = |len: usize| u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes();
        for part in &self.parts {
            body.extend_from_slice(&count(part.names.len()));
            body.extend_from_slice(&count(part.extents.len()));
            for name in &part.names {
                for field in [
                    name.kind.status,
                    name.kind.prot,
                    name.kind.flags,
                    name.number,
                ] {
                    body.extend_from_slice(&field.to_le_bytes());
                }
                for field in [name.kind.file_offset, name.pages] {
                    body.extend_from_slice(&field.to_le_bytes());
                }
            }
            for extent in &part.extents {
                body.extend_from_slice(&extent.mapping.to_le_bytes());
                body.extend_from_slice(&extent.at_ms.to_le_bytes());
                body.extend_from_slice(&extent.first.to_le_bytes());
                body.extend_from_slice(&extent.pages.to_le_bytes());
                body.extend_from_slice(&[0; 4]);
            }
        }
        let page = u32::try_from(self.page.bytes()).unwrap_or(u32::MAX);
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&page.to_le_bytes());
        bytes.extend_from_slice(&count(self.parts.len()));
        bytes.extend_from_slice(&crc32fast::hash(&body).to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&body);
        bytes
    }

    /// The working set that these bytes of a file are.
    ///
    /// # Errors
    ///
    /// They are none: says why.
    pub fn decode(bytes: &[u8]) -> Result<WorkingSet, Damage> {
        let mut fields = Fields(bytes);
        if fields.array::<8>() != Ok(MAGIC) {
            return Err(Damage::Magic);
        }
        let page_bytes = fields.u32()?;
        let processes = fields.u32()? as usize;
        let checksum = fields.u32()?;
        fields.u32()?;
        if crc32fast::hash(fields.0) != checksum {
            return Err(Damage::Checksum);
        }
        let page = PageSize::new(page_bytes.into()).ok_or(Damage::PageBytes(page_bytes))?;
        if processes > SESSION_TARGETS_MAX {
            return Err(Damage::Value("number of processes"));
        }
        fields.has(processes, 8)?;
        let mut room = WORKING_SET_PAGES_MAX;
        let parts = (0..processes).map(|_| part(&mut fields, &mut room));
        let parts = parts.collect::<Result<_, _>>()?;
        match fields.0.is_empty() {
            true => Ok(WorkingSet { page, parts }),
            false => Err(Damage::Long),
        }
    }
}

/// The next process, with `room` pages at most, which it lowers.
fn part(fields: &mut Fields<'_>, room: &mut u64) -> Result<Part, Damage> {
    let names = fields.count(NAME_BYTES)?;
    let extents = fields.count(EXTENT_BYTES)?;
    fields.has(names, NAME_BYTES)?;
    let names: Vec<Name> = (0..names).map(|_| name(fields)).collect::<Result<_, _>>()?;
    fields.has(extents, EXTENT_BYTES)?;
    let extents = (0..extents).map(|_| {
        let extent = extent(fields)?;
        if extent.mapping as usize >= names.len() {
            return Err(Damage::Value("mapping of an extent"));
        }
        let pages = u64::from(extent.pages);
        *room = room
            .checked_sub(pages)
            .ok_or(Damage::Value("number of pages"))?;
        match (pages, extent.first.checked_add(pages)) {
            (0, _) | (_, None) => Err(Damage::Value("extent")),
            _ => Ok(extent),
        }
    });
    let extents = extents.collect::<Result<_, _>>()?;
    Ok(Part { names, extents })
}

fn name(fields: &mut Fields<'_>) -> Result<Name, Damage> {
    let (status, prot, flags) = (fields.u32()?, fields.u32()?, fields.u32()?);
    let number = fields.u32()?;
    let (file_offset, pages) = (fields.u64()?, fields.u64()?);
    let kind = MappingKind {
        status,
        prot,
        flags,
        file_offset,
    };
    Ok(Name {
        kind,
        pages,
        number,
    })
}

fn extent(fields: &mut Fields<'_>) -> Result<Extent, Damage> {
    let (mapping, at_ms) = (fields.u32()?, fields.u32()?);
    let (first, pages) = (fields.u64()?, fields.u32()?);
    fields.u32()?;
    Ok(Extent {
        mapping,
        first,
        pages,
        at_ms,
    })
}
