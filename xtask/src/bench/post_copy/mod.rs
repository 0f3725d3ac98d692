//! `cargo xtask bench post-copy`: restored processes that touch memory which is not there yet.
//!
//! ```text
//!   case = size x order x link      contenders of a case, in turn
//!     |                               pageferry    lazy-client        <- criu dump --lazy-pages
//!     v                               CRIU         criu lazy-pages    <- criu dump --lazy-pages
//!   rounds of runs                    own source   lazy-client        <- page-server --lazy-pages
//!     |  medians, ratios round by round
//!     v
//!   table, JSON, bars (promises)
//! ```

mod arrival;
mod case;
mod map_count;
mod measure;
mod promises;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

use super::results::{CommonArgs, Results};
use super::rounds::Rounds;
use case::{Access, Case, Contender, LinkKind, Shape, SourceKind};
use map_count::MaxMapCount;
use measure::{Bench, Metric, Run};

/// What to measure; everything, unless told otherwise.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Memory to move, MiB.
    #[arg(long, value_name = "MIB", value_delimiter = ',', default_values_t = [256, 1024, 4096],
          value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    size: Vec<u32>,
    /// How it is accessed.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Access::ALL)]
    order: Vec<Access>,
    /// What lies between source and daemon.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = LinkKind::ALL)]
    link: Vec<LinkKind>,
    /// Who has the memory [default: dump and page-server for whole memory, all for other shapes].
    #[arg(long, value_enum, value_delimiter = ',')]
    source: Vec<SourceKind>,
    /// How the pages lie. Other shapes than whole are compared with that, in the smallest of the sizes; 10^5
    /// mappings take a vm.max_map_count that is raised meanwhile.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Shape::ALL)]
    shape: Vec<Shape>,
    /// A directory with the programs of another build, which competes as well.
    #[arg(long, value_name = "DIR")]
    baseline: Option<PathBuf>,
    /// Rounds of which the medians are taken, after one that warms up.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// A run that takes more seconds after the restore is ended, and counts as that long; its faults
    /// are those until then.
    #[arg(long, value_name = "SECONDS", default_value_t = 60,
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    limit: u64,
    #[command(flatten)]
    common: CommonArgs,
}

type CaseResult = Rounds<Case, Contender, Run>;

/// Who of `all` is compared with whom.
fn pairs(all: &[Contender]) -> Vec<(Contender, Contender)> {
    let of = |&who: &Contender| who.rivals().into_iter().map(move |rival| (who, rival));
    all.iter().flat_map(of).collect()
}

/// Measures all cases asked for, prints each as it is done, and the bars at the end.
pub(crate) fn run(args: &Args) -> Result<()> {
    let criu = args.common.criu()?;
    let how = format!(
        "medians of {}; s, µs and MiB; a run is ended after {} s; ratios are taken round by round",
        args.runs, args.limit
    );
    let results = Results::begin("post-copy", &args.common, &criu, promises::judge, &how)?;
    let mut results = results.limited_to(args.limit);
    let bench = Bench {
        criu: &criu,
        limit: Duration::from_secs(args.limit),
        baseline: args.baseline.as_deref(),
    };
    for case in Case::all_of(&args.size, &args.order, &args.link, &args.shape) {
        let _mappings = match case.shape {
            Shape::Mappings => Some(MaxMapCount::raise()?),
            Shape::Whole | Shape::Holes => None,
        };
        let sources = match (args.source.is_empty(), case.shape) {
            (false, _) => &args.source[..],
            (true, Shape::Whole) => &SourceKind::FOR_WHOLE,
            (true, Shape::Holes | Shape::Mappings) => &SourceKind::ALL,
        };
        let contenders = Contender::all_of(sources, case.shape, args.baseline.is_some());
        let pairs = pairs(&contenders);
        let run = |case: &Case, who| bench.run(*case, who);
        let result = Rounds::take(case, contenders, args.runs, run)?;
        let table = result.table(&Metric::ALL, &pairs);
        let record = result.record(&case.describe(), &Metric::ALL)?;
        results.add(table, record, result)?;
    }
    results.end();
    Ok(())
}
