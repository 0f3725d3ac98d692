//! A destination host for whole migrations: a `pageferry agent` in a PID namespace of its own, for
//! restored processes come back under pids that are taken outside.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::Pid;
use serde_json::Value;

use crate::criu::Criu;
use crate::load::Load;
use crate::net::{Host, NetNs, command_in};
use crate::process::{Spawned, descendants, kill_and_reap};
use crate::schema;
use crate::test_dir::TestDir;
use crate::wait::{self, GENEROUS};
use crate::workspace;

/// A running agent, and all that it has restored: ended on drop.
#[derive(Debug)]
pub struct Agent {
    namespace: Spawned,
    /// The agent that took the place of the first one, in the same namespaces.
    again: Option<Spawned>,
    criu: PathBuf,
    address: SocketAddr,
    dir: PathBuf,
    options: Vec<String>,
}

impl Agent {
    /// Starts one at loopback, with `criu`, in the directory `name` of a test.
    ///
    /// # Errors
    /// That of [`Agent::start`].
    pub fn in_test(test_dir: &TestDir, criu: &Criu, name: &str) -> Result<Agent> {
        Agent::start(&criu.path, &test_dir.path(name), None, &[])
    }

    /// Starts one that works in `dir`, with `criu` and further options, at loopback or on `host`.
    ///
    /// # Errors
    /// It does not listen; the error shows its log.
    pub fn start(criu: &Path, dir: &Path, host: Option<&Host>, extra: &[String]) -> Result<Agent> {
        fs::create_dir_all(dir)?;
        // Beside it: a directory that is full must not disturb what watches the agent.
        let notes = dir.with_extension("host");
        fs::create_dir_all(&notes)?;
        let port_file = notes.join("port.json");
        let log = notes.join("agent.log");
        let address = host.map_or(IpAddr::from(Ipv4Addr::LOCALHOST), |host| host.address);
        let net: Option<&NetNs> = host.map(|host| &host.net);
        let mut command = command_in(net, "unshare");
        command.args(["--pid", "--mount", "--fork", "--mount-proc", "--"]);
        command
            .arg(workspace::binary("nsinit")?)
            .arg("--stay")
            .arg("--record")
            .arg(notes.join("ends.txt"))
            .arg("--")
            .arg(workspace::binary("pageferry")?)
            .args(["agent", "--listen", &format!("{address}:0"), "--dir"])
            .arg(dir)
            .arg("--port-file")
            .arg(&port_file)
            .arg("--criu")
            .arg(criu)
            .args(extra)
            .stderr(fs::File::create(&log)?);
        let mut namespace = Spawned::start("pageferry agent", &mut command, Some(log))?;
        let port = wait::until("the agent to listen", GENEROUS, || {
            if let Some(ended) = namespace.ended()? {
                anyhow::bail!(
                    "the agent has ended: {}{}",
                    ended.status,
                    namespace.log_tail()
                );
            }
            Ok(fs::read(&port_file).ok())
        })?;
        let port: u16 = serde_json::from_slice(&port)?;
        Ok(Agent {
            namespace,
            again: None,
            criu: criu.to_owned(),
            address: SocketAddr::new(address, port),
            dir: dir.to_owned(),
            options: extra.to_vec(),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its directory of the migration `id`.
    pub fn dir_of(&self, id: &str) -> PathBuf {
        self.dir.join(id)
    }

    /// What it has said.
    pub fn log(&self) -> String {
        self.namespace.log_tail()
    }

    /// Process 1 of its PID namespace.
    ///
    /// # Errors
    /// The namespace is gone.
    pub fn init(&self) -> Result<Pid> {
        let pids = descendants(self.namespace.pid());
        pids.first()
            .copied()
            .context("the agent's namespace is gone")
    }

    /// The agent's process, as the harness sees it.
    ///
    /// # Errors
    /// It has ended.
    pub fn pid(&self) -> Result<Pid> {
        let mut pids = descendants(self.namespace.pid());
        pids.extend(self.again.iter().flat_map(|again| descendants(again.pid())));
        let is_agent = |pid: &Pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut words = line.split(|&byte| byte == 0);
            let program = words.next().unwrap_or_default();
            program.ends_with(b"/pageferry") && words.next() == Some(b"agent")
        };
        pids.into_iter()
            .find(is_agent)
            .context("the agent has ended")
    }

    /// Starts another agent where the first one was, at the same address, for what that one left.
    ///
    /// # Errors
    /// It does not listen; or the namespace is gone.
    pub fn start_again(&mut self) -> Result<()> {
        let notes = self.dir.with_extension("host");
        let port_file = notes.join("port.json");
        let log = notes.join("agent-again.log");
        if port_file.exists() {
            fs::remove_file(&port_file)?;
        }
        let mut command = Command::new("nsenter");
        command
            .args([
                "--target",
                &self.init()?.to_string(),
                "--pid",
                "--mount",
                "--net",
                "--",
            ])
            .arg(workspace::binary("pageferry")?)
            .args(["agent", "--listen", &self.address.to_string(), "--dir"])
            .arg(&self.dir)
            .arg("--port-file")
            .arg(&port_file)
            .arg("--criu")
            .arg(&self.criu)
            .args(&self.options)
            .stderr(fs::File::create(&log)?);
        let mut again = Spawned::start("pageferry agent", &mut command, Some(log))?;
        wait::until("the second agent to listen", GENEROUS, || {
            if let Some(ended) = again.ended()? {
                anyhow::bail!("it has ended: {}{}", ended.status, again.log_tail());
            }
            Ok(port_file.exists().then_some(()))
        })?;
        self.again = Some(again);
        Ok(())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // The death of its process 1 ends a PID namespace, and then `unshare` ends by itself.
        if let Ok(init) = self.init() {
            kill_and_reap(&[init]);
        }
        let _ = self.namespace.wait_undisturbed();
        if let Some(again) = &mut self.again {
            let _ = again.wait_undisturbed();
        }
    }
}

/// The lines of an event log, of which `torn` are none.
///
/// # Errors
/// It is not there, other lines are torn, or a line has not the form of its schema.
pub fn read_events(path: &Path, torn: usize) -> Result<Vec<Value>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let mut events = Vec::new();
    let mut others = Vec::new();
    for line in text.lines() {
        match serde_json::from_str::<Value>(line) {
            Ok(event) => {
                schema::expect("event", &event)?;
                events.push(event);
            }
            Err(_) => others.push(line),
        }
    }
    ensure!(others.len() == torn, "{}: {others:?}", path.display());
    Ok(events)
}

/// A `pageferry migrate` to be run.
#[derive(Debug)]
pub struct Move<'a> {
    criu: &'a Path,
    state_dir: PathBuf,
    id: &'static str,
    options: Vec<String>,
    tls: Vec<String>,
    net: Option<&'a NetNs>,
}

impl<'a> Move<'a> {
    /// Of `load` to `agent`, as the migration `id`, with records in `state_dir`.
    pub fn new(criu: &'a Criu, state_dir: PathBuf, id: &'static str) -> Move<'a> {
        Move {
            criu: &criu.path,
            state_dir,
            id,
            options: Vec::new(),
            tls: Vec::new(),
            net: None,
        }
    }

    /// With further options.
    #[must_use]
    pub fn with(mut self, options: &[&str]) -> Move<'a> {
        self.options.extend(options.iter().map(ToString::to_string));
        self
    }

    /// With TLS by these options, whoever finishes it.
    #[must_use]
    pub fn secured(self, tls: Vec<String>) -> Move<'a> {
        Move { tls, ..self }
    }

    /// From a network.
    #[must_use]
    pub fn in_net(self, net: &'a NetNs) -> Move<'a> {
        Move {
            net: Some(net),
            ..self
        }
    }

    /// The source's directory of the migration.
    pub fn dir(&self) -> PathBuf {
        self.state_dir.join(self.id)
    }

    /// The source's report, once the command has ended.
    ///
    /// # Errors
    /// It is not there, or has not the form of its schema.
    pub fn report(&self) -> Result<Value> {
        let path = self.report_path();
        let text = fs::read(&path).with_context(|| path.display().to_string())?;
        let report = serde_json::from_slice(&text)?;
        schema::expect("migrate-report", &report)?;
        Ok(report)
    }

    /// The source's event log, which has what both sides did.
    ///
    /// # Errors
    /// It is not there, or a line has not the form of its schema or another migration's name.
    pub fn events(&self) -> Result<Vec<Value>> {
        let events = read_events(&self.dir().join("events.jsonl"), 0)?;
        let is_other = |event: &&Value| event["migration"] != self.id;
        if let Some(other) = events.iter().find(is_other) {
            bail!("{other} is in the log of {}", self.id);
        }
        Ok(events)
    }

    /// The event log tells these, each as side, step and state, and nothing that this side began has no end.
    ///
    /// # Errors
    /// It does not.
    pub fn expect_events(&self, wanted: &[&str]) -> Result<()> {
        let events = self.events()?;
        let word = |event: &Value, name: &str| event[name].as_str().unwrap_or_default().to_owned();
        let all: Vec<String> = events
            .iter()
            .map(|event| {
                ["side", "step", "state"]
                    .map(|name| word(event, name))
                    .join(" ")
            })
            .collect();
        for one in wanted {
            ensure!(
                all.iter().any(|event| event == one),
                "{one} is not in {all:#?}"
            );
        }
        let of_command = events.iter().filter(|event| event["program"] == "migrate");
        let mut open = Vec::new();
        for event in of_command {
            let step = word(event, "step");
            match event["state"].as_str() {
                Some("begun") => open.push(step),
                Some("done" | "failed") => open.retain(|open| *open != step),
                _ => {}
            }
        }
        ensure!(open.is_empty(), "{open:?} have no end in {all:#?}");
        Ok(())
    }

    /// Where the report is.
    pub fn report_path(&self) -> PathBuf {
        self.state_dir.join(format!("{}-report.json", self.id))
    }

    /// Starts the command.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(&self, load: &Load, agent: &Agent) -> Result<Spawned> {
        self.start_subject(&["--pid", &load.pid().to_string()], agent)
    }

    /// Starts the command for what `subject` says.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_subject(&self, subject: &[&str], agent: &Agent) -> Result<Spawned> {
        fs::create_dir_all(&self.state_dir)?;
        let log = self.state_dir.join(format!("{}-migrate.log", self.id));
        let mut command: Command = command_in(self.net, workspace::binary("pageferry")?);
        command
            .arg("migrate")
            .args(subject)
            .args(["--to", &agent.address().to_string(), "--id", self.id])
            .arg("--state-dir")
            .arg(&self.state_dir)
            .arg("--report")
            .arg(self.report_path())
            .arg("--criu")
            .arg(self.criu)
            .args(&self.options)
            .args(&self.tls)
            .stdout(std::process::Stdio::null())
            .stderr(fs::File::create(&log)?);
        Spawned::start("pageferry migrate", &mut command, Some(log))
    }

    /// Finishes the migration, whose command has died.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn resume(&self, agent: &Agent) -> Result<Spawned> {
        let log = self.state_dir.join(format!("{}-resume.log", self.id));
        let mut command: Command = command_in(self.net, workspace::binary("pageferry")?);
        command
            .args(["migrate", "--resume", self.id])
            .args(["--to", &agent.address().to_string(), "--state-dir"])
            .arg(&self.state_dir)
            .arg("--criu")
            .arg(self.criu)
            .args(&self.tls)
            .stdout(std::process::Stdio::null())
            .stderr(fs::File::create(&log)?);
        Spawned::start("pageferry migrate --resume", &mut command, Some(log))
    }
}
