//! Which step of the event log an action is.

use super::events::Step;
use super::{LogReplayAction, StatelessAction};

/// An action that the event log shows.
pub trait ActionStep {
    /// The step that it is; `None` of a record, which stands for what it is written for.
    fn step(self) -> Option<Step>;
}

impl ActionStep for StatelessAction {
    fn step(self) -> Option<Step> {
        Some(match self {
            StatelessAction::Prepare | StatelessAction::Renew => Step::Files,
            StatelessAction::Record(_) => return None,
            StatelessAction::Stop | StatelessAction::Forget => Step::Stop,
            StatelessAction::Start => Step::Start,
            StatelessAction::Keep => Step::Commit,
            StatelessAction::Switch => Step::Route,
            StatelessAction::Drain => Step::Drain,
            StatelessAction::RunHere | StatelessAction::GiveBack => Step::Release,
            StatelessAction::Discard => Step::Discard,
        })
    }
}

impl ActionStep for LogReplayAction {
    fn step(self) -> Option<Step> {
        Some(match self {
            LogReplayAction::Prepare => Step::Start,
            LogReplayAction::Follow => Step::Replay,
            LogReplayAction::Hold | LogReplayAction::Seal => Step::Hold,
            LogReplayAction::Finish => Step::Rest,
            LogReplayAction::Record(_) => return None,
            LogReplayAction::Keep => Step::Commit,
            LogReplayAction::Switch => Step::Route,
            LogReplayAction::Resume => Step::Resume,
            LogReplayAction::End | LogReplayAction::Stop => Step::Stop,
            LogReplayAction::Release | LogReplayAction::GiveBack => Step::Release,
            LogReplayAction::Discard => Step::Discard,
        })
    }
}
