//! Commands of the user's at three points of a migration, with the facts in their environment. docs/migration.md
//! lists them.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use pageferry::error::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use tokio::process::Command;
use tokio::time::timeout;

/// Where what they print goes, in the migration's directory.
const LOG: &str = "hooks.log";

/// The commands, as they are written down.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Hooks {
    pub(super) pre_freeze: Option<String>,
    pub(super) post_resume: Option<String>,
    pub(super) on_failure: Option<String>,
    /// How long each may take, ms.
    pub(super) limit_ms: u64,
}

/// A point of a migration.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Point {
    PreFreeze,
    PostResume,
    OnFailure,
}

impl Point {
    fn name(self) -> &'static str {
        match self {
            Point::PreFreeze => "pre-freeze",
            Point::PostResume => "post-resume",
            Point::OnFailure => "on-failure",
        }
    }
}

/// Ends a hook with all that it has started, unless it has ended.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // Its processes may have ended by themselves.
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

impl Hooks {
    fn command(&self, point: Point) -> Option<&str> {
        match point {
            Point::PreFreeze => self.pre_freeze.as_deref(),
            Point::PostResume => self.post_resume.as_deref(),
            Point::OnFailure => self.on_failure.as_deref(),
        }
    }

    /// Runs the hook of a point, once for each migration in `dir`, whoever comes to that point again.
    ///
    /// Fails if the hook does, or takes too long: then its processes are killed.
    pub(super) async fn run(
        &self,
        point: Point,
        dir: &Path,
        facts: &[(&'static str, String)],
    ) -> Result<()> {
        let name = point.name();
        let Some(text) = self.command(point) else {
            return Ok(());
        };
        let mark = dir.join(format!("{name}.begun"));
        match File::create_new(&mark) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
            made => made.map_err(|error| Error::file("create", &mark, error))?,
        };
        let path = dir.join(LOG);
        let log = fs::OpenOptions::new().create(true).append(true).open(&path);
        let log = log.map_err(|error| Error::file("open", &path, error))?;
        let failed = |error| Error::wrap(Kind::Io, format!("the hook --{name}"), error);
        let mut command = Command::new("sh");
        command
            .args(["-c", text])
            .env("PAGEFERRY_HOOK", name)
            .env("PAGEFERRY_DIR", dir)
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(failed)?)
            .stderr(log)
            .process_group(0);
        for (name, value) in facts {
            command.env(format!("PAGEFERRY_{name}"), value);
        }
        let mut child = command.spawn().map_err(failed)?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        let mut group = Group(pid.map(Pid::from_raw));
        let limit = Duration::from_millis(self.limit_ms);
        let Ok(ended) = timeout(limit, child.wait()).await else {
            let text = format!(
                "the hook --{name} was killed after {} ms (--hook-limit)",
                self.limit_ms
            );
            return Err(Error::new(Kind::Interrupted, text));
        };
        let status = ended.map_err(failed)?;
        // What it leaves in the background is its own affair.
        group.0 = None;
        match status.success() {
            true => Ok(()),
            false => {
                let text = format!(
                    "the hook --{name} failed ({status}); it printed to {}",
                    path.display()
                );
                Err(Error::new(Kind::Interrupted, text))
            }
        }
    }
}
