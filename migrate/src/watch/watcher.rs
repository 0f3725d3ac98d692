//! The rules with their triggers, and the actions that are under way.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pageferry::error::{Error, Kind, Result};
use pageferry::sys::owned_process::ProcessName;
use pageferry::watch::{Level, Trigger};
use tokio::process::Child;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use super::rules::{Rule, When};
use super::state::{Running, State};
use super::{Event, action, look, psi};

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
    /// Ends of what waits for the kernel, which stops when they are closed.
    triggers: Vec<OwnedFd>,
    /// Counts how often rules were read: events of older ones do not count.
    generation: u64,
    is_dry: bool,
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}

impl Watcher {
    pub(super) fn new(
        rules: Vec<Rule>,
        state: State,
        events: mpsc::Sender<Event>,
        is_dry: bool,
    ) -> Result<Watcher> {
        let mut watcher = Watcher {
            watched: Vec::new(),
            state,
            events,
            triggers: Vec::new(),
            generation: 0,
            is_dry,
        };
        watcher.replace(rules)?;
        watcher.adopt()?;
        Ok(watcher)
    }

    /// Takes other rules. Those that cannot be watched change nothing.
    pub(super) fn replace(&mut self, rules: Vec<Rule>) -> Result<()> {
        let mut opened = BTreeMap::new();
        for (number, rule) in rules.iter().enumerate() {
            if let When::Psi(psi) = &rule.when {
                let trigger = psi::Trigger::open(psi);
                let within = |error: Error| error.within(format!("rule {:?}", rule.name));
                match trigger.map_err(within) {
                    Ok(trigger) => drop(opened.insert(number, trigger)),
                    Err(error) if self.generation == 0 => return Err(error),
                    Err(error) => {
                        tracing::error!("the rules stay as they were: {error}");
                        return Ok(());
                    }
                }
            }
        }
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
        tracing::info!("{} rules are watched", self.watched.len());
        Ok(())
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
    pub(super) fn happened(&mut self, event: Event) -> Result<()> {
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
            Event::Word(word) => self.word(&word),
            Event::ActionEnded(target, result) => {
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
    fn word(&mut self, word: &str) -> Result<()> {
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
        self.act()?;
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
    pub(super) fn act(&mut self) -> Result<()> {
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
                self.begin(number)?;
            } else {
                let watched = &self.watched[number];
                self.state
                    .keep(&watched.rule.name, watched.trigger.saved())?;
            }
        }
        Ok(())
    }

    /// Begins the action of a rule that has fired. It is written down before and after it has begun.
    fn begin(&mut self, number: usize) -> Result<()> {
        let watched = &self.watched[number];
        let (rule, saved) = (watched.rule.clone(), watched.trigger.saved());
        let (target, text) = (rule.target().to_owned(), action::told(&rule.action));
        if self.is_dry {
            tracing::info!("rule {:?} would now: {text}", rule.name);
            return Ok(());
        }
        tracing::info!("rule {:?}: {text}", rule.name);
        let mut running = Running {
            rule: rule.name.clone(),
            process: None,
        };
        self.state.begin(&target, saved, running.clone())?;
        let events = self.events.clone();
        match action::command(&rule.action, &rule.name)?.map(|mut command| command.spawn()) {
            Some(Ok(child)) => {
                let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
                running.process = pid.and_then(|pid| ProcessName::of(pid).ok());
                self.state.begin(&target, saved, running)?;
                tokio::spawn(wait(child, text, target, events));
            }
            Some(Err(error)) => {
                tracing::error!("rule {:?}: {text} cannot be started: {error}", rule.name);
                self.state.end(&target)?;
            }
            None => {
                tokio::spawn(async move {
                    let result = action::carry_out(&rule.action).await;
                    // Without a receiver the watcher has ended.
                    let _ = events.send(Event::ActionEnded(target, result)).await;
                });
            }
        }
        Ok(())
    }

    /// Says what goes on without this program.
    pub(super) fn tell_what_runs(&self) {
        for (target, running) in self.state.running() {
            tracing::info!("{target}: the action of rule {:?} goes on", running.rule);
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
