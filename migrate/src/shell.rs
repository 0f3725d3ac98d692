//! Commands of the user's, for a shell: with variables in their environment, a log, and a limit of time.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use pageferry::error::{Error, Kind, Result};
use tokio::process::Command;
use tokio::time::timeout;

/// Ends a command with all that it has started, unless it has ended.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // Its processes may have ended by themselves.
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

/// Runs `text`. `title` names the command in errors; `variables` have no prefix yet; what is printed goes to `log`.
///
/// # Errors
/// It fails, or takes longer than `limit`: then its processes are killed.
pub(crate) async fn run(
    title: &str,
    text: &str,
    variables: &[(&'static str, String)],
    log: &Path,
    limit: Duration,
) -> Result<()> {
    let output = fs::OpenOptions::new().create(true).append(true).open(log);
    let output = output.map_err(|error| Error::file("open", log, error))?;
    let failed = |error| Error::wrap(Kind::Io, title, error);
    let mut command = Command::new("sh");
    command
        .args(["-c", text])
        .stdin(Stdio::null())
        .stdout(output.try_clone().map_err(failed)?)
        .stderr(output)
        .process_group(0);
    for (name, value) in variables {
        command.env(format!("PAGEFERRY_{name}"), value);
    }
    let mut child = command.spawn().map_err(failed)?;
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
    let mut group = Group(pid.map(Pid::from_raw));
    let Ok(ended) = timeout(limit, child.wait()).await else {
        let text = format!(
            "{title} was killed after {} ms (--hook-limit)",
            limit.as_millis()
        );
        return Err(Error::new(Kind::Interrupted, text));
    };
    let status = ended.map_err(failed)?;
    // What it leaves in the background is its own affair.
    group.0 = None;
    match status.success() {
        true => Ok(()),
        false => {
            let text = format!("{title} failed ({status}); it printed to {}", log.display());
            Err(Error::new(Kind::Interrupted, text))
        }
    }
}
