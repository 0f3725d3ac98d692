//! `vm.max_map_count`, raised while processes need more mappings than it allows.

use std::fs;

use anyhow::{Context, Result};

const SYSCTL: &str = "/proc/sys/vm/max_map_count";

/// CRIU restores mappings beside its own ones, and splits some: several times as many as the process has.
const ENOUGH: u64 = 1 << 20;

/// Raised; put back when it is dropped.
#[derive(Debug)]
pub(super) struct MaxMapCount {
    before: u64,
}

impl MaxMapCount {
    /// # Errors
    /// It cannot be read or changed: that takes root.
    pub(super) fn raise() -> Result<MaxMapCount> {
        let before = fs::read_to_string(SYSCTL).context(SYSCTL)?;
        let before = before.trim().parse().context(SYSCTL)?;
        if before < ENOUGH {
            fs::write(SYSCTL, ENOUGH.to_string()).context(SYSCTL)?;
        }
        Ok(MaxMapCount { before })
    }
}

impl Drop for MaxMapCount {
    fn drop(&mut self) {
        if self.before < ENOUGH
            && let Err(error) = fs::write(SYSCTL, self.before.to_string())
        {
            eprintln!(
                "{SYSCTL} stays at {ENOUGH}; it was {}: {error}",
                self.before
            );
        }
    }
}
