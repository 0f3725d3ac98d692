//! The source's directory of one migration: what is needed to finish it, whoever does. All flows have one.
//!
//! ```text
//! STATE_DIR/ID/FACTS.json    what the flow found and started
//!              record.json   the last record
//!              *.log
//! ```

use std::fmt::Debug;
use std::fs;
use std::path::{Path, PathBuf};

use pageferry::error::{Error, Result};
use pageferry::migration::messages::{ContainerId, MigrationId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::args::Args;
use super::hooks::{Hooks, Point};
use super::moved_addresses::MovedAddresses;
use super::state_dir;
use super::warnings::Warnings;
use crate::client::AgentClient;
use crate::events::Events;
use crate::records;
use crate::route::{Facts as RouteFacts, Routes};

/// The last record.
const RECORD: &str = "record.json";

/// What every flow needs to know to finish a migration.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct CommonFacts {
    pub(super) id: MigrationId,
    /// Addresses that move along.
    #[serde(default)]
    pub(super) addresses: MovedAddresses,
    /// What else leads clients here, or there.
    #[serde(default)]
    pub(super) routes: Routes,
    /// The user's commands.
    #[serde(default)]
    pub(super) hooks: Hooks,
    /// Where the user wants events too.
    #[serde(default)]
    pub(super) events: Option<PathBuf>,
}

impl CommonFacts {
    /// Looks for what `args` name, before anything is touched.
    pub(super) async fn find(args: &Args, id: MigrationId) -> Result<CommonFacts> {
        Ok(CommonFacts {
            id,
            addresses: MovedAddresses::find(&args.addresses()).await?,
            routes: Routes::look(args.routes()).await?,
            hooks: args.hooks(),
            events: args.events(),
        })
    }
}

/// What one flow needs to know besides.
pub(super) trait FlowFacts: Serialize + DeserializeOwned {
    /// The file of all facts, in the migration's directory.
    const FILE: &'static str;

    /// Directories that a migration begins with, in its own.
    const SUBDIRS: &'static [&'static str] = &[];

    /// Where the agent has migrations of this flow.
    const API: &'static str;

    /// What belongs to the process that runs the flow, and is never on disk.
    type Live: Default + Debug;

    /// The mode, as the user's commands know it.
    fn mode(&self) -> &'static str;

    /// The pid of the first process here.
    fn root_pid(&self) -> i32;

    /// The container that moves, if it is one.
    fn container(&self) -> Option<&ContainerId>;
}

/// The file of the facts.
#[derive(Serialize, Deserialize)]
struct Stored<C, F> {
    #[serde(flatten)]
    common: C,
    #[serde(flatten)]
    facts: F,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct FlowContext<F: FlowFacts> {
    dir: PathBuf,
    pub(super) common: CommonFacts,
    pub(super) facts: F,
    pub(super) client: AgentClient,
    /// Where the steps are logged.
    pub(super) events: Events,
    pub(super) live: F::Live,
    /// Further variables of the user's commands.
    notes: Vec<(&'static str, String)>,
    /// What went wrong beside the migration.
    warnings: Warnings,
}

/// Whether the migration in `dir` is one whose facts are `F`.
pub(super) fn is_in<F: FlowFacts>(dir: &Path) -> bool {
    dir.join(F::FILE).exists()
}

impl<F: FlowFacts> FlowContext<F> {
    /// Makes the directory of a migration that begins.
    pub(super) fn make(
        state_dir: &Path,
        (common, facts): (CommonFacts, F),
        client: AgentClient,
        events: Events,
    ) -> Result<FlowContext<F>> {
        let dir = state_dir::make(state_dir, &common.id)?;
        events.in_dir(&dir);
        for name in F::SUBDIRS {
            let path = dir.join(name);
            fs::create_dir(&path)
                .map_err(|error| Error::file("make the directory", &path, error))?;
        }
        let context = FlowContext::new(dir, (common, facts), client, events);
        context.keep_facts()?;
        Ok(context)
    }

    /// Finds the directory of a migration that was begun.
    pub(super) fn find(dir: &Path, client: AgentClient) -> Result<FlowContext<F>> {
        let Stored { common, facts }: Stored<CommonFacts, F> = state_dir::facts(dir, F::FILE)?;
        let events = Events::of_guard(&common.id, dir, common.events.as_deref());
        let dir = dir.to_owned();
        Ok(FlowContext::new(dir, (common, facts), client, events))
    }

    fn new(
        dir: PathBuf,
        (common, facts): (CommonFacts, F),
        client: AgentClient,
        events: Events,
    ) -> FlowContext<F> {
        FlowContext {
            dir,
            common,
            facts,
            client,
            events,
            live: F::Live::default(),
            notes: Vec::new(),
            warnings: Warnings::default(),
        }
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// A path of the agent's interface.
    pub(super) fn path(&self, rest: &str) -> String {
        format!("/v1/{}/{}{rest}", F::API, self.common.id)
    }

    /// Writes down what has been started.
    pub(super) fn keep_facts(&self) -> Result<()> {
        let (common, facts) = (&self.common, &self.facts);
        records::write(&self.dir.join(F::FILE), &Stored { common, facts })
    }

    /// The last record.
    pub(super) fn record<R: DeserializeOwned>(&self) -> Result<Option<R>> {
        records::read(&self.dir.join(RECORD))
    }

    /// Writes a record to disk, in place of the last one.
    pub(super) fn write_record<R: Serialize>(&self, record: &R) -> Result<()> {
        records::write(&self.dir.join(RECORD), record)
    }

    /// Adds a variable for the user's commands that come later.
    pub(super) fn note(&mut self, name: &'static str, value: String) {
        self.notes.push((name, value));
    }

    pub(super) fn warn(&self, text: String) {
        self.events.warn(&text);
        self.warnings.add(text);
    }

    /// What went wrong beside the migration, so far.
    pub(super) fn take_warnings(&self) -> Vec<String> {
        self.warnings.take()
    }

    /// Variables of the user's commands, by name.
    pub(super) fn variables(&self) -> Vec<(&'static str, String)> {
        let container = self.facts.container().map(ContainerId::to_string);
        let mut variables = vec![
            ("ID", self.common.id.to_string()),
            ("MODE", self.facts.mode().to_owned()),
            ("PID", self.facts.root_pid().to_string()),
            ("CONTAINER", container.unwrap_or_default()),
            ("DESTINATION", self.client.peer().to_string()),
        ];
        variables.extend(self.notes.iter().cloned());
        variables
    }

    /// Runs the user's command for a point of the migration.
    pub(super) async fn run_hook(&self, point: Point) -> Result<()> {
        let variables = self.variables();
        self.common.hooks.run(point, &self.dir, &variables).await
    }

    /// The same where its failure changes nothing any more.
    pub(super) async fn run_late_hook(&self, point: Point) {
        if let Err(error) = self.run_hook(point).await {
            self.warn(error.to_string());
        }
    }

    /// Notes on disk that clients may be led to the destination from now on.
    pub(super) fn begin_switch(&mut self) -> Result<()> {
        self.common.routes.begun = true;
        self.keep_facts()
    }

    /// Leads clients to the destination, after [`FlowContext::begin_switch`].
    pub(super) async fn switch_routes(&self) -> Result<()> {
        let variables = self.variables();
        let facts = self.route_facts(&variables);
        self.common.routes.switch(facts).await
    }

    /// Leads clients here again. Returns what went wrong.
    pub(super) async fn give_routes_back(&self) -> Vec<String> {
        let variables = self.variables();
        let facts = self.route_facts(&variables);
        self.common.routes.give_back(facts).await
    }

    fn route_facts<'a>(&'a self, variables: &'a [(&'static str, String)]) -> RouteFacts<'a> {
        RouteFacts {
            dir: &self.dir,
            variables,
            limit: self.common.hooks.limit(),
        }
    }
}
