//! Limits of a container's control groups, in the form of the OCI's `linux.resources`: read where it runs, to be
//! set again where it goes. They may have been changed since its bundle was written.

use std::fs;
use std::path::{Path, PathBuf};

use procfs::process::Process;
use serde_json::{Map, Value, json};

/// Directories of a process's control groups.
struct Groups {
    /// Controller, and the group's directory in its hierarchy of version 1.
    first: Vec<(String, PathBuf)>,
    /// The group in the one hierarchy of version 2.
    second: Option<PathBuf>,
}

/// The limits that the process `pid` is under; `None` if there is none, or nothing can be seen.
pub(crate) fn of_process(pid: i32) -> Option<Value> {
    let groups = groups(pid)?;
    let mut limits = Map::new();
    for (name, found) in [
        ("memory", memory(&groups)),
        ("cpu", cpu(&groups)),
        ("pids", pids(&groups)),
    ] {
        if !found.is_empty() {
            limits.insert(name.to_owned(), Value::Object(found));
        }
    }
    (!limits.is_empty()).then_some(Value::Object(limits))
}

/// Processes in the same control group as `pid`, by the first hierarchy that can be seen.
pub(crate) fn processes_in_group(pid: i32) -> Vec<i32> {
    let Some(groups) = groups(pid) else {
        return Vec::new();
    };
    // The hierarchy of devices or freezer: runtimes make a group of their own in each.
    let in_first = groups.first.iter();
    let dir = in_first
        .filter(|(controller, _)| matches!(controller.as_str(), "freezer" | "devices" | "pids"))
        .map(|(_, dir)| dir)
        .chain(groups.second.iter())
        .find(|dir| dir.join("cgroup.procs").exists());
    let text = dir.and_then(|dir| fs::read_to_string(dir.join("cgroup.procs")).ok());
    let text = text.unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

fn groups(pid: i32) -> Option<Groups> {
    let process = Process::new(pid).ok()?;
    let mounts = Process::myself().ok()?.mountinfo().ok()?;
    let mut groups = Groups {
        first: Vec::new(),
        second: None,
    };
    for group in process.cgroups().ok()? {
        let inside = group.pathname.trim_start_matches('/').to_owned();
        if group.controllers.iter().all(String::is_empty) {
            let mount = mounts.0.iter().find(|mount| mount.fs_type == "cgroup2");
            groups.second = mount.map(|mount| mount.mount_point.join(&inside));
            continue;
        }
        for controller in &group.controllers {
            let has = |mount: &&procfs::process::MountInfo| {
                mount.fs_type == "cgroup" && mount.super_options.contains_key(controller)
            };
            if let Some(mount) = mounts.0.iter().find(has) {
                let dir = mount.mount_point.join(&inside);
                groups.first.push((controller.clone(), dir));
            }
        }
    }
    Some(groups)
}

impl Groups {
    /// The first word of a file: in version 1 of the controller's group, in version 2 of the one group.
    fn first_word(&self, controller: &str, file: &str) -> Option<String> {
        let (_, dir) = self.first.iter().find(|(name, _)| name == controller)?;
        word(dir, file, 0)
    }

    fn second_word(&self, file: &str, at: usize) -> Option<String> {
        word(self.second.as_ref()?, file, at)
    }
}

fn word(dir: &Path, file: &str, at: usize) -> Option<String> {
    let text = fs::read_to_string(dir.join(file)).ok()?;
    text.split_whitespace().nth(at).map(str::to_owned)
}

/// Version 1 tells "no limit" as the largest number of whole pages.
const NO_LIMIT_BYTES: i64 = 1 << 60;

fn bytes(word: Option<String>) -> Option<i64> {
    let value = word?.parse::<i64>().ok()?;
    (0..NO_LIMIT_BYTES).contains(&value).then_some(value)
}

fn memory(groups: &Groups) -> Map<String, Value> {
    let mut found = Map::new();
    let limit = bytes(groups.first_word("memory", "memory.limit_in_bytes"))
        .or_else(|| bytes(groups.second_word("memory.max", 0)));
    if let Some(limit) = limit {
        found.insert("limit".to_owned(), json!(limit));
        // Version 1 counts memory and swap together, as the OCI does; version 2 swap alone.
        let both = bytes(groups.first_word("memory", "memory.memsw.limit_in_bytes"));
        let swap = bytes(groups.second_word("memory.swap.max", 0));
        if let Some(swap) = both.or_else(|| swap.map(|swap| swap.saturating_add(limit))) {
            found.insert("swap".to_owned(), json!(swap));
        }
    }
    found
}

fn cpu(groups: &Groups) -> Map<String, Value> {
    let mut found = Map::new();
    let number = |word: Option<String>| word?.parse::<i64>().ok();
    let quota = number(groups.first_word("cpu", "cpu.cfs_quota_us"))
        .or_else(|| number(groups.second_word("cpu.max", 0)));
    if let Some(quota) = quota.filter(|quota| *quota > 0) {
        let period = number(groups.first_word("cpu", "cpu.cfs_period_us"))
            .or_else(|| number(groups.second_word("cpu.max", 1)));
        found.insert("quota".to_owned(), json!(quota));
        found.insert("period".to_owned(), json!(period.unwrap_or(100_000)));
    }
    // 1024 and 100 are what every group begins with.
    let shares = number(groups.first_word("cpu", "cpu.shares")).filter(|shares| *shares != 1024);
    let weight = number(groups.second_word("cpu.weight", 0)).filter(|weight| *weight != 100);
    // As runtimes turn shares into a weight, the other way round.
    let of_weight = |weight: i64| 2 + (weight.saturating_sub(1)).saturating_mul(262_142) / 9_999;
    if let Some(shares) = shares.or_else(|| weight.map(of_weight)) {
        found.insert("shares".to_owned(), json!(shares));
    }
    found
}

fn pids(groups: &Groups) -> Map<String, Value> {
    let mut found = Map::new();
    let max = groups
        .first_word("pids", "pids.max")
        .or_else(|| groups.second_word("pids.max", 0));
    if let Some(max) = max.and_then(|max| max.parse::<i64>().ok()) {
        found.insert("limit".to_owned(), json!(max));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_either_version_have_the_form_of_the_oci() {
        let tmp = tempfile::tempdir().unwrap();
        let first = tmp.path().join("first");
        let second = tmp.path().join("second");
        for (dir, file, text) in [
            (&first, "memory.limit_in_bytes", "9223372036854771712\n"),
            (&first, "cpu.cfs_quota_us", "-1\n"),
            (&first, "cpu.shares", "512\n"),
            (&first, "pids.max", "max\n"),
            (&second, "memory.max", "1048576\n"),
            (&second, "memory.swap.max", "0\n"),
            (&second, "cpu.max", "50000 100000\n"),
            (&second, "cpu.weight", "100\n"),
            (&second, "pids.max", "64\n"),
        ] {
            fs::create_dir_all(dir).unwrap();
            fs::write(dir.join(file), text).unwrap();
        }
        let old = Groups {
            first: ["memory", "cpu", "pids"]
                .map(|name| (name.to_owned(), first.clone()))
                .into(),
            second: None,
        };
        assert!(memory(&old).is_empty() && pids(&old).is_empty());
        assert_eq!(Value::Object(cpu(&old)), json!({"shares": 512}));
        let new = Groups {
            first: Vec::new(),
            second: Some(second),
        };
        let limits = json!({"limit": 1_048_576, "swap": 1_048_576});
        assert_eq!(Value::Object(memory(&new)), limits);
        let limits = json!({"quota": 50_000, "period": 100_000});
        assert_eq!(Value::Object(cpu(&new)), limits);
        assert_eq!(Value::Object(pids(&new)), json!({"limit": 64}));
    }
}
