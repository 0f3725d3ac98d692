//! A load that runs as a child of the harness, until it is dumped.

use std::fs;
use std::ops::Deref;
use std::process::Stdio;

use anyhow::{Result, bail, ensure};
use nix::unistd::Pid;

use super::control::Control;
use super::report::Report;
use super::spec::LoadSpec;
use super::steps::{Order, Pass, Step};
use crate::net::{NetNs, command_in};
use crate::process::{Spawned, descendants, kill_and_reap};
use crate::wait::{self, GENEROUS};
use crate::workspace;

/// A running load. Its processes are killed on drop; restored ones belong to
/// [`Restored`](crate::migration::Restored), and are steered from here all the same.
#[derive(Debug)]
pub struct Load {
    control: Control,
    source: Spawned,
    tree: Vec<Pid>,
}

impl Deref for Load {
    type Target = Control;

    fn deref(&self) -> &Control {
        &self.control
    }
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
        // A terminal or a pipe would be an open file that the restore side lacks.
        program.stdout(Stdio::null()).stderr(Stdio::null());
        let mut source = Spawned::start_ungrouped("testload", &mut program, None)?;
        let dir = spec.dir.clone();
        let control = Control::new(spec, dir);
        control.wait_until_started(|| match source.ended()? {
            Some(ended) => bail!("testload: {}", ended.status),
            None => Ok(()),
        })?;
        let tree = descendants(source.pid());
        Ok(Load {
            control,
            source,
            tree,
        })
    }

    /// The pid of the first process.
    pub fn pid(&self) -> Pid {
        self.source.pid()
    }

    /// Waits until the dumped processes are gone, as after a dump that does not leave them running.
    ///
    /// # Errors
    /// The first process lives on.
    pub fn wait_until_gone(&mut self) -> Result<()> {
        self.source.wait(GENEROUS).map(drop)
    }

    /// Lets every process read all its memory at random, and fails unless each page is the one that
    /// it began with. Returns what the processes said.
    ///
    /// # Errors
    /// A page is another one; or a report does not come.
    pub fn expect_first_memory(&self) -> Result<Vec<Report>> {
        let reports = self.run_everywhere(&[Step::Verify(Pass::full(Order::Random))])?;
        for report in &reports {
            report.expect_right()?;
            let digest = self.spec().initial_digest(report.process);
            ensure!(
                report.steps[0].digest == Some(digest),
                "process {} has another memory than it began with",
                report.process
            );
        }
        Ok(reports)
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
        let dir = self.spec().dir.as_os_str().as_encoded_bytes();
        pids.extend(self.tree.iter().copied().filter(|&pid| is_of(pid, dir)));
        pids.dedup();
        let _ = self.source.kill();
        kill_and_reap(&pids);
    }
}

/// Whether a pid that was recorded earlier is still a process of the load in `dir`. Numbers come again, so it may be
/// that of another test's load.
fn is_of(pid: Pid, dir: &[u8]) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.windows(dir.len()).any(|part| part == dir)
}
