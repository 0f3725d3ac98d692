//! The harness's end of a load.

use std::cell::{Cell, RefCell};
use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::process::{Command as Program, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::unistd::Pid;
use serde::de::DeserializeOwned;

use super::report::{FAILURE_FILE, Report};
use super::spec::LoadSpec;
use super::steps::{Command, Step, command_file};
use crate::net::{NetNs, command_in};
use crate::process::{Spawned, descendants, kill_and_reap};
use crate::wait::{self, GENEROUS};
use crate::workspace;

/// A running load: steered before the dump, and after the restore, by the same files.
///
/// While both the dumped and the restored process run, either may take a command, unless
/// [`Load::steer`] says who is meant.
#[derive(Debug)]
pub struct Load {
    spec: LoadSpec,
    root: PathBuf,
    source: Spawned,
    tree: Vec<Pid>,
    seq: Cell<u64>,
    steered: RefCell<Option<PathBuf>>,
}

impl Load {
    /// Starts the processes and waits until all of them hold their memory.
    ///
    /// # Errors
    /// `testload` cannot be started or fails.
    pub fn start(spec: LoadSpec, net: Option<&NetNs>) -> Result<Load> {
        fs::create_dir_all(&spec.dir)?;
        let mut program = command_in(net, workspace::binary("testload")?);
        program.arg("--spec").arg(serde_json::to_string(&spec)?);
        let root = spec.dir.clone();
        Load::started_by(&mut program, spec, root)
    }

    /// The same with the command that starts it given, and the load's directory as the harness
    /// sees it: for loads in containers.
    ///
    /// # Errors
    /// The command cannot be started or fails.
    pub fn started_by(program: &mut Program, spec: LoadSpec, dir: PathBuf) -> Result<Load> {
        // A terminal or a pipe would be an open file that the restore side lacks.
        program.stdout(Stdio::null()).stderr(Stdio::null());
        let source = Spawned::start_ungrouped("testload", program, None)?;
        let mut load = Load {
            spec,
            root: dir,
            source,
            tree: Vec::new(),
            seq: Cell::new(0),
            steered: RefCell::default(),
        };
        for process in 0..load.spec.processes {
            wait::until("a load full of memory", GENEROUS, || {
                if let Some(ended) = load.source.ended()? {
                    let said = fs::read_to_string(load.root.join(FAILURE_FILE));
                    bail!("testload: {}, {}", ended.status, said.unwrap_or_default());
                }
                read_json::<Report>(&load.root.join(format!("report-{process}-0.json")))
            })?;
        }
        load.tree = descendants(load.source.pid());
        Ok(load)
    }

    /// What it was made of.
    pub fn spec(&self) -> &LoadSpec {
        &self.spec
    }

    /// The pid of the first process.
    pub fn pid(&self) -> Pid {
        self.source.pid()
    }

    /// The dumped side's first process.
    pub fn source(&mut self) -> &mut Spawned {
        &mut self.source
    }

    /// From now on commands go to the processes in the PID namespace of `pid`, and no others.
    ///
    /// # Errors
    /// There is no such process.
    pub fn steer(&self, pid: Pid) -> Result<()> {
        let namespace = fs::read_link(format!("/proc/{pid}/ns/pid"))
            .with_context(|| format!("the PID namespace of {pid}"))?;
        *self.steered.borrow_mut() = Some(namespace);
        Ok(())
    }

    /// Lets `process` carry out `steps`, and waits for its report.
    ///
    /// # Errors
    /// No report comes within a generous time.
    pub fn run(&self, process: u32, steps: &[Step]) -> Result<Report> {
        let seq = self.send(process, steps)?;
        self.receive(process, seq, GENEROUS)
    }

    /// Lets `process` carry out `steps`, and does not wait: tells the number of the command.
    ///
    /// # Errors
    /// The command cannot be written.
    pub fn send(&self, process: u32, steps: &[Step]) -> Result<u64> {
        let seq = self.seq.get() + 1;
        self.seq.set(seq);
        let command = Command {
            seq,
            steps: steps.to_vec(),
        };
        let file = command_file(process, self.steered.borrow().as_deref());
        let path = self.root.join(file);
        let unfinished = path.with_extension("new");
        fs::write(&unfinished, serde_json::to_vec(&command)?)?;
        fs::rename(unfinished, path)?;
        Ok(seq)
    }

    /// Waits for the report of a command that was sent before.
    ///
    /// # Errors
    /// It does not come within `limit`.
    pub fn receive(&self, process: u32, seq: u64, limit: Duration) -> Result<Report> {
        wait::until(&format!("report {seq} of process {process}"), limit, || {
            self.report(process, seq)
        })
    }

    /// A report, if it is there.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn report(&self, process: u32, seq: u64) -> Result<Option<Report>> {
        read_json(&self.root.join(format!("report-{process}-{seq}.json")))
    }

    /// Lets every process of the tree carry out `steps` at the same time.
    ///
    /// # Errors
    /// A report does not come.
    pub fn run_everywhere(&self, steps: &[Step]) -> Result<Vec<Report>> {
        let sent: Vec<(u32, u64)> = (0..self.spec.processes)
            .map(|process| Ok((process, self.send(process, steps)?)))
            .collect::<Result<_>>()?;
        sent.into_iter()
            .map(|(process, seq)| self.receive(process, seq, GENEROUS))
            .collect()
    }

    /// Waits until the dumped processes are gone, as after a dump that does not leave them running.
    ///
    /// # Errors
    /// The first process lives on.
    pub fn wait_until_gone(&mut self) -> Result<()> {
        self.source.wait(GENEROUS).map(drop)
    }

    /// Fails if the dumped process does not run, and count.
    ///
    /// # Errors
    /// It has ended, or its counter stands still.
    pub fn expect_running(&mut self) -> Result<()> {
        if let Some(ended) = self.source.ended()? {
            bail!("the source must run on: {}", ended.status);
        }
        self.steer(self.source.pid())?;
        let before = self.run(0, &[Step::Status])?;
        wait::until("a higher counter", GENEROUS, || {
            Ok((self.run(0, &[Step::Status])?.counter > before.counter).then_some(()))
        })
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let mut pids = descendants(self.source.pid());
        pids.extend(self.tree.iter().copied().filter(|&pid| is_testload(pid)));
        pids.dedup();
        let _ = self.source.kill();
        kill_and_reap(&pids);
    }
}

/// Whether a pid recorded earlier still is a process of the load, and not a new one's.
fn is_testload(pid: Pid) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "testload")
}

fn read_json<T: DeserializeOwned>(path: &std::path::Path) -> Result<Option<T>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(
            serde_json::from_slice(&bytes).with_context(|| path.display().to_string())?,
        )),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}
