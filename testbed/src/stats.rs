//! What CRIU says about a dump, in `stats-dump`.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use prost::Message;

/// Words before the message: service magic, stats magic, length.
const HEAD_BYTES: usize = 12;

/// CRIU's counts of one dump (`DumpStatsEntry` in its stats.proto).
#[derive(Clone, PartialEq, Message)]
pub struct DumpStats {
    /// How long the processes stood still, µs.
    #[prost(uint32, required, tag = "2")]
    pub frozen_time: u32,
    /// Pages of private memory written, to files or to a page server.
    #[prost(uint64, required, tag = "7")]
    pub pages_written: u64,
    /// Pages of shared memory written.
    #[prost(uint64, optional, tag = "14")]
    pub shared_pages_written: Option<u64>,
}

#[derive(Clone, PartialEq, Message)]
struct StatsEntry {
    #[prost(message, optional, tag = "1")]
    dump: Option<DumpStats>,
}

/// Reads the statistics of the dump whose images are in `dir`.
///
/// # Errors
/// There are none, or they are not CRIU's.
pub fn of_dump(dir: &Path) -> Result<DumpStats> {
    let path = dir.join("stats-dump");
    let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
    ensure!(bytes.len() > HEAD_BYTES, "{} is cut short", path.display());
    let entry =
        StatsEntry::decode(&bytes[HEAD_BYTES..]).with_context(|| path.display().to_string())?;
    entry
        .dump
        .with_context(|| format!("{} is not about a dump", path.display()))
}
