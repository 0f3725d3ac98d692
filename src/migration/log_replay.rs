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

use serde::{Deserialize, Serialize};

use super::steps::{MoveAction, MoveRecord, MoveSteps};

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
    Record(MoveRecord),
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

/// The source's half of one move.
pub type LogReplay = MoveSteps<LogReplayAction>;

const ALL: [LogReplayAction; 13] = {
    use LogReplayAction::{
        End, Finish, Follow, Hold, Keep, Prepare, Record, Resume, Seal, Stop, Switch,
    };
    [
        Prepare,
        Follow,
        Hold,
        Finish,
        Record(MoveRecord::Switching),
        Seal,
        Keep,
        Switch,
        Record(MoveRecord::Switched),
        Resume,
        End,
        Stop,
        Record(MoveRecord::Complete),
    ]
};

impl Default for LogReplay {
    /// A move that begins.
    fn default() -> LogReplay {
        MoveSteps::begin(ALL)
    }
}

impl MoveAction for LogReplayAction {
    const SWITCH: LogReplayAction = LogReplayAction::Switch;
    const DISCARD: LogReplayAction = LogReplayAction::Discard;

    fn of_record(record: MoveRecord) -> LogReplayAction {
        LogReplayAction::Record(record)
    }

    fn record(self) -> Option<MoveRecord> {
        match self {
            LogReplayAction::Record(record) => Some(record),
            _ => None,
        }
    }

    /// Both services are held until it is done.
    fn is_vital(self) -> bool {
        self == LogReplayAction::Resume
    }

    fn way_back(tried: Option<MoveRecord>) -> &'static [LogReplayAction] {
        use LogReplayAction::{GiveBack, Release};
        match tried {
            None => &[Release],
            Some(_) => &[Release, GiveBack],
        }
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
