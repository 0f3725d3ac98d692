//! What rules do: child processes, and control groups that are frozen, thawed and ended.

use std::fs;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry::error::{Error, Kind, Result};
use tokio::process::{Child, Command};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep};

use super::rules::{Action, Service};

/// Between two looks at a control group.
const PAUSE: Duration = Duration::from_millis(10);

/// How long the kernel may take to freeze a group.
const FREEZE_LIMIT: Duration = Duration::from_secs(30);

/// Held while a process is started, and while a descriptor comes that it must not inherit: zbus receives descriptors
/// without close-on-exec.
pub(super) static STARTING: Mutex<()> = Mutex::const_new(());

/// Starts a process.
pub(super) async fn spawn(command: &mut Command) -> std::io::Result<Child> {
    let _starting = STARTING.lock().await;
    command.spawn()
}

/// An action in words.
pub(super) fn describe(action: &Action) -> String {
    let service = |service: &Service| match (&service.unit, &service.cgroup) {
        (Some(unit), _) => unit.clone(),
        (None, Some(cgroup)) => cgroup.display().to_string(),
        (None, None) => String::new(),
    };
    match action {
        Action::Migrate { args } => format!("pageferry migrate {}", args.join(" ")),
        Action::Pause { cgroup } => format!("pause {}", cgroup.display()),
        Action::Resume { cgroup } => format!("resume {}", cgroup.display()),
        Action::Stop(of) => format!("stop {}", service(of)),
        Action::Restart(of) => format!("restart {}", service(of)),
        Action::Exec { command } => format!("run {command}"),
    }
}

/// The command of an action that is one; it is started by the caller, who writes its pid down.
pub(super) fn command(action: &Action, rule: &str) -> Result<Option<Command>> {
    let mut command = match action {
        Action::Migrate { args } => {
            let program = std::env::current_exe();
            let program = program.map_err(|error| Error::wrap(Kind::Io, "this program", error))?;
            let mut command = Command::new(program);
            command.arg("migrate").args(args);
            command
        }
        Action::Exec { command } => shell(command),
        Action::Stop(service) if service.unit.is_some() => systemctl("stop", service),
        Action::Restart(service) if service.unit.is_some() => systemctl("restart", service),
        _ => return Ok(None),
    };
    // It outlives this program, which finds it again when it is started.
    command
        .env("PAGEFERRY_RULE", rule)
        .stdin(Stdio::null())
        .process_group(0);
    Ok(Some(command))
}

fn shell(text: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", text]);
    command
}

fn systemctl(verb: &str, service: &Service) -> Command {
    let mut command = Command::new("systemctl");
    command.arg(verb).arg("--");
    command.args(service.unit.as_deref());
    command
}

/// Carries out an action that is not one command.
pub(super) async fn carry_out(action: &Action) -> Result<()> {
    match action {
        Action::Pause { cgroup } => freeze(cgroup, true).await,
        Action::Resume { cgroup } => freeze(cgroup, false).await,
        Action::Stop(service) => match &service.cgroup {
            Some(cgroup) => end(cgroup, service.grace).await,
            None => Ok(()),
        },
        Action::Restart(service) => {
            if let Some(cgroup) = &service.cgroup {
                end(cgroup, service.grace).await?;
            }
            match &service.start {
                Some(start) => succeed(start).await,
                None => Ok(()),
            }
        }
        Action::Migrate { .. } | Action::Exec { .. } => Ok(()),
    }
}

async fn succeed(start: &str) -> Result<()> {
    let child = spawn(shell(start).stdin(Stdio::null())).await;
    let status = match child {
        Ok(mut child) => child.wait().await,
        Err(error) => Err(error),
    };
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Error::new(Kind::Usage, format!("`start`: {status}"))),
        Err(error) => Err(Error::wrap(Kind::Usage, "`start`: sh", error)),
    }
}

/// Freezes a group of version 2 and waits until all of it stands still, or thaws it.
async fn freeze(cgroup: &Path, frozen: bool) -> Result<()> {
    let file = cgroup.join("cgroup.freeze");
    let word = if frozen { "1" } else { "0" };
    fs::write(&file, word).map_err(|error| Error::file("write", &file, error))?;
    let began = Instant::now();
    while event(cgroup, "frozen")? != frozen {
        if began.elapsed() > FREEZE_LIMIT {
            let text = format!("{} is not frozen after 30 s", cgroup.display());
            return Err(Error::new(Kind::Io, text));
        }
        sleep(PAUSE).await;
    }
    Ok(())
}

/// Whether a field of the group's events is set.
fn event(cgroup: &Path, name: &str) -> Result<bool> {
    let file = cgroup.join("cgroup.events");
    let text = fs::read_to_string(&file).map_err(|error| Error::file("read", &file, error))?;
    let mut fields = text.lines().filter_map(|line| line.split_once(' '));
    Ok(fields.any(|field| field == (name, "1")))
}

/// Asks all processes of a group to end, and kills what is left after the grace.
async fn end(cgroup: &Path, grace: Duration) -> Result<()> {
    let procs = cgroup.join("cgroup.procs");
    let text = fs::read_to_string(&procs).map_err(|error| Error::file("read", &procs, error))?;
    for pid in text.lines().filter_map(|line| line.parse().ok()) {
        terminate(cgroup, pid);
    }
    let began = Instant::now();
    while event(cgroup, "populated")? && began.elapsed() < grace {
        sleep(PAUSE).await;
    }
    if event(cgroup, "populated")? {
        let file = cgroup.join("cgroup.kill");
        fs::write(&file, "1").map_err(|error| Error::file("write", &file, error))?;
    }
    while event(cgroup, "populated")? {
        sleep(PAUSE).await;
    }
    Ok(())
}

/// Ends a process if it still is in the group: the directory in /proc is that of one process alone.
fn terminate(cgroup: &Path, pid: i32) {
    let Ok(proc) = fs::File::open(format!("/proc/{pid}")) else {
        return;
    };
    let own = format!("/proc/self/fd/{}/cgroup", proc.as_raw_fd());
    let groups = fs::read_to_string(own).unwrap_or_default();
    let name = cgroup.file_name().map(|name| name.to_string_lossy());
    let is_there = name.is_some_and(|name| groups.contains(&*name));
    if is_there {
        // It may have ended by itself.
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
}
