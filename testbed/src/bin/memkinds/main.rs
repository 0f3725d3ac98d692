//! The process with every kind of mapping: see `testbed::kinds`.

mod check;
mod make;
mod more;
mod partner;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Parser;
use nix::unistd::{alarm, getpid, getsid, setsid};
use serde::Serialize;
use testbed::kinds::{KindResults, kind};

use check::check_all;
use make::Made;
use more::make_any;

/// After so many seconds the kernel ends the process, whatever became of the test.
pub(crate) const LIFETIME_S: u32 = 300;

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
    let mut said = KindResults::new();
    if args.kinds.iter().any(|name| name.contains("sysv")) {
        // Before there are partners: CRIU restores no child in a namespace of its own.
        make::own_segments()?;
    }
    let mut names = args.kinds.clone();
    // A partner has a copy of all that is there before it.
    names.sort_by_key(|name| !make::HAVE_PARTNERS.contains(&name.as_str()));
    for name in &names {
        let kind = kind(name).with_context(|| format!("no kind {name}"))?;
        let made = make_any(kind.name, &args.dir);
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
            std::thread::sleep(partner::PAUSE);
        }
        let mut said = check_all(&all, &args.dir)?;
        partner::add_answers(&mut said, &args.dir, n)?;
        publish(&args.dir.join(format!("out-{n}.json")), &said)?;
    }
    Ok(())
}

pub(crate) fn publish(path: &Path, said: &impl Serialize) -> Result<()> {
    let unfinished = path.with_extension("new");
    fs::write(&unfinished, serde_json::to_vec(said)?)?;
    Ok(fs::rename(unfinished, path)?)
}
