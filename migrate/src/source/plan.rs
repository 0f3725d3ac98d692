//! `pageferry plan`: whether a tree can be moved, and what each mode would cost.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use indicatif::HumanBytes;
use pageferry::error::Result;
use pageferry::migration::events::{Step, Writer};
use pageferry::migration::messages::MigrationId;
use pageferry::migration::{
    Costs, Forecast, LogFacts, Mode, ReplayCosts, forecast_replay, predict_downtime, recommend,
};
use pageferry::observe::schema::Output;
use pageferry::replay::Entry;
use schemars::JsonSchema;
use serde::Serialize;

use super::args::{Subject, Target};
use super::files_args::FilesArgs;
use super::survey::Survey;
use crate::events::{Details, Events};
use crate::rounds;
use crate::service_log::{LogReader, Next, size};
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

    /// What a move by --mode log-replay would cost with the log of a recorder in DIR
    #[arg(long, value_name = "DIR")]
    log: Option<PathBuf>,

    /// Append what is found to FILE, as a line of JSON of the event log
    #[arg(long, value_name = "FILE")]
    events: Option<PathBuf>,

    /// Name of the migration that is planned, for --events
    #[arg(long, value_name = "NAME", requires = "events")]
    id: Option<MigrationId>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The predicted cost of each mode of a migration.
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
    /// Private memory that forks share, each piece without its first copy, bytes.
    copied_bytes: u64,
    /// Pages that changed in a second while the command watched.
    dirty_pages_per_s: f64,
    /// The log, if one was named.
    log: Option<LogPlan>,
    /// What prevents a migration; empty if nothing does.
    problems: Vec<String>,
    /// What will be other than it was, whatever the mode; empty if nothing is known.
    warnings: Vec<String>,
    /// What each mode would cost.
    modes: Vec<Prediction>,
    /// The mode to take; null if there are problems.
    recommended: Option<&'static str>,
}

/// A log of which a replay would be made.
#[derive(Serialize, JsonSchema)]
struct LogPlan {
    /// Length of the log, bytes.
    bytes: u64,
    /// How many pieces of input from clients it has.
    pieces: u64,
    /// Rate at which input arrives, bytes a second.
    bytes_per_s: f64,
    /// Whether a replay would be faster than that rate.
    keeps_up: bool,
}

#[derive(Serialize, JsonSchema)]
struct Prediction {
    /// `cold`, `pre-copy`, `post-copy` or `hybrid`.
    mode: &'static str,
    /// Predicted downtime, ms.
    downtime_ms: f64,
    /// Predicted time until all memory is at the destination, ms.
    total_ms: f64,
    /// Memory of the restored processes at the destination, bytes.
    memory_bytes: u64,
    /// Whether the destination has that much memory.
    fits: bool,
}

/// What it writes for other programs.
pub(crate) fn output() -> Output {
    Output::of::<Plan>("plan", "pageferry plan --json")
}

/// All modes, in the order in which they are shown.
const MODES: [Mode; 4] = [Mode::Cold, Mode::PreCopy, Mode::PostCopy, Mode::Hybrid];

/// Prints the plan. Fails if the tree cannot be moved.
pub(crate) fn run(args: &Args) -> ExitCode {
    crate::run_to_end(async {
        let events = Events::new(Writer::Plan, args.id.clone());
        let events = events.with_file(args.events.as_deref())?;
        events.begin(Step::Plan);
        let planned = plan(args).await;
        match &planned {
            Ok(details) => events.done(Step::Plan, details.clone()),
            Err(error) => events.failed(Step::Plan, Details::error(&error.to_string())),
        }
        planned.map(drop)
    })
}

/// Prints the plan, and tells it for the event log. Fails if the tree cannot be moved.
async fn plan(args: &Args) -> Result<Details> {
    let survey = Survey::take(&args.subject, &[], (&args.target, &FilesArgs::to_look())).await?;
    let before = args.log.as_deref().map(size).transpose()?;
    let dirty_rate = rounds::watch_changes(&survey.tree, survey.page, args.watch)?;
    let log = match &args.log {
        Some(log) => Some(look(log, before.unwrap_or_default(), args.watch)?),
        None => None,
    };
    let mut modes: Vec<Prediction> = MODES
        .iter()
        .map(|&mode| predict(mode, &survey.costs, &survey, dirty_rate.pages_per_s()))
        .collect();
    let replayed = log.and_then(|log| replayed(&log, &survey));
    let log = log.map(|log| LogPlan {
        bytes: log.bytes,
        pieces: log.pieces,
        bytes_per_s: log.bytes_per_s,
        keeps_up: replayed.is_some(),
    });
    modes.extend(replayed);
    let lazily = !survey.must_share();
    let problems = survey.problems(lazily);
    let plan = Plan {
        pid: survey.root(),
        processes: survey.tree.members().len(),
        private_bytes: survey.size.private_bytes,
        shared_bytes: survey.size.shared_bytes,
        copied_bytes: survey.size.copied_bytes,
        dirty_pages_per_s: dirty_rate.pages_per_s(),
        recommended: problems.is_empty().then(|| best(&modes)),
        log,
        problems,
        warnings: survey.warnings(),
        modes,
    };
    match args.json {
        true => println!(
            "{}",
            serde_json::to_string_pretty(&plan).unwrap_or_default()
        ),
        false => print(&plan),
    }
    survey.expect_no_problem(lazily)?;
    Ok(details(&plan))
}

/// A plan as an event: the costs of the mode that it recommends.
fn details(plan: &Plan) -> Details {
    let recommended = plan.recommended.unwrap_or_default();
    let mode = plan.modes.iter().find(|mode| mode.mode == recommended);
    let text = mode.map(|mode| {
        format!(
            "{recommended}: downtime {:.0} ms, all there after {:.0} ms",
            mode.downtime_ms, mode.total_ms
        )
    });
    let counts = [
        ("processes", plan.processes as u64),
        ("bytes", plan.private_bytes + plan.shared_bytes),
    ];
    Details {
        text,
        ..Details::counts(&counts)
    }
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

/// Looks at a log, which had `before` bytes `watched` ago.
fn look(dir: &Path, before: u64, watched: Duration) -> Result<LogFacts> {
    let mut reader = LogReader::open(dir)?;
    let bytes = size(dir)?;
    let mut log = LogFacts {
        bytes,
        wait_us: reader.header().wait_us,
        ..LogFacts::default()
    };
    while let Next::Entry(entry) = reader.next()? {
        match entry {
            Entry::Piece { .. } => log.pieces += 1,
            Entry::Settled => log.waits += 1,
            _ => {}
        }
    }
    #[allow(clippy::cast_precision_loss, reason = "a rate")]
    let grown = bytes.saturating_sub(before) as f64;
    log.bytes_per_s = grown / watched.as_secs_f64().max(1e-3);
    Ok(log)
}

/// What a replay would take, if it would ever end.
fn replayed(log: &LogFacts, survey: &Survey) -> Option<Prediction> {
    let fits = survey.fits(false);
    let forecast = forecast_replay(log, &ReplayCosts::default(), &survey.costs, fits)?;
    Some(Prediction {
        mode: "log-replay",
        downtime_ms: forecast.downtime.as_secs_f64() * 1e3,
        total_ms: forecast.total.as_secs_f64() * 1e3,
        memory_bytes: survey.size.restored_bytes(false),
        fits,
    })
}

/// The mode that moves everything soonest among those that fit and whose downtime is close to the shortest.
fn best(modes: &[Prediction]) -> &'static str {
    let ms = |ms: f64| Duration::try_from_secs_f64(ms / 1e3).unwrap_or(Duration::MAX);
    let ways: Vec<Forecast> = modes
        .iter()
        .map(|mode| Forecast {
            downtime: ms(mode.downtime_ms),
            total: ms(mode.total_ms),
            fits: mode.fits,
        })
        .collect();
    let best = recommend(&ways).and_then(|at| modes.get(at));
    best.map_or(Mode::Hybrid.name(), |mode| mode.mode)
}

fn print(plan: &Plan) {
    println!("processes           {}", plan.processes);
    println!("private memory      {}", HumanBytes(plan.private_bytes));
    println!("shared memory       {}", HumanBytes(plan.shared_bytes));
    if plan.copied_bytes > 0 {
        println!(
            "shared by forks     {}, copied by a lazy restore",
            HumanBytes(plan.copied_bytes)
        );
    }
    println!("changing            {:.0} pages/s", plan.dirty_pages_per_s);
    if let Some(log) = &plan.log {
        println!(
            "log                 {}, {} pieces, {:.0} bytes/s arrive{}",
            HumanBytes(log.bytes),
            log.pieces,
            log.bytes_per_s,
            match log.keeps_up {
                true => "",
                false => ": a replay would not keep up",
            }
        );
    }
    for problem in &plan.problems {
        println!("problem             {problem}");
    }
    for warning in &plan.warnings {
        println!("warning             {warning}");
    }
    println!(
        "\n{:<20}{:>12}{:>12}{:>23}",
        "mode", "downtime", "total", "destination's memory"
    );
    for mode in &plan.modes {
        let mark = match plan.recommended == Some(mode.mode) {
            true => "   recommended",
            false if !mode.fits => "   does not fit",
            false => "",
        };
        println!(
            "{:<20}{:>9.0} ms{:>9.0} ms{:>23}{mark}",
            mode.mode,
            mode.downtime_ms,
            mode.total_ms,
            HumanBytes(mode.memory_bytes).to_string()
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
        assert_eq!(best(&modes(true)), "hybrid");
        assert_eq!(best(&modes(false)), "cold");
    }
}
