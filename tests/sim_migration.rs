//! Both sides of a migration against each other, with a crash or a lost message at any step.
//!
//! ```text
//! source machine ── actions ──> simulation: disk records, frozen or running, messages ──> agent machine
//!        ^                                      │
//!        └──────── events, crashes, restarts <──┘
//! ```
//!
//! The simulation executes one action at a time and may crash either side between any two of them. What is
//! on "disk" survives, nothing else does: processes that are restored and have not run die with the
//! agent, and a source without a fence lets its processes run when its migration dies.

#[path = "common/seeds.rs"]
mod seeds;

use std::collections::{BTreeSet, VecDeque};

use fastrand::Rng;
use pageferry::migration::{
    Agent, AgentAction, AgentEvent, AgentRecord, AgentState, Source, SourceAction, SourceEvent,
    SourceRecord, SourceState,
};

use seeds::{Seed, are_usual, seeds};

/// Seeds of one run.
const SEEDS: u64 = 20_000;

/// Steps after which a simulation must have come to rest.
const STEPS_MAX: usize = 400;

/// The processes at the source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum AtSource {
    Running,
    Frozen,
    Ended,
}

/// The processes at the destination.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum AtDestination {
    Absent,
    /// Restored, waiting for the word.
    Waiting,
    Running,
}

/// Messages on their way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum ToAgent {
    Restore,
    Commit,
    Abort,
    Ask,
}

struct Simulation {
    rng: Rng,
    /// Chance in a thousand of a crash or loss at each step.
    trouble: u32,
    source: Source,
    source_todo: VecDeque<SourceAction>,
    source_disk: Option<SourceRecord>,
    fenced: bool,
    at_source: AtSource,
    agent: Agent,
    agent_todo: VecDeque<AgentAction>,
    agent_disk: Option<AgentRecord>,
    at_destination: AtDestination,
    requests: VecDeque<ToAgent>,
    answers: VecDeque<AgentState>,
    /// What failed, until the source has heard the agent again.
    failed: Option<Failure>,
    /// Which failure came in the recovery from which.
    doubled: BTreeSet<(Failure, Failure)>,
    log: Vec<String>,
}

/// What goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Failure {
    SourceCrashes,
    AgentCrashes,
    RequestLost,
    AnswerLost,
    RestoreFails,
    /// The agent's disk takes no record.
    RecordFails,
}

impl Failure {
    /// What may fail again and again, and what may fail in the recovery from that.
    const REPEATED: [Failure; 4] = [
        Failure::SourceCrashes,
        Failure::AgentCrashes,
        Failure::RequestLost,
        Failure::AnswerLost,
    ];

    /// What fails at the agent alone, which answers next, unless it crashes.
    const AT_AGENT: [Failure; 2] = [Failure::RestoreFails, Failure::RecordFails];
}

impl Simulation {
    fn new(seed: u64) -> Simulation {
        let mut rng = Rng::with_seed(seed);
        let trouble = rng.u32(0..250);
        Simulation {
            rng,
            trouble,
            source: Source::new(),
            source_todo: VecDeque::new(),
            source_disk: None,
            fenced: false,
            at_source: AtSource::Running,
            agent: Agent::new(),
            agent_todo: VecDeque::new(),
            agent_disk: None,
            at_destination: AtDestination::Absent,
            requests: VecDeque::new(),
            answers: VecDeque::new(),
            failed: None,
            doubled: BTreeSet::new(),
            log: Vec::new(),
        }
    }

    /// Whether `failure` happens now.
    fn strikes(&mut self, failure: Failure) -> bool {
        let strikes = self.rng.u32(0..1000) < self.trouble;
        if strikes && let Some(first) = self.failed.replace(failure) {
            self.doubled.insert((first, failure));
        }
        strikes
    }

    fn note(&mut self, line: String) {
        self.log.push(line);
    }

    fn check(&self) {
        let both =
            self.at_source == AtSource::Running && self.at_destination == AtDestination::Running;
        assert!(!both, "two copies run:\n{}", self.log.join("\n"));
    }

    fn source_event(&mut self, event: SourceEvent) {
        self.note(format!(
            "source hears {event:?} at {:?}",
            self.source.state()
        ));
        let actions = self.source.handle(event);
        self.source_todo.extend(actions);
    }

    fn agent_event(&mut self, event: AgentEvent) {
        self.note(format!("agent hears {event:?} at {:?}", self.agent.state()));
        let actions = self.agent.handle(event);
        self.agent_todo.extend(actions);
    }

    fn crash_source(&mut self) {
        self.note("source crashes".into());
        self.source_todo.clear();
        self.answers.clear();
        // A dump whose peer is gone lets its processes go on, unless they are fenced.
        if self.at_source == AtSource::Frozen && !self.fenced && self.source_disk.is_none() {
            self.at_source = AtSource::Running;
        }
        let (source, actions) = Source::recover(self.source_disk);
        self.source = source;
        self.source_todo.extend(actions);
    }

    fn crash_agent(&mut self) {
        self.note("agent crashes".into());
        self.agent_todo.clear();
        self.requests.clear();
        if self.at_destination == AtDestination::Waiting
            && self.agent_disk != Some(AgentRecord::Committed)
        {
            self.at_destination = AtDestination::Absent;
        }
        let (agent, actions) = Agent::recover(self.agent_disk);
        self.agent = agent;
        self.agent_todo.extend(actions);
    }

    fn do_source(&mut self, action: SourceAction) {
        self.note(format!("source does {action:?}"));
        match action {
            SourceAction::Record(record) => {
                self.source_disk = Some(record);
                self.source_event(SourceEvent::Recorded(record));
            }
            SourceAction::Fence => self.fenced = true,
            SourceAction::SendCommit => self.requests.push_back(ToAgent::Commit),
            SourceAction::AskAgent => self.requests.push_back(ToAgent::Ask),
            SourceAction::SendAbort => self.requests.push_back(ToAgent::Abort),
            SourceAction::Release => {
                self.fenced = false;
                if self.at_source == AtSource::Frozen {
                    self.at_source = AtSource::Running;
                }
            }
            SourceAction::EndProcesses => {
                assert_ne!(self.at_source, AtSource::Running, "{}", self.log.join("\n"));
                self.at_source = AtSource::Ended;
                self.source_event(SourceEvent::MemoryComplete);
            }
        }
    }

    fn do_agent(&mut self, action: AgentAction) {
        self.note(format!("agent does {action:?}"));
        match action {
            AgentAction::Restore => {
                self.at_destination = AtDestination::Waiting;
                if self.strikes(Failure::RestoreFails) {
                    return self.agent_event(AgentEvent::Failed);
                }
                self.agent_event(AgentEvent::Restored);
            }
            AgentAction::Record(record) if self.strikes(Failure::RecordFails) => {
                self.note(format!("{record:?} is not written"));
                self.agent_event(AgentEvent::NotRecorded(record));
            }
            AgentAction::Record(record) => {
                self.agent_disk = Some(record);
                self.agent_event(AgentEvent::Recorded(record));
            }
            AgentAction::LetRun => {
                self.at_destination = AtDestination::Running;
                self.agent_event(AgentEvent::MemoryComplete);
            }
            AgentAction::Discard => {
                assert_ne!(self.at_destination, AtDestination::Running);
                self.at_destination = AtDestination::Absent;
            }
        }
    }

    fn deliver_request(&mut self, request: ToAgent) {
        if self.strikes(Failure::RequestLost) {
            self.note(format!("{request:?} is lost"));
            return self.source_event(SourceEvent::AgentSilent);
        }
        match request {
            ToAgent::Restore => self.agent_event(AgentEvent::RestoreAsked),
            ToAgent::Commit => self.agent_event(AgentEvent::CommitAsked),
            ToAgent::Abort => self.agent_event(AgentEvent::AbortAsked),
            ToAgent::Ask => {}
        }
        while let Some(action) = self.agent_todo.pop_front() {
            if self.strikes(Failure::AgentCrashes) {
                self.crash_agent();
                self.check();
                return self.source_event(SourceEvent::AgentSilent);
            }
            self.do_agent(action);
            self.check();
        }
        self.answers.push_back(self.agent.state());
    }

    fn receive_answer(&mut self, answer: AgentState) {
        if self.strikes(Failure::AnswerLost) {
            self.note(format!("the answer {answer:?} is lost"));
            return self.source_event(SourceEvent::AgentSilent);
        }
        self.failed = None;
        match (answer, self.source.state()) {
            (AgentState::Ready, SourceState::Frozen) => self.source_event(SourceEvent::AgentReady),
            _ => self.source_event(SourceEvent::AgentState(answer)),
        }
    }

    /// One thing happens. False when nothing is left.
    fn step(&mut self) -> bool {
        if let Some(action) = self.agent_todo.pop_front() {
            match self.strikes(Failure::AgentCrashes) {
                true => self.crash_agent(),
                false => self.do_agent(action),
            }
        } else if let Some(action) = self.source_todo.pop_front() {
            match self.strikes(Failure::SourceCrashes) {
                true => self.crash_source(),
                false => self.do_source(action),
            }
        } else if let Some(answer) = self.answers.pop_front() {
            self.receive_answer(answer);
        } else if let Some(request) = self.requests.pop_front() {
            self.deliver_request(request);
        } else if self.source.may_roll_back() {
            // The source waits for something that a crash took away, or the user has had enough.
            self.source_event(SourceEvent::Failed);
        } else if self.source.state() == SourceState::Granted {
            self.source_todo.push_back(SourceAction::AskAgent);
        } else if !self.agent.state().is_decided() {
            // The source is done and the agent was not told: its own time is over.
            self.agent_event(AgentEvent::Failed);
        } else {
            return false;
        }
        self.check();
        true
    }

    fn run(&mut self) {
        self.source_event(SourceEvent::Freezing);
        self.at_source = AtSource::Frozen;
        self.requests.push_back(ToAgent::Restore);
        let cancels_at = self.rng.usize(0..60);
        for step in 0..STEPS_MAX {
            if step == cancels_at && self.rng.bool() {
                self.source_event(SourceEvent::Failed);
            }
            if step == STEPS_MAX / 2 {
                // In the end everybody hears everybody.
                self.trouble = 0;
            }
            if !self.step() {
                return;
            }
        }
        panic!("no rest after {STEPS_MAX} steps:\n{}", self.log.join("\n"));
    }
}

/// Runs a simulation. Returns on which side the processes live, and which failures came one in another's recovery.
fn outcome(seed: u64) -> (AtSource, BTreeSet<(Failure, Failure)>) {
    let _named = Seed(seed);
    let mut simulation = Simulation::new(seed);
    simulation.run();
    let lives = (simulation.at_source, simulation.at_destination);
    let once = matches!(
        lives,
        (AtSource::Running, AtDestination::Absent) | (AtSource::Ended, AtDestination::Running)
    );
    assert!(
        once,
        "seed {seed}: {lives:?}\n{}",
        simulation.log.join("\n")
    );
    (simulation.at_source, simulation.doubled)
}

#[test]
fn a_seed_gives_the_same_run_again() {
    let log = |seed| {
        let mut simulation = Simulation::new(seed);
        simulation.run();
        simulation.log
    };
    for seed in seeds(2_000) {
        let _named = Seed(seed);
        let first = log(seed);
        assert!(!first.is_empty(), "something happens");
        assert_eq!(first, log(seed), "seed {seed}");
    }
}

#[test]
fn exactly_one_copy_lives_whatever_crashes() {
    let (mut stayed, mut moved) = (0_u32, 0_u32);
    let mut doubled = BTreeSet::new();
    for seed in seeds(SEEDS) {
        let (at_source, failures) = outcome(seed);
        doubled.extend(failures);
        match at_source {
            AtSource::Running => stayed += 1,
            _ => moved += 1,
        }
    }
    if !are_usual(&seeds(SEEDS), SEEDS) {
        return;
    }
    // Both ends are met often enough to mean something.
    assert!(
        stayed > 1000 && moved > 1000,
        "{stayed} stayed, {moved} moved"
    );
    use Failure::{AgentCrashes, AnswerLost, RecordFails};
    let repeated = Failure::REPEATED.into_iter().flat_map(|first| {
        let second = Failure::REPEATED.into_iter().chain([RecordFails]);
        second.map(move |second| (first, second))
    });
    let at_agent = Failure::AT_AGENT
        .into_iter()
        .flat_map(|first| [AgentCrashes, AnswerLost, RecordFails].map(|second| (first, second)));
    for (first, second) in repeated.chain(at_agent) {
        assert!(
            doubled.contains(&(first, second)),
            "{second:?} never came in the recovery from {first:?}"
        );
    }
}

#[test]
fn a_migration_without_trouble_moves() {
    let mut simulation = Simulation::new(1);
    simulation.trouble = 0;
    simulation.source_event(SourceEvent::Freezing);
    simulation.at_source = AtSource::Frozen;
    simulation.requests.push_back(ToAgent::Restore);
    while simulation.step() {}
    assert_eq!(simulation.source.state(), SourceState::Complete);
    assert_eq!(simulation.agent.state(), AgentState::Complete);
    assert_eq!(simulation.at_destination, AtDestination::Running);
}
