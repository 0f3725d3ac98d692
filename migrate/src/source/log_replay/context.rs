//! The source's directory of one move, and what anybody can do who finishes it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::{MigrationId, ReplayAddresses, ReplayStatus, ServiceAddress};
use pageferry::migration::{LogReplayAction, LogReplayRecord};
use pageferry::sys::owned_process::ProcessName;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use crate::client::AgentClient;
use crate::events::Events;
use crate::route::{Facts as RouteFacts, Routes};
use crate::runtime::lifecycle;
use crate::service_log::{Hold, unseal};
use crate::source::container::ContainerRecord;
use crate::source::hooks::{Hooks, Point};
use crate::source::moved_addresses::MovedAddresses;
use crate::source::state_dir;
use crate::source::warnings::Warnings;
use crate::{records, shell};

/// What is needed to finish it, in its directory.
pub(super) const FACTS: &str = "log-replay.json";

/// The last record.
pub(super) const RECORD: &str = "record.json";

/// Is there while clients may be held.
const HELD: &str = "hold.begun";

/// How long an agent that does not answer is told the same again.
const SAY_LIMIT: Duration = Duration::from_secs(10);

/// Between two of these requests.
const SAY_AGAIN: Duration = Duration::from_millis(100);

/// How clients are held.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Holder {
    /// By the recorder whose log is in this directory.
    Recorder(PathBuf),
    /// By a command of the user's.
    Command(String),
}

/// What others need to know to finish a move.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Facts {
    pub(super) id: MigrationId,
    pub(super) holder: Holder,
    /// The service's first process here.
    pub(super) root: ProcessName,
    /// The container that it is.
    #[serde(rename = "held")]
    pub(super) container: Option<ContainerRecord>,
    pub(super) addresses: MovedAddresses,
    /// The same at the destination.
    pub(super) there: Vec<ServiceAddress>,
    pub(super) routes: Routes,
    pub(super) hooks: Hooks,
    /// Where the user wants events too.
    #[serde(default)]
    pub(super) events: Option<PathBuf>,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct SourceContext {
    dir: PathBuf,
    pub(super) facts: Facts,
    pub(super) client: AgentClient,
    /// What happens is told there.
    pub(super) events: Events,
    /// Held by this process.
    hold: Option<Hold>,
    /// What commands are told besides, by name.
    notes: Vec<(&'static str, String)>,
    warnings: Warnings,
}

impl SourceContext {
    /// Makes the directory of a move that begins.
    pub(super) fn make(
        state_dir: &Path,
        facts: Facts,
        client: AgentClient,
        events: Events,
    ) -> Result<SourceContext> {
        let dir = state_dir::make(state_dir, &facts.id)?;
        events.in_dir(&dir);
        let context = SourceContext::new(dir, facts, client, events);
        context.keep_facts()?;
        Ok(context)
    }

    /// Finds the directory of a move that was begun.
    pub(super) fn find(dir: &Path, client: AgentClient) -> Result<SourceContext> {
        let facts: Facts = state_dir::facts(dir, FACTS)?;
        let events = Events::of_guard(&facts.id, dir, facts.events.as_deref());
        Ok(SourceContext::new(dir.to_owned(), facts, client, events))
    }

    fn new(dir: PathBuf, facts: Facts, client: AgentClient, events: Events) -> SourceContext {
        SourceContext {
            dir,
            facts,
            client,
            events,
            hold: None,
            notes: Vec::new(),
            warnings: Warnings::default(),
        }
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// A path of the agent's interface.
    pub(super) fn path(&self, rest: &str) -> String {
        format!("/v1/replays/{}{rest}", self.facts.id)
    }

    fn keep_facts(&self) -> Result<()> {
        records::write(&self.dir.join(FACTS), &self.facts)
    }

    /// Tells commands that come later something more.
    pub(super) fn note(&mut self, name: &'static str, value: String) {
        self.notes.push((name, value));
    }

    pub(super) fn warn(&self, text: String) {
        self.events.warn(&text);
        self.warnings.add(text);
    }

    pub(super) fn take_warnings(&self) -> Vec<String> {
        self.warnings.take()
    }

    /// What the user's commands are told, by name.
    fn variables(&self) -> Vec<(&'static str, String)> {
        let container = self
            .facts
            .container
            .as_ref()
            .map(|container| container.id.to_string());
        let mut variables = vec![
            ("ID", self.facts.id.to_string()),
            ("MODE", "log-replay".to_owned()),
            ("PID", self.facts.root.pid.to_string()),
            ("CONTAINER", container.unwrap_or_default()),
            ("DESTINATION", self.client.peer().to_string()),
        ];
        variables.extend(self.notes.iter().cloned());
        variables
    }

    /// Runs the user's command for a point of the move.
    pub(super) async fn run_hook(&self, point: Point) -> Result<()> {
        let variables = self.variables();
        self.facts.hooks.run(point, &self.dir, &variables).await
    }

    /// The same where its failure changes nothing any more.
    async fn run_late_hook(&self, point: Point) {
        if let Err(error) = self.run_hook(point).await {
            self.warn(error.to_string());
        }
    }

    /// Carries an action out that needs nothing but what is written down.
    pub(super) async fn carry_out(&mut self, action: LogReplayAction) -> Result<()> {
        match action {
            LogReplayAction::Record(record) => {
                records::write(&self.dir.join(RECORD), &record)?;
                match record {
                    LogReplayRecord::Complete => self.run_late_hook(Point::PostResume).await,
                    LogReplayRecord::RolledBack => self.run_late_hook(Point::OnFailure).await,
                    _ => {}
                }
                Ok(())
            }
            LogReplayAction::Seal => match &mut self.hold {
                Some(hold) => hold.seal().await,
                // What a command does lasts.
                None => Ok(()),
            },
            LogReplayAction::Keep => self.post("/keep").await,
            LogReplayAction::Resume => self.post_until_answered("/resume").await,
            LogReplayAction::End => self.end().await,
            LogReplayAction::Stop => self.stop().await,
            LogReplayAction::Release => self.release().await,
            LogReplayAction::GiveBack => {
                self.give_back().await;
                Ok(())
            }
            LogReplayAction::Discard => self.discard().await,
            LogReplayAction::Prepare
            | LogReplayAction::Follow
            | LogReplayAction::Hold
            | LogReplayAction::Finish
            | LogReplayAction::Switch => {
                let text = format!("{action:?} is for the command that began the migration");
                Err(Error::new(Kind::Usage, text))
            }
        }
    }

    async fn post(&self, what: &str) -> Result<()> {
        let path = self.path(what);
        let answer = self.client.post::<ReplayStatus>(&path, &());
        answer.await.map(drop)
    }

    /// The same, repeated until the agent receives it.
    async fn post_until_answered(&self, what: &str) -> Result<()> {
        let start = Instant::now();
        loop {
            match self.post(what).await {
                Err(error) if error.kind() == Kind::PeerLost && start.elapsed() < SAY_LIMIT => {
                    sleep(SAY_AGAIN).await;
                }
                answered => return answered,
            }
        }
    }

    /// Holds clients. Returns how many entries a recorder's log has for what the service was told.
    pub(super) async fn hold(&mut self) -> Result<Option<u64>> {
        let mark = self.dir.join(HELD);
        let made = File::create(&mark).and_then(|mark| mark.sync_all());
        made.map_err(|error| Error::file("create", &mark, error))?;
        match &self.facts.holder {
            Holder::Recorder(log) => {
                let hold = Hold::take(log).await?;
                let entries = hold.entries();
                self.hold = Some(hold);
                Ok(Some(entries))
            }
            Holder::Command(command) => {
                self.run_hold(command, "hold").await?;
                Ok(None)
            }
        }
    }

    async fn run_hold(&self, command: &str, what: &str) -> Result<()> {
        let mut variables = self.variables();
        variables.push(("HOLD", what.to_owned()));
        let log = self.dir.join("hold.log");
        let limit = self.facts.hooks.limit();
        shell::run("--hold", command, &variables, &log, limit).await
    }

    /// Lets clients go on here, if they may be held.
    async fn release(&mut self) -> Result<()> {
        let mark = self.dir.join(HELD);
        if !mark.exists() {
            return Ok(());
        }
        // This one's own hold must not outlive it.
        let held = self.hold.take();
        let released = match &self.facts.holder {
            Holder::Recorder(log) => release_recorder(held, log).await,
            Holder::Command(command) => self.run_hold(command, "release").await,
        };
        released.map_err(|error| Error::wrap(Kind::Io, "clients may still be held here", error))?;
        fs::remove_file(&mark).map_err(|error| Error::file("remove", &mark, error))
    }

    /// Ends the recording.
    async fn end(&mut self) -> Result<()> {
        let Holder::Recorder(log) = &self.facts.holder else {
            return Ok(());
        };
        let hold = match self.hold.take() {
            Some(hold) => hold,
            None => Hold::take(log).await?,
        };
        hold.end().await
    }

    /// Ends the service here.
    async fn stop(&self) -> Result<()> {
        lifecycle::stop(self.facts.root).await?;
        match &self.facts.container {
            Some(container) => container.runtime.delete(&container.id).await,
            None => Ok(()),
        }
    }

    /// Leads clients to the destination. That it begins is on disk first.
    pub(super) async fn switch(&mut self) -> Result<()> {
        let addresses = &mut self.facts.addresses;
        addresses.taken = !addresses.is_empty();
        self.facts.routes.begun = true;
        self.keep_facts()?;
        if self.facts.addresses.taken {
            self.facts.addresses.take().await?;
            let up = self.facts.there.clone();
            self.move_addresses(up).await?;
        }
        let variables = self.variables();
        self.facts.routes.switch(self.route_facts(&variables)).await
    }

    async fn move_addresses(&self, up: Vec<ServiceAddress>) -> Result<()> {
        let path = self.path("/addresses");
        let request = ReplayAddresses { up };
        let answer = self.client.post::<ReplayStatus>(&path, &request).await;
        answer.map(drop)
    }

    async fn give_back(&self) {
        let variables = self.variables();
        let facts = self.route_facts(&variables);
        for problem in self.facts.routes.give_back(facts).await {
            self.warn(problem);
        }
        if self.facts.addresses.taken {
            if let Err(error) = self.move_addresses(Vec::new()).await {
                self.warn(format!("the destination may keep the addresses: {error}"));
            }
            self.facts.addresses.give_back().await;
        }
    }

    fn route_facts<'a>(&'a self, variables: &'a [(&'static str, String)]) -> RouteFacts<'a> {
        RouteFacts {
            dir: &self.dir,
            variables,
            limit: self.facts.hooks.limit(),
        }
    }

    /// Lets the agent end what it has.
    async fn discard(&self) -> Result<()> {
        match self.post_until_answered("/cancel").await {
            Ok(()) => Ok(()),
            // An agent that does not know it has nothing of it.
            Err(error) if error.kind() == Kind::Protocol => {
                tracing::debug!("{error}");
                Ok(())
            }
            Err(error) => {
                let text = format!(
                    "the destination may still have what came as {}: its agent ends it after --timeout, or when it is \
                     started again",
                    self.facts.id
                );
                Err(Error::wrap(Kind::PeerLost, text, error))
            }
        }
    }
}

async fn release_recorder(held: Option<Hold>, log: &Path) -> Result<()> {
    let hold = match held {
        Some(hold) => Ok(hold),
        None => Hold::take(log).await,
    };
    let released = match hold {
        Ok(hold) => hold.release().await,
        Err(error) => Err(error),
    };
    if released.is_err() {
        // A recorder that is gone holds nobody; the next one may take clients.
        unseal(log)?;
    }
    released
}
