//! The project's own commands.

mod assets;
mod bench;
mod book;
mod chosen;
mod criu;
mod demo;
mod deny;
mod documents;
mod exchange;
mod fuzz;
mod layers;
mod package;
mod runtimes;
mod setup;
mod simulate;
mod test;
mod torture;
mod tracked;
mod zdtm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
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
    /// Writes man pages, completions and the reference of options.
    Assets(assets::Args),
    /// Measures pageferry and CRIU against each other.
    Bench(Box<bench::Args>),
    /// Makes a book of the documents into target/book, and checks its links.
    Book(book::Args),
    /// Fetches real CRIUs into target/criu and prints version and path of each.
    Criu(criu::Args),
    /// Moves a Redis under load from host to host in each mode, and prints a table of the times.
    Demo(demo::Args),
    /// Checks licences, sources and duplicates of what is built in, as deny.toml says.
    Deny(deny::Args),
    /// Checks the documents: short sentences, and links that lead somewhere.
    Documents(documents::Args),
    /// Lets programs of another build and of this one work together, in both directions.
    Exchange(exchange::Args),
    /// Runs libFuzzer on what reads bytes of others; prints a line for each target, and all as JSON.
    Fuzz(fuzz::Args),
    /// Checks that modules import each other without circles and in the order of ARCHITECTURE.md.
    Layers(layers::Args),
    /// Builds packages into target/package: .deb files, static programs, a list of parts.
    Package(package::Args),
    /// Fetches runc, crun and podman into target/debian/runtimes and prints their versions.
    Runtimes(runtimes::Args),
    /// Runs the seeded simulations over many seeds; prints a line for each, and all as JSON.
    Simulate(simulate::Args),
    /// Runs all tests, those with real CRIUs too, with all set-up.
    Test(test::Args),
    /// Moves small processes over and over and kills participants; prints counts as JSON.
    Torture(torture::Args),
    /// Runs CRIU's own test suite with CRIU's daemons and with pageferry's; prints a line for each way.
    Zdtm(zdtm::Args),
}

fn main() -> ExitCode {
    let task = Args::parse().task;
    // Whatever waits fails then, so that guards clean up.
    let result = wait::interrupt_on_signals().and_then(|()| match task {
        Task::Assets(args) => assets::run(&args),
        Task::Bench(args) => bench::run(&args),
        Task::Book(args) => book::run(&args),
        Task::Criu(args) => criu::run(&args),
        Task::Demo(args) => demo::run(&args),
        Task::Deny(args) => deny::run(&args),
        Task::Documents(args) => documents::run(&args),
        Task::Exchange(args) => exchange::run(&args),
        Task::Fuzz(args) => fuzz::run(&args),
        Task::Layers(args) => layers::run(&args),
        Task::Package(args) => package::run_package(&args),
        Task::Runtimes(args) => runtimes::run(&args),
        Task::Simulate(args) => simulate::run(&args),
        Task::Test(args) => test::run_tests(&args),
        Task::Torture(args) => torture::run(&args),
        Task::Zdtm(args) => zdtm::run(&args),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if wait::is_interrupted() => {
            eprintln!("interrupted; everything is cleaned up");
            ExitCode::from(EXIT_INTERRUPTED)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
