//! Containers whose process is a load: run, checkpointed and restored by a real runc.

use std::env;
use std::fs;
use std::net::SocketAddr;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::criu::Criu;
use crate::load::control::Control;
use crate::load::spec::LoadSpec;
use crate::process::{Spawned, run, tail};
use crate::test_dir::TestDir;
use crate::wait::GENEROUS;
use crate::workspace;

/// The load's directory within a container.
pub const LOAD_DIR: &str = "/load";

/// A name for a container that no other test has at the same time: runc names the control group by it, whatever the
/// directory of its state.
pub fn unique(name: &str) -> String {
    format!("{name}-{}", std::process::id())
}

/// A bundle and a runc with state of its own: containers are deleted on drop.
#[derive(Debug)]
pub struct Runc<'a> {
    criu: &'a Criu,
    bundle: PathBuf,
    state: PathBuf,
    control: Control,
    containers: Vec<String>,
}

impl Deref for Runc<'_> {
    type Target = Control;

    fn deref(&self) -> &Control {
        &self.control
    }
}

/// Whether the machine has a runc, and the iptables by which CRIU locks a container's network. (CRIU
/// can be told to skip that, but by a configuration file that makes CRIU 4.1.1 crash under runc.)
///
/// # Errors
/// One of them is missing.
pub fn find() -> Result<()> {
    for program in ["runc", "iptables-restore"] {
        run(Command::new(program).arg("--version")).context(program)?;
    }
    Ok(())
}

impl<'a> Runc<'a> {
    /// A bundle with `testload` as its program, made of `spec`, whose directory must be
    /// [`LOAD_DIR`].
    ///
    /// # Errors
    /// The bundle cannot be made.
    pub fn new(test_dir: &TestDir, criu: &'a Criu, spec: LoadSpec) -> Result<Runc<'a>> {
        let bundle = test_dir.path("bundle");
        let root = bundle.join("rootfs");
        if root.join("load").exists() {
            // What an earlier container of this bundle reported.
            fs::remove_dir_all(root.join("load"))?;
        }
        make_root(&root)?;
        let config = config(&serde_json::to_string(&spec)?);
        fs::write(bundle.join("config.json"), serde_json::to_vec(&config)?)?;
        let control = Control::new(spec, root.join("load"));
        let state = test_dir.path("runc-state");
        Ok(Runc {
            criu,
            bundle,
            state,
            control,
            containers: Vec::new(),
        })
    }

    fn command(&self, log: &Path) -> Result<Command> {
        let criu_dir = self
            .criu
            .path
            .parent()
            .context("criu without a directory")?;
        let path = env::var_os("PATH").unwrap_or_default();
        let dirs = std::iter::once(criu_dir.to_owned()).chain(env::split_paths(&path));
        let mut command = Command::new("runc");
        command
            .env("PATH", env::join_paths(dirs)?)
            .arg("--root")
            .arg(&self.state);
        command
            .arg("--log")
            .arg(log)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Ok(command)
    }

    /// Runs a runc command to its end. Its output goes nowhere: the container inherits it, and an
    /// open file of the host's would make its checkpoint fail.
    fn carry_out(&self, name: &str, images: Option<&Path>, args: &[&str]) -> Result<()> {
        let log = self.bundle.join(format!("runc-{name}.log"));
        let mut command = self.command(&log)?;
        command.arg(name);
        if let Some(images) = images {
            command
                .arg("--image-path")
                .arg(images)
                .arg("--work-path")
                .arg(images);
        }
        let mut runc = Spawned::start(&format!("runc {name}"), command.args(args), Some(log))?;
        let done = runc.succeed(GENEROUS).map(drop);
        done.with_context(|| {
            let criu_logs =
                ["dump.log", "restore.log"].map(|log| images.map(|dir| tail(&dir.join(log))));
            criu_logs.into_iter().flatten().collect::<String>()
        })
    }

    /// Runs a container and waits until its processes hold their memory.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(&mut self, id: &str) -> Result<()> {
        self.containers.push(id.to_owned());
        let bundle = self.bundle.clone();
        self.carry_out(
            "run",
            None,
            &["--detach", "--bundle", &bundle.to_string_lossy(), id],
        )?;
        self.control.wait_until_started(|| Ok(()))?;
        self.control.steer(self.pid(id)?)
    }

    /// Checkpoints a container, with its memory going to a page server.
    ///
    /// # Errors
    /// It fails.
    pub fn checkpoint_to(&self, id: &str, images: &Path, server: SocketAddr) -> Result<()> {
        self.carry_out(
            "checkpoint",
            Some(images),
            &["--page-server", &server.to_string(), id],
        )
    }

    /// Checkpoints a container and serves its memory at `address`, as soon as this returns.
    ///
    /// # Errors
    /// It fails before it serves.
    pub fn checkpoint_lazily(
        &self,
        id: &str,
        images: &Path,
        address: SocketAddr,
    ) -> Result<Spawned> {
        fs::create_dir_all(images)?;
        let log = self.bundle.join("runc-checkpoint.log");
        let mut command = self.command(&log)?;
        command
            .arg("checkpoint")
            .arg("--image-path")
            .arg(images)
            .arg("--work-path")
            .arg(images);
        command.args(["--lazy-pages", "--page-server", &address.to_string()]);
        // The container's name comes last, behind the option for readiness that the guard adds.
        Spawned::start_ready_before("runc checkpoint --lazy-pages", &mut command, log, &[id])
    }

    /// Restores a container from `images` under a new name.
    ///
    /// # Errors
    /// It fails.
    pub fn restore(&mut self, id: &str, images: &Path, lazily: bool) -> Result<()> {
        self.containers.push(id.to_owned());
        let bundle = self.bundle.to_string_lossy().into_owned();
        let lazy: &[&str] = if lazily { &["--lazy-pages"] } else { &[] };
        let args = [&["--detach", "--bundle", &bundle], lazy, &[id]].concat();
        self.carry_out("restore", Some(images), &args)?;
        self.control.steer(self.pid(id)?)
    }

    /// The bundle.
    pub fn bundle(&self) -> &Path {
        &self.bundle
    }

    /// The directory of runc's state.
    pub fn state_dir(&self) -> &Path {
        &self.state
    }

    /// A command of runc's that knows the containers.
    ///
    /// # Errors
    /// CRIU has no directory.
    pub fn runtime(&self, args: &[&str]) -> Result<Command> {
        let mut command = self.command(&self.bundle.join("runc-command.log"))?;
        command.args(args);
        Ok(command)
    }

    /// The host's pid of a container's first process.
    ///
    /// # Errors
    /// runc knows no such container.
    pub fn pid(&self, id: &str) -> Result<Pid> {
        let state = fs::read(self.state.join(id).join("state.json"))?;
        let state: Value = serde_json::from_slice(&state)?;
        let pid = state["init_process_pid"]
            .as_i64()
            .context("no pid in runc's state")?;
        Ok(Pid::from_raw(i32::try_from(pid)?))
    }

    /// Fails if runc still knows a container.
    ///
    /// # Errors
    /// It does.
    pub fn expect_gone(&self, id: &str) -> Result<()> {
        ensure!(
            !self.state.join(id).exists(),
            "container {id} is still there"
        );
        Ok(())
    }
}

impl Drop for Runc<'_> {
    fn drop(&mut self) {
        for id in self
            .containers
            .iter()
            .filter(|id| self.state.join(id).exists())
        {
            if let Err(error) = self.carry_out("delete", None, &["--force", id]) {
                eprintln!("deleting container {id}: {error:#}");
            }
        }
    }
}

/// Makes a root file system for containers whose program is `testload`.
///
/// # Errors
/// It cannot be written.
pub fn make_root(root: &Path) -> Result<()> {
    make_root_of(root, &workspace::binary("testload")?)
}

/// Makes a root file system for containers whose program is `program`.
///
/// # Errors
/// It cannot be written.
pub fn make_root_of(root: &Path, program: &Path) -> Result<()> {
    for dir in ["bin", "proc", "dev", "sys", "load"] {
        fs::create_dir_all(root.join(dir))?;
    }
    let name = program.file_name().context("a program has a name")?;
    fs::copy(program, root.join("bin").join(name))?;
    copy_libraries(program, root)
}

/// Copies the loader and the libraries of a program to the same places below `root`.
fn copy_libraries(program: &Path, root: &Path) -> Result<()> {
    let output = run(Command::new("ldd").arg(program))?;
    for word in String::from_utf8_lossy(&output.stdout).split_whitespace() {
        if let Some(relative) = word.strip_prefix('/') {
            let to = root.join(relative);
            fs::create_dir_all(to.parent().context("a library's directory")?)?;
            fs::copy(word, &to).with_context(|| word.to_owned())?;
        }
    }
    Ok(())
}

/// A bundle's config.json for a `testload` made of `spec`: namespaces of its own, no terminal, no limits.
pub fn config(spec: &str) -> Value {
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": kind, "options": options});
    let namespaces = ["pid", "network", "ipc", "uts", "mount"].map(|kind| json!({"type": kind}));
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/testload", "--spec", spec],
            "env": ["PATH=/bin"],
            "cwd": "/",
        },
        "root": {"path": "rootfs", "readonly": false},
        "hostname": "ferry",
        "mounts": [
            mount("/proc", "proc", &[]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        ],
        "linux": {
            "namespaces": namespaces,
        },
    })
}
