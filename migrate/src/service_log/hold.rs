//! Holding a recorder's clients, and the mark of a log whose clients may be another service's.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use pageferry::error::{Error, Kind, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::{CONTROL, END, HELD, RELEASE, SEAL};

/// The mark's name.
const SEALED: &str = "sealed";

/// A recorder that passes nothing on. When this is dropped, it does again, unless it was sealed.
#[derive(Debug)]
pub(crate) struct Hold {
    path: PathBuf,
    stream: UnixStream,
    entries: u64,
}

impl Hold {
    /// Returns when nothing is passed on any more, and the service has read what was.
    ///
    /// # Errors
    /// No recorder writes to the log in `dir`.
    pub(crate) async fn take(dir: &Path) -> Result<Hold> {
        let path = dir.join(CONTROL);
        let failed = |error| {
            let text = format!(
                "cannot hold clients by {} (does `pageferry record` run there?)",
                path.display()
            );
            Error::wrap(Kind::PeerLost, text, error)
        };
        let mut stream = UnixStream::connect(&path).await.map_err(failed)?;
        let mut held = [0; 9];
        stream.read_exact(&mut held).await.map_err(failed)?;
        let [HELD, entries @ ..] = held else {
            return Err(failed(io::ErrorKind::InvalidData.into()));
        };
        Ok(Hold {
            entries: u64::from_le_bytes(entries),
            path,
            stream,
        })
    }

    /// How many entries the log has for what was passed.
    pub(crate) fn entries(&self) -> u64 {
        self.entries
    }

    /// Clients stay held, also if this process ends.
    pub(crate) async fn seal(&mut self) -> Result<()> {
        self.command(SEAL).await
    }

    /// Lets clients go on, also those of a recorder that was sealed.
    pub(crate) async fn release(mut self) -> Result<()> {
        self.command(RELEASE).await
    }

    /// Ends the recording and its connections.
    pub(crate) async fn end(mut self) -> Result<()> {
        self.command(END).await
    }

    async fn command(&mut self, command: u8) -> Result<()> {
        let failed = |error| Error::file("speak to the recorder by", &self.path, error);
        let mut answer = [0];
        self.stream.write_all(&[command]).await.map_err(failed)?;
        self.stream.read_exact(&mut answer).await.map_err(failed)?;
        match answer == [command] {
            true => Ok(()),
            false => Err(failed(io::ErrorKind::InvalidData.into())),
        }
    }
}

/// Marks the log: no recorder takes clients for it.
pub(crate) fn seal(dir: &Path) -> Result<()> {
    let path = dir.join(SEALED);
    let made = File::create(&path).and_then(|file| file.sync_all());
    made.and_then(|()| File::open(dir)?.sync_all())
        .map_err(|error| Error::file("write", &path, error))
}

/// Takes the mark off.
pub(crate) fn unseal(dir: &Path) -> Result<()> {
    let path = dir.join(SEALED);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::file("remove", &path, error))
        }
        _ => Ok(()),
    }
}

/// Fails if the log has the mark.
pub(super) fn expect_not_sealed(dir: &Path) -> Result<()> {
    match dir.join(SEALED).exists() {
        false => Ok(()),
        true => {
            let text = format!(
                "{}: its service was moved, or is about to be (`pageferry migrate --resume NAME` finishes that): \
                 name another --log",
                dir.display()
            );
            Err(Error::new(Kind::Usage, text))
        }
    }
}
