//! Containers created, started and ended without a checkpoint.

use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::Signal;
use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::ContainerId;
use pageferry::sys::owned_process::ProcessName;
use tokio::process::Command;
use tokio::time::{Instant, sleep, timeout};

use super::Runtime;
use crate::child::Program;

/// How long a container may take to end by SIGTERM before it is killed: as long as podman and Docker wait.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// How long the kernel may take to end a process that is killed.
const KILL_LIMIT: Duration = Duration::from_secs(60);

/// How often a container that ends is looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// Ends a container by the end of its first process: by SIGTERM, and if that takes too long by SIGKILL. Its runtime would
/// send the same signals, later.
pub(crate) async fn stop(root: ProcessName) -> Result<()> {
    for (signal, limit) in [(Signal::SIGTERM, STOP_LIMIT), (Signal::SIGKILL, KILL_LIMIT)] {
        match root.signal(signal as i32) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                let text = format!("cannot send a signal to pid {}", root.pid);
                return Err(Error::wrap(Kind::Io, text, error));
            }
            _ => {}
        }
        let start = Instant::now();
        while start.elapsed() < limit {
            if !root.is_alive() {
                return Ok(());
            }
            sleep(LOOK_AGAIN).await;
        }
    }
    let text = format!("pid {} does not end by SIGKILL", root.pid);
    Err(Error::new(Kind::Io, text))
}

impl Runtime {
    /// Makes a container that does not run yet. What goes wrong is written to `log`.
    pub(crate) async fn create(&self, id: &ContainerId, bundle: &Path, log: &Path) -> Result<()> {
        self.make("create", &["create"], (id, bundle), log).await
    }

    /// Starts a container that was made.
    pub(crate) async fn start(&self, id: &ContainerId) -> Result<()> {
        let mut command = self.command();
        self.carry_out(command.args(["start", id.as_str()]), "start")
            .await
    }

    /// Makes and starts a container.
    pub(crate) async fn run(&self, id: &ContainerId, bundle: &Path, log: &Path) -> Result<()> {
        self.make("run", &["run", "--detach"], (id, bundle), log)
            .await
    }

    async fn make(
        &self,
        title: &'static str,
        verb: &[&str],
        (id, bundle): (&ContainerId, &Path),
        log: &Path,
    ) -> Result<()> {
        let mut command = self.command();
        // The container keeps the descriptors: a pipe of this program's would end with it.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.arg("--log").arg(log).args(verb);
        command.arg("--bundle").arg(bundle).arg(id.as_str());
        Program::start(title, &mut command, log)?.succeed().await
    }

    /// Whether a container has processes.
    pub(crate) async fn runs(&self, id: &ContainerId) -> Result<bool> {
        let state = self.state(id).await?;
        Ok(state.is_some_and(|state| state.status != "stopped"))
    }

    /// Whether a command succeeds in a container within `limit`.
    pub(crate) async fn exec(&self, id: &ContainerId, text: &str, limit: Duration) -> bool {
        let mut command: Command = self.command();
        command
            .args(["exec", id.as_str(), "sh", "-c", text])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        let ended = timeout(limit, command.status()).await;
        ended.is_ok_and(|ended| ended.is_ok_and(|status| status.success()))
    }
}
