//! The lazy-client of one migration: two processes, of which the second takes over if the first is killed.

use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use pageferry::error::{Error, Kind, Result};
use pageferry::sys::owned_process::ProcessName;
use tokio::process::Command;
use tokio::time::sleep;

use super::commands::READY_LIMIT;
use crate::child::Program;
use crate::records;

/// Both processes, as they are kept in a migration's directory.
const PROCESSES: &str = "lazy-client.json";

/// What it tells at its end, in the directory of the images.
pub(super) const SUMMARY: &str = "lazy-summary.json";

/// How often a process that is no child is looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// See the module's text.
#[derive(Debug)]
pub(super) struct LazyClient {
    program: Program,
    /// The second process.
    standby: Vec<ProcessName>,
}

impl LazyClient {
    /// Starts it and waits until the restore can begin. `dir` is the migration's.
    pub(super) async fn start(mut command: Command, log: &Path, dir: &Path) -> Result<LazyClient> {
        let mut program = Program::start_waiting("lazy-client", &mut command, log)?;
        // Of the first alone, should this one be killed at once.
        records::write(&dir.join(PROCESSES), &[program.name()])?;
        program.ready(READY_LIMIT).await?;
        let standby = program.children();
        Ok(LazyClient { program, standby })
    }

    /// Both processes.
    pub(super) fn names(&self) -> Vec<ProcessName> {
        let mut all = vec![self.program.name()];
        all.extend(&self.standby);
        all
    }

    /// Whether one of the two serves.
    pub(super) fn is_alive(&self) -> bool {
        self.program.name().is_alive() || self.standby.iter().any(ProcessName::is_alive)
    }

    /// Waits until all memory is there. `images` is the directory in which it works.
    pub(super) async fn succeed(mut self, images: &Path) -> Result<()> {
        let ended = self.program.succeed().await;
        if ended.is_ok() || !self.standby.iter().any(ProcessName::is_alive) {
            return match has_everything(images) {
                // The second process may have been as quick as this look.
                Some(true) => Ok(()),
                _ => ended,
            };
        }
        tracing::warn!("lazy-client was killed: its standby process continues");
        wait_for_all(&self.standby).await;
        finished(images)
    }

    /// Ends it: its memory is not needed.
    pub(super) async fn end(mut self) {
        for process in &self.standby {
            // It may have ended by itself.
            let _ = process.signal(Signal::SIGTERM as i32);
        }
        self.program.terminate();
        self.program.end().await;
        wait_for_all(&self.standby).await;
    }
}

/// Writes down both processes. The restore need not wait for the disk: until then the first process is known, and it
/// ends the second when it is asked to end.
pub(super) fn keep(dir: &Path, names: &[ProcessName]) -> Result<()> {
    records::write(&dir.join(PROCESSES), &names)
}

/// Ends what an earlier agent has started in the migration's directory `dir`.
pub(super) fn end_earlier(dir: &Path) {
    for process in earlier(dir) {
        // It may have ended by itself.
        let _ = process.signal(Signal::SIGTERM as i32);
    }
}

/// Waits for the end of what an earlier agent has started in `dir`, which must have brought all memory.
pub(super) async fn earlier_succeeds(dir: &Path, images: &Path) -> Result<()> {
    wait_for_all(&earlier(dir)).await;
    finished(images)
}

fn earlier(dir: &Path) -> Vec<ProcessName> {
    let read = records::read::<Vec<ProcessName>>(&dir.join(PROCESSES));
    read.ok().flatten().unwrap_or_default()
}

async fn wait_for_all(processes: &[ProcessName]) {
    while processes.iter().any(ProcessName::is_alive) {
        sleep(LOOK_AGAIN).await;
    }
}

fn finished(images: &Path) -> Result<()> {
    match has_everything(images) {
        Some(true) => Ok(()),
        Some(false) => Err(Error::new(Kind::PeerLost, "lazy-client has lost memory")),
        None => {
            let text = "the end of lazy-client was not seen, so memory may be lost";
            Err(Error::new(Kind::PeerLost, text))
        }
    }
}

/// Whether the summary says that no page is missing; `None` without a whole summary.
fn has_everything(images: &Path) -> Option<bool> {
    let summary = records::read::<serde_json::Value>(&images.join(SUMMARY));
    let summary = summary.ok().flatten()?;
    let missing = summary["missing_pages"].as_u64()?;
    let poisoned = summary["pages"]["poisoned"].as_u64()?;
    Some(missing + poisoned == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_tells_whether_pages_are_lost() {
        let tmp = tempfile::tempdir().unwrap();
        assert_eq!(has_everything(tmp.path()), None);
        assert!(finished(tmp.path()).is_err());
        for (missing, poisoned, whole) in [(0, 0, true), (1, 0, false), (0, 1, false)] {
            let summary = serde_json::json!({
                "missing_pages": missing,
                "pages": { "poisoned": poisoned },
            });
            records::write(&tmp.path().join(SUMMARY), &summary).unwrap();
            assert_eq!(has_everything(tmp.path()), Some(whole));
            assert_eq!(finished(tmp.path()).is_ok(), whole);
        }
    }
}
