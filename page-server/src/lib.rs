//! The command line of `page-server`, for who documents it: man pages, completions, the reference of options.

#[allow(dead_code, reason = "what is parsed is used by the program")]
mod args;

/// The definition of the command line.
pub fn command() -> clap::Command {
    <args::Args as clap::CommandFactory>::command()
}
