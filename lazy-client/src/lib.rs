//! The program `lazy-client`: its command line, its wiring, its exit codes. It is a library so that the `pageferry`
//! binary can be this program too, and so that what documents the command line can read its definition.

mod args;
mod program;

pub use program::{run_program, run_program_with};

use pageferry::engine::restore::Summary;
use pageferry::observe::schema::Output;

/// What it writes for other programs.
pub fn outputs() -> Vec<Output> {
    vec![Output::of::<Summary>(
        "lazy-client-summary",
        "lazy-client --summary-json FILE, at the end",
    )]
}

/// The definition of the command line.
pub fn command() -> clap::Command {
    <args::Args as clap::CommandFactory>::command()
}
