//! A container with a small HTTP service, without state, that moves between two hosts; and clients that count its
//! answers.
//!
//! ```text
//! client: WebClients ──> routes (nft at the source, or HAProxy) ──> source or destination: the container, port 8080
//! ```

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

use crate::agent::{Agent, Move};
use crate::control_groups::ControlGroups;
use crate::criu::Criu;
use crate::net::{Host, NetNs};
use crate::net_three::ThreeHosts;
use crate::process::{Spawned, descendants, run};
use crate::runc::{self, make_root_of};
use crate::test_dir::TestDir;
use crate::wait::{self, GENEROUS};
use crate::workspace::binary;

/// The port of the service, on each host.
pub const PORT: u16 = 8080;

/// The container's name, on both hosts: see [`runc::unique`].
pub fn name() -> String {
    runc::unique("web")
}

/// Questions that are answered by 503 before the service is ready.
const WARM_UP: u32 = 3;

/// Between two questions of a client.
const PACE: Duration = Duration::from_millis(1);

/// Questions over one connection.
const ON_ONE_CONNECTION: u32 = 20;

/// How long a client waits for one answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// The hosts, and the container at the source. Everything ends on drop.
#[derive(Debug)]
pub struct Web {
    /// Ended before its groups are removed.
    pub agent: Agent,
    _groups: ControlGroups,
    /// The hosts' networks.
    pub three: ThreeHosts,
    bundle: PathBuf,
    state_here: PathBuf,
    state_there: PathBuf,
    agent_dir: PathBuf,
    source_dir: PathBuf,
    criu: Criu,
    runtime: &'static str,
    /// The last one to go.
    _root: Option<OverlayMount>,
}

/// An overlay on this machine, unmounted on drop.
#[derive(Debug)]
struct OverlayMount(PathBuf);

impl Drop for OverlayMount {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.0, MntFlags::MNT_DETACH) {
            eprintln!("unmounting {}: {error}", self.0.display());
        }
    }
}

impl Web {
    /// Both hosts, with the service in a container of `runtime` (runc, crun) at the source.
    ///
    /// # Errors
    /// Not root, no such runtime, or the container does not start.
    pub fn start(test_dir: &TestDir, criu: &Criu, runtime: &'static str) -> Result<Web> {
        Web::start_on(test_dir, criu, runtime, false)
    }

    /// The same, with a root that is an overlay if it is `layered`: of the layer below the file `gone` is deleted.
    ///
    /// # Errors
    /// As [`Web::start`]; or no overlay can be mounted.
    pub fn start_on(
        test_dir: &TestDir,
        criu: &Criu,
        runtime: &'static str,
        layered: bool,
    ) -> Result<Web> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let dir = test_dir.path(&format!("web-{}", MADE.fetch_add(1, Ordering::Relaxed)));
        let three = ThreeHosts::new()?;
        let bundle = dir.join("bundle");
        let rootfs = bundle.join("rootfs");
        fs::create_dir_all(&rootfs)?;
        let root = match layered {
            true => Some(mount_overlay(&dir, &rootfs)?),
            false => make_root_of(&rootfs, &binary("answers")?).map(|()| None)?,
        };
        fs::write(bundle.join("config.json"), config().to_string())?;
        let (agent_dir, state_there) = (dir.join("agent"), dir.join("runtime-there"));
        let options = ["--insecure", "--runtime-root"].map(str::to_owned);
        let options = [&options[..], &[state_there.display().to_string()]].concat();
        let groups = ControlGroups::new()?;
        let agent = Agent::start(&criu.path, &agent_dir, Some(&three.destination), &options)?;
        let init = agent.init()?;
        for pid in [vec![init], descendants(init)].concat() {
            groups.take(pid)?;
        }
        let web = Web {
            agent,
            _groups: groups,
            three,
            bundle,
            state_here: dir.join("runtime-here"),
            state_there,
            agent_dir,
            source_dir: dir.join("source"),
            criu: criu.clone(),
            runtime,
            _root: root,
        };
        let mut start = web.here(&["run", "--detach", "--bundle"]);
        start.arg(&web.bundle).arg(name()).stdout(Stdio::null());
        let log = dir.join("run.log");
        start.stderr(fs::File::create(&log)?);
        Spawned::start("the runtime", &mut start, Some(log))?.succeed(GENEROUS)?;
        web.wait_until_served(&web.three.source)?;
        // What is ready here must get ready there anew.
        for _ in 0..WARM_UP {
            let source = &web.three.source;
            let _ = source.net.enter(|| get(source.at(PORT), "/ready"));
        }
        Ok(web)
    }

    fn wait_until_served(&self, host: &Host) -> Result<()> {
        let at = host.at(PORT);
        wait::until("the service to answer", GENEROUS, || {
            Ok(self.three.client.enter(|| Ok(get(at, "/").ok()))?.map(drop))
        })
    }

    /// A command of the runtime's at the source.
    pub fn here(&self, args: &[&str]) -> Command {
        let mut command = self.three.source.net.command(self.runtime);
        command.arg("--root").arg(&self.state_here).args(args);
        command.stdin(Stdio::null());
        command
    }

    /// A command of the runtime's at the destination.
    ///
    /// # Errors
    /// The host is gone.
    pub fn there(&self, args: &[&str]) -> Result<Command> {
        let init = self.agent.init()?.to_string();
        let mut command = Command::new("nsenter");
        command.args(["--target", &init, "--pid", "--mount", "--net", "--"]);
        command
            .arg(self.runtime)
            .arg("--root")
            .arg(&self.state_there)
            .args(args);
        Ok(command)
    }

    /// A script of a shell's at the destination; what follows are its arguments.
    ///
    /// # Errors
    /// The host is gone.
    pub fn there_shell(&self, script: &str) -> Result<Command> {
        let init = self.agent.init()?.to_string();
        let mut command = Command::new("nsenter");
        command.args(["--target", &init, "--mount", "--"]);
        command.args(["sh", "-e", "-c", script, "sh"]);
        Ok(command)
    }

    /// What the runtime at the source says of the container; `None` if it knows none.
    ///
    /// # Errors
    /// It says something else.
    pub fn state_here(&self) -> Result<Option<Value>> {
        state(&mut self.here(&["state", &name()]))
    }

    /// The same at the destination.
    ///
    /// # Errors
    /// It says something else.
    pub fn state_there(&self) -> Result<Option<Value>> {
        state(&mut self.there(&["state", &name()])?)
    }

    /// A move without state, as the migration `id`.
    pub fn moves(&self, id: &'static str, options: &[&str]) -> Move<'_> {
        Move::new(&self.criu, self.source_dir.clone(), id)
            .in_net(&self.three.source.net)
            .with(&["--stateless"])
            .with(options)
    }

    /// Starts a move.
    ///
    /// # Errors
    /// The command cannot be started.
    pub fn start_move(&self, moves: &Move<'_>) -> Result<Spawned> {
        let root = self.state_here.display().to_string();
        let name = name();
        let subject = [
            "--container",
            &name,
            "--runtime",
            self.runtime,
            "--runtime-root",
            &root,
        ];
        moves.start_subject(&subject, &self.agent)
    }

    /// The bundle at the source.
    pub fn bundle(&self) -> &Path {
        &self.bundle
    }

    /// The root file system of the container at the source.
    pub fn rootfs(&self) -> PathBuf {
        self.bundle.join("rootfs")
    }

    /// The bundle of a move at the destination.
    pub fn bundle_there(&self, id: &str) -> PathBuf {
        self.agent_dir.join(id).join("bundle")
    }

    /// Fails unless the container runs at the destination alone.
    ///
    /// # Errors
    /// It does not.
    pub fn expect_moved(&self) -> Result<()> {
        let there = self.state_there()?.context("it is not there")?;
        ensure!(there["status"] == "running", "{there}");
        ensure!(self.state_here()?.is_none(), "it is still here");
        Ok(())
    }

    /// Fails unless the container runs at the source alone, and nothing of the migration `id` is at the destination.
    ///
    /// # Errors
    /// It does not.
    pub fn expect_here(&self, id: &str) -> Result<()> {
        let here = self.state_here()?.context("it is not here")?;
        ensure!(here["status"] == "running", "{here}");
        ensure!(self.state_there()?.is_none(), "it is there");
        ensure!(!self.bundle_there(id).exists(), "its bundle is there");
        Ok(())
    }
}

impl Drop for Web {
    fn drop(&mut self) {
        let is_here = self.state_here().is_ok_and(|state| state.is_some());
        if is_here && let Err(error) = run(&mut self.here(&["delete", "--force", &name()])) {
            eprintln!("deleting the container: {error:#}");
        }
    }
}

/// Mounts an overlay at `rootfs`, over a layer with the service.
fn mount_overlay(dir: &Path, rootfs: &Path) -> Result<OverlayMount> {
    let [lower, upper, work] = ["lower", "upper", "work"].map(|name| dir.join(name));
    make_root_of(&lower, &binary("answers")?)?;
    fs::write(lower.join("gone"), "of the layer")?;
    fs::create_dir_all(&upper)?;
    fs::create_dir_all(&work)?;
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        upper.display(),
        work.display()
    );
    let kind = Some("overlay");
    mount(kind, rootfs, kind, MsFlags::empty(), Some(options.as_str())).context("an overlay")?;
    let mounted = OverlayMount(rootfs.to_owned());
    fs::remove_file(rootfs.join("gone"))?;
    Ok(mounted)
}

fn state(command: &mut Command) -> Result<Option<Value>> {
    let output = command.output()?;
    match output.status.success() {
        true => Ok(Some(serde_json::from_slice(&output.stdout)?)),
        false => Ok(None),
    }
}

/// A container in the network of its host.
fn config() -> Value {
    let mount = |destination: &str, kind: &str| json!({"destination": destination, "type": kind, "source": kind});
    let namespaces = ["pid", "ipc", "uts", "mount"].map(|kind| json!({"type": kind}));
    let listen = format!("0.0.0.0:{PORT}");
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/answers", "--listen", listen, "--warm-up", WARM_UP.to_string()],
            "env": ["PATH=/bin"],
            "cwd": "/",
        },
        "root": {"path": "rootfs", "readonly": false},
        "hostname": "web",
        "mounts": [mount("/proc", "proc"), mount("/dev", "tmpfs")],
        "linux": {"namespaces": namespaces},
    })
}

/// Asks once, over a connection of its own.
fn get(at: SocketAddr, path: &str) -> Result<IpAddr> {
    let mut connection = Connection::begin(at)?;
    connection.ask(path, true)
}

/// A connection to the service.
struct Connection(BufReader<TcpStream>);

impl Connection {
    fn begin(at: SocketAddr) -> Result<Connection> {
        let stream = TcpStream::connect(at).context("connecting")?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        stream.set_nodelay(true)?;
        Ok(Connection(BufReader::new(stream)))
    }

    /// Asks, and tells who answers.
    fn ask(&mut self, path: &str, is_last: bool) -> Result<IpAddr> {
        let end = if is_last { "Connection: close\r\n" } else { "" };
        let question = format!("GET {path} HTTP/1.1\r\nHost: web\r\n{end}\r\n");
        self.0.get_mut().write_all(question.as_bytes())?;
        let (mut length, mut status) = (None, String::new());
        loop {
            let mut line = String::new();
            ensure!(self.0.read_line(&mut line)? > 0, "the connection has ended");
            if status.is_empty() {
                status.clone_from(&line);
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length: ") {
                length = Some(value.trim().parse::<usize>()?);
            }
            if line == "\r\n" {
                break;
            }
        }
        let mut body = vec![0; length.context("no length")?.min(1 << 16)];
        self.0.read_exact(&mut body)?;
        ensure!(status.starts_with("HTTP/1.1 200 "), "{status}");
        Ok(std::str::from_utf8(&body)?.parse()?)
    }
}

/// What clients have counted.
#[derive(Debug, Default)]
struct Counts {
    here: AtomicU64,
    there: AtomicU64,
    failed: AtomicU64,
    first_failure: Mutex<Option<String>>,
}

/// WebClients that ask all the time: one over a connection for each question, one over connections for several.
#[derive(Debug)]
pub struct WebClients {
    stop: Arc<AtomicBool>,
    counts: Arc<Counts>,
    threads: Vec<JoinHandle<()>>,
}

impl WebClients {
    /// WebClients from `net` at `at`, of a service that is at the host `here` or at another.
    ///
    /// # Errors
    /// There is no answer.
    pub fn start(net: &NetNs, at: SocketAddr, here: IpAddr) -> Result<WebClients> {
        let (stop, counts) = (Arc::<AtomicBool>::default(), Arc::<Counts>::default());
        let threads = [1, ON_ONE_CONNECTION].map(|questions| {
            let (stop, counts, enter) = (Arc::clone(&stop), Arc::clone(&counts), net.entrance());
            thread::spawn(move || {
                if let Err(error) = enter() {
                    return counts.fails(&error);
                }
                while !stop.load(Ordering::Relaxed) {
                    if let Err(error) = ask_over_one(at, here, questions, &counts) {
                        counts.fails(&error);
                    }
                }
            })
        });
        let clients = WebClients {
            stop,
            counts,
            threads: threads.into(),
        };
        clients.expect_answers()?;
        Ok(clients)
    }

    /// Waits for answers to questions that are asked from now on.
    ///
    /// # Errors
    /// A question failed, now or before.
    pub fn expect_answers(&self) -> Result<()> {
        let all = || self.here() + self.there();
        let enough = all() + u64::from(ON_ONE_CONNECTION) * 2;
        wait::until("answers", GENEROUS, || {
            self.expect_no_failure()?;
            Ok((all() >= enough).then_some(()))
        })
    }

    /// Answers of the first host.
    pub fn here(&self) -> u64 {
        self.counts.here.load(Ordering::Relaxed)
    }

    /// Answers of others.
    pub fn there(&self) -> u64 {
        self.counts.there.load(Ordering::Relaxed)
    }

    /// Questions without a good answer.
    pub fn failed(&self) -> u64 {
        self.counts.failed.load(Ordering::Relaxed)
    }

    /// Fails if a question was not answered well.
    ///
    /// # Errors
    /// It was not.
    pub fn expect_no_failure(&self) -> Result<()> {
        let first = self.counts.first_failure.lock();
        match &*first.unwrap_or_else(PoisonError::into_inner) {
            None => Ok(()),
            Some(first) => {
                let (failed, here, there) = (self.failed(), self.here(), self.there());
                bail!("{failed} questions failed ({here} answers here, {there} there): {first}")
            }
        }
    }
}

impl Drop for WebClients {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Counts {
    fn fails(&self, error: &anyhow::Error) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        let mut first = self
            .first_failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert_with(|| format!("{error:#}"));
    }
}

/// Asks so many questions over one connection.
fn ask_over_one(at: SocketAddr, here: IpAddr, questions: u32, counts: &Counts) -> Result<()> {
    let mut connection = Connection::begin(at)?;
    for left in (0..questions).rev() {
        let asked = Instant::now();
        let by = connection.ask("/", left == 0)?;
        let count = if by == here {
            &counts.here
        } else {
            &counts.there
        };
        count.fetch_add(1, Ordering::Relaxed);
        thread::sleep(PACE.saturating_sub(asked.elapsed()));
    }
    Ok(())
}
