//! `cargo xtask bench migrate`: whole migrations, side by side with the same done by CRIU alone.
//!
//! ```text
//!   case = memory x share that changes x link      contenders, in turn, each on a process of its own
//!     |                                               cold, pre-copy, post-copy, hybrid   pageferry migrate
//!     v                                               CRIU cold, CRIU post-copy            its documentation
//!   prober in the process, client outside; the floor: freeze of the lazy dump and restore in CRIU's post-copy
//!     v
//!   table, JSON, SVG, bars (promises)
//! ```
//!
//! Iterative pre-copy by CRIU needs soft-dirty, which few kernels have: it does not compete.

mod client;
mod picture;
mod prediction;
mod promises;
mod run;

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::ValueEnum;
use serde::Serialize;
use testbed::test_dir::{TestDir, warm_memory};

use super::TMPFS;
use super::results::{CommonArgs, Results};
use super::rounds::{Contend, Measure, Rounds};
use super::stats::{Sample, median_ratio};
use crate::setup::{self, NETWORK};
use run::Run;

/// What to measure; everything, unless told otherwise.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Memory of the process, MiB.
    #[arg(long, value_name = "MIB", value_delimiter = ',', default_values_t = [1024, 4096],
          value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    size: Vec<u32>,
    /// Pages that are written in a second, percent of all; and 50 MiB/s besides, as 0.
    #[arg(long, value_name = "PERCENT", value_delimiter = ',', default_values_t = [2, 10, 0],
          value_parser = clap::value_parser!(u32).range(0..=100))]
    dirty: Vec<u32>,
    /// What lies between source and destination.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = LinkKind::ALL)]
    link: Vec<LinkKind>,
    /// Who moves it.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Contender::ALL)]
    contender: Vec<Contender>,
    /// Rounds, after one that warms up.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Compare predicted with measured downtimes in so many migrations of mixed load, and nothing else.
    #[arg(long, value_name = "MIGRATIONS")]
    predict: Option<u32>,
    /// Decides the mixed load.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Draw the downtimes into FILE.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    #[command(flatten)]
    common: CommonArgs,
}

/// What lies between the two hosts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(super) enum LinkKind {
    /// 1 Gbit/s.
    Gigabit,
    /// As fast as the machine.
    Unlimited,
}

impl LinkKind {
    const ALL: [LinkKind; 2] = [LinkKind::Gigabit, LinkKind::Unlimited];

    fn bits_per_s(self) -> Option<u64> {
        match self {
            LinkKind::Gigabit => Some(1_000_000_000),
            LinkKind::Unlimited => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            LinkKind::Gigabit => "1 Gbit/s",
            LinkKind::Unlimited => "unlimited",
        }
    }
}

/// Who moves the process.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Contender {
    /// `pageferry migrate --mode cold`.
    Cold,
    /// `pageferry migrate --mode pre-copy`.
    PreCopy,
    /// `pageferry migrate --mode post-copy`.
    PostCopy,
    /// `pageferry migrate --mode hybrid`.
    Hybrid,
    /// CRIU with its page server.
    CriuCold,
    /// CRIU with its lazy-pages daemon.
    CriuPostCopy,
}

impl Contender {
    /// All, in the order of the table.
    const ALL: [Contender; 6] = [
        Contender::Cold,
        Contender::PreCopy,
        Contender::PostCopy,
        Contender::Hybrid,
        Contender::CriuCold,
        Contender::CriuPostCopy,
    ];

    /// The value of `--mode`; none: CRIU alone.
    fn mode(self) -> Option<&'static str> {
        match self {
            Contender::Cold => Some("cold"),
            Contender::PreCopy => Some("pre-copy"),
            Contender::PostCopy => Some("post-copy"),
            Contender::Hybrid => Some("hybrid"),
            Contender::CriuCold | Contender::CriuPostCopy => None,
        }
    }
}

impl Contend for Contender {
    fn name(self) -> &'static str {
        match self {
            Contender::CriuCold => "CRIU cold",
            Contender::CriuPostCopy => "CRIU post-copy",
            ours => ours.mode().unwrap_or_default(),
        }
    }
}

/// What is moved over what.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub(super) struct Case {
    mib: u32,
    /// Of its pages, written in a second; 0: 50 MiB/s.
    percent: u32,
    link: LinkKind,
}

/// Pages of a MiB.
const MIB_PAGES: u32 = 256;

/// 50 MiB/s, in pages.
const FIXED_PAGES_PER_S: u32 = 50 * MIB_PAGES;

impl Case {
    fn all_of(args: &Args) -> Vec<Case> {
        let mut all = Vec::new();
        for &link in &args.link {
            for &mib in &args.size {
                all.extend(
                    args.dirty
                        .iter()
                        .map(|&percent| Case { mib, percent, link }),
                );
            }
        }
        all
    }

    fn dirty_pages_per_s(&self) -> u32 {
        match self.percent {
            0 => FIXED_PAGES_PER_S,
            percent => self.mib * MIB_PAGES / 100 * percent,
        }
    }

    fn describe(&self) -> String {
        let dirty = match self.percent {
            0 => "50 MiB/s".to_owned(),
            percent => format!("{percent} % of its pages a second"),
        };
        format!("{} MiB, {dirty} written, {}", self.mib, self.link.name())
    }
}

/// What is read off a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Metric {
    Pause,
    Silence,
    Floor,
    Complete,
    Total,
    Wire,
    Reported,
    Predicted,
}

impl Metric {
    const ALL: [Metric; 8] = [
        Metric::Pause,
        Metric::Silence,
        Metric::Reported,
        Metric::Predicted,
        Metric::Floor,
        Metric::Complete,
        Metric::Total,
        Metric::Wire,
    ];
}

impl Measure<Run> for Metric {
    fn heading(self) -> &'static str {
        match self {
            Metric::Pause => "pause ms",
            Metric::Silence => "client ms",
            Metric::Floor => "floor ms",
            Metric::Complete => "complete ms",
            Metric::Total => "total ms",
            Metric::Wire => "wire MiB",
            Metric::Reported => "reported ms",
            Metric::Predicted => "predicted ms",
        }
    }

    fn of(self, run: &Run) -> Option<Sample> {
        #[allow(clippy::cast_precision_loss)]
        let wire_mib = run.wire_bytes as f64 / f64::from(1_u32 << 20);
        let value = match self {
            Metric::Pause => run.pause_ms,
            Metric::Silence => run.silence_ms,
            Metric::Floor => run.floor_ms?,
            Metric::Complete => run.complete_ms,
            Metric::Total => run.total_ms,
            Metric::Wire => wire_mib,
            Metric::Reported => run.reported("downtime_ms")?,
            Metric::Predicted => run.reported("predicted_downtime_ms")?,
        };
        Some(Sample::exact(value))
    }
}

/// All rounds of a case.
type CaseResult = Rounds<Case, Contender, Run>;

/// The median of what one has of a metric by what another has of another one in the same round.
fn ratio(
    result: &CaseResult,
    (who, metric): (Contender, Metric),
    (to, base): (Contender, Metric),
) -> Option<Sample> {
    let other = result.samples(to, base);
    median_ratio(result.samples(who, metric).into_iter().zip(other))
}

/// How many times a process's memory lies in memory while it moves: in it at both ends, in images, on the way.
const COPIES: u64 = 8;

/// More is not warmed, MiB: it has to fit.
const WARMED_MIB_MAX: u64 = 8192;

/// Lets the machine have the memory at hand that the moves of a process of `mib` MiB need. A virtual machine has to ask
/// its host for memory that it uses for the first time, which takes five times as long as all else.
fn warm_for(mib: u32) {
    let bytes = (COPIES * u64::from(mib)).min(WARMED_MIB_MAX) << 20;
    let warmed = TestDir::new_in(Path::new(TMPFS)).and_then(|dir| warm_memory(dir.dir(), bytes));
    if let Err(error) = warmed {
        println!("memory is not warmed, the first figures may be too high: {error:#}");
    }
}

/// Measures all cases and judges them.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::install(NETWORK)?;
    let criu = args.common.criu()?;
    if let Some(migrations) = args.predict {
        return prediction::run(&criu, migrations, args.seed);
    }
    let how = "medians; pause: of a thread in the process, client: without an answer, by CLOCK_REALTIME; \
               floor: freeze of criu's lazy dump and lazy restore";
    let mut results = Results::begin("migrate", &args.common, &criu, promises::judge, how)?;
    let mut drawn = Vec::new();
    for case in Case::all_of(args) {
        warm_for(case.mib);
        let contenders = args.contender.clone();
        let taken: CaseResult = Rounds::take(case, contenders, args.rounds, |case, who| {
            run::run(&criu, case, who, &[])
        })?;
        let pairs = [
            (Contender::Hybrid, Contender::CriuCold),
            (Contender::PreCopy, Contender::CriuCold),
            (Contender::PostCopy, Contender::CriuPostCopy),
        ];
        let table = taken.table(&Metric::ALL, &pairs);
        drawn.push(picture::Group::of(&taken));
        if let Some(path) = &args.svg {
            run::write_whole(path, &picture::draw(&drawn))?;
        }
        let record = taken.record(&case.describe(), &Metric::ALL)?;
        results.add(table, record, taken)?;
    }
    results.end();
    Ok(())
}
