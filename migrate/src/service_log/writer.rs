//! Appends entries to a log: each before what it tells is done, in one write.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use nix::fcntl::{Flock, FlockArg};
use pageferry::error::{Error, Kind, Result};
use pageferry::limits::REPLAY_FILE_MAX;
use pageferry::replay::{Entry, Header, encode};

use super::{LOCK, LogReader, Next, files, path};

/// The end of a log that is written.
#[derive(Debug)]
pub(crate) struct LogWriter {
    dir: PathBuf,
    path: PathBuf,
    file: File,
    /// Bytes in the file, and how many make it full.
    size: u64,
    limit: u64,
    header: Header,
    entries: u64,
    connections: u32,
    buffer: Vec<u8>,
    /// The file before is brought to the disk.
    syncing: Option<JoinHandle<io::Result<()>>>,
    _lock: Flock<File>,
}

impl LogWriter {
    /// Begins a log in a directory, or goes on with the one that is there, which a recorder that was killed has left.
    pub(crate) fn open(dir: &Path, limit: u64, wait_us: u32) -> Result<LogWriter> {
        fs::create_dir_all(dir).map_err(|error| Error::file("make", dir, error))?;
        let lock = lock(dir)?;
        super::hold::expect_not_sealed(dir)?;
        let last = files(dir)?.last().copied();
        let resumed = match last {
            Some(last) => Some(resume(dir, last)?),
            None => None,
        };
        let header = resumed.unwrap_or(Header {
            file: 1,
            connections: 0,
            first: 0,
            wait_us,
        });
        let header = Header { wait_us, ..header };
        let (path, file) = create(dir, &header)?;
        let mut writer = LogWriter {
            dir: dir.to_owned(),
            path,
            file,
            size: Header::BYTES as u64,
            limit,
            header,
            entries: header.first,
            connections: header.connections,
            buffer: Vec::new(),
            syncing: None,
            _lock: lock,
        };
        if resumed.is_some() {
            writer.push(&Entry::Restart);
            writer.commit()?;
        }
        Ok(writer)
    }

    /// A number for a new connection.
    pub(crate) fn new_connection(&mut self) -> Result<u32> {
        let number = self.connections;
        let next = number.checked_add(1);
        let text = "the log has numbered as many connections as it can: begin a new one";
        self.connections = next.ok_or_else(|| Error::new(Kind::Usage, text))?;
        Ok(number)
    }

    /// Bytes in all files of this run.
    pub(crate) fn entries(&self) -> u64 {
        self.entries
    }

    /// Adds an entry, to be written by [`LogWriter::commit`].
    pub(crate) fn push(&mut self, entry: &Entry) {
        encode(entry, &mut self.buffer);
        self.entries += 1;
    }

    /// Writes what was added. A process that is killed from now on does not take it away.
    pub(crate) fn commit(&mut self) -> Result<()> {
        let failed = |path: &Path, error| {
            Error::file("write", path, error).within("what cannot be recorded is not passed on")
        };
        let written = self.file.write_all(&self.buffer);
        written.map_err(|error| failed(&self.path, error))?;
        self.size += self.buffer.len() as u64;
        self.buffer.clear();
        match self.size >= self.limit {
            true => self.rotate(),
            false => Ok(()),
        }
    }

    fn rotate(&mut self) -> Result<()> {
        let mut end = Vec::new();
        encode(&Entry::FileEnd, &mut end);
        let written = self.file.write_all(&end);
        written.map_err(|error| Error::file("write", &self.path, error))?;
        self.entries += 1;
        self.header = Header {
            file: after(self.header.file)?,
            connections: self.connections,
            first: self.entries,
            ..self.header
        };
        self.finish_sync()?;
        let (path, file) = create(&self.dir, &self.header)?;
        let full = std::mem::replace(&mut self.file, file);
        self.syncing = Some(thread::spawn(move || full.sync_all()));
        self.path = path;
        self.size = Header::BYTES as u64;
        Ok(())
    }

    fn finish_sync(&mut self) -> Result<()> {
        let synced = match self.syncing.take().map(JoinHandle::join) {
            Some(Ok(synced)) => synced,
            Some(Err(_)) => Err(io::Error::other("the thread has ended")),
            None => Ok(()),
        };
        synced.map_err(|error| Error::file("bring to the disk a file of", &self.dir, error))
    }

    /// Brings everything to the disk.
    pub(crate) fn sync(&mut self) -> Result<()> {
        self.finish_sync()?;
        let synced = self.file.sync_all();
        synced.map_err(|error| Error::file("bring to the disk", &self.path, error))
    }
}

fn lock(dir: &Path) -> Result<Flock<File>> {
    let path = dir.join(LOCK);
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path);
    let file = file.map_err(|error| Error::file("open", &path, error))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
        let text = format!(
            "{} is locked: another recorder writes there",
            path.display()
        );
        Error::wrap(Kind::Usage, text, errno)
    })
}

/// The number of the file behind this one.
fn after(number: u32) -> Result<u32> {
    let text = "the log has as many files as it can have: begin a new one";
    let next = number
        .checked_add(1)
        .filter(|next| *next <= REPLAY_FILE_MAX);
    next.ok_or_else(|| Error::new(Kind::Usage, text))
}

fn create(dir: &Path, header: &Header) -> Result<(PathBuf, File)> {
    let path = path(dir, header.file);
    let failed = |error| Error::file("make", &path, error);
    let mut file = File::options()
        .create_new(true)
        .append(true)
        .open(&path)
        .map_err(failed)?;
    file.write_all(&header.encode()).map_err(failed)?;
    let names = File::open(dir).and_then(|dir| dir.sync_all());
    names.map_err(|error| Error::file("bring to the disk", dir, error))?;
    Ok((path, file))
}

/// Ends the last file of a log that a killed recorder has left. Returns the header of the next one.
fn resume(dir: &Path, last: u32) -> Result<Header> {
    let length = |path: &Path| fs::metadata(path).map_or(0, |found| found.len());
    let newest = path(dir, last);
    if length(&newest) < Header::BYTES as u64 && last > 1 {
        // It was killed between two files.
        fs::remove_file(&newest).map_err(|error| Error::file("remove", &newest, error))?;
        return resume(dir, last - 1);
    }
    let mut reader = LogReader::open_file(dir, last)?;
    let mut connections = reader.header().connections;
    let mut is_over = false;
    let torn = loop {
        match reader.next()? {
            Next::Entry(Entry::Open { connection }) => {
                connections = connections.max(connection.saturating_add(1));
            }
            Next::Entry(Entry::End { .. }) => {
                let text = format!(
                    "{} holds a whole recording: name another --log",
                    dir.display()
                );
                return Err(Error::new(Kind::Usage, text));
            }
            Next::Entry(entry) => is_over = entry == Entry::FileEnd,
            Next::Nothing(torn) => break torn,
        }
    };
    let mut header = Header {
        file: after(last)?,
        connections,
        first: reader.entries(),
        ..*reader.header()
    };
    if !is_over {
        cut(reader.path(), reader.offset(), torn)?;
        header.first += 1;
    }
    tracing::info!("{} continues after entry {}", dir.display(), header.first);
    Ok(header)
}

/// Cuts what a crash has left of an entry, and ends the file.
fn cut(path: &Path, at: u64, torn: u64) -> Result<()> {
    if torn > 0 {
        tracing::warn!(
            "{}: {torn} bytes of an entry that was not written whole are cut at byte {at}",
            path.display()
        );
    }
    let failed = |error| Error::file("cut", path, error);
    let mut file = File::options().append(true).open(path).map_err(failed)?;
    file.set_len(at).map_err(failed)?;
    let mut end = Vec::new();
    encode(&Entry::FileEnd, &mut end);
    file.write_all(&end).map_err(failed)?;
    file.sync_all().map_err(failed)
}
