//! A process tree that shares most of its memory: a parent that has filled it, and forks of it.
//!
//! ```text
//!   parent  64 MiB --fork--> child 1: a part of the pages rewritten
//!                  --fork--> child 2: another part ...
//! ```
//!
//! With `mixed`, children also drop, lock and replace parts of it, and one of the children runs another program
//! that has forks of its own.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;

use crate::process::{Spawned, descendants, kill_and_reap};
use crate::wait::{self, GENEROUS};
use crate::workspace;

/// What a tree is made of.
#[derive(Clone, Copy, Debug)]
pub struct ForksSpec {
    /// Forks of the parent.
    pub children: u32,
    /// Memory of the parent, MiB.
    pub mib: u32,
    /// Child k rewrites the pages whose number leaves the rest k when divided by this; 0: nobody writes.
    pub every: u32,
    /// Three children do other things to parts of the memory as well, and one more process runs another program.
    pub mixed: bool,
}

/// A running tree.
#[derive(Debug)]
pub struct Forks {
    process: Spawned,
    dir: PathBuf,
    names: Vec<String>,
    looks: Cell<u32>,
}

impl Forks {
    /// Starts a tree that exchanges files in `dir`, and waits until all have their memory.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(dir: &Path, spec: ForksSpec) -> Result<Forks> {
        fs::create_dir_all(dir)?;
        let ForksSpec {
            children,
            mib,
            every,
            mixed,
        } = spec;
        let mut command = Command::new(workspace::binary("forks")?);
        command.arg(dir).arg("f");
        command.args([children, mib, every, u32::from(mixed)].map(|number| number.to_string()));
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut process = Spawned::start_ungrouped("forks", &mut command, None)?;
        let mut names: Vec<String> = (0..=children).map(|child| format!("f{child}")).collect();
        if mixed {
            names.extend((0..3).map(|child| format!("x{child}")));
        }
        for name in &names {
            wait::until("memory", GENEROUS, || {
                ensure!(process.ended()?.is_none(), "the parent has ended");
                Ok(dir.join(format!("ready-{name}")).exists().then_some(()))
            })?;
        }
        Ok(Forks {
            process,
            dir: dir.to_owned(),
            names,
            looks: Cell::new(0),
        })
    }

    /// The parent.
    pub fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// The parent and all below it.
    pub fn pids(&self) -> Vec<Pid> {
        let mut pids = vec![self.pid()];
        pids.extend(descendants(self.pid()));
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    /// Waits until a dump has ended them.
    ///
    /// # Errors
    /// They live on.
    pub fn wait_until_gone(&mut self) -> Result<()> {
        self.process.wait(GENEROUS).map(drop)
    }

    /// Lets all processes, dumped and restored since or not, compare all their memory.
    ///
    /// # Errors
    /// One has a wrong page, or does not answer.
    pub fn expect_right(&self) -> Result<()> {
        let look = self.looks.get() + 1;
        self.looks.set(look);
        let path = self.dir.join("look");
        fs::write(path.with_extension("new"), look.to_string())?;
        fs::rename(path.with_extension("new"), &path)?;
        for name in &self.names {
            let path = self.dir.join(format!("said-{name}"));
            let answer = wait::until(&format!("what {name} says"), GENEROUS, || {
                let text = fs::read_to_string(&path).unwrap_or_default();
                let answer = text.strip_prefix(&format!("{look} "));
                Ok(answer.map(str::to_owned))
            })?;
            ensure!(answer == "bad 0", "process {name}: {answer}");
        }
        Ok(())
    }
}

/// A tree that no dump has ended does not outlive its test: the children of a killed parent would.
impl Drop for Forks {
    fn drop(&mut self) {
        if matches!(self.process.ended(), Ok(None)) {
            let children = descendants(self.pid());
            let _ = self.process.kill();
            kill_and_reap(&children);
        }
    }
}

/// Memory of processes, what they share counted once (PSS), bytes.
///
/// # Errors
/// A process is gone.
pub fn pss_bytes(pids: &[Pid]) -> Result<u64> {
    let mut sum = 0;
    for pid in pids {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = fs::read_to_string(&path).context(path)?;
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
        sum += kib.context("no Pss")?.trim().parse::<u64>()? << 10;
    }
    Ok(sum)
}
