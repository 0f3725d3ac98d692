//! A directory with the log of what clients told a service: numbered files of entries, one after another.
//!
//! ```text
//! DIR/lock          held by the recorder
//! DIR/record.sock   who connects to it holds the clients
//! DIR/sealed        clients may be another service's by now
//! DIR/log-000001    header, entries, FileEnd
//! DIR/log-000002    header, entries            the last: it may end within an entry after a crash
//! ```

mod digest;
mod hold;
mod reader;
mod writer;

use std::fs;
use std::path::{Path, PathBuf};

use pageferry::error::{Error, Kind, Result};

pub(crate) use digest::{digest, with_address};
pub(crate) use hold::{Hold, seal, unseal};
pub(crate) use reader::{LogReader, Next};
pub(crate) use writer::LogWriter;

/// Begin of a file's name.
const PREFIX: &str = "log-";

/// The recorder's socket.
pub(crate) const CONTROL: &str = "record.sock";

/// The recorder's first message to whoever holds clients: the number of the log's entries follows, 64 bits, little-endian.
pub(crate) const HELD: u8 = b'h';

/// Clients stay held even if the sender of this command ends. This command and the others are answered by the same byte.
pub(crate) const SEAL: u8 = b's';

/// Clients go on here.
pub(crate) const RELEASE: u8 = b'r';

/// The recording ends.
pub(crate) const END: u8 = b'e';

/// The lock's name.
const LOCK: &str = "lock";

fn path(dir: &Path, file: u32) -> PathBuf {
    dir.join(format!("{PREFIX}{file:06}"))
}

/// Numbers of the files that are there, in order.
fn files(dir: &Path) -> Result<Vec<u32>> {
    let failed = |error| Error::file("read", dir, error);
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        numbers.extend(number.and_then(|number| number.parse::<u32>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Bytes of all files of a log.
pub(crate) fn size(dir: &Path) -> Result<u64> {
    let mut size = 0;
    for number in files(dir)? {
        let path = path(dir, number);
        let found = fs::metadata(&path).map_err(|error| Error::file("look at", &path, error))?;
        size += found.len();
    }
    Ok(size)
}

fn damaged(path: &Path, at: u64, what: &str) -> Error {
    let text = format!("{} is damaged at byte {at}: {what}", path.display());
    Error::new(Kind::Io, text)
}
