//! The source's half: it freezes, grants, and lets its processes go when the agent has decided.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::agent::AgentState;

/// Where the source stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceState {
    /// The processes run; rounds may be under way.
    Preparing,
    /// The processes are frozen, and go on if anything fails.
    Frozen,
    /// The agent may decide: nothing but its answer lets the processes run here again.
    Granted,
    /// The processes live at the destination; what is left here ends.
    Committed,
    /// Nothing is left to do; the processes run at the destination.
    Complete,
    /// The processes run here as if nothing had happened.
    RolledBack,
}

impl fmt::Display for SourceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SourceState::Preparing => "preparing",
            SourceState::Frozen => "frozen",
            SourceState::Granted => "granted (the agent may have decided)",
            SourceState::Committed => "committed",
            SourceState::Complete => "complete",
            SourceState::RolledBack => "rolled back",
        })
    }
}

/// What the source writes down, each with an fsync before anything that follows from it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceRecord {
    /// The promise of [`SourceState::Granted`].
    Granted,
    /// The agent has committed.
    Committed,
    /// The agent cannot commit any more, and the processes run here.
    RolledBack,
    /// All is done.
    Complete,
}

impl fmt::Display for SourceRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SourceRecord::Granted => "granted (the agent may have decided)",
            SourceRecord::Committed => "committed",
            SourceRecord::RolledBack => "rolled back",
            SourceRecord::Complete => "complete",
        })
    }
}

/// What happened at the source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SourceEvent {
    /// The freeze begins.
    Freezing,
    /// The agent has restored everything and waits for the decision.
    AgentReady,
    /// A record is on disk.
    Recorded(SourceRecord),
    /// The agent says where it stands. After [`SourceAction::SendCommit`], [`SourceAction::AskAgent`] or
    /// [`SourceAction::SendAbort`].
    AgentState(AgentState),
    /// The agent did not answer.
    AgentSilent,
    /// Something failed here, the user cancelled, or the time is over.
    Failed,
    /// All memory has arrived at the destination.
    MemoryComplete,
}

/// What is to be done next, in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SourceAction {
    /// Write this to disk; answered by [`SourceEvent::Recorded`].
    Record(SourceRecord),
    /// Make sure that the frozen processes stay stopped whatever becomes of the dump.
    Fence,
    /// Tell the agent that it may decide; answered by [`SourceEvent::AgentState`] or `AgentSilent`.
    SendCommit,
    /// Ask the agent where it stands, after a pause; answered in the same way.
    AskAgent,
    /// Tell the agent to abort. Its answer matters only after a grant.
    SendAbort,
    /// Let the processes run here again: trackers removed, network unlocked, files gone.
    Release,
    /// End the processes here, as soon as the destination does not need their memory any more.
    EndProcesses,
}

/// The source's half of one migration.
#[derive(Clone, Debug)]
pub struct Source {
    state: SourceState,
    /// The grant is on its way to the disk.
    granting: bool,
    /// It failed meanwhile: a record that may be on disk must be overruled by a later one first.
    failed: bool,
}

impl Default for Source {
    fn default() -> Source {
        Source::new()
    }
}

impl Source {
    /// A migration that begins.
    pub fn new() -> Source {
        Source::at(SourceState::Preparing)
    }

    fn at(state: SourceState) -> Source {
        Source {
            state,
            granting: false,
            failed: false,
        }
    }

    /// A migration whose process died, from the last record that it wrote, and what is to be done first.
    pub fn recover(last: Option<SourceRecord>) -> (Source, Vec<SourceAction>) {
        let (state, actions) = match last {
            None => (SourceState::Frozen, vec![]),
            Some(SourceRecord::Granted) => (
                SourceState::Granted,
                vec![SourceAction::Fence, SourceAction::AskAgent],
            ),
            Some(SourceRecord::Committed) => {
                (SourceState::Committed, vec![SourceAction::EndProcesses])
            }
            // What came after the record may not have been done.
            Some(SourceRecord::RolledBack) => {
                (SourceState::RolledBack, vec![SourceAction::Release])
            }
            Some(SourceRecord::Complete) => (SourceState::Complete, vec![]),
        };
        let mut source = Source::at(state);
        let actions = match last {
            None => source.handle(SourceEvent::Failed),
            Some(_) => actions,
        };
        (source, actions)
    }

    /// Where it stands.
    pub fn state(&self) -> SourceState {
        self.state
    }

    /// Whether a failure or the user may still end it with the processes running here.
    pub fn may_roll_back(&self) -> bool {
        matches!(self.state, SourceState::Preparing | SourceState::Frozen)
    }

    /// Takes `event` in and tells what is to be done.
    pub fn handle(&mut self, event: SourceEvent) -> Vec<SourceAction> {
        use SourceAction as Do;
        use SourceEvent as On;
        use SourceState as At;
        match (self.state, event) {
            (At::Preparing, On::Freezing) => {
                self.state = At::Frozen;
                vec![]
            }
            (At::Frozen, On::AgentReady) if !self.granting => {
                self.granting = true;
                vec![Do::Record(SourceRecord::Granted)]
            }
            (At::Frozen, On::Failed | On::AgentSilent) if self.granting => {
                self.failed = true;
                vec![]
            }
            (At::Frozen, On::Recorded(SourceRecord::Granted)) if self.failed => {
                self.state = At::RolledBack;
                let record = Do::Record(SourceRecord::RolledBack);
                vec![record, Do::Release, Do::SendAbort]
            }
            (At::Frozen, On::Recorded(SourceRecord::Granted)) => {
                self.state = At::Granted;
                vec![Do::Fence, Do::SendCommit]
            }
            // Nothing was promised yet: whatever the agent does, it may not commit.
            (At::Preparing | At::Frozen, On::Failed | On::AgentSilent) => self.roll_back(),
            (At::Preparing | At::Frozen, On::AgentState(AgentState::Aborted)) => self.roll_back(),
            (At::Granted, On::AgentState(AgentState::Committed | AgentState::Complete)) => {
                vec![Do::Record(SourceRecord::Committed)]
            }
            (At::Granted, On::Recorded(SourceRecord::Committed)) => {
                self.state = At::Committed;
                vec![Do::EndProcesses]
            }
            (At::Granted, On::AgentState(AgentState::Aborted)) => self.roll_back(),
            // It has not decided, though it was told that it may: it is told once more.
            (At::Granted, On::AgentState(AgentState::Ready)) => vec![Do::SendCommit],
            // A restore that has been begun and is not ready cannot have received a grant.
            (At::Granted, On::AgentState(AgentState::Receiving | AgentState::Restoring)) => {
                vec![Do::SendAbort]
            }
            (At::Granted, On::AgentSilent) => vec![Do::AskAgent],
            (At::Committed, On::MemoryComplete) => vec![Do::Record(SourceRecord::Complete)],
            (At::Committed, On::Recorded(SourceRecord::Complete)) => {
                self.state = At::Complete;
                vec![]
            }
            _ => vec![],
        }
    }

    fn roll_back(&mut self) -> Vec<SourceAction> {
        let promised = self.state == SourceState::Granted;
        self.state = SourceState::RolledBack;
        let record = SourceAction::Record(SourceRecord::RolledBack);
        match promised {
            // The agent has aborted: there is nobody to tell.
            true => vec![record, SourceAction::Release],
            // The processes first: the agent cannot commit without a grant, whenever it is told of the end.
            false => vec![SourceAction::Release, record, SourceAction::SendAbort],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn granted() -> Source {
        let mut source = Source::new();
        source.handle(SourceEvent::Freezing);
        source.handle(SourceEvent::AgentReady);
        source.handle(SourceEvent::Recorded(SourceRecord::Granted));
        assert_eq!(source.state(), SourceState::Granted);
        source
    }

    #[test]
    fn a_grant_is_on_disk_before_the_agent_hears_of_it() {
        let mut source = Source::new();
        source.handle(SourceEvent::Freezing);
        let first = source.handle(SourceEvent::AgentReady);
        assert_eq!(first, [SourceAction::Record(SourceRecord::Granted)]);
        assert!(source.may_roll_back());
        let then = source.handle(SourceEvent::Recorded(SourceRecord::Granted));
        assert_eq!(then, [SourceAction::Fence, SourceAction::SendCommit]);
        assert!(!source.may_roll_back());
    }

    #[test]
    fn after_a_grant_no_failure_lets_the_processes_run_here() {
        for event in [SourceEvent::Failed, SourceEvent::AgentSilent] {
            let mut source = granted();
            let actions = source.handle(event);
            assert!(!actions.contains(&SourceAction::Release), "{event:?}");
            assert_eq!(source.state(), SourceState::Granted);
        }
        let mut source = granted();
        let actions = source.handle(SourceEvent::AgentState(AgentState::Aborted));
        assert_eq!(actions.last(), Some(&SourceAction::Release));
    }

    #[test]
    fn a_failure_while_the_grant_is_written_overrules_it_on_disk_first() {
        let mut source = Source::new();
        source.handle(SourceEvent::Freezing);
        source.handle(SourceEvent::AgentReady);
        assert_eq!(source.handle(SourceEvent::Failed), []);
        let actions = source.handle(SourceEvent::Recorded(SourceRecord::Granted));
        let expected = [
            SourceAction::Record(SourceRecord::RolledBack),
            SourceAction::Release,
            SourceAction::SendAbort,
        ];
        assert_eq!(actions, expected);
    }

    #[test]
    fn a_failure_before_the_grant_releases_first() {
        for frozen in [false, true] {
            let mut source = Source::new();
            if frozen {
                source.handle(SourceEvent::Freezing);
            }
            let actions = source.handle(SourceEvent::Failed);
            assert_eq!(actions.first(), Some(&SourceAction::Release));
            assert_eq!(source.state(), SourceState::RolledBack);
            assert_eq!(source.handle(SourceEvent::Failed), []);
        }
    }
}
