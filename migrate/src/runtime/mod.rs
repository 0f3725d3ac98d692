//! Containers: what a runtime (runc, crun) is asked for, so that a container that moves is one of its own on
//! both sides.
//!
//! ```text
//! source       pageferry migrate ──> runc checkpoint ──> criu (wrapper) ──> the real criu
//! destination  pageferry agent   ──> runc restore    ──> criu (wrapper) ──> the real criu
//!                                                           │ holds the tree until the decision
//! ```
//!
//! The runtime knows which mounts, namespaces and control groups of a container are its own, and keeps the
//! container's state. What it cannot be told on its command line (stop the processes and keep the container,
//! serve memory lazily with crun, hold a restored tree) is put into its requests to CRIU by [`criu_wrapper`].

pub(crate) mod bundle;
pub(crate) mod criu_wrapper;
pub(crate) mod lifecycle;
pub(crate) mod resources;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use clap::ValueEnum;
use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::{ContainerId, RuntimeKind};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use crate::programs::on_path;

/// Values of `--runtime`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum RuntimeArg {
    Runc,
    Crun,
}

impl RuntimeArg {
    pub(crate) fn kind(self) -> RuntimeKind {
        match self {
            RuntimeArg::Runc => RuntimeKind::Runc,
            RuntimeArg::Crun => RuntimeKind::Crun,
        }
    }
}

/// A runtime of this host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Runtime {
    pub(crate) program: PathBuf,
    /// Directory of its state (`--root`); its own default without one.
    pub(crate) root: Option<PathBuf>,
}

/// What a runtime says of a container (`runc state`), as far as it is used.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct ContainerState {
    /// `running`, `paused`, `created` or `stopped`.
    pub(crate) status: String,
    /// Its first process, as this host numbers it; 0 or missing if it has none.
    #[serde(default)]
    pub(crate) pid: i32,
    /// Directory of its bundle.
    #[serde(default)]
    pub(crate) bundle: PathBuf,
    /// When it was made, as RFC 3339 has it.
    #[serde(default)]
    pub(crate) created: Option<String>,
}

impl Runtime {
    /// The runtime of this kind on PATH.
    pub(crate) fn find(kind: RuntimeKind, root: Option<PathBuf>) -> Result<Runtime> {
        let program = on_path(kind.name()).ok_or_else(|| {
            Error::new(
                Kind::Usage,
                format!("no {} on PATH: install it", kind.name()),
            )
        })?;
        Ok(Runtime { program, root })
    }

    /// A command line up to the subcommand.
    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        if let Some(root) = &self.root {
            command.arg("--root").arg(root);
        }
        // A container inherits what it is given here, and an open file of the host's would be in the way of
        // its next checkpoint.
        command.stdin(Stdio::null());
        command
    }

    /// Its version: the first line of `--version`.
    pub(crate) async fn version(&self) -> Result<String> {
        let output = self.command().arg("--version").output().await;
        let output = output.map_err(|error| Error::file("run", &self.program, error))?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().next().unwrap_or_default().trim().to_owned())
    }

    /// What it says of a container; `None` if it knows none of this name.
    pub(crate) async fn state(&self, id: &ContainerId) -> Result<Option<ContainerState>> {
        let output = self.command().arg("state").arg(id.as_str()).output().await;
        let output = output.map_err(|error| Error::file("run", &self.program, error))?;
        if !output.status.success() {
            return Ok(None);
        }
        let state = serde_json::from_slice(&output.stdout).map_err(|error| {
            let text = format!("{} state {id}", self.program.display());
            Error::wrap(Kind::Protocol, text, error)
        })?;
        Ok(Some(state))
    }

    /// What it says of a container, which it must know.
    pub(crate) async fn known_state(
        &self,
        id: &ContainerId,
        kind: RuntimeKind,
    ) -> Result<ContainerState> {
        self.state(id).await?.ok_or_else(|| {
            let text = format!(
                "{} knows no container {id} (--runtime-root names the directory of its state)",
                kind.name()
            );
            Error::new(Kind::Usage, text)
        })
    }

    /// `checkpoint`, with images in `images`. With `keep` the runtime keeps the container as a running one.
    pub(crate) fn checkpoint(
        &self,
        id: &ContainerId,
        images: &Path,
        bin: &Path,
        keep: bool,
    ) -> Command {
        let mut command = self.logged(images, "checkpoint", bin);
        if keep {
            command.arg("--leave-running");
        }
        command.arg(id.as_str());
        command
    }

    /// `restore` from `images` with the bundle at `bundle`.
    pub(crate) fn restore(
        &self,
        id: &ContainerId,
        images: &Path,
        bin: &Path,
        bundle: &Path,
    ) -> Command {
        let mut command = self.logged(images, "restore", bin);
        command.args(["--detach", "--bundle"]).arg(bundle);
        command.arg(id.as_str());
        command
    }

    /// With the wrapper of CRIU in front of everything on PATH.
    fn logged(&self, images: &Path, action: &str, bin: &Path) -> Command {
        let mut command = self.command();
        let path = std::env::var_os("PATH").unwrap_or_default();
        let dirs = std::iter::once(bin.to_owned()).chain(std::env::split_paths(&path));
        let path = std::env::join_paths(dirs).unwrap_or_else(|_| OsString::from(bin));
        command
            .env("PATH", path)
            .arg("--log")
            .arg(runtime_log(images))
            .arg(action)
            .arg("--image-path")
            .arg(images)
            .arg("--work-path")
            .arg(images)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    }

    /// Ends a container, if there is one, and lets the runtime forget it.
    pub(crate) async fn delete(&self, id: &ContainerId) -> Result<()> {
        if self.state(id).await?.is_none() {
            return Ok(());
        }
        let mut command = self.command();
        command.args(["delete", "--force", id.as_str()]);
        self.carry_out(&mut command, "delete").await
    }

    /// Holds the processes of a container still.
    pub(crate) async fn pause(&self, id: &ContainerId) -> Result<()> {
        let mut command = self.command();
        self.carry_out(command.args(["pause", id.as_str()]), "pause")
            .await
    }

    /// Lets a paused container go on.
    pub(crate) async fn resume(&self, id: &ContainerId) -> Result<()> {
        let mut command = self.command();
        self.carry_out(command.args(["resume", id.as_str()]), "resume")
            .await
    }

    /// Sets limits of a running container, in the form of the OCI's `resources`.
    pub(crate) async fn update(&self, id: &ContainerId, resources: &Path) -> Result<()> {
        let mut command = self.command();
        command.args(["update", "--resources"]).arg(resources);
        self.carry_out(command.arg(id.as_str()), "update").await
    }

    async fn carry_out(&self, command: &mut Command, what: &str) -> Result<()> {
        let output = command.output().await;
        let output = output.map_err(|error| Error::file("run", &self.program, error))?;
        match output.status.success() {
            true => Ok(()),
            false => {
                let stderr = String::from_utf8_lossy(&output.stderr);
                let text = format!("{} {what}: {}", self.program.display(), stderr.trim());
                Err(Error::new(Kind::PeerLost, text))
            }
        }
    }
}

/// Where control groups are mounted.
const CONTROL_GROUPS: &str = "/sys/fs/cgroup";

/// Why a runtime makes and restores no containers on this host, if it does not.
pub(crate) fn refusal(kind: RuntimeKind) -> Option<String> {
    match kind {
        RuntimeKind::Runc => None,
        RuntimeKind::Crun => refusal_of_crun(Path::new(CONTROL_GROUPS)),
    }
}

/// crun ends with "cgroups in hybrid mode not supported" where version 2 has controllers beside version 1, whatever
/// manager of control groups it is told to use.
fn refusal_of_crun(groups: &Path) -> Option<String> {
    if groups.join("cgroup.controllers").exists() {
        // Version 2 alone.
        return None;
    }
    let controllers = fs::read_to_string(groups.join("unified/cgroup.controllers")).ok()?;
    let controllers = controllers.trim();
    (!controllers.is_empty()).then(|| {
        format!(
            "crun makes no containers where control groups of version 2 have controllers ({controllers}) beside \
             those of version 1: boot that host with systemd.unified_cgroup_hierarchy=1, or use runc"
        )
    })
}

/// Where a runtime writes what it does with the images in `images`.
pub(crate) fn runtime_log(images: &Path) -> PathBuf {
    images.join("runtime.log")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crun_refuses_controllers_of_version_2_beside_version_1() {
        let tmp = tempfile::tempdir().unwrap();
        let groups = tmp.path();
        assert_eq!(refusal_of_crun(groups), None, "version 1 alone");
        fs::create_dir(groups.join("unified")).unwrap();
        let unified = groups.join("unified/cgroup.controllers");
        fs::write(&unified, "\n").unwrap();
        assert_eq!(refusal_of_crun(groups), None, "without controllers");
        fs::write(&unified, "hugetlb misc\n").unwrap();
        let reason = refusal_of_crun(groups).unwrap();
        assert!(reason.contains("(hugetlb misc)"), "{reason}");
        fs::write(groups.join("cgroup.controllers"), "cpu\n").unwrap();
        assert_eq!(refusal_of_crun(groups), None, "version 2 alone");
        assert_eq!(refusal(RuntimeKind::Runc), None);
    }
}
