//! Files that arrive with a migration: how they are stored, and when they become what the container uses.

use std::io;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::Seal;
use tokio::io::{AsyncWriteExt, DuplexStream};
use tokio::sync::watch;
use tokio_stream::{Stream, StreamExt};
use tokio_util::io::SyncIoBridge;

use super::file_trees::{Record, give_up};
use super::session::Session;
use crate::files::Stage;

/// Buffered between the connection and what writes files, bytes.
const BUFFER_BYTES: usize = 256 << 10;

impl Session {
    /// What tree `number` holds, as bytes for the source.
    pub(super) async fn file_index(&self, number: usize) -> Result<Vec<u8>> {
        let tree = self.files.tree(number)?;
        // Whoever was at it has lost its connection.
        tree.take_turn();
        blocking(move || tree.index()).await
    }

    /// Stores what comes for tree `number`.
    pub(super) async fn store_files(self: &Arc<Session>, number: usize, body: Body) -> Result<()> {
        let tree = self.files.tree(number)?;
        let turn = tree.take_turn();
        let (near, far) = tokio::io::duplex(BUFFER_BYTES);
        let stream = body
            .into_data_stream()
            .map(|part| part.map_err(io::Error::other));
        let pumped = pump(stream, near, turn, self);
        let storing = Arc::clone(&tree);
        let stored = blocking(move || storing.store(SyncIoBridge::new(far)));
        let (stored, ()) = tokio::join!(stored, pumped);
        stored?;
        // So that little is left to be written when the processes stand still.
        tokio::task::spawn_blocking(move || tree.flush());
        Ok(())
    }

    /// Ends the arrival of tree `number`.
    pub(super) async fn seal_files(&self, number: usize, seal: Seal) -> Result<()> {
        let tree = self.files.tree(number)?;
        blocking(move || tree.seal(&seal.digest)).await
    }

    /// Makes what has arrived what the container, or the processes, use.
    pub(super) async fn install_files(self: &Arc<Session>) -> Result<()> {
        if self.files.0.is_empty() {
            return Ok(());
        }
        if let Some(tree) = self.files.0.iter().find(|tree| !tree.is_whole()) {
            let target = tree.stage().target().display();
            let text = format!("the files of {target} have not all arrived");
            return Err(Error::new(Kind::Usage, text));
        }
        let session = Arc::clone(self);
        blocking(move || {
            let mut record = Record::read(&session.dir)?;
            for tree in &session.files.0 {
                let installed = tree.stage().installed()?;
                for known in &mut record.trees {
                    if installed.is_of(&Stage::of(&known.target)) {
                        known.installed = Some(installed.clone());
                    }
                }
            }
            record.write(&session.dir)?;
            for tree in &session.files.0 {
                tree.stage().install()?;
            }
            Ok(())
        })
        .await
    }

    /// Ends what stores files.
    async fn end_files(&self) {
        for tree in self.files.0.iter().map(Arc::clone) {
            let ended = blocking(move || {
                tree.end();
                Ok(())
            });
            if let Err(error) = ended.await {
                tracing::error!("migration {}: {error}", self.begin.id);
            }
        }
    }

    /// The migration is given up: the host's directories are as they were.
    pub(super) async fn give_files_up(&self) {
        self.end_files().await;
        match Record::read(&self.dir) {
            Ok(record) => {
                let (id, dir) = (self.begin.id.to_string(), self.dir.clone());
                let done = blocking(move || {
                    give_up(&record, &id);
                    Record::forget(&dir)
                });
                if let Err(error) = done.await {
                    tracing::error!("migration {}: {error}", self.begin.id);
                }
            }
            Err(error) => tracing::error!("migration {}: {error}", self.begin.id),
        }
    }

    /// The processes live here: what their files have replaced is removed.
    ///
    /// Nobody waits for that: it may take long.
    pub(super) fn settle_files(&self) {
        let id = self.begin.id.to_string();
        let (trees, dir) = (self.files.0.clone(), self.dir.clone());
        tokio::task::spawn_blocking(move || {
            trees.iter().for_each(|tree| tree.end());
            let settled = Record::read(&dir).and_then(|record| {
                let mut stages = record.trees.iter().map(|tree| Stage::of(&tree.target));
                stages.try_for_each(|stage| stage.settle(&id))?;
                Record::forget(&dir)
            });
            if let Err(error) = settled {
                tracing::warn!("migration {id}: {error}");
            }
        });
    }
}

/// Hands a request's body on until it ends, or somebody else comes for the tree. What nobody takes any more is read all
/// the same: whoever sends it hears the answer then, and no broken connection.
async fn pump(
    mut body: impl Stream<Item = io::Result<Bytes>> + Unpin,
    mut to: DuplexStream,
    mut turn: watch::Receiver<u64>,
    session: &Session,
) {
    let mut is_taken = true;
    loop {
        let part = tokio::select! {
            part = body.next() => part,
            _ = turn.changed() => return,
        };
        let Some(Ok(bytes)) = part else { return };
        session.heard();
        is_taken = is_taken && to.write_all(&bytes).await.is_ok();
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|error| {
        let error = io::Error::other(error);
        Error::wrap(Kind::Io, "work on files was ended", error)
    })?
}
