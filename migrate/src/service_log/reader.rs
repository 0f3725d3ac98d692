//! Reads a log's entries in order, also while they are written.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use pageferry::error::{Error, Kind, Result};
use pageferry::replay::{Entry, Header, ReadEntry, decode};

use super::{damaged, files, path};

/// Bytes that are read at once.
const READ_BYTES: usize = 64 << 10;

/// What comes next in a log.
#[derive(Debug)]
pub(crate) enum Next {
    /// An entry.
    Entry(Entry),
    /// Nothing at the moment: so many bytes of a partial entry stand at the end.
    Nothing(u64),
}

/// A position in a log.
#[derive(Debug)]
pub(crate) struct LogReader {
    dir: PathBuf,
    path: PathBuf,
    header: Header,
    file: File,
    buffer: Vec<u8>,
    /// Where the next entry begins in the buffer, and in the file.
    at: usize,
    offset: u64,
    /// Bytes of all files before this one.
    before: u64,
    entries: u64,
    /// The file has said that another one follows.
    is_over: bool,
}

impl LogReader {
    /// Begins at the first entry.
    pub(crate) fn open(dir: &Path) -> Result<LogReader> {
        let numbers = files(dir)?;
        match numbers.first() {
            Some(1) => LogReader::open_file(dir, 1),
            _ => {
                let text = format!("{} holds no log: log-000001 is missing", dir.display());
                Err(Error::new(Kind::Usage, text))
            }
        }
    }

    /// Begins at the first entry of a file.
    pub(super) fn open_file(dir: &Path, number: u32) -> Result<LogReader> {
        let path = path(dir, number);
        let mut file = File::open(&path).map_err(|error| Error::file("open", &path, error))?;
        let mut bytes = [0; Header::BYTES];
        let read = file.read_exact(&mut bytes);
        let header = read.ok().and_then(|()| Header::decode(&bytes));
        let header = header.filter(|header| header.file == number);
        let header = header.ok_or_else(|| damaged(&path, 0, "the header is not that of a log"))?;
        Ok(LogReader {
            dir: dir.to_owned(),
            path,
            header,
            file,
            buffer: Vec::new(),
            at: 0,
            offset: Header::BYTES as u64,
            before: 0,
            entries: header.first,
            is_over: false,
        })
    }

    /// The header of the file that is read.
    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    /// The file that is read.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Where the next entry begins in its file.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// The number of the next entry.
    pub(crate) fn entries(&self) -> u64 {
        self.entries
    }

    /// Bytes of all that has been read.
    pub(crate) fn position(&self) -> u64 {
        self.before + self.offset
    }

    /// The next entry, if it is there.
    pub(crate) fn next(&mut self) -> Result<Next> {
        if self.is_over && !self.next_file()? {
            return Ok(Next::Nothing(0));
        }
        loop {
            match decode(&self.buffer[self.at..]) {
                ReadEntry::Whole(entry, length) => {
                    self.at += length;
                    self.offset += length as u64;
                    self.entries += 1;
                    self.is_over = entry == Entry::FileEnd;
                    return Ok(Next::Entry(entry));
                }
                ReadEntry::Partial(_) => {
                    if self.fill()? == 0 {
                        return self.end();
                    }
                }
                ReadEntry::Damaged(what) => return self.judge(what),
            }
        }
    }

    /// The file ends here, within an entry or not.
    fn end(&self) -> Result<Next> {
        let rest = (self.buffer.len() - self.at) as u64;
        if path(&self.dir, self.header.file + 1).exists() {
            let text = "the file ends here, and others follow";
            return Err(damaged(&self.path, self.offset, text));
        }
        Ok(Next::Nothing(rest))
    }

    /// An entry is damaged: by a crash, if it is the last.
    fn judge(&mut self, what: &str) -> Result<Next> {
        while self.fill()? > 0 {
            if self.buffer.len() - self.at > 4 * READ_BYTES {
                return Err(damaged(&self.path, self.offset, what));
            }
        }
        let rest = &self.buffer[self.at..];
        let length = rest.first_chunk().map(|length| u32::from_le_bytes(*length));
        let length = length.map_or(0, |length| length as usize);
        // A file system that lost its power may have the length of what was written, and zeros.
        let was_torn = length + pageferry::replay::ENTRY_HEAD_BYTES >= rest.len()
            || rest.iter().all(|&byte| byte == 0);
        match was_torn {
            true => self.end(),
            false => Err(damaged(&self.path, self.offset, what)),
        }
    }

    fn fill(&mut self) -> Result<usize> {
        self.buffer.drain(..self.at);
        self.at = 0;
        let length = self.buffer.len();
        self.buffer.resize(length + READ_BYTES, 0);
        let read = self.file.read(&mut self.buffer[length..]);
        self.buffer.truncate(length + *read.as_ref().unwrap_or(&0));
        read.map_err(|error| Error::file("read", &self.path, error))
    }

    /// Goes on with the next file, if it is there and has its header.
    fn next_file(&mut self) -> Result<bool> {
        let number = self.header.file + 1;
        let next = path(&self.dir, number);
        let length = std::fs::metadata(&next).map_or(0, |found| found.len());
        if length < Header::BYTES as u64 {
            return Ok(false);
        }
        let mut reader = LogReader::open_file(&self.dir, number)?;
        if reader.header.first != self.entries {
            let text = format!(
                "it begins with entry {}, and {} is the next",
                reader.header.first, self.entries
            );
            return Err(damaged(&reader.path, 0, &text));
        }
        reader.before = self.before + self.offset;
        *self = reader;
        Ok(true)
    }
}
