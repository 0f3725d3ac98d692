//! A process that changes its memory at random, with all children that it forks, and compares it with a model: see
//! `testbed::mm_operations`.
//!
//! ```text
//! mmops --dir DIR --seed N    DIR/ready-NAME: a process has its memory and waits (0 is the first one, 0.1 its child)
//!                             DIR/go-K: holds a number: each does as many steps more, checks everything, and says
//!                                       what is wrong in DIR/result-K-NAME; with "lazily" behind it pages may be missing
//! ```
//!
//! A child has the model of its parent as it has its memory: by the fork. What several processes share is written by
//! the first one alone, and a table in shared memory says what each page of it holds.

mod check;
mod model;
mod moves;
mod pick;
mod steps;

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Parser;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, alarm, getpid};
use testbed::exchange::{self, write};
use testbed::sys;

use model::Model;

/// After so many seconds the kernel ends the process, whatever became of the test.
const LIFETIME_S: u32 = 300;

/// Processes that live on beside the first one at most: each waits for its own children before the dump.
const MOST_LIVING: usize = 3;

/// Children that nobody has waited for yet, at most.
const MOST_UNAWAITED: usize = 3;

const PAUSE: Duration = Duration::from_millis(2);

#[derive(Parser)]
struct Args {
    /// Where files are exchanged.
    #[arg(long)]
    dir: PathBuf,
    /// Decides what is done.
    #[arg(long)]
    seed: u64,
    /// Steps of the first process before the dump.
    #[arg(long, default_value_t = 300)]
    before: u32,
    /// What is left out: "guard", "wipe", "memfd-private", ...
    #[arg(long, value_delimiter = ',')]
    without: Vec<String>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    exchange::begin(LIFETIME_S)?;
    let model = Model::new(args.seed, &args.dir, args.without.clone())?;
    let process = Process {
        model,
        dir: args.dir.clone(),
        name: "0".to_owned(),
        depth: 0,
        children: 0,
        unawaited: Vec::new(),
    };
    process.live(args.before)
}

/// One of the processes.
struct Process {
    model: Model,
    dir: PathBuf,
    name: String,
    /// Forks between the first process and this one.
    depth: usize,
    /// How many children that live on it has.
    children: usize,
    unawaited: Vec<Pid>,
}

impl Process {
    /// From the first step to the end of the process: says what is wrong, whatever it is.
    fn live(mut self, before: u32) -> Result<()> {
        let began = self.run(before, true).and_then(|()| self.check());
        if let Err(error) = began {
            let path = self.dir.join("failure.txt");
            if !path.exists() {
                write(&path, &format!("{}, before the dump: {error:#}", self.name))?;
            }
            return Err(error);
        }
        write(&self.dir.join(format!("ready-{}", self.name)), "")?;
        for part in 1.. {
            let (steps, lazily) = wait_for(&self.dir.join(format!("go-{part}")));
            self.model.may_lack_pages = lazily;
            self.model.note(0, 0, &format!("begins part {part}"));
            let found = self.run(steps, false).and_then(|()| self.check());
            let path = self.dir.join(format!("result-{part}-{}", self.name));
            exchange::write_result(&path, found)?;
        }
        Ok(())
    }

    /// Does `steps` random things; among them are forks of children that live on, if these may.
    fn run(&mut self, steps: u32, children_live: bool) -> Result<()> {
        for _ in 0..steps {
            match self.model.random.below(40) {
                0 if children_live && self.depth < 2 && self.children < MOST_LIVING => {
                    self.fork_to_live(steps / 3)?;
                }
                1 | 2 if self.depth < 2 => self.fork_to_look()?,
                _ => self.model.step()?,
            }
        }
        while let Some(child) = self.unawaited.pop() {
            self.reap(child)?;
        }
        Ok(())
    }

    fn check(&mut self) -> Result<()> {
        self.model.check_all()
    }

    /// Becomes the child of a fork.
    fn inherit(&mut self, name: String) {
        let _ = set_pdeathsig(Signal::SIGKILL);
        alarm::set(LIFETIME_S);
        self.name = name;
        self.depth += 1;
        self.children = 0;
        self.unawaited.clear();
        self.model.inherit(&self.name);
    }

    /// Forks a child that is dumped with this process.
    fn fork_to_live(&mut self, before: u32) -> Result<()> {
        self.children += 1;
        let name = format!("{}.{}", self.name, self.children);
        self.model.note(0, 0, &format!("forks {name}"));
        match sys::fork()? {
            ForkResult::Child => {
                self.inherit(name);
                let process = Process {
                    model: std::mem::take(&mut self.model),
                    dir: self.dir.clone(),
                    name: self.name.clone(),
                    unawaited: Vec::new(),
                    ..*self
                };
                let _ = process.live(before);
                sys::exit_now(1)
            }
            ForkResult::Parent { child } => {
                let ready = self.dir.join(format!("ready-{name}"));
                while !ready.exists() {
                    let ended = waitpid(child, Some(nix::sys::wait::WaitPidFlag::WNOHANG))?;
                    ensure!(
                        ended == WaitStatus::StillAlive,
                        "{name}, which was to live on: {ended:?}"
                    );
                    sleep(PAUSE);
                }
                Ok(())
            }
        }
    }

    /// Forks a child that does a little, checks everything and ends.
    fn fork_to_look(&mut self) -> Result<()> {
        let (steps, turn) = (
            self.model.random.below(30),
            self.model.random.below(1 << 20),
        );
        self.model
            .note(0, 0, &format!("forks a child of {steps} steps"));
        let waits = self.model.random.below(2) == 0;
        match sys::fork()? {
            ForkResult::Child => {
                self.inherit(format!("{}/{turn}", self.name));
                let done = self
                    .run(u32::try_from(steps)?, false)
                    .and_then(|()| self.check());
                if let Err(error) = &done {
                    let file = format!("child-{}.txt", getpid());
                    let _ = write(&self.dir.join(file), &format!("{}: {error:#}", self.name));
                }
                sys::exit_now(i32::from(done.is_err()))
            }
            ForkResult::Parent { child } => {
                self.unawaited.push(child);
                if waits || self.unawaited.len() > MOST_UNAWAITED {
                    let child = self.unawaited.remove(0);
                    self.reap(child)?;
                }
                Ok(())
            }
        }
    }

    fn reap(&self, child: Pid) -> Result<()> {
        let ended = waitpid(child, None)?;
        let said = self.dir.join(format!("child-{child}.txt"));
        let said = fs::read_to_string(said).unwrap_or_default();
        ensure!(
            matches!(ended, WaitStatus::Exited(_, 0)),
            "a child: {ended:?}: {said}"
        );
        Ok(())
    }
}

/// Waits for a file with a number; says whether "lazily" follows.
fn wait_for(path: &Path) -> (u32, bool) {
    loop {
        let text = fs::read_to_string(path).unwrap_or_default();
        // A line without its end is still being written.
        if let Some(line) = text.strip_suffix('\n')
            && let Ok(number) = line.trim_end_matches(" lazily").parse()
        {
            return (number, line.ends_with("lazily"));
        }
        sleep(PAUSE);
    }
}
