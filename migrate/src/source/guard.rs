//! Finishes a migration whose command died: at once by the guard, or later by `--resume`.

use std::collections::VecDeque;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};

use pageferry::engine::io::transport::Peer;
use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::MigrationId;
use pageferry::migration::{Source, SourceAction, SourceEvent, SourceRecord, SourceState};
use pageferry::tls::{Tls, TlsArgs};
use tokio::process::{Child, Command};

use super::args::Args as MigrateArgs;
use super::context::SourceContext;
use super::flow_context::is_in;
use super::{log_replay, logs, stateless, stepped, throttle};
use crate::agent::address;
use crate::client::AgentClient;
use crate::commands::with_tls;
use crate::rounds;

/// Run by `pageferry migrate` alone.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Directory of the migration at the source
    dir: PathBuf,

    #[arg(long, value_parser = address)]
    to: Peer,

    #[command(flatten)]
    tls: TlsArgs,
}

/// Starts the guard of the migration in `dir`. Its pipe ends with this process, or when the value is dropped.
pub(super) fn start(args: &MigrateArgs, dir: &Path) -> Result<Child> {
    let failed = |error| Error::wrap(Kind::Io, "cannot start the guard", error);
    let mut command = Command::new(std::env::current_exe().map_err(failed)?);
    let to = match &args.target.to {
        Peer::Unix(path) => format!("unix:{}", path.display()),
        tcp @ Peer::Tcp { .. } => tcp.to_string(),
    };
    command.arg("guard").arg(dir).args(["--to", &to]);
    with_tls(&mut command, &args.target.tls);
    let log = dir.join("guard.log");
    let log = std::fs::File::create(&log).map_err(|error| Error::file("create", &log, error))?;
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(log)
        .process_group(0);
    command.spawn().map_err(failed)
}

/// Waits for the end of the migration's command, and finishes what it left.
pub(crate) fn run(args: &Args) -> ExitCode {
    // Nothing is ever written: the pipe ends with the process at its other end.
    let _ = std::io::stdin().read(&mut [0; 1]);
    crate::run_to_end(async {
        let client = AgentClient::new(args.to.clone(), Tls::load(&args.tls)?);
        finish_in(&args.dir, client).await.map(drop)
    })
}

/// Finishes the migration `id`.
pub(super) async fn resume(args: &MigrateArgs, id: &MigrationId) -> Result<()> {
    let client = AgentClient::new(args.target.to.clone(), Tls::load(&args.target.tls)?);
    let dir = args.target.state_dir.join(id.to_string());
    let text = match finish_in(&dir, client).await? {
        true => "the processes run at the destination",
        false => "the processes run here",
    };
    println!("migration {id}: {text}");
    Ok(())
}

/// Finishes the migration in `dir`, and tells whether the processes run at the destination.
async fn finish_in(dir: &Path, client: AgentClient) -> Result<bool> {
    if is_in::<stateless::Facts>(dir) {
        return stepped::finish::<stateless::Facts>(dir, client).await;
    }
    if is_in::<log_replay::Facts>(dir) {
        return stepped::finish::<log_replay::Facts>(dir, client).await;
    }
    let context = SourceContext::find(dir, client.clone())?;
    let (id, events) = (context.common.id.clone(), context.events.clone());
    let record = context.record()?;
    let state = finish(context).await?;
    let moved = matches!(state, SourceState::Complete | SourceState::Committed);
    // Whoever recorded the end has told it.
    if !matches!(
        record,
        Some(SourceRecord::Complete | SourceRecord::RolledBack)
    ) {
        logs::at_end(&client, &id, dir, (&events, moved)).await;
    }
    Ok(moved)
}

async fn finish(context: SourceContext) -> Result<SourceState> {
    // Before anything else: a process whose thread was borrowed stands still, and so may one that was slowed.
    for undone in [throttle::undo(context.dir()), rounds::undo(context.dir())] {
        if let Err(error) = undone {
            tracing::error!("{error}");
        }
    }
    let record = context.record()?;
    // Whoever recorded the end has also done what follows from it, or the first step is done again.
    let (mut source, actions) = Source::recover(record);
    match record {
        Some(SourceRecord::Complete) => context.forget_connections(),
        Some(record) => {
            tracing::warn!(
                "finishing migration {}, recorded as {record}",
                context.common.id
            );
        }
        None => {
            tracing::warn!(
                "finishing migration {}, left before any decision",
                context.common.id
            );
        }
    }
    let mut todo = VecDeque::from(actions);
    while let Some(action) = todo.pop_front() {
        if let Some(event) = context.carry_out(action).await? {
            todo.extend(source.handle(event));
        }
        if action == SourceAction::EndProcesses {
            todo.extend(source.handle(SourceEvent::MemoryComplete));
        }
    }
    Ok(source.state())
}
