//! `cargo xtask fuzz`: libFuzzer on the targets of fuzz/, built by the installed compiler.
//!
//! ```text
//! cargo build --workspace --bin fuzz      our crates by way of fuzz/instrument.sh
//! target/debug/fuzz                       once for each target
//!     reads    fuzz/corpus/NAME, target/fuzz/NAME/corpus
//!     writes   target/fuzz/NAME/{corpus,findings,log}
//! ```

mod corpus;
mod log;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use testbed::wait;
use testbed::workspace::{root, target_dir};

use crate::setup::{self, cargo};
use log::Totals;

/// What libFuzzer may use at most for one input: seconds, and MiB of memory.
const LIMITS: [&str; 2] = ["-timeout=20", "-rss_limit_mb=2048"];

/// What to run, and for how long.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Targets: names of directories in fuzz/corpus [default: all].
    targets: Vec<String>,

    /// Minutes for each target; 0.05 are three seconds.
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,

    /// Plant a bug in each target and fail unless it is found.
    #[arg(long)]
    canary: bool,

    /// Take what covers more than the committed corpus into it.
    #[arg(long, conflicts_with = "canary")]
    keep: bool,
}

/// How it went with a target.
#[derive(Serialize)]
struct Outcome {
    target: String,
    seconds: f64,
    #[serde(flatten)]
    totals: Totals,
    /// Inputs that break a promise. With a canary: the one that finds it.
    findings: Vec<PathBuf>,
}

/// What is printed at the end, as one line of JSON.
#[derive(Serialize)]
struct Report {
    canary: bool,
    minutes: f64,
    targets: Vec<Outcome>,
}

/// The fuzzer, and how long it runs.
struct Fuzzer<'a> {
    program: &'a Path,
    args: &'a Args,
}

/// Builds the fuzzer and runs the targets one after another. Fails at a finding, or without one if a bug was planted.
pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!(
        args.minutes.is_finite() && args.minutes > 0.0,
        "--minutes must be more than 0"
    );
    let targets = corpus::chosen(&args.targets)?;
    let fuzzer = Fuzzer {
        program: &build()?,
        args,
    };
    let mut outcomes = Vec::new();
    for name in targets {
        let outcome = match args.canary {
            true => fuzzer.find_canary(&name),
            false => fuzzer.fuzz(&name),
        };
        let outcome = outcome.with_context(|| name.clone())?;
        println!("{}", line(&outcome));
        outcomes.push(outcome);
    }
    let is_bad = |outcome: &&Outcome| outcome.findings.is_empty() == args.canary;
    let bad = outcomes.iter().filter(is_bad);
    let bad: Vec<String> = bad.map(|outcome| outcome.target.clone()).collect();
    let report = Report {
        canary: args.canary,
        minutes: args.minutes,
        targets: outcomes,
    };
    println!("{}", serde_json::to_string(&report)?);
    match args.canary {
        true => ensure!(bad.is_empty(), "the canary was not found: {bad:?}"),
        false => ensure!(bad.is_empty(), "there are findings: {bad:?}"),
    }
    Ok(())
}

fn line(outcome: &Outcome) -> String {
    let Totals {
        executions,
        coverage,
        features,
        inputs,
    } = outcome.totals;
    let mut line = format!(
        "{:<16} {executions:>10} executions in {:>6.1} s, coverage {coverage}, features {features}, {inputs} inputs, \
         {} findings",
        outcome.target,
        outcome.seconds,
        outcome.findings.len()
    );
    for finding in &outcome.findings {
        line += &format!("\n    {}", finding.display());
    }
    line
}

/// Builds the fuzzer, and its dependencies with the features of all programs.
fn build() -> Result<PathBuf> {
    let started = Instant::now();
    setup::run(
        cargo()
            .env("RUSTC_WORKSPACE_WRAPPER", root().join("fuzz/instrument.sh"))
            .args(["build", "--workspace", "--bin", "fuzz"])
            .args(["--features", "fuzz-targets/libfuzzer"]),
    )?;
    println!("built in {} s", started.elapsed().as_secs());
    Ok(target_dir().join("debug/fuzz"))
}

impl Fuzzer<'_> {
    /// Runs a target for its time.
    fn fuzz(&self, name: &str) -> Result<Outcome> {
        let work = target_dir().join("fuzz").join(name);
        let found = work.join("corpus");
        fs::create_dir_all(&found)?;
        let committed = corpus::dir(name);
        let outcome = self.run(name, &work, &[&found, &committed], false)?;
        if self.args.keep && outcome.findings.is_empty() {
            self.keep(name, &found)?;
        }
        Ok(outcome)
    }

    /// Looks for a planted bug. Inputs of the corpus that run into it by themselves are spoiled first.
    fn find_canary(&self, name: &str) -> Result<Outcome> {
        let work = target_dir().join("fuzz-canary").join(name);
        if work.exists() {
            fs::remove_dir_all(&work)?;
        }
        let from = work.join("corpus");
        fs::create_dir_all(&from)?;
        for input in corpus::inputs(&corpus::dir(name))? {
            let to = from.join(input.file_name().unwrap_or_default());
            fs::copy(&input, &to)?;
            self.spoil(name, &to)?;
        }
        let mut outcome = self.run(name, &work, &[&from], true)?;
        let log = fs::read_to_string(work.join("log")).unwrap_or_default();
        let reached = log.contains("the canary is found");
        ensure!(
            reached || outcome.findings.is_empty(),
            "another bug was found: {:?}",
            outcome.findings
        );
        outcome.findings.truncate(1);
        Ok(outcome)
    }

    /// Changes a bit of an input that runs into the planted bug, in the byte that decides it. If each bit does, it ends
    /// before that byte.
    fn spoil(&self, name: &str, input: &Path) -> Result<()> {
        let whole = fs::read(input)?;
        let (mut misses, mut runs_into) = (0, whole.len() + 1);
        let mut length = whole.len();
        while misses + 1 < runs_into {
            match self.misses(name, input, &whole[..length])? {
                true => misses = length,
                false => runs_into = length,
            }
            length = misses.midpoint(runs_into);
        }
        let Some(byte) = whole.get(misses) else {
            return Ok(fs::write(input, &whole)?);
        };
        for bit in 0..8 {
            let changed = [&whole[..misses], &[byte ^ (1 << bit)]].concat();
            for spoiled in [[changed.as_slice(), &whole[misses + 1..]].concat(), changed] {
                if self.misses(name, input, &spoiled)? {
                    return Ok(());
                }
            }
        }
        Ok(fs::write(input, &whole[..misses])?)
    }

    /// Makes the file `input` hold `bytes`, and tells whether these miss the planted bug.
    fn misses(&self, name: &str, input: &Path, bytes: &[u8]) -> Result<bool> {
        fs::write(input, bytes)?;
        let output = self.command(name, true).arg(input).output()?;
        Ok(output.status.success())
    }

    fn command(&self, name: &str, canary: bool) -> Command {
        let mut command = Command::new(self.program);
        command.current_dir(root()).env("FUZZ_TARGET", name);
        if canary {
            command.env("FUZZ_CANARY", "1");
        }
        command
    }

    /// Runs libFuzzer. The first directory gets what is new.
    fn run(&self, name: &str, work: &Path, corpora: &[&Path], canary: bool) -> Result<Outcome> {
        let findings = work.join("findings");
        fs::create_dir_all(&findings)?;
        let known = corpus::inputs(&findings)?;
        let path = work.join("log");
        let log = File::create(&path)?;
        let seconds = (self.args.minutes * 60.0).ceil();
        let started = Instant::now();
        let mut child = self
            .command(name, canary)
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-artifact_prefix={}/", findings.display()))
            .args(["-print_final_stats=1", "-use_value_profile=1"])
            .arg(format!("-max_len={}", corpus::INPUT_BYTES_MAX))
            .args(LIMITS)
            .args(corpora)
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let ended = wait::until("the fuzzer", Duration::MAX, || Ok(child.try_wait()?));
        if ended.is_err() {
            child.kill()?;
            child.wait()?;
        }
        let status = ended?;
        let text = String::from_utf8_lossy(&fs::read(&path)?).into_owned();
        let findings: Vec<PathBuf> = corpus::inputs(&findings)?
            .into_iter()
            .filter(|path| !known.contains(path))
            .collect();
        // What ends without a finding and without success has not run at all.
        ensure!(
            status.success() || !findings.is_empty(),
            "the fuzzer ended with {status}: see {}",
            path.display()
        );
        Ok(Outcome {
            target: name.to_owned(),
            seconds: started.elapsed().as_secs_f64(),
            totals: log::totals(&text),
            findings,
        })
    }

    /// Replaces the committed corpus by the fewest inputs that cover as much as it and what was found.
    fn keep(&self, name: &str, found: &Path) -> Result<()> {
        let committed = corpus::dir(name);
        let merged = found.with_file_name("merged");
        if merged.exists() {
            fs::remove_dir_all(&merged)?;
        }
        fs::create_dir_all(&merged)?;
        let max_bytes = format!("-max_len={}", corpus::INPUT_BYTES_MAX);
        let output = self
            .command(name, false)
            .args(["-set_cover_merge=1", "-use_counters=0", &max_bytes])
            .args([&merged, &committed, found])
            .output()?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "the corpora were not merged: {stderr}"
        );
        corpus::replace(&committed, &merged)
    }
}
