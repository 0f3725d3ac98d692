//! The service that is told the log: started by a command, stopped, let go on, ended.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::ReplayBegin;
use pageferry::sys::owned_process::ProcessName;
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::time::{Instant, sleep};

use crate::child::Program;
use crate::service_log::with_address;

/// Between two attempts to connect to a service that starts, and two looks at one that ends.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// How long the kernel may take to end a process that is killed.
const KILL_LIMIT: Duration = Duration::from_secs(60);

/// Runs the command in `home`, and returns the leader of its process group when it takes connections.
pub(super) async fn start(
    begin: &ReplayBegin,
    home: &Path,
    snapshot: Option<&Path>,
    log: &Path,
) -> Result<ProcessName> {
    if TcpStream::connect(&begin.address).await.is_ok() {
        let text = format!(
            "something listens at {} of the destination already: it would receive the log (end it, or name another \
             place with --at)",
            begin.address
        );
        return Err(Error::new(Kind::Usage, text));
    }
    fs::create_dir(home).map_err(|error| Error::file("make the directory", home, error))?;
    let output = File::create(log).map_err(|error| Error::file("create", log, error))?;
    let errors = output.try_clone();
    let errors = errors.map_err(|error| Error::file("open", log, error))?;
    let mut command = Command::new("sh");
    command.args(["-c", &begin.start]).current_dir(home);
    with_address(&mut command, &begin.address);
    if let Some(snapshot) = snapshot {
        command.env("PAGEFERRY_SNAPSHOT", snapshot);
    }
    command.stdout(output).stderr(errors);
    let mut program = Program::start("the service (--start)", &mut command, log)?;
    let name = program.name();
    let ready = tokio::select! {
        ready = wait(begin) => ready,
        ended = program.unexpected_end() => Err(ended),
    };
    if let Err(error) = ready {
        end(name).await?;
        return Err(error);
    }
    tokio::spawn(async move { program.end().await });
    Ok(name)
}

async fn wait(begin: &ReplayBegin) -> Result<()> {
    let start = Instant::now();
    loop {
        match TcpStream::connect(&begin.address).await {
            Ok(_) => return Ok(()),
            Err(error) if start.elapsed() > begin.stall() => {
                let text = format!(
                    "the service does not listen at {} after {} s (--stall)",
                    begin.address,
                    begin.stall().as_secs()
                );
                return Err(Error::wrap(Kind::PeerLost, text, error));
            }
            Err(_) => sleep(LOOK_AGAIN).await,
        }
    }
}

/// Lets its processes stand still.
pub(super) fn pause(leader: ProcessName) -> Result<()> {
    signal(leader, Signal::SIGSTOP)
}

/// Lets them go on.
pub(super) fn resume(leader: ProcessName) -> Result<()> {
    signal(leader, Signal::SIGCONT)
}

/// Ends them, whatever they do.
pub(super) async fn end(leader: ProcessName) -> Result<()> {
    if !leader.is_alive() {
        return Ok(());
    }
    signal(leader, Signal::SIGKILL)?;
    let start = Instant::now();
    while leader.is_alive() {
        if start.elapsed() > KILL_LIMIT {
            let text = format!("pid {} does not end by SIGKILL", leader.pid);
            return Err(Error::new(Kind::Io, text));
        }
        sleep(LOOK_AGAIN).await;
    }
    Ok(())
}

/// Sends a signal to the whole group, while the number is its leader's.
fn signal(leader: ProcessName, signal: Signal) -> Result<()> {
    let gone = || {
        let text = format!("the service (pid {}) has ended", leader.pid);
        Error::new(Kind::PeerLost, text)
    };
    if !leader.is_alive() {
        return Err(gone());
    }
    match killpg(Pid::from_raw(leader.pid), signal) {
        Ok(()) => Ok(()),
        Err(Errno::ESRCH) => Err(gone()),
        Err(errno) => {
            let text = format!("the service (pid {}) cannot be signalled", leader.pid);
            Err(Error::wrap(Kind::Io, text, errno))
        }
    }
}
