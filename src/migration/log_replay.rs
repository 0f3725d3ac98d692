//! A service that moves as what its clients have told it: who serves them, at each step. Pure.
//!
//! ```text
//! Prepare ─ Follow ─ Hold ─ Finish ─ Switching ─ Seal ─ Keep ─ Switch ─ Switched ─ Resume ─ End ─ Stop ─ Complete
//! ```
//!
//! From `Hold` on nothing that clients say reaches the service here. `Finish` brings the one at the destination to the
//! same state, and stops its processes: clients that are led there from then on wait for it to go on.
//!
//! `Switching`, `Switched` and `Complete` are records on the source's disk. `Switched` decides: before it, whatever fails
//! ends with the service here and nothing at the destination; after it, the one here serves nobody any more.
//!
//! | who dies | until `Seal` and `Keep` | between them and `Switched` | after that |
//! |---|---|---|---|
//! | the source's command | its end lets clients go on here | its guard gives up | its guard goes on |
//! | the agent | it ends the service there, and the source gives up | the service there stays as it is | the same |
//!
//! Invariant: what a client was told here after `Finish` is never missing at a destination that goes on, since either one
//! of the two services is held, or one of them is gone for good.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// What the source writes down, each with an fsync before what follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogReplayRecord {
    /// Clients may be led to the destination.
    Switching,
    /// They are, and the service lives there.
    Switched,
    /// It serves here as if nothing had happened.
    RolledBack,
    /// Nothing is left to do; it lives at the destination.
    Complete,
}

/// What is to be done at the source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LogReplayAction {
    /// Let the destination start the service.
    Prepare,
    /// Send the log, until the destination is close behind it.
    Follow,
    /// Let nothing of clients reach the service here.
    Hold,
    /// Send the rest of the log, let it be replayed, and compare the digests; the service there is stopped.
    Finish,
    /// Write this to disk.
    Record(LogReplayRecord),
    /// Clients stay held whatever becomes of this process.
    Seal,
    /// Tell the agent that nothing but this side's command ends its service from now on.
    Keep,
    /// Lead clients to the destination.
    Switch,
    /// Let the service there go on.
    Resume,
    /// End the connections of clients here, and the recording.
    End,
    /// End the service here.
    Stop,
    /// Let clients go on here.
    Release,
    /// Lead clients here.
    GiveBack,
    /// Let the agent end what it has.
    Discard,
}

/// How it ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LogReplayEnd {
    /// The service lives at the destination.
    Moved,
    /// It serves here.
    RolledBack,
    /// It is to serve at the destination, and could not be told to go on there.
    Stuck,
}

/// The source's half of one move.
#[derive(Clone, Debug)]
pub struct LogReplay {
    todo: VecDeque<LogReplayAction>,
    /// The last record that may be on disk, but for the one that decides.
    tried: Option<LogReplayRecord>,
    /// Whether the one that decides may be there.
    deciding: bool,
    end: LogReplayEnd,
}

const ALL: [LogReplayAction; 13] = {
    use LogReplayAction::{
        End, Finish, Follow, Hold, Keep, Prepare, Record, Resume, Seal, Stop, Switch,
    };
    [
        Prepare,
        Follow,
        Hold,
        Finish,
        Record(LogReplayRecord::Switching),
        Seal,
        Keep,
        Switch,
        Record(LogReplayRecord::Switched),
        Resume,
        End,
        Stop,
        Record(LogReplayRecord::Complete),
    ]
};

impl Default for LogReplay {
    /// A move that begins.
    fn default() -> LogReplay {
        LogReplay {
            todo: ALL.into(),
            tried: None,
            deciding: false,
            end: LogReplayEnd::Moved,
        }
    }
}

impl LogReplay {
    /// A move whose process died, from the last record that it wrote.
    pub fn recover(last: Option<LogReplayRecord>) -> LogReplay {
        let mut source = LogReplay {
            tried: last,
            ..LogReplay::default()
        };
        match last {
            Some(LogReplayRecord::Complete) => source.todo.clear(),
            Some(LogReplayRecord::RolledBack) => {
                source.todo.clear();
                source.end = LogReplayEnd::RolledBack;
            }
            Some(LogReplayRecord::Switched) => {
                let decided = LogReplayAction::Record(LogReplayRecord::Switched);
                let at = ALL.iter().position(|&action| action == decided);
                source.todo.drain(..=at.unwrap_or(0));
            }
            None | Some(LogReplayRecord::Switching) => source.roll_back(),
        }
        source
    }

    /// What is to be done next; `None` at the end.
    pub fn next_action(&mut self) -> Option<LogReplayAction> {
        let next = self.todo.front().copied();
        match next {
            Some(LogReplayAction::Record(LogReplayRecord::Switched)) => self.deciding = true,
            Some(LogReplayAction::Record(record)) => self.tried = Some(record),
            _ => {}
        }
        next
    }

    /// What was to be done has been done.
    pub fn done(&mut self) {
        if let Some(LogReplayAction::Record(record)) = self.todo.pop_front() {
            self.tried = Some(record);
        }
    }

    /// What was to be done has failed, or is to be given up. Tells whether it changes the end.
    pub fn failed(&mut self) -> bool {
        match (self.may_roll_back(), self.todo.front()) {
            (true, _) => {
                self.roll_back();
                true
            }
            // Both are held: whoever looks next must find it undone.
            (false, Some(LogReplayAction::Resume)) => {
                self.todo.clear();
                self.end = LogReplayEnd::Stuck;
                true
            }
            (false, _) => {
                self.todo.pop_front();
                false
            }
        }
    }

    /// Whether a failure, or the user, can still end it with the service here.
    pub fn may_roll_back(&self) -> bool {
        let decided = matches!(
            self.tried,
            Some(LogReplayRecord::Switched | LogReplayRecord::Complete)
        );
        self.end == LogReplayEnd::Moved && !decided
    }

    /// How it ends, as far as is known.
    pub fn end(&self) -> LogReplayEnd {
        self.end
    }

    fn roll_back(&mut self) {
        use LogReplayAction::{Discard, GiveBack, Record, Release};
        // A record that may be on the disk although it could not be written is overruled first.
        let overrules: &[LogReplayAction] = match self.deciding {
            true => &[Record(LogReplayRecord::Switching)],
            false => &[],
        };
        let back: &[LogReplayAction] = match self.tried {
            None => &[Release],
            Some(_) => &[Release, GiveBack],
        };
        let ends = [Discard, Record(LogReplayRecord::RolledBack)];
        self.todo = [overrules, back, &ends].concat().into();
        self.end = LogReplayEnd::RolledBack;
    }
}

/// Where the agent stands with one service.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReplayState {
    /// What it starts from is on its way.
    Receiving,
    /// It runs, and is told the log.
    Replaying,
    /// It has been told everything, and its processes are stopped.
    Finished,
    /// The same, whatever becomes of the source.
    Kept,
    /// It runs, and is its clients'.
    Running,
    /// Nothing of it is here.
    Aborted,
}

/// What happens at the agent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReplayEvent {
    /// The service was started.
    Started,
    /// It was told everything, and stopped.
    Finished,
    /// The source says that it is to be kept.
    KeepAsked,
    /// The source says that it goes on.
    ResumeAsked,
    /// The source says that it is to be ended, or something failed.
    AbortAsked,
    /// The source has sent nothing for too long, or the agent ends.
    Silence,
}

impl ReplayState {
    /// Where it stands after an event; `None` if the event cannot be now, and changes nothing.
    pub fn after(self, event: ReplayEvent) -> Option<ReplayState> {
        use ReplayState::{Aborted, Finished, Kept, Receiving, Replaying, Running};
        match (self, event) {
            (Receiving, ReplayEvent::Started) => Some(Replaying),
            (Replaying, ReplayEvent::Finished) => Some(Finished),
            (Finished | Kept, ReplayEvent::KeepAsked) => Some(Kept),
            (Kept | Running, ReplayEvent::ResumeAsked) => Some(Running),
            (Receiving | Replaying | Finished | Kept | Aborted, ReplayEvent::AbortAsked)
            | (Receiving | Replaying | Finished, ReplayEvent::Silence) => Some(Aborted),
            _ => None,
        }
    }

    /// What an agent that is started again makes of the last record of an earlier one.
    pub fn recover(last: Option<ReplayState>) -> ReplayState {
        match last {
            Some(ReplayState::Kept) => ReplayState::Kept,
            Some(ReplayState::Running) => ReplayState::Running,
            _ => ReplayState::Aborted,
        }
    }
}

#[cfg(test)]
mod tests;
