//! The container that is moved, as its runtime at the source knows it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use nix::sys::stat::Mode as Permissions;
use nix::unistd::mkfifo;
use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::{Container, ContainerId, RuntimeKind, TcpConnections};
use serde::{Deserialize, Serialize};
use tokio::net::unix::pipe;
use tokio::process::Command;

use super::args::Subject;
use super::commands::Pages;
use crate::programs::Programs;
use crate::rounds::Tree;
use crate::runtime::criu_wrapper::{self, Settings, Work};
use crate::runtime::{Runtime, bundle, resources};

/// Where CRIU says that a lazy dump serves, in a migration's directory.
const READY: &str = "dump.ready";

/// A container and its runtime, as they are written down.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ContainerRecord {
    pub(super) id: ContainerId,
    pub(super) kind: RuntimeKind,
    pub(super) runtime: Runtime,
}

/// A container that was looked at.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) record: ContainerRecord,
    /// Its first process.
    pub(super) root: i32,
    /// Its bundle here.
    pub(super) bundle: PathBuf,
    /// What the destination needs to know.
    pub(super) container: Container,
    /// Its root file system here.
    pub(super) rootfs: PathBuf,
    problems: Vec<String>,
}

impl Found {
    /// Asks the runtime about the container `id`.
    pub(super) async fn look(id: &ContainerId, subject: &Subject) -> Result<Found> {
        let kind = subject.runtime.kind();
        let runtime = Runtime::find(kind, subject.runtime_root.clone())?;
        let state = runtime.state(id).await?.ok_or_else(|| {
            let text = format!(
                "{} knows no container {id} (--runtime-root names the directory of its state)",
                kind.name()
            );
            Error::new(Kind::Usage, text)
        })?;
        if state.status != "running" {
            let text = format!(
                "container {id} is {}: only a running one can be moved",
                state.status
            );
            return Err(Error::new(Kind::Usage, text));
        }
        let config = bundle::config(&state.bundle)?;
        let problems = bundle::problems_here(&config);
        let there = subject.bundle.as_ref().unwrap_or(&state.bundle);
        Ok(Found {
            rootfs: bundle::root_of(&state.bundle, &config),
            root: state.pid,
            bundle: state.bundle.clone(),
            container: Container {
                id: id.clone(),
                runtime: kind,
                bundle: there.display().to_string(),
                bundle_is_given: subject.bundle.is_some(),
                config,
                resources: resources::of_process(state.pid),
            },
            record: ContainerRecord {
                id: id.clone(),
                kind,
                runtime,
            },
            problems,
        })
    }

    /// What is in the way here, and between the runtimes: `there` is the version of the destination's.
    pub(super) async fn problems(&self, tree: &Tree, there: Option<&str>) -> Result<Vec<String>> {
        let mut problems = self.problems.clone();
        problems.extend(processes_outside_tree(self.root, tree));
        let here = self.record.runtime.version().await?;
        if let Some(there) = there
            && numbers(there) < numbers(&here)
        {
            problems.push(format!(
                "{there} at the destination is older than {here} here: update it"
            ));
        }
        Ok(problems)
    }
}

/// Processes in the container that are not below its first one: a dump holds the tree alone.
fn processes_outside_tree(root: i32, tree: &Tree) -> Option<String> {
    let members: BTreeSet<i32> = tree.members().iter().map(|member| member.pid).collect();
    let outside: Vec<String> = resources::processes_in_group(root)
        .into_iter()
        .filter(|pid| !members.contains(pid))
        .filter_map(|pid| {
            // One that has ended since is in nobody's way.
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
            Some(format!("{pid} ({})", name.trim()))
        })
        .collect();
    (!outside.is_empty()).then(|| {
        format!(
            "pids {} are in the container and not below its first process (by exec): end them",
            outside.join(", ")
        )
    })
}

/// The numbers of a version: of "runc version 1.3.6+ds1" 1, 3 and 6.
fn numbers(version: &str) -> Vec<u32> {
    let word = version
        .split_whitespace()
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    let word = word.unwrap_or_default();
    let end = word
        .find(|c: char| c != '.' && !c.is_ascii_digit())
        .unwrap_or(word.len());
    word[..end]
        .split('.')
        .filter_map(|number| number.parse().ok())
        .collect()
}

impl ContainerRecord {
    /// The command line of a dump, and what tells that a lazy one serves.
    pub(super) fn checkpoint(
        &self,
        programs: &Programs,
        dir: &Path,
        images: &Path,
        pages: Pages,
        (tcp, external): (TcpConnections, Vec<String>),
    ) -> Result<(Command, Option<pipe::Receiver>)> {
        let (work, status) = match pages {
            Pages::SentTo(port) => (Work::DumpTo { port }, None),
            Pages::ServedAt(port) => {
                let ready = dir.join(READY);
                let status = fifo(&ready)?;
                (Work::DumpLazily { port, ready }, Some(status))
            }
        };
        let settings = Settings {
            criu: programs.criu.clone(),
            tcp,
            work,
            external,
            lent: Vec::new(),
        };
        let bin = criu_wrapper::prepare(dir, &programs.pageferry, &settings)?;
        // Of a lazy dump the container ends with the dump: if that fails, both runtimes keep it.
        let keep = status.is_none();
        let command = self.runtime.checkpoint(&self.id, images, &bin, keep);
        Ok((command, status))
    }

    /// The program that dumps, for messages.
    pub(super) fn title(&self) -> &'static str {
        match self.kind {
            RuntimeKind::Runc => "runc checkpoint",
            RuntimeKind::Crun => "crun checkpoint",
        }
    }
}

fn fifo(path: &Path) -> Result<pipe::Receiver> {
    let failed = |error| Error::file("make the pipe", path, error);
    mkfifo(path, Permissions::S_IRUSR | Permissions::S_IWUSR)
        .map_err(|errno| failed(errno.into()))?;
    // Open for writing too: without a writer it would read as ended.
    let mut open = pipe::OpenOptions::new();
    open.read_write(true).open_receiver(path).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_runtimes_are_compared_by_number() {
        assert_eq!(numbers("runc version 1.1.5+ds1"), [1, 1, 5]);
        assert_eq!(numbers("crun version 1.28"), [1, 28]);
        assert!(numbers("runc version 1.10.0-rc.1") > numbers("runc version 1.9.9"));
    }
}
