//! The project's own commands.

mod bench;
mod criu;
mod demo;
mod setup;
mod test;

use std::process::ExitCode;
use std::thread;

use clap::{Parser, Subcommand};
use nix::sys::signal::{SigSet, Signal};
use testbed::wait;

/// What shells say of a program that a Ctrl-C ended.
const EXIT_INTERRUPTED: u8 = 130;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The project's own commands")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Measures pageferry and CRIU against each other.
    Bench(Box<bench::Args>),
    /// Fetches real CRIUs into target/criu and prints version and path of each.
    Criu(criu::Args),
    /// Moves a working process from one host to another, and shows that it is the same.
    Demo(demo::Args),
    /// Runs all tests, those with real CRIUs too, with all set-up.
    Test(test::Args),
}

fn main() -> ExitCode {
    let task = Args::parse().task;
    let result = unwind_on_signals().and_then(|()| match task {
        Task::Bench(args) => bench::run(&args),
        Task::Criu(args) => criu::run(&args),
        Task::Demo(args) => demo::run(&args),
        Task::Test(args) => test::run_tests(&args),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if wait::is_interrupted() => {
            eprintln!("interrupted; everything is cleaned up");
            ExitCode::from(EXIT_INTERRUPTED)
        }
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Turns Ctrl-C and its like into an error of whatever waits, so that guards clean up. Called before
/// any other thread exists, so that no other thread takes the signals.
fn unwind_on_signals() -> anyhow::Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]
        .into_iter()
        .collect();
    signals.thread_block()?;
    thread::spawn(move || {
        while signals.wait().is_ok() {
            wait::interrupt();
        }
    });
    Ok(())
}
