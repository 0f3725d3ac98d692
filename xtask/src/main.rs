//! The project's own commands.

mod bench;
mod criu;
mod setup;
mod test;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The project's own commands")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Measures pageferry and CRIU against each other.
    Bench(bench::Args),
    /// Fetches real CRIUs into target/criu and prints version and path of each.
    Criu(criu::Args),
    /// Runs all tests, those with real CRIUs too, with all set-up.
    Test(test::Args),
}

fn main() -> Result<()> {
    match Args::parse().task {
        Task::Bench(args) => bench::run(&args),
        Task::Criu(args) => criu::run(&args),
        Task::Test(args) => test::run_tests(&args),
    }
}
