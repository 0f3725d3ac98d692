//! The processes of a tree, from its root.

use std::fs;

use pageferry::error::{Error, Kind, Result};
use pageferry::limits::MIGRATION_PIDS_MAX;
use pageferry::sys::owned_process::ProcessName;

/// One process of a tree.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Member {
    /// Its pid, as this process sees it.
    pub(crate) pid: i32,
    /// Its pid as it sees itself, which images name it by.
    pub(crate) inner_pid: u32,
    /// The process for good, whoever has the pid later.
    pub(crate) name: ProcessName,
}

/// See the module's text.
#[derive(Clone, Debug)]
pub(crate) struct Tree(Vec<Member>);

impl Tree {
    /// The tree under `root`, the root first.
    pub(crate) fn of(root: i32) -> Result<Tree> {
        let mut members = Vec::new();
        let mut next = vec![root];
        while let Some(pid) = next.pop() {
            match member(pid) {
                Ok(found) => members.push(found),
                // A child may end at any time.
                Err(_) if pid != root => continue,
                Err(error) => {
                    let text = format!("there is no process {root}");
                    return Err(Error::wrap(Kind::Usage, text, error));
                }
            }
            if members.len() > MIGRATION_PIDS_MAX {
                let text = format!("more than {MIGRATION_PIDS_MAX} processes are below {root}");
                return Err(Error::new(Kind::Usage, text));
            }
            next.extend(children(pid));
        }
        Ok(Tree(members))
    }

    pub(crate) fn members(&self) -> &[Member] {
        &self.0
    }
}

fn member(pid: i32) -> std::io::Result<Member> {
    let name = ProcessName::of(pid)?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let pids = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    let inner = pids.and_then(|pids| pids.split_whitespace().next_back()?.parse().ok());
    let inner_pid = inner
        .or_else(|| u32::try_from(pid).ok())
        .unwrap_or_default();
    Ok(Member {
        pid,
        inner_pid,
        name,
    })
}

/// Children of all threads.
fn children(pid: i32) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten();
    let lists = tasks.flatten().filter_map(|task| {
        let text = fs::read_to_string(task.path().join("children")).ok()?;
        Some(text)
    });
    lists
        .flat_map(|text| {
            let pids = text.split_whitespace().filter_map(|pid| pid.parse().ok());
            pids.collect::<Vec<i32>>()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_tree_is_found_whole_and_the_root_comes_first() {
        let mut shell = Command::new("sh")
            .args(["-c", "sleep 600 & echo started; wait"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut byte = [0; 1];
        std::io::Read::read_exact(shell.stdout.as_mut().unwrap(), &mut byte).unwrap();
        let root = i32::try_from(shell.id()).unwrap();
        let tree = Tree::of(root).unwrap();
        let pids: Vec<i32> = tree.members().iter().map(|member| member.pid).collect();
        for member in tree.members().iter().rev() {
            member.name.signal(libc::SIGKILL).unwrap();
        }
        shell.wait().unwrap();
        assert_eq!(pids.len(), 2, "{pids:?}");
        assert_eq!(pids[0], root);
        let error = Tree::of(root).unwrap_err().to_string();
        assert!(error.contains(&root.to_string()), "{error}");
    }
}
