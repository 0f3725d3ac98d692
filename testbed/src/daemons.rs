//! Transport daemons of either make: started alike, judged alike.
//!
//! ```text
//!   PageServer   criu page-server [--lazy-pages]   or   page-server [--lazy-pages]
//!   LazyDaemon   criu lazy-pages                   or   lazy-client
//!   Sink         stores whatever comes: what a page server costs without its protocol
//! ```

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::criu::Criu;
use crate::net::{NetNs, command_in, free_port};
use crate::orphan::Orphan;
use crate::process::Spawned;
use crate::recording::Recording;
use crate::sys::Ended;
use crate::wait::{self, GENEROUS};
use crate::workspace;

/// Who makes a daemon.
#[derive(Clone, Copy, Debug)]
pub enum Make<'a> {
    /// This workspace.
    Ours,
    /// A real CRIU.
    Criu(&'a Criu),
    /// Another build of this workspace, whose programs lie in this directory.
    Build(&'a Path),
}

impl Make<'_> {
    /// The daemon's program with its action word, which both makes understand.
    fn command(self, net: Option<&NetNs>, action: &str, ours: &str) -> Result<Command> {
        let mut command = match self {
            Make::Ours => command_in(net, workspace::daemon(ours)?),
            Make::Criu(criu) => command_in(net, &criu.path),
            Make::Build(dir) => command_in(net, dir.join(ours)),
        };
        command.arg(action);
        Ok(command)
    }
}

/// Where a daemon works, and what else it is told.
#[derive(Clone, Debug)]
pub struct Options<'a> {
    /// The image directory, made if it is missing.
    pub images: PathBuf,
    /// The network it runs in.
    pub net: Option<&'a NetNs>,
    /// The address to listen on.
    pub address: IpAddr,
    /// Further options, as on a command line.
    pub extra: Vec<String>,
    /// The log file's name within the image directory.
    pub log: &'static str,
    /// The port to listen on; a free one if none is given.
    pub port: Option<u16>,
}

impl<'a> Options<'a> {
    /// For `images`, on loopback.
    pub fn new(images: impl Into<PathBuf>) -> Options<'a> {
        Options {
            images: images.into(),
            net: None,
            address: Ipv4Addr::LOCALHOST.into(),
            extra: Vec::new(),
            log: "daemon.log",
            port: None,
        }
    }

    /// With further options.
    pub fn with(mut self, extra: &[&str]) -> Options<'a> {
        self.extra.extend(extra.iter().map(ToString::to_string));
        self
    }

    /// On the parent images in `dir`.
    pub fn on_parent(self, dir: &Path) -> Options<'a> {
        // CRIU makes the `parent` link with the path as it is given: it must hold from the images.
        self.with(&["--prev-images-dir", &dir.to_string_lossy()])
    }

    /// Logging to another file of the image directory.
    pub fn log_to(self, log: &'static str) -> Options<'a> {
        Options { log, ..self }
    }

    /// Listening on `port`.
    pub fn at_port(self, port: u16) -> Options<'a> {
        Options {
            port: Some(port),
            ..self
        }
    }

    /// In a network, at an address of it.
    pub fn at(self, net: &'a NetNs, address: IpAddr) -> Options<'a> {
        Options {
            net: Some(net),
            address,
            ..self
        }
    }

    fn apply(&self, command: &mut Command) -> Result<PathBuf> {
        fs::create_dir_all(&self.images)
            .with_context(|| format!("making {}", self.images.display()))?;
        command
            .arg("-D")
            .arg(&self.images)
            .args(["-o", self.log, "-v4"])
            .args(&self.extra);
        Ok(self.images.join(self.log))
    }
}

/// A page server that listens.
#[derive(Debug)]
pub struct PageServer {
    process: Spawned,
    address: SocketAddr,
}

impl PageServer {
    /// Starts one that receives a dump into the image directory.
    ///
    /// # Errors
    /// It does not come up; the error shows its log.
    pub fn receiving(make: Make<'_>, options: &Options<'_>) -> Result<PageServer> {
        PageServer::start(make, options, &[])
    }

    /// Starts one that serves the images in the directory.
    ///
    /// # Errors
    /// It does not come up; the error shows its log.
    pub fn serving(make: Make<'_>, options: &Options<'_>) -> Result<PageServer> {
        PageServer::start(make, options, &["--lazy-pages"])
    }

    /// Starts one of ours that receives a dump, and records what it does to files below `below`. What this needs goes to
    /// the directory `work`.
    ///
    /// # Errors
    /// There is no C compiler, or it does not come up; the error shows its log.
    pub fn recorded(
        options: &Options<'_>,
        below: &Path,
        work: &Path,
    ) -> Result<(PageServer, Recording)> {
        let mut recording = None;
        let server = PageServer::start_prepared(Make::Ours, options, &[], |command| {
            recording = Some(Recording::of(command, below, work)?);
            Ok(())
        })?;
        Ok((server, recording.context("it is recorded")?))
    }

    fn start(make: Make<'_>, options: &Options<'_>, role: &[&str]) -> Result<PageServer> {
        PageServer::start_prepared(make, options, role, |_| Ok(()))
    }

    fn start_prepared(
        make: Make<'_>,
        options: &Options<'_>,
        role: &[&str],
        prepare: impl FnOnce(&mut Command) -> Result<()>,
    ) -> Result<PageServer> {
        let mut command = make.command(options.net, "page-server", "page-server")?;
        command.args(role);
        let log = options.apply(&mut command)?;
        command.args(["--address", &options.address.to_string()]);
        let port_file = options.images.join("page-server.port");
        // CRIU refuses port 0.
        let port = match make {
            _ if options.port.is_some() => options.port,
            Make::Ours | Make::Build(_) => {
                command.args(["--port", "0", "--port-file"]).arg(&port_file);
                None
            }
            Make::Criu(_) => Some(free_port()?),
        };
        if let Some(port) = port {
            command.args(["--port", &port.to_string()]);
        }
        prepare(&mut command)?;
        let process = Spawned::start_ready("page-server", &mut command, log)?;
        let port = match port {
            Some(port) => port,
            None => read_port(&port_file)?,
        };
        Ok(PageServer {
            process,
            address: SocketAddr::new(options.address, port),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Spawned {
        &mut self.process
    }

    /// Waits until it has ended with success.
    ///
    /// # Errors
    /// It fails, or runs on; the error shows its log.
    pub fn finish(mut self, limit: Duration) -> Result<Ended> {
        self.process.succeed(limit)
    }
}

fn read_port(path: &Path) -> Result<u16> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let port = text.trim().parse();
    port.with_context(|| format!("port in {}", path.display()))
}

/// A process that writes what one connection brings into a file, and then ends.
#[derive(Debug)]
pub struct Sink {
    process: Spawned,
    address: SocketAddr,
}

impl Sink {
    /// Starts one on loopback.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start(file: &Path) -> Result<Sink> {
        let port_file = file.with_extension("port");
        let mut command = Command::new(workspace::binary("sink")?);
        command.arg(file).arg("--port-file").arg(&port_file);
        // It has no log: what goes wrong is on standard error.
        let log = file.with_extension("log");
        let process = Spawned::start_ready("the bare sink", &mut command, log)?;
        let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), read_port(&port_file)?);
        Ok(Sink { process, address })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Spawned {
        &mut self.process
    }
}

/// A daemon that fills the memory of restored processes.
#[derive(Debug)]
pub struct LazyDaemon {
    process: Spawned,
}

impl LazyDaemon {
    /// Starts one on the images in the directory, with the rest of the memory at `source`.
    ///
    /// # Errors
    /// It does not come up; the error shows its log.
    pub fn start(
        make: Make<'_>,
        options: &Options<'_>,
        source: Option<SocketAddr>,
    ) -> Result<LazyDaemon> {
        let mut command = make.command(options.net, "lazy-pages", "lazy-client")?;
        let log = options.apply(&mut command)?;
        if let Some(source) = source {
            let (address, port) = (source.ip().to_string(), source.port().to_string());
            command.args(["--page-server", "--address", &address, "--port", &port]);
        }
        let process = Spawned::start_ready("lazy-pages daemon", &mut command, log)?;
        Ok(LazyDaemon { process })
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Spawned {
        &mut self.process
    }

    /// Kills it, and waits until its standby process logs that it takes over.
    ///
    /// # Errors
    /// Nobody takes over; the error shows its log.
    pub fn kill_for_standby(&mut self) -> Result<Orphan> {
        let log = self.process.log().context("a log")?.to_owned();
        self.process.kill()?;
        let pid = wait::until("somebody to take over", GENEROUS, || {
            let log_text = fs::read_to_string(&log)?;
            let pid = log_text.split_once(", takes over");
            let pid = pid.and_then(|(before, _)| before.rsplit(' ').next());
            Ok(pid.map(str::to_owned))
        });
        let pid = pid.with_context(|| self.process.log_tail())?;
        Orphan::new(pid.parse()?)
    }

    /// Waits until it has filled everything and ended with success.
    ///
    /// # Errors
    /// It fails, or runs on; the error shows its log.
    pub fn finish(mut self, limit: Duration) -> Result<Ended> {
        self.process.succeed(limit)
    }
}
