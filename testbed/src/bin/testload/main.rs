//! The real process that is dumped and restored: see `testbed::load`.

mod fork;
mod memory;
mod pass;
mod run;

use anyhow::{Context, Result};
use clap::Parser;
use testbed::load::spec::LoadSpec;

/// Holds memory whose every page is known, and checks it on command.
#[derive(Parser)]
struct Args {
    /// What to hold, as JSON (`testbed::load::spec::LoadSpec`).
    #[arg(long)]
    spec: String,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let spec: LoadSpec = serde_json::from_str(&args.spec).context("--spec")?;
    run::run(spec)
}
