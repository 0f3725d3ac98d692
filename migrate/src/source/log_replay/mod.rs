//! `pageferry migrate --mode log-replay`: a service is started at the destination and told what clients have told the one
//! here.
//!
//! ```text
//! clients ──> pageferry record ──> service          log ──> Sender ── HTTP ──> agent ──> service there
//!                    └── record.sock: hold, seal, end
//! ```
//!
//! What is done in which order, and what follows from a failure at each step, is in [`pageferry::migration::LogReplay`].
//! The guard, or `--resume`, goes on from the last record if the command dies.
//!
//! ```text
//! STATE_DIR/ID/log-replay.json   what is needed to finish it
//!              record.json       the last of migration::LogReplayRecord
//! ```

mod context;
mod flow;
mod sender;
mod tail;

use std::path::{Path, PathBuf};
use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::events::Step;
use pageferry::migration::messages::{HostFacts, MigrationId, ReplayBegin};
use pageferry::migration::{Mode, MoveEnd};
use pageferry::sys::owned_process::ProcessName;
use pageferry::tls::Tls;
use tokio::process::Child;
use tokio::time::Instant;

use super::args::Args;
use super::container::Found;
use super::flow_context::CommonFacts;
use super::log_replay_args::LagArg;
use super::report::{HostReport, Report};
use super::stateless;
use super::stepped::{self, Course};
use crate::client::AgentClient;
use crate::events::{Details, Events};
use crate::rounds::Tree;
pub(super) use context::Facts;
use context::{Holder, SourceContext};
use flow::Flow;
use sender::{Sender, SenderOptions};
use tail::Tail;

/// How long clients may be held for the replay of the rest, unless --max-downtime says otherwise.
const CLOSE: Duration = Duration::from_millis(20);

/// Of --max-downtime, the share of the replay of the rest: digests and routes take time too.
const CLOSE_SHARE: u32 = 4;

/// How it ended.
pub(super) enum Ended {
    /// As the result of the command says.
    Here,
    /// The processes are to move with their memory instead.
    TooSlow,
}

/// Moves the service. `guard` starts what finishes it if this process dies.
pub(super) async fn migrate(
    args: &Args,
    id: MigrationId,
    guard: impl FnOnce(&Path) -> Result<Child>,
    events: &Events,
) -> Result<Ended> {
    let started = Instant::now();
    events.begin(Step::Preflight);
    let (log, begin) = what(args, &id)?;
    let tail = Tail::open(&log, begin.feed.is_none())?;
    let begin = ReplayBegin {
        wait_us: tail.wait_us(),
        ..begin
    };
    begin
        .check()
        .map_err(|error| Error::wrap(Kind::Usage, "this cannot be replayed", error))?;
    let client = AgentClient::new(args.target.to.clone(), Tls::load(&args.target.tls)?);
    let there: HostFacts = client.get("/v1/host").await?;
    let (root, found) = root(args).await?;
    let common = CommonFacts::find(args, id.clone()).await?;
    let facts = Facts {
        holder: holder(args, &log),
        root: ProcessName::of(root)
            .map_err(|error| Error::wrap(Kind::Usage, format!("pid {root}"), error))?,
        container: found.map(|found| found.record),
        there: args.addresses_there(),
    };
    let report = Report {
        mode: "log-replay".to_owned(),
        processes: Tree::of(root)?.members().len(),
        source: stateless::host_here(args).await?,
        destination: HostReport::from(&there),
        ..Report::begin(id, Mode::Cold)
    };
    events.done(Step::Preflight, Details::default());
    events.note(Step::Plan, Details::text("log-replay"));
    let context = SourceContext::make(
        &args.target.state_dir,
        (common, facts),
        client.clone(),
        events.clone(),
    )?;
    let guard = guard(context.dir())?;
    let sender = Sender::new(client, context.path(""), tail, sender_options(args, log));
    let mut flow = Flow::new(Course::new(args, context, report, started), begin, sender);
    let ended = stepped::run(&mut flow).await;
    let too_slow = flow.is_too_slow();
    let report = flow.finish(&ended).await;
    // The guard sees that the command ends, and has nothing to do.
    drop(guard);
    report.publish(args.report.as_deref())?;
    judge(args, ended?, too_slow, &report)
}

/// What the end of the migration means to the user.
fn judge(args: &Args, end: MoveEnd, too_slow: bool, report: &Report) -> Result<Ended> {
    match end {
        MoveEnd::Moved => Ok(Ended::Here),
        MoveEnd::RolledBack if too_slow => Ok(Ended::TooSlow),
        end => {
            let text = report.end_text(|| format!("it ended as {end:?}"));
            let text = match end {
                MoveEnd::Stuck => format!(
                    "the service is the destination's and stands still there: `pageferry migrate --resume {} --to {}` \
                     lets it go on: {text}",
                    report.id, args.target.to
                ),
                _ => format!("the service was not moved: {text}"),
            };
            Err(Error::new(Kind::Interrupted, text))
        }
    }
}

/// The log, and what the agent is told, but for what the log says.
fn what(args: &Args, id: &MigrationId) -> Result<(PathBuf, ReplayBegin)> {
    let wanted = &args.log_replay;
    let missing = |what: &str| {
        let text = format!("--mode log-replay needs {what}");
        Error::new(Kind::Usage, text)
    };
    let log = wanted.log.clone().ok_or_else(|| missing("--log"))?;
    let service = wanted
        .service
        .as_ref()
        .ok_or_else(|| missing("--service"))?;
    let start = wanted.start.as_ref().ok_or_else(|| missing("--start"))?;
    if wanted.replay.is_some() && wanted.on_lag == Some(LagArg::PauseClients) {
        let text = "--on-lag pause-clients needs a recorder, and --replay has none";
        return Err(Error::new(Kind::Usage, text));
    }
    let begin = ReplayBegin {
        id: id.clone(),
        address: wanted.at.as_ref().unwrap_or(service).clone(),
        start: start.clone(),
        feed: wanted.replay.clone(),
        verify: wanted.verify,
        wrong_order: wanted.wrong_order,
        wait_us: 0,
        stall_ms: u64::try_from(wanted.stall.as_millis()).unwrap_or(u64::MAX),
        timeout_s: args.timeout.as_secs(),
    };
    Ok((log, begin))
}

fn holder(args: &Args, log: &Path) -> Holder {
    match &args.log_replay.hold {
        Some(command) => Holder::Command(command.clone()),
        None => Holder::Recorder(std::path::absolute(log).unwrap_or_else(|_| log.to_owned())),
    }
}

fn sender_options(args: &Args, log: PathBuf) -> SenderOptions {
    let wanted = &args.log_replay;
    SenderOptions {
        recorder: wanted.replay.is_none().then_some(log),
        on_lag: wanted.on_lag,
        max_lag: wanted.max_lag,
        close: args.max_downtime.map_or(CLOSE, |most| most / CLOSE_SHARE),
        digest: wanted.digest.clone(),
        service: wanted.service.clone().unwrap_or_default(),
    }
}

/// The first process of what is moved, and the container that it is.
async fn root(args: &Args) -> Result<(i32, Option<Found>)> {
    match (&args.subject.container, args.subject.pid) {
        (Some(container), _) => {
            let found = Found::look(container, &args.subject).await?;
            Ok((found.root, Some(found)))
        }
        (None, Some(pid)) => Ok((pid, None)),
        (None, None) => {
            let text = "--pid or --container says what is to be moved";
            Err(Error::new(Kind::Usage, text))
        }
    }
}

/// Ends the recording before a service that has moved with its memory.
pub(super) async fn end_recording(args: &Args) -> Result<()> {
    let wanted = &args.log_replay;
    match (&wanted.log, &wanted.replay) {
        (Some(log), None) => crate::service_log::Hold::take(log).await?.end().await,
        _ => Ok(()),
    }
}
