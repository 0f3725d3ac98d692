//! What a migration was like: a table for people, JSON for programs. docs/migration.md defines each figure.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::HumanBytes;
use pageferry::error::{Error, Kind, Result};
use pageferry::migration::events::Step;
use pageferry::migration::messages::{FaultTimes, HostFacts, MigrationId};
use pageferry::migration::{Mode, RoundResult};
use pageferry::observe::schema::Output;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::sleep;

use super::failure::Failure;
use super::files::FilesReport;
use super::logs::LogFile;
use crate::files::FileRound;
use crate::records;

/// How long a page-server may take to write what it sent.
const SUMMARY_LIMIT: Duration = Duration::from_secs(10);

/// How often that is looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// Faults at the destination, as lazy-client saw them.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub(crate) struct Faults {
    /// How many there were.
    pub(crate) count: u64,
    /// Half of the faults took at most this long, µs.
    pub(crate) p50_us: u64,
    /// 99 % of the faults took at most this long, µs.
    pub(crate) p99_us: u64,
    /// Sum of the waiting times of all threads, ms.
    pub(crate) blocked_ms: f64,
    /// The faults over time, in at most 200 intervals of equal length; empty if there were none.
    #[serde(default)]
    pub(crate) times: Vec<FaultBin>,
}

/// Faults in a part of the time.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub(crate) struct FaultBin {
    /// Begin of the interval, from the start of the command, ms.
    pub(crate) start_ms: f64,
    /// Its end, ms.
    pub(crate) end_ms: f64,
    /// How many faults began in the interval.
    pub(crate) count: u64,
    /// Sum of their waiting times, ms.
    pub(crate) waited_ms: f64,
}

/// Something that took time, from the start of the command.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub(crate) struct Span {
    /// `rounds`, `freeze` or `memory`.
    pub(crate) row: String,
    /// Name of what took time.
    pub(crate) name: String,
    /// Its begin, from the start of the command, ms.
    pub(crate) start_ms: f64,
    /// Its end, from the start of the command, ms.
    pub(crate) end_ms: f64,
}

/// One of the two hosts.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub(crate) struct HostReport {
    /// Version of pageferry.
    pub(crate) pageferry: String,
    /// Version of CRIU; empty if there is none.
    pub(crate) criu: String,
    /// The kernel's release.
    pub(crate) kernel: String,
    /// The machine: `x86_64`, `aarch64`.
    pub(crate) machine: String,
    /// Memory that was free for new processes before the migration, bytes.
    pub(crate) available_bytes: u64,
}

impl From<&HostFacts> for HostReport {
    fn from(facts: &HostFacts) -> HostReport {
        let criu = facts.criu.map(|version| version.to_string());
        HostReport {
            pageferry: facts.pageferry.clone(),
            criu: criu.unwrap_or_default(),
            kernel: facts.kernel.clone(),
            machine: facts.machine.clone(),
            available_bytes: facts.available_bytes,
        }
    }
}

/// A log that was replayed.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub(crate) struct LogReport {
    /// Bytes of the log that were sent.
    pub(crate) bytes: u64,
    /// Largest part of the log that was written and not yet replayed, bytes.
    pub(crate) most_lag_bytes: u64,
    /// How many times clients were held because of that.
    pub(crate) holds: u64,
}

/// The result of a migration. Times are milliseconds.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct Report {
    /// The migration's name.
    #[schemars(with = "String")]
    pub(crate) id: MigrationId,
    /// The mode that it ended in: `cold`, `pre-copy`, `post-copy`, `hybrid`, or `stateless`.
    pub(crate) mode: String,
    /// `moved`, `rolled back`, or `sent ahead` (`--preload`).
    pub(crate) result: String,
    /// Why it was rolled back.
    pub(crate) problem: Option<String>,
    /// The same as separate fields; null if it was not rolled back.
    #[serde(default)]
    pub(crate) failure: Option<Failure>,
    /// Logs of both sides that were stored, if it failed.
    #[serde(default)]
    pub(crate) logs: Vec<LogFile>,
    /// Problems that did not stop the migration: a hook, a probe without an answer.
    pub(crate) warnings: Vec<String>,
    /// How many processes the tree has, zombies included.
    pub(crate) processes: usize,
    /// Memory that a dump would hold, bytes.
    pub(crate) memory_bytes: u64,
    /// Of these, memory that forks shared and that a lazy restore copies, bytes; 0 in other modes.
    #[serde(default)]
    pub(crate) copied_bytes: u64,
    /// From the start of the command to the freeze, ms.
    pub(crate) preparation_ms: f64,
    /// From the start of `criu dump` to the agent's message that the processes run, ms.
    pub(crate) downtime_ms: Option<f64>,
    /// From the start of `criu dump` to the first answer to `--probe`, ms; null without one.
    pub(crate) resume_ms: Option<f64>,
    /// From the start of the command until clients were first sent to the destination, ms; null without a route.
    #[serde(default)]
    pub(crate) switch_ms: Option<f64>,
    /// From the start of the command to the first answer to `--probe`, ms; null without one.
    #[serde(default)]
    pub(crate) answer_ms: Option<f64>,
    /// The downtime that was predicted at the last decision, ms.
    pub(crate) predicted_downtime_ms: Option<f64>,
    /// From the start of the command until the last page was at the destination, ms.
    pub(crate) complete_ms: Option<f64>,
    /// The whole run of the command, ms.
    pub(crate) total_ms: f64,
    /// Rounds that sent memory while the processes ran, in order.
    pub(crate) rounds: Vec<RoundResult>,
    /// How rounds found changed pages; empty without rounds.
    pub(crate) track: String,
    /// Bytes of ferry frames and of image files that left the source.
    pub(crate) wire_bytes: u64,
    /// Bytes of pages by the way they were sent: `zero`, `same`, `delta`, `zstd`, `raw`.
    pub(crate) bytes_by_kind: BTreeMap<String, u64>,
    /// Page faults at the destination.
    pub(crate) faults: Faults,
    /// Parts of the downtime by name, ms.
    pub(crate) phases_ms: BTreeMap<String, f64>,
    /// What took time, with times from one common start.
    pub(crate) timeline: Vec<Span>,
    /// Files that were sent.
    #[serde(default)]
    pub(crate) files: FilesReport,
    /// A log that was replayed (`--mode log-replay`).
    #[serde(default)]
    pub(crate) log: LogReport,
    /// The host that the processes left.
    pub(crate) source: HostReport,
    /// The host to which the processes moved.
    pub(crate) destination: HostReport,
}

/// What it writes for other programs.
pub(crate) fn output() -> Output {
    Output::of::<Report>("migrate-report", "pageferry migrate --report FILE")
}

/// A time in milliseconds, as reports have it.
pub(super) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

impl Report {
    /// The report of a migration of which nothing is known yet.
    pub(crate) fn begin(id: MigrationId, mode: Mode) -> Report {
        Report {
            id,
            mode: mode.name().to_owned(),
            result: String::new(),
            problem: None,
            failure: None,
            logs: Vec::new(),
            warnings: Vec::new(),
            processes: 0,
            memory_bytes: 0,
            copied_bytes: 0,
            preparation_ms: 0.0,
            downtime_ms: None,
            resume_ms: None,
            switch_ms: None,
            answer_ms: None,
            predicted_downtime_ms: None,
            complete_ms: None,
            total_ms: 0.0,
            rounds: Vec::new(),
            track: String::new(),
            wire_bytes: 0,
            bytes_by_kind: BTreeMap::new(),
            faults: Faults::default(),
            phases_ms: BTreeMap::new(),
            timeline: Vec::new(),
            files: FilesReport::default(),
            log: LogReport::default(),
            source: HostReport::default(),
            destination: HostReport::default(),
        }
    }

    /// Notes that `step` has failed. What fails later because of it is told behind it.
    pub(super) fn fail(&mut self, step: Step, error: &Error) {
        let failure = Failure::of(step, error);
        self.problem = Some(match self.problem.take() {
            Some(before) => format!("{before}; {failure}"),
            None => failure.to_string(),
        });
        self.failure.get_or_insert(failure);
    }

    /// The end for a user: why, and where the logs are.
    pub(super) fn end_text(&self, otherwise: impl FnOnce() -> String) -> String {
        let mut text = self.problem.clone().unwrap_or_else(otherwise);
        if let Some(dir) = self.logs.first().and_then(|log| log.path.parent()) {
            text += &format!("; logs: {}", dir.display());
        }
        text
    }

    /// Writes the JSON.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        records::write(path, self)
    }

    /// Writes the JSON to `path`, if the user wants it, and prints the table.
    pub(crate) fn publish(&self, path: Option<&Path>) -> Result<()> {
        if let Some(path) = path {
            self.write(path)?;
        }
        self.print();
        Ok(())
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
        self.faults.count = number("count");
        self.faults.p50_us = number("p50_us");
        self.faults.p99_us = number("p99_us");
    }

    /// Takes the times of faults, which the agent tells from the moment at which the processes ran.
    pub(crate) fn add_fault_times(&mut self, times: &FaultTimes) {
        #[allow(clippy::cast_precision_loss)]
        let ms = |us: u64| us as f64 / 1e3;
        let resumed = self.preparation_ms + self.downtime_ms.unwrap_or_default();
        self.faults.blocked_ms = ms(times.blocked_us);
        let bins = times.parts.iter().zip(0_u64..);
        self.faults.times = bins
            .map(|(part, index)| FaultBin {
                start_ms: resumed + ms(index * times.part_us),
                end_ms: resumed + ms((index + 1) * times.part_us),
                count: part.count,
                waited_ms: ms(part.waited_us),
            })
            .collect();
    }

    /// Notes something that took time.
    pub(crate) fn add_span(
        &mut self,
        row: &str,
        name: impl Into<String>,
        start_ms: f64,
        end_ms: f64,
    ) {
        self.timeline.push(Span {
            row: row.to_owned(),
            name: name.into(),
            start_ms,
            end_ms,
        });
    }

    /// How much memory was moved, in words.
    fn memory(&self) -> String {
        let memory = HumanBytes(self.memory_bytes);
        let text = format!("{memory} in {} processes", self.processes);
        match self.copied_bytes {
            0 => text,
            copied => format!(
                "{text}, {} of it copies of what forks shared",
                HumanBytes(copied)
            ),
        }
    }

    /// Prints the table.
    pub(crate) fn print(&self) {
        line("migration", self.id.to_string());
        line("mode", self.mode.clone());
        line("result", self.result.clone());
        if let Some(problem) = &self.problem {
            line("problem", problem.clone());
        }
        for warning in &self.warnings {
            line("warning", warning.clone());
        }
        line("memory", self.memory());
        for (index, round) in self.rounds.iter().enumerate() {
            let text = format!(
                "{} pages changed, {} bytes sent in {} ms",
                round.pages, round.bytes, round.ms
            );
            line(&format!("round {}", index + 1), text);
        }
        for layer in &self.files.layers {
            line("layer", layer.shown());
        }
        for (index, round) in self.files.rounds.iter().enumerate() {
            line(&format!("files {}", index + 1), shown(round));
        }
        self.print_times();
        line("sent", format!("{} bytes", self.wire_bytes));
        if self.faults.count > 0 {
            let Faults {
                count,
                p50_us,
                p99_us,
                blocked_ms,
                ..
            } = self.faults;
            line(
                "faults",
                format!(
                    "{count}, p50 {p50_us} µs, p99 {p99_us} µs, {blocked_ms:.0} ms of waiting in all"
                ),
            );
        }
    }

    fn print_times(&self) {
        let ms = |value: f64| format!("{value:.1} ms");
        let some = |name: &str, value: Option<f64>| {
            if let Some(value) = value {
                line(name, ms(value));
            }
        };
        line("preparation", ms(self.preparation_ms));
        some("downtime", self.downtime_ms);
        for (phase, took) in &self.phases_ms {
            line(&format!("  {phase}"), ms(*took));
        }
        if !self.files.rounds.is_empty() {
            line("  last files", shown(&self.files.freeze));
        }
        some("  predicted", self.predicted_downtime_ms);
        some("first answer", self.resume_ms);
        some("switch began at", self.switch_ms);
        some("answered at", self.answer_ms);
        some("memory complete", self.complete_ms);
        line("total", ms(self.total_ms));
    }
}

/// Prints a line of the table.
fn line(name: &str, text: impl Into<String>) {
    let text = text.into();
    println!("{name:<20}{text}");
}

fn shown(round: &FileRound) -> String {
    format!(
        "{} changed, {} bytes sent in {:.1} ms",
        round.files, round.bytes, round.ms
    )
}

/// Line `number` (1, 2, 3...) of a `--summary-json` file. A page-server writes it after its peer was told
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

#[cfg(test)]
pub(crate) mod tests;
