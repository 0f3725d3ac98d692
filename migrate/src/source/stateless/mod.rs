//! `pageferry migrate --stateless`: a container is started anew at the destination, of its bundle and its files.
//!
//! What is done in which order, and what follows from a failure at each step, is in [`pageferry::migration::Stateless`].
//! The guard, or `--resume`, goes on from the last record if the command dies.
//!
//! ```text
//! STATE_DIR/ID/stateless.json   what is needed to finish it
//!              record.json      the last of migration::StatelessRecord
//! ```

mod context;
mod flow;
mod image;

use std::path::Path;

use nix::sys::utsname::uname;
use pageferry::error::{Error, Kind, Result};
use pageferry::migration::events::Step;
use pageferry::migration::messages::{ContainerId, HostFacts, MigrationId};
use pageferry::migration::{Mode, MoveEnd, StatelessMode};
use pageferry::sys::owned_process::ProcessName;
use pageferry::tls::Tls;
use tokio::process::Child;
use tokio::time::Instant;

use super::args::{Args, ModeArg};
use super::container::Found;
use super::flow_context::CommonFacts;
use super::layers;
use super::report::{HostReport, Report};
use super::stepped::{self, Course};
use crate::client::AgentClient;
use crate::events::{Details, Events};
use crate::facts;
use crate::rounds::Tree;
use crate::runtime::bundle;
pub(super) use context::Facts;
use context::SourceContext;
use flow::Flow;

/// Moves the container. `guard` starts what finishes it if this process dies.
pub(super) async fn migrate(
    args: &Args,
    id: MigrationId,
    guard: impl FnOnce(&Path) -> Result<Child>,
    events: &Events,
) -> Result<()> {
    let started = Instant::now();
    events.begin(Step::Preflight);
    let mode = mode(args)?;
    let container = args
        .subject
        .container
        .as_ref()
        .ok_or_else(|| Error::new(Kind::Usage, "--container says what is to be moved"))?;
    let found = Found::look(container, &args.subject).await?;
    expect_movable(container, &found)?;
    let client = AgentClient::new(args.target.to.clone(), Tls::load(&args.target.tls)?);
    let there: HostFacts = client.get("/v1/host").await?;
    let here = host_here(args).await?;
    expect_same_machine(container, &here, &there)?;
    let layered = match args.files.wants_layers() {
        true => layers::shared(&found, &args.target.state_dir, &client).await?,
        false => None,
    };
    let root = ProcessName::of(found.root)
        .map_err(|error| Error::wrap(Kind::Usage, format!("container {container}"), error))?;
    let common = CommonFacts::find(args, id.clone()).await?;
    let facts = Facts {
        mode,
        bundle: found.bundle.clone(),
        root,
        resources: found.container.resources.clone(),
        container: found.record.clone(),
        drain_ms: u64::try_from(args.stateless.drain.as_millis()).unwrap_or(u64::MAX),
    };
    let mut report = Report::begin(id, Mode::Cold);
    name(mode).clone_into(&mut report.mode);
    report.processes = Tree::of(found.root)?.members().len();
    (report.source, report.destination) = (here, HostReport::from(&there));
    events.done(Step::Preflight, Details::default());
    events.note(Step::Plan, Details::text(name(mode)));
    let context = SourceContext::make(
        &args.target.state_dir,
        (common, facts),
        client,
        events.clone(),
    )?;
    let guard = guard(context.dir())?;
    let course = Course::new(args, context, report, started);
    let moving = (found.container, layered);
    let mut flow = Flow::new(course, moving, there.disk_bytes);
    let ended = stepped::run(&mut flow).await;
    let report = flow.finish(&ended).await;
    // The guard sees that the command ends, and has nothing to do.
    drop(guard);
    report.publish(args.report.as_deref())?;
    match ended? {
        MoveEnd::Moved => Ok(()),
        end => {
            let text = report.end_text(|| format!("it ended as {end:?}"));
            Err(Error::new(
                Kind::Interrupted,
                format!("container {container} was not moved: {text}"),
            ))
        }
    }
}

/// Whether the options fit together, and what they ask for.
fn mode(args: &Args) -> Result<StatelessMode> {
    let wrong = |text: &str| Err(Error::new(Kind::Usage, text));
    let mode = match args.mode {
        ModeArg::Cold => StatelessMode::Cold,
        ModeArg::Auto | ModeArg::Live => StatelessMode::Live,
        ModeArg::PreCopy | ModeArg::PostCopy | ModeArg::Hybrid | ModeArg::LogReplay => {
            return wrong("--stateless moves no memory: use --mode cold or --mode live");
        }
    };
    if mode == StatelessMode::Live && args.stateless.ready.is_none() {
        return wrong(
            "--mode live needs --ready: otherwise clients would reach a container that does not answer yet",
        );
    }
    if mode == StatelessMode::Live && args.route.is_empty() && args.address.is_empty() {
        return wrong("--mode live needs --route, which directs clients to the destination");
    }
    Ok(mode)
}

fn name(mode: StatelessMode) -> &'static str {
    match mode {
        StatelessMode::Cold => "cold-stateless",
        StatelessMode::Live => "live-stateless",
    }
}

fn expect_movable(id: &ContainerId, found: &Found) -> Result<()> {
    let problems = bundle::problems_here(&found.container.config);
    match problems.is_empty() {
        true => Ok(()),
        false => {
            let list = problems.join("\n  - ");
            let text = format!("container {id} cannot be moved:\n  - {list}");
            Err(Error::new(Kind::Usage, text))
        }
    }
}

/// Programs of one machine do not run on another.
fn expect_same_machine(id: &ContainerId, here: &HostReport, there: &HostFacts) -> Result<()> {
    if here.machine == there.machine {
        return Ok(());
    }
    let text = format!(
        "container {id} cannot be moved: this host is a {}, the destination a {}",
        here.machine, there.machine
    );
    Err(Error::new(Kind::Usage, text))
}

/// This host, which needs no CRIU for this.
pub(super) async fn host_here(args: &Args) -> Result<HostReport> {
    let dir = &args.target.state_dir;
    std::fs::create_dir_all(dir).map_err(|error| Error::file("make the directory", dir, error))?;
    if let Ok(programs) = args.target.programs.find() {
        let facts = facts::of_host(&programs, dir).await?;
        return Ok(HostReport::from(&facts));
    }
    let names = uname()
        .map_err(|error| Error::wrap(Kind::Io, "cannot read the kernel's version", error))?;
    Ok(HostReport {
        pageferry: env!("CARGO_PKG_VERSION").to_owned(),
        kernel: names.release().to_string_lossy().into_owned(),
        machine: names.machine().to_string_lossy().into_owned(),
        ..HostReport::default()
    })
}
