//! `cargo xtask runtimes`: a Debian system with the container runtimes of the guides, beside the machine's own.

use anyhow::Result;
use testbed::debian;

use crate::setup;

/// Nothing to choose.
#[derive(clap::Args)]
pub(crate) struct Args {}

/// Fetches the system unless it is here, and prints its directory and what versions it has.
pub(crate) fn run(_: &Args) -> Result<()> {
    setup::require_root()?;
    let system = debian::runtimes()?;
    for version in debian::versions(&system)? {
        println!("{version}");
    }
    println!("{}", system.display());
    Ok(())
}
