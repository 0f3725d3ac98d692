//! `cargo xtask bench files`: the last difference of a directory that moves with a process, side by side with rsync over
//! ssh.
//!
//! ```text
//!   case = size x share that changes x link       contenders, in turn, each on a directory of its own
//!     |                                              pageferry   --preload, then migrate --volume: changed behind the rounds
//!     v                                              rsync       -az over ssh, the same change, then -az again
//!   time and bytes of the last difference, with the look for it ──> table, JSON, bars (promises)
//! ```

mod promises;
mod run;

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
    /// Files of the directory, MiB.
    #[arg(long, value_name = "MIB", value_delimiter = ',', default_values_t = [1024],
          value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    size: Vec<u32>,
    /// What changes behind the rounds, percent of all bytes.
    #[arg(long, value_name = "PERCENT", value_delimiter = ',', default_values_t = [2],
          value_parser = clap::value_parser!(u32).range(1..=100))]
    changed: Vec<u32>,
    /// Pieces in which it changes, KiB, at multiples of 4 KiB.
    #[arg(long, value_name = "KIB", default_value_t = 256,
          value_parser = clap::value_parser!(u32).range(4..=1024))]
    piece: u32,
    /// Rounds, after one that warms up.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Decides contents and changes.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    common: CommonArgs,
}

/// Who brings the last difference.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Contender {
    /// `pageferry migrate --volume`, inside the freeze.
    Pageferry,
    /// `rsync -az` over ssh.
    Rsync,
}

impl Contend for Contender {
    fn name(self) -> &'static str {
        match self {
            Contender::Pageferry => "pageferry",
            Contender::Rsync => "rsync -az",
        }
    }
}

/// A directory, and what changes in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub(super) struct Case {
    mib: u32,
    /// Of its bytes, changed behind the rounds.
    percent: u32,
    piece_kib: u32,
    seed: u64,
}

/// What is read off a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Metric {
    Last,
    Bytes,
    Waited,
    Downtime,
}

impl Metric {
    const ALL: [Metric; 4] = [
        Metric::Last,
        Metric::Bytes,
        Metric::Waited,
        Metric::Downtime,
    ];
}

impl Measure<Run> for Metric {
    fn heading(self) -> &'static str {
        match self {
            Metric::Last => "last ms",
            Metric::Bytes => "bytes MiB",
            Metric::Waited => "waited ms",
            Metric::Downtime => "downtime ms",
        }
    }

    fn of(self, run: &Run) -> Option<Sample> {
        #[allow(clippy::cast_precision_loss)]
        let mib = run.bytes as f64 / f64::from(1_u32 << 20);
        let value = match self {
            Metric::Last => run.last_ms,
            Metric::Bytes => mib,
            Metric::Waited => run.waited_ms?,
            Metric::Downtime => run.downtime_ms?,
        };
        Some(Sample::exact(value))
    }
}

/// All rounds of a case.
type CaseResult = Rounds<Case, Contender, Run>;

/// Measures all cases and judges them.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::install(NETWORK)?;
    setup::install_packages(&["rsync", "openssh-client", "openssh-server"])?;
    let criu = args.common.criu()?;
    let how = "medians, 1 Gbit/s; last: the last difference with the look for it, waited: of that, what the freeze waited for \
               it behind the pages";
    let mut results = Results::begin("files", &args.common, &criu, promises::judge, how)?;
    for &mib in &args.size {
        for &percent in &args.changed {
            let case = Case {
                mib,
                percent,
                piece_kib: args.piece,
                seed: args.seed,
            };
            let contenders = vec![Contender::Pageferry, Contender::Rsync];
            let taken: CaseResult = Rounds::take(case, contenders, args.rounds, |case, who| {
                run::run(&criu, case, who)
            })?;
            let table = taken.table(&Metric::ALL, &[(Contender::Pageferry, Contender::Rsync)]);
            let name = format!(
                "{mib} MiB, {percent} % changed in pieces of {} KiB, 1 Gbit/s",
                args.piece
            );
            let record = taken.record(&name, &Metric::ALL)?;
            results.add(table, record, taken)?;
        }
    }
    results.end();
    Ok(())
}
