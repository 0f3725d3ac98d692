//! `pageferry migrate`: moves a running process tree to an agent's host.
//!
//! ```text
//! preflight ──> rounds ──> freeze: criu dump ──> images ──> restore there ──> grant ──> decision ──> end here
//!                 │           │ pages through page-server --forward, or --forward-lazy
//!                 └───────────┴── what goes wrong until the grant: release, and the tree runs on
//! ```
//!
//! What is decided when is in [`pageferry::migration`]. A second process, the guard, holds the other end of
//! a pipe: if this one is killed, it finishes the migration from the records.

mod args;
mod commands;
mod container;
mod context;
mod disk_space;
mod failure;
mod files;
mod files_args;
mod first_answer;
mod flow;
mod flow_context;
mod frozen;
pub(crate) mod guard;
mod hooks;
mod last_pages;
mod layers;
mod log_replay;
mod log_replay_args;
mod logs;
mod moved_addresses;
mod network;
mod outputs;
pub(crate) mod plan;
mod preflight;
mod preload;
mod probe;
mod progress;
mod protections;
pub(crate) mod report;
mod shared;
mod state_dir;
mod stateless;
mod stateless_args;
mod stepped;
mod survey;
mod throttle;
mod warnings;

use std::path::Path;
use std::process::ExitCode;

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::events::{Step, Writer};
use pageferry::migration::messages::MigrationId;
use pageferry::migration::{Mode, SourceState, predict_downtime};
use tokio::time::Instant;

pub(crate) use args::Args;
use args::ModeArg;
use context::{Facts, SourceContext};
use files::Files;
use flow::Flow;
use flow_context::CommonFacts;
use outputs::Outputs;
use report::{HostReport, Report};
use survey::Survey;

use crate::events::{Details, Events};

/// Longest made-up part of a name, hexadecimal digits.
const ID_DIGITS: usize = 8;

/// What is told of a replay after which the processes move with their memory.
const TOO_SLOW: &str = "the replay is too slow: the processes move with their memory";

/// A lazy mode is worth its later faults if a cold one would stand still for so many times longer.
const COLD_IS_CLOSE: f64 = 1.5;

/// Carries the migration out.
pub(crate) fn run(args: &Args) -> ExitCode {
    match &args.resume {
        Some(id) => crate::run_to_end(guard::resume(args, id)),
        None => crate::run_to_end(migrate(args)),
    }
}

async fn migrate(args: &Args) -> Result<()> {
    if args.stateless.stateless {
        let id = named(args)?;
        let events = events_of(args, &id)?;
        let guarded = |dir: &Path| guard::start(args, dir);
        let moved = stateless::migrate(args, id, guarded, &events).await;
        return note_end(&events, moved);
    }
    if args.mode == ModeArg::LogReplay {
        return replay_or_move(args).await;
    }
    if args.log_replay.log.is_some() {
        let text = "--log is for --mode log-replay";
        return Err(Error::new(Kind::Usage, text));
    }
    expect_state(args.mode)?;
    let id = named(args)?;
    let events = events_of(args, &id)?;
    let moved = move_memory(args, id, args.mode.chosen(), &events).await;
    note_end(&events, moved)
}

/// The event log of the migration `id`.
fn events_of(args: &Args, id: &MigrationId) -> Result<Events> {
    let events = Events::new(Writer::Migrate, Some(id.clone()));
    events.with_file(args.events.as_deref())
}

/// Writes the end of a migration, which `moved` says, to its event log.
fn note_end<T>(events: &Events, moved: Result<T>) -> Result<T> {
    events.end(&moved.as_ref().map(|_| "moved").map_err(ToString::to_string));
    moved
}

/// Moves a service by its log, or if its replay is too slow with its memory.
async fn replay_or_move(args: &Args) -> Result<()> {
    let id = named(args)?;
    let events = events_of(args, &id)?;
    let guarded = |dir: &Path| guard::start(args, dir);
    let ended = log_replay::migrate(args, id.clone(), guarded, &events).await;
    let too_slow = matches!(ended, Ok(log_replay::Ended::TooSlow));
    let text = if too_slow { TOO_SLOW } else { "moved" };
    events.end(&ended.as_ref().map(|_| text).map_err(ToString::to_string));
    let log_replay::Ended::TooSlow = ended? else {
        return Ok(());
    };
    let id = format!("{id}-pre-copy").parse();
    let id = id.map_err(|error| Error::wrap(Kind::Usage, "the migration's name", error))?;
    let events = events_of(args, &id)?;
    let moved = move_memory(args, id, Some(Mode::PreCopy), &events).await;
    note_end(&events, moved)?;
    log_replay::end_recording(args).await
}

/// Preflight is over, and it is known how the memory is to move.
fn note_plan(events: &Events, survey: &Survey, mode: Mode) {
    let counts = [
        ("processes", survey.tree.members().len() as u64),
        ("bytes", survey.size.bytes()),
    ];
    events.done(Step::Preflight, Details::counts(&counts));
    events.note(Step::Plan, Details::text(mode.name()));
}

/// What a report begins with.
fn report_of(id: MigrationId, survey: &Survey, mode: Mode) -> Report {
    Report {
        processes: survey.tree.members().len(),
        memory_bytes: survey.size.bytes(),
        copied_bytes: survey.copied_bytes(mode.is_lazy()),
        source: HostReport::from(&survey.here),
        destination: HostReport::from(&survey.there),
        ..Report::begin(id, mode)
    }
}

/// Moves a tree of processes with its memory, by itself or as a container.
async fn move_memory(
    args: &Args,
    id: MigrationId,
    mode: Option<Mode>,
    events: &Events,
) -> Result<()> {
    let started = Instant::now();
    events.begin(Step::Preflight);
    let moving = args.addresses();
    let mut survey = Survey::take(&args.subject, &moving, (&args.target, &args.files)).await?;
    let root = survey.root();
    let mode = mode.unwrap_or_else(|| recommend(&survey));
    let (costs, packed_bytes) = (survey.costs, survey.packed_bytes());
    survey.expect_no_problem(mode.is_lazy())?;
    let warnings = survey.warnings();
    note_plan(events, &survey, mode);
    let layered = survey.layered.take();
    let of_container = (survey.found.as_ref(), survey.sends_root, layered);
    let files = Files::find(&args.files, of_container, root, &id)?;
    let outputs = match &survey.found {
        Some(found) => Outputs::find(found.root, args.output_log.as_ref())?,
        None => Outputs::none(args.output_log.as_ref())?,
    };
    let report = report_of(id.clone(), &survey, mode);
    if args.files.preload {
        return preload::run(args, survey, files, id, report, started).await;
    }
    let Survey {
        programs,
        client,
        tree,
        here,
        page,
        size,
        found,
        ..
    } = survey;
    let common = CommonFacts::find(args, id).await?;
    let facts = Facts {
        container: found.as_ref().map(|found| found.record.clone()),
        tcp: args.tcp(),
        files: files.dirs(),
        outputs,
        ..Facts::of_tree(mode, &tree)
    };
    let context = SourceContext::make(
        &args.target.state_dir,
        (common, facts),
        client.clone(),
        events.clone(),
    )?;
    warnings.into_iter().for_each(|text| context.warn(text));
    let guard = guard::start(args, context.dir())?;
    let wire = here.criu.unwrap_or_default().wire();
    let mut flow = Flow::new(
        args,
        programs,
        client,
        context,
        (page, wire, costs, packed_bytes),
        (report, size, found.map(|found| found.container), files),
        started,
    );
    let ended = flow.run().await;
    flow.bring_logs(&ended).await;
    let report = flow.finish(&ended);
    // The guard sees that the command ends, and has nothing to do.
    drop(guard);
    report.publish(args.report.as_deref())?;
    moved(ended, root, &report)
}

/// Fails for a mode of containers without state.
fn expect_state(mode: ModeArg) -> Result<()> {
    match mode {
        ModeArg::Live => {
            let text = "--mode live is for containers without state: add --stateless";
            Err(Error::new(Kind::Usage, text))
        }
        _ => Ok(()),
    }
}

/// Whether the tree under `root` was moved, as the end says, and why not.
fn moved(ended: Result<SourceState>, root: i32, report: &Report) -> Result<()> {
    match ended? {
        SourceState::Complete => Ok(()),
        state => {
            let text = report.end_text(|| format!("the migration ended as {state}"));
            Err(Error::new(
                Kind::Interrupted,
                format!("pid {root} was not moved: {text}"),
            ))
        }
    }
}

/// The mode for a tree of which nothing but its size is known. A lazy restore makes copies of what forks share: where
/// these do not fit, the mode is none that restores lazily.
fn recommend(survey: &Survey) -> Mode {
    let (size, costs) = (survey.size, &survey.costs);
    let (bytes, packed) = (size.bytes(), survey.packed_bytes());
    let predict = |mode| predict_downtime(mode, costs, bytes, packed, size.eager_bytes());
    let (cold, lazy) = (predict(Mode::Cold), predict(Mode::PostCopy));
    let cold_is_close = cold.as_secs_f64() <= lazy.as_secs_f64() * COLD_IS_CLOSE;
    match (cold_is_close, survey.must_share()) {
        (true, _) => Mode::Cold,
        (false, false) => Mode::Hybrid,
        (false, true) => {
            tracing::warn!(
                "processes share {} MiB since they were forked, and copies of that would not fit into the \
                 destination's memory: pre-copy instead of hybrid",
                size.copied_bytes >> 20
            );
            Mode::PreCopy
        }
    }
}

/// The migration's name.
fn named(args: &Args) -> Result<MigrationId> {
    match &args.id {
        Some(id) => Ok(id.clone()),
        None => made_up(),
    }
}

/// A name for a migration that got none.
pub(crate) fn made_up() -> Result<MigrationId> {
    let digits: String = (0..ID_DIGITS).map(|_| fastrand::digit(16)).collect();
    let name = format!("m-{digits}").parse();
    name.map_err(|error| Error::wrap(Kind::Usage, "the migration's name", error))
}
