use super::*;
use crate::migration::MoveEnd;

/// Both hosts and the way to them.
#[derive(Clone, Debug)]
struct World {
    mode: StatelessMode,
    runs_here: bool,
    leads_there: bool,
    agent: StatelessState,
    record: Option<MoveRecord>,
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

    fn check_end(&self, end: MoveEnd, at: &str) {
        let there = end == MoveEnd::Moved;
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
fn run(mode: StatelessMode, faults: [(usize, Fault); 2]) -> MoveEnd {
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
                source = Stateless::new(mode).recovered(world.record);
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
                if action == StatelessAction::Stop && source.end() == MoveEnd::Moved {
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
                            MoveEnd::Moved => moved += 1,
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
        assert_eq!(run(mode, nothing), MoveEnd::Moved);
    }
}

#[test]
fn a_container_that_cannot_be_started_here_again_is_left_where_it_runs() {
    let mut source = Stateless::new(StatelessMode::Cold).recovered(Some(MoveRecord::Switching));
    assert_eq!(source.next_action(), Some(StatelessAction::RunHere));
    assert!(source.failed());
    assert_eq!((source.next_action(), source.end()), (None, MoveEnd::Stuck));
}
