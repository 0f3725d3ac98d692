//! Files that move along: the container's root file system, and volumes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::{FileTree, MigrationId};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::container::Found;
use super::files_args::{FilesArg, FilesArgs};
use super::layers::{LayerReport, Layered};
use crate::client::AgentClient;
use crate::export::{DeletedFile, open_in_container};
use crate::files::{FileRound, SentTree};
use crate::rounds::Tree;

/// Rounds before the processes are looked at: each sends what changed during the one before.
const ROUNDS_MAX: usize = 8;

/// A round that sends less than this is the last one: the freeze can have as much, too.
const LITTLE_BYTES: u64 = 256 << 10;

/// A round that sends more than this share of the one before is the last one.
const SHRINKS: f64 = 0.8;

/// Files in a migration's report.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub(crate) struct FilesReport {
    /// While the processes ran.
    pub(crate) rounds: Vec<FileRound>,
    /// The last difference, inside the freeze.
    pub(crate) freeze: FileRound,
    /// Layers below the container's writable one, lowest first.
    #[serde(default)]
    pub(crate) layers: Vec<LayerReport>,
    /// Files that are deleted and open: they are no part of a tree. CRIU carries small ones in its images.
    pub(crate) deleted: Vec<DeletedFile>,
    /// Directories and files where something else is mounted: they travel without it.
    pub(crate) mounts: Vec<String>,
}

impl FilesReport {
    /// Bytes that were sent.
    pub(crate) fn bytes(&self) -> u64 {
        let rounds = self.rounds.iter().chain([&self.freeze]);
        let layers = self.layers.iter().map(|layer| layer.bytes);
        rounds.map(|round| round.bytes).chain(layers).sum()
    }
}

/// The files of one migration under way.
#[derive(Debug, Default)]
pub(super) struct Files {
    trees: Vec<SentTree>,
    descriptions: Vec<FileTree>,
    dirs: Vec<PathBuf>,
    /// The overlay that the root file system is, if its layers travel by themselves.
    layered: Option<Layered>,
    /// The first process of what is moved.
    root: i32,
    pub(super) report: FilesReport,
}

impl Files {
    /// Those of the migration `id` of the tree under `root`.
    pub(super) fn find(
        args: &FilesArgs,
        (found, sends_root, layered): (Option<&Found>, bool, Option<Layered>),
        root: i32,
        id: &MigrationId,
    ) -> Result<Files> {
        let replace = args.files == FilesArg::Replace;
        let mut files = Files {
            root,
            ..Files::default()
        };
        if let Some(found) = found.filter(|_| sends_root) {
            expect_root(&found.rootfs, root)?;
            let sent = layered
                .as_ref()
                .map_or(&found.rootfs, |layered| &layered.upper);
            let tree = FileTree {
                path: None,
                replace,
                overlay: layered.as_ref().map(Layered::description),
            };
            files.add(sent, tree, id);
            files.dirs.push(found.rootfs.clone());
            files.layered = layered;
        }
        for volume in &args.volume {
            let tree = FileTree {
                path: Some(volume.there.clone()),
                replace,
                overlay: None,
            };
            files.add(&volume.here, tree, id);
            files.dirs.push(volume.here.clone());
        }
        Ok(files)
    }

    fn add(&mut self, dir: &Path, tree: FileTree, id: &MigrationId) {
        let number = self.trees.len();
        let at = format!("/v1/migrations/{id}/files/{number}");
        self.trees.push(SentTree::new(dir.to_owned(), at));
        self.descriptions.push(tree);
    }

    /// Their descriptions for the agent.
    pub(super) fn descriptions(&self) -> Vec<FileTree> {
        self.descriptions.clone()
    }

    /// Their directories here.
    pub(super) fn dirs(&self) -> Vec<PathBuf> {
        self.dirs.clone()
    }

    fn pids(&self) -> Vec<i32> {
        // Without the tree there is nothing to be moved, and others say so.
        let tree = Tree::of(self.root);
        tree.map(|tree| tree.members().iter().map(|member| member.pid).collect())
            .unwrap_or_default()
    }

    /// Sends them while the processes run, until little is left.
    pub(super) async fn send_ahead(&mut self, client: &AgentClient) -> Result<()> {
        if let Some(layered) = &self.layered {
            self.report.layers = layered.send(client).await?;
        }
        let mut last: Option<u64> = None;
        for _ in 0..ROUNDS_MAX {
            let bytes = self.send(client).await?;
            #[allow(clippy::cast_precision_loss)]
            let shrinks = last.is_none_or(|last| (bytes as f64) < last as f64 * SHRINKS);
            if bytes <= LITTLE_BYTES || !shrinks {
                break;
            }
            last = Some(bytes);
        }
        Ok(())
    }

    /// One round; tells the bytes that were sent.
    pub(super) async fn send(&mut self, client: &AgentClient) -> Result<u64> {
        if self.trees.is_empty() {
            return Ok(0);
        }
        let pids = self.pids();
        let mut all = FileRound::default();
        for tree in &mut self.trees {
            all = all.and(tree.round(client, &pids).await?);
        }
        tracing::info!(
            "files, round {}: {} changed, {} bytes sent in {:.0} ms",
            self.report.rounds.len() + 1,
            all.files,
            all.bytes,
            all.ms
        );
        self.report.rounds.push(all);
        Ok(all.bytes)
    }

    /// Sends the last difference of a frozen tree.
    pub(super) async fn seal(mut self, client: AgentClient) -> Result<Files> {
        if self.trees.is_empty() {
            return Ok(self);
        }
        let pids = self.pids();
        for tree in &mut self.trees {
            let sent = tree.seal(&client, &pids).await?;
            self.report.freeze = self.report.freeze.and(sent);
            self.report.mounts.extend(tree.mounts().iter().cloned());
        }
        self.report.deleted = open_in_container(self.root);
        Ok(self)
    }
}

/// Fails if the container's root is not what its bundle says, as it is for containers of podman.
fn expect_root(rootfs: &Path, root: i32) -> Result<()> {
    let inode = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
    let inside = PathBuf::from(format!("/proc/{root}/root"));
    match (inode(rootfs), inode(&inside)) {
        (Ok(a), Ok(b)) if a == b => Ok(()),
        _ => {
            let text = format!(
                "the container's root file system is not the one in {}: run this where it is mounted, or \
                 bring it to the destination and say --files never",
                rootfs.display()
            );
            Err(Error::new(Kind::Usage, text))
        }
    }
}
