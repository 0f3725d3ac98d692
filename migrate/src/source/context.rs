//! The source's directory of one migration: what is needed to finish it, whoever does.
//!
//! ```text
//! STATE_DIR/ID/facts.json    processes of the tree, of the dump and of the forwarder
//!              record.json   the last of migration::SourceRecord
//!              images/       what criu dump wrote
//!              *.log
//! ```

mod release;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use pageferry::error::{Error, Result};
use pageferry::migration::events::Step;
use pageferry::migration::messages::{MigrationId, Status, TcpConnections};
use pageferry::migration::{Mode, SourceAction, SourceEvent, SourceRecord};
use pageferry::sys::owned_process::{ProcessName, ProcessStat};
use serde::{Deserialize, Serialize};
use tokio::time::sleep;

use super::container::ContainerRecord;
use super::hooks::{Hooks, Point};
use super::moved_addresses::MovedAddresses;
use super::network::{self, Connection};
use super::outputs::Outputs;
use super::state_dir;
use super::warnings::Warnings;
use crate::client::AgentClient;
use crate::events::{Details, Events};
use crate::records;
use crate::rounds::Tree;
use crate::route::{Facts as RouteFacts, Routes};

/// How long to wait before an agent that did not answer is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// Is there once the routes have been given back.
const GIVEN_BACK: &str = "routes.back";

/// What others need to know to finish a migration.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Facts {
    pub(super) id: MigrationId,
    pub(super) mode: Mode,
    /// The root first.
    pub(super) tree: Vec<ProcessName>,
    /// Of those, the ones that a user had stopped before.
    pub(super) stopped: Vec<ProcessName>,
    /// `criu dump`.
    pub(super) dump: Option<ProcessName>,
    /// Where a lazy dump serves memory, on loopback.
    pub(super) dump_port: Option<u16>,
    /// The page-server that the dump's memory goes through: `--forward`, or `--forward-lazy`.
    pub(super) forwarder: Option<ProcessName>,
    /// The page-server that rounds went through, if the dump's memory takes another way.
    pub(super) round_forwarder: Option<ProcessName>,
    /// The container that the tree is, if it is one.
    #[serde(default)]
    pub(super) container: Option<ContainerRecord>,
    /// What becomes of established connections.
    #[serde(default)]
    pub(super) tcp: TcpConnections,
    /// Established connections, as they were when the tree was frozen; looked for if they are to move.
    #[serde(default)]
    pub(super) connections: Vec<Connection>,
    /// Addresses that move along.
    #[serde(default)]
    pub(super) addresses: MovedAddresses,
    /// What else leads clients here, or there.
    #[serde(default)]
    pub(super) routes: Routes,
    /// The user's commands.
    #[serde(default)]
    pub(super) hooks: Hooks,
    /// Directories that move along.
    #[serde(default)]
    pub(super) files: Vec<PathBuf>,
    /// Where the container writes what it prints.
    #[serde(default)]
    pub(super) outputs: Outputs,
    /// Where the user wants events too.
    #[serde(default)]
    pub(super) events: Option<PathBuf>,
}

impl Facts {
    /// What is known of the processes of `tree` before they are touched.
    pub(super) fn of_tree(id: MigrationId, mode: Mode, tree: &Tree) -> Facts {
        let members = tree.members().iter();
        let stopped = |pid| ProcessStat::of(pid).is_ok_and(|stat| stat.state == 'T');
        Facts {
            id,
            mode,
            tree: members.clone().map(|member| member.name).collect(),
            stopped: members
                .filter(|member| stopped(member.pid))
                .map(|member| member.name)
                .collect(),
            dump: None,
            dump_port: None,
            forwarder: None,
            round_forwarder: None,
            container: None,
            tcp: TcpConnections::default(),
            connections: Vec::new(),
            addresses: MovedAddresses::default(),
            routes: Routes::default(),
            hooks: Hooks::default(),
            files: Vec::new(),
            outputs: Outputs::default(),
            events: None,
        }
    }
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct SourceContext {
    dir: PathBuf,
    pub(super) facts: Facts,
    client: AgentClient,
    /// What happens is told there.
    pub(super) events: Events,
    /// What hooks are told besides, by name.
    notes: Vec<(&'static str, String)>,
    /// What went wrong beside the migration.
    warnings: Warnings,
}

impl SourceContext {
    /// Makes the directory of a migration that begins.
    pub(super) fn make(
        state_dir: &Path,
        facts: Facts,
        client: AgentClient,
        events: Events,
    ) -> Result<SourceContext> {
        let dir = state_dir::make(state_dir, &facts.id)?;
        events.in_dir(&dir);
        let context = SourceContext {
            dir,
            facts,
            client,
            events,
            notes: Vec::new(),
            warnings: Warnings::default(),
        };
        let images = context.images();
        fs::create_dir(&images)
            .map_err(|error| Error::file("make the directory", &images, error))?;
        context.keep_facts()?;
        Ok(context)
    }

    /// Finds the directory of a migration that was begun.
    pub(super) fn find(dir: &Path, client: AgentClient) -> Result<SourceContext> {
        let facts: Facts = state_dir::facts(dir, "facts.json")?;
        let events = Events::of_guard(&facts.id, dir, facts.events.as_deref());
        Ok(SourceContext {
            dir: dir.to_owned(),
            facts,
            client,
            events,
            notes: Vec::new(),
            warnings: Warnings::default(),
        })
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn images(&self) -> PathBuf {
        self.dir.join("images")
    }

    /// A path of the agent's interface.
    pub(super) fn path(&self, rest: &str) -> String {
        format!("/v1/migrations/{}{rest}", self.facts.id)
    }

    /// Writes down what has been started.
    pub(super) fn keep_facts(&self) -> Result<()> {
        records::write(&self.dir.join("facts.json"), &self.facts)
    }

    /// The last record.
    pub(super) fn record(&self) -> Result<Option<SourceRecord>> {
        records::read(&self.dir.join("record.json"))
    }

    /// Tells hooks that come later something more.
    pub(super) fn note(&mut self, name: &'static str, value: String) {
        self.notes.push((name, value));
    }

    /// What went wrong beside the migration, so far.
    pub(super) fn take_warnings(&self) -> Vec<String> {
        self.warnings.take()
    }

    /// Runs the user's command for a point of the migration.
    pub(super) async fn run_hook(&self, point: Point) -> Result<()> {
        let facts = self.variables();
        self.facts.hooks.run(point, &self.dir, &facts).await
    }

    /// What the user's commands are told, by name.
    fn variables(&self) -> Vec<(&'static str, String)> {
        let root = self.facts.tree.first().map_or(0, |root| root.pid);
        let container = self.facts.container.as_ref();
        let mut facts = vec![
            ("ID", self.facts.id.to_string()),
            ("MODE", self.facts.mode.name().to_owned()),
            ("PID", root.to_string()),
            (
                "CONTAINER",
                container.map_or(String::new(), |container| container.id.to_string()),
            ),
            ("DESTINATION", self.client.peer().to_string()),
        ];
        facts.extend(self.notes.iter().cloned());
        facts
    }

    /// Leads clients to the destination. That it begins is on disk first.
    pub(super) async fn switch_routes(&mut self) -> Result<()> {
        self.facts.routes.begun = true;
        self.keep_facts()?;
        let variables = self.variables();
        self.facts.routes.switch(self.route_facts(&variables)).await
    }

    /// Leads clients here again, once: whoever finishes the migration comes here as well.
    async fn give_routes_back(&self) {
        let mark = self.dir.join(GIVEN_BACK);
        if !self.facts.routes.begun || mark.exists() {
            return;
        }
        let variables = self.variables();
        let facts = self.route_facts(&variables);
        let problems = self.facts.routes.give_back(facts).await;
        if problems.is_empty()
            && let Err(error) = fs::write(&mark, "")
        {
            tracing::debug!("cannot write {}: {error}", mark.display());
        }
        for problem in problems {
            self.warn(problem);
        }
    }

    fn route_facts<'a>(&'a self, variables: &'a [(&'static str, String)]) -> RouteFacts<'a> {
        RouteFacts {
            dir: &self.dir,
            variables,
            limit: self.facts.hooks.limit(),
        }
    }

    /// The same where its failure changes nothing any more.
    async fn run_late_hook(&self, point: Point) {
        if let Err(error) = self.run_hook(point).await {
            self.warn(error.to_string());
        }
    }

    /// Carries out one action and tells what came of it.
    pub(super) async fn carry_out(&self, action: SourceAction) -> Result<Option<SourceEvent>> {
        let step = match action {
            SourceAction::SendCommit => Some(Step::Commit),
            SourceAction::Release => Some(Step::Release),
            SourceAction::EndProcesses => Some(Step::Stop),
            SourceAction::SendAbort => Some(Step::Discard),
            SourceAction::Record(_) | SourceAction::Fence | SourceAction::AskAgent => None,
        };
        if let Some(step) = step {
            self.events.begin(step);
        }
        let done = self.do_now(action).await;
        if let Some(step) = step {
            let details = match &done {
                Ok(Some(SourceEvent::AgentSays(state))) => {
                    Details::text(format!("the agent says {state}"))
                }
                Ok(Some(SourceEvent::AgentSilent)) => Details::text("the agent does not answer"),
                Ok(_) => Details::default(),
                Err(error) => Details::error(&error.to_string()),
            };
            match done {
                Ok(_) => self.events.done(step, details),
                Err(_) => self.events.failed(step, details),
            }
        }
        done
    }

    async fn do_now(&self, action: SourceAction) -> Result<Option<SourceEvent>> {
        match action {
            SourceAction::Record(record) => {
                records::write(&self.dir.join("record.json"), &record)?;
                Ok(Some(SourceEvent::Recorded(record)))
            }
            SourceAction::Fence => {
                self.fence();
                Ok(None)
            }
            SourceAction::SendCommit => Ok(Some(self.post("/commit").await)),
            SourceAction::SendAbort => {
                // An agent that does not receive it aborts by itself when its time is over.
                Ok(Some(self.post("/cancel").await))
            }
            SourceAction::AskAgent => {
                sleep(ASK_AGAIN).await;
                let asked = self.client.get::<Status>(&self.path("")).await;
                Ok(Some(event_of(asked)))
            }
            SourceAction::Release => {
                // First: what comes to the destination is refused there by now, and waits here.
                self.give_routes_back().await;
                self.release().await?;
                if self.facts.addresses.taken {
                    self.facts.addresses.give_back().await;
                }
                self.run_late_hook(Point::OnFailure).await;
                Ok(None)
            }
            SourceAction::EndProcesses => {
                self.run_late_hook(Point::PostResume).await;
                self.end_processes().await;
                Ok(None)
            }
        }
    }

    async fn post(&self, what: &str) -> SourceEvent {
        event_of(self.client.post::<Status>(&self.path(what), &()).await)
    }

    /// Gives each frozen thread a SIGSTOP that it takes before its next instruction here, if a dump that
    /// fails should let it go. A SIGCONT takes it away again.
    fn fence(&self) {
        if self.facts.tcp == TcpConnections::Established {
            network::enter_repair_mode(&self.facts.tree);
        }
        for process in &self.facts.tree {
            if let Err(error) = process.signal_threads(Signal::SIGSTOP as i32) {
                tracing::debug!("pid {} is not held: {error}", process.pid);
            }
        }
    }

    fn warn(&self, text: String) {
        self.events.warn(&text);
        self.warnings.add(text);
    }
}

/// What an agent's answer means.
fn event_of(answer: Result<Status>) -> SourceEvent {
    match answer {
        Ok(status) => SourceEvent::AgentSays(status.state),
        Err(error) => {
            tracing::warn!("{error}");
            SourceEvent::AgentSilent
        }
    }
}

/// Reads the first line of a small file as a number.
pub(super) fn read_number<T: std::str::FromStr>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).map_err(|error| Error::file("read", path, error))?;
    text.trim().parse().map_err(|_| {
        let error = io::Error::from(io::ErrorKind::InvalidData);
        Error::file("find a number in", path, error)
    })
}
