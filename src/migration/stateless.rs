//! Containers whose state does not matter: who runs, and where clients are led, at each step. Pure.
//!
//! ```text
//! cold  Prepare ─ Stopping ─ Stop ─ Renew ─ Start ─ Switching ─ Keep ─ Switch ─ Switched ─ Forget ─ Complete
//! live  Prepare ─ Start ─ Switching ─ Keep ─ Switch ─ Switched ─ Drain ─ Stop ─ Forget ─ Complete
//! ```
//!
//! `Stopping`, `Switching`, `Switched` and `Complete` are records on the source's disk. `Switched` decides: before it,
//! whatever fails ends with the container running here and clients led here; after it, all that is left is to end the
//! one here. Two containers may run at a time, since neither has a state that the other lacks.
//!
//! The agent ends its container when the source is silent for too long, unless it has received `Keep`: from then on clients
//! may be led there, and nothing but the source's command ends it.

use serde::{Deserialize, Serialize};

use super::steps::{MoveAction, MoveRecord, MoveSteps};

/// Whether the container here ends before the one at the destination starts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StatelessMode {
    /// Stop, start there, lead clients there.
    Cold,
    /// Start there, lead clients there, stop.
    Live,
}

/// What is to be done at the source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StatelessAction {
    /// Send the image, and let the destination make a container of it that does not run yet.
    Prepare,
    /// Write this to disk.
    Record(MoveRecord),
    /// End the processes of the container here.
    Stop,
    /// Send the image again if it has changed since, and let the destination make the container anew.
    Renew,
    /// Let the destination start the container, and wait until it is ready.
    Start,
    /// Tell the agent that nothing but this side's command ends its container from now on.
    Keep,
    /// Lead clients to the destination.
    Switch,
    /// Wait until connections to the container here have ended.
    Drain,
    /// Let the runtime here forget the container.
    Forget,
    /// See to it that the container runs here.
    RunHere,
    /// Lead clients here.
    GiveBack,
    /// Let the agent end what it has.
    Discard,
}

/// The source's half of one move.
pub type Stateless = MoveSteps<StatelessAction>;

impl Stateless {
    /// A move that begins.
    pub fn new(mode: StatelessMode) -> Stateless {
        use MoveRecord::{Complete, Stopping, Switched, Switching};
        use StatelessAction::{Drain, Forget, Keep, Prepare, Record, Renew, Start, Stop, Switch};
        let start: &[StatelessAction] = match mode {
            StatelessMode::Cold => &[Prepare, Record(Stopping), Stop, Renew, Start],
            StatelessMode::Live => &[Prepare, Start],
        };
        let switch = [Record(Switching), Keep, Switch, Record(Switched)];
        let rest: &[StatelessAction] = match mode {
            StatelessMode::Cold => &[Forget],
            StatelessMode::Live => &[Drain, Stop, Forget],
        };
        MoveSteps::begin([start, &switch, rest, &[Record(Complete)]].concat())
    }
}

impl MoveAction for StatelessAction {
    const SWITCH: StatelessAction = StatelessAction::Switch;
    const DISCARD: StatelessAction = StatelessAction::Discard;

    fn of_record(record: MoveRecord) -> StatelessAction {
        StatelessAction::Record(record)
    }

    fn record(self) -> Option<MoveRecord> {
        match self {
            StatelessAction::Record(record) => Some(record),
            _ => None,
        }
    }

    /// What runs at the destination is better than nothing, until somebody looks.
    fn is_vital(self) -> bool {
        self == StatelessAction::RunHere
    }

    /// The one here runs before clients are led to it, and until then the other one has them.
    fn way_back(tried: Option<MoveRecord>) -> &'static [StatelessAction] {
        use StatelessAction::{GiveBack, RunHere};
        match tried {
            None => &[],
            Some(MoveRecord::Stopping) => &[RunHere],
            Some(_) => &[RunHere, GiveBack],
        }
    }
}

/// Where the agent stands with one container.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StatelessState {
    /// The image is on its way.
    Receiving,
    /// The container is made and does not run.
    Created,
    /// It runs.
    Started,
    /// It runs, whatever becomes of the source.
    Kept,
    /// Nothing of it is here.
    Aborted,
}

/// What happens at the agent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StatelessEvent {
    /// An image arrives, maybe in place of an earlier one.
    ImageComes,
    /// The container was made.
    Made,
    /// It was started.
    Ran,
    /// The source says that it is to be kept.
    KeepAsked,
    /// The source says that it is to be ended, or something failed.
    AbortAsked,
    /// The source has sent nothing for too long, or the agent ends.
    Silence,
}

impl StatelessState {
    /// Where it stands after an event; `None` if the event cannot be now, and changes nothing.
    pub fn after(self, event: StatelessEvent) -> Option<StatelessState> {
        use StatelessState::{Aborted, Created, Kept, Receiving, Started};
        match (self, event) {
            (Receiving | Created, StatelessEvent::ImageComes) => Some(Receiving),
            (Receiving, StatelessEvent::Made) => Some(Created),
            (Created, StatelessEvent::Ran) => Some(Started),
            (Started | Kept, StatelessEvent::KeepAsked) => Some(Kept),
            (_, StatelessEvent::AbortAsked) => Some(Aborted),
            (Receiving | Created | Started, StatelessEvent::Silence) => Some(Aborted),
            _ => None,
        }
    }

    /// What an agent that is started again makes of the last record of an earlier one.
    pub fn recover(last: Option<StatelessState>) -> StatelessState {
        match last {
            Some(StatelessState::Kept) => StatelessState::Kept,
            _ => StatelessState::Aborted,
        }
    }
}

#[cfg(test)]
mod tests;
