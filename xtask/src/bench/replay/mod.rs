//! `cargo xtask bench replay`: a Redis that moves as its log while clients write, side by side with the same Redis moved
//! with its memory.
//!
//! ```text
//!   case = log x keys x writes a second             contenders, in turn, each on a Redis of its own
//!     |                                                log-replay     behind `pageferry record`, led away by nftables
//!     v                                                cold, hybrid   its memory, address and connections
//!   writers at a third host: each answer counted, the longest time without one ──> table, JSON, bars (promises)
//! ```
//!
//! The log holds what filled the Redis and what came until the switch. A move by log compares the digests of both
//! services (`DEBUG DIGEST`) before the switch and fails if they differ; that time is part of its downtime.

mod promises;
mod run;
mod writers;

use anyhow::Result;
use serde::Serialize;

use super::results::{CommonArgs, Results};
use super::rounds::{Contend, Measure, Rounds};
use super::stats::Sample;
use crate::setup::{self, NETWORK};
use run::Run;

/// What to measure; everything, unless told otherwise.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Bytes of commands that have filled the Redis before it moves, MiB.
    #[arg(long, value_name = "MIB", value_delimiter = ',', default_values_t = [100],
          value_parser = clap::value_parser!(u32).range(1..=1 << 14))]
    log: Vec<u32>,
    /// Keys that these commands set again and again: the state is as large as their values.
    #[arg(long, value_name = "KEYS", value_delimiter = ',', default_values_t = [4096],
          value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    keys: Vec<u32>,
    /// Bytes of a value.
    #[arg(long, value_name = "BYTES", default_value_t = 1024,
          value_parser = clap::value_parser!(u32).range(8..=8192))]
    value: u32,
    /// Writes that arrive in a second during the move, of all clients.
    #[arg(long, value_name = "WRITES", value_delimiter = ',', default_values_t = [5000],
          value_parser = clap::value_parser!(u32).range(4..=1_000_000))]
    writes: Vec<u32>,
    /// Who moves it.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Contender::ALL)]
    contender: Vec<Contender>,
    /// Rounds, after one that warms up.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Decides keys and values.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    common: CommonArgs,
}

/// Who moves the Redis.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Contender {
    /// `pageferry migrate --mode log-replay`.
    LogReplay,
    /// `pageferry migrate --mode cold`.
    Cold,
    /// `pageferry migrate --mode hybrid`.
    Hybrid,
}

impl Contender {
    /// All, in the order of the table.
    const ALL: [Contender; 3] = [Contender::LogReplay, Contender::Cold, Contender::Hybrid];
}

impl Contend for Contender {
    fn name(self) -> &'static str {
        match self {
            Contender::LogReplay => "log-replay",
            Contender::Cold => "cold",
            Contender::Hybrid => "hybrid",
        }
    }
}

/// A Redis, and what is written to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub(super) struct Case {
    log_mib: u32,
    keys: u32,
    value_bytes: u32,
    writes_per_s: u32,
    seed: u64,
}

impl Case {
    fn all_of(args: &Args) -> Vec<Case> {
        let mut all = Vec::new();
        for &log_mib in &args.log {
            for &keys in &args.keys {
                all.extend(args.writes.iter().map(|&writes_per_s| Case {
                    log_mib,
                    keys,
                    value_bytes: args.value,
                    writes_per_s,
                    seed: args.seed,
                }));
            }
        }
        all
    }

    fn describe(&self) -> String {
        format!(
            "{} MiB of log, {} keys of {} bytes, {} writes a second, 1 Gbit/s",
            self.log_mib, self.keys, self.value_bytes, self.writes_per_s
        )
    }
}

/// What is read off a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Metric {
    Downtime,
    Silence,
    Preparation,
    Total,
    Late,
    Log,
}

impl Metric {
    const ALL: [Metric; 6] = [
        Metric::Downtime,
        Metric::Silence,
        Metric::Preparation,
        Metric::Total,
        Metric::Late,
        Metric::Log,
    ];
}

impl Measure<Run> for Metric {
    fn heading(self) -> &'static str {
        match self {
            Metric::Downtime => "downtime ms",
            Metric::Silence => "client ms",
            Metric::Preparation => "before ms",
            Metric::Total => "total ms",
            Metric::Late => "late %",
            Metric::Log => "log MiB",
        }
    }

    fn of(self, run: &Run) -> Option<Sample> {
        #[allow(clippy::cast_precision_loss)]
        let mib = |bytes: u64| bytes as f64 / f64::from(1_u32 << 20);
        let value = match self {
            Metric::Downtime => run.downtime_ms,
            Metric::Silence => run.silence_ms,
            Metric::Preparation => run.preparation_ms,
            Metric::Total => run.total_ms,
            Metric::Late => run.late_percent,
            Metric::Log => mib(run.log_bytes?),
        };
        Some(Sample::exact(value))
    }
}

/// All rounds of a case.
type CaseResult = Rounds<Case, Contender, Run>;

/// Measures all cases and judges them.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::install(NETWORK)?;
    let criu = args.common.criu()?;
    let programs = run::Programs::fetched()?;
    let how = "medians; downtime: as reported, client: the longest time in which no client had an answer, before: until \
               clients are held or processes frozen, late: writes that were due and had no answer when the move was over";
    let mut results = Results::begin("replay", &args.common, &criu, promises::judge, how)?;
    for case in Case::all_of(args) {
        let contenders = args.contender.clone();
        let taken: CaseResult = Rounds::take(case, contenders, args.rounds, |case, who| {
            run::run(&criu, &programs, case, who)
        })?;
        let pairs = [
            (Contender::LogReplay, Contender::Cold),
            (Contender::LogReplay, Contender::Hybrid),
        ];
        let table = taken.table(&Metric::ALL, &pairs);
        let record = taken.record(&case.describe(), &Metric::ALL)?;
        results.add(table, record, taken)?;
    }
    results.end();
    Ok(())
}
