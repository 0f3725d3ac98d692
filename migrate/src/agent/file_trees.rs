//! Trees of files that arrive with a migration: where they go, and what becomes of them when it is given up.
//!
//! What is done to directories of the host is written down before it is done: an agent that is started again undoes it
//! for a migration that was not decided.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::statvfs::statvfs;
use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::{
    Begin, Container, FileTree, RootFiles, TreeSpace, WantedFiles,
};
use serde::{Deserialize, Serialize};

use super::context::AgentContext;
use crate::files::{Installed, Lowers, Permitted, ReceivedTree, StagingDir};
use crate::records;
use crate::runtime::bundle;

/// What was done to directories of this host, as it is kept.
const RECORD: &str = "files.json";

/// See [`RECORD`].
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) trees: Vec<TreeRecord>,
    /// Configurations of bundles that were made for this migration.
    configs: Vec<PathBuf>,
    /// Whether what has arrived stays.
    keeps: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct TreeRecord {
    pub(super) target: PathBuf,
    /// A tree was there before, as it was sent ahead or left by the container.
    was_there: bool,
    pub(super) installed: Option<Installed>,
    /// What the tree is mounted over, if it is the writable layer of an overlay.
    #[serde(default)]
    pub(super) overlay: Option<Lowers>,
}

impl TreeRecord {
    pub(super) fn staging(&self) -> StagingDir {
        StagingDir::of(&self.target).over(self.overlay.clone())
    }
}

/// The trees of a migration under way; none for one that an earlier agent left.
#[derive(Debug, Default)]
pub(super) struct Files(pub(super) Vec<Arc<ReceivedTree>>);

impl AgentContext {
    /// Where a tree goes, and what may be done with what is there.
    fn place_of(
        &self,
        container: Option<&Container>,
        tree: &FileTree,
    ) -> Result<(StagingDir, Permitted)> {
        let replace = tree.replace;
        let Some(path) = &tree.path else {
            let container = container.ok_or_else(|| {
                Error::new(Kind::Protocol, "a root file system without a container")
            })?;
            let lowers = tree
                .overlay
                .as_ref()
                .map(|overlay| self.layers.lowers(overlay));
            let staging = StagingDir::of(&self.root_of(container)).over(lowers);
            // A container of this name is not here: so nothing uses its root.
            let unused = true;
            return Ok((staging, Permitted { replace, unused }));
        };
        let unused = false;
        Ok((
            StagingDir::of(Path::new(path)),
            Permitted { replace, unused },
        ))
    }

    /// The root file system of a container's bundle, which need not be there yet.
    fn root_of(&self, container: &Container) -> PathBuf {
        let dir = self.bundle(container);
        match bundle::config(&dir) {
            Ok(found) => bundle::root_of(&dir, &found),
            Err(_) => bundle::root_of(&dir, &bundle::portable(&container.config)),
        }
    }

    /// Whether the container's root file system is to be sent.
    pub(super) fn sends_root(&self, container: &Container, files: &WantedFiles) -> bool {
        match files.root {
            RootFiles::Never => false,
            RootFiles::Replace => true,
            RootFiles::Auto => !StagingDir::of(&self.root_of(container)).is_taken(true),
        }
    }

    /// The trees that are to be sent, the container's root first.
    fn trees(&self, container: Option<&Container>, files: &WantedFiles) -> Vec<FileTree> {
        let root = container.filter(|container| self.sends_root(container, files));
        let root = root.map(|_| FileTree {
            path: None,
            replace: files.root == RootFiles::Replace,
            overlay: files.overlay.clone(),
        });
        root.into_iter().chain(files.volumes.clone()).collect()
    }

    /// Space in this agent's directory, and for each tree that is to be sent. One whose place is not known has none.
    pub(super) fn spaces(
        &self,
        container: Option<&Container>,
        files: &WantedFiles,
    ) -> Vec<TreeSpace> {
        let of_tree = |tree: FileTree| {
            let staging = self
                .place_of(container, &tree)
                .ok()
                .map(|(staging, _)| staging);
            staging.map_or(TreeSpace::default(), |staging| TreeSpace {
                held_bytes: staging.held_bytes(tree.path.is_none()),
                ..space_at(staging.target())
            })
        };
        let trees = self.trees(container, files).into_iter();
        let trees = trees.filter(FileTree::is_possible).map(of_tree);
        std::iter::once(space_at(&self.dir)).chain(trees).collect()
    }

    /// What is in the way of files.
    pub(super) fn problems_of_files(
        &self,
        container: Option<&Container>,
        files: &WantedFiles,
    ) -> Vec<String> {
        let trees = self.trees(container, files).into_iter();
        trees
            .filter(FileTree::is_possible)
            .filter_map(|tree| match self.place_of(container, &tree) {
                Ok((staging, permitted)) => staging.problem(permitted),
                Err(error) => Some(error.to_string()),
            })
            .collect()
    }
}

/// Space on the file system that `path` is, or will be, on.
fn space_at(path: &Path) -> TreeSpace {
    let found = path
        .ancestors()
        .find_map(|dir| Some((std::fs::metadata(dir).ok()?.dev(), statvfs(dir).ok()?)));
    found.map_or(TreeSpace::default(), |(device, space)| TreeSpace {
        device,
        available_bytes: space
            .blocks_available()
            .saturating_mul(space.fragment_size()),
        held_bytes: 0,
    })
}

/// What a migration that begins wants, in the words of a check.
pub(super) fn wanted(begin: &Begin) -> WantedFiles {
    let root = begin.files.iter().find(|tree| tree.path.is_none());
    WantedFiles {
        root: match root {
            None => RootFiles::Never,
            Some(tree) if tree.replace => RootFiles::Replace,
            Some(_) => RootFiles::Auto,
        },
        volumes: begin
            .files
            .iter()
            .filter(|tree| tree.path.is_some())
            .cloned()
            .collect(),
        overlay: root.and_then(|tree| tree.overlay.clone()),
    }
}

impl Files {
    /// Makes space for the files of a migration whose directory is `dir`. Nothing is left of it on failure.
    pub(super) fn prepare(context: &AgentContext, begin: &Begin, dir: &Path) -> Result<Files> {
        if begin.files.is_empty() {
            return Ok(Files::default());
        }
        let mut record = Record {
            keeps: begin.keeps_files,
            ..Record::default()
        };
        let prepared = Files::prepare_all(context, begin, dir, &mut record);
        if prepared.is_err() {
            give_up(&record, &begin.id.to_string());
            // The error that counts is the first one.
            let _ = Record::forget(dir);
        }
        prepared
    }

    fn prepare_all(
        context: &AgentContext,
        begin: &Begin,
        dir: &Path,
        record: &mut Record,
    ) -> Result<Files> {
        let id = begin.id.to_string();
        let mut trees = Vec::new();
        for tree in &begin.files {
            let container = begin.container.as_ref();
            let (staging, permitted) = context.place_of(container, tree)?;
            let was_there = staging.prepare(&id, permitted)?;
            // One that another migration is at is not this one's to remove.
            let received = ReceivedTree::new(staging.clone())?;
            record.trees.push(TreeRecord {
                target: staging.target().to_owned(),
                was_there,
                installed: None,
                overlay: staging.overlay().cloned(),
            });
            record.write(dir)?;
            trees.push(Arc::new(received));
            if let (None, Some(container)) = (&tree.path, container) {
                let bundle = context.bundle(container);
                if let Some(config) = bundle::supply(&bundle, &container.config)? {
                    record.configs.push(config);
                    record.write(dir)?;
                }
            }
        }
        Ok(Files(trees))
    }

    pub(super) fn tree(&self, number: usize) -> Result<Arc<ReceivedTree>> {
        self.0.get(number).map(Arc::clone).ok_or_else(|| {
            let text = format!("the migration has no tree of files {number}");
            Error::new(Kind::Usage, text)
        })
    }
}

impl Record {
    /// That of the migration with this directory; empty if it has no files.
    pub(super) fn read(dir: &Path) -> Result<Record> {
        Ok(records::read(&dir.join(RECORD))?.unwrap_or_default())
    }

    /// Nothing is to be undone any more: what is at these places later is others'.
    pub(super) fn forget(dir: &Path) -> Result<()> {
        let path = dir.join(RECORD);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::file("remove", &path, error))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn write(&self, dir: &Path) -> Result<()> {
        records::write(&dir.join(RECORD), self)
    }
}

/// Leaves everything as it was, but for what stays for another attempt.
pub(super) fn give_up(record: &Record, id: &str) {
    let done = record.trees.iter().map(|tree| {
        let keep = record.keeps || tree.was_there;
        tree.staging().give_up(tree.installed.as_ref(), keep)
    });
    for error in done.filter_map(std::result::Result::err) {
        tracing::error!("migration {id}: {error}");
    }
    if record.keeps {
        return;
    }
    for config in &record.configs {
        // The bundle goes with it, unless something else is in it.
        let _ = std::fs::remove_file(config);
        if let Some(bundle) = config.parent() {
            let _ = std::fs::remove_dir(bundle);
        }
    }
}
