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
    let behind = |pid: &&u32| **pid > last && **pid - last <= NEAR;
    wanted.iter().filter(behind).max().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pids_are_skipped_that_would_be_given_soon() {
        assert_eq!(last_to_set(20, &[33, 35, 10]), Some(35));
        assert_eq!(last_to_set(35, &[33, 35]), None);
        assert_eq!(last_to_set(20, &[20 + NEAR, 21 + NEAR]), Some(20 + NEAR));
        assert_eq!(last_to_set(20, &[u32::MAX]), None);
        assert_eq!(last_to_set(20, &[]), None);
    }
}
