//! The source's directory of one move, and what anybody can do who finishes it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::{ContainerId, ReplayAddresses, ReplayStatus, ServiceAddress};
use pageferry::migration::{LogReplay, LogReplayAction, MoveRecord};
use pageferry::sys::owned_process::ProcessName;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use crate::runtime::lifecycle;
use crate::service_log::{Hold, unseal};
use crate::shell;
use crate::source::container::ContainerRecord;
use crate::source::flow_context::{FlowContext, FlowFacts};
use crate::source::hooks::Point;
use crate::source::stepped::SteppedFacts;

/// Is there while clients may be held.
const HELD: &str = "hold.begun";

/// How long an agent that does not answer is told the same again.
const SAY_LIMIT: Duration = Duration::from_secs(10);

/// Between two of these requests.
const SAY_AGAIN: Duration = Duration::from_millis(100);

/// How clients are held.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(in crate::source) enum Holder {
    /// By the recorder whose log is in this directory.
    Recorder(PathBuf),
    /// By a command of the user's.
    Command(String),
}

/// What others need to know to finish a move.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::source) struct Facts {
    pub(super) holder: Holder,
    /// The service's first process here.
    pub(super) root: ProcessName,
    /// The container that it is.
    #[serde(rename = "held")]
    pub(super) container: Option<ContainerRecord>,
    /// Addresses that move along, on the destination's devices.
    pub(super) there: Vec<ServiceAddress>,
}

/// See the module's text.
pub(super) type SourceContext = FlowContext<Facts>;

impl FlowFacts for Facts {
    const FILE: &'static str = "log-replay.json";
    const API: &'static str = "replays";
    /// Clients that this process holds.
    type Live = Option<Hold>;

    fn mode(&self) -> &'static str {
        "log-replay"
    }

    fn root_pid(&self) -> i32 {
        self.root.pid
    }

    fn container(&self) -> Option<&ContainerId> {
        self.container.as_ref().map(|container| &container.id)
    }
}

impl SteppedFacts for Facts {
    type Action = LogReplayAction;
    type Status = ReplayStatus;
    type Addresses = ReplayAddresses;

    fn steps(&self) -> LogReplay {
        LogReplay::default()
    }

    fn addresses_request(&self, up: bool) -> ReplayAddresses {
        ReplayAddresses {
            up: match up {
                true => self.there.clone(),
                false => Vec::new(),
            },
        }
    }

    async fn carry_out(context: &mut SourceContext, action: LogReplayAction) -> Result<()> {
        context.carry_out(action).await
    }
}

impl SourceContext {
    /// Carries an action out that needs nothing but what is written down.
    pub(super) async fn carry_out(&mut self, action: LogReplayAction) -> Result<()> {
        match action {
            LogReplayAction::Record(record) => {
                self.write_record(&record)?;
                match record {
                    MoveRecord::Complete => self.run_late_hook(Point::PostResume).await,
                    MoveRecord::RolledBack => self.run_late_hook(Point::OnFailure).await,
                    _ => {}
                }
                Ok(())
            }
            LogReplayAction::Seal => match &mut self.live {
                Some(hold) => hold.seal().await,
                // What a command does lasts.
                None => Ok(()),
            },
            LogReplayAction::Keep => self.post("/keep", &()).await,
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

    /// Posts to the agent, repeatedly until it receives it.
    async fn post_until_answered(&self, what: &str) -> Result<()> {
        let start = Instant::now();
        loop {
            match self.post(what, &()).await {
                Err(error) if error.kind() == Kind::PeerLost && start.elapsed() < SAY_LIMIT => {
                    sleep(SAY_AGAIN).await;
                }
                answered => return answered,
            }
        }
    }

    /// Holds clients. Returns how many entries a recorder's log has for what the service was told.
    pub(super) async fn hold(&mut self) -> Result<Option<u64>> {
        let mark = self.dir().join(HELD);
        let made = File::create(&mark).and_then(|mark| mark.sync_all());
        made.map_err(|error| Error::file("create", &mark, error))?;
        match &self.facts.holder {
            Holder::Recorder(log) => {
                let hold = Hold::take(log).await?;
                let entries = hold.entries();
                self.live = Some(hold);
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
        let log = self.dir().join("hold.log");
        let limit = self.common.hooks.limit();
        shell::run("--hold", command, &variables, &log, limit).await
    }

    /// Lets clients go on here, if they may be held.
    async fn release(&mut self) -> Result<()> {
        let mark = self.dir().join(HELD);
        if !mark.exists() {
            return Ok(());
        }
        // This one's own hold must not outlive it.
        let held = self.live.take();
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
        let hold = match self.live.take() {
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
                    self.common.id
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
