//! An index as bytes: what the destination tells of its tree, and what both ends take a digest of. Pure.
//!
//! u32 count of names; for each of them, in order: string path, u32 number of the earlier name of the same file
//! (from 1; 0: it is the first). Behind a first name: u8 kind, u64 size and hashes (16 bytes each), or u64 device
//! number, or string target; u8 1 and the attributes, or u8 0 where they are to be set again.

use std::collections::HashMap;
use std::sync::Arc;

use pageferry::limits::FILE_NAMES_MAX;
use sha2::{Digest, Sha256};
use thiserror::Error;

use super::hash::hexadecimal;
use super::index::{BadOperation, BlockHash, Index, Kind, Node, blocks_of};
use super::operation::{BadBytes, Fields, put_attributes, put_string};
use super::path::{BadPath, check};

/// Bytes that are no index.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub(super) enum BadTable {
    #[error("{0}")]
    Bytes(#[from] BadBytes),
    #[error("{0}")]
    Path(#[from] BadPath),
    #[error("{0}")]
    Size(#[from] BadOperation),
    #[error("it has {0} names")]
    Names(u32),
    #[error("a name is that of a file that was not told")]
    Unknown,
    #[error("it ends too late")]
    Long,
}

/// Hands the bytes out in parts.
pub(super) fn encode(index: &Index, put: &mut dyn FnMut(&[u8])) {
    let count = u32::try_from(index.len()).unwrap_or(u32::MAX);
    put(&count.to_le_bytes());
    let mut first = HashMap::new();
    let mut part = Vec::new();
    for (number, (path, id)) in (1_u32..).zip(index.names()) {
        part.clear();
        put_string(&mut part, path);
        if let Some(earlier) = first.get(&id) {
            part.extend(u32::to_le_bytes(*earlier));
        } else {
            first.insert(id, number);
            part.extend(0_u32.to_le_bytes());
            if let Some(node) = index.node(id) {
                encode_node(node, &mut part);
            }
        }
        put(&part);
    }
}

fn encode_node(node: &Node, to: &mut Vec<u8>) {
    let mut device = |kind: u8, number: u64| {
        to.push(kind);
        to.extend(number.to_le_bytes());
    };
    match &node.kind {
        Kind::Directory => to.push(1),
        Kind::File(size, blocks) => {
            device(2, *size);
            for block in blocks.iter() {
                to.extend(block.0);
            }
        }
        Kind::Symlink(target) => {
            to.push(3);
            put_string(to, target);
        }
        Kind::Fifo => to.push(4),
        Kind::Socket => to.push(5),
        Kind::CharDevice(number) => device(6, *number),
        Kind::BlockDevice(number) => device(7, *number),
    }
    match &node.attributes {
        None => to.push(0),
        Some(attributes) => {
            to.push(1);
            put_attributes(to, attributes);
        }
    }
}

/// Reads an index.
pub(super) fn decode(bytes: &[u8]) -> Result<Index, BadTable> {
    let mut fields = Fields(bytes);
    let count = fields.u32()?;
    if usize::try_from(count).is_ok_and(|count| count > FILE_NAMES_MAX) {
        return Err(BadTable::Names(count));
    }
    let mut index = Index::default();
    let mut paths: Vec<Vec<u8>> = Vec::new();
    for number in 0..count {
        let path = fields.string()?.to_vec();
        check(&path)?;
        match fields.u32()? {
            0 => {
                let node = decode_node(&mut fields)?;
                index.add_as(u64::from(number), path.clone(), node);
                index.expect_size()?;
            }
            earlier => {
                let at = usize::try_from(earlier - 1).unwrap_or(usize::MAX);
                let first = paths.get(at).ok_or(BadTable::Unknown)?;
                let id = index.id(first).ok_or(BadTable::Unknown)?;
                index.add_name(path.clone(), id);
            }
        }
        paths.push(path);
    }
    match fields.is_empty() {
        true => Ok(index),
        false => Err(BadTable::Long),
    }
}

fn decode_node(fields: &mut Fields<'_>) -> Result<Node, BadTable> {
    let kind = match fields.u8()? {
        1 => Kind::Directory,
        2 => {
            let size = fields.u64()?;
            let mut blocks = Vec::new();
            for _ in 0..blocks_of(size) {
                blocks.push(BlockHash(fields.hash()?));
            }
            Kind::File(size, Arc::new(blocks))
        }
        3 => Kind::Symlink(fields.string()?.to_vec()),
        4 => Kind::Fifo,
        5 => Kind::Socket,
        6 => Kind::CharDevice(fields.u64()?),
        7 => Kind::BlockDevice(fields.u64()?),
        other => return Err(BadBytes::Number(other).into()),
    };
    let attributes = match fields.u8()? {
        0 => None,
        1 => Some(Arc::new(fields.attributes()?)),
        other => return Err(BadBytes::Number(other).into()),
    };
    Ok(Node { kind, attributes })
}

/// One number for all of a tree: equal trees under one key have equal ones.
pub(super) fn digest(index: &Index) -> String {
    let mut sum = Sha256::new();
    encode(index, &mut |part| sum.update(part));
    hexadecimal(&sum.finalize())
}

#[cfg(test)]
mod tests {
    use super::super::attributes::Attributes;
    use super::*;

    fn sample() -> Index {
        let attributes = Some(Arc::new(Attributes {
            mode: 0o755,
            mtime: (-1, 5),
            xattrs: vec![(b"user.x".to_vec(), b"y".to_vec())],
            ..Attributes::default()
        }));
        let mut index = Index::empty();
        index.add(b"a".to_vec(), Kind::Directory, attributes.clone());
        let blocks = vec![BlockHash::ZEROS, BlockHash([3; 16])];
        let file = Kind::File(20_000, Arc::new(blocks));
        let id = index.add(b"a/\xff".to_vec(), file, attributes);
        index.add_name(b"b".to_vec(), id);
        for (name, kind) in [
            ("c", Kind::Symlink(b"/x".to_vec())),
            ("d", Kind::Fifo),
            ("e", Kind::Socket),
            ("f", Kind::CharDevice(0)),
            ("g", Kind::BlockDevice(9)),
        ] {
            index.add(name.into(), kind, None);
        }
        index
    }

    fn bytes(index: &Index) -> Vec<u8> {
        let mut bytes = Vec::new();
        encode(index, &mut |part| bytes.extend(part));
        bytes
    }

    #[test]
    fn what_is_told_is_read_and_has_the_same_digest() {
        let index = sample();
        let read = decode(&bytes(&index)).unwrap();
        assert_eq!(digest(&read), digest(&index));
        assert_eq!(read.id(b"b"), read.id(b"a/\xff"));
        let mut other = sample();
        other.add(b"g".to_vec(), Kind::BlockDevice(8), None);
        assert_ne!(digest(&other), digest(&index));
    }

    #[test]
    fn damaged_bytes_are_no_panic_and_cut_ones_no_index() {
        let whole = bytes(&sample());
        for cut in 0..whole.len() {
            decode(&whole[..cut]).unwrap_err();
        }
        for at in 0..whole.len() {
            for bit in [1, 128] {
                let mut damaged = whole.clone();
                damaged[at] ^= bit;
                let _ = decode(&damaged);
            }
        }
        let more = [&whole[..], &[0]].concat();
        assert_eq!(decode(&more).unwrap_err(), BadTable::Long);
    }
}
