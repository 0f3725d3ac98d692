//! Containers and process trees in files: `pageferry dump`, `snapshot` and `restore`.
//!
//! An archive has the layout that podman exports and imports, and that checkpointctl reads:
//!
//! ```text
//! checkpoint/        CRIU's images
//! config.dump        what names the container
//! spec.dump          its configuration, as the OCI has it
//! rootfs-diff.tar    files that were changed or added
//! deleted.files      files that were deleted: a list of paths
//! dump.log stats-dump
//! ```

mod adopted;
mod capture;
mod documents;
pub(crate) mod dump;
mod entries;
mod podman;
pub(crate) mod restore;
pub(crate) mod snapshot;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::ContainerId;
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};

use crate::runtime::{Runtime, RuntimeArg, bundle};
use capture::{Stopped, Target};
use podman::PodmanContainer;

const CHECKPOINT: &str = "checkpoint";
const CONFIG: &str = "config.dump";
const SPEC: &str = "spec.dump";
const FILES: &str = "rootfs-diff.tar";
const DELETED: &str = "deleted.files";
const LOG: &str = "dump.log";
const STATS: &str = "stats-dump";

/// A running container.
struct Found {
    target: Target,
    /// Its bundle's configuration.
    config: Value,
    /// What podman knows of it, if it is one of podman's.
    podman: Option<PodmanContainer>,
    /// When it was made, as RFC 3339 has it.
    created: Option<String>,
}

/// Asks the runtime about a container, which must run.
async fn found(id: &ContainerId, kind: RuntimeArg, root: Option<PathBuf>) -> Result<Found> {
    let runtime = Runtime::find(kind.kind(), root)?;
    let state = runtime.known_state(id, kind.kind()).await?;
    if state.status != "running" {
        let text = format!(
            "container {id} is {}: only a running one has memory",
            state.status
        );
        return Err(Error::new(Kind::Usage, text));
    }
    Ok(Found {
        podman: podman::find(&state.bundle, id.as_str())?,
        config: bundle::config(&state.bundle)?,
        created: state.created,
        target: Target::Container(runtime, id.clone(), state.pid),
    })
}

/// Whether a signal has asked to end.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Does the work. A signal that asks to end is heeded where the work looks ([`expect_no_interrupt`]): a dump under way would
/// leave its processes stopped if nobody waited for it.
async fn unless_interrupted(work: impl Future<Output = Result<()>>) -> Result<()> {
    let failed = |error| Error::wrap(Kind::Io, "cannot wait for signals", error);
    let mut term = signal(SignalKind::terminate()).map_err(failed)?;
    let mut int = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            _ = term.recv() => INTERRUPTED.store(true, Ordering::Relaxed),
            _ = int.recv() => INTERRUPTED.store(true, Ordering::Relaxed),
        }
    }
}

/// Fails if a signal has asked to end.
fn expect_no_interrupt() -> Result<()> {
    match INTERRUPTED.load(Ordering::Relaxed) {
        true => Err(Error::new(
            Kind::Interrupted,
            "stopped by a signal: nothing was written",
        )),
        false => Ok(()),
    }
}

/// Fails if something is where a result is to be.
fn expect_absent(output: &Path) -> Result<()> {
    match output.exists() {
        true => {
            let text = format!("{} is there already: name another", output.display());
            Err(Error::new(Kind::Usage, text))
        }
        false => Ok(()),
    }
}

/// Gives what was `made` its name, unless a signal has asked to end, and prints it. The processes that were `stopped` for
/// it go on, or end.
async fn finish(made: &Path, output: &Path, stopped: Stopped, leave_running: bool) -> Result<()> {
    expect_no_interrupt()?;
    let named = fs::rename(made, output);
    named.map_err(|error| Error::file("name", output, error))?;
    sync_parent(output)?;
    match leave_running {
        true => drop(stopped),
        false => stopped.end().await?,
    }
    println!("{}", output.display());
    Ok(())
}

/// Puts the files of a directory on the disk, and their names.
fn sync_files(dir: &Path) -> Result<()> {
    let failed = |error| Error::file("sync", dir, error);
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_type().map_err(failed)?.is_file() {
            File::open(entry.path())
                .and_then(|file| file.sync_all())
                .map_err(failed)?;
        }
    }
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(failed)
}

/// Makes the name of a file last.
fn sync_parent(path: &Path) -> Result<()> {
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    let synced = File::open(parent).and_then(|dir| dir.sync_all());
    synced.map_err(|error| Error::file("sync", parent, error))
}
