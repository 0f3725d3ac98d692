//! What a migration was like: a table for people, JSON for programs. docs/migration.md defines each figure.

use std::path::Path;
use std::time::{Duration, Instant};

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::RoundResult;
use pageferry::migration::messages::MigrationId;
use serde::{Deserialize, Serialize};
use tokio::time::sleep;

use crate::records;

/// How long a page-server may take to write what it sent.
const SUMMARY_LIMIT: Duration = Duration::from_secs(10);

/// How often that is looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// Faults at the destination, as lazy-client saw them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Faults {
    pub(crate) count: u64,
    pub(crate) p50_us: u64,
    pub(crate) p99_us: u64,
}

/// See the module's text. Times are milliseconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) id: MigrationId,
    pub(crate) mode: String,
    /// `moved`, `rolled-back`.
    pub(crate) result: String,
    /// Why it was rolled back.
    pub(crate) problem: Option<String>,
    pub(crate) processes: usize,
    pub(crate) memory_bytes: u64,
    pub(crate) preparation_ms: f64,
    pub(crate) downtime_ms: Option<f64>,
    pub(crate) predicted_downtime_ms: Option<f64>,
    pub(crate) complete_ms: Option<f64>,
    pub(crate) total_ms: f64,
    pub(crate) rounds: Vec<RoundResult>,
    pub(crate) wire_bytes: u64,
    pub(crate) bytes_by_kind: std::collections::BTreeMap<String, u64>,
    pub(crate) faults: Faults,
    /// Parts of the downtime.
    pub(crate) phases_ms: std::collections::BTreeMap<String, f64>,
    pub(crate) source_criu: String,
    pub(crate) destination_criu: String,
    pub(crate) kernel: String,
}

impl Report {
    /// Writes the JSON.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        records::write(path, self)
    }

    /// Adds one session's line of a page-server's `--summary-json`.
    pub(crate) fn add_session(&mut self, line: &serde_json::Value) {
        let number = |value: &serde_json::Value| value.as_u64().unwrap_or_default();
        self.wire_bytes += number(&line["frame_bytes"]) + number(&line["repeated_bytes"]);
        let sent = line["sent"].as_object().into_iter().flatten();
        for (kind, carried) in sent {
            *self.bytes_by_kind.entry(kind.clone()).or_default() += number(&carried["bytes"]);
        }
    }

    /// Takes the faults out of lazy-client's summary.
    pub(crate) fn add_lazy_summary(&mut self, summary: &serde_json::Value) {
        let latency = &summary["fault_latency"];
        let number = |name: &str| latency[name].as_u64().unwrap_or_default();
        self.faults = Faults {
            count: number("count"),
            p50_us: number("p50_us"),
            p99_us: number("p99_us"),
        };
    }

    /// Prints the table.
    pub(crate) fn print(&self) {
        let line = |name: &str, text: String| println!("{name:<20}{text}");
        let ms = |value: f64| format!("{value:.1} ms");
        line("migration", self.id.to_string());
        line("mode", self.mode.clone());
        line("result", self.result.clone());
        if let Some(problem) = &self.problem {
            line("problem", problem.clone());
        }
        let mib = self.memory_bytes >> 20;
        line(
            "memory",
            format!("{mib} MiB in {} processes", self.processes),
        );
        for (index, round) in self.rounds.iter().enumerate() {
            let text = format!(
                "{} pages changed, {} bytes sent in {} ms",
                round.pages, round.bytes, round.ms
            );
            line(&format!("round {}", index + 1), text);
        }
        line("preparation", ms(self.preparation_ms));
        if let Some(downtime) = self.downtime_ms {
            line("downtime", ms(downtime));
        }
        for (phase, took) in &self.phases_ms {
            line(&format!("  {phase}"), ms(*took));
        }
        if let Some(predicted) = self.predicted_downtime_ms {
            line("  predicted", ms(predicted));
        }
        if let Some(complete) = self.complete_ms {
            line("memory complete", ms(complete));
        }
        line("total", ms(self.total_ms));
        line("sent", format!("{} bytes", self.wire_bytes));
        if self.faults.count > 0 {
            let Faults {
                count,
                p50_us,
                p99_us,
            } = self.faults;
            line(
                "faults",
                format!("{count}, p50 {p50_us} µs, p99 {p99_us} µs"),
            );
        }
    }
}

/// Line `number` (1, 2, 3...) of a `--summary-json` file. A page-server writes it after its peer has heard
/// of the end, so it is waited for.
pub(crate) async fn session(path: &Path, number: usize) -> Result<serde_json::Value> {
    let start = Instant::now();
    loop {
        let text =
            std::fs::read_to_string(path).map_err(|error| Error::file("read", path, error))?;
        // A line without its end is still being written.
        let mut whole = text
            .split_inclusive('\n')
            .filter(|line| line.ends_with('\n'));
        if let Some(line) = whole.nth(number.saturating_sub(1)) {
            return serde_json::from_str(line)
                .map_err(|error| Error::file("understand", path, error));
        }
        if start.elapsed() > SUMMARY_LIMIT {
            let text = format!("{} has no line of session {number}", path.display());
            return Err(Error::new(Kind::Io, text));
        }
        sleep(LOOK_AGAIN).await;
    }
}
