//! `criu` as a runtime finds it on PATH during a migration: the real one, with a changed request.
//!
//! ```text
//! runtime ── DUMP, RESTORE ──> relay ── changed ──> the real criu (takes the place of what the runtime started)
//!         <── notifications ──       <──
//! ```
//!
//! The runtime expects the process that it started to be CRIU: a restored tree becomes the child of that
//! process's parent. So this process becomes CRIU, and a process of its own passes the messages on. At
//! `post-restore` it lets the runtime write down its state first, and then waits for the decision as
//! [`crate::hook`] does.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use nix::fcntl::OFlag;
use nix::sys::wait::waitpid;
use nix::unistd::ForkResult;
use pageferry::criu::rpc::kind;
use pageferry::criu::rpc_fields::{Fields, options, request, response};
use pageferry::daemon::swrk::{self, Client, SwrkMessage, inherit};
use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::TcpConnections;
use pageferry::sys::owned_process::ProcessName;
use pageferry::sys::process::fork_single_threaded;
use serde::{Deserialize, Serialize};

use crate::commands::LOG_WARNINGS;
use crate::hook::{self, RESTORED, RESUMED};
use crate::records;

/// Directory of the wrapper, in a migration's directory.
const BIN: &str = "bin";

/// What it is to do, in the same place.
const SETTINGS: &str = "stand-in.json";

/// Configuration file of the real CRIU, beside it.
const CONFIG: &str = "criu.conf";

/// The CRIU that a runtime has started, as it is written down in a migration's directory.
pub(crate) const CRIU_PROCESS: &str = "criu.json";

/// Run by a runtime alone.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Directory of the migration
    dir: PathBuf,

    /// CRIU's command line
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    words: Vec<OsString>,
}

/// How requests are changed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Settings {
    /// The real CRIU.
    pub(crate) criu: PathBuf,
    pub(crate) tcp: TcpConnections,
    pub(crate) work: Work,
    /// Files of the host that a dump leaves out of the images, as CRIU names them.
    #[serde(default)]
    pub(crate) external: Vec<String>,
    /// What a restore gets in the place of files and pipes of the source's host.
    #[serde(default)]
    pub(crate) lent: Vec<Lent>,
}

/// Something that a restored process has open in the place of what it had.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Lent {
    /// What it had, as CRIU names it.
    pub(crate) key: String,
    /// What it gets, to be written to.
    pub(crate) path: PathBuf,
}

/// What is asked of CRIU.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Work {
    /// Memory goes to a page-server on loopback; the processes stay stopped.
    DumpTo { port: u16 },
    /// Memory is served on loopback; a byte is written to `ready` then.
    DumpLazily { port: u16, ready: PathBuf },
    /// The restored tree waits for the decision.
    Restore { lazily: bool },
}

impl Work {
    fn kind(&self) -> i32 {
        match self {
            Work::DumpTo { .. } | Work::DumpLazily { .. } => kind::DUMP,
            Work::Restore { .. } => kind::RESTORE,
        }
    }
}

/// Makes the wrapper for a migration in `dir`, and tells the directory to put in front of PATH.
pub(crate) fn prepare(dir: &Path, pageferry: &Path, settings: &Settings) -> Result<PathBuf> {
    let bin = dir.join(BIN);
    fs::create_dir_all(&bin).map_err(|error| Error::file("make the directory", &bin, error))?;
    records::write(&bin.join(SETTINGS), settings)?;
    let config = bin.join(CONFIG);
    let written = fs::write(&config, config_text(settings));
    written.map_err(|error| Error::file("write", &config, error))?;
    let script = bin.join("criu");
    let text = format!(
        "#!/bin/sh\nexec {} runtime-criu {} \"$@\"\n",
        hook::quoted(pageferry),
        hook::quoted(dir)
    );
    fs::write(&script, text)
        .and_then(|()| fs::set_permissions(&script, fs::Permissions::from_mode(0o700)))
        .map_err(|error| Error::file("write", &script, error))?;
    Ok(bin)
}

/// What CRIU takes from a file alone: by a request a lazy dump listens on all addresses.
fn config_text(settings: &Settings) -> String {
    // One that the user names is in force as well; what comes later wins.
    let mut text = std::env::var_os("CRIU_CONFIG_FILE")
        .and_then(|path| fs::read_to_string(path).ok())
        .unwrap_or_default();
    if matches!(settings.work, Work::DumpLazily { .. }) {
        text += "\naddress 127.0.0.1\n";
    }
    text
}

/// Becomes the real CRIU.
pub(crate) fn run(args: &Args) -> ExitCode {
    match wrap(args) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn wrap(args: &Args) -> Result<ExitCode> {
    let bin = args.dir.join(BIN);
    let settings: Settings = records::read(&bin.join(SETTINGS))?.ok_or_else(|| {
        let text = format!("{} is not a migration's directory", args.dir.display());
        Error::new(Kind::Usage, text)
    })?;
    let mut criu = Command::new(&settings.criu);
    criu.env("PATH", path_without(&bin));
    if let [word, number, rest @ ..] = args.words.as_slice()
        && word == "swrk"
        && let Some(number) = number.to_str().and_then(|number| number.parse().ok())
    {
        let client = Client::inherited(number)?;
        let socket = match client.peek() {
            Ok(Some(asked)) if asked.kind == settings.work.kind() => {
                relay(&args.dir, &settings, client)?
            }
            // Not understood here, or nothing to be changed.
            _ => Some(client.into_socket()),
        };
        let Some(socket) = socket else {
            return Ok(ExitCode::SUCCESS);
        };
        inherit(socket.as_fd())?;
        criu.arg("swrk")
            .arg(socket.as_raw_fd().to_string())
            .args(rest)
            .env("CRIU_CONFIG_FILE", bin.join(CONFIG));
        return Err(Error::file("start", &settings.criu, criu.exec()));
    }
    Err(Error::file(
        "start",
        &settings.criu,
        criu.args(&args.words).exec(),
    ))
}

/// PATH as it is outside of the migration: the CRIU may be the project's own, which looks there for the real one.
fn path_without(bin: &Path) -> OsString {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let others = std::env::split_paths(&path).filter(|dir| dir != bin);
    std::env::join_paths(others).unwrap_or(path)
}

/// Starts the process that passes messages on, and tells CRIU's socket; `None` in a process that has done
/// its work.
fn relay(dir: &Path, settings: &Settings, client: Client) -> Result<Option<OwnedFd>> {
    let asked = SwrkMessage::receive(client.as_fd())?
        .ok_or_else(|| Error::new(Kind::PeerLost, "the runtime has hung up"))?;
    let mut fields = asked.fields()?;
    let mut given = fields.message(request::OPTIONS).map_err(damaged)?;
    let runtime_listens = given.is_on(options::NOTIFY_SCRIPTS);
    lend_descriptors(&mut given, &client)?;
    change(&mut given, settings)?;
    fields.set_message(request::OPTIONS, &given);
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    let name = ProcessName::of(own);
    let name = name.map_err(|error| Error::wrap(Kind::Io, "cannot see this process", error))?;
    records::write(&dir.join(CRIU_PROCESS), &name)?;
    // The kernel notes this process as its maker, whose descriptors CRIU looks at.
    let (ours, theirs) = swrk::pair()?;
    let request = SwrkMessage {
        bytes: fields.encode(),
        descriptor: None,
    };
    request.send(ours.as_fd())?;
    let failed = |error| Error::wrap(Kind::Io, "cannot start the relay", error);
    match fork_single_threaded().map_err(failed)? {
        ForkResult::Parent { child } => {
            // The relay is no child of CRIU's: one whose end it does not expect would make its restore fail.
            waitpid(child, None).map_err(|errno| failed(errno.into()))?;
            Ok(Some(theirs))
        }
        ForkResult::Child => {
            drop(theirs);
            if let ForkResult::Child = fork_single_threaded().map_err(failed)? {
                let relay = Relay {
                    dir,
                    criu: ours,
                    runtime: client,
                    runtime_listens,
                    holds: settings.work.kind() == kind::RESTORE,
                };
                // The runtime and CRIU see that it is gone, and fail.
                let _ = relay.run();
            }
            Ok(None)
        }
    }
}

/// Opens what the request names by descriptors of the runtime's once more, for good: for CRIU this process is
/// the client.
fn lend_descriptors(given: &mut Fields, client: &Client) -> Result<()> {
    for field in [options::IMAGES_DIR_FD, options::WORK_DIR_FD] {
        let Some(number) = given.int(field).filter(|number| *number >= 0) else {
            continue;
        };
        let link = client.descriptor_link(number);
        let file = File::open(&link).map_err(|error| Error::file("open", &link, error))?;
        lend(given, field, file)?;
    }
    Ok(())
}

fn lend(given: &mut Fields, field: u32, file: File) -> Result<()> {
    inherit(file.as_fd())?;
    let file = OwnedFd::from(file);
    given.set(field, u64::try_from(file.as_raw_fd()).unwrap_or_default());
    // It is open until CRIU ends.
    std::mem::forget(file);
    Ok(())
}

fn change(given: &mut Fields, settings: &Settings) -> Result<()> {
    let server = |port: u16| {
        let mut server = Fields::default();
        server.set_text(options::PAGE_SERVER_ADDRESS, "127.0.0.1");
        server.set(options::PAGE_SERVER_PORT, u64::from(port));
        server
    };
    let (established, close) = match settings.tcp {
        TcpConnections::Refuse => (0, 0),
        TcpConnections::Established => (1, 0),
        TcpConnections::Close => (0, 1),
    };
    given.set(options::TCP_ESTABLISHED, established);
    given.set(options::TCP_CLOSE, close);
    match &settings.work {
        Work::DumpTo { port } => {
            given.set(options::LEAVE_RUNNING, 0);
            given.set(options::LEAVE_STOPPED, 1);
            given.set_message(options::PAGE_SERVER, &server(*port));
        }
        Work::DumpLazily { port, ready } => {
            given.set(options::LAZY_PAGES, 1);
            given.set_message(options::PAGE_SERVER, &server(*port));
            let mut open = File::options();
            // Whoever reads it may be gone: then opening fails instead of waiting.
            open.write(true).custom_flags(OFlag::O_NONBLOCK.bits());
            let file = open
                .open(ready)
                .map_err(|error| Error::file("open", ready, error))?;
            lend(given, options::STATUS_FD, file)?;
        }
        Work::Restore { lazily } => {
            given.set(options::LAZY_PAGES, u64::from(*lazily));
            given.set(options::NOTIFY_SCRIPTS, 1);
            if !lazily {
                given.set(options::LOG_LEVEL, LOG_WARNINGS.unsigned_abs().into());
            }
        }
    }
    for name in &settings.external {
        given.add_text(options::EXTERNAL, name);
    }
    inherit_outputs(given, &settings.lent)
}

/// Lets restored processes have what is lent to them, also where the runtime would give them its own output.
fn inherit_outputs(given: &mut Fields, lent: &[Lent]) -> Result<()> {
    if lent.is_empty() {
        return Ok(());
    }
    let before = given.messages(options::INHERIT_FD).map_err(damaged)?;
    given.remove(options::INHERIT_FD);
    let is_lent = |message: &Fields| {
        let key = message.bytes(options::INHERIT_FD_KEY).unwrap_or_default();
        lent.iter().any(|lent| lent.key.as_bytes() == key)
    };
    for message in before.iter().filter(|message| !is_lent(message)) {
        given.add_message(options::INHERIT_FD, message);
    }
    for Lent { key, path } in lent {
        let opened = File::options().append(true).open(path);
        let file = opened.map_err(|error| Error::file("open", path, error))?;
        inherit(file.as_fd())?;
        let file = OwnedFd::from(file);
        let mut message = Fields::default();
        message.set_text(options::INHERIT_FD_KEY, key);
        let number = u64::try_from(file.as_raw_fd()).unwrap_or_default();
        message.set(options::INHERIT_FD_NUMBER, number);
        given.add_message(options::INHERIT_FD, &message);
        // It is open until CRIU ends.
        std::mem::forget(file);
    }
    Ok(())
}

struct Relay<'a> {
    dir: &'a Path,
    criu: OwnedFd,
    runtime: Client,
    /// Whether the runtime asked for notifications itself.
    runtime_listens: bool,
    /// Whether a restored tree waits here.
    holds: bool,
}

impl Relay<'_> {
    /// Passes messages on until the answer.
    fn run(&self) -> Result<()> {
        while let Some(message) = SwrkMessage::receive(self.criu.as_fd())? {
            let fields = message.fields()?;
            if fields.int(response::KIND) != Some(kind::NOTIFY) {
                return message.send(self.runtime.as_fd());
            }
            let reply = self.runtimes_reply(&message)?;
            let notification = fields.message(response::NOTIFY).map_err(damaged)?;
            let stage = notification.bytes(response::STAGE).unwrap_or_default();
            let goes_on = match stage {
                _ if !self.holds => true,
                stage if stage == RESTORED.as_bytes() => hook::may_run(self.dir),
                stage if stage == RESUMED.as_bytes() => {
                    hook::notify_resumed(self.dir);
                    true
                }
                _ => true,
            };
            let reply = match goes_on {
                true => reply,
                false => refusal(),
            };
            reply.send(self.criu.as_fd())?;
        }
        Ok(())
    }

    fn runtimes_reply(&self, message: &SwrkMessage) -> Result<SwrkMessage> {
        if !self.runtime_listens {
            return Ok(verdict(true));
        }
        message.send(self.runtime.as_fd())?;
        // A runtime that is gone ends the work.
        SwrkMessage::receive(self.runtime.as_fd())?
            .ok_or_else(|| Error::new(Kind::PeerLost, "the runtime has hung up"))
    }
}

fn refusal() -> SwrkMessage {
    verdict(false)
}

/// The answer to a notification.
fn verdict(goes_on: bool) -> SwrkMessage {
    let mut fields = Fields::default();
    fields.set(request::KIND, u64::from(kind::NOTIFY.unsigned_abs()));
    fields.set(request::NOTIFY_SUCCESS, u64::from(goes_on));
    SwrkMessage {
        bytes: fields.encode(),
        descriptor: None,
    }
}

fn damaged(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::wrap(
        Kind::Protocol,
        "swrk: a request cannot be understood",
        error,
    )
}
