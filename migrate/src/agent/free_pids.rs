//! Keeps the pids that a restore needs free of what this agent starts meanwhile.
//!
//! In a PID namespace of the agent's own few pids have been given, so the next ones are often those of the processes that
//! move here. The page servers of some rounds, with their threads, would have them before the restore.

use std::fs;
use std::path::Path;

/// The pid that was given last in the reader's PID namespace; the next one is behind it (proc(5), Linux 3.3).
const LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";

/// Pids that one migration may take at the destination, threads included, with room to spare.
const NEAR: u32 = 4096;

/// Pids behind those that are known now: a tree forks until it is stopped.
const TO_COME: u32 = 1000;

/// From now on new processes get pids behind those of `wanted`, if they would reach these soon.
pub(super) fn leave_free(wanted: &[u32]) {
    let path = Path::new(LAST_PID);
    // Kernels without CONFIG_CHECKPOINT_RESTORE have no such file, and restore nothing either.
    let last = fs::read_to_string(path).ok();
    let last = last.and_then(|last| last.trim().parse().ok());
    let Some(next) = last.and_then(|last| last_to_set(last, wanted)) else {
        return;
    };
    if let Err(error) = fs::write(path, next.to_string()) {
        tracing::debug!("pids up to {next} may be taken before the restore: {error}");
    }
}

/// What the last pid has to be, if it has to change.
fn last_to_set(last: u32, wanted: &[u32]) -> Option<u32> {
    let near = |pid: &&u32| **pid <= last.saturating_add(NEAR);
    let behind = wanted.iter().filter(near).max()?.saturating_add(TO_COME);
    (behind > last).then_some(behind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pids_are_skipped_that_would_be_given_soon() {
        assert_eq!(last_to_set(20, &[33, 35, 10]), Some(35 + TO_COME));
        assert_eq!(last_to_set(40, &[33, 35]), Some(35 + TO_COME));
        assert_eq!(last_to_set(35 + TO_COME, &[33, 35]), None);
        let far = last_to_set(20, &[20 + NEAR, 21 + NEAR]);
        assert_eq!(far, Some(20 + NEAR + TO_COME));
        assert_eq!(last_to_set(20, &[u32::MAX]), None);
        assert_eq!(last_to_set(20, &[]), None);
    }
}
