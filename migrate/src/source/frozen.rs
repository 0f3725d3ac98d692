//! Whether a dump has stopped a tree: from then on its files do not change, although the dump goes on.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use tokio::time::sleep;

use crate::rounds::Tree;

/// How often that is looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// Waits until no process of the tree under `root` runs.
pub(super) async fn frozen(root: i32) {
    while !is_frozen(root) {
        sleep(LOOK_AGAIN).await;
    }
}

/// CRIU stops the processes one after the other. All that are known must have stopped, and then, with nobody left to fork,
/// there must be no others.
fn is_frozen(root: i32) -> bool {
    let Some(first) = members(root).filter(|pids| pids.iter().all(|pid| is_stopped(*pid))) else {
        return false;
    };
    members(root).is_some_and(|second| second == first && second.iter().all(|pid| is_stopped(*pid)))
}

fn members(root: i32) -> Option<BTreeSet<i32>> {
    let tree = Tree::of(root).ok()?;
    Some(tree.members().iter().map(|member| member.pid).collect())
}

/// Whether each thread is held by a tracer, which CRIU is, or has ended.
fn is_stopped(pid: i32) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return false;
    };
    threads.flatten().all(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        state(&stat).is_some_and(|state| matches!(state, 't' | 'Z' | 'X'))
    })
}

/// The state in a line of `/proc/PID/stat`: behind the name, which may hold anything.
fn state(line: &str) -> Option<char> {
    let (_, behind) = line.rsplit_once(')')?;
    behind.trim_start().chars().next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_does_not_hide_the_state() {
        assert_eq!(state("7 (a) t) R 1 7"), Some('R'));
        assert_eq!(state("7 (x) t 1 7"), Some('t'));
        assert_eq!(state("7 (x"), None);
    }

    #[test]
    fn a_process_that_runs_is_not_frozen() {
        let pid = i32::try_from(std::process::id()).unwrap();
        assert!(!is_frozen(pid));
    }
}
