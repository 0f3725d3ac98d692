//! Processes whose parent has ended.

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;

use crate::process::kill_and_reap;
use crate::sys::{self, Ended};
use crate::wait::{self, GENEROUS};

/// A process that has come to this one, or will when its parent has ended: killed on drop.
#[derive(Debug)]
pub struct Orphan(Option<Pid>);

impl Orphan {
    /// The process with this pid.
    ///
    /// # Errors
    /// No process can have it: to kill it would kill others.
    pub fn new(pid: i32) -> Result<Orphan> {
        ensure!(pid > 1, "{pid} is not a pid of a process");
        Ok(Orphan(Some(Pid::from_raw(pid))))
    }

    /// Waits until it has ended with success. Its parent must be gone.
    ///
    /// # Errors
    /// It fails, or runs on; or it is not a child of this process.
    pub fn succeed(self) -> Result<()> {
        let ended = self.wait()?;
        ensure!(ended.status.success(), "the orphan: {}", ended.status);
        Ok(())
    }

    /// Waits until it has ended with an exit code other than 0. Its parent must be gone.
    ///
    /// # Errors
    /// It succeeds, is killed by a signal, or runs on; or it is not a child of this process.
    pub fn fail(self) -> Result<()> {
        let ended = self.wait()?;
        let failed = ended.status.code().is_some_and(|code| code != 0);
        ensure!(failed, "the orphan must fail: {}", ended.status);
        Ok(())
    }

    fn wait(mut self) -> Result<Ended> {
        let pid = self.0.context("an orphan is waited for once")?;
        let ended = wait::until("the orphan's end", GENEROUS, || {
            Ok(sys::reap(pid.as_raw())?)
        })?;
        self.0 = None;
        Ok(ended)
    }
}

impl Drop for Orphan {
    fn drop(&mut self) {
        kill_and_reap(self.0.as_slice());
    }
}
