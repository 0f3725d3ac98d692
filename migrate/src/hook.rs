//! What `criu restore` runs at its stages (`--action-script`), and how the agent is notified of them.
//!
//! ```text
//! criu restore ── post-restore ──> pageferry restore-hook ── "post-restore\n" ──> agent's hook.sock
//!    waits                              waits               <── one byte ────── after the decision
//!              ── post-resume ───> pageferry restore-hook ── "post-resume\n" ───> agent
//! ```
//!
//! A stage that fails ends the restore and what it has made. If the agent dies while a tree waits, its
//! record decides: only a decision that is on disk lets the tree run.

use std::env;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use pageferry::migration::AgentRecord;

use crate::records;

/// The stage at which all processes are restored and none has run.
pub(crate) const RESTORED: &str = "post-restore";

/// The stage at which they run.
pub(crate) const RESUMED: &str = "post-resume";

/// Name of the agent's socket in a migration's directory.
pub(crate) const SOCKET: &str = "hook.sock";

/// Name of the script that CRIU runs, in a migration's directory.
pub(crate) const SCRIPT: &str = "hook.sh";

/// Name of the agent's record in a migration's directory.
pub(crate) const RECORD: &str = "record.json";

/// Run by CRIU alone.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Directory of the migration at the agent
    dir: PathBuf,
}

/// Reports the stage and waits for the decision.
pub(crate) fn run(args: &Args) -> ExitCode {
    let stage = env::var("CRTOOLS_SCRIPT_ACTION").unwrap_or_default();
    match stage.as_str() {
        RESTORED => match may_run(&args.dir) {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        },
        RESUMED => {
            notify_resumed(&args.dir);
            ExitCode::SUCCESS
        }
        _ => ExitCode::SUCCESS,
    }
}

/// Notifies the agent that a tree is restored, waits for the decision, and returns whether the tree runs here.
pub(crate) fn may_run(dir: &Path) -> bool {
    wait_for_decision(dir) || is_committed(dir)
}

/// Notifies the agent that the tree runs.
pub(crate) fn notify_resumed(dir: &Path) {
    // The agent may have died since; the processes run all the same.
    let _ = report(dir, RESUMED);
}

/// A path as a shell reads it back.
pub(crate) fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
}

fn report(dir: &Path, stage: &str) -> std::io::Result<UnixStream> {
    let mut socket = UnixStream::connect(dir.join(SOCKET))?;
    socket.write_all(stage.as_bytes())?;
    socket.write_all(b"\n")?;
    Ok(socket)
}

fn wait_for_decision(dir: &Path) -> bool {
    let mut decision = [0; 1];
    let read = report(dir, RESTORED).and_then(|mut socket| socket.read(&mut decision));
    matches!(read, Ok(1))
}

fn is_committed(dir: &Path) -> bool {
    let record = records::read::<AgentRecord>(&dir.join(RECORD));
    matches!(record, Ok(Some(AgentRecord::Committed)))
}
