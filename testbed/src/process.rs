//! Child processes that do not outlive their guard.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::time::{ClockId, clock_getcpuclockid};
use nix::unistd::Pid;
use std::os::fd::AsFd;

use crate::sys::{self, Ended};
use crate::wait::{self, GENEROUS};

/// Lines of a log that an error shows.
const TAIL_LINES: usize = 25;

/// How long one look for the byte of readiness takes at most, ms.
const READY_POLL_MS: u8 = 100;

/// A child process: killed and reaped on drop, with its log shown by errors.
#[derive(Debug)]
pub struct Spawned {
    child: Child,
    name: String,
    log: Option<PathBuf>,
    ended: Option<Ended>,
}

impl Spawned {
    /// Starts `command` in a process group of its own, so that a Ctrl-C reaches only the harness,
    /// which then ends its children in the right order.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(name: &str, command: &mut Command, log: Option<PathBuf>) -> Result<Spawned> {
        Spawned::start_ungrouped(name, command.process_group(0), log)
    }

    /// Starts a `command` that makes itself the leader of a session, which the leader of a group
    /// cannot.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_ungrouped(
        name: &str,
        command: &mut Command,
        log: Option<PathBuf>,
    ) -> Result<Spawned> {
        // Orphans of the child come to this process, which can then reap them.
        prctl::set_child_subreaper(true)?;
        let child = command
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("starting {name}: {}", command_line(command)))?;
        Ok(Spawned {
            child,
            name: name.to_owned(),
            log,
            ended: None,
        })
    }

    /// Starts a daemon whose standard output is its `--status-fd`, and waits for the byte that it
    /// writes there once it listens.
    ///
    /// # Errors
    /// It cannot be started, or ends before it listens; the error shows its log.
    pub fn start_ready(name: &str, command: &mut Command, log: PathBuf) -> Result<Spawned> {
        Spawned::start_ready_before(name, command, log, &[])
    }

    /// The same with operands that must come behind all options.
    ///
    /// # Errors
    /// It cannot be started, or ends before it listens; the error shows its log.
    pub fn start_ready_before(
        name: &str,
        command: &mut Command,
        log: PathBuf,
        operands: &[&str],
    ) -> Result<Spawned> {
        command
            .args(["--status-fd", "1"])
            .args(operands)
            .stdout(Stdio::piped());
        let mut daemon = Spawned::start(name, command, Some(log))?;
        let Some(mut status) = daemon.child.stdout.take() else {
            bail!("{name} has no standard output");
        };
        wait::until(&format!("{name} to listen"), GENEROUS, || {
            let mut readable = [PollFd::new(status.as_fd(), PollFlags::POLLIN)];
            Ok((poll(&mut readable, READY_POLL_MS)? != 0).then_some(()))
        })
        .with_context(|| daemon.log_tail())?;
        let mut byte = [0xff];
        match status.read(&mut byte) {
            Ok(1) => Ok(daemon),
            result => {
                let ended = daemon
                    .wait(Duration::from_secs(10))
                    .map(|ended| ended.status);
                bail!(
                    "{name} did not become ready ({result:?}): {ended:?}\n{}{}",
                    command_line(command),
                    daemon.log_tail()
                )
            }
        }
    }

    /// Its pid.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// User and system time that it has used so far.
    ///
    /// # Errors
    /// It has been reaped.
    pub fn cpu(&self) -> Result<Duration> {
        let clock = clock_getcpuclockid(self.pid());
        let used = clock.and_then(ClockId::now);
        used.map(Duration::from)
            .with_context(|| format!("CPU time of {}", self.name))
    }

    /// Most memory that it had resident so far, bytes. Unlike [`Ended::peak_rss_bytes`] this leaves out
    /// what its parent had when it was started, which the kernel counts for the child.
    ///
    /// # Errors
    /// It has ended.
    pub fn peak_rss_bytes(&self) -> Result<u64> {
        let path = format!("/proc/{}/status", self.pid());
        let status = fs::read_to_string(&path).with_context(|| path.clone())?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|value| value.trim().strip_suffix(" kB"));
        let kib = kib.with_context(|| format!("no VmHWM in {path}"))?;
        Ok(kib.trim().parse::<u64>()? << 10)
    }

    /// What it is called in errors.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its log file.
    pub fn log(&self) -> Option<&Path> {
        self.log.as_deref()
    }

    /// The end of its log, as an error shows it.
    pub fn log_tail(&self) -> String {
        self.log.as_deref().map_or_else(String::new, tail)
    }

    /// How it ended; `None` while it runs.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn ended(&mut self) -> Result<Option<Ended>> {
        if self.ended.is_none() {
            self.ended = sys::reap(self.pid().as_raw())
                .with_context(|| format!("waiting for {}", self.name))?;
        }
        Ok(self.ended)
    }

    /// Waits until it ends.
    ///
    /// # Errors
    /// It runs on beyond `limit`; the error shows its log.
    pub fn wait(&mut self, limit: Duration) -> Result<Ended> {
        let what = format!("the end of {}", self.name);
        let ended = wait::until(&what, limit, || self.ended());
        ended.with_context(|| self.log_tail())
    }

    /// The same for cleaning up, which goes on after an interruption of the program.
    ///
    /// # Errors
    /// It runs on beyond a generous time.
    pub fn wait_undisturbed(&mut self) -> Result<Ended> {
        let what = format!("the end of {}", self.name);
        wait::undisturbed(&what, GENEROUS, || self.ended())
    }

    /// Waits until it ends, successfully.
    ///
    /// # Errors
    /// It fails or runs on beyond `limit`; the error shows its log.
    pub fn succeed(&mut self, limit: Duration) -> Result<Ended> {
        let ended = self.wait(limit)?;
        ensure!(
            ended.status.success(),
            "{}: {}{}",
            self.name,
            ended.status,
            self.log_tail()
        );
        Ok(ended)
    }

    /// Waits until it ends with an exit code other than 0, as a program that reports a failure.
    ///
    /// # Errors
    /// It succeeds, is killed by a signal, or runs on beyond `limit`.
    pub fn fail(&mut self, limit: Duration) -> Result<Ended> {
        let ended = self.wait(limit)?;
        let failed = ended.status.code().is_some_and(|code| code != 0);
        ensure!(
            failed,
            "{} must fail: {}{}",
            self.name,
            ended.status,
            self.log_tail()
        );
        Ok(ended)
    }

    /// Sends it a signal, unless it has been reaped.
    ///
    /// # Errors
    /// The signal cannot be sent.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.ended()?.is_none() {
            kill(self.pid(), signal).with_context(|| format!("{signal} to {}", self.name))?;
        }
        Ok(())
    }

    /// Kills it and waits for its end.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn kill(&mut self) -> Result<Ended> {
        self.signal(Signal::SIGKILL)?;
        self.wait_undisturbed()
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("ending {}: {error:#}", self.name);
        }
    }
}

/// The end of a file, with its name above; nothing if it cannot be read.
pub fn tail(path: &Path) -> String {
    let Ok(bytes) = fs::read(path) else {
        return String::new();
    };
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    let mut shown = format!("\n--- {} ({} lines)\n", path.display(), lines.len());
    for line in lines.iter().skip(lines.len().saturating_sub(TAIL_LINES)) {
        let _ = writeln!(shown, "{line}");
    }
    shown
}

/// A command as one could type it.
pub fn command_line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ")
}

/// Runs a command to its end.
///
/// # Errors
/// It cannot be started or fails; the error shows what it wrote.
pub fn run(command: &mut Command) -> Result<Output> {
    let line = command_line(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| line.clone())?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{line}: {}\n{stderr}",
        output.status
    );
    Ok(output)
}

/// All descendants of a process, children before their children.
pub fn descendants(pid: Pid) -> Vec<Pid> {
    let mut found = Vec::new();
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return found;
    };
    for task in tasks.flatten() {
        let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        for child in children
            .split_whitespace()
            .filter_map(|pid| pid.parse().ok())
        {
            found.push(Pid::from_raw(child));
            found.extend(descendants(Pid::from_raw(child)));
        }
    }
    found
}

/// Kills processes that this process started, directly or not, and reaps those that are its own
/// children by now.
pub fn kill_and_reap(pids: &[Pid]) {
    for &pid in pids {
        let _ = kill(pid, Signal::SIGKILL);
    }
    for pid in pids {
        let reaped = wait::undisturbed("a killed process", GENEROUS, || {
            match sys::reap(pid.as_raw()) {
                Ok(None) => Ok(None),
                Ok(Some(_)) | Err(Errno::ECHILD) => Ok(Some(())),
                Err(errno) => Err(errno.into()),
            }
        });
        if let Err(error) = reaped {
            eprintln!("reaping {pid}: {error:#}");
        }
    }
}
