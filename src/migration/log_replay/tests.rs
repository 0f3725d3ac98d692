use super::*;
use crate::migration::MoveEnd;

/// Both hosts, their clients and the way between them.
#[derive(Clone, Debug)]
struct World {
    /// The recorder's: one holds, and stays held whatever becomes of the one who holds.
    held: bool,
    sealed: bool,
    ended: bool,
    stopped: bool,
    leads_there: bool,
    record: Option<MoveRecord>,
    agent: ReplayState,
    /// What clients were told, in order of its number; what each service knows of it.
    answers: u64,
    here: u64,
    there: u64,
}

impl World {
    fn new() -> World {
        World {
            held: false,
            sealed: false,
            ended: false,
            stopped: false,
            leads_there: false,
            record: None,
            agent: ReplayState::Receiving,
            answers: 1,
            here: 1,
            there: 0,
        }
    }

    fn serves_here(&self) -> bool {
        !self.held && !self.ended && !self.stopped
    }

    fn serves_there(&self) -> bool {
        self.agent == ReplayState::Running
    }

    /// Clients say something wherever they are served.
    fn clients(&mut self, name: &str) {
        assert!(
            !(self.serves_here() && self.serves_there()),
            "{name}: two serve: {self:?}"
        );
        if self.serves_here() {
            assert_eq!(self.here, self.answers, "{name}: {self:?}");
            self.here += 1;
            self.answers += 1;
        }
        if self.serves_there() {
            assert_eq!(self.there, self.answers, "{name}: {self:?}");
            self.there += 1;
            self.answers += 1;
        }
    }

    fn agent_receives(&mut self, event: ReplayEvent) -> bool {
        let after = self.agent.after(event);
        self.agent = after.unwrap_or(self.agent);
        after.is_some()
    }

    /// Carries an action out. False if it fails.
    fn apply(&mut self, action: LogReplayAction) -> bool {
        match action {
            LogReplayAction::Prepare => self.agent_receives(ReplayEvent::Started),
            LogReplayAction::Follow => self.agent == ReplayState::Replaying,
            LogReplayAction::Hold => {
                self.held = true;
                true
            }
            LogReplayAction::Finish => {
                self.there = self.here;
                self.agent_receives(ReplayEvent::Finished)
            }
            LogReplayAction::Record(record) => {
                self.record = Some(record);
                true
            }
            LogReplayAction::Seal => {
                self.sealed = self.held;
                self.held
            }
            LogReplayAction::Keep => self.agent_receives(ReplayEvent::KeepAsked),
            LogReplayAction::Switch => {
                self.leads_there = true;
                true
            }
            LogReplayAction::Resume => self.agent_receives(ReplayEvent::ResumeAsked),
            LogReplayAction::End => {
                self.ended = true;
                true
            }
            LogReplayAction::Stop => {
                self.stopped = true;
                true
            }
            LogReplayAction::Release => {
                self.held = false;
                self.sealed = false;
                true
            }
            LogReplayAction::GiveBack => {
                self.leads_there = false;
                true
            }
            LogReplayAction::Discard => self.agent_receives(ReplayEvent::AbortAsked),
        }
    }

    fn source_dies(&mut self) {
        self.held = self.sealed;
    }

    fn agent_dies(&mut self) {
        let last = match self.agent {
            ReplayState::Kept | ReplayState::Running => Some(self.agent),
            _ => None,
        };
        self.agent = ReplayState::recover(last);
    }

    fn expect_end(&self, end: MoveEnd, name: &str) {
        match end {
            MoveEnd::Moved => assert!(
                self.serves_there() && self.leads_there && !self.serves_here(),
                "{name}: {self:?}"
            ),
            MoveEnd::RolledBack => assert!(
                self.serves_here() && !self.leads_there && self.agent == ReplayState::Aborted,
                "{name}: {self:?}"
            ),
            MoveEnd::Stuck => panic!("{name}: stuck: {self:?}"),
        }
    }
}

/// Runs until the end, or until an action with this number is to be done.
fn run(world: &mut World, source: &mut LogReplay, until: Option<usize>, name: &str) -> bool {
    for number in 0.. {
        world.clients(name);
        let Some(action) = source.next_action() else {
            return true;
        };
        if until == Some(number) {
            return false;
        }
        match world.apply(action) {
            true => source.done(),
            false => drop(source.failed()),
        }
    }
    true
}

#[test]
fn a_service_moves_or_stays_whoever_dies_before_or_behind_each_action() {
    for (number, action) in ALL.into_iter().enumerate() {
        for (behind, agent_dies) in [(false, false), (true, false), (false, true), (true, true)] {
            let name = format!("{action:?} {behind} {agent_dies}");
            let (mut world, mut source) = (World::new(), LogReplay::default());
            run(&mut world, &mut source, Some(number), &name);
            if behind {
                world.apply(action);
            }
            world.source_dies();
            if agent_dies {
                world.agent_dies();
            }
            world.clients(&name);
            let mut guard = LogReplay::default().recovered(world.record);
            run(&mut world, &mut guard, None, &name);
            world.expect_end(guard.end(), &name);
        }
    }
}

#[test]
fn a_failure_at_any_action_ends_in_one_place() {
    for (number, action) in ALL.into_iter().enumerate() {
        for half_done in [false, true] {
            let name = format!("{action:?} {half_done}");
            let (mut world, mut source) = (World::new(), LogReplay::default());
            run(&mut world, &mut source, Some(number), &name);
            if half_done {
                world.apply(action);
            }
            let is_told = source.failed();
            if source.end() == MoveEnd::Stuck {
                // The next one finds the record, and finishes it.
                assert!(is_told);
                source = LogReplay::default().recovered(world.record);
            }
            run(&mut world, &mut source, None, &name);
            world.expect_end(source.end(), &name);
        }
    }
}

#[test]
fn an_agent_that_is_started_again_ends_what_was_not_to_be_kept() {
    for (number, action) in ALL.into_iter().enumerate() {
        let name = format!("{action:?}");
        let (mut world, mut source) = (World::new(), LogReplay::default());
        run(&mut world, &mut source, Some(number), &name);
        world.agent_dies();
        run(&mut world, &mut source, None, &name);
        world.expect_end(source.end(), &name);
    }
}

#[test]
fn a_service_that_is_its_clients_is_ended_by_nobody() {
    for event in [ReplayEvent::AbortAsked, ReplayEvent::Silence] {
        assert_eq!(ReplayState::Running.after(event), None);
    }
    assert_eq!(ReplayState::Kept.after(ReplayEvent::Silence), None);
    assert_eq!(ReplayState::Replaying.after(ReplayEvent::ResumeAsked), None);
}
