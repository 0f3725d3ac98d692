//! Entries of a log as bytes: a length and a checksum before each. `docs/log-replay.md` draws the format.

use crate::limits::{
    REPLAY_ENTRIES_MAX, REPLAY_ENTRY_BYTES_MAX, REPLAY_FILE_MAX, REPLAY_HEAD_BYTES_MAX,
};

/// First bytes of each file of a log.
const MAGIC: &[u8; 8] = b"PFRPLOG\x01";

/// Bytes of a file's header.
const HEADER_BYTES: usize = 32;

/// Bytes before an entry's body: its length and its checksum, both 32 bits, little-endian.
pub const ENTRY_HEAD_BYTES: usize = 8;

/// What each file of a log begins with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// The file's number; the first is 1.
    pub file: u32,
    /// The first connection number that no file before has used.
    pub connections: u32,
    /// The number of the file's first entry; the first of a log is 0.
    pub first: u64,
    /// How long a replay waits at [`Entry::Settled`], µs.
    pub wait_us: u32,
}

impl Header {
    /// Bytes of an encoded header.
    pub const BYTES: usize = HEADER_BYTES;

    /// The header as bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&self.file.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.connections.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.first.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.wait_us.to_le_bytes());
        let sum = crc32fast::hash(&bytes[..28]);
        bytes[28..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// A header from bytes; `None` if they are none, or damaged, or no recorder writes such numbers.
    pub fn decode(bytes: &[u8]) -> Option<Header> {
        let bytes = bytes.get(..HEADER_BYTES)?;
        let sum = u32_at(bytes, 28)?;
        if &bytes[..8] != MAGIC || sum != crc32fast::hash(&bytes[..28]) {
            return None;
        }
        let header = Header {
            file: u32_at(bytes, 8)?,
            connections: u32_at(bytes, 12)?,
            first: u64_at(bytes, 16)?,
            wait_us: u32_at(bytes, 24)?,
        };
        let is_numbered = (1..=REPLAY_FILE_MAX).contains(&header.file);
        let begins = match header.file {
            1 => header.first == 0,
            _ => header.first <= REPLAY_ENTRIES_MAX,
        };
        (is_numbered && begins).then_some(header)
    }
}

/// What happened, in the order in which the recorder saw it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Entry {
    /// A client connected.
    Open {
        /// The connection's number: no other connection of the log has it.
        connection: u32,
    },
    /// A client sent this, and it was passed to the service.
    Piece {
        /// From whom.
        connection: u32,
        /// What, as it came.
        bytes: Vec<u8>,
    },
    /// Before the next entry, so many bytes of answers had come.
    Answers {
        /// To whom.
        connection: u32,
        /// All bytes of answers on the connection up to here.
        total: u64,
        /// CRC-32 of all of them.
        checksum: u32,
        /// The first of those that came since the last entry of this kind, for messages.
        head: Vec<u8>,
    },
    /// No answer came to the last piece within the wait of [`Header::wait_us`], and the next one was passed then.
    Settled,
    /// A client has sent everything, or is gone.
    Finish {
        /// Which.
        connection: u32,
    },
    /// The service has ended the connection.
    Ended {
        /// Which.
        connection: u32,
    },
    /// The recorder was started again: all connections before had ended.
    Restart,
    /// The file ends here, and another one follows.
    FileEnd,
    /// The recording was ended in order.
    End {
        /// What `--digest` printed for the service, if it was asked.
        digest: Option<Vec<u8>>,
    },
}

/// What stands at the beginning of some bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ReadEntry {
    /// A whole entry, and how many bytes it takes.
    Whole(Entry, usize),
    /// The beginning of an entry: so many bytes are needed at least.
    Partial(usize),
    /// No entry begins like this.
    Damaged(&'static str),
}

/// Appends an entry to `out`.
pub fn encode(entry: &Entry, out: &mut Vec<u8>) {
    let begin = out.len();
    out.extend([0; ENTRY_HEAD_BYTES]);
    match entry {
        Entry::Open { connection } => kind(out, 1, *connection),
        Entry::Piece { connection, bytes } => {
            kind(out, 2, *connection);
            out.extend_from_slice(bytes);
        }
        Entry::Answers {
            connection,
            total,
            checksum,
            head,
        } => {
            kind(out, 3, *connection);
            out.extend(total.to_le_bytes());
            out.extend(checksum.to_le_bytes());
            out.extend_from_slice(&head[..head.len().min(REPLAY_HEAD_BYTES_MAX)]);
        }
        Entry::Settled => kind(out, 4, 0),
        Entry::Finish { connection } => kind(out, 5, *connection),
        Entry::Ended { connection } => kind(out, 6, *connection),
        Entry::Restart => kind(out, 7, 0),
        Entry::FileEnd => kind(out, 8, 0),
        Entry::End { digest: None } => kind(out, 9, 0),
        Entry::End {
            digest: Some(digest),
        } => {
            kind(out, 9, 1);
            out.extend_from_slice(digest);
        }
    }
    let length = u32::try_from(out.len() - begin - ENTRY_HEAD_BYTES).unwrap_or(u32::MAX);
    out[begin..begin + 4].copy_from_slice(&length.to_le_bytes());
    let sum = checksum(&out[begin..begin + 4], &out[begin + ENTRY_HEAD_BYTES..]);
    out[begin + 4..begin + 8].copy_from_slice(&sum.to_le_bytes());
}

fn kind(out: &mut Vec<u8>, kind: u8, connection: u32) {
    out.push(kind);
    out.extend(connection.to_le_bytes());
}

fn checksum(length: &[u8], body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(length);
    hasher.update(body);
    hasher.finalize()
}

/// Reads the entry that `bytes` begin with.
pub fn decode(bytes: &[u8]) -> ReadEntry {
    let (Some(length), Some(sum)) = (u32_at(bytes, 0), u32_at(bytes, 4)) else {
        return ReadEntry::Partial(ENTRY_HEAD_BYTES);
    };
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length > REPLAY_ENTRY_BYTES_MAX {
        return ReadEntry::Damaged("an entry is longer than any entry may be");
    }
    let whole = ENTRY_HEAD_BYTES + length;
    let Some(body) = bytes.get(ENTRY_HEAD_BYTES..whole) else {
        return ReadEntry::Partial(whole);
    };
    if checksum(&bytes[..4], body) != sum {
        return ReadEntry::Damaged("an entry's checksum is wrong");
    }
    match parse(body) {
        Some(entry) => ReadEntry::Whole(entry, whole),
        None => ReadEntry::Damaged("an entry is of an unknown kind (written by a newer version?)"),
    }
}

fn parse(body: &[u8]) -> Option<Entry> {
    let connection = u32_at(body, 1)?;
    let rest = &body[5..];
    let entry = match body[0] {
        1 => Entry::Open { connection },
        2 => Entry::Piece {
            connection,
            bytes: rest.to_vec(),
        },
        3 => Entry::Answers {
            connection,
            total: u64_at(rest, 0)?,
            checksum: u32_at(rest, 8)?,
            head: rest[12..].to_vec(),
        },
        4 => Entry::Settled,
        5 => Entry::Finish { connection },
        6 => Entry::Ended { connection },
        7 => Entry::Restart,
        8 => Entry::FileEnd,
        9 => Entry::End {
            digest: (connection == 1).then(|| rest.to_vec()),
        },
        _ => return None,
    };
    Some(entry)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at + 4)?;
    field.try_into().ok().map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let field = bytes.get(at..at + 8)?;
    field.try_into().ok().map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries() -> Vec<Entry> {
        vec![
            Entry::Open { connection: 7 },
            Entry::Piece {
                connection: 7,
                bytes: b"INCR a\r\n".to_vec(),
            },
            Entry::Answers {
                connection: 7,
                total: 1 << 40,
                checksum: 9,
                head: b":1\r\n".to_vec(),
            },
            Entry::Settled,
            Entry::Finish { connection: 7 },
            Entry::Ended { connection: 7 },
            Entry::Restart,
            Entry::FileEnd,
            Entry::End { digest: None },
            Entry::End {
                digest: Some(b"abc".to_vec()),
            },
        ]
    }

    #[test]
    fn entries_are_read_as_they_were_written_and_a_flipped_bit_is_seen() {
        for entry in entries() {
            let mut bytes = Vec::new();
            encode(&entry, &mut bytes);
            let length = bytes.len();
            for cut in 0..length {
                let read = decode(&bytes[..cut]);
                assert!(matches!(read, ReadEntry::Partial(need) if need > cut && need <= length));
            }
            for bit in 0..length * 8 {
                let mut damaged = bytes.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                let read = decode(&damaged);
                assert!(!matches!(read, ReadEntry::Whole(..)), "bit {bit}: {read:?}");
            }
            bytes.extend([1, 2, 3]);
            assert_eq!(decode(&bytes), ReadEntry::Whole(entry, length));
        }
    }

    #[test]
    fn a_header_is_read_as_it_was_written() {
        let header = Header {
            file: 3,
            connections: 9,
            first: 1 << 33,
            wait_us: 2000,
        };
        let bytes = header.encode();
        assert_eq!(Header::decode(&bytes), Some(header));
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Header::decode(&damaged), None, "bit {bit}");
        }
        assert_eq!(Header::decode(&bytes[..31]), None);
    }

    #[test]
    fn a_header_with_numbers_that_no_recorder_writes_is_none() {
        let of = |file, first| {
            let header = Header {
                file,
                connections: 0,
                first,
                wait_us: 0,
            };
            Header::decode(&header.encode()) == Some(header)
        };
        assert!(of(1, 0) && of(2, 0) && of(REPLAY_FILE_MAX, REPLAY_ENTRIES_MAX));
        assert!(!of(0, 0) && !of(1, 1) && !of(1, u64::MAX));
        assert!(!of(REPLAY_FILE_MAX + 1, 7) && !of(u32::MAX, 7) && !of(2, u64::MAX));
    }
}
