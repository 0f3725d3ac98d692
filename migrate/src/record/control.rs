//! The recorder's socket: while somebody is connected, clients wait.

use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use pageferry::error::{Error, Kind, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::hub::Hub;
use crate::service_log::CONTROL;

/// A listening socket with its path.
#[derive(Debug)]
pub(super) struct Control {
    listener: UnixListener,
    path: PathBuf,
}

/// Listens in the log's directory, which the caller has locked.
pub(super) fn listen(dir: &Path) -> Result<Control> {
    let path = dir.join(CONTROL);
    // One that was killed has left it.
    if path.exists() {
        fs::remove_file(&path).map_err(|error| Error::file("remove", &path, error))?;
    }
    let listener = UnixListener::bind(&path).map_err(|error| {
        let text = format!("cannot listen on {}", path.display());
        Error::wrap(Kind::Usage, text, error)
    })?;
    Ok(Control { listener, path })
}

impl Control {
    /// Holds clients for whoever connects; returns if it cannot.
    pub(super) async fn serve(&self, hub: &Rc<Hub>) -> Error {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => drop(tokio::task::spawn_local(hold(Rc::clone(hub), stream))),
                Err(error) => return Error::file("accept on", &self.path, error),
            }
        }
    }

    /// Removes the socket.
    pub(super) fn remove(&self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

async fn hold(hub: Rc<Hub>, mut stream: UnixStream) {
    hub.hold(true);
    let mut byte = [0];
    // The byte says that nothing is passed from now on; the end of the stream, that it may be again.
    if stream.write_all(b"h").await.is_ok() {
        let _ = stream.read(&mut byte).await;
    }
    hub.hold(false);
}
