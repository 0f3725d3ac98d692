//! The program `page-server`: its command line, its wiring, its exit codes. It is a library so that the `pageferry`
//! binary can be this program too, and so that what documents the command line can read its definition.

mod args;
mod confinement;
mod entry;
mod hashes;
mod program;
mod report;
mod rpc;

pub use program::run_program;

use pageferry::observe::schema::Output;
use pageferry::observe::traffic::Traffic;

/// What it writes for other programs.
pub fn outputs() -> Vec<Output> {
    let name = "page-server-summary";
    vec![Output::of::<report::Line<'_>>(
        name,
        "page-server --summary-json FILE, a line for each session",
    )]
}

/// What `GET /metrics` is answered before anything has happened.
pub fn metrics() -> String {
    Traffic::default().prometheus()
}

/// The definition of the command line.
pub fn command() -> clap::Command {
    <args::Args as clap::CommandFactory>::command()
}
