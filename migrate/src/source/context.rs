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
use pageferry::migration::messages::{ContainerId, Status, TcpConnections};
use pageferry::migration::{Mode, SourceAction, SourceEvent};
use pageferry::sys::owned_process::{ProcessName, ProcessStat};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use super::container::ContainerRecord;
use super::flow_context::{FlowContext, FlowFacts};
use super::hooks::Point;
use super::network::{self, Connection};
use super::outputs::Outputs;
use crate::events::Details;
use crate::rounds::Tree;

/// How long to wait before an agent that did not answer is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// How long an agent that does not answer is told to abort. One that does not receive it aborts by itself when its time
/// is over.
const ABORT_LIMIT: Duration = Duration::from_secs(3);

/// The directory of the images.
const IMAGES: &str = "images";

/// Is there once the routes have been given back.
const GIVEN_BACK: &str = "routes.back";

/// What others need to know to finish a migration.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Facts {
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
    /// Directories that move along.
    #[serde(default)]
    pub(super) files: Vec<PathBuf>,
    /// Where the container writes what it prints.
    #[serde(default)]
    pub(super) outputs: Outputs,
}

impl Facts {
    /// What is known of the processes of `tree` before they are touched.
    pub(super) fn of_tree(mode: Mode, tree: &Tree) -> Facts {
        let members = tree.members().iter();
        let stopped = |pid| ProcessStat::of(pid).is_ok_and(|stat| stat.state == 'T');
        Facts {
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
            files: Vec::new(),
            outputs: Outputs::default(),
        }
    }
}

/// See the module's text.
pub(super) type SourceContext = FlowContext<Facts>;

impl FlowFacts for Facts {
    const FILE: &'static str = "facts.json";
    const SUBDIRS: &'static [&'static str] = &[IMAGES];
    const API: &'static str = "migrations";
    type Live = ();

    fn mode(&self) -> &'static str {
        self.mode.name()
    }

    fn root_pid(&self) -> i32 {
        self.tree.first().map_or(0, |root| root.pid)
    }

    fn container(&self) -> Option<&ContainerId> {
        self.container.as_ref().map(|container| &container.id)
    }
}

impl SourceContext {
    pub(super) fn images(&self) -> PathBuf {
        self.dir().join(IMAGES)
    }

    /// Leads clients here again, once: whoever finishes the migration comes here as well.
    async fn give_back_once(&self) {
        let mark = self.dir().join(GIVEN_BACK);
        if !self.common.routes.begun || mark.exists() {
            return;
        }
        let problems = self.give_routes_back().await;
        if problems.is_empty()
            && let Err(error) = fs::write(&mark, "")
        {
            tracing::debug!("cannot write {}: {error}", mark.display());
        }
        for problem in problems {
            self.warn(problem);
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
                Ok(Some(SourceEvent::AgentState(state))) => {
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
                self.write_record(&record)?;
                Ok(Some(SourceEvent::Recorded(record)))
            }
            SourceAction::Fence => {
                self.fence();
                Ok(None)
            }
            SourceAction::SendCommit => Ok(Some(self.post("/commit").await)),
            SourceAction::SendAbort => {
                let start = Instant::now();
                loop {
                    match self.post("/cancel").await {
                        // What broke this connection, or the agent, may be over in a moment.
                        SourceEvent::AgentSilent if start.elapsed() < ABORT_LIMIT => {
                            sleep(ASK_AGAIN).await;
                        }
                        answer => return Ok(Some(answer)),
                    }
                }
            }
            SourceAction::AskAgent => {
                sleep(ASK_AGAIN).await;
                let asked = self.client.get::<Status>(&self.path("")).await;
                Ok(Some(event_of(asked)))
            }
            SourceAction::Release => {
                // First: what comes to the destination is refused there by now, and waits here.
                self.give_back_once().await;
                self.release().await?;
                if self.common.addresses.taken {
                    self.common.addresses.give_back().await;
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
    pub(super) fn fence(&self) {
        if self.facts.tcp == TcpConnections::Established {
            network::enter_repair_mode(&self.facts.tree);
        }
        for process in &self.facts.tree {
            if let Err(error) = process.signal_threads(Signal::SIGSTOP as i32) {
                tracing::debug!("pid {} is not held: {error}", process.pid);
            }
        }
    }
}

/// What an agent's answer means.
fn event_of(answer: Result<Status>) -> SourceEvent {
    match answer {
        Ok(status) => SourceEvent::AgentState(status.state),
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
