//! `cargo xtask bench instructions --against REV`: pure hot paths, counted in instructions.
//!
//! ```text
//!   build     benches/workloads, built against this tree and against a work tree of REV
//!   callgrind how many instructions a program takes
//!     |  (all - preparation alone) / times, for each workload and build
//!     v
//!   table, JSON, bars: this tree / REV
//! ```
//!
//! Both builds do the same work: today's sources of the workloads are compiled against REV. Only where they do not fit
//! REV's interface its own are taken. A count is the same on every run, whatever else the machine does; it says nothing
//! of caches and branches.

mod build;
mod callgrind;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use self::build::{Build, Tree};
use super::bars::{self, Bar};
use super::document;
use super::results::{Results, machine};
use super::rounds::{Contend, Measure, Rounds};
use super::stats::Sample;

/// What to count, against what.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The revision to compare with: what git understands.
    #[arg(long, value_name = "REV")]
    against: String,
    /// Only workloads whose name contains this.
    #[arg(default_value = "")]
    only: String,
    /// The most that this tree may take, as a multiple of what REV takes.
    #[arg(long, value_name = "RATIO", default_value_t = 1.02)]
    limit: f64,
    /// Write everything counted to FILE.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Which build.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Side {
    This,
    Against,
}

impl Contend for Side {
    fn name(self) -> &'static str {
        match self {
            Side::This => "this tree",
            Side::Against => "the revision",
        }
    }
}

/// Millions of instructions of one piece of work.
#[derive(Clone, Copy)]
struct Instructions;

impl Measure<f64> for Instructions {
    fn heading(self) -> &'static str {
        "M instructions"
    }

    fn of(self, run: &f64) -> Option<Sample> {
        Some(Sample::exact(run / 1e6))
    }
}

/// One workload.
#[derive(Clone, Debug, Serialize)]
struct Case {
    workload: String,
    times: u32,
    against: String,
}

type CaseResult = Rounds<Case, Side, f64>;

/// A workload's counts of both builds.
fn compared(case: Case, this: f64, against: f64) -> CaseResult {
    let sides = vec![Side::This, Side::Against];
    Rounds::of(case, sides, vec![vec![this, against]])
}

/// What each workload may take.
fn judge(results: &[CaseResult], limit: f64) -> Vec<Bar> {
    let bar = |result: &CaseResult| {
        let ratio = result.ratio(Side::This, Side::Against, Instructions);
        let name = format!("{}: instructions, this tree / REV", result.case.workload);
        Bar::new(name, ratio, limit)
    };
    results.iter().map(bar).collect()
}

/// Builds both, counts, prints a table for each workload and the bars.
pub(crate) fn run(args: &Args) -> Result<()> {
    callgrind::check()?;
    ensure!(
        args.limit > 0.0,
        "--limit {}: a ratio is above 0",
        args.limit
    );
    let other = Tree::of_revision(&args.against)?;
    let builds = build::both(&other)?;
    let how = format!(
        "instructions of valgrind's callgrind, against {} ({}); {}",
        args.against, other.commit, builds.how
    );
    let file = args.json.as_deref();
    // The limit is the command line's, so bars are judged here.
    let judge_nothing = |_: &[()]| Vec::new();
    let mut results = Results::begin_on(machine()?, "instructions", file, judge_nothing, &how)?;
    let mut compared_all = Vec::new();
    let workloads = builds.this.workloads()?;
    let theirs = builds.against.workloads()?;
    for (name, times) in workloads
        .into_iter()
        .filter(|(name, _)| name.contains(&args.only))
    {
        if !theirs.iter().any(|(other, _)| *other == name) {
            println!("\n{name}: the revision has no such workload");
            continue;
        }
        let this = count(&builds.this, &name, times)?;
        let against = count(&builds.against, &name, times)?;
        let case = Case {
            workload: name.clone(),
            times,
            against: other.commit.clone(),
        };
        let result = compared(case, this, against);
        let record: document::Case = result.record(&name, &[Instructions])?;
        let table = result.table(&[Instructions], &[(Side::This, Side::Against)]);
        compared_all.push(result);
        results.add_judged(table, record, judge(&compared_all, args.limit))?;
    }
    ensure!(
        !compared_all.is_empty(),
        "no workload's name contains {:?}",
        args.only
    );
    println!("\n{}", bars::table(&judge(&compared_all, args.limit)));
    Ok(())
}

/// Instructions of one piece of work: preparation, which all runs have, is taken off.
fn count(build: &Build, name: &str, times: u32) -> Result<f64> {
    let of = |times: u32| {
        let counted = callgrind::count(&build.program, &[name, &times.to_string()]);
        counted.with_context(|| format!("{name}, {times} times"))
    };
    let (all, preparation) = (of(times)?, of(0)?);
    ensure!(
        all > preparation,
        "{name}: {all} instructions with work, {preparation} without"
    );
    Ok((all - preparation) as f64 / f64::from(times))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(workload: &str, this: f64, against: f64) -> CaseResult {
        let case = Case {
            workload: workload.to_owned(),
            times: 1,
            against: "0123456789ab".to_owned(),
        };
        compared(case, this, against)
    }

    #[test]
    fn a_planted_slowdown_fails_its_bar_alone() {
        let results = [
            result("deframer", 80_000_000.0, 80_000_000.0),
            // One instruction more in twenty.
            result("window", 105_000_000.0, 100_000_000.0),
            result("ferry-hash", 90.0, 100.0),
        ];
        let bars = judge(&results, 1.02);
        let kept: Vec<_> = bars.iter().map(Bar::kept).collect();
        assert_eq!(kept, [Some(true), Some(false), Some(true)]);
        assert_eq!(bars[1].measured(), Some(Sample::exact(1.05)));
        assert!(bars[1].name().starts_with("window: "));
        let shown = bars::table(&bars).to_string();
        assert_eq!(shown.matches("FAIL").count(), 1, "{shown}");
        let table = results[1].table(&[Instructions], &[(Side::This, Side::Against)]);
        let shown = table.to_string();
        assert!(
            shown.contains("this tree / the revision") && shown.contains("1.05"),
            "{shown}"
        );
    }
}
