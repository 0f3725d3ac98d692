//! The source's directory of one move, and what anybody can do who finishes it.

use std::fs::{self, File};
use std::path::PathBuf;
use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::{ContainerAddresses, ContainerId, ContainerStatus};
use pageferry::migration::{MoveRecord, Stateless, StatelessAction, StatelessMode};
use pageferry::sys::owned_process::ProcessName;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::runtime::lifecycle;
use crate::source::container::ContainerRecord;
use crate::source::flow_context::{FlowContext, FlowFacts};
use crate::source::hooks::Point;
use crate::source::stepped::SteppedFacts;
use crate::{drain, records};

/// Is there once the container may have been told to end.
const STOPPED: &str = "stop.begun";

/// How long an agent that does not answer is told to end its container.
const DISCARD_LIMIT: Duration = Duration::from_secs(10);

/// Between two of these requests.
const SAY_AGAIN: Duration = Duration::from_millis(500);

/// What others need to know to finish a move.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::source) struct Facts {
    pub(super) mode: StatelessMode,
    #[serde(rename = "held")]
    pub(super) container: ContainerRecord,
    /// Its bundle here.
    pub(super) bundle: PathBuf,
    /// Its first process here.
    pub(super) root: ProcessName,
    /// Limits of its control groups.
    pub(super) resources: Option<Value>,
    /// How long connections may go on here.
    pub(super) drain_ms: u64,
}

/// See the module's text.
pub(super) type SourceContext = FlowContext<Facts>;

impl FlowFacts for Facts {
    const FILE: &'static str = "stateless.json";
    const API: &'static str = "containers";
    type Live = ();

    fn mode(&self) -> &'static str {
        match self.mode {
            StatelessMode::Cold => "cold",
            StatelessMode::Live => "live",
        }
    }

    fn root_pid(&self) -> i32 {
        self.root.pid
    }

    fn container(&self) -> Option<&ContainerId> {
        Some(&self.container.id)
    }
}

impl SteppedFacts for Facts {
    type Action = StatelessAction;
    type Status = ContainerStatus;
    type Addresses = ContainerAddresses;

    fn steps(&self) -> Stateless {
        Stateless::new(self.mode)
    }

    fn addresses_request(&self, up: bool) -> ContainerAddresses {
        ContainerAddresses { up }
    }

    async fn carry_out(context: &mut SourceContext, action: StatelessAction) -> Result<()> {
        context.carry_out(action).await
    }
}

impl SourceContext {
    /// Carries an action out that needs nothing but what is written down.
    pub(super) async fn carry_out(&mut self, action: StatelessAction) -> Result<()> {
        match action {
            StatelessAction::Record(record) => {
                self.write_record(&record)?;
                match record {
                    MoveRecord::Switched => self.run_late_hook(Point::PostResume).await,
                    MoveRecord::RolledBack => self.run_late_hook(Point::OnFailure).await,
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
        let mark = self.dir().join(STOPPED);
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
        if !self.dir().join(STOPPED).exists() {
            return Ok(());
        }
        let container = &self.facts.container;
        let run = async {
            // It may still be about to end.
            lifecycle::stop(self.facts.root).await?;
            container.runtime.delete(&container.id).await?;
            let log = self.dir().join("runtime.log");
            container
                .runtime
                .run(&container.id, &self.facts.bundle, &log)
                .await
        };
        run.await.map_err(|error| {
            let text = format!(
                "container {} does not run here again; `pageferry migrate --resume {} --to {}` tries it once more",
                container.id,
                self.common.id,
                self.client.peer()
            );
            Error::wrap(Kind::Io, text, error)
        })?;
        // Once: from now on it may be somebody else who ends it.
        let mark = self.dir().join(STOPPED);
        fs::remove_file(&mark).map_err(|error| Error::file("remove", &mark, error))?;
        if let Some(resources) = &self.facts.resources {
            let path = self.dir().join("resources.json");
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

    /// Lets the agent end what it has, however often it must be said.
    async fn discard(&self) -> Result<()> {
        let start = Instant::now();
        loop {
            match self.post("/cancel", &()).await {
                Ok(()) => return Ok(()),
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
