//! The source's directory of one move, and what anybody can do who finishes it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::{ContainerAddresses, ContainerStatus, MigrationId};
use pageferry::migration::{StatelessAction, StatelessMode, StatelessRecord};
use pageferry::sys::owned_process::ProcessName;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::client::AgentClient;
use crate::drain;
use crate::events::Events;
use crate::records;
use crate::route::{Facts as RouteFacts, Routes};
use crate::runtime::lifecycle;
use crate::source::container::ContainerRecord;
use crate::source::hooks::{Hooks, Point};
use crate::source::moved_addresses::MovedAddresses;
use crate::source::state_dir;
use crate::source::warnings::Warnings;

/// What is needed to finish it, in its directory.
pub(super) const FACTS: &str = "stateless.json";

/// The last record.
pub(super) const RECORD: &str = "record.json";

/// Is there once the container may have been told to end.
const STOPPED: &str = "stop.begun";

/// How long an agent that does not answer is told to end its container.
const DISCARD_LIMIT: Duration = Duration::from_secs(10);

/// Between two of these requests.
const SAY_AGAIN: Duration = Duration::from_millis(500);

/// What others need to know to finish a move.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Facts {
    pub(super) id: MigrationId,
    pub(super) mode: StatelessMode,
    #[serde(rename = "held")]
    pub(super) container: ContainerRecord,
    /// Its bundle here.
    pub(super) bundle: PathBuf,
    /// Its first process here.
    pub(super) root: ProcessName,
    /// Limits of its control groups.
    pub(super) resources: Option<Value>,
    pub(super) addresses: MovedAddresses,
    pub(super) routes: Routes,
    pub(super) hooks: Hooks,
    /// How long connections may go on here.
    pub(super) drain_ms: u64,
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
            notes: Vec::new(),
            warnings: Warnings::default(),
        }
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// A path of the agent's interface.
    pub(super) fn path(&self, rest: &str) -> String {
        format!("/v1/containers/{}{rest}", self.facts.id)
    }

    pub(super) fn keep_facts(&self) -> Result<()> {
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
        let mode = match self.facts.mode {
            StatelessMode::Cold => "cold",
            StatelessMode::Live => "live",
        };
        let mut variables = vec![
            ("ID", self.facts.id.to_string()),
            ("MODE", mode.to_owned()),
            ("PID", self.facts.root.pid.to_string()),
            ("CONTAINER", self.facts.container.id.to_string()),
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
    pub(super) async fn carry_out(&mut self, action: StatelessAction) -> Result<()> {
        match action {
            StatelessAction::Record(record) => {
                records::write(&self.dir.join(RECORD), &record)?;
                match record {
                    StatelessRecord::Switched => self.run_late_hook(Point::PostResume).await,
                    StatelessRecord::RolledBack => self.run_late_hook(Point::OnFailure).await,
                    _ => {}
                }
                Ok(())
            }
            StatelessAction::Stop => self.stop().await,
            StatelessAction::Drain => self.drain().await,
            StatelessAction::Forget => {
                self.facts
                    .container
                    .runtime
                    .delete(&self.facts.container.id)
                    .await
            }
            StatelessAction::RunHere => self.run_here().await,
            StatelessAction::GiveBack => {
                self.give_back().await;
                Ok(())
            }
            StatelessAction::Discard => self.discard().await,
            StatelessAction::Prepare
            | StatelessAction::Renew
            | StatelessAction::Start
            | StatelessAction::Keep
            | StatelessAction::Switch => {
                let text = format!("{action:?} is for the command that began the migration");
                Err(Error::new(Kind::Usage, text))
            }
        }
    }

    async fn stop(&self) -> Result<()> {
        let mark = self.dir.join(STOPPED);
        File::create(&mark).map_err(|error| Error::file("create", &mark, error))?;
        lifecycle::stop(self.facts.root).await
    }

    async fn drain(&self) -> Result<()> {
        let limit = Duration::from_millis(self.facts.drain_ms);
        let open = drain::wait(self.facts.root, limit).await?;
        if open > 0 {
            self.warn(format!(
                "{open} connections to the container here were still open after {} ms (--drain), and end with it",
                limit.as_millis()
            ));
        }
        Ok(())
    }

    /// Starts the container here again, if it may have been told to end.
    async fn run_here(&self) -> Result<()> {
        if !self.dir.join(STOPPED).exists() {
            return Ok(());
        }
        let container = &self.facts.container;
        let run = async {
            // It may still be about to end.
            lifecycle::stop(self.facts.root).await?;
            container.runtime.delete(&container.id).await?;
            let log = self.dir.join("runtime.log");
            container
                .runtime
                .run(&container.id, &self.facts.bundle, &log)
                .await
        };
        run.await.map_err(|error| {
            let text = format!(
                "container {} does not run here again; `pageferry migrate --resume {} --to {}` tries it once more",
                container.id,
                self.facts.id,
                self.client.peer()
            );
            Error::wrap(Kind::Io, text, error)
        })?;
        // Once: from now on it may be somebody else who ends it.
        let mark = self.dir.join(STOPPED);
        fs::remove_file(&mark).map_err(|error| Error::file("remove", &mark, error))?;
        if let Some(resources) = &self.facts.resources {
            let path = self.dir.join("resources.json");
            let set = async {
                records::write(&path, resources)?;
                container.runtime.update(&container.id, &path).await
            };
            if let Err(error) = set.await {
                self.warn(format!("its limits are not what they were: {error}"));
            }
        }
        Ok(())
    }

    /// Leads clients to the destination. That it begins is on disk first.
    pub(super) async fn switch(&mut self) -> Result<()> {
        let addresses = &mut self.facts.addresses;
        addresses.taken = !addresses.is_empty();
        self.facts.routes.begun = true;
        self.keep_facts()?;
        if self.facts.addresses.taken {
            self.facts.addresses.take().await?;
            let up = ContainerAddresses { up: true };
            let path = self.path("/addresses");
            self.client.post::<ContainerStatus>(&path, &up).await?;
        }
        let variables = self.variables();
        self.facts.routes.switch(self.route_facts(&variables)).await
    }

    async fn give_back(&self) {
        let variables = self.variables();
        let facts = self.route_facts(&variables);
        for problem in self.facts.routes.give_back(facts).await {
            self.warn(problem);
        }
        if self.facts.addresses.taken {
            let down = ContainerAddresses { up: false };
            let path = self.path("/addresses");
            if let Err(error) = self.client.post::<ContainerStatus>(&path, &down).await {
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

    /// Lets the agent end what it has, however often it must be said.
    async fn discard(&self) -> Result<()> {
        let start = Instant::now();
        loop {
            let path = self.path("/cancel");
            let answer = self.client.post::<ContainerStatus>(&path, &()).await;
            match answer {
                Ok(_) => return Ok(()),
                // An agent that does not know it has nothing of it.
                Err(error) if error.kind() == Kind::Protocol => {
                    tracing::debug!("{error}");
                    return Ok(());
                }
                Err(error) if start.elapsed() > DISCARD_LIMIT => {
                    let text = format!(
                        "the destination may still run container {}: delete it there",
                        self.facts.container.id
                    );
                    return Err(Error::wrap(Kind::PeerLost, text, error));
                }
                Err(_) => sleep(SAY_AGAIN).await,
            }
        }
    }
}
