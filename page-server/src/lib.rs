//! The program `page-server`: its command line, its wiring, its exit codes. It is a library so that the `pageferry`
//! binary can be this program too, and so that what documents the command line can read its definition.

mod args;
mod confinement;
mod entry;
mod program;
mod report;
mod rpc;

pub use program::run_program;

/// The definition of the command line.
pub fn command() -> clap::Command {
    <args::Args as clap::CommandFactory>::command()
}
