//! A dump of restored processes while pages are still missing.
//!
//! CRIU takes a missing page for one that was never touched. So such a dump succeeds, and lacks the memory. lazy-client
//! cannot prevent it. It sees that a process is traced, warns at once, and fills at full speed, whatever rate was asked
//! for.

use std::fs;
use std::time::{Duration, Instant};

use super::Restore;
use super::host_process::Disturbance;
use crate::lazy::planner::SpaceId;

/// How often somebody who traces a process is looked for while pages are missing. A dump freezes even a small
/// process for longer.
pub(super) const LOOK: Duration = Duration::from_millis(20);

/// Who was seen, and when the next look is due.
#[derive(Debug)]
pub(super) struct SecondDump {
    looked: Instant,
    /// The process that was looked at last.
    turn: SpaceId,
    /// The process that is being traced or frozen.
    disturbed: Option<SpaceId>,
}

impl SecondDump {
    pub(super) fn new() -> SecondDump {
        SecondDump {
            looked: Instant::now(),
            turn: SpaceId(0),
            disturbed: None,
        }
    }
}

impl Restore {
    /// When to look next, if there is anything to look for.
    pub(super) fn next_look(&self) -> Option<Duration> {
        let watched =
            self.handover.is_finished() && self.processes.next_on_host(SpaceId(0)).is_some();
        let due = || LOOK.saturating_sub(self.second_dump.looked.elapsed());
        (watched && !self.planner.is_complete()).then(due)
    }

    /// Looks at one of the processes in turn: a dump holds all processes of a tree for as long as it takes.
    pub(super) fn look_for_second_dump(&mut self) {
        if self.second_dump.looked.elapsed() < LOOK {
            return;
        }
        self.second_dump.looked = Instant::now();
        let finished = self.handover.is_finished();
        let id = match self.second_dump.disturbed {
            Some(disturbed) => Some(disturbed),
            None => self.next_in_turn(),
        };
        let Some(id) = id else {
            return;
        };
        let host = self
            .processes
            .get_mut(id)
            .and_then(|process| process.host.as_mut());
        let seen = host.and_then(|host| Some((host.pid(), host.disturbed(finished)?)));
        let missing = self.planner.missing_pages();
        match (seen, self.second_dump.disturbed) {
            (Some((pid, by)), None) if missing > 0 => {
                self.second_dump.disturbed = Some(id);
                self.background.set_full_speed(true);
                warn_of_disturbance(pid, by, missing);
            }
            (None, Some(_)) => {
                self.second_dump.disturbed = None;
                self.background.set_full_speed(false);
                tracing::warn!(
                    "the process is no longer traced or frozen; {missing} pages are still missing"
                );
            }
            _ => {}
        }
    }

    fn next_in_turn(&mut self) -> Option<SpaceId> {
        let next = self.processes.next_on_host(self.second_dump.turn)?;
        self.second_dump.turn = next;
        Some(next)
    }
}

fn warn_of_disturbance(pid: i32, by: Disturbance, missing: u64) {
    let how = match by {
        Disturbance::Traced(tracer) => {
            let name = fs::read_to_string(format!("/proc/{tracer}/comm")).unwrap_or_default();
            format!("traced by process {tracer} ({})", name.trim())
        }
        Disturbance::Frozen => "frozen".to_owned(),
    };
    tracing::error!(
        "process {pid} is being {how} while {missing} pages are missing: a dump that is made now succeeds WITHOUT \
         them, so discard it and dump again once this lazy-client has ended; filling at full speed"
    );
}
