//! A process that changes its memory at random and compares it with a model: `mmops`.
//!
//! ```text
//!   MmOperations::start ──> ready-NAME for the process and each child that lives on
//!   go(k, steps)        ──> more steps, then a look at everything: result-K-NAME
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;

use crate::exchange;
use crate::process::Spawned;

/// Long enough for all steps of all processes on a loaded machine.
const LIMIT: Duration = Duration::from_secs(60);

/// What is done, by how many steps.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Decides everything.
    pub seed: u64,
    /// Steps before the dump.
    pub before: u32,
    /// What a CRIU cannot do: "guard", "wipe", "memfd-private".
    pub without: Vec<&'static str>,
}

/// A running `mmops`, dumped or restored. The process that was started here is killed on drop.
#[derive(Debug)]
pub struct MmOperations {
    dir: PathBuf,
    process: Spawned,
    names: Vec<String>,
}

impl MmOperations {
    /// Starts one that exchanges files in `dir`, and waits until it has done its first steps.
    ///
    /// # Errors
    /// It does not come up, or finds its memory wrong by itself.
    pub fn start(dir: &Path, plan: &Plan) -> Result<MmOperations> {
        let (seed, before) = (plan.seed.to_string(), plan.before.to_string());
        let without = plan.without.join(",");
        let place = dir.to_str().context("a directory that is no UTF-8")?;
        let mut args = vec!["--dir", place, "--seed", &seed, "--before", &before];
        if !without.is_empty() {
            args.extend(["--without", &without]);
        }
        let process = exchange::start("mmops", &args, dir, "ready-0")?;
        let mut names = Vec::new();
        for entry in fs::read_dir(dir)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            names.extend(name.strip_prefix("ready-").map(str::to_owned));
        }
        names.sort();
        Ok(MmOperations {
            dir: dir.to_owned(),
            process,
            names,
        })
    }

    /// The pid of the process that was started.
    pub fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// The processes that are dumped: the first one and its children.
    pub fn processes(&self) -> usize {
        self.names.len()
    }

    /// Waits until the process that was started is gone, as after a dump.
    ///
    /// # Errors
    /// It lives on.
    pub fn wait_until_gone(&mut self) -> Result<()> {
        self.process.wait(LIMIT).map(drop)
    }

    /// Lets the processes, or those that will be restored, do their next part (1, 2, ...), which begins with `steps`
    /// steps. `lazily`: while pages are missing.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn go(&self, part: u32, steps: u32, lazily: bool) -> Result<()> {
        let path = self.dir.join(format!("go-{part}"));
        let how = if lazily { " lazily" } else { "" };
        Ok(fs::write(path, format!("{steps}{how}\n"))?)
    }

    /// Kills the process that was started and runs on, so that only a restored one answers.
    ///
    /// # Errors
    /// It cannot be reaped.
    pub fn stop(&mut self) -> Result<()> {
        self.process.kill().map(drop)
    }

    /// Waits until each has done the part, and found its memory right.
    ///
    /// # Errors
    /// One finds it wrong, or says nothing.
    pub fn expect_right(&self, part: u32) -> Result<()> {
        let mut wrong = Vec::new();
        for name in &self.names {
            let path = self.dir.join(format!("result-{part}-{name}"));
            if let Err(error) = exchange::expect_right(&path) {
                wrong.push(format!("part {part}: {error:#}"));
            }
        }
        ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
        Ok(())
    }
}
