//! Process 1 of the PID namespace that a restore gets for itself.
//!
//! A dumped process comes back under its old pid, which may be taken outside, so it gets a
//! namespace. Something must be process 1 there, outlive `criu restore --detach`, reap, and tell how
//! the restored processes end:
//!
//! ```text
//!   nsinit --record FILE criu restore ...     FILE: "restore STATUS", then "PID STATUS" for each end
//! ```

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, wait};

/// How often an empty namespace is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Runs a command and then waits for all processes of its PID namespace.
#[derive(Parser)]
struct Args {
    /// Where to write how processes ended.
    #[arg(long)]
    record: PathBuf,
    /// Stay when no process is left, for those that enter the namespace later.
    #[arg(long)]
    stay: bool,
    /// The restore.
    #[arg(trailing_var_arg = true, required = true)]
    command: Vec<String>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let mut command = Command::new(&args.command[0]);
    command.args(&args.command[1..]).stdin(Stdio::null());
    let restore = command
        .spawn()
        .with_context(|| args.command.join(" "))?
        .id();
    loop {
        let (pid, status) = match wait() {
            Ok(WaitStatus::Exited(pid, code)) => (pid, format!("exited {code}")),
            Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, format!("killed {signal}")),
            Ok(_) | Err(Errno::EINTR) => continue,
            Err(Errno::ECHILD) if args.stay => {
                // Who enters is no child at first: only its orphans are, and nothing tells when.
                std::thread::sleep(LOOK_AGAIN);
                continue;
            }
            Err(Errno::ECHILD) => return Ok(()),
            Err(errno) => return Err(errno).context("wait"),
        };
        let who = if pid.as_raw().cast_unsigned() == restore {
            "restore".into()
        } else {
            pid.to_string()
        };
        record(&args.record, &format!("{who} {status}\n"))?;
    }
}

fn record(path: &Path, line: &str) -> Result<()> {
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    Ok(file.write_all(line.as_bytes())?)
}
