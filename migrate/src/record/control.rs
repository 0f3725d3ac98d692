//! The recorder's socket: while somebody is connected, clients wait.

use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::coordinator::Coordinator;
use crate::service_log::{self, CONTROL, END, HELD, RELEASE, SEAL};

/// A listening socket with its path.
#[derive(Debug)]
pub(super) struct Control {
    listener: UnixListener,
    path: PathBuf,
    settings: Rc<Settings>,
}

/// What each of its connections needs to know.
#[derive(Debug)]
struct Settings {
    /// The log's directory.
    dir: PathBuf,
    /// How long the service may take to read what was passed.
    wait: Duration,
}

/// Listens in the log's directory, which the caller has locked.
pub(super) fn listen(dir: &Path, wait: Duration) -> Result<Control> {
    let path = dir.join(CONTROL);
    // One that was killed has left it.
    if path.exists() {
        fs::remove_file(&path).map_err(|error| Error::file("remove", &path, error))?;
    }
    let listener = UnixListener::bind(&path).map_err(|error| {
        let text = format!("cannot listen on {}", path.display());
        Error::wrap(Kind::Usage, text, error)
    })?;
    let settings = Rc::new(Settings {
        dir: dir.to_owned(),
        wait,
    });
    Ok(Control {
        listener,
        path,
        settings,
    })
}

impl Control {
    /// Holds clients for whoever connects; returns if it cannot.
    pub(super) async fn serve(&self, coordinator: &Rc<Coordinator>) -> Error {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let held = hold(Rc::clone(&self.settings), Rc::clone(coordinator), stream);
                    drop(tokio::task::spawn_local(held));
                }
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

/// Holds clients for one peer: sends how many entries the log has, then carries out its commands.
async fn hold(control: Rc<Settings>, coordinator: Rc<Coordinator>, mut stream: UnixStream) {
    coordinator.hold(true);
    if let Err(error) = serve_holder(&control, &coordinator, &mut stream).await {
        tracing::warn!("{}: {error}", control.dir.display());
    }
    coordinator.hold(false);
}

/// Returns when the peer has gone, or has sent its last command.
async fn serve_holder(
    settings: &Settings,
    coordinator: &Coordinator,
    stream: &mut UnixStream,
) -> Result<()> {
    let entries = coordinator.settle(settings.wait).await?;
    let mut command = [0];
    let mut held = [HELD; 9];
    held[1..].copy_from_slice(&entries.to_le_bytes());
    if stream.write_all(&held).await.is_err() {
        return Ok(());
    }
    while let Ok(1) = stream.read(&mut command).await {
        match command {
            // On disk first: a recorder that is started here later must not take clients.
            [SEAL] => {
                service_log::seal(&settings.dir)?;
                coordinator.seal(true);
            }
            [RELEASE] => {
                service_log::unseal(&settings.dir)?;
                coordinator.seal(false);
            }
            [END] => coordinator.ask_for_end(),
            _ => return Ok(()),
        }
        if stream.write_all(&command).await.is_err() || command != [SEAL] {
            return Ok(());
        }
    }
    Ok(())
}
