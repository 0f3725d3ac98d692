//! What changes a tree, and its form on the wire. Pure.
//!
//! Integers are little-endian. A byte string is its length as u32 and the bytes.
//!
//! | number | operation | fields |
//! |---|---|---|
//! | 1 | take a name from a file, and keep the file | path, u32 parking place |
//! | 2 | give a parked file a name | path, u32 parking place |
//! | 3 | remove a name, or an empty directory | path |
//! | 4 | make a file without contents | path, u8 kind, u64 device number or string target of a link |
//! | 5 | give a file another name | path, string path that it has |
//! | 6 | set the length | path, u64 bytes |
//! | 7 | write blocks | path, u64 number of the first, string data |
//! | 8 | make blocks zeros | path, u64 number of the first, u64 count |
//! | 9 | set attributes | path, u32 mode, u32 uid, u32 gid, i64 s, u32 ns, u32 count, strings name and value |

use pageferry::limits::{FILE_BATCH_BYTES_MAX, FILE_XATTRS_BYTES_MAX};
use thiserror::Error;

use super::attributes::Attributes;

/// What is made anew. Files get their contents afterwards.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Made {
    Directory,
    File,
    Symlink(Vec<u8>),
    Fifo,
    Socket,
    CharDevice(u64),
    BlockDevice(u64),
}

/// See the module's text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Operation {
    Park {
        path: Vec<u8>,
        slot: u32,
    },
    Place {
        slot: u32,
        path: Vec<u8>,
    },
    Remove {
        path: Vec<u8>,
    },
    Make {
        path: Vec<u8>,
        made: Made,
    },
    Link {
        from: Vec<u8>,
        path: Vec<u8>,
    },
    Size {
        path: Vec<u8>,
        size: u64,
    },
    Data {
        path: Vec<u8>,
        first: u64,
        data: Vec<u8>,
    },
    Zeros {
        path: Vec<u8>,
        first: u64,
        blocks: u64,
    },
    Attributes {
        path: Vec<u8>,
        attributes: Attributes,
    },
}

/// Bytes that are no operation.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub(super) enum BadBytes {
    #[error("they end within an operation")]
    Short,
    #[error("there is no operation or kind {0}")]
    Number(u8),
    #[error("a string of {0} bytes is longer than any may be")]
    Long(u64),
}

/// Bytes that are read one after the other.
#[derive(Debug)]
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], BadBytes> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(BadBytes::Short)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], BadBytes> {
        self.take(N)?.try_into().map_err(|_| BadBytes::Short)
    }

    pub(super) fn u8(&mut self) -> Result<u8, BadBytes> {
        Ok(self.array::<1>()?[0])
    }

    pub(super) fn u32(&mut self) -> Result<u32, BadBytes> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, BadBytes> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(super) fn i64(&mut self) -> Result<i64, BadBytes> {
        Ok(i64::from_le_bytes(self.array()?))
    }

    pub(super) fn hash(&mut self) -> Result<[u8; 16], BadBytes> {
        self.array()
    }

    pub(super) fn string(&mut self) -> Result<&'a [u8], BadBytes> {
        let length = self.u32()?;
        match usize::try_from(length) {
            Ok(length) if length <= FILE_BATCH_BYTES_MAX => self.take(length),
            _ => Err(BadBytes::Long(u64::from(length))),
        }
    }

    pub(super) fn attributes(&mut self) -> Result<Attributes, BadBytes> {
        let (mode, uid, gid) = (self.u32()? & 0o7777, self.u32()?, self.u32()?);
        let mtime = (self.i64()?, self.u32()?.min(999_999_999));
        let mut attributes = Attributes {
            mode,
            uid,
            gid,
            mtime,
            xattrs: Vec::new(),
        };
        let mut bytes = 0;
        for _ in 0..self.u32()? {
            let (name, value) = (self.string()?, self.string()?);
            bytes += name.len() + value.len();
            if bytes > FILE_XATTRS_BYTES_MAX {
                return Err(BadBytes::Long(bytes as u64));
            }
            attributes.xattrs.push((name.to_vec(), value.to_vec()));
        }
        Ok(attributes)
    }
}

pub(super) fn put_string(to: &mut Vec<u8>, bytes: &[u8]) {
    // Nothing is as long as that: paths, data and attributes have their limits.
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    to.extend(length.to_le_bytes());
    to.extend(bytes);
}

pub(super) fn put_attributes(to: &mut Vec<u8>, attributes: &Attributes) {
    for number in [attributes.mode, attributes.uid, attributes.gid] {
        to.extend(number.to_le_bytes());
    }
    to.extend(attributes.mtime.0.to_le_bytes());
    to.extend(attributes.mtime.1.to_le_bytes());
    let count = u32::try_from(attributes.xattrs.len()).unwrap_or(u32::MAX);
    to.extend(count.to_le_bytes());
    for (name, value) in &attributes.xattrs {
        put_string(to, name);
        put_string(to, value);
    }
}

impl Operation {
    pub(super) fn path(&self) -> &[u8] {
        match self {
            Operation::Park { path, .. }
            | Operation::Place { path, .. }
            | Operation::Remove { path }
            | Operation::Make { path, .. }
            | Operation::Link { path, .. }
            | Operation::Size { path, .. }
            | Operation::Data { path, .. }
            | Operation::Zeros { path, .. }
            | Operation::Attributes { path, .. } => path,
        }
    }

    fn number(&self) -> u8 {
        match self {
            Operation::Park { .. } => 1,
            Operation::Place { .. } => 2,
            Operation::Remove { .. } => 3,
            Operation::Make { .. } => 4,
            Operation::Link { .. } => 5,
            Operation::Size { .. } => 6,
            Operation::Data { .. } => 7,
            Operation::Zeros { .. } => 8,
            Operation::Attributes { .. } => 9,
        }
    }

    /// Appends its form on the wire.
    pub(super) fn encode(&self, to: &mut Vec<u8>) {
        to.push(self.number());
        put_string(to, self.path());
        match self {
            Operation::Park { slot, .. } | Operation::Place { slot, .. } => {
                to.extend(slot.to_le_bytes());
            }
            Operation::Remove { .. } => {}
            Operation::Make { made, .. } => encode_made(made, to),
            Operation::Link { from, .. } => put_string(to, from),
            Operation::Size { size, .. } => to.extend(size.to_le_bytes()),
            Operation::Data { first, data, .. } => {
                to.extend(first.to_le_bytes());
                put_string(to, data);
            }
            Operation::Zeros { first, blocks, .. } => {
                to.extend(first.to_le_bytes());
                to.extend(blocks.to_le_bytes());
            }
            Operation::Attributes { attributes, .. } => put_attributes(to, attributes),
        }
    }

    /// Reads one.
    pub(super) fn decode(from: &mut Fields<'_>) -> Result<Operation, BadBytes> {
        let number = from.u8()?;
        let path = from.string()?.to_vec();
        Ok(match number {
            1 => Operation::Park {
                path,
                slot: from.u32()?,
            },
            2 => Operation::Place {
                path,
                slot: from.u32()?,
            },
            3 => Operation::Remove { path },
            4 => Operation::Make {
                path,
                made: decode_made(from)?,
            },
            5 => Operation::Link {
                path,
                from: from.string()?.to_vec(),
            },
            6 => Operation::Size {
                path,
                size: from.u64()?,
            },
            7 => Operation::Data {
                path,
                first: from.u64()?,
                data: from.string()?.to_vec(),
            },
            8 => Operation::Zeros {
                path,
                first: from.u64()?,
                blocks: from.u64()?,
            },
            9 => Operation::Attributes {
                path,
                attributes: from.attributes()?,
            },
            other => return Err(BadBytes::Number(other)),
        })
    }
}

fn encode_made(made: &Made, to: &mut Vec<u8>) {
    match made {
        Made::Directory => to.push(1),
        Made::File => to.push(2),
        Made::Symlink(target) => {
            to.push(3);
            put_string(to, target);
        }
        Made::Fifo => to.push(4),
        Made::Socket => to.push(5),
        Made::CharDevice(number) => {
            to.push(6);
            to.extend(number.to_le_bytes());
        }
        Made::BlockDevice(number) => {
            to.push(7);
            to.extend(number.to_le_bytes());
        }
    }
}

fn decode_made(from: &mut Fields<'_>) -> Result<Made, BadBytes> {
    Ok(match from.u8()? {
        1 => Made::Directory,
        2 => Made::File,
        3 => Made::Symlink(from.string()?.to_vec()),
        4 => Made::Fifo,
        5 => Made::Socket,
        6 => Made::CharDevice(from.u64()?),
        7 => Made::BlockDevice(from.u64()?),
        other => return Err(BadBytes::Number(other)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Operation> {
        let path = || b"a/\xff".to_vec();
        let attributes = Attributes {
            mode: 0o4755,
            uid: 1,
            gid: u32::MAX,
            mtime: (-5, 999_999_999),
            xattrs: vec![(b"user.a".to_vec(), vec![0, 255])],
        };
        let mut all = vec![
            Operation::Park {
                path: path(),
                slot: 7,
            },
            Operation::Place {
                path: path(),
                slot: 7,
            },
            Operation::Remove { path: path() },
            Operation::Link {
                path: path(),
                from: b"b".to_vec(),
            },
            Operation::Size {
                path: path(),
                size: 1 << 40,
            },
            Operation::Data {
                path: path(),
                first: 3,
                data: vec![9; 100],
            },
            Operation::Zeros {
                path: path(),
                first: 3,
                blocks: 9,
            },
            Operation::Attributes {
                path: path(),
                attributes,
            },
        ];
        let kinds = [
            Made::Directory,
            Made::File,
            Made::Symlink(b"../x".to_vec()),
            Made::Fifo,
            Made::Socket,
            Made::CharDevice(0),
            Made::BlockDevice(0x0801),
        ];
        all.extend(kinds.map(|made| Operation::Make { path: path(), made }));
        all
    }

    #[test]
    fn what_is_written_is_read() {
        let mut bytes = Vec::new();
        for operation in all() {
            operation.encode(&mut bytes);
        }
        let mut fields = Fields(&bytes);
        for operation in all() {
            assert_eq!(Operation::decode(&mut fields).unwrap(), operation);
        }
        assert!(fields.is_empty());
    }

    #[test]
    fn a_part_of_an_operation_is_none() {
        for operation in all() {
            let mut bytes = Vec::new();
            operation.encode(&mut bytes);
            for cut in 0..bytes.len() {
                Operation::decode(&mut Fields(&bytes[..cut])).unwrap_err();
            }
            for at in 0..bytes.len() {
                let mut damaged = bytes.clone();
                damaged[at] ^= 0x81;
                // Whatever it is, it is no panic.
                let _ = Operation::decode(&mut Fields(&damaged));
            }
        }
    }
}
