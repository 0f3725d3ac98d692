//! The steps of a migration, carried out by a real CRIU: dump and restore.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::Pid;

use crate::criu::Criu;
use crate::daemons::{Make, Options, PageServer};
use crate::net::{NetNs, command_in};
use crate::process::{Spawned, descendants, kill_and_reap, tail};
use crate::proxy::{Direction, Link, Proxy};
use crate::sys::Ended;
use crate::wait::{self, GENEROUS};
use crate::workspace;

/// A dump to be made.
#[derive(Clone, Debug)]
pub struct Dump<'a> {
    criu: &'a Criu,
    pid: Pid,
    images: PathBuf,
    net: Option<&'a NetNs>,
    extra: Vec<String>,
}

impl<'a> Dump<'a> {
    /// Of the process tree under `pid`, with images in `images`.
    pub fn new(criu: &'a Criu, pid: Pid, images: impl Into<PathBuf>) -> Dump<'a> {
        Dump {
            criu,
            pid,
            images: images.into(),
            net: None,
            extra: Vec::new(),
        }
    }

    /// Memory goes to the page server at `address`.
    pub fn to(self, address: SocketAddr) -> Dump<'a> {
        let (ip, port) = (address.ip().to_string(), address.port().to_string());
        self.with(&["--page-server", "--address", &ip, "--port", &port])
    }

    /// The processes run on afterwards.
    pub fn leave_running(self) -> Dump<'a> {
        self.with(&["--leave-running"])
    }

    /// Runs in a network.
    pub fn in_net(self, net: &'a NetNs) -> Dump<'a> {
        Dump {
            net: Some(net),
            ..self
        }
    }

    /// With further options.
    pub fn with(mut self, extra: &[&str]) -> Dump<'a> {
        self.extra.extend(extra.iter().map(ToString::to_string));
        self
    }

    fn command(&self) -> Result<std::process::Command> {
        fs::create_dir_all(&self.images)?;
        let mut command = command_in(self.net, &self.criu.path);
        command
            .args(["dump", "-t", &self.pid.to_string(), "-D"])
            .arg(&self.images);
        command
            .args(["-o", "dump.log", "-v4"])
            .args(&self.extra)
            .stdout(Stdio::null());
        Ok(command)
    }

    /// Starts the dump; it may end in any way.
    ///
    /// # Errors
    /// CRIU cannot be started.
    pub fn start(&self) -> Result<Spawned> {
        Spawned::start(
            "criu dump",
            &mut self.command()?,
            Some(self.images.join("dump.log")),
        )
    }

    /// Carries the dump out.
    ///
    /// # Errors
    /// It fails; the error shows its log.
    pub fn run(&self) -> Result<Ended> {
        self.start()?.succeed(GENEROUS)
    }

    /// Carries the dump out with its memory going to `server`, which ends then.
    ///
    /// # Errors
    /// The dump or the server fails; the error shows its log.
    pub fn received_by(self, server: PageServer) -> Result<()> {
        self.to(server.address()).run()?;
        server.finish(GENEROUS).map(drop)
    }

    /// The same through a page server of ours at the source, which works in the directory `forwarder`.
    ///
    /// # Errors
    /// The dump or a server fails; the error shows its log.
    pub fn forwarded_to(self, server: PageServer, forwarder: &Path) -> Result<()> {
        let to = server.address().to_string();
        let options = Options::new(forwarder).with(&["--forward", &to]);
        self.received_by(PageServer::receiving(Make::Ours, &options)?)?;
        server.finish(GENEROUS).map(drop)
    }

    /// Begins to dump to the page server at `server` over `link`, and kills CRIU once `bytes` bytes
    /// have gone there.
    ///
    /// # Errors
    /// CRIU ends before.
    pub fn kill_half_way(self, server: SocketAddr, link: Link, bytes: u64) -> Result<()> {
        let proxy = Proxy::start(server, link, None)?;
        let mut dump = self.to(proxy.address()).start()?;
        wait::until("half of the dump", GENEROUS, || {
            if let Some(ended) = dump.ended()? {
                bail!("the dump is over: {}{}", ended.status, dump.log_tail());
            }
            Ok((proxy.carried(Direction::ToServer) > bytes).then_some(()))
        })?;
        dump.kill().map(drop)
    }

    /// Dumps all but the private memory, and waits until the rest is served at `address`.
    ///
    /// Needs [`crate::pipes::LargePipes`].
    ///
    /// # Errors
    /// CRIU fails before it listens; the error shows its log.
    pub fn serve_lazily(self, address: SocketAddr) -> Result<Spawned> {
        let (ip, port) = (address.ip().to_string(), address.port().to_string());
        let lazily = self.with(&["--lazy-pages", "--address", &ip, "--port", &port]);
        let log = lazily.images.join("dump.log");
        Spawned::start_ready("criu dump --lazy-pages", &mut lazily.command()?, log)
    }
}

/// Restored processes, in a PID namespace of their own: killed on drop.
#[derive(Debug)]
pub struct Restored {
    namespace: Spawned,
    record: PathBuf,
    log: PathBuf,
}

/// A restore to be made.
#[derive(Clone, Debug)]
pub struct Restore<'a> {
    criu: &'a Criu,
    images: PathBuf,
    net: Option<&'a NetNs>,
    foreground: bool,
    extra: Vec<String>,
}

impl<'a> Restore<'a> {
    /// From `images`.
    pub fn new(criu: &'a Criu, images: impl Into<PathBuf>) -> Restore<'a> {
        Restore {
            criu,
            images: images.into(),
            net: None,
            foreground: false,
            extra: Vec::new(),
        }
    }

    /// CRIU stays until the restored processes end.
    pub fn in_the_foreground(self) -> Restore<'a> {
        Restore {
            foreground: true,
            ..self
        }
    }

    /// Memory comes later, from the lazy-pages daemon that works in the same image directory.
    pub fn lazily(self) -> Restore<'a> {
        self.with(&["--lazy-pages"])
    }

    /// Runs in a network.
    pub fn in_net(self, net: &'a NetNs) -> Restore<'a> {
        Restore {
            net: Some(net),
            ..self
        }
    }

    /// With further options.
    pub fn with(mut self, extra: &[&str]) -> Restore<'a> {
        self.extra.extend(extra.iter().map(ToString::to_string));
        self
    }

    /// Starts the restore; it may end in any way.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(&self) -> Result<Restored> {
        let record = self.images.join("restored.txt");
        let log = self.images.join("restore.log");
        if record.exists() {
            fs::remove_file(&record)?;
        }
        let mut command = command_in(self.net, "unshare");
        command.args(["--pid", "--mount", "--fork", "--mount-proc", "--"]);
        command
            .arg(workspace::binary("nsinit")?)
            .arg("--record")
            .arg(&record)
            .arg("--");
        command
            .arg(&self.criu.path)
            .args(["restore", "-D"])
            .arg(&self.images)
            .args(["-o", "restore.log", "-v4"])
            .args(&self.extra);
        if !self.foreground {
            command.arg("--restore-detached");
        }
        // What `unshare` and CRIU say before they have a log.
        let console = File::create(self.images.join("restore-console.log"))?;
        command.stdout(Stdio::null()).stderr(console);
        let namespace = Spawned::start("criu restore", &mut command, Some(log.clone()))?;
        Ok(Restored {
            namespace,
            record,
            log,
        })
    }

    /// Restores, and waits until the processes run.
    ///
    /// # Errors
    /// It fails; the error shows its log.
    pub fn run(&self) -> Result<Restored> {
        let mut restored = self.start()?;
        restored.wait_until_resumed(GENEROUS)?;
        Ok(restored)
    }
}

impl Restored {
    /// Waits until CRIU says that the processes run.
    ///
    /// # Errors
    /// The restore fails, or takes longer than `limit`; the error shows its log.
    pub fn wait_until_resumed(&mut self, limit: Duration) -> Result<()> {
        let outcome = wait::until("the restore", limit, || {
            let over = self.namespace.ended()?.is_some();
            match self.how_ended("restore") {
                None if over => bail!("the namespace of the restore is gone"),
                outcome => Ok(outcome),
            }
        });
        let outcome = outcome.with_context(|| tail(&self.log))?;
        ensure!(
            outcome == "exited 0",
            "criu restore {outcome}{}",
            tail(&self.log)
        );
        Ok(())
    }

    /// How a process (its pid in the namespace) or the `restore` ended: "exited 0", "killed SIGBUS".
    pub fn how_ended(&self, who: &str) -> Option<String> {
        let record = fs::read_to_string(&self.record).ok()?;
        // A line without its end is still being written.
        let whole = record
            .split_inclusive('\n')
            .filter_map(|line| line.strip_suffix('\n'));
        let find = |line: &str| Some(line.strip_prefix(who)?.strip_prefix(' ')?.to_owned());
        whole.rev().find_map(find)
    }

    /// Waits for the end of a process of the namespace.
    ///
    /// # Errors
    /// It lives on beyond `limit`.
    pub fn wait_for_end(&self, pid: u32, limit: Duration) -> Result<String> {
        wait::until(&format!("the end of {pid}"), limit, || {
            Ok(self.how_ended(&pid.to_string()))
        })
    }

    /// Pids of the namespace's processes as the harness sees them, its process 1 first.
    pub fn pids(&self) -> Vec<Pid> {
        descendants(self.namespace.pid())
    }

    /// Process 1 of the namespace.
    ///
    /// # Errors
    /// The namespace is gone.
    pub fn init(&self) -> Result<Pid> {
        let init = self.pids().first().copied();
        init.context("the namespace of the restored processes is gone")
    }

    /// The log of the restore.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Kills all restored processes.
    pub fn kill(&mut self) {
        // The death of its process 1 ends a PID namespace, and then `unshare` ends by itself.
        if let Ok(init) = self.init() {
            kill_and_reap(&[init]);
        }
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        self.kill();
        let _ = self.namespace.wait_undisturbed();
    }
}
