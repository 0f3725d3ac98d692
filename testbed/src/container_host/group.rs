//! Control groups for a host's processes: one in each hierarchy that is mounted. CRIU makes groups of its own in
//! all of them when it restores; with a namespace of control groups they stand below these.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::wait::{self, GENEROUS};

/// What a new group of a hierarchy of version 1 must be told before a process can join it.
const CPUSET: [&str; 2] = ["cpuset.cpus", "cpuset.mems"];

/// The groups. They are removed when this is dropped, with all below; their processes must have ended by then.
#[derive(Debug)]
pub(super) struct ControlGroups {
    paths: Vec<PathBuf>,
}

impl ControlGroups {
    /// New groups by this name.
    ///
    /// # Errors
    /// No hierarchy of version 2 is mounted, or this process may make no group there.
    pub(super) fn new(name: &str) -> Result<ControlGroups> {
        let mut groups = ControlGroups { paths: Vec::new() };
        let mut unified = false;
        for line in fs::read_to_string("/proc/self/mounts")?.lines() {
            let mut words = line.split(' ').skip(1);
            let (Some(root), Some(kind)) = (words.next(), words.next()) else {
                continue;
            };
            if kind != "cgroup" && kind != "cgroup2" {
                continue;
            }
            let path = Path::new(root).join(name);
            match fs::create_dir(&path) {
                Ok(()) => groups.paths.push(path.clone()),
                // Only the one of version 2 is needed.
                Err(_) if kind == "cgroup" => continue,
                Err(error) => return Err(error).context(path.display().to_string()),
            }
            unified |= kind == "cgroup2";
            for file in CPUSET.iter().filter(|file| path.join(file).is_file()) {
                let value = fs::read(Path::new(root).join(file))?;
                fs::write(path.join(file), value)?;
            }
        }
        ensure!(unified, "no control groups of version 2 are mounted");
        Ok(groups)
    }

    /// Where a process that joins writes its pid.
    pub(super) fn joined_by(&self) -> impl Iterator<Item = PathBuf> {
        self.paths.iter().map(|path| path.join("cgroup.procs"))
    }
}

impl Drop for ControlGroups {
    fn drop(&mut self) {
        for path in &self.paths {
            let removed = wait::undisturbed("an empty control group", GENEROUS, || {
                match remove(path) {
                    // The last of its processes are about to end.
                    Err(error) if error.kind() == ErrorKind::ResourceBusy => Ok(None),
                    other => Ok(other.map(Some)?),
                }
            });
            if let Err(error) = removed {
                eprintln!("removing the control group {}: {error:#}", path.display());
            }
        }
    }
}

fn remove(group: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(group)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove(&entry.path())?;
        }
    }
    fs::remove_dir(group)
}
