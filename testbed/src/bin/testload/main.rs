//! The real process that is dumped and restored: see `testbed::load`.

mod fork;
mod memory;
mod pass;
mod probe;
mod run;

use std::fs;

use anyhow::{Context, Result};
use clap::Parser;
use testbed::load::report::FAILURE_FILE;
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
    let failure_file = spec.dir.join(FAILURE_FILE);
    let for_panics = failure_file.clone();
    std::panic::set_hook(Box::new(move |panic| {
        let _ = fs::write(&for_panics, panic.to_string());
    }));
    run::run(spec).inspect_err(|error| {
        let _ = fs::write(failure_file, format!("{error:#}"));
    })
}
