//! The program `lazy-client`: its command line, its wiring, its exit codes. It is a library so that the `pageferry`
//! binary can be this program too, and so that what documents the command line can read its definition.

mod args;
mod program;

pub use program::{run_program, run_program_with};

/// The definition of the command line.
pub fn command() -> clap::Command {
    <args::Args as clap::CommandFactory>::command()
}
