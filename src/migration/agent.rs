//! The agent's half: it restores, waits for the grant, and decides.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where the agent stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AgentState {
    /// Rounds and images arrive.
    Receiving,
    /// CRIU restores the processes.
    Restoring,
    /// The processes are whole and have not run yet.
    Ready,
    /// The processes live here.
    Committed,
    /// The same, with all of their memory.
    Complete,
    /// The processes do not and will not run here.
    Aborted,
}

impl fmt::Display for AgentState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            AgentState::Receiving => "receiving images",
            AgentState::Restoring => "restoring",
            AgentState::Ready => "ready to run",
            AgentState::Committed => "committed",
            AgentState::Complete => "complete",
            AgentState::Aborted => "aborted",
        })
    }
}

impl AgentState {
    /// Whether nothing can change any more but the arrival of memory.
    pub fn is_decided(self) -> bool {
        matches!(
            self,
            AgentState::Committed | AgentState::Complete | AgentState::Aborted
        )
    }
}

/// What the agent writes down, each with an fsync before anything that follows from it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AgentRecord {
    /// The processes live here.
    Committed,
    /// The processes never will.
    Aborted,
    /// All of their memory is here.
    Complete,
}

impl fmt::Display for AgentRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            AgentRecord::Committed => "committed",
            AgentRecord::Aborted => "aborted",
            AgentRecord::Complete => "complete",
        })
    }
}

/// What happened at the agent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AgentEvent {
    /// The source asked for the restore.
    RestoreAsked,
    /// CRIU has restored everything and waits for the decision.
    Restored,
    /// The source says that the agent may decide.
    CommitAsked,
    /// The source, or an operator, wants it to end.
    AbortAsked,
    /// Something failed here, the source was lost, or the time is over.
    Failed,
    /// A record is on disk.
    Recorded(AgentRecord),
    /// A record could not be written, and it is certain that it is not on disk.
    NotRecorded(AgentRecord),
    /// All memory is here.
    MemoryComplete,
}

/// What is to be done next, in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AgentAction {
    /// Start the restore.
    Restore,
    /// Write this to disk; answered by [`AgentEvent::Recorded`].
    Record(AgentRecord),
    /// Let the restored processes run.
    LetRun,
    /// End the restore and what it has made.
    Discard,
}

/// The agent's half of one migration.
#[derive(Clone, Debug)]
pub struct Agent {
    state: AgentState,
    /// The decision that is being written.
    writing: Option<AgentRecord>,
}

impl Default for Agent {
    fn default() -> Agent {
        Agent::new()
    }
}

impl Agent {
    /// A migration that begins.
    pub fn new() -> Agent {
        Agent {
            state: AgentState::Receiving,
            writing: None,
        }
    }

    /// A migration whose agent died, from the last record that it wrote, and what is to be done first.
    /// Without a decision on disk none was made: the restored processes that waited died with the agent.
    pub fn recover(last: Option<AgentRecord>) -> (Agent, Vec<AgentAction>) {
        let state = match last {
            None => {
                let mut agent = Agent::new();
                let actions = agent.handle(AgentEvent::Failed);
                return (agent, actions);
            }
            Some(AgentRecord::Committed) => AgentState::Committed,
            Some(AgentRecord::Complete) => AgentState::Complete,
            Some(AgentRecord::Aborted) => AgentState::Aborted,
        };
        let actions = match state {
            AgentState::Aborted => vec![AgentAction::Discard],
            // The decision may be older than the message to the processes.
            AgentState::Committed => vec![AgentAction::LetRun],
            _ => vec![],
        };
        let agent = Agent {
            state,
            writing: None,
        };
        (agent, actions)
    }

    /// Where it stands. A decision that is still being written is none.
    pub fn state(&self) -> AgentState {
        self.state
    }

    /// Takes `event` in and tells what is to be done.
    pub fn handle(&mut self, event: AgentEvent) -> Vec<AgentAction> {
        use AgentAction as Do;
        use AgentEvent as On;
        use AgentState as At;
        match (self.state, event) {
            (At::Receiving, On::RestoreAsked) if self.writing.is_none() => {
                self.state = At::Restoring;
                vec![Do::Restore]
            }
            (At::Restoring, On::Restored) if self.writing.is_none() => {
                self.state = At::Ready;
                vec![]
            }
            (At::Ready, On::CommitAsked) => self.decide(AgentRecord::Committed),
            (At::Receiving | At::Restoring | At::Ready, On::AbortAsked | On::Failed) => {
                self.decide(AgentRecord::Aborted)
            }
            (At::Receiving | At::Restoring | At::Ready, On::Recorded(record))
                if self.writing == Some(record) =>
            {
                self.writing = None;
                match record {
                    AgentRecord::Committed => {
                        self.state = At::Committed;
                        vec![Do::LetRun]
                    }
                    AgentRecord::Aborted => {
                        self.state = At::Aborted;
                        vec![Do::Discard]
                    }
                    AgentRecord::Complete => vec![],
                }
            }
            // Without a record there is no decision, and an agent that is started again aborts as well. What is
            // discarded may have left no room for the record.
            (At::Receiving | At::Restoring | At::Ready, On::NotRecorded(record))
                if self.writing == Some(record) =>
            {
                self.writing = None;
                self.state = At::Aborted;
                vec![Do::Discard, Do::Record(AgentRecord::Aborted)]
            }
            (At::Committed, On::MemoryComplete) => vec![Do::Record(AgentRecord::Complete)],
            // What is not recorded is found out again by an agent that is started again.
            (
                At::Committed,
                On::Recorded(AgentRecord::Complete) | On::NotRecorded(AgentRecord::Complete),
            ) => {
                self.state = At::Complete;
                vec![]
            }
            _ => vec![],
        }
    }

    /// The first decision is the only one, also while it is being written.
    fn decide(&mut self, decision: AgentRecord) -> Vec<AgentAction> {
        if self.writing.is_some() {
            return vec![];
        }
        self.writing = Some(decision);
        vec![AgentAction::Record(decision)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ready() -> Agent {
        let mut agent = Agent::new();
        agent.handle(AgentEvent::RestoreAsked);
        agent.handle(AgentEvent::Restored);
        assert_eq!(agent.state(), AgentState::Ready);
        agent
    }

    #[test]
    fn a_decision_that_cannot_be_written_is_an_abort() {
        for asked in [AgentEvent::CommitAsked, AgentEvent::AbortAsked] {
            let mut agent = Agent::new();
            agent.handle(AgentEvent::RestoreAsked);
            agent.handle(AgentEvent::Restored);
            let actions = agent.handle(asked);
            let [AgentAction::Record(record)] = actions[..] else {
                panic!("{actions:?}")
            };
            let actions = agent.handle(AgentEvent::NotRecorded(record));
            let again = AgentAction::Record(AgentRecord::Aborted);
            assert_eq!(actions, [AgentAction::Discard, again]);
            assert_eq!(agent.state(), AgentState::Aborted);
            for event in [
                AgentEvent::NotRecorded(AgentRecord::Aborted),
                AgentEvent::Recorded(AgentRecord::Aborted),
                AgentEvent::CommitAsked,
            ] {
                assert_eq!(agent.handle(event), []);
            }
            assert_eq!(agent.state(), AgentState::Aborted);
        }
    }

    #[test]
    fn processes_run_only_after_the_decision_is_on_disk() {
        let mut agent = ready();
        let asked = agent.handle(AgentEvent::CommitAsked);
        assert_eq!(asked, [AgentAction::Record(AgentRecord::Committed)]);
        assert_eq!(agent.state(), AgentState::Ready);
        let recorded = agent.handle(AgentEvent::Recorded(AgentRecord::Committed));
        assert_eq!(recorded, [AgentAction::LetRun]);
    }

    #[test]
    fn the_first_decision_is_final() {
        let mut agent = ready();
        agent.handle(AgentEvent::CommitAsked);
        assert_eq!(agent.handle(AgentEvent::AbortAsked), []);
        agent.handle(AgentEvent::Recorded(AgentRecord::Committed));
        assert_eq!(agent.handle(AgentEvent::AbortAsked), []);
        assert_eq!(agent.state(), AgentState::Committed);

        let mut agent = ready();
        agent.handle(AgentEvent::AbortAsked);
        assert_eq!(agent.handle(AgentEvent::CommitAsked), []);
        agent.handle(AgentEvent::Recorded(AgentRecord::Aborted));
        assert_eq!(agent.handle(AgentEvent::CommitAsked), []);
        assert_eq!(agent.state(), AgentState::Aborted);
    }

    #[test]
    fn an_agent_that_is_not_ready_cannot_commit() {
        for events in [&[][..], &[AgentEvent::RestoreAsked][..]] {
            let mut agent = Agent::new();
            for &event in events {
                agent.handle(event);
            }
            assert_eq!(agent.handle(AgentEvent::CommitAsked), []);
        }
    }
}
