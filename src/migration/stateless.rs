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

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Whether the container here ends before the one at the destination starts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StatelessMode {
    /// Stop, start there, lead clients there.
    Cold,
    /// Start there, lead clients there, stop.
    Live,
}

/// What the source writes down, each with an fsync before what follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StatelessRecord {
    /// The container here may have been stopped.
    Stopping,
    /// Clients may be led to the destination.
    Switching,
    /// They are, and the container lives there.
    Switched,
    /// It runs here as if nothing had happened.
    RolledBack,
    /// Nothing is left to do; it lives at the destination.
    Complete,
}

/// What is to be done at the source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StatelessAction {
    /// Send the image, and let the destination make a container of it that does not run yet.
    Prepare,
    /// Write this to disk.
    Record(StatelessRecord),
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

/// How it ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StatelessEnd {
    /// The container lives at the destination.
    Moved,
    /// It runs here.
    RolledBack,
    /// It was to run here, and could not be started.
    Stuck,
}

/// The source's half of one move.
#[derive(Clone, Debug)]
pub struct Stateless {
    mode: StatelessMode,
    todo: VecDeque<StatelessAction>,
    /// The last record that may be on disk, but for the one that decides.
    tried: Option<StatelessRecord>,
    /// Whether the one that decides may be there.
    deciding: bool,
    end: StatelessEnd,
}

impl Stateless {
    /// A move that begins.
    pub fn new(mode: StatelessMode) -> Stateless {
        use StatelessAction::{Drain, Forget, Keep, Prepare, Record, Renew, Start, Stop, Switch};
        use StatelessRecord::{Complete, Stopping, Switched, Switching};
        let start: &[StatelessAction] = match mode {
            StatelessMode::Cold => &[Prepare, Record(Stopping), Stop, Renew, Start],
            StatelessMode::Live => &[Prepare, Start],
        };
        let switch = [Record(Switching), Keep, Switch, Record(Switched)];
        let rest: &[StatelessAction] = match mode {
            StatelessMode::Cold => &[Forget],
            StatelessMode::Live => &[Drain, Stop, Forget],
        };
        let todo = [start, &switch, rest, &[Record(Complete)]].concat();
        Stateless {
            mode,
            todo: todo.into(),
            tried: None,
            deciding: false,
            end: StatelessEnd::Moved,
        }
    }

    /// A move whose process died, from the last record that it wrote.
    pub fn recover(mode: StatelessMode, last: Option<StatelessRecord>) -> Stateless {
        let mut source = Stateless::new(mode);
        source.tried = last;
        match last {
            Some(StatelessRecord::Complete) => source.todo.clear(),
            Some(StatelessRecord::RolledBack) => {
                source.todo.clear();
                source.end = StatelessEnd::RolledBack;
            }
            Some(StatelessRecord::Switched) => {
                let decided = StatelessAction::Record(StatelessRecord::Switched);
                let at = source.todo.iter().position(|&action| action == decided);
                source.todo.drain(..=at.unwrap_or(0));
            }
            None | Some(StatelessRecord::Stopping | StatelessRecord::Switching) => {
                source.roll_back();
            }
        }
        source
    }

    /// What is to be done next; `None` at the end.
    pub fn next_action(&mut self) -> Option<StatelessAction> {
        let next = self.todo.front().copied();
        match next {
            Some(StatelessAction::Record(StatelessRecord::Switched)) => self.deciding = true,
            Some(StatelessAction::Record(record)) => self.tried = Some(record),
            _ => {}
        }
        next
    }

    /// What was to be done has been done.
    pub fn done(&mut self) {
        if let Some(StatelessAction::Record(record)) = self.todo.pop_front() {
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
            (false, Some(StatelessAction::RunHere)) => {
                // What runs at the destination is better than nothing, until somebody looks.
                self.todo.clear();
                self.end = StatelessEnd::Stuck;
                true
            }
            (false, _) => {
                self.todo.pop_front();
                false
            }
        }
    }

    /// Whether a failure, or the user, can still end it with the container running here.
    pub fn may_roll_back(&self) -> bool {
        let decided = matches!(
            self.tried,
            Some(StatelessRecord::Switched | StatelessRecord::Complete)
        );
        self.end == StatelessEnd::Moved && !decided
    }

    /// How it ends, as far as is known.
    pub fn end(&self) -> StatelessEnd {
        self.end
    }

    /// How the container moves.
    pub fn mode(&self) -> StatelessMode {
        self.mode
    }

    fn roll_back(&mut self) {
        use StatelessAction::{Discard, GiveBack, Record, RunHere};
        // A record that may be on the disk although it could not be written is overruled first.
        let overrules: &[StatelessAction] = match self.deciding {
            true => &[Record(StatelessRecord::Switching)],
            false => &[],
        };
        let ends = [Discard, Record(StatelessRecord::RolledBack)];
        // The one here runs before clients are led to it, and until then the other one has them.
        let before: &[StatelessAction] = match self.tried {
            None => &[],
            Some(StatelessRecord::Stopping) => &[RunHere],
            Some(_) => &[RunHere, GiveBack],
        };
        self.todo = [overrules, before, &ends].concat().into();
        self.end = StatelessEnd::RolledBack;
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
mod tests {
    use super::*;

    /// Both hosts and the way to them.
    #[derive(Clone, Debug)]
    struct World {
        mode: StatelessMode,
        runs_here: bool,
        leads_there: bool,
        agent: StatelessState,
        record: Option<StatelessRecord>,
    }

    impl World {
        fn new(mode: StatelessMode) -> World {
            World {
                mode,
                runs_here: true,
                leads_there: false,
                agent: StatelessState::Receiving,
                record: None,
            }
        }

        fn runs_there(&self) -> bool {
            matches!(self.agent, StatelessState::Started | StatelessState::Kept)
        }

        fn agent_receives(&mut self, events: &[StatelessEvent]) -> bool {
            events.iter().all(|&event| {
                let after = self.agent.after(event);
                self.agent = after.unwrap_or(self.agent);
                after.is_some()
            })
        }

        /// Carries an action out. False if it fails.
        fn apply(&mut self, action: StatelessAction) -> bool {
            match action {
                StatelessAction::Prepare => {
                    self.agent_receives(&[StatelessEvent::ImageComes, StatelessEvent::Made])
                }
                StatelessAction::Renew | StatelessAction::Drain | StatelessAction::Forget => true,
                StatelessAction::Record(record) => {
                    self.record = Some(record);
                    true
                }
                StatelessAction::Stop => {
                    self.runs_here = false;
                    true
                }
                StatelessAction::Start => self.agent_receives(&[StatelessEvent::Ran]),
                StatelessAction::Keep => self.agent_receives(&[StatelessEvent::KeepAsked]),
                StatelessAction::Switch => {
                    self.leads_there = true;
                    true
                }
                StatelessAction::RunHere => {
                    self.runs_here = true;
                    true
                }
                StatelessAction::GiveBack => {
                    self.leads_there = false;
                    true
                }
                StatelessAction::Discard => self.agent_receives(&[StatelessEvent::AbortAsked]),
            }
        }

        fn check(&self, at: &str) {
            if self.mode == StatelessMode::Live {
                let served = match self.leads_there {
                    true => self.runs_there(),
                    false => self.runs_here,
                };
                assert!(served, "{at}: nobody serves: {self:?}");
            }
        }

        fn check_end(&self, end: StatelessEnd, at: &str) {
            let there = end == StatelessEnd::Moved;
            assert_eq!(self.runs_there(), there, "{at}: {self:?}");
            assert_eq!(self.runs_here, !there, "{at}: {self:?}");
            assert_eq!(self.leads_there, there, "{at}: {self:?}");
        }
    }

    /// What goes wrong at one step.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    enum Fault {
        Nothing,
        /// The action fails, undone or done.
        Fails(bool),
        /// The source's command dies before the action, or behind it.
        Dies(bool),
        /// The agent is started again.
        AgentDies,
        Silence,
    }

    const FAULTS: [Fault; 7] = [
        Fault::Nothing,
        Fault::Fails(false),
        Fault::Fails(true),
        Fault::Dies(false),
        Fault::Dies(true),
        Fault::AgentDies,
        Fault::Silence,
    ];

    /// Runs a move with faults at two steps, and tells how it ended.
    fn run(mode: StatelessMode, faults: [(usize, Fault); 2]) -> StatelessEnd {
        let name = format!("{mode:?} {faults:?}");
        let mut world = World::new(mode);
        let mut source = Stateless::new(mode);
        let mut step = 0;
        while let Some(action) = source.next_action() {
            let at = format!("{name}, step {step} {action:?}");
            let fault = faults.iter().find(|(when, _)| *when == step);
            let mut fault = fault.map_or(Fault::Nothing, |fault| fault.1);
            if action == StatelessAction::RunHere && matches!(fault, Fault::Fails(_)) {
                fault = Fault::Nothing;
            }
            step += 1;
            match fault {
                Fault::AgentDies => {
                    let kept = Some(world.agent).filter(|&state| state == StatelessState::Kept);
                    world.agent = StatelessState::recover(kept);
                }
                Fault::Silence => {
                    world.agent_receives(&[StatelessEvent::Silence]);
                }
                _ => {}
            }
            let done = match fault {
                Fault::Fails(true) => {
                    world.apply(action);
                    false
                }
                Fault::Fails(false) => false,
                Fault::Dies(behind) => {
                    if behind {
                        world.apply(action);
                    }
                    source = Stateless::recover(mode, world.record);
                    continue;
                }
                _ => world.apply(action),
            };
            // The end of a failure that nobody gets around: what is left there is told to the user.
            match done {
                true => source.done(),
                false => {
                    source.failed();
                    if action == StatelessAction::Discard {
                        world.agent = StatelessState::Aborted;
                    }
                    if action == StatelessAction::GiveBack {
                        world.leads_there = false;
                    }
                    if action == StatelessAction::Stop && source.end() == StatelessEnd::Moved {
                        world.runs_here = false;
                    }
                }
            }
            if fault != Fault::AgentDies && fault != Fault::Silence {
                world.check(&at);
            }
        }
        world.check_end(source.end(), &name);
        source.end()
    }

    #[test]
    fn whatever_fails_the_container_runs_where_clients_are_led() {
        let (mut moved, mut back) = (0, 0);
        for mode in [StatelessMode::Cold, StatelessMode::Live] {
            for first in 0..13 {
                for second in 0..18 {
                    for one in FAULTS {
                        for two in FAULTS {
                            match run(mode, [(first, one), (second, two)]) {
                                StatelessEnd::Moved => moved += 1,
                                _ => back += 1,
                            }
                        }
                    }
                }
            }
        }
        assert!(moved > 1000 && back > 1000, "{moved} moved, {back} not");
    }

    #[test]
    fn without_a_fault_it_moves() {
        for mode in [StatelessMode::Cold, StatelessMode::Live] {
            let nothing = [(0, Fault::Nothing), (1, Fault::Nothing)];
            assert_eq!(run(mode, nothing), StatelessEnd::Moved);
        }
    }

    #[test]
    fn a_container_that_cannot_be_started_here_again_is_left_where_it_runs() {
        let mut source = Stateless::recover(StatelessMode::Cold, Some(StatelessRecord::Switching));
        assert_eq!(source.next_action(), Some(StatelessAction::RunHere));
        assert!(source.failed());
        assert_eq!(
            (source.next_action(), source.end()),
            (None, StatelessEnd::Stuck)
        );
    }
}
