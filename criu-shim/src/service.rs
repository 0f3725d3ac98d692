//! `criu service`: the same as swrk for whoever connects.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::Parser;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use pageferry::daemon::command_line::words::Part;
use pageferry::daemon::command_line::{Action, Parsed, parse};
use pageferry::daemon::swrk::inherit;
use pageferry::daemon::{self, CommonArgs, Daemon};
use pageferry::error::{Error, Result};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::config::SERVICE_CLIENT;

/// The name under which a file of several programs is this one.
const NAME: &str = "criu";

/// CRIU's name for a socket without a name, in the work directory.
const SOCKET: &str = "criu_service.socket";

/// Who may connect: CRIU lets anybody, and does for everybody what root may.
const SOCKET_MODE: u32 = 0o600;

/// Connections that may wait.
const BACKLOG: i32 = 16;

#[derive(Parser)]
#[command(name = "criu", version)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,
}

pub(crate) fn run(parts: &[Part]) -> Result<ExitCode> {
    // Of all others it is the name of a host, of a service that of a socket.
    let is_address = |part: &&Part| part.option == Some("address");
    let address = parts
        .iter()
        .filter(is_address)
        .filter_map(|part| part.value.clone())
        .next_back();
    let path = address.map_or_else(|| SOCKET.into(), PathBuf::from);
    let others = parts.iter().filter(|part| !is_address(part));
    let argv = others.flat_map(|part| part.words.clone());
    let actions = [Action {
        word: "service",
        operand_option: None,
    }];
    let words = std::iter::once(NAME.into()).chain(argv);
    let Parsed { args, diagnostics } = match parse::<Args>(&actions, words) {
        Ok(parsed) => parsed,
        Err(error) => return Ok(ExitCode::from(error.report())),
    };
    Ok(daemon::run(&args.common, &diagnostics, |daemon| {
        serve(&path, daemon)
    }))
}

fn serve(path: &Path, daemon: &mut Daemon) -> Result<()> {
    let failed = |doing: &str, error: std::io::Error| Error::file(doing, path, error);
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed("replace", error)),
        _ => {}
    }
    let listener = Socket::new(Domain::UNIX, Type::SEQPACKET, None);
    let listener = listener.map_err(|error| failed("make the socket", error))?;
    let address = SockAddr::unix(path).map_err(|error| failed("listen at", error))?;
    listener
        .bind(&address)
        .map_err(|error| failed("listen at", error))?;
    let mode = fs::Permissions::from_mode(SOCKET_MODE);
    fs::set_permissions(path, mode).map_err(|error| failed("restrict", error))?;
    listener
        .listen(BACKLOG)
        .map_err(|error| failed("listen at", error))?;
    tracing::info!("listening at {}", path.display());
    daemon.listening()?;
    let this = std::env::current_exe().map_err(|error| failed("serve", error))?;
    loop {
        let (socket, _) = listener
            .accept()
            .map_err(|error| failed("accept a connection at", error))?;
        reap();
        let client = OwnedFd::from(socket);
        inherit(client.as_fd())?;
        let number = client.as_raw_fd().to_string();
        let started = Command::new(&this)
            // The file may be `pageferry`, which is this program by its name alone.
            .arg0(NAME)
            .args([SERVICE_CLIENT, "swrk", &number])
            .spawn();
        if let Err(error) = started {
            tracing::error!("{}", failed("answer a client of", error));
        }
    }
}

/// Lets go of those whose work is done.
fn reap() {
    while let Ok(ended) = waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
        if ended == WaitStatus::StillAlive {
            break;
        }
    }
}
