//! The rules with their triggers, and the actions that are under way.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::events::Step;
use pageferry::sys::owned_process::ProcessName;
use pageferry::watch::{Level, Trigger};
use tokio::process::Child;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use super::log::Log;
use super::rules::{Rule, When};
use super::shutdown::Shutdown;
use super::state::{Running, State};
use super::{Event, action, look, psi};
use crate::events::{Details, Events};

/// Between two looks at a process that an earlier watcher has started.
const ORPHAN_PAUSE: Duration = Duration::from_millis(200);

/// One rule as it is now.
#[derive(Debug)]
struct Watched {
    rule: Rule,
    trigger: Trigger,
    /// The kernel told of pressure: until then it counts as given.
    pressure_until: Option<Instant>,
    /// It cannot be looked at, which has been told.
    has_failed: bool,
}

/// All rules.
#[derive(Debug)]
pub(super) struct Watcher {
    watched: Vec<Watched>,
    state: State,
    events: mpsc::Sender<Event>,
    /// The event log of all rules.
    log: Log,
    /// Those of actions under way, by their target.
    event_logs: BTreeMap<String, Events>,
    /// Ends of what waits for the kernel, which stops when they are closed.
    triggers: Vec<OwnedFd>,
    /// What tells of shutdowns, if a rule waits for one.
    shutdown: Option<Shutdown>,
    /// The number of the shutdown for which rules have yet to act.
    awaiting: Option<u64>,
    /// The host is about to go down.
    is_going_down: bool,
    /// Counts how often rules were read: events of older ones do not count.
    generation: u64,
    is_dry: bool,
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}

impl Watcher {
    pub(super) async fn new(
        rules: Vec<Rule>,
        state: State,
        (events, log): (mpsc::Sender<Event>, Log),
        is_dry: bool,
    ) -> Result<Watcher> {
        let mut watcher = Watcher {
            watched: Vec::new(),
            state,
            events,
            log,
            event_logs: BTreeMap::new(),
            triggers: Vec::new(),
            shutdown: None,
            awaiting: None,
            is_going_down: false,
            generation: 0,
            is_dry,
        };
        watcher.replace(rules).await?;
        watcher.adopt()?;
        Ok(watcher)
    }

    /// Takes other rules. Those that cannot be watched change nothing.
    pub(super) async fn replace(&mut self, rules: Vec<Rule>) -> Result<()> {
        let opened = match self.open(&rules).await {
            Ok(opened) => opened,
            Err(error) if self.generation == 0 => return Err(error),
            Err(error) => {
                tracing::error!("the rules stay as they were: {error}");
                return Ok(());
            }
        };
        self.triggers.clear();
        self.generation += 1;
        for (number, trigger) in opened {
            let place = (self.generation, number);
            let started = trigger.start(place, self.events.clone())?;
            self.triggers.push(started);
        }
        let watched = rules.into_iter().map(|rule| Watched {
            trigger: Trigger::new(rule.timing(), self.state.saved(&rule.name)),
            rule,
            pressure_until: None,
            has_failed: false,
        });
        self.watched = watched.collect();
        self.set_shutdown(self.is_going_down);
        tracing::info!("{} rules are watched", self.watched.len());
        Ok(())
    }

    /// Opens what tells of the rules' conditions: triggers of the kernel's, by the rules' numbers, and logind.
    async fn open(&mut self, rules: &[Rule]) -> Result<BTreeMap<usize, psi::Trigger>> {
        let within = |rule: &Rule, error: Error| error.within(format!("rule {:?}", rule.name));
        let mut opened = BTreeMap::new();
        for (number, rule) in rules.iter().enumerate() {
            if let When::Psi(psi) = &rule.when {
                let trigger = psi::Trigger::open(psi).map_err(|error| within(rule, error))?;
                opened.insert(number, trigger);
            }
        }
        let mut first = None;
        for rule in rules {
            let Some(asked) = rule.shutdown() else {
                continue;
            };
            if self.shutdown.is_none() && first.is_none() {
                let link = Shutdown::open(!self.is_dry, self.events.clone()).await;
                first = Some(link.map_err(|error| within(rule, error))?);
            }
            if let Some(link) = first.as_ref().or(self.shutdown.as_ref()) {
                let allowed = link.allows(asked.delay).await;
                allowed.map_err(|error| within(rule, error))?;
            }
        }
        // From here on these are the rules.
        if !rules.iter().any(|rule| rule.shutdown().is_some()) {
            self.shutdown = None;
            self.awaiting = None;
            self.is_going_down = false;
        }
        if let Some(link) = first {
            self.awaiting = link.first();
            self.is_going_down = self.awaiting.is_some();
            self.shutdown = Some(link);
        }
        Ok(opened)
    }

    /// Takes over what an earlier watcher has begun.
    fn adopt(&mut self) -> Result<()> {
        for (target, running) in self.state.running().clone() {
            match running.process.filter(ProcessName::is_alive) {
                Some(process) if !self.is_dry => {
                    tracing::info!(
                        "{target}: the action of rule {:?} is under way (pid {})",
                        running.rule,
                        process.pid
                    );
                    tokio::spawn(outlive(process, target, self.events.clone()));
                }
                Some(_) => {}
                None => {
                    tracing::warn!(
                        "{target}: the action of rule {:?} was under way when the watcher ended; how it ended is \
                         not known",
                        running.rule
                    );
                    self.state.end(&target)?;
                }
            }
        }
        Ok(())
    }

    /// Looks at all conditions that the kernel does not tell.
    pub(super) fn look(&mut self) {
        let now = now_ms();
        for watched in &mut self.watched {
            match look::look(&watched.rule.when) {
                Ok(Some(level)) => {
                    watched.has_failed = false;
                    watched.trigger.observe(now, level);
                }
                Ok(None) => {}
                Err(error) => {
                    // What cannot be looked at stays as it was.
                    if !std::mem::replace(&mut watched.has_failed, true) {
                        tracing::warn!("rule {:?}: {error}", watched.rule.name);
                    }
                }
            }
        }
    }

    /// When to come back, if nothing happens before.
    pub(super) fn next_due(&self) -> Option<Instant> {
        let now = now_ms();
        let busy = self.state.running();
        let dues = self.watched.iter().filter_map(|watched| {
            let is_free = !busy.contains_key(watched.rule.target());
            let due = watched.trigger.due_ms().filter(|_| is_free)?;
            Some(Instant::now() + Duration::from_millis(due.saturating_sub(now)))
        });
        let quiet = self.watched.iter().filter_map(|w| w.pressure_until);
        dues.chain(quiet).min()
    }

    /// Takes note of an event.
    pub(super) async fn happened(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Pressure(generation, number) if generation == self.generation => {
                self.pressure(number);
                Ok(())
            }
            Event::TriggerGone(generation, number, error) if generation == self.generation => {
                if let Some(watched) = self.watched.get(number) {
                    tracing::error!(
                        "rule {:?} is not watched any more: {error}",
                        watched.rule.name
                    );
                }
                Ok(())
            }
            Event::Pressure(..) | Event::TriggerGone(..) => Ok(()),
            Event::Word(word) => self.run_command(&word).await,
            Event::Shutdown(shutdown) => {
                self.awaiting = shutdown;
                self.set_shutdown(shutdown.is_some());
                Ok(())
            }
            Event::ActionEnded(target, result) => {
                if let Some(events) = self.event_logs.remove(&target) {
                    events.ended(Step::Rule, &result);
                }
                match result {
                    Ok(()) => tracing::info!("{target}: done"),
                    Err(error) => tracing::error!("{target}: {error}"),
                }
                self.state.end(&target)
            }
        }
    }

    fn pressure(&mut self, number: usize) {
        let Some(watched) = self.watched.get_mut(number) else {
            return;
        };
        if let When::Psi(psi) = &watched.rule.when {
            let clear = psi.clear.unwrap_or(psi.window * 2);
            watched.pressure_until = Some(Instant::now() + clear);
            watched.trigger.observe(now_ms(), Level::High);
        }
    }

    /// A word is a condition that is given for a moment.
    async fn run_command(&mut self, word: &str) -> Result<()> {
        let now = now_ms();
        let mut is_known = false;
        for watched in &mut self.watched {
            if matches!(&watched.rule.when, When::Command { word: of } if of == word) {
                watched.trigger.observe(now, Level::High);
                is_known = true;
            }
        }
        if !is_known {
            tracing::warn!("no rule has the command {word:?}");
        }
        self.act().await?;
        for watched in &mut self.watched {
            if watched.trigger.is_on() && matches!(watched.rule.when, When::Command { .. }) {
                if !watched.trigger.saved().has_fired {
                    let name = &watched.rule.name;
                    tracing::warn!(
                        "rule {name:?}: its target is busy or it cools down: nothing is done"
                    );
                }
                watched.trigger.observe(now, Level::Low);
            }
        }
        Ok(())
    }

    /// Begins what is due, on targets where nothing is under way.
    pub(super) async fn act(&mut self) -> Result<()> {
        let now = now_ms();
        for number in 0..self.watched.len() {
            let watched = &mut self.watched[number];
            if watched
                .pressure_until
                .is_some_and(|until| until <= Instant::now())
            {
                watched.pressure_until = None;
                watched.trigger.observe(now, Level::Low);
            }
            let is_free = !self.state.running().contains_key(watched.rule.target());
            if is_free && watched.trigger.is_due(now) {
                watched.trigger.fire(now);
                self.begin(number).await?;
            } else {
                let watched = &self.watched[number];
                self.state
                    .keep(&watched.rule.name, watched.trigger.saved())?;
            }
        }
        self.let_go_down();
        Ok(())
    }

    /// Sets the condition of all rules that wait for a shutdown.
    fn set_shutdown(&mut self, is_going_down: bool) {
        self.is_going_down = is_going_down;
        let level = match is_going_down {
            true => Level::High,
            false => Level::Low,
        };
        for watched in &mut self.watched {
            if watched.rule.shutdown().is_some() {
                watched.trigger.observe(now_ms(), level);
            }
        }
    }

    /// The host does not wait any longer when all rules for its shutdown have fired, and nothing is under way on their
    /// targets.
    fn let_go_down(&mut self) {
        let is_awaited = |watched: &Watched| {
            let is_busy = self.state.running().contains_key(watched.rule.target());
            watched.rule.shutdown().is_some() && (is_busy || watched.trigger.due_ms().is_some())
        };
        if self.awaiting.is_some() && !self.watched.iter().any(is_awaited) {
            let done = self.awaiting.take();
            if let Some((link, done)) = self.shutdown.as_ref().zip(done) {
                link.release(done);
            }
        }
    }

    /// Begins the action of a rule that has fired. It is written down before and after it has begun.
    async fn begin(&mut self, number: usize) -> Result<()> {
        let watched = &self.watched[number];
        let (rule, saved) = (watched.rule.clone(), watched.trigger.saved());
        let target = rule.target().to_owned();
        if self.is_dry {
            let text = action::describe(&rule.action);
            tracing::info!("rule {:?} would now: {text}", rule.name);
            return Ok(());
        }
        let (action, migration) = self.log.named(&rule.action);
        let text = action::describe(&action);
        tracing::info!("rule {:?}: {text}", rule.name);
        if let Some(events) = self.log.fired(&rule.name, &text, migration) {
            self.event_logs.insert(target.clone(), events);
        }
        let mut running = Running {
            rule: rule.name.clone(),
            process: None,
        };
        self.state.begin(&target, saved, running.clone())?;
        let events = self.events.clone();
        let started = match action::command(&action, &rule.name)? {
            Some(mut command) => Some(action::spawn(&mut command).await),
            None => None,
        };
        match started {
            Some(Ok(child)) => {
                let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
                running.process = pid.and_then(|pid| ProcessName::of(pid).ok());
                self.state.begin(&target, saved, running)?;
                tokio::spawn(wait(child, text, target, events));
            }
            Some(Err(error)) => {
                tracing::error!("rule {:?}: {text} cannot be started: {error}", rule.name);
                if let Some(events) = self.event_logs.remove(&target) {
                    events.failed(Step::Rule, Details::text(error.to_string()));
                }
                self.state.end(&target)?;
            }
            None => {
                tokio::spawn(async move {
                    let result = action::carry_out(&action).await;
                    // Without a receiver the watcher has ended.
                    let _ = events.send(Event::ActionEnded(target, result)).await;
                });
            }
        }
        Ok(())
    }

    /// Says what goes on without this program.
    pub(super) fn log_what_runs(&self) {
        for (target, running) in self.state.running() {
            tracing::info!("{target}: the action of rule {:?} continues", running.rule);
        }
    }
}

async fn wait(mut child: Child, text: String, target: String, events: mpsc::Sender<Event>) {
    let result = match child.wait().await {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Error::new(Kind::Io, format!("{text}: {status}"))),
        Err(error) => Err(Error::wrap(Kind::Io, text, error)),
    };
    // Without a receiver the watcher has ended.
    let _ = events.send(Event::ActionEnded(target, result)).await;
}

/// Waits for a process that is nobody's child here.
async fn outlive(process: ProcessName, target: String, events: mpsc::Sender<Event>) {
    while process.is_alive() {
        sleep(ORPHAN_PAUSE).await;
    }
    let _ = events.send(Event::ActionEnded(target, Ok(()))).await;
}
