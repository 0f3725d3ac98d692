//! The log on its way: what is read next, and how much is left.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use pageferry::error::{Error, Kind, Result};
use pageferry::limits::{REPLAY_BATCH_BYTES_MAX, REPLAY_ENTRY_BYTES_MAX};
use pageferry::replay::encode;

use crate::service_log::{LogReader, Next, size};

/// A log of either kind, and how far it was read.
#[derive(Debug)]
pub(super) enum Tail {
    /// A recorder's.
    Recorded { dir: PathBuf, reader: LogReader },
    /// Any file.
    File {
        path: PathBuf,
        file: File,
        read: u64,
    },
}

impl Tail {
    /// At the log's begin.
    pub(super) fn open(path: &Path, is_recorded: bool) -> Result<Tail> {
        if is_recorded {
            return Ok(Tail::Recorded {
                dir: path.to_owned(),
                reader: LogReader::open(path)?,
            });
        }
        let file = File::open(path).map_err(|error| Error::file("open", path, error))?;
        Ok(Tail::File {
            path: path.to_owned(),
            file,
            read: 0,
        })
    }

    /// How long a replay waits where the recorder did, µs.
    pub(super) fn wait_us(&self) -> u32 {
        match self {
            Tail::Recorded { reader, .. } => reader.header().wait_us,
            Tail::File { .. } => 0,
        }
    }

    /// What was read: entries, or bytes.
    pub(super) fn at(&self) -> u64 {
        match self {
            Tail::Recorded { reader, .. } => reader.entries(),
            Tail::File { read, .. } => *read,
        }
    }

    /// Bytes that are written and not read.
    pub(super) fn left(&self) -> Result<u64> {
        match self {
            Tail::Recorded { dir, reader } => Ok(size(dir)?.saturating_sub(reader.position())),
            Tail::File { path, file, read } => {
                let found = file.metadata();
                let found = found.map_err(|error| Error::file("look at", path, error))?;
                // Some services begin a new file, and give it the name.
                let named = fs::metadata(path);
                let is_same = named.is_ok_and(|named| same(&named, &found));
                match is_same && found.len() >= *read {
                    true => Ok(found.len() - *read),
                    false => Err(Error::new(
                        Kind::Usage,
                        format!(
                            "{} was cut or replaced meanwhile: it is not a log",
                            path.display()
                        ),
                    )),
                }
            }
        }
    }

    /// The next part, empty if nothing is there; of a recorder's log at most the entries before `until`.
    pub(super) fn next(&mut self, until: Option<u64>) -> Result<Vec<u8>> {
        match self {
            Tail::Recorded { reader, .. } => {
                let mut part = Vec::new();
                let room = REPLAY_BATCH_BYTES_MAX - REPLAY_ENTRY_BYTES_MAX;
                while part.len() < room && until.is_none_or(|until| reader.entries() < until) {
                    match reader.next()? {
                        Next::Entry(entry) => encode(&entry, &mut part),
                        Next::Nothing(_) => break,
                    }
                }
                Ok(part)
            }
            Tail::File { path, file, read } => {
                let mut part = Vec::new();
                let most = REPLAY_BATCH_BYTES_MAX as u64;
                let got = file.by_ref().take(most).read_to_end(&mut part);
                *read += got.map_err(|error| Error::file("read", path, error))? as u64;
                Ok(part)
            }
        }
    }
}

fn same(one: &fs::Metadata, other: &fs::Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}
