//! Becoming a process like CRIU's daemons: directories, log, background, readiness.
//!
//! ```text
//! command_line::parse -> run                  work directory, log file, exit code; inside it
//!                        (bind the socket)
//!                     -> Daemon::listening    fork, pidfile, sandbox, status byte, log thread
//!                        (serve)
//! ```
//!
//! Invariants: nobody is told that the process is ready before its socket listens; with `--daemon`
//! the first process ends with 0 only after the pidfile is there and the background process goes on;
//! no thread is started before the fork.

pub mod command_line;
pub mod config_file;
mod criu_options;
mod log;
mod pidfile;
pub mod sandbox;
pub mod settings;
pub mod swrk;
pub mod version;

use std::ffi::CStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{ArgAction, Args};
use nix::sys::prctl::set_name;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{ForkResult, Pid, dup2_stderr, dup2_stdin, dup2_stdout, setsid};

use crate::engine::io::transport::parse_host;
use crate::engine::service_manager::ServiceManager;
use crate::error::{Error, Kind, Result};
use crate::sys::process::{fork_single_threaded, inherited_descriptor};
use command_line::Diagnostics;
use log::{Log, VERBOSITY_DEFAULT};
use sandbox::{Mode, Needs, Process};

/// The options that both daemons share with each other and with CRIU.
#[derive(Args, Clone, Debug)]
pub struct CommonArgs {
    /// Directory of the image files
    #[arg(
        help_heading = "Files and log",
        short = 'D',
        long,
        value_name = "DIR",
        default_value = "."
    )]
    pub images_dir: PathBuf,

    /// Directory of log, pidfile and other files of the run [default: images directory]
    #[arg(help_heading = "Files and log", short = 'W', long, value_name = "DIR")]
    pub work_dir: Option<PathBuf>,

    /// Address of the page server (IPv4, IPv6 or a name)
    #[arg(help_heading = "Network", long, value_name = "ADDR", value_parser = parse_host)]
    pub address: Option<String>,

    /// Port of the page server
    #[arg(help_heading = "Network", long, value_name = "PORT")]
    pub port: Option<u16>,

    /// Go to the background once the socket listens
    #[arg(
        help_heading = "Running",
        short = 'd',
        long,
        alias = "restore-detached"
    )]
    pub daemon: bool,

    /// With --daemon: write the background process's pid to FILE
    ///
    /// FILE is in the work directory.
    #[arg(help_heading = "Files and log", long, value_name = "FILE")]
    pub pidfile: Option<PathBuf>,

    /// Write one zero byte to FD and close it once the socket listens
    #[arg(help_heading = "Running", long, value_name = "FD")]
    pub status_fd: Option<RawFd>,

    /// Log to FILE in the work directory; - is standard output [default: standard error]
    #[arg(help_heading = "Files and log", short = 'o', long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,

    /// What to log: 0 nothing, 1 errors, 2 warnings, 3 information, 4 debug
    ///
    /// From 3 on lines have timestamps. Each v is one more: -vv is 4.
    #[arg(help_heading = "Files and log", short = 'v', long, value_name = "NUM", action = ArgAction::Set, default_value_t = VERBOSITY_DEFAULT)]
    pub verbosity: u32,

    /// What to give up after the start: files of others, capabilities, system calls
    ///
    /// What that leaves each program, and why, stands in docs/security.md.
    #[arg(help_heading = "Running", long, value_enum, default_value_t = Mode::Auto, value_name = "WHICH")]
    pub sandbox: Mode,

    /// Try what the sandbox must refuse, tell it on standard output, and end
    #[arg(long, hide = true)]
    pub sandbox_check: bool,
}

impl CommonArgs {
    /// The work directory, where files that options name are looked for.
    pub fn work_dir(&self) -> &Path {
        self.work_dir.as_ref().unwrap_or(&self.images_dir)
    }
}

/// A process in its work directory with its log open.
#[derive(Debug)]
pub struct Daemon {
    images_dir: PathBuf,
    log: Log,
    background: bool,
    pidfile: Option<PathBuf>,
    status: Option<OwnedFd>,
    /// Who has started this process, if that is to be told.
    manager: Option<ServiceManager>,
    sandbox: Mode,
    /// What this process needs when it is ready, if it gives up the rest.
    needs: Option<Needs>,
    /// The sandbox is tried, and nothing else done.
    check: bool,
}

/// Runs `body` as a daemon that was started with `args`, and turns its result into an exit code. An
/// error goes to the log, and to standard error as well if that is another place.
pub fn run(
    args: &CommonArgs,
    diagnostics: &Diagnostics,
    body: impl FnOnce(&mut Daemon) -> Result<()>,
) -> ExitCode {
    end_on_panic();
    let mut daemon = match Daemon::enter(args, diagnostics) {
        Ok(daemon) => daemon,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = body(&mut daemon);
    daemon.notify_manager("STOPPING=1");
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            if args.log_file.is_some() {
                eprintln!("error: {error}");
            }
            ExitCode::FAILURE
        }
    }
}

/// From now on a panic in any thread ends this process by SIGABRT, in every build: whoever waits for what that thread
/// was to do would wait for ever. The peers see broken connections, and a standby takes over.
pub fn end_on_panic() {
    let print_panic = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print_panic(panic);
        std::process::abort();
    }));
}

impl Daemon {
    /// Enters the work directory and opens the log there, as `args` say, and logs the `diagnostics`.
    fn enter(args: &CommonArgs, diagnostics: &Diagnostics) -> Result<Daemon> {
        let images_dir = existing_dir(&args.images_dir, "images directory (-D)")?;
        let work_dir = match &args.work_dir {
            Some(dir) => existing_dir(dir, "work directory (-W)")?,
            None => images_dir.clone(),
        };
        let status = args.status_fd.map(status_descriptor).transpose()?;
        std::env::set_current_dir(&work_dir)
            .map_err(|error| Error::file("enter", &work_dir, error))?;
        if let Some(path) = args.pidfile.as_deref().filter(|_| args.daemon) {
            pidfile::check(path)?;
        }
        let log = Log::start(args.log_file.as_deref(), args.verbosity)?;
        raise_descriptor_limit();
        for option in &diagnostics.skipped {
            tracing::warn!("{option} is an option of CRIU that has no effect here: ignored");
        }
        for warning in &diagnostics.warnings {
            tracing::warn!("{warning}");
        }
        for note in &diagnostics.notes {
            tracing::info!("{note}");
        }
        Ok(Daemon {
            images_dir,
            log,
            background: args.daemon,
            pidfile: args.pidfile.clone(),
            status,
            manager: ServiceManager::of_environment(),
            sandbox: args.sandbox,
            needs: None,
            check: args.sandbox_check,
        })
    }

    fn notify_manager(&self, state: &str) {
        if let Some(manager) = &self.manager
            && let Err(error) = manager.notify(state)
        {
            tracing::warn!("cannot reach the service manager: {error}");
        }
    }

    /// The images directory as an absolute path, wherever the work directory is.
    pub fn images_dir(&self) -> &Path {
        &self.images_dir
    }

    /// How much of a sandbox is asked for.
    pub fn sandbox(&self) -> Mode {
        self.sandbox
    }

    /// When it is ready this process gives up everything but `needs`.
    pub fn confine(&mut self, needs: Needs) {
        self.needs = Some(needs);
    }

    /// Tells the world that the socket listens. With `--daemon` only the background process returns
    /// from here; the first one exits with 0 when the other is on its own.
    ///
    /// # Errors
    ///
    /// The fork, the pidfile or the status descriptor failed. Then no background process is left.
    pub fn listening(&mut self) -> Result<()> {
        if self.background
            && let Some(child) = fork_waiting(Forked::Background)?
        {
            if let Some(pidfile) = &self.pidfile {
                pidfile::create(pidfile, child.pid())?;
            }
            child.release()?;
            std::process::exit(0)
        }
        self.ready()
    }

    /// This is a second process that stands by: the first one tells the world. It gives up everything but `needs`.
    /// `name` is its own in lists of processes.
    ///
    /// # Errors
    ///
    /// The kernel lacks a part of the sandbox that is required.
    pub fn stand_by(&mut self, name: &CStr, needs: &Needs) -> Result<()> {
        self.status = None;
        self.manager = None;
        // Once given up, nothing can be given up again: not even what gives it up is allowed then.
        self.needs = None;
        // Who looks for the program by its name means the first one. Without the name it works as well.
        let _ = set_name(name);
        sandbox::enter(self.sandbox, needs, Process::Beside)
    }

    /// This process takes the first one's place: its pid is in the pidfile from now on, and the log has its
    /// thread.
    pub fn take_over(&mut self) -> Result<()> {
        let pidfile = self.pidfile.as_ref().filter(|_| self.background);
        let written = pidfile.map_or(Ok(()), |pidfile| pidfile::replace(pidfile, Pid::this()));
        self.ready().and(written)
    }

    /// Tells the world that the socket listens, from the process that will serve it: enters the sandbox, starts the
    /// log's thread and writes the status byte.
    pub fn ready(&mut self) -> Result<()> {
        if let Some(needs) = self.needs.take() {
            sandbox::enter(self.sandbox, &needs, Process::Main)?;
        }
        if self.check {
            sandbox::check::print(&self.images_dir);
            std::process::exit(0);
        }
        self.log.hand_over()?;
        if let Some(status) = self.status.take() {
            File::from(status).write_all(&[0]).map_err(|error| {
                let text = "cannot write to the descriptor of --status-fd";
                Error::wrap(Kind::Io, text, error)
            })?;
        }
        self.notify_manager("READY=1");
        Ok(())
    }
}

/// A forked process that waits for permission to go on. Without it, when this is dropped, it ends with 1.
#[derive(Debug)]
pub struct WaitingChild {
    pid: Pid,
    socket: UnixStream,
}

impl WaitingChild {
    /// Its pid.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Lets it go on.
    pub fn release(mut self) -> Result<()> {
        let given = self.socket.write_all(b"g");
        given.map_err(|error| failed("let the forked process go on", error))
    }
}

/// What a forked process is to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Forked {
    /// A child like any other.
    Child,
    /// In the background: with a session of its own, as CRIU's, so that the pid of the pidfile is
    /// also that of the session, and without the terminal.
    Background,
}

/// Forks. The parent gets the child, which is what it is to be already, and waits until
/// [`WaitingChild::release`]; the child gets `None`.
pub fn fork_waiting(kind: Forked) -> Result<Option<WaitingChild>> {
    let pair = UnixStream::pair().map_err(|error| failed("make a socket pair", error))?;
    let (mut ours, mut theirs) = pair;
    match fork_single_threaded().map_err(|error| failed("fork", error))? {
        ForkResult::Parent { child } => {
            drop(theirs);
            let ready = ours.read_exact(&mut [0]);
            ready.map_err(|error| failed("start the forked process", error))?;
            Ok(Some(WaitingChild {
                pid: child,
                socket: ours,
            }))
        }
        ForkResult::Child => {
            drop(ours);
            let ready = become_forked(kind, &mut theirs);
            if ready.is_err() || theirs.read_exact(&mut [0]).is_err() {
                // The parent knows, or has failed and said why.
                std::process::exit(1)
            }
            Ok(None)
        }
    }
}

fn become_forked(kind: Forked, parent: &mut UnixStream) -> std::io::Result<()> {
    if kind == Forked::Background {
        setsid()?;
        let null = File::options().read(true).write(true).open("/dev/null")?;
        dup2_stdin(&null)?;
        dup2_stdout(&null)?;
        dup2_stderr(&null)?;
    }
    parent.write_all(b"r")
}

fn failed(what: &str, error: impl Into<std::io::Error>) -> Error {
    Error::wrap(Kind::Io, format!("cannot {what}"), error.into())
}

fn existing_dir(dir: &Path, what: &str) -> Result<PathBuf> {
    let metadata = std::fs::metadata(dir)
        .map_err(|error| Error::file(&format!("use the {what}"), dir, error))?;
    if !metadata.is_dir() {
        return Err(Error::new(
            Kind::Usage,
            format!("the {what} {} is not a directory", dir.display()),
        ));
    }
    std::path::absolute(dir).map_err(|error| Error::file(&format!("find the {what}"), dir, error))
}

fn status_descriptor(number: RawFd) -> Result<OwnedFd> {
    inherited_descriptor(number).map_err(|error| {
        Error::wrap(
            Kind::Usage,
            format!("--status-fd {number} is not an open descriptor"),
            error,
        )
    })
}

/// Allows as many descriptors as may be: each process of a large tree takes some, for its userfaultfd
/// and its pages files.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(errno) = raised {
        tracing::warn!("cannot raise the limit of open files: {errno}");
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};

    use super::*;

    /// Says to this test that it is the process that panics.
    const PANICS: &str = "PAGEFERRY_TEST_PANICS";

    #[test]
    fn a_panic_in_any_thread_ends_the_process() {
        if std::env::var_os(PANICS).is_some() {
            end_on_panic();
            let _ = std::thread::spawn(|| panic!("a mistake")).join();
            return;
        }
        let name = "daemon::tests::a_panic_in_any_thread_ends_the_process";
        let mut again = Command::new(std::env::current_exe().unwrap());
        again
            .args(["--exact", name, "--nocapture"])
            .env(PANICS, "1");
        let status = again.stdout(Stdio::null()).stderr(Stdio::null()).status();
        assert_eq!(status.unwrap().signal(), Some(libc::SIGABRT));
    }
}
