//! The `pageferry` command: one subcommand for each task, each in a module of its own.

mod address;
mod agent;
mod archive;
mod child;
mod client;
mod commands;
mod copy_lazy;
mod doctor;
mod drain;
mod end_signals;
mod events;
mod export;
mod facts;
mod files;
#[doc(hidden)]
pub mod fuzzing;
mod help;
mod hook;
mod image_stream;
mod images;
mod inspect;
mod output_log;
mod programs;
mod record;
mod records;
mod replay;
mod rounds;
mod route;
mod runtime;
mod scan;
mod service_log;
mod shell;
mod source;
mod timeline;
mod times;
mod tree_summary;
mod verify;
mod watch;
mod working_set;

use std::future::Future;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use pageferry::daemon::version::long_version;
use pageferry::error::{Error, Kind, Result};
use pageferry::observe::schema::Output;
use tracing_subscriber::filter::LevelFilter;

/// Moves running process trees between hosts, and looks after the images of CRIU.
#[derive(Parser, Debug)]
#[command(name = "pageferry", version, long_version = long_version(
    env!("CARGO_PKG_VERSION"), env!("PAGEFERRY_COMMIT"), env!("PAGEFERRY_RUSTLS")))]
struct Args {
    #[command(subcommand)]
    command: Command,

    /// Log more
    #[arg(short, long, global = true)]
    verbose: bool,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run at a destination, and receive migrations
    Agent(agent::Args),
    /// Move a running process tree to an agent's host
    Migrate(Box<source::Args>),
    /// Check whether a process tree can be moved, and predict what each mode would cost
    Plan(Box<source::plan::Args>),
    /// Show the report of a migration, and draw it
    Report(timeline::Args),
    /// Copy pages from parent images where CRIU does not read parents: private huge pages, and mappings that
    /// plugins provide
    Finish(images::FinishArgs),
    /// Move the pages that a lazy restore can fetch later from images to another directory
    Split(images::SplitArgs),
    /// Show what an image directory and its parents contain
    Inspect(inspect::Args),
    /// Check whether a restore would find all memory in an image directory and its parents
    Verify(verify::Args),
    /// Report what works on this host, what does not, and what to do about it
    Doctor(doctor::Args),
    /// Write the writable layer of a container into an OCI image layout
    Export(Box<export::Args>),
    /// Write a container, its memory and its files, into an archive
    Dump(archive::dump::Args),
    /// Restore a container from an archive
    Restore(archive::restore::Args),
    /// Write the images of a container or a process tree into a directory
    Snapshot(archive::snapshot::Args),
    /// Copy what a destination needs of a lazy dump's directory, once the dump is complete
    CopyLazy(copy_lazy::Args),
    /// Relay connections to a service, and write what clients send to a log that can be replayed
    Record(record::Args),
    /// Send the requests of a log to a service, and compare its answers with the recorded ones
    Replay(replay::Args),
    /// Wait for conditions, and act by rules: migrate, pause, stop, restart
    Watch(watch::Args),
    /// Show which pages working sets contain, and merge them
    WorkingSet(working_set::Args),
    #[command(hide = true)]
    RestoreHook(hook::Args),
    #[command(hide = true)]
    RuntimeCriu(runtime::criu_wrapper::Args),
    #[command(hide = true)]
    OutputLog(output_log::Args),
    #[command(hide = true)]
    Guard(source::guard::Args),
}

/// The definition of the command line, for who documents it too.
pub fn command() -> clap::Command {
    help::with_help(Args::command())
}

/// What commands write for other programs.
pub fn outputs() -> Vec<Output> {
    vec![
        inspect::output(),
        verify::output(),
        doctor::output(),
        working_set::output(),
        source::plan::output(),
        source::report::output(),
        export::output(),
        replay::output(),
        watch::state::output(),
        events::output(),
    ]
}

/// What an agent without migrations answers to `GET /metrics`.
pub fn metrics() -> String {
    agent::http::metrics_of(&[])
}

/// Runs the command that this process was started with.
pub fn run() -> ExitCode {
    pageferry::daemon::end_on_panic();
    let matches = command().get_matches();
    let args = Args::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let level = match args.verbose {
        true => LevelFilter::DEBUG,
        false => LevelFilter::INFO,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false)
        .with_writer(std::io::stderr)
        .init();
    match args.command {
        Command::Agent(args) => agent::run(&args),
        Command::Migrate(args) => source::run(&args),
        Command::Plan(args) => source::plan::run(&args),
        Command::Report(args) => timeline::run(&args),
        Command::Finish(args) => images::finish(&args),
        Command::Split(args) => images::split(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Dump(args) => archive::dump::run(&args),
        Command::Restore(args) => archive::restore::run(&args),
        Command::Snapshot(args) => archive::snapshot::run(&args),
        Command::CopyLazy(args) => copy_lazy::run(&args),
        Command::Record(args) => record::run(&args),
        Command::Replay(args) => replay::run(&args),
        Command::Watch(args) => watch::run(&args),
        Command::WorkingSet(args) => working_set::run(&args),
        Command::RestoreHook(args) => hook::run(&args),
        Command::RuntimeCriu(args) => runtime::criu_wrapper::run(&args),
        Command::OutputLog(args) => output_log::run(&args),
        Command::Guard(args) => source::guard::run(&args),
    }
}

/// Runs `work` on one thread and turns its result into an exit code.
fn run_to_end(work: impl Future<Output = Result<()>>) -> ExitCode {
    match block_on(work) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs `work` on one thread.
fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|error| Error::wrap(Kind::Io, "cannot start", error))?;
    runtime.block_on(work)
}

/// Prints a report.
fn print_json(report: &impl serde::Serialize) {
    let text = serde_json::to_string_pretty(report);
    println!("{}", text.unwrap_or_else(|error| format!("error: {error}")));
}
