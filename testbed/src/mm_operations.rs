//! A process that changes its memory at random and compares it with a model: `mmops`.
//!
//! ```text
//!   MmOperations::start ──> ready-NAME for the process and each child that lives on
//!   go(k, steps)        ──> more steps, then a look at everything: said-K-NAME
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::Pid;

use crate::process::Spawned;
use crate::wait;
use crate::workspace;

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
        fs::create_dir_all(dir)?;
        let mut command = Command::new(workspace::binary("mmops")?);
        command.arg("--dir").arg(dir);
        command.args(["--seed", &plan.seed.to_string()]);
        command.args(["--before", &plan.before.to_string()]);
        if !plan.without.is_empty() {
            command.args(["--without", &plan.without.join(",")]);
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut process = Spawned::start_ungrouped("mmops", &mut command, None)?;
        let ready = dir.join("ready-0");
        wait::until("memory that was changed at random", LIMIT, || {
            if let Some(ended) = process.ended()? {
                let said = fs::read_to_string(dir.join("failure.txt")).unwrap_or_default();
                bail!("mmops: {}: {said}", ended.status);
            }
            Ok(ready.exists().then_some(()))
        })?;
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
            let path = self.dir.join(format!("said-{part}-{name}"));
            let what = format!("part {part} of {name}");
            wait::until(&what, LIMIT, || Ok(path.exists().then_some(())))?;
            let said = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            if said != "right" {
                wrong.push(format!("part {part}: {said}"));
            }
        }
        ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
        Ok(())
    }
}
