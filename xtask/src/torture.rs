//! `cargo xtask torture`: small processes are moved over and over while participants are killed.
//!
//! ```text
//! load ── pageferry migrate (a mode by chance) ──> agent        one participant is killed at a moment by chance
//!   └── then: the agent is started again, the migration is resumed, and exactly one copy must live, whole
//! ```

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry::sys::owned_process::ProcessStat;
use serde::Serialize;
use testbed::agent::{Agent, Move};
use testbed::bed::Bed;
use testbed::criu::{self, Criu, Suite};
use testbed::load::Load;
use testbed::load::scenarios::verifying;
use testbed::load::spec::LoadSpec;
use testbed::process::{Spawned, descendants};
use testbed::wait::{self, GENEROUS};
use testbed::workspace::use_binaries;

use crate::setup;

/// How long, and by which chance.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Minutes to go on for.
    #[arg(long, default_value_t = 1)]
    minutes: u64,

    /// Decides modes, victims of kills and moments.
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// A CRIU version or Debian suite [default: that of sid].
    #[arg(long)]
    criu: Option<String>,
}

/// What is printed at the end, as one line of JSON.
#[derive(Debug, Default, Serialize)]
struct Counts {
    migrations: u64,
    /// The processes live at the destination, whole.
    completed: u64,
    /// They live at the source, whole.
    rolled_back: u64,
    /// They live nowhere, or lack memory that nobody was killed for.
    lost: u64,
    /// They run on both sides.
    doubled: u64,
    wrong_pages: u64,
    /// Image files or programs that are left.
    leftovers: u64,
    /// The only holder of memory was killed after the decision: what had not travelled is gone.
    holder_killed: u64,
}

const MODES: [&str; 4] = ["cold", "pre-copy", "post-copy", "hybrid"];

/// Who may be killed, by the words of its command line.
const PARTICIPANTS: [(&str, &[&str]); 7] = [
    ("migrate", &["pageferry", "migrate"]),
    ("agent", &["pageferry", "agent"]),
    ("guard", &["pageferry", "guard"]),
    ("dump", &["criu", "dump"]),
    ("restore", &["criu", "restore"]),
    ("page-server", &["page-server"]),
    ("lazy-client", &["lazy-client"]),
];

/// The longest wait before a kill: a migration takes about so long.
const MOMENT_MS_MAX: u64 = 1_500;

/// Names of migrations: a name serves once in a state directory.
const NAME: &str = "torture";

/// Moves, kills and looks until the time is over. Fails if a copy was lost, doubled or wrong.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::require_root()?;
    let criu = match &args.criu {
        Some(version) => criu::of_version(version)?,
        None => criu::of_suite(Suite::Sid)?,
    };
    use_binaries(setup::debug_binaries()?);
    let mut rng = fastrand::Rng::with_seed(args.seed);
    let mut counts = Counts::default();
    let end = Instant::now() + Duration::from_secs(args.minutes * 60);
    while Instant::now() < end && !wait::is_interrupted() {
        let bed = Bed::new()?;
        let bad = (counts.lost, counts.doubled, counts.wrong_pages);
        let (mode, participant) = (
            MODES[rng.usize(0..MODES.len())],
            rng.usize(0..=PARTICIPANTS.len()),
        );
        let moment = Duration::from_millis(rng.u64(0..MOMENT_MS_MAX));
        let what = PARTICIPANTS.get(participant);
        let case = format!(
            "{mode}, {} killed after {} ms",
            what.map_or("nobody", |(name, _)| name),
            moment.as_millis()
        );
        let migrated = migrate(
            &bed,
            &criu,
            mode,
            what.map(|(_, words)| *words),
            moment,
            &mut counts,
        );
        migrated.with_context(|| case.clone())?;
        if bad != (counts.lost, counts.doubled, counts.wrong_pages) {
            eprintln!("went wrong: {case}");
            bed.show_logs();
        }
    }
    println!("{}", serde_json::to_string(&counts)?);
    ensure!(
        counts.lost + counts.doubled + counts.wrong_pages + counts.leftovers == 0,
        "a copy was lost, doubled or wrong, or something was left behind"
    );
    Ok(())
}

fn migrate(
    bed: &Bed,
    criu: &Criu,
    mode: &str,
    kills: Option<&[&str]>,
    moment: Duration,
    counts: &mut Counts,
) -> Result<()> {
    let mut load = Load::start(LoadSpec::tree(bed.path("load"), 8, 2), None)?;
    let dir = bed.path("agent");
    let mut agent = Agent::start(&criu.path, &dir, None, &[])?;
    let moves = Move::new(criu, bed.path("source"), NAME).with(&["--mode", mode]);
    let mut command = moves.start(&load, &agent)?;
    let mut holder_killed = false;
    if let Some(words) = kills {
        std::thread::sleep(moment);
        holder_killed = kill_one(words, &command, &agent, bed)?;
    }
    command.wait(GENEROUS)?;
    counts.migrations += 1;
    settle(&moves, &mut agent, &dir)?;
    judge(&mut load, &agent, holder_killed, counts)?;
    counts.leftovers += u64::from(images_in(&moves.dir())? + images_in(&agent.dir_of(NAME))? > 0);
    Ok(())
}

/// Kills a participant that is a descendant of this program and whose command line has the `words`. True if it
/// held memory that nobody else has.
fn kill_one(words: &[&str], command: &Spawned, agent: &Agent, bed: &Bed) -> Result<bool> {
    let mut pids = descendants(command.pid());
    pids.push(command.pid());
    pids.extend(descendants(agent.init()?));
    // Programs outlive the command that started them: they are then children of this one.
    pids.extend(descendants(Pid::this()));
    let here = bed.dir().display().to_string();
    let found = pids.into_iter().find(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        line.contains(&here) && words.iter().all(|word| line.contains(word))
    });
    let Some(pid) = found else {
        return Ok(false);
    };
    let decided = fs::read_to_string(agent.dir_of(NAME).join("record.json"));
    // It may have ended meanwhile.
    let _ = kill(pid, Signal::SIGKILL);
    Ok(decided.is_ok_and(|record| record.contains("committed")))
}

/// Lets both sides come to their end: an agent that was killed is started again and finds its records.
fn settle(moves: &Move<'_>, agent: &mut Agent, dir: &Path) -> Result<()> {
    if agent.pid().is_err() {
        agent.start_again()?;
    }
    if moves.dir().join("facts.json").exists() {
        moves.resume(agent)?.wait(GENEROUS)?;
    }
    let record = dir.join(NAME).join("record.json");
    if !dir.join(NAME).exists() {
        return Ok(());
    }
    wait::until("the agent's decision", GENEROUS, || {
        Ok(fs::read_to_string(&record).is_ok().then_some(()))
    })
}

fn judge(load: &mut Load, agent: &Agent, holder_killed: bool, counts: &mut Counts) -> Result<()> {
    let here = runs(load.pid());
    let there = descendants(agent.init()?).into_iter().any(runs);
    match (here, there) {
        (true, true) => counts.doubled += 1,
        (false, false) if holder_killed => counts.holder_killed += 1,
        (false, false) => counts.lost += 1,
        (true, false) => {
            counts.rolled_back += 1;
            load.steer(load.pid())?;
            counts.wrong_pages += u64::from(!is_right(load));
        }
        (false, true) => {
            load.steer(agent.init()?)?;
            match is_right(load) {
                true => counts.completed += 1,
                false if holder_killed => counts.holder_killed += 1,
                false => counts.wrong_pages += 1,
            }
        }
    }
    Ok(())
}

/// Whether a process is one of the load's, and not stopped.
fn runs(pid: Pid) -> bool {
    let name = fs::read_to_string(format!("/proc/{pid}/comm"));
    let state = ProcessStat::of(pid.as_raw()).map(|stat| stat.state);
    name.is_ok_and(|name| name.trim() == "testload")
        && state.is_ok_and(|state| matches!(state, 'R' | 'S' | 'D'))
}

fn is_right(load: &Load) -> bool {
    let reports = load.run_everywhere(&verifying());
    reports.is_ok_and(|reports| reports.iter().all(|report| report.expect_right().is_ok()))
}

fn images_in(dir: &Path) -> Result<u32> {
    let mut count = 0;
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let path = entry?.path();
        if path.is_dir() {
            count += images_in(&path)?;
        } else if path.extension().is_some_and(|extension| extension == "img") {
            count += 1;
        }
    }
    Ok(count)
}
