//! Programs that take part in a migration: started, waited for, ended by the process and never by a name.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use pageferry::criu::log::cause;
use pageferry::error::{Error, Kind, Result};
use pageferry::sys::owned_process::ProcessName;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::events::read_end;

/// How much of a log is shown with an error, bytes.
const TAIL_BYTES: usize = 600;

/// A program that runs, and goes on if this one dies.
#[derive(Debug)]
pub(crate) struct Program {
    title: &'static str,
    child: Child,
    name: ProcessName,
    log: PathBuf,
    /// CRIU's own, where another program has started it.
    criu_log: Option<PathBuf>,
}

impl Program {
    /// Starts it. `log` is where it writes what it does, to be shown if it fails.
    pub(crate) fn start(title: &'static str, command: &mut Command, log: &Path) -> Result<Program> {
        Program::start_reading(title, command, log, Stdio::null())
    }

    /// The same, with something to read.
    pub(crate) fn start_reading(
        title: &'static str,
        command: &mut Command,
        log: &Path,
        input: impl Into<Stdio>,
    ) -> Result<Program> {
        command.stdin(input).process_group(0);
        let failed = |error| Error::wrap(Kind::Usage, format!("cannot start {title}"), error);
        let child = command.spawn().map_err(failed)?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        let pid = pid.ok_or_else(|| Error::new(Kind::Io, format!("{title} has no pid")))?;
        let name = ProcessName::of(pid).map_err(failed)?;
        Ok(Program {
            title,
            child,
            name,
            log: log.to_owned(),
            criu_log: None,
        })
    }

    /// With the log of the CRIU that it runs.
    pub(crate) fn with_criu_log(self, log: PathBuf) -> Program {
        Program {
            criu_log: Some(log),
            ..self
        }
    }

    /// Starts a program that understands `--status-fd`, and waits until it says that it is ready.
    pub(crate) async fn start_ready(
        title: &'static str,
        command: &mut Command,
        log: &Path,
        limit: Duration,
    ) -> Result<Program> {
        let mut program = Program::start_waiting(title, command, log)?;
        program.ready(limit).await?;
        Ok(program)
    }

    /// Starts it, to be waited for by [`Program::ready`].
    pub(crate) fn start_waiting(
        title: &'static str,
        command: &mut Command,
        log: &Path,
    ) -> Result<Program> {
        command.args(["--status-fd", "1"]).stdout(Stdio::piped());
        Program::start(title, command, log)
    }

    /// Waits until a byte comes from `status`, which says that it is ready.
    pub(crate) async fn ready_by(
        &mut self,
        mut status: pipe::Receiver,
        limit: Duration,
    ) -> Result<()> {
        let mut byte = [0; 1];
        let status_or_end = async {
            tokio::select! {
                read = status.read_exact(&mut byte) => Ok(read.map(drop)),
                ended = self.child.wait() => Err(ended),
            }
        };
        match timeout(limit, status_or_end).await {
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(Ok(Err(error))) => Err(Error::wrap(Kind::Io, self.title, error)),
            Ok(Err(ended)) => Err(self.failure(Some(ended))),
            Err(_) => {
                let text = format!("{} was not ready after {} s", self.title, limit.as_secs());
                Err(Error::new(Kind::PeerLost, text + &self.log_tail()))
            }
        }
    }

    /// Waits until it says that it is ready.
    pub(crate) async fn ready(&mut self, limit: Duration) -> Result<()> {
        let mut status = self.child.stdout.take();
        let mut byte = [0; 1];
        let ready = async {
            match &mut status {
                Some(status) => status.read(&mut byte).await,
                None => Ok(0),
            }
        };
        match timeout(limit, ready).await {
            Ok(Ok(1)) => Ok(()),
            Ok(_) => {
                let ended = timeout(limit, self.child.wait()).await.ok();
                Err(self.failure(ended))
            }
            Err(_) => {
                let text = format!("{} was not ready after {} s", self.title, limit.as_secs());
                Err(Error::new(Kind::PeerLost, text + &self.log_tail()))
            }
        }
    }

    /// The process, to be written down.
    pub(crate) fn name(&self) -> ProcessName {
        self.name
    }

    /// Its children at the moment.
    pub(crate) fn children(&self) -> Vec<ProcessName> {
        let pid = self.name.pid;
        let path = format!("/proc/{pid}/task/{pid}/children");
        let list = std::fs::read_to_string(path).unwrap_or_default();
        let pids = list.split_whitespace().filter_map(|pid| pid.parse().ok());
        pids.filter_map(|pid| ProcessName::of(pid).ok()).collect()
    }

    /// Waits for its end, which it must not have come to. The error shows its log.
    pub(crate) async fn unexpected_end(&mut self) -> Error {
        let ended = self.child.wait().await;
        self.failure(Some(ended))
    }

    /// Waits for its end, which must be a success.
    pub(crate) async fn succeed(&mut self) -> Result<()> {
        match self.child.wait().await {
            Ok(status) if status.success() => Ok(()),
            ended => Err(self.failure(Some(ended))),
        }
    }

    /// Waits for its end, however it is.
    pub(crate) async fn end(&mut self) -> Option<ExitStatus> {
        self.child.wait().await.ok()
    }

    /// Asks it to end.
    pub(crate) fn terminate(&self) {
        // It may have ended by itself.
        let _ = self.name.signal(Signal::SIGTERM as i32);
    }

    fn failure(&self, ended: Option<std::io::Result<ExitStatus>>) -> Error {
        let how = match ended {
            Some(Ok(status)) => status.to_string(),
            Some(Err(error)) => error.to_string(),
            None => "no exit status".to_owned(),
        };
        let text = format!("{} failed ({how})", self.title);
        Error::new(Kind::PeerLost, text + &self.log_tail())
    }

    /// What CRIU's log says first of what is wrong; else the lines of its own log that do, or else that log's end.
    pub(crate) fn log_tail(&self) -> String {
        let logs = [self.criu_log.as_ref(), Some(&self.log)];
        for log in logs.into_iter().flatten() {
            if let Some(cause) = cause(&text_of(log)) {
                return format!(":\n{}: {cause}", log.display());
            }
        }
        let text = text_of(&self.log);
        let errors: Vec<&str> = text.lines().filter(|line| line.contains("Error")).collect();
        let shown = match errors.is_empty() {
            true => {
                let mut at = text.len().saturating_sub(TAIL_BYTES);
                while !text.is_char_boundary(at) {
                    at += 1;
                }
                text[at..].trim().to_owned()
            }
            false => errors[errors.len().saturating_sub(4)..].join("\n"),
        };
        match shown.is_empty() {
            true => String::new(),
            false => format!(":\n{}: {shown}", self.log.display()),
        }
    }
}

/// The end of a log.
fn text_of(log: &Path) -> String {
    let text = read_end(log).unwrap_or_default();
    String::from_utf8_lossy(&text).into_owned()
}
