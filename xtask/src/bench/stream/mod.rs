//! `cargo xtask bench stream`: processes dumped to another host, round after round.
//!
//! ```text
//!   case = memory x share that changes x link       contenders, in turn on the same process
//!     |                                                CRIU    criu page-server
//!     v                                                plain   page-server
//!   rounds of dumps, changes between them              ferry   page-server --forward, page-server
//!     |  medians, ratios round by round
//!     v
//!   table, JSON, bars (promises)
//! ```
//!
//! Where the kernel tracks no dirty pages CRIU has no incremental dump: all contenders get full dumps.

mod heap;
mod promises;
mod rounds;
mod subject;

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Result;
use clap::ValueEnum;
use serde::Serialize;
use testbed::net::{NetNs, command_in};

use super::results::{CommonArgs, Results};
use super::rounds::{Contend, Measure, Part, Rounds};
use super::stats::Sample;
use super::table::{Table, cell};
use crate::setup::{self, JDK, NETWORK, PYTHON};
use rounds::Run;
use subject::Memory;

const MIB: f64 = (1u32 << 20) as f64;

/// What to measure; everything, unless told otherwise.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// What is in the memory.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Memory::ALL)]
    memory: Vec<Memory>,
    /// How much of it there is, MiB.
    #[arg(long, value_name = "MIB", default_value_t = 1024,
          value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    size: u32,
    /// How much of it changes between two rounds, percent; random pages change all.
    #[arg(long, value_name = "PERCENT", value_delimiter = ',', default_values_t = [2, 10],
          value_parser = clap::value_parser!(u32).range(1..=99))]
    dirty: Vec<u32>,
    /// What lies between source and destination.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = LinkKind::ALL)]
    link: Vec<LinkKind>,
    /// Rounds, the first with nothing to build on; after one that warms up.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(2..))]
    rounds: u32,
    #[command(flatten)]
    common: CommonArgs,
}

/// What lies between the two hosts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(super) enum LinkKind {
    /// Nothing: one host.
    Loopback,
    /// 1 Gbit/s.
    Gigabit,
}

impl LinkKind {
    pub(super) const ALL: [LinkKind; 2] = [LinkKind::Gigabit, LinkKind::Loopback];
    const GIGABIT_BITS_PER_S: u64 = 1_000_000_000;

    fn name(self) -> &'static str {
        match self {
            LinkKind::Loopback => "loopback",
            LinkKind::Gigabit => "1 Gbit/s",
        }
    }
}

/// Who receives the dumps.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Contender {
    /// CRIU's page server.
    Criu,
    /// Our page server, without ferry.
    Plain,
    /// Our page servers at both ends, and ferry between them.
    Ferry,
}

impl Contender {
    const ALL: [Contender; 3] = [Contender::Criu, Contender::Plain, Contender::Ferry];
}

impl Contend for Contender {
    fn name(self) -> &'static str {
        match self {
            Contender::Criu => "CRIU",
            Contender::Plain => "page-server",
            Contender::Ferry => "ferry",
        }
    }
}

/// What is dumped over what.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub(super) struct Case {
    memory: Memory,
    mib: u32,
    percent: u32,
    link: LinkKind,
}

impl Case {
    /// All that `args` ask for, of the kinds of `memory` that can be had.
    fn all_of(args: &Args, memory: &[Memory]) -> Vec<Case> {
        let mut all = Vec::new();
        for &link in &args.link {
            for &memory in memory {
                let shares = match memory {
                    // The case is about what is new each time.
                    Memory::Random => &[100][..],
                    _ => &args.dirty,
                };
                all.extend(shares.iter().map(|&percent| Case {
                    memory,
                    mib: args.size,
                    percent,
                    link,
                }));
            }
        }
        all
    }

    fn contenders(self) -> &'static [Contender] {
        &Contender::ALL
    }

    fn describe(self) -> String {
        let Case {
            memory,
            mib,
            percent,
            link,
        } = self;
        let (name, counts, link) = (memory.name(), memory.counts(), link.name());
        format!("{name}, about {mib} MiB, {percent} % of its {counts} change in a round, {link}")
    }
}

/// What is read off a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Metric {
    Seconds,
    Bytes,
    Cpu,
}

impl Metric {
    const ALL: [Metric; 3] = [Metric::Seconds, Metric::Bytes, Metric::Cpu];
}

impl Measure<Run> for Metric {
    fn heading(self) -> &'static str {
        match self {
            Metric::Seconds => "s",
            Metric::Bytes => "MiB",
            Metric::Cpu => "CPU s",
        }
    }

    fn of(self, run: &Run) -> Option<Sample> {
        Some(Sample::exact(match self {
            Metric::Seconds => run.seconds,
            Metric::Bytes => run.bytes as f64 / MIB,
            Metric::Cpu => run.cpu_s,
        }))
    }
}

/// ferry's bytes of a kind, MiB.
#[derive(Clone, Copy)]
struct OfKind(&'static str);

impl Measure<Run> for OfKind {
    fn heading(self) -> &'static str {
        self.0
    }

    fn of(self, run: &Run) -> Option<Sample> {
        let bytes = run.sent.as_ref()?[self.0]["bytes"].as_f64()?;
        Some(Sample::exact(bytes / MIB))
    }
}

/// Which rounds of a case.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Which {
    /// The one that has nothing to build on.
    First,
    /// All others.
    Later,
    /// The last: the one for which a migrating process stands still.
    Last,
    /// All.
    All,
}

impl Which {
    fn of<'a>(self, result: &'a CaseResult) -> Part<'a, Contender, Run> {
        match self {
            Which::First => result.part(..1),
            Which::Later => result.part(1..),
            Which::Last => result.part(result.count() - 1..),
            Which::All => result.part(..),
        }
    }
}

type CaseResult = Rounds<Case, Contender, Run>;

/// The median of ferry's ratios to another contender.
fn ratio(result: &CaseResult, to: Contender, which: Which, metric: Metric) -> Option<Sample> {
    which.of(result).ratio(Contender::Ferry, to, metric)
}

fn tables(result: &CaseResult) -> String {
    let columns = [
        (Which::First, Metric::Seconds),
        (Which::First, Metric::Bytes),
        (Which::First, Metric::Cpu),
        (Which::Later, Metric::Seconds),
        (Which::Later, Metric::Bytes),
        (Which::Later, Metric::Cpu),
        (Which::Last, Metric::Seconds),
    ];
    let headings = columns.map(|(which, metric)| match (which, metric) {
        (Which::First, Metric::Seconds) => "first s",
        (Which::Later, Metric::Seconds) => "later s",
        (Which::Last, Metric::Seconds) => "last s",
        _ => metric.heading(),
    });
    let mut table = Table::new(std::iter::once("").chain(headings));
    for &who in &result.contenders {
        let medians = columns.map(|(which, metric)| cell(which.of(result).median(who, metric)));
        table.row(who.name(), medians);
    }
    for to in [Contender::Criu, Contender::Plain] {
        let ratios = columns.map(|(which, metric)| cell(ratio(result, to, which, metric)));
        table.row(&format!("ferry / {}", to.name()), ratios);
    }
    let kinds = ["zero", "same", "shared", "delta", "zstd", "raw"].map(OfKind);
    let headings = kinds.map(Measure::heading);
    let mut of_kinds = Table::new(std::iter::once("ferry's MiB by kind").chain(headings));
    for (name, which) in [("first", Which::First), ("later", Which::Later)] {
        let medians = kinds.map(|kind| cell(which.of(result).median(Contender::Ferry, kind)));
        of_kinds.row(name, medians);
    }
    format!("{table}\n{of_kinds}")
}

/// Brings what the cases need to the machine. Gives the kinds of memory that can be had then, and says
/// why another cannot.
fn install(args: &Args) -> Result<Vec<Memory>> {
    setup::install(NETWORK)?;
    let mut memory = args.memory.clone();
    if memory.contains(&Memory::Python) {
        setup::install(PYTHON)?;
    }
    if memory.contains(&Memory::Jvm)
        && let Err(error) = setup::install(JDK)
    {
        println!("{} is left out: no JDK: {error:#}", Memory::Jvm.name());
        memory.retain(|&kind| kind != Memory::Jvm);
    }
    Ok(memory)
}

/// Measures all cases asked for, prints each as it is done, and the bars at the end.
pub(crate) fn run(args: &Args) -> Result<()> {
    let memory = install(args)?;
    let criu = args.common.criu()?;
    let how = format!(
        "{} rounds of full dumps after one that warms up, s and MiB; later: medians of all but the \
         first; ratios are taken round by round",
        args.rounds
    );
    let mut results = Results::begin("stream", &args.common, &criu, promises::judge, &how)?;
    for case in Case::all_of(args, &memory) {
        let rounds = rounds::run(&criu, case, args.rounds)?;
        let result = Rounds::of(case, case.contenders().to_vec(), rounds);
        let record = result.record(&case.describe(), &Metric::ALL)?;
        results.add(tables(&result), record, result)?;
    }
    results.end();
    Ok(())
}

/// A command in a session of its own and without open files: as CRIU wants it.
fn in_session(net: Option<&NetNs>, program: &Path) -> Command {
    let mut command = command_in(net, "setsid");
    command
        .arg(program)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}
