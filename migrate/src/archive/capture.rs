//! The volatile state: images of a stopped tree, whose memory a page-server has stored.
//!
//! The processes stand still from the dump on, until what is made of them is on the disk. Then they end or go on. If
//! anything fails they go on.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::{ContainerId, TcpConnections};
use pageferry::sys::owned_process::ProcessName;
use tokio::process::Command;

use crate::child::Program;
use crate::commands;
use crate::programs::Programs;
use crate::rounds::Tree;
use crate::runtime::criu_wrapper::{self, Settings, Work};
use crate::runtime::{Runtime, runtime_log};

/// How long page-server may take to listen.
const READY_LIMIT: Duration = Duration::from_secs(60);

/// Where page-server tells its port, in the work directory.
const PORT_FILE: &str = "page-server.port";

/// What is captured.
#[derive(Clone, Debug)]
pub(super) enum Target {
    /// A container, and its first process.
    Container(Runtime, ContainerId, i32),
    /// A tree by its root.
    Pid(i32),
}

impl Target {
    fn root(&self) -> i32 {
        match self {
            Target::Container(_, _, pid) | Target::Pid(pid) => *pid,
        }
    }
}

/// A tree that stands still. It goes on when this is dropped, unless it was ended.
#[derive(Debug)]
pub(super) struct Stopped {
    target: Target,
    /// Those of its processes that stood still before; `None` once it was ended.
    before: Option<Vec<ProcessName>>,
}

impl Stopped {
    /// Ends the processes: what was captured is what is left of them.
    pub(super) async fn end(mut self) -> Result<()> {
        match &self.target {
            Target::Container(runtime, id, _) => runtime.delete(id).await?,
            Target::Pid(root) => {
                for member in Tree::of(*root)?.members() {
                    // It may be gone with its parent.
                    let _ = member.name.signal(Signal::SIGKILL as i32);
                }
            }
        }
        self.before = None;
        Ok(())
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let Some(before) = &self.before else {
            return;
        };
        // Not those of before the freeze: a process may have been born since.
        let Ok(tree) = Tree::of(self.target.root()) else {
            return;
        };
        for member in tree.members() {
            if is_stopped(member.pid) && !before.contains(&member.name) {
                // One that has been killed needs nothing.
                let _ = member.name.signal(Signal::SIGCONT as i32);
            }
        }
    }
}

fn is_stopped(pid: i32) -> bool {
    let stat = procfs::process::Process::new(pid).and_then(|process| process.stat());
    stat.is_ok_and(|stat| stat.state == 'T')
}

/// Dumps the target into `images`. Logs and the like are in `work`. Both directories must be there.
pub(super) async fn capture(
    target: Target,
    programs: &Programs,
    images: &Path,
    work: &Path,
) -> Result<Stopped> {
    let mut server = Command::new(&programs.page_server);
    server.arg("-D").arg(images).arg("-W").arg(work);
    server.args([
        "--dedup-content",
        "-o",
        "page-server.log",
        "-v3",
        "--port",
        "0",
    ]);
    server.args(["--address", &Ipv4Addr::LOCALHOST.to_string()]);
    server.args(["--port-file", PORT_FILE]);
    let log = work.join("page-server.log");
    let mut server = Program::start_ready("page-server", &mut server, &log, READY_LIMIT).await?;
    let port = port(&work.join(PORT_FILE))?;
    let tree = Tree::of(target.root())?;
    let before = tree
        .members()
        .iter()
        .filter(|member| is_stopped(member.pid));
    let stopped = Stopped {
        before: Some(before.map(|member| member.name).collect()),
        target,
    };
    let dumped = dump(&stopped.target, programs, (images, work), port).await;
    if dumped.is_err() {
        server.terminate();
        server.end().await;
    }
    dumped?;
    server.succeed().await?;
    Ok(stopped)
}

async fn dump(
    target: &Target,
    programs: &Programs,
    (images, work): (&Path, &Path),
    port: u16,
) -> Result<()> {
    match target {
        Target::Container(runtime, id, _) => {
            let settings = Settings {
                criu: programs.criu.clone(),
                tcp: TcpConnections::Refuse,
                work: Work::DumpTo { port },
                external: Vec::new(),
                lent: Vec::new(),
            };
            let bin = criu_wrapper::prepare(work, &programs.pageferry, &settings)?;
            let mut command = runtime.checkpoint(id, images, &bin, true);
            let log = runtime_log(images);
            Program::start("the runtime's checkpoint", &mut command, &log)?
                .succeed()
                .await
        }
        Target::Pid(root) => {
            let mut command = commands::criu(
                programs,
                ("dump", images),
                commands::LOG_ALL,
                TcpConnections::Refuse,
            );
            command
                .args(["-t", &root.to_string(), "--leave-stopped", "--page-server"])
                .args(["--address", &Ipv4Addr::LOCALHOST.to_string()])
                .args(["--port", &port.to_string()]);
            let log = images.join("dump.log");
            Program::start("criu dump", &mut command, &log)?
                .succeed()
                .await
        }
    }
}

fn port(path: &Path) -> Result<u16> {
    let text = fs::read_to_string(path).map_err(|error| Error::file("read", path, error))?;
    let port = text.trim().parse();
    port.map_err(|error| Error::wrap(Kind::Io, format!("{} holds no port", path.display()), error))
}

/// A directory for what is not whole yet, beside `output`. It is removed on drop.
#[derive(Debug)]
pub(super) struct Unfinished(PathBuf);

impl Unfinished {
    pub(super) fn beside(output: &Path) -> Result<Unfinished> {
        let absolute = std::path::absolute(output);
        let absolute = absolute.map_err(|error| Error::file("find", output, error))?;
        let name = absolute
            .file_name()
            .ok_or_else(|| Error::new(Kind::Usage, format!("{} has no name", output.display())))?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}.unfinished", std::process::id()));
        let dir = absolute.with_file_name(hidden);
        fs::create_dir(&dir).map_err(|error| Error::file("create", &dir, error))?;
        let unfinished = Unfinished(dir);
        // Memory of processes is for their owner alone.
        let owner = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        fs::set_permissions(&unfinished.0, owner)
            .map_err(|error| Error::file("protect", &unfinished.0, error))?;
        Ok(unfinished)
    }

    /// A directory in it.
    pub(super) fn dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.0.join(name);
        fs::create_dir(&dir).map_err(|error| Error::file("create", &dir, error))?;
        Ok(dir)
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!("cannot remove {}: {error}", self.0.display());
        }
    }
}
