//! Commands to a load's processes, and their reports, wherever they run.

use std::cell::{Cell, RefCell};
use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::unistd::Pid;

use super::report::{FAILURE_FILE, Report};
use super::spec::LoadSpec;
use super::steps::{Command, Step, command_file};
use crate::wait::{self, GENEROUS};

/// Steers the processes of a load by files, before the dump and after the restore.
///
/// While both the dumped and the restored process run, either may take a command, unless
/// [`Control::steer`] says who is meant.
#[derive(Debug)]
pub struct Control {
    spec: LoadSpec,
    dir: PathBuf,
    seq: Cell<u64>,
    steered: RefCell<Option<PathBuf>>,
}

impl Control {
    /// Of the load that was made from `spec`, whose directory the harness sees as `dir`.
    pub fn new(spec: LoadSpec, dir: PathBuf) -> Control {
        Control {
            spec,
            dir,
            seq: Cell::new(0),
            steered: RefCell::default(),
        }
    }

    /// What the load was made of.
    pub fn spec(&self) -> &LoadSpec {
        &self.spec
    }

    /// Waits until all processes hold their memory. `still_runs` fails once they cannot any more.
    ///
    /// # Errors
    /// They have failed; the error tells what the load said.
    pub fn wait_until_started(&self, mut still_runs: impl FnMut() -> Result<()>) -> Result<()> {
        for process in 0..self.spec.processes {
            wait::until("a load full of memory", GENEROUS, || {
                if let Ok(said) = fs::read_to_string(self.dir.join(FAILURE_FILE)) {
                    bail!("testload: {said}");
                }
                still_runs()?;
                self.report(process, 0)
            })?;
        }
        Ok(())
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

    /// From now on commands are for whoever looks for one first, as before [`Control::steer`].
    pub fn steer_anybody(&self) {
        *self.steered.borrow_mut() = None;
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
        let path = self.dir.join(file);
        let unfinished = path.with_extension("new");
        fs::write(&unfinished, serde_json::to_vec(&command)?)?;
        fs::rename(unfinished, path)?;
        Ok(seq)
    }

    /// Waits for the report of a command that was sent before.
    ///
    /// # Errors
    /// It does not come within `limit`, or the load has failed.
    pub fn receive(&self, process: u32, seq: u64, limit: Duration) -> Result<Report> {
        wait::until(&format!("report {seq} of process {process}"), limit, || {
            if let Ok(said) = fs::read_to_string(self.dir.join(FAILURE_FILE)) {
                bail!("testload: {said}");
            }
            self.report(process, seq)
        })
    }

    /// A report, if it is there.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn report(&self, process: u32, seq: u64) -> Result<Option<Report>> {
        let path = self.dir.join(format!("report-{process}-{seq}.json"));
        match fs::read(&path) {
            Ok(bytes) => {
                let report = serde_json::from_slice(&bytes);
                Ok(Some(report.with_context(|| path.display().to_string())?))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| path.display().to_string()),
        }
    }

    /// Lets every process of the tree carry out `steps` at the same time: tells the numbers of
    /// process and command.
    ///
    /// # Errors
    /// A command cannot be written.
    pub fn send_everywhere(&self, steps: &[Step]) -> Result<Vec<(u32, u64)>> {
        let processes = 0..self.spec.processes;
        processes
            .map(|process| Ok((process, self.send(process, steps)?)))
            .collect()
    }

    /// Lets every process of the tree carry out `steps` at the same time, and waits for all.
    ///
    /// # Errors
    /// A report does not come.
    pub fn run_everywhere(&self, steps: &[Step]) -> Result<Vec<Report>> {
        let sent = self.send_everywhere(steps)?;
        sent.into_iter()
            .map(|(process, seq)| self.receive(process, seq, GENEROUS))
            .collect()
    }
}
