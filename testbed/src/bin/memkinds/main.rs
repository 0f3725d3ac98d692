//! The process with every kind of mapping: see `testbed::kinds`.

mod changes;
mod check;
mod guarded;
mod make;
mod more;
mod odd;
mod partner;
mod second;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Parser;
use nix::unistd::{ForkResult, alarm, getpid, getsid, setsid};
use serde::Serialize;
use testbed::kinds::{CHANGES, Kind, KindResults, kind};
use testbed::sys;

use changes::Change;
use check::check_all;
use make::{HAVE_PARTNERS, Made};
use odd::make_any;

/// After so many seconds the kernel ends the process, whatever became of the test.
pub(crate) const LIFETIME_S: u32 = 300;

/// Name of the second process's answers.
const SECOND: &str = "second";

/// Holds memory of every kind, and checks it when it is asked to.
#[derive(Parser)]
struct Args {
    /// Where files are exchanged.
    #[arg(long)]
    dir: PathBuf,
    /// Names of the kinds.
    #[arg(long, value_delimiter = ',')]
    kinds: Vec<String>,
    /// With a second process, and with what becomes of memory when both are told to change it.
    #[arg(long)]
    tree: bool,
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
    let mut said = KindResults::new();
    if args.kinds.iter().any(|name| name.contains("sysv")) {
        // Before there are partners: CRIU restores no child in a namespace of its own.
        make::own_segments()?;
    }
    let mut process = Process::new(&args.dir);
    let mut names = args.kinds.clone();
    // A partner has a copy of all that is there before it. What changes with a tree comes last.
    let order = |kind: &Kind| (CHANGES.contains(kind), !HAVE_PARTNERS.contains(&kind.name));
    names.sort_by_key(|name| kind(name).as_ref().map(order));
    for name in &names {
        let kind = kind(name).with_context(|| format!("no kind {name}"))?;
        let made = match CHANGES.contains(&kind) {
            true => process.prepare(kind),
            false => process.make(kind),
        };
        said.insert(name.clone(), made.err().map(|error| format!("{error:#}")));
    }
    if args.tree {
        process.fork_second()?;
    }
    publish(&args.dir.join("ready.json"), &said)?;
    process.live()
}

/// One of the processes that have all kinds.
struct Process {
    dir: PathBuf,
    /// 0 is the first one, 1 the second.
    number: u32,
    all: BTreeMap<String, Made>,
    /// Changes that are still to be made: by each of the two processes.
    changes: [BTreeMap<String, Change>; 2],
    /// Children that answer too: kind, and name of the answers.
    partners: Vec<(String, String)>,
}

impl Process {
    fn new(dir: &Path) -> Process {
        Process {
            dir: dir.to_owned(),
            number: 0,
            all: BTreeMap::new(),
            changes: Default::default(),
            partners: Vec::new(),
        }
    }

    fn make(&mut self, kind: Kind) -> Result<()> {
        let made = make_any(kind.name, &self.dir)?;
        self.all.insert(kind.name.to_owned(), made);
        if HAVE_PARTNERS.contains(&kind.name) {
            let name = kind.name.to_owned();
            self.partners.push((name.clone(), name));
        }
        Ok(())
    }

    fn prepare(&mut self, kind: Kind) -> Result<()> {
        let prepare = |process| changes::prepare(kind.name, process, &self.dir);
        let both = [prepare(0)?, prepare(1)?];
        let spans = both.iter().flat_map(|change| change.before.clone());
        let made = Made {
            spans: spans.collect(),
            ..Made::default()
        };
        self.all.insert(kind.name.to_owned(), made);
        for (changes, change) in self.changes.iter_mut().zip(both) {
            changes.insert(kind.name.to_owned(), change);
        }
        Ok(())
    }

    /// Forks the process that lives on with this one.
    fn fork_second(&mut self) -> Result<()> {
        if let ForkResult::Child = sys::fork().context("fork")? {
            let lived = self.live_as_second();
            let _ = fs::write(self.dir.join("failure.txt"), format!("second: {lived:?}"));
            sys::exit_now(1);
        }
        let begun: Option<String> = partner::answer(&self.dir, SECOND, 0)?;
        anyhow::ensure!(begun.is_none(), "the second process: {begun:?}");
        Ok(())
    }

    fn live_as_second(&mut self) -> Result<()> {
        partner::end_with_parent()?;
        self.number = 1;
        self.partners.clear();
        self.all = second::inherit(&self.all)?;
        publish(&partner::answer_of(&self.dir, SECOND, 0), &None::<String>)?;
        self.live()
    }

    /// Checks and changes memory as it is told to.
    fn live(&mut self) -> Result<()> {
        let change = self.dir.join("change");
        let changed = self.dir.join(format!("changed-{}.json", self.number));
        let mut next = 1;
        loop {
            if !changed.exists() && change.exists() {
                let said = self.change();
                publish(&changed, &said)?;
            }
            if self.dir.join(format!("go-{next}")).exists() {
                self.check(next)?;
                next += 1;
            }
            std::thread::sleep(partner::PAUSE);
        }
    }

    /// Makes the changes of this process; tells which this kernel lacks.
    fn change(&mut self) -> KindResults {
        let mut said = KindResults::new();
        let [first, second] = std::mem::take(&mut self.changes);
        let (own, mut others) = match self.number {
            0 => (first, second),
            _ => (second, first),
        };
        for (name, change) in own {
            let other = others.remove(&name).map(|other| match other.for_others {
                Some(spans) => spans,
                None => other.before,
            });
            let applied = (change.apply)();
            said.insert(
                name.clone(),
                applied.as_ref().err().map(|error| format!("{error:#}")),
            );
            let Ok(mut spans) = applied else {
                self.all.remove(&name);
                continue;
            };
            spans.extend(other.into_iter().flatten());
            if name == "c-forked" {
                let forked = changes::forked_name(self.number);
                self.partners.push((name.clone(), forked));
            }
            let made = self.all.entry(name).or_default();
            made.spans = spans;
        }
        said
    }

    fn check(&mut self, n: u32) -> Result<()> {
        let mut said = check_all(&self.all, &self.dir)?;
        for (kind, name) in &self.partners {
            let wrong: Option<String> = partner::answer(&self.dir, name, n)?;
            let own = said.entry(kind.clone()).or_default();
            *own = own
                .take()
                .or(wrong.map(|wrong| format!("in its partner: {wrong}")));
        }
        if self.number == 1 {
            return publish(&partner::answer_of(&self.dir, SECOND, n), &said);
        }
        if partner::answer_of(&self.dir, SECOND, 0).exists() {
            let second: KindResults = partner::answer(&self.dir, SECOND, n)?;
            for (kind, wrong) in second {
                let own = said.entry(kind).or_default();
                *own = own
                    .take()
                    .or(wrong.map(|wrong| format!("in the second process: {wrong}")));
            }
        }
        publish(&self.dir.join(format!("out-{n}.json")), &said)
    }
}

pub(crate) fn publish(path: &Path, said: &impl Serialize) -> Result<()> {
    let unfinished = path.with_extension("new");
    fs::write(&unfinished, serde_json::to_vec(said)?)?;
    Ok(fs::rename(unfinished, path)?)
}
