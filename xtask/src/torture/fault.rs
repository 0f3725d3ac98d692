//! Faults, carried out at their moments.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pageferry::sys::owned_process::ProcessStat;
use testbed::process::{Spawned, descendants};
use testbed::wait::{self, GENEROUS};

use super::case::{Action, Case, FaultTime, Milestone, PARTICIPANTS, Side};
use super::environment::{Environment, Fixture, NAME};

/// How often a milestone is looked for.
const LOOK_AGAIN: Duration = Duration::from_micros(500);

/// A milestone that is not reached for so long will not be.
const MILESTONE_LIMIT: Duration = Duration::from_secs(4);

/// Programs that hold what nobody else has, after the decision: memory, in a lazy mode; and a restore that has not let
/// the processes go yet. Killed then, it leaves its breakpoints in them (seen with 4.2.1: SIGTRAP ends the root).
const HOLDERS: [&str; 5] = [
    "criu dump",
    "criu restore",
    "page-server",
    "page-server of the memory",
    "lazy-client",
];

/// What faults have done that makes a loss acceptable.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct FaultEffects {
    /// After the decision and before all memory had come, a program was killed that held some of it or the processes.
    pub(super) holder_killed: bool,
}

/// Lets all faults of the case happen.
pub(super) fn carry_out(
    environment: &Environment,
    fixture: &Fixture,
    case: &Case,
    command: &mut Spawned,
) -> Result<FaultEffects> {
    let started = Instant::now();
    // What was to be flipped in a migration that has ended must not be in this one.
    for side in [Side::Source, Side::Destination] {
        environment.proxy(side).flip_nothing();
    }
    let mut effects = FaultEffects::default();
    for fault in &case.faults {
        if !wait_for(fixture, command, started, fault.when)? {
            continue;
        }
        match fault.what {
            Action::Kill {
                participant,
                chance,
            } => {
                let holder = kill_one(fixture, command, participant, chance)?;
                effects.holder_killed |= holder;
            }
            Action::Stop => {
                // It may have ended.
                let _ = kill(command.pid(), Signal::SIGTERM);
            }
            Action::Cut(side, kind) => environment.proxy(side).cut(kind),
            Action::Flip(side, direction, chance) => {
                environment.proxy(side).flip(direction, chance);
            }
            Action::LinkDown(time) => {
                environment.set_link(false)?;
                sleep(time);
                environment.set_link(true)?;
            }
            Action::FillDisk(side) => fixture.disk(side).fill()?,
        }
    }
    Ok(effects)
}

/// Waits for a moment; false if it does not come.
fn wait_for(
    fixture: &Fixture,
    command: &mut Spawned,
    started: Instant,
    when: FaultTime,
) -> Result<bool> {
    match when {
        FaultTime::After(time) => {
            sleep(time.saturating_sub(started.elapsed()));
            Ok(true)
        }
        FaultTime::Behind(milestone, time) => {
            let began = Instant::now();
            while !is_reached(fixture, milestone) {
                // The guard goes on where the command ended.
                let hopeless =
                    command.ended()?.is_some() && !fixture.source_dir().join(NAME).exists();
                if hopeless || began.elapsed() > MILESTONE_LIMIT {
                    return Ok(false);
                }
                sleep(LOOK_AGAIN);
            }
            sleep(time);
            Ok(true)
        }
    }
}

fn is_reached(fixture: &Fixture, milestone: Milestone) -> bool {
    let (source, agent) = (fixture.source_dir().join(NAME), fixture.agent_dir());
    let file = match milestone {
        Milestone::Dump => source.join("images/dump.log"),
        Milestone::SecondRound => agent.join("round-2"),
        Milestone::Restore => agent.join("images/restore.log"),
        Milestone::Grant => source.join("record.json"),
        Milestone::Decision => agent.join("record.json"),
    };
    file.exists()
}

/// Kills a participant of this migration. True if it held memory that nobody else has.
fn kill_one(fixture: &Fixture, command: &Spawned, participant: usize, chance: u64) -> Result<bool> {
    let (name, words) = PARTICIPANTS[participant];
    let found = participants(fixture, command, words)?;
    if found.is_empty() {
        return Ok(false);
    }
    let at = usize::try_from(chance % found.len() as u64).unwrap_or(0);
    let decided = fs::read_to_string(fixture.agent_dir().join("record.json"));
    // It may have ended meanwhile.
    let _ = kill(found[at], Signal::SIGKILL);
    wait::until("the end of a killed process", GENEROUS, || {
        let state = ProcessStat::of(found[at].as_raw()).map(|stat| stat.state);
        Ok(state
            .map_or(true, |state| matches!(state, 'Z' | 'X'))
            .then_some(()))
    })?;
    Ok(HOLDERS.contains(&name) && decided.is_ok_and(|record| record.contains("committed")))
}

/// Processes of this migration whose command lines have the `words`.
pub(super) fn participants(
    fixture: &Fixture,
    command: &Spawned,
    words: &[&str],
) -> Result<Vec<Pid>> {
    let mut pids = descendants(command.pid());
    pids.push(command.pid());
    pids.extend(descendants(fixture.agent.init()?));
    // Programs outlive the command that started them: they are then children of this one.
    pids.extend(descendants(Pid::this()));
    let here = fixture.test_dir.dir().display().to_string();
    pids.retain(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let is_harness = ["nsinit", "unshare", "nsenter", "testload"]
            .iter()
            .any(|program| line.split(' ').take(4).any(|word| word.ends_with(program)));
        line.contains(&here) && !is_harness && words.iter().all(|word| line.contains(word))
    });
    pids.sort_unstable();
    pids.dedup();
    Ok(pids)
}
