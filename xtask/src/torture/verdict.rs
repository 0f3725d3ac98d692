//! What has become of a migration: where its processes live, whether their memory is right, what is left.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use nix::unistd::Pid;
use pageferry::sys::owned_process::ProcessStat;
use testbed::load::Load;
use testbed::load::scenarios::verifying;
use testbed::net::NetNs;
use testbed::process::{Spawned, descendants, run};
use testbed::wait;

use super::environment::{Environment, Fixture, NAME};
use super::fault::{FaultEffects, participants};

/// How long programs and files may take to go.
const CLEAN_LIMIT: std::time::Duration = std::time::Duration::from_secs(20);

/// Where the processes live, and how.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    Completed,
    RolledBack,
    Lost,
    Doubled,
    WrongPages,
    /// What is lost or poisoned was only with a program that was killed.
    HolderKilled,
}

/// Looks for the processes on both sides and at their memory.
pub(super) fn decide(fixture: &mut Fixture, effects: FaultEffects) -> Result<Verdict> {
    let here = runs(fixture.load.pid());
    let init = fixture.agent.init()?;
    let runs_there = || descendants(init).into_iter().any(runs);
    // A restore that is given up has its processes for a moment, and none of them makes an instruction of its own. Two
    // copies that live do not go away.
    let there = runs_there()
        && !(here
            && wait::until("the end of what was restored", CLEAN_LIMIT, || {
                Ok((!runs_there()).then_some(()))
            })
            .is_ok());
    Ok(match (here, there) {
        (true, true) => Verdict::Doubled,
        (false, false) if effects.holder_killed => Verdict::HolderKilled,
        (false, false) => Verdict::Lost,
        (true, false) => {
            fixture.load.steer(fixture.load.pid())?;
            match memory(&fixture.load) {
                Memory::Right => Verdict::RolledBack,
                _ => Verdict::WrongPages,
            }
        }
        (false, true) => {
            fixture.load.steer(fixture.agent.init()?)?;
            match memory(&fixture.load) {
                Memory::Right => Verdict::Completed,
                Memory::Gone if effects.holder_killed => Verdict::HolderKilled,
                _ => Verdict::WrongPages,
            }
        }
    })
}

/// Whether a process is one of the load's, and not stopped.
fn runs(pid: Pid) -> bool {
    let name = fs::read_to_string(format!("/proc/{pid}/comm"));
    let state = ProcessStat::of(pid.as_raw()).map(|stat| stat.state);
    name.is_ok_and(|name| name.trim() == "testload")
        && state.is_ok_and(|state| matches!(state, 'R' | 'S' | 'D'))
}

enum Memory {
    Right,
    /// A page is poisoned, or a process has ended because of one.
    Gone,
    /// A page has other contents than the process gave it.
    Wrong,
}

fn memory(load: &Load) -> Memory {
    match load.run_everywhere(&verifying()) {
        Err(error) => {
            eprintln!("the processes do not answer: {error:#}");
            Memory::Gone
        }
        Ok(reports) if reports.iter().any(|report| report.wrong() > 0) => {
            for error in reports
                .iter()
                .filter_map(|report| report.expect_right().err())
            {
                eprintln!("{error:#}");
            }
            Memory::Wrong
        }
        Ok(reports) if reports.iter().all(|report| report.expect_right().is_ok()) => Memory::Right,
        Ok(_) => Memory::Gone,
    }
}

/// What a host has besides processes and files, before a migration.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct HostState {
    /// The firewall's rules of both networks.
    rules: [String; 2],
    /// Mount points of this program and of the agent.
    mounts: [BTreeSet<String>; 2],
    /// Control groups.
    groups: BTreeSet<PathBuf>,
}

impl HostState {
    /// As they are now.
    pub(super) fn now(environment: &Environment, fixture: &Fixture) -> Result<HostState> {
        let mut groups = BTreeSet::new();
        directories(Path::new("/sys/fs/cgroup"), &mut groups);
        let hosts = &environment.hosts;
        Ok(HostState {
            rules: [rules(&hosts.source.net)?, rules(&hosts.destination.net)?],
            mounts: [
                mounts("self", fixture),
                mounts(&fixture.agent.init()?.to_string(), fixture),
            ],
            groups,
        })
    }
}

fn rules(net: &NetNs) -> Result<String> {
    let listed = run(net.command("nft").args(["list", "ruleset"]))?;
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    // CRIU makes empty tables and chains when it looks for room; a rule is what hurts.
    let rule = |line: &&str| {
        let line = line.trim();
        let frame = line.is_empty() || line == "}" || line.starts_with('#');
        !frame
            && !["table ", "chain ", "type "]
                .iter()
                .any(|start| line.starts_with(start))
    };
    Ok(text.lines().filter(rule).collect::<Vec<_>>().join("\n"))
}

fn mounts(process: &str, fixture: &Fixture) -> BTreeSet<String> {
    let text = fs::read_to_string(format!("/proc/{process}/mountinfo")).unwrap_or_default();
    let here = fixture.test_dir.dir().display().to_string();
    // Of this migration's directories, or of CRIU; other programs mount what they need.
    let ours = |line: &&str| line.contains(&here) || line.contains("criu");
    let point = |line: &str| line.split(' ').nth(4).map(str::to_owned);
    text.lines().filter(ours).filter_map(point).collect()
}

fn directories(dir: &Path, found: &mut BTreeSet<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            directories(&path, found);
            found.insert(path);
        }
    }
}

/// Waits until nothing is left of the migration but its processes, records and logs; tells what is.
///
/// A namespace lives as long as a process in it or a mount of it, so those two tell of namespaces as well.
pub(super) fn leftovers(
    environment: &Environment,
    fixture: &Fixture,
    command: &Spawned,
    before: &HostState,
) -> Result<Vec<String>> {
    let mut last = Vec::new();
    let clean = wait::until("a clean host", CLEAN_LIMIT, || {
        last = look(environment, fixture, command, before)?;
        Ok(last.is_empty().then_some(()))
    });
    match clean {
        Err(_) if !last.is_empty() => Ok(last),
        clean => clean.map(|()| Vec::new()),
    }
}

fn look(
    environment: &Environment,
    fixture: &Fixture,
    command: &Spawned,
    before: &HostState,
) -> Result<Vec<String>> {
    let mut left = Vec::new();
    let agent = fixture.agent.pid().ok();
    for pid in participants(fixture, command, &[])? {
        if Some(pid) != agent {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            left.push(format!("process {pid}: {line}"));
        }
    }
    for dir in [fixture.source_dir(), fixture.test_dir.path("agent")] {
        files(&dir, &mut left);
    }
    marks(fixture, &mut left);
    let now = HostState::now(environment, fixture)?;
    if now.rules != before.rules {
        left.push(format!(
            "firewall: {:?} instead of {:?}",
            now.rules, before.rules
        ));
    }
    for (now, before) in now.mounts.iter().zip(&before.mounts) {
        left.extend(now.difference(before).map(|point| format!("mount {point}")));
    }
    // Other programs may make groups meanwhile.
    let ours = |path: &&PathBuf| path.to_string_lossy().contains(NAME);
    let groups = now.groups.difference(&before.groups).filter(ours);
    left.extend(groups.map(|group| format!("control group {}", group.display())));
    Ok(left)
}

/// Files that hold memory, are half written, or served a connection.
fn files(dir: &Path, left: &mut Vec<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() && !path.is_symlink() {
            files(&path, left);
            continue;
        }
        let extension = path.extension().and_then(|extension| extension.to_str());
        // Records, logs, and the ports that were told.
        if !matches!(
            extension,
            Some("log" | "json" | "jsonl" | "port" | "txt" | "port-file")
        ) {
            left.push(format!("file {}", path.display()));
        }
    }
}

/// What a migration puts on the processes at the source.
fn marks(fixture: &Fixture, left: &mut Vec<String>) {
    let mut pids = vec![fixture.load.pid()];
    pids.extend(descendants(fixture.load.pid()));
    for pid in pids {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.map(|value| value.trim().to_owned())
                .unwrap_or_default()
        };
        if !matches!(field("TracerPid:").as_str(), "" | "0") {
            left.push(format!("pid {pid} is traced by {}", field("TracerPid:")));
        }
        let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
        let tracked = maps
            .lines()
            .filter_map(|line| line.strip_prefix("VmFlags:"))
            .any(|flags| {
                flags
                    .split(' ')
                    .any(|flag| matches!(flag, "uw" | "um" | "ui"))
            });
        if tracked {
            left.push(format!("pid {pid} has memory under a userfaultfd"));
        }
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let target = fs::read_link(entry.path()).unwrap_or_default();
            if target.to_string_lossy().contains("userfaultfd") {
                left.push(format!("pid {pid} has a userfaultfd"));
            }
        }
    }
}
