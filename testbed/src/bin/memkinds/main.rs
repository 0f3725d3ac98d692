//! The process with every kind of mapping: see `testbed::kinds`.

mod check;
mod make;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use nix::unistd::{alarm, getpid, getsid, setsid};
use testbed::kinds::{Said, kind};

use check::check_all;
use make::{Made, make};

/// After so many seconds the kernel ends the process, whatever became of the test.
const LIFETIME_S: u32 = 300;

/// Holds memory of every kind, and checks it when it is asked to.
#[derive(Parser)]
struct Args {
    /// Where files are exchanged.
    #[arg(long)]
    dir: PathBuf,
    /// Names of the kinds.
    #[arg(long, value_delimiter = ',')]
    kinds: Vec<String>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    serve(&args).inspect_err(|error| {
        let _ = fs::write(args.dir.join("failure.txt"), format!("{error:#}"));
    })
}

fn serve(args: &Args) -> Result<()> {
    if getsid(None)? != getpid() {
        setsid().context("setsid")?;
    }
    alarm::set(LIFETIME_S);
    let mut all: BTreeMap<String, Made> = BTreeMap::new();
    let mut said = Said::new();
    for name in &args.kinds {
        let kind = kind(name).with_context(|| format!("no kind {name}"))?;
        let made = make(kind.name, &args.dir);
        said.insert(
            name.clone(),
            made.as_ref().err().map(|error| format!("{error:#}")),
        );
        if let Ok(made) = made {
            all.insert(name.clone(), made);
        }
    }
    publish(&args.dir.join("ready.json"), &said)?;
    for n in 1.. {
        let go = args.dir.join(format!("go-{n}"));
        while !go.exists() {
            std::thread::sleep(Duration::from_millis(2));
        }
        let said = check_all(&all, &args.dir)?;
        publish(&args.dir.join(format!("out-{n}.json")), &said)?;
    }
    Ok(())
}

fn publish(path: &Path, said: &Said) -> Result<()> {
    let unfinished = path.with_extension("new");
    fs::write(&unfinished, serde_json::to_vec(said)?)?;
    Ok(fs::rename(unfinished, path)?)
}
