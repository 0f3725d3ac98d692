//! A memory control group of either version, for processes that are to run out of memory.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use nix::unistd::Pid;

use crate::wait::{self, GENEROUS};

/// Where hierarchies are mounted that may have a memory controller, each with its file for the limit.
const HIERARCHIES: [(&str, &str); 3] = [
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
    ("/sys/fs/cgroup", "memory.max"),
    ("/sys/fs/cgroup/unified", "memory.max"),
];

/// The group. It is removed when this is dropped, and its processes go back to the root.
#[derive(Debug)]
pub struct MemoryGroup {
    root: PathBuf,
    path: PathBuf,
    limit: &'static str,
}

impl MemoryGroup {
    /// A new group, limited to `bytes`.
    ///
    /// # Errors
    /// No hierarchy has a memory controller, or this process may not use it.
    pub fn new(bytes: u64) -> Result<MemoryGroup> {
        for (root, limit) in HIERARCHIES {
            let name = format!("pageferry-{}-{bytes}", std::process::id());
            let path = PathBuf::from(root).join(name);
            if fs::create_dir(&path).is_err() {
                continue;
            }
            let group = MemoryGroup {
                root: root.into(),
                path,
                limit,
            };
            if group.path.join(limit).is_file() {
                group.limit(bytes)?;
                // With version 1 a group as such is spared.
                let _ = fs::write(group.path.join("memory.oom_control"), "1");
                return Ok(group);
            }
        }
        bail!("no control group can be made that limits memory")
    }

    /// Sets the limit.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn limit(&self, bytes: u64) -> Result<()> {
        let file = self.path.join(self.limit);
        fs::write(&file, bytes.to_string()).with_context(|| format!("writing {}", file.display()))
    }

    /// Puts a process in, which the kernel does not kill for want of memory: where nobody can be killed, a fill
    /// fails.
    ///
    /// # Errors
    /// It is gone, or the kernel refuses it.
    pub fn put_in(&self, pid: Pid) -> Result<()> {
        if !self.path.join("memory.oom_control").is_file() {
            fs::write(format!("/proc/{pid}/oom_score_adj"), "-1000").context("oom_score_adj")?;
        }
        let procs = self.path.join("cgroup.procs");
        fs::write(&procs, pid.to_string()).with_context(|| format!("writing {}", procs.display()))
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let procs = fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default();
        for pid in procs.lines() {
            // It may have ended.
            let _ = fs::write(self.root.join("cgroup.procs"), pid);
        }
        let removed = wait::until("the group to be empty", GENEROUS, || {
            Ok(fs::remove_dir(&self.path).is_ok().then_some(()))
        });
        if let Err(error) = removed {
            eprintln!("{} stays: {error:#}", self.path.display());
        }
    }
}
