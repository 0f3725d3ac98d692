//! Trees of files on their way from a connection to the disk.

use std::io;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use pageferry::error::{Error, Kind, Result};
use tokio::io::{AsyncWriteExt, DuplexStream};
use tokio::sync::watch;
use tokio_stream::{Stream, StreamExt};
use tokio_util::io::SyncIoBridge;

use crate::files::ReceivedTree;

/// Buffered between the connection and what writes files, bytes.
const BUFFER_BYTES: usize = 256 << 10;

/// Stores what comes for a tree; `received` is called for each part.
pub(super) async fn store_tree(
    tree: &Arc<ReceivedTree>,
    body: Body,
    received: impl Fn(),
) -> Result<()> {
    let turn = tree.take_turn();
    let (near, far) = tokio::io::duplex(BUFFER_BYTES);
    let stream = body
        .into_data_stream()
        .map(|part| part.map_err(io::Error::other));
    let pumped = pump(stream, near, turn, received);
    let storing = Arc::clone(tree);
    let stored = blocking(move || storing.store(SyncIoBridge::new(far)));
    let (stored, ()) = tokio::join!(stored, pumped);
    stored?;
    // So that little is left to be written when the processes stand still.
    let tree = Arc::clone(tree);
    tokio::task::spawn_blocking(move || tree.flush());
    Ok(())
}

/// Hands a request's body on until it ends, or somebody else comes for the tree. What nobody takes any more is read all
/// the same: the sender then gets the answer instead of a broken connection.
async fn pump(
    mut body: impl Stream<Item = io::Result<Bytes>> + Unpin,
    mut to: DuplexStream,
    mut turn: watch::Receiver<u64>,
    received: impl Fn(),
) {
    let mut is_taken = true;
    loop {
        let part = tokio::select! {
            part = body.next() => part,
            _ = turn.changed() => return,
        };
        let Some(Ok(bytes)) = part else { return };
        received();
        is_taken = is_taken && to.write_all(&bytes).await.is_ok();
    }
}

/// Does work that blocks.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|error| {
        let error = io::Error::other(error);
        Error::wrap(Kind::Io, "work on files was ended", error)
    })?
}
