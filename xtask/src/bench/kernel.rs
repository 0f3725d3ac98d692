//! `cargo xtask bench kernel`: the laboratory for userfaultfd, its samples in the form of all benchmarks.
//!
//! The measurement is `cargo bench --bench uffd`, an optimised program of its own (`testbed::laboratory`). This module
//! runs it, prints medians and writes the document.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;

use anyhow::{Context, Result};
use testbed::laboratory::{GroupSamples, MechanismSamples, Samples};
use testbed::workspace::target_dir;

use super::document::{Case, Metric, Unsupported};
use super::results::{Results, machine};
use super::stats::{Sample, median};
use super::table::{Table, cell};
use crate::setup;

/// What to measure; everything, unless told otherwise.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only groups or mechanisms whose name contains this.
    #[arg(default_value = "")]
    only: String,
    /// Rounds of which the medians are taken, after one that warms up.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Memory of one mechanism in one round, MiB.
    #[arg(long, value_name = "MIB", default_value_t = 64,
          value_parser = clap::value_parser!(u32).range(2..=1 << 16))]
    mib: u32,
    /// Write everything measured to FILE.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Measures, prints a table for each group, and what this kernel lacks.
pub(crate) fn run(args: &Args) -> Result<()> {
    let samples = measure(args)?;
    let mut machine = machine()?;
    machine.clock = Some(samples.clock.clone());
    let how = format!(
        "clock: {}; medians of {} rounds, each of {} MiB or 4096 faults at most",
        samples.clock, samples.rounds, samples.mib
    );
    let file = args.json.as_deref();
    let mut results = Results::begin_on(machine, "kernel", file, |_: &[()]| Vec::new(), &how)?;
    for group in &samples.groups {
        let case = case(group, samples.mib);
        results.add(table(&case), case, ())?;
    }
    results.end();
    Ok(())
}

fn measure(args: &Args) -> Result<Samples> {
    let path = target_dir().join(format!("uffd-{}.json", process::id()));
    let (rounds, mib) = (args.rounds.to_string(), args.mib.to_string());
    let mut cargo = setup::cargo();
    cargo
        .args(["bench", "--bench", "uffd", "--", "--quiet"])
        .args(["--rounds", &rounds, "--mib", &mib, "--samples"])
        .arg(&path)
        .arg(&args.only);
    let read = setup::run(&mut cargo).and_then(|()| read(&path));
    _ = fs::remove_file(&path);
    read
}

fn read(path: &Path) -> Result<Samples> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| path.display().to_string())
}

/// A group as all benchmarks have it.
fn case(group: &GroupSamples, mib: u64) -> Case {
    let of = |one: &MechanismSamples, metric: usize| -> Vec<Option<Sample>> {
        let figure = |round: &Vec<f64>| round.get(metric).copied().map(Sample::exact);
        one.rounds.iter().map(figure).collect()
    };
    let metric = |(at, name): (usize, &String)| Metric {
        name: name.clone(),
        samples: group.mechanisms.iter().map(|one| of(one, at)).collect(),
    };
    let lacking = |one: &MechanismSamples| {
        let why = one.lacking.clone()?;
        let contender = one.name.clone();
        Some(Unsupported { contender, why })
    };
    let mut conditions = group.conditions.clone();
    conditions["mib"] = mib.into();
    Case {
        name: group.name.clone(),
        conditions,
        contenders: group
            .mechanisms
            .iter()
            .map(|one| one.name.clone())
            .collect(),
        metrics: group.metrics.iter().enumerate().map(metric).collect(),
        lacking: group.mechanisms.iter().filter_map(lacking).collect(),
    }
}

/// Medians, and behind them what lacks.
fn table(case: &Case) -> String {
    let headings = case.metrics.iter().map(|metric| metric.name.as_str());
    let mut table = Table::new(std::iter::once("").chain(headings));
    for (at, name) in case.contenders.iter().enumerate() {
        let of = |metric: &Metric| cell(median(metric.samples[at].iter().flatten().copied()));
        table.row(name, case.metrics.iter().map(of));
    }
    let lacking = case
        .lacking
        .iter()
        .map(|one| format!("{} is not measured: {}\n", one.contender, one.why));
    format!("{table}{}", lacking.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_becomes_a_case_with_its_reasons() {
        let one = |name: &str, rounds: Vec<Vec<f64>>, lacking: Option<&str>| MechanismSamples {
            name: name.to_owned(),
            rounds,
            lacking: lacking.map(str::to_owned),
        };
        let group = GroupSamples {
            name: "UFFDIO_MOVE".to_owned(),
            conditions: serde_json::json!({"part": "fill"}),
            metrics: vec!["ns a page".to_owned(), "GiB/s".to_owned()],
            mechanisms: vec![
                one("4 KiB", vec![vec![300.0, 12.0], vec![310.0, 11.0]], None),
                one("2 MiB", Vec::new(), Some("the kernel has no MOVE")),
            ],
        };
        let case = case(&group, 64);
        assert_eq!(case.conditions["mib"], 64);
        assert_eq!(case.metrics[1].samples[0].len(), 2);
        assert!(case.metrics[0].samples[1].is_empty());
        assert_eq!(
            table(&case),
            "       ns a page  GiB/s\n4 KiB        305   11.5\n2 MiB          -      -\n\
             2 MiB is not measured: the kernel has no MOVE\n"
        );
    }
}
