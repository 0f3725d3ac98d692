//! `cargo xtask torture`: small processes are moved over and over while participants are killed, connections cut,
//! bits flipped and disks filled.
//!
//! ```text
//! source network ──[proxy]──> destination network      Environment: shared by all migrations
//!   load, migrate                agent                  Fixture: of one migration, each side on a disk of its own
//!   └── faults by chance (case, fault); then: the agent is started again, the migration is resumed, and
//!       exactly one copy must live, whole, with nothing left behind (verdict)
//! ```

mod case;
mod environment;
mod fault;
mod verdict;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use schemars::JsonSchema;
use serde::Serialize;
use testbed::criu::{self, Suite};
use testbed::wait::{self, GENEROUS};
use testbed::workspace::{BIN_DIR_VARIABLE, use_binaries};

use crate::setup;
use case::{Case, Selection};
use environment::{Environment, Fixture, NAME};
use verdict::{HostState, Verdict};

/// How long, and by which chance.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Minutes to go on for.
    #[arg(long, default_value_t = 1)]
    minutes: u64,

    /// End after so many migrations.
    #[arg(long, default_value_t = u64::MAX)]
    migrations: u64,

    /// Decides modes, faults and moments.
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Number of the first migration: a case that went wrong is named by seed and number.
    #[arg(long, default_value_t = 0)]
    first: u64,

    /// A CRIU version or Debian suite [default: that of sid].
    #[arg(long)]
    criu: Option<String>,

    #[command(flatten)]
    selection: Selection,

    /// End with the first migration that loses or doubles a process or has a wrong page.
    #[arg(long)]
    stop_at_first: bool,

    /// Keep the logs of what went wrong in DIR.
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

/// The results of all migrations of a run.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub(crate) struct Counts {
    /// The number that `--seed` gave.
    seed: u64,
    /// Version of CRIU.
    criu: String,
    /// How long it took, seconds.
    seconds: u64,
    /// How many migrations were tried.
    migrations: u64,
    /// How many moved the processes to the destination, with right contents.
    completed: u64,
    /// How many left the processes at the source, with right contents.
    rolled_back: u64,
    /// How many left no processes.
    lost: u64,
    /// How many left processes on both sides.
    doubled: u64,
    /// How many left processes with wrong contents, or without an answer.
    wrong_pages: u64,
    /// How many left a program, a file, a mount, a rule or a registration behind.
    leftovers: u64,
    /// How many did not end.
    stuck: u64,
    /// In how many the only holder of memory, or of restored processes, was killed after the decision, and reported it.
    holder_killed: u64,
}

impl Counts {
    fn add(&mut self, verdict: Verdict) {
        let counter = match verdict {
            Verdict::Completed => &mut self.completed,
            Verdict::RolledBack => &mut self.rolled_back,
            Verdict::Lost => &mut self.lost,
            Verdict::Doubled => &mut self.doubled,
            Verdict::WrongPages => &mut self.wrong_pages,
            Verdict::HolderKilled => &mut self.holder_killed,
        };
        *counter += 1;
    }

    /// Migrations after which processes were gone, there twice, or wrong.
    fn fatal(&self) -> u64 {
        self.lost + self.doubled + self.wrong_pages
    }

    fn bad(&self) -> u64 {
        self.lost + self.doubled + self.wrong_pages + self.leftovers + self.stuck
    }
}

/// Moves, disturbs and looks until the time is over. Fails if anything went wrong.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::require_root()?;
    let criu = match &args.criu {
        Some(version) => criu::of_version(version)?,
        None => criu::of_suite(Suite::Sid)?,
    };
    use_binaries(match std::env::var_os(BIN_DIR_VARIABLE) {
        Some(dir) => dir.into(),
        None => setup::debug_binaries()?,
    });
    let mut counts = Counts {
        seed: args.seed,
        criu: criu.version.clone(),
        ..Counts::default()
    };
    let began = Instant::now();
    let end = began + Duration::from_secs(args.minutes * 60);
    let mut environment = Environment::new(&criu)?;
    for number in args.first.. {
        let over = Instant::now() >= end || counts.migrations >= args.migrations;
        if over || wait::is_interrupted() {
            break;
        }
        let case = Case::new(args.seed, number, &args.selection);
        let fatal = counts.fatal();
        let bad = counts.bad();
        counts.migrations += 1;
        if let Err(error) = migrate(&environment, &case, args, &mut counts) {
            counts.stuck += 1;
            eprintln!("{case}: {error:#}");
        }
        if counts.fatal() > fatal && args.stop_at_first {
            eprintln!("went wrong: {case}");
            break;
        }
        if counts.bad() > bad && !wait::is_interrupted() {
            eprintln!("went wrong: {case}");
            // What is left must not count again.
            drop(environment);
            environment = Environment::new(&criu)?;
        }
        reap_all();
    }
    counts.seconds = began.elapsed().as_secs();
    println!("{}", serde_json::to_string(&counts)?);
    ensure!(
        counts.bad() == 0,
        "a copy was lost, doubled or wrong, or something was left behind"
    );
    Ok(())
}

fn migrate(environment: &Environment, case: &Case, args: &Args, counts: &mut Counts) -> Result<()> {
    let mut fixture = Fixture::new(environment, case)?;
    let ended = carry_out(environment, &mut fixture, case, counts);
    let went_wrong = ended.as_ref().map_or(true, |clean| !clean);
    if went_wrong && let Some(keep) = &args.keep {
        let dir = keep.join(format!("{}-{}", args.seed, case.number));
        fs::create_dir_all(&dir)?;
        fs::write(dir.join("case.txt"), case.to_string())?;
        testbed::process::run(
            std::process::Command::new("cp")
                .arg("-r")
                .args([
                    fixture.source_dir(),
                    fixture.test_dir.path("agent"),
                    fixture.test_dir.path("agent.host"),
                ])
                .arg(&dir),
        )?;
    }
    ended.map(drop)
}

/// True if nothing went wrong.
fn carry_out(
    environment: &Environment,
    fixture: &mut Fixture,
    case: &Case,
    counts: &mut Counts,
) -> Result<bool> {
    let bad = counts.bad();
    let before = HostState::now(environment, fixture)?;
    let moves = fixture.command(environment, case);
    let mut command = moves.start(&fixture.load, &fixture.agent)?;
    let effects = fault::carry_out(environment, fixture, case, &mut command)?;
    if fixture.agent.pid().is_err() {
        fixture.free_disks();
        fixture.agent.start_again()?;
    }
    command.wait(GENEROUS).context("pageferry migrate")?;
    fixture.free_disks();
    if moves.dir().join("facts.json").exists() {
        let resumed = moves.resume(&fixture.agent)?.wait(GENEROUS);
        resumed.context("pageferry migrate --resume")?;
    }
    if fixture.agent_dir().exists() {
        let record = fixture.agent_dir().join("record.json");
        wait::until("the agent's decision", GENEROUS, || {
            Ok(record.exists().then_some(()))
        })?;
    }
    let verdict = verdict::decide(fixture, effects)?;
    counts.add(verdict);
    let left = verdict::leftovers(environment, fixture, &command, &before)?;
    if !left.is_empty() {
        counts.leftovers += 1;
        eprintln!("{NAME} left behind: {left:#?}");
    }
    if counts.bad() > bad {
        eprintln!("{verdict:?}");
        fixture.test_dir.show_logs();
    }
    Ok(counts.bad() == bad)
}

/// Takes the exit status of programs whose parents have ended.
fn reap_all() {
    while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
        if status == WaitStatus::StillAlive {
            break;
        }
    }
}
