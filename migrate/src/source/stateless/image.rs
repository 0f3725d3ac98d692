//! The container's files on their way, and whether they have changed since.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use axum::body::Body;
use nix::unistd::syncfs;
use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::{ContainerCreate, ContainerStatus, Digest};
use tokio::time::sleep;
use tokio_util::io::{ReaderStream, SyncIoBridge};

use crate::client::AgentClient;
use crate::export::{Hashed, whole};
use crate::tree_summary::{TreeSummary, summarize};

/// Buffered between the reading of files and the connection, bytes.
const BUFFER_BYTES: usize = 256 << 10;

/// The compression: no slower than most links.
const ZSTD_LEVEL: i32 = 1;

/// Longer than the clock by which file systems tell times stands still.
const CLOCK_STEP: Duration = Duration::from_millis(20);

/// Looks at all files of the tree at `root`. What is read of them afterwards is what was there, as long as a later look is
/// equal.
pub(super) async fn summarize_tree(root: &Path) -> Result<TreeSummary> {
    let root = root.to_owned();
    let summary = tokio::task::spawn_blocking(move || {
        // A page that is mapped and changed already would change again without a new time.
        let synced = File::open(&root).map(|dir| syncfs(&dir));
        synced
            .map_err(|error| Error::file("open", &root, error))?
            .ok();
        summarize(&root)
    });
    let summary = summary.await.map_err(|error| {
        Error::wrap(
            Kind::Io,
            "reading the tree of files was ended",
            io::Error::other(error),
        )
    })??;
    // A change within the same step of the clock would not be told apart.
    sleep(CLOCK_STEP).await;
    Ok(summary)
}

/// Whether the tree at `root` is as it was.
pub(super) async fn is_same(root: &Path, before: TreeSummary) -> Result<bool> {
    let root = root.to_owned();
    let summary = tokio::task::spawn_blocking(move || summarize(&root)).await;
    let summary = summary.map_err(|error| {
        Error::wrap(
            Kind::Io,
            "reading the tree of files was ended",
            io::Error::other(error),
        )
    })?;
    Ok(summary? == before)
}

/// Sends the files of the tree at `root`, which may be the writable layer of an overlay, lets the agent make the container of them, and tells the bytes on the wire.
///
/// # Errors
/// Of the kind [`Kind::Io`] if the files cannot be read, maybe because they have changed meanwhile.
pub(super) async fn send(
    client: &AgentClient,
    path: &str,
    (root, is_upper): (&Path, bool),
) -> Result<u64> {
    let (near, far) = tokio::io::duplex(BUFFER_BYTES);
    let root = root.to_owned();
    let packed =
        tokio::task::spawn_blocking(move || pack(&root, is_upper, SyncIoBridge::new(near)));
    let body = Body::from_stream(ReaderStream::new(far));
    let image = format!("{path}/image");
    let stored = client.put::<ContainerStatus>(&image, body).await;
    let packed = packed.await.map_err(|error| {
        Error::wrap(Kind::Io, "sending files was ended", io::Error::other(error))
    })?;
    let (sha256, bytes) = match (stored, packed) {
        (Ok(_), packed) => packed?,
        // An agent that refuses them says why; here only the connection is seen to end.
        (Err(stored), Ok(_)) => return Err(stored),
        (Err(stored), Err(packed)) if is_broken(&packed) => return Err(stored),
        // And if reading has failed, the agent has seen no more than that.
        (Err(_), Err(packed)) => return Err(packed),
    };
    let create = format!("{path}/create");
    client
        .post::<ContainerStatus>(&create, &ContainerCreate { sha256 })
        .await?;
    Ok(bytes)
}

/// Whether the far end of a stream was gone.
fn is_broken(error: &Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        let io = error.downcast_ref::<io::Error>();
        if io.is_some_and(|io| io.kind() == io::ErrorKind::BrokenPipe) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Counts what is written.
struct Counted<W> {
    to: W,
    bytes: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = self.to.write(bytes)?;
        self.bytes += taken as u64;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// Writes the files as a layer, compressed. Returns the sum before the compression, and the bytes behind it.
fn pack(root: &Path, is_upper: bool, to: impl Write) -> Result<(Digest, u64)> {
    let failed = |error| Error::file("send", root, error);
    let counted = Counted { to, bytes: 0 };
    let encoder = zstd::Encoder::new(counted, ZSTD_LEVEL).map_err(failed)?;
    let (sum, _, encoder) = whole(root, is_upper, Hashed::new(encoder))?.finish();
    let mut counted = encoder.finish().map_err(failed)?;
    counted.flush().map_err(failed)?;
    let digest = Digest::try_from(sum)
        .map_err(|error| Error::wrap(Kind::Io, "the sum of the files", error))?;
    Ok((digest, counted.bytes))
}
