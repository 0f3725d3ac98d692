//! Files that arrive with a migration: how they are stored, and when they become what the container uses.

use std::sync::Arc;

use axum::body::Body;
use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::Seal;

use super::file_trees::{Record, TreeRecord, give_up};
use super::incoming::{blocking, store_tree};
use super::session::Session;
use super::session_table::AgentSession;
use crate::files::StagingDir;

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
        store_tree(&tree, body, || self.contact().note()).await
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
            let target = tree.staging().target().display();
            let text = format!("the files of {target} have not all arrived");
            return Err(Error::new(Kind::Usage, text));
        }
        let session = Arc::clone(self);
        blocking(move || {
            let mut record = Record::read(&session.dir)?;
            for tree in &record.trees {
                if tree.overlay.is_some() {
                    session.context.layers.note_target(&tree.target)?;
                }
            }
            for tree in &session.files.0 {
                let installed = tree.staging().installed()?;
                for known in &mut record.trees {
                    if installed.is_of(&StagingDir::of(&known.target)) {
                        known.installed = Some(installed.clone());
                    }
                }
            }
            record.write(&session.dir)?;
            for tree in &session.files.0 {
                tree.staging().install()?;
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
                let mut all = record.trees.iter().map(TreeRecord::staging);
                all.try_for_each(|staging| staging.settle(&id))?;
                Record::forget(&dir)
            });
            if let Err(error) = settled {
                tracing::warn!("migration {id}: {error}");
            }
        });
    }
}
