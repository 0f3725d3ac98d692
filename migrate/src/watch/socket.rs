//! The socket over which conditions are given as words.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use pageferry::limits::WATCH_WORD_BYTES_MAX;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::Event;

/// How long to wait when no connection can be accepted (too many descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A socket that listens; removed on drop.
#[derive(Debug)]
pub(super) struct Socket {
    path: PathBuf,
    task: JoinHandle<()>,
}

/// Listens. Only the owner may connect.
pub(super) fn listen(path: &Path, events: mpsc::Sender<Event>) -> Result<Socket> {
    let failed = |error| {
        let text = format!("cannot listen on {}", path.display());
        Error::wrap(Kind::Usage, text, error)
    };
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        let text = format!(
            "{} is in use: another watcher listens there",
            path.display()
        );
        return Err(Error::new(Kind::Usage, text));
    }
    // One that was killed has left it.
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    let task = tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => drop(tokio::spawn(read_commands(stream, events.clone()))),
                // Whoever asks later must be heard, so this is not the end.
                Err(error) => {
                    let text = "cannot accept a connection";
                    tracing::warn!("{}", Error::wrap(Kind::Io, text, error));
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    });
    Ok(Socket {
        path: path.to_owned(),
        task,
    })
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.task.abort();
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Takes words, and answers each when the watcher has it.
async fn read_commands(stream: UnixStream, events: mpsc::Sender<Event>) {
    let (from, mut to) = stream.into_split();
    let mut from = BufReader::new(from);
    loop {
        let mut word = String::new();
        let limit = u64::try_from(WATCH_WORD_BYTES_MAX).unwrap_or(u64::MAX);
        let read = (&mut from).take(limit).read_line(&mut word).await;
        if !matches!(read, Ok(1..)) || !word.ends_with('\n') {
            return;
        }
        let event = Event::Word(word.trim().to_owned());
        if events.send(event).await.is_err() || to.write_all(b"ok\n").await.is_err() {
            return;
        }
    }
}
