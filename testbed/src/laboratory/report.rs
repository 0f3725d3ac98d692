//! Samples as text and as JSON, and the program of `cargo bench --bench uffd`.

use std::fmt::{self, Display, Formatter};
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde::{Deserialize, Serialize};

use super::{Scale, measure};

/// Everything measured, and what it depends on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Samples {
    /// The kernel's release.
    pub kernel: String,
    /// The CPU's model.
    pub cpu: String,
    /// The kernel's clock source, and what a reading of it costs.
    pub clock: String,
    /// Memory of one mechanism in one round, MiB.
    pub mib: u64,
    /// Rounds that count.
    pub rounds: u32,
    /// What was measured, in order.
    pub groups: Vec<GroupSamples>,
}

/// Mechanisms under the same conditions.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GroupSamples {
    /// The conditions in words.
    pub name: String,
    /// The conditions by name, numbers and words.
    pub conditions: serde_json::Value,
    /// Names of the figures, with their units.
    pub metrics: Vec<String>,
    /// Who took turns.
    pub mechanisms: Vec<MechanismSamples>,
}

/// One mechanism: rounds, or why it has none.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MechanismSamples {
    /// Its name.
    pub name: String,
    /// For each round a figure for each metric.
    pub rounds: Vec<Vec<f64>>,
    /// Why it cannot be measured here.
    pub lacking: Option<String>,
}

impl MechanismSamples {
    pub(super) fn of(name: &str) -> MechanismSamples {
        MechanismSamples {
            name: name.to_owned(),
            rounds: Vec::new(),
            lacking: None,
        }
    }

    /// The median of a metric.
    fn median(&self, metric: usize) -> Option<f64> {
        let mut all: Vec<f64> = self
            .rounds
            .iter()
            .filter_map(|round| round.get(metric))
            .copied()
            .collect();
        all.sort_by(f64::total_cmp);
        all.get(all.len() / 2).copied()
    }
}

impl Samples {
    pub(super) fn of(scale: &Scale, groups: Vec<GroupSamples>) -> Result<Samples> {
        let read = |path: &str| fs::read_to_string(path).with_context(|| path.to_owned());
        let cpus = read("/proc/cpuinfo")?;
        let model = cpus
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(name, _)| name.trim() == "model name")
            .map_or("of unknown model", |(_, model)| model.trim());
        let source = read("/sys/devices/system/clocksource/clocksource0/current_clocksource");
        let source = source.map_or("unknown".to_owned(), |name| name.trim().to_owned());
        Ok(Samples {
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            cpu: model.to_owned(),
            clock: format!("{source}, {:.0} ns a reading", clock_ns()),
            mib: scale.bytes as u64 >> 20,
            rounds: scale.rounds,
            groups,
        })
    }
}

/// What a reading of the clock takes, ns: part of each latency.
fn clock_ns() -> f64 {
    const READINGS: u32 = 10_000;
    let begun = Instant::now();
    for _ in 0..READINGS {
        std::hint::black_box(Instant::now());
    }
    begun.elapsed().as_secs_f64() * 1e9 / f64::from(READINGS)
}

impl Display for Samples {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        writeln!(
            out,
            "Linux {}, {}, clock {}; medians of {} rounds of {} MiB",
            self.kernel, self.cpu, self.clock, self.rounds, self.mib
        )?;
        self.groups.iter().try_for_each(|group| group.fmt(out))
    }
}

impl Display for GroupSamples {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        writeln!(out, "\n{}", self.name)?;
        let names = self.mechanisms.iter().map(|one| one.name.chars().count());
        let width = names.max().unwrap_or(0);
        write!(out, "{:width$}", "")?;
        for metric in &self.metrics {
            write!(out, "  {metric}")?;
        }
        writeln!(out)?;
        for one in &self.mechanisms {
            write!(out, "{:width$}", one.name)?;
            match &one.lacking {
                Some(why) => write!(out, "  {why}")?,
                None => {
                    for (at, metric) in self.metrics.iter().enumerate() {
                        let cell = one.median(at).map_or("-".to_owned(), shown);
                        write!(out, "  {cell:>0$}", metric.chars().count())?;
                    }
                }
            }
            writeln!(out)?;
        }
        Ok(())
    }
}

/// Three digits.
fn shown(value: f64) -> String {
    let decimals = match value.abs() {
        0.0 | 100.0.. => 0,
        10.0.. => 1,
        1.0.. => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

/// What `cargo bench --bench uffd` understands.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "uffd",
    about = "Measures this kernel's mechanisms around userfaultfd"
)]
pub struct Args {
    /// Only groups or mechanisms whose name contains this.
    #[arg(default_value = "")]
    pub only: String,
    /// Rounds of which the medians are taken, after one that warms up.
    #[arg(long, default_value_t = Scale::FULL.rounds, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Memory of one mechanism in one round, MiB.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..=1 << 16))]
    pub mib: u32,
    /// Write all samples to FILE, as JSON.
    #[arg(long, value_name = "FILE")]
    pub samples: Option<PathBuf>,
    /// Print nothing but errors.
    #[arg(long)]
    pub quiet: bool,
    /// What cargo says.
    #[arg(long, hide = true)]
    pub bench: bool,
}

impl Args {
    fn scale(&self) -> Result<Scale> {
        ensure!(
            self.mib.is_multiple_of(2),
            "--mib {}: take a multiple of 2, the size of a huge page",
            self.mib
        );
        Ok(Scale {
            bytes: usize::try_from(self.mib)? << 20,
            rounds: self.rounds,
            ..Scale::FULL
        })
    }
}

/// The program.
pub fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let samples = measure(&args.scale()?, &args.only, |group| {
        if !args.quiet {
            eprintln!("{group} ...");
        }
    })?;
    ensure!(
        !samples.groups.is_empty(),
        "no mechanism's name contains {:?}: run it without for all names",
        args.only
    );
    if !args.quiet {
        print!("{samples}");
    }
    if let Some(path) = &args.samples {
        let text = serde_json::to_vec_pretty(&samples)?;
        fs::write(path, text).with_context(|| path.display().to_string())?;
    }
    Ok(())
}
