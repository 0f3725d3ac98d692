//! A host to which containers move: an agent with a runtime's state and bundles of its own.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::unistd::Pid;
use serde_json::Value;

use crate::agent::{Agent, Move};
use crate::control_groups::ControlGroups;
use crate::process::{Spawned, descendants, run};
use crate::runc::Runc;
use crate::test_dir::TestDir;

/// See the module's text.
#[derive(Debug)]
pub struct ContainerHost {
    /// Its agent.
    pub agent: Agent,
    /// Dropped behind the agent: only groups without processes can be removed.
    pub groups: ControlGroups,
    root: PathBuf,
    bundles: PathBuf,
    runtime: &'static str,
}

impl ContainerHost {
    /// A host named `name`, with `criu`, that knows the bundle of the container `id` of `runc`.
    ///
    /// # Errors
    /// The agent does not start.
    pub fn start(
        test_dir: &TestDir,
        criu: &Path,
        name: &str,
        (runc, id): (&Runc<'_>, &str),
    ) -> Result<ContainerHost> {
        let root = test_dir.path(&format!("{name}-runtime"));
        let bundles = test_dir.path(&format!("{name}-bundles"));
        fs::create_dir_all(&bundles)?;
        symlink(runc.bundle(), bundles.join(id))?;
        let groups = ControlGroups::new()?;
        let options = [
            "--runtime-root".to_owned(),
            root.display().to_string(),
            "--bundles".to_owned(),
            bundles.display().to_string(),
        ];
        let agent = Agent::start(criu, &test_dir.path(name), None, &options)?;
        let init = agent.init()?;
        let pids: Vec<Pid> = [vec![init], descendants(init)].concat();
        for pid in pids {
            groups.take(pid)?;
        }
        Ok(ContainerHost {
            agent,
            groups,
            root,
            bundles,
            runtime: "runc",
        })
    }

    /// Where the bundles are.
    pub fn bundles(&self) -> &Path {
        &self.bundles
    }

    /// A command of the runtime on that host.
    ///
    /// # Errors
    /// The host is gone.
    pub fn runtime(&self, args: &[&str]) -> Result<Command> {
        let mut command = Command::new("nsenter");
        let init = self.agent.init()?.to_string();
        command
            .args(["--target", &init, "--pid", "--mount", "--"])
            .arg(self.runtime)
            .arg("--root")
            .arg(&self.root)
            .args(args);
        Ok(command)
    }

    /// What its runtime says of a container; `None` if it knows no such container.
    ///
    /// # Errors
    /// It says something else.
    pub fn state(&self, id: &str) -> Result<Option<Value>> {
        let output = self.runtime(&["state", id])?.output()?;
        match output.status.success() {
            true => Ok(Some(serde_json::from_slice(&output.stdout)?)),
            false => Ok(None),
        }
    }

    /// Names of the containers that its runtime lists.
    ///
    /// # Errors
    /// It fails.
    pub fn list(&self) -> Result<String> {
        let output = run(&mut self.runtime(&["list", "--quiet"])?)?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// The first process of a container, as the harness sees it.
    ///
    /// # Errors
    /// There is no such container.
    pub fn pid(&self, id: &str) -> Result<Pid> {
        let state = self.state(id)?.context("the container is not there")?;
        let inside = state["pid"].as_u64().context("no pid")?.to_string();
        let is_it = |pid: &Pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let pids = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
            // As the harness's namespace, the host's and the container's number it.
            pids.is_some_and(|pids| pids.split_whitespace().nth(1) == Some(&inside))
        };
        let found = descendants(self.agent.init()?).into_iter().find(is_it);
        found.context("the container's process is not there")
    }
}

/// Starts the migration of a container.
///
/// # Errors
/// The command cannot be started.
pub fn start(
    moves: &Move<'_>,
    (runc, id): (&Runc<'_>, &str),
    host: &ContainerHost,
) -> Result<Spawned> {
    let root = runc.state_dir().display().to_string();
    let subject = [
        "--container",
        id,
        "--runtime",
        "runc",
        "--runtime-root",
        &root,
    ];
    moves.start_subject(&subject, &host.agent)
}
