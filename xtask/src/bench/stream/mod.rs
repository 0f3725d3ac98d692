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

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Result;
use clap::ValueEnum;
use serde::Serialize;
use serde_json::Value;
use testbed::criu;
use testbed::net::{NetNs, command_in};

use super::bars::{self, Bar};
use super::stats::{Sample, median, median_ratio};
use super::table::{Table, cell};
use super::{Machine, write_json};
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
    /// The CRIU to use: a version (4.2.1) or a Debian suite (trixie, sid, experimental).
    #[arg(long, default_value = "sid")]
    criu: String,
    /// Write everything measured to FILE.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
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
    fn of(self, run: &Run) -> Sample {
        Sample::exact(match self {
            Metric::Seconds => run.seconds,
            Metric::Bytes => run.bytes as f64 / MIB,
            Metric::Cpu => run.cpu_s,
        })
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

/// All rounds of one case.
#[derive(Clone, Debug, Serialize)]
struct CaseResult {
    case: Case,
    contenders: Vec<Contender>,
    /// Runs of each round, in the order of the contenders.
    rounds: Vec<Vec<Run>>,
}

impl CaseResult {
    fn rounds(&self, which: Which) -> &[Vec<Run>] {
        let last = self.rounds.len() - 1;
        match which {
            Which::First => &self.rounds[..1],
            Which::Later => &self.rounds[1..],
            Which::Last => &self.rounds[last..],
            Which::All => &self.rounds,
        }
    }

    fn samples(&self, who: Contender, which: Which, metric: Metric) -> Vec<Option<Sample>> {
        let at = self.contenders.iter().position(|&other| other == who);
        let of_round = |round: &Vec<Run>| Some(metric.of(round.get(at?)?));
        self.rounds(which).iter().map(of_round).collect()
    }

    fn median(&self, who: Contender, which: Which, metric: Metric) -> Option<Sample> {
        median(self.samples(who, which, metric).into_iter().flatten())
    }

    /// The median of ferry's ratios to another contender.
    fn ratio(&self, to: Contender, which: Which, metric: Metric) -> Option<Sample> {
        let ours = self.samples(Contender::Ferry, which, metric);
        median_ratio(ours.into_iter().zip(self.samples(to, which, metric)))
    }

    /// ferry's bytes of a kind, MiB.
    fn of_kind(&self, which: Which, kind: &str) -> Option<Sample> {
        let at = self
            .contenders
            .iter()
            .position(|&who| who == Contender::Ferry)?;
        let of_round = |round: &Vec<Run>| {
            let sent: &Value = round.get(at)?.sent.as_ref()?;
            let bytes = sent[kind]["bytes"].as_f64()?;
            Some(Sample::exact(bytes / MIB))
        };
        median(self.rounds(which).iter().filter_map(of_round))
    }

    fn print(&self) {
        let mut table = Table::new([
            "", "first s", "MiB", "CPU s", "later s", "MiB", "CPU s", "last s",
        ]);
        let columns = [
            (Which::First, Metric::Seconds),
            (Which::First, Metric::Bytes),
            (Which::First, Metric::Cpu),
            (Which::Later, Metric::Seconds),
            (Which::Later, Metric::Bytes),
            (Which::Later, Metric::Cpu),
            (Which::Last, Metric::Seconds),
        ];
        for &who in &self.contenders {
            let cells = columns.map(|(which, metric)| cell(self.median(who, which, metric)));
            table.row(who.name(), cells);
        }
        for to in [Contender::Criu, Contender::Plain] {
            let cells = columns.map(|(which, metric)| cell(self.ratio(to, which, metric)));
            table.row(&format!("ferry / {}", to.name()), cells);
        }
        println!("\n{}\n{table}", self.case.describe());
        let mut kinds = Table::new([
            "ferry's MiB by kind",
            "zero",
            "same",
            "delta",
            "zstd",
            "raw",
        ]);
        for (name, which) in [("first", Which::First), ("later", Which::Later)] {
            let cells = ["zero", "same", "delta", "zstd", "raw"];
            kinds.row(name, cells.map(|kind| cell(self.of_kind(which, kind))));
        }
        println!("{kinds}");
    }
}

/// What goes into the file.
#[derive(Serialize)]
struct Results<'a> {
    machine: &'a Machine,
    cases: &'a [CaseResult],
    bars: &'a [Bar],
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
    let criu = criu::of_version(&args.criu)?;
    let machine = Machine::here(&criu)?;
    println!("{}", machine.describe());
    println!(
        "{} rounds of full dumps after one that warms up, s and MiB; later: medians of all but the \
         first; ratios are taken round by round",
        args.rounds
    );
    let mut results: Vec<CaseResult> = Vec::new();
    let mut bars = Vec::new();
    for case in Case::all_of(args, &memory) {
        let result = CaseResult {
            case,
            contenders: case.contenders().to_vec(),
            rounds: rounds::run(&criu, case, args.rounds)?,
        };
        result.print();
        results.push(result);
        bars = promises::judge(&results);
        // After each case: a long run that is interrupted leaves what it has.
        if let Some(path) = &args.json {
            write_json(
                path,
                &Results {
                    machine: &machine,
                    cases: &results,
                    bars: &bars,
                },
            )?;
        }
    }
    println!("\n{}", bars::table(&bars));
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
