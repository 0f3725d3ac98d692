//! `pageferry plan`: whether a tree can be moved, and what each mode would cost.

use std::process::ExitCode;
use std::time::Duration;

use pageferry::migration::{Costs, Mode, predict_downtime};
use pageferry::observe::schema::Output;
use schemars::JsonSchema;
use serde::Serialize;

use super::args::{Subject, Target};
use super::files_args::FilesArgs;
use super::survey::Survey;
use crate::rounds;
use crate::times::duration;

/// Looks at a running process tree and at an agent's host, and changes neither.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(flatten)]
    target: Target,

    #[command(flatten)]
    subject: Subject,

    /// How long to watch the memory, to measure how much of it changes
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = duration)]
    watch: Duration,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What is printed. Times are milliseconds.
#[derive(Serialize, JsonSchema)]
struct Plan {
    /// Pid of the root of the tree, as this command sees it.
    pid: i32,
    /// How many processes the tree has.
    processes: usize,
    /// Private memory of all processes, bytes.
    private_bytes: u64,
    /// Memory that processes share, each piece once, bytes.
    shared_bytes: u64,
    /// Of the private memory: what forks share, beyond the first copy, bytes.
    copied_bytes: u64,
    /// Pages that changed in a second while the command watched.
    dirty_pages_per_s: f64,
    /// What is in the way of a migration; empty if nothing is.
    problems: Vec<String>,
    /// What each mode would cost.
    modes: Vec<Prediction>,
    /// The mode to take; null if there are problems.
    recommended: Option<&'static str>,
}

#[derive(Serialize, JsonSchema)]
struct Prediction {
    /// `cold`, `pre-copy`, `post-copy` or `hybrid`.
    mode: &'static str,
    /// Predicted downtime, ms.
    downtime_ms: f64,
    /// Predicted time until all memory is at the destination, ms.
    total_ms: f64,
    /// What the restored processes take at the destination, bytes.
    memory_bytes: u64,
    /// Whether that fits there.
    fits: bool,
}

/// What it writes for other programs.
pub(crate) fn output() -> Output {
    Output::of::<Plan>("plan", "pageferry plan --json")
}

/// All modes, in the order in which they are shown.
const MODES: [Mode; 4] = [Mode::Cold, Mode::PreCopy, Mode::PostCopy, Mode::Hybrid];

/// A lazy mode is worth its later faults if another one would stand still for so many times longer.
const CLOSE: f64 = 1.5;

/// Prints the plan. Fails if the tree cannot be moved.
pub(crate) fn run(args: &Args) -> ExitCode {
    crate::run_to_end(async {
        let survey =
            Survey::take(&args.subject, &[], (&args.target, &FilesArgs::to_look())).await?;
        let dirtied = rounds::watch_changes(&survey.tree, survey.page, args.watch)?;
        let modes: Vec<Prediction> = MODES
            .iter()
            .map(|&mode| predict(mode, &survey.costs, &survey, dirtied.pages_per_s()))
            .collect();
        let lazily = !survey.must_share();
        let problems = survey.problems(lazily);
        let plan = Plan {
            pid: survey.root(),
            processes: survey.tree.members().len(),
            private_bytes: survey.size.private_bytes,
            shared_bytes: survey.size.shared_bytes,
            copied_bytes: survey.size.copied_bytes,
            dirty_pages_per_s: dirtied.pages_per_s(),
            recommended: problems.is_empty().then(|| recommend(&modes)),
            problems,
            modes,
        };
        match args.json {
            true => println!(
                "{}",
                serde_json::to_string_pretty(&plan).unwrap_or_default()
            ),
            false => print(&plan),
        }
        survey.expect_no_problem(lazily)
    })
}

/// What `mode` would take, with `dirty_pages_per_s` pages that change in a second.
#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss
)]
fn predict(mode: Mode, costs: &Costs, survey: &Survey, dirty_pages_per_s: f64) -> Prediction {
    let memory = survey.size.bytes();
    let dirty_bytes_per_s = dirty_pages_per_s * survey.page.bytes() as f64;
    let packed = survey.packed_bytes();
    let first_s = packed as f64 / costs.bytes_per_s;
    // Each round lasts as long as the link needs for what the one before left, and is read once.
    let dirty_bytes_per_s = dirty_bytes_per_s * survey.packed_share;
    let share = (dirty_bytes_per_s / costs.bytes_per_s).min(1.0);
    let left =
        (packed as f64 * share.powi(ROUNDS) + dirty_bytes_per_s * READING_S).min(packed as f64);
    let (changed, rounds_s) = match mode.has_rounds() {
        true => (left as u64, first_s * (1.0 + share + share * share)),
        false => (packed, 0.0),
    };
    let eager = survey.size.eager_bytes();
    let downtime = predict_downtime(mode, costs, memory, changed, eager);
    let rest_s = match mode.is_lazy() {
        true => changed as f64 / costs.bytes_per_s,
        false => 0.0,
    };
    Prediction {
        mode: mode.name(),
        downtime_ms: downtime.as_secs_f64() * 1e3,
        total_ms: (rounds_s + downtime.as_secs_f64() + rest_s) * 1e3,
        memory_bytes: survey.size.restored_bytes(mode.is_lazy()),
        fits: survey.fits(mode.is_lazy()),
    }
}

/// Rounds that are reckoned with.
const ROUNDS: i32 = 3;

/// Between the last look of a round at a page and the freeze, seconds.
const READING_S: f64 = 0.5;

/// The mode that moves everything soonest among those that fit and whose downtime is close to the shortest.
fn recommend(modes: &[Prediction]) -> &'static str {
    let fitting = || modes.iter().filter(|mode| mode.fits);
    let shortest = fitting()
        .map(|mode| mode.downtime_ms)
        .fold(f64::INFINITY, f64::min);
    let close = fitting().filter(|mode| mode.downtime_ms <= shortest * CLOSE);
    let best = close.min_by(|a, b| a.total_ms.total_cmp(&b.total_ms));
    best.map_or(Mode::Hybrid.name(), |mode| mode.mode)
}

fn print(plan: &Plan) {
    println!("processes           {}", plan.processes);
    println!("private memory      {} MiB", plan.private_bytes >> 20);
    println!("shared memory       {} MiB", plan.shared_bytes >> 20);
    if plan.copied_bytes > 0 {
        println!(
            "shared by forks     {} MiB, copied by a lazy restore",
            plan.copied_bytes >> 20
        );
    }
    println!("changing            {:.0} pages/s", plan.dirty_pages_per_s);
    for problem in &plan.problems {
        println!("in the way          {problem}");
    }
    println!(
        "\n{:<20}{:>12}{:>12}{:>14}",
        "mode", "downtime", "total", "memory there"
    );
    for mode in &plan.modes {
        let mark = match plan.recommended == Some(mode.mode) {
            true => "   recommended",
            false if !mode.fits => "   does not fit",
            false => "",
        };
        println!(
            "{:<20}{:>9.0} ms{:>9.0} ms{:>10} MiB{mark}",
            mode.mode,
            mode.downtime_ms,
            mode.total_ms,
            mode.memory_bytes >> 20
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_not_recommended() {
        let mode = |mode: &'static str, downtime_ms, fits| Prediction {
            mode,
            downtime_ms,
            total_ms: downtime_ms,
            memory_bytes: 0,
            fits,
        };
        let modes = |lazy_fits| [mode("cold", 900.0, true), mode("hybrid", 100.0, lazy_fits)];
        assert_eq!(recommend(&modes(true)), "hybrid");
        assert_eq!(recommend(&modes(false)), "cold");
    }
}
