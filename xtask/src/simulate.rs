//! `cargo xtask simulate`: the seeded simulations (`tests/sim_*`) over as many seeds as are asked for.
//!
//! They are built as fast as releases, with all assertions, and run in parts of [`PART_SEEDS`] seeds. A part that fails
//! names its seed; what is left of it runs behind that seed.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use testbed::wait;
use testbed::workspace::root;

use crate::chosen;
use crate::setup::cargo;

/// What names of simulations begin with.
const PREFIX: &str = "sim_";

/// Seeds of one run of a test program.
const PART_SEEDS: u64 = 1000;

/// After so many failures of one simulation it is left.
const FAILURES_MAX: usize = 10;

/// What a test says of the seed that failed: `SIM_SEEDS=7..8`.
const MARK: &str = "SIM_SEEDS=";

/// Which simulations, and how much of them.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Simulations: sim_ferry, ... [default: all].
    names: Vec<String>,

    /// How many seeds.
    #[arg(long, default_value_t = 20_000)]
    seeds: u64,

    /// The first of them.
    #[arg(long, default_value_t = 0)]
    from: u64,
}

/// What is printed at the end, as one line of JSON.
#[derive(Serialize)]
struct Report {
    from: u64,
    seeds: u64,
    simulations: Vec<Outcome>,
}

#[derive(Serialize)]
struct Outcome {
    simulation: String,
    /// Seeds that ran.
    seeds: u64,
    seconds: f64,
    failures: Vec<Failure>,
}

#[derive(Serialize)]
struct Failure {
    seed: u64,
    /// Runs that seed again.
    command: String,
    /// The end of what the test said.
    said: String,
}

/// What cargo says of a program that it has built.
#[derive(Deserialize)]
struct Artifact {
    target: Target,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

/// Runs the simulations one after another. Fails if a seed does.
pub(crate) fn run(args: &Args) -> Result<()> {
    let end = args.from.checked_add(args.seeds);
    let end = end.context("there are no seeds beyond 2^64")?;
    let programs = build(&chosen(&args.names)?)?;
    let mut simulations = Vec::new();
    for (name, program) in programs {
        let outcome = simulate(&name, &program, args.from..end)?;
        println!(
            "{name:<14} {:>6} seeds in {:>7.1} s, {} failures",
            outcome.seeds,
            outcome.seconds,
            outcome.failures.len()
        );
        for failure in &outcome.failures {
            println!("    {}\n{}", failure.command, failure.said);
        }
        simulations.push(outcome);
    }
    let failures: usize = simulations.iter().map(|one| one.failures.len()).sum();
    let report = Report {
        from: args.from,
        seeds: args.seeds,
        simulations,
    };
    println!("{}", serde_json::to_string(&report)?);
    ensure!(failures == 0, "{failures} seeds failed");
    Ok(())
}

/// The simulations that are wanted, or all.
fn chosen(wanted: &[String]) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(root().join("tests"))? {
        let path = entry?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        if name.starts_with(PREFIX) {
            names.push(name.into_owned());
        }
    }
    chosen::chosen(names, wanted)
}

/// Builds the test programs, and tells where each is.
fn build(names: &[String]) -> Result<BTreeMap<String, PathBuf>> {
    let mut command = cargo();
    command.args([
        "test",
        "--no-run",
        "--profile",
        "checked",
        "-p",
        "pageferry",
    ]);
    command.args(names.iter().flat_map(|name| ["--test", name]));
    command.args(["--message-format", "json-render-diagnostics"]);
    let output = command.stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "the simulations were not built");
    let messages = String::from_utf8(output.stdout)?;
    let artifacts = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Artifact>(line).ok());
    let programs: BTreeMap<String, PathBuf> = artifacts
        .filter(|artifact| names.contains(&artifact.target.name))
        .filter_map(|artifact| Some((artifact.target.name, artifact.executable?)))
        .collect();
    ensure!(
        programs.len() == names.len(),
        "cargo names no program of a simulation"
    );
    Ok(programs)
}

fn simulate(name: &str, program: &Path, seeds: Range<u64>) -> Result<Outcome> {
    let started = Instant::now();
    let mut failures = Vec::new();
    let mut next = seeds.start;
    while next < seeds.end && failures.len() < FAILURES_MAX {
        ensure!(!wait::is_interrupted(), "interrupted");
        let part = next..seeds.end.min(next + PART_SEEDS);
        next = match failed_seed(program, &part)? {
            None => part.end,
            Some((seed, said)) => {
                let command = format!("cargo xtask simulate {name} --from {seed} --seeds 1");
                failures.push(Failure {
                    seed,
                    command,
                    said,
                });
                seed + 1
            }
        };
    }
    Ok(Outcome {
        simulation: name.to_owned(),
        seeds: next - seeds.start,
        seconds: started.elapsed().as_secs_f64(),
        failures,
    })
}

/// Runs some seeds. If one fails: the first that does, and the end of what the test said.
fn failed_seed(program: &Path, seeds: &Range<u64>) -> Result<Option<(u64, String)>> {
    let range = format!("{}..{}", seeds.start, seeds.end);
    let output = Command::new(program)
        .current_dir(root())
        .env("SIM_SEEDS", &range)
        .stdin(Stdio::null())
        .output()
        .with_context(|| program.display().to_string())?;
    if output.status.success() {
        return Ok(None);
    }
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let said = lines[lines.len().saturating_sub(60)..].join("\n");
    let seed = first_seed(&text).filter(|seed| seeds.contains(seed));
    let seed = seed.with_context(|| format!("seeds {range} failed, and none is named:\n{said}"))?;
    Ok(Some((seed, said)))
}

/// The least seed that is named as one that failed.
fn first_seed(text: &str) -> Option<u64> {
    let named = text.split(MARK).skip(1);
    let seeds = named.filter_map(|rest| rest.split("..").next()?.parse().ok());
    seeds.min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_failed_seed_is_found() {
        let said = "this run again: SIM_SEEDS=812..813\nthread panicked\nSIM_SEEDS=31..32\n";
        assert_eq!(first_seed(said), Some(31));
        assert_eq!(first_seed("test result: ok"), None);
    }
}
