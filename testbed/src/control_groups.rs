//! Control groups in all hierarchies, for what stands for another host: a runtime makes the groups of its
//! containers below its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::Pid;

use crate::wait::{self, GENEROUS};

/// Files of version 1's cpuset that are empty in a new group, which then takes no process.
const INHERITED: [&str; 2] = ["cpuset.cpus", "cpuset.mems"];

/// A group in each hierarchy, removed with all that is in them on drop; their processes must have ended.
#[derive(Debug)]
pub struct ControlGroups {
    dirs: Vec<PathBuf>,
}

impl ControlGroups {
    /// New groups in all hierarchies that are mounted.
    ///
    /// # Errors
    /// There is no hierarchy, or this process may not use one.
    pub fn new() -> Result<ControlGroups> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "pageferry-host-{}-{}",
            std::process::id(),
            MADE.fetch_add(1, Ordering::Relaxed)
        );
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let mut groups = ControlGroups { dirs: Vec::new() };
        for line in mounts.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            let &[_, root, kind, options, ..] = words.as_slice() else {
                continue;
            };
            // Hierarchies elsewhere are some program's own, and go with it.
            let is_systems = root.starts_with("/sys/fs/cgroup");
            let is_closed = options.split(',').any(|word| word == "ro");
            if !matches!(kind, "cgroup" | "cgroup2") || !is_systems || is_closed {
                continue;
            }
            let dir = Path::new(root).join(&name);
            fs::create_dir(&dir).with_context(|| dir.display().to_string())?;
            for file in INHERITED {
                if let Ok(value) = fs::read(Path::new(root).join(file))
                    && kind == "cgroup"
                {
                    fs::write(dir.join(file), value)?;
                }
            }
            groups.dirs.push(dir);
        }
        ensure!(!groups.dirs.is_empty(), "no control groups are mounted");
        Ok(groups)
    }

    /// Takes a process in, with all children that it makes from now on.
    ///
    /// # Errors
    /// It has ended.
    pub fn take(&self, pid: Pid) -> Result<()> {
        for dir in &self.dirs {
            let file = dir.join("cgroup.procs");
            fs::write(&file, pid.to_string()).with_context(|| file.display().to_string())?;
        }
        Ok(())
    }

    /// The group of a container, where its limit `file` is: in either version's hierarchy.
    ///
    /// # Errors
    /// There is no such file.
    pub fn limit_of(&self, id: &str, file: &str) -> Result<String> {
        for dir in &self.dirs {
            if let Ok(value) = fs::read_to_string(dir.join(id).join(file)) {
                return Ok(value.trim().to_owned());
            }
        }
        bail!("no control group of {id} has {file}")
    }
}

impl Drop for ControlGroups {
    fn drop(&mut self) {
        for dir in &self.dirs {
            let removed = wait::undisturbed("an empty control group", GENEROUS, || {
                remove(dir);
                Ok((!dir.exists()).then_some(()))
            });
            if let Err(error) = removed {
                eprintln!("removing {}: {error:#}", dir.display());
            }
        }
    }
}

/// Groups are directories whose files go with them.
fn remove(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove(&entry.path());
        }
    }
    let _ = fs::remove_dir(dir);
}
