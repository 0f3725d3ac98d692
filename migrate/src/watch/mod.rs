//! `pageferry watch`: rules decide when something is moved, frozen, ended or started again.
//!
//! ```text
//! kernel (PSI) ──> events ──┐
//! socket (words) ─> events ─┤
//! logind (shutdown) > events ┼──> watcher: triggers ──> one action for each target ──> state file
//! looks each --interval ────┘
//! ```

mod action;
mod log;
mod look;
mod psi;
mod rules;
mod shutdown;
mod socket;
pub(crate) mod state;
mod watcher;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use crate::end_signals::EndSignals;
use log::Log;
use state::State;
use watcher::Watcher;

/// The number of rules in a file, or its first mistake.
pub(crate) fn count_rules(text: &str) -> std::result::Result<usize, String> {
    rules::parse(text).map(|rules| rules.len())
}

/// Events that wait for the watcher.
const EVENTS_MAX: usize = 1024;

/// Watches conditions, and acts by rules.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The rules
    #[arg(long, value_name = "FILE")]
    rules: PathBuf,

    /// Keep in FILE, over a restart, which rules have fired and which actions run
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/var/lib/pageferry/watch.json"
    )]
    state: PathBuf,

    /// A unix socket for conditions that are commands: a word and a newline
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,

    /// How often to check what the kernel does not report by itself
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = crate::times::duration)]
    interval: Duration,

    /// Append what happens to FILE, a line of JSON for each event; migrations that are started write there too
    #[arg(long, value_name = "FILE")]
    events: Option<PathBuf>,

    /// Only log what would be done
    #[arg(long)]
    dry_run: bool,

    /// Check the rules, and end
    #[arg(long)]
    check: bool,
}

/// Watches until a signal ends it.
pub(crate) fn run(args: &Args) -> ExitCode {
    crate::run_to_end(watch(args))
}

/// What has happened.
#[derive(Debug)]
enum Event {
    /// The kernel tells of pressure: for a rule of a generation of rules.
    Pressure(u64, usize),
    /// A trigger of the kernel's is gone.
    TriggerGone(u64, usize, Error),
    /// A word came over the socket.
    Word(String),
    /// The host is about to go down, in the shutdown of this number; or is not any more.
    Shutdown(Option<u64>),
    /// An action on a target has ended.
    ActionEnded(String, Result<()>),
}

async fn watch(args: &Args) -> Result<()> {
    let rules = rules::read(&args.rules)?;
    if args.check {
        println!("{} rules", rules.len());
        return Ok(());
    }
    let failed = |error| Error::wrap(Kind::Io, "cannot wait for signals", error);
    let mut reload = signal(SignalKind::hangup()).map_err(failed)?;
    let mut signals = EndSignals::new()?;
    let (sender, mut events) = mpsc::channel(EVENTS_MAX);
    let state = State::open(&args.state, args.dry_run)?;
    let socket = match &args.socket {
        Some(path) => Some(socket::listen(path, sender.clone())?),
        None => None,
    };
    let log = Log::open(args.events.as_deref())?;
    let mut watcher = Watcher::new(rules, state, (sender, log), args.dry_run).await?;
    let mut next_look = Instant::now();
    loop {
        if Instant::now() >= next_look {
            watcher.look();
            next_look = Instant::now() + args.interval;
        }
        watcher.act().await?;
        let wake = watcher
            .next_due()
            .map_or(next_look, |due| due.min(next_look));
        tokio::select! {
            () = sleep_until(wake) => {}
            event = events.recv() => {
                if let Some(event) = event {
                    watcher.happened(event).await?;
                }
            }
            _ = reload.recv() => match rules::read(&args.rules) {
                Ok(rules) => watcher.replace(rules).await?,
                Err(error) => tracing::error!("the rules stay as they were: {error}"),
            },
            () = signals.next() => break,
        }
    }
    drop(socket);
    watcher.log_what_runs();
    Ok(())
}
