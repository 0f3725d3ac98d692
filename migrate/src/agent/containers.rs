//! Containers at the destination: what they find there, and what the runtime is asked for.

use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::Signal;
use pageferry::error::Result;
use pageferry::migration::messages::{Check, Container, Wanted, WantedFiles};
use pageferry::sys::owned_process::ProcessName;
use tokio::process::Command;
use tokio::time::{Instant, sleep};

use super::context::AgentContext;
use super::outputs::OutputLog;
use super::session::Session;
use crate::address;
use crate::records;
use crate::runtime::criu_wrapper::{self, CRIU_PROCESS, Settings, Work};
use crate::runtime::{self, Runtime, bundle};

/// How long a runtime may take to see that its CRIU is gone.
const END_LIMIT: Duration = Duration::from_secs(10);

/// How often that is looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Why the container's runtime makes none on this host, if it does not.
pub(super) fn refusal(container: &Container) -> Option<String> {
    let refusal = runtime::refusal(container.runtime)?;
    Some(format!("at the destination: {refusal}"))
}

impl AgentContext {
    pub(super) fn runtime(&self, container: &Container) -> Result<Runtime> {
        Runtime::find(container.runtime, self.runtime_root.clone())
    }

    /// Directory of a container's bundle.
    pub(super) fn bundle(&self, container: &Container) -> PathBuf {
        match &self.bundles {
            Some(dir) if !container.bundle_is_given => dir.join(container.id.as_str()),
            _ => PathBuf::from(&container.bundle),
        }
    }

    /// Whether what is wanted can come here.
    pub(super) async fn check(&self, wanted: &Wanted) -> Result<Check> {
        let mut check = match &wanted.container {
            Some(container) => self.check_container(container, &wanted.files).await?,
            None => Check {
                runtime: None,
                problems: Vec::new(),
                sends_root: false,
                missing_layers: None,
                rooms: Vec::new(),
            },
        };
        if let Some(overlay) = &wanted.files.overlay {
            check.missing_layers = self.layers.missing(overlay);
        }
        let container = wanted.container.as_ref();
        let of_files = self.problems_of_files(container, &wanted.files);
        check.problems.extend(of_files);
        check.rooms = self.spaces(container, &wanted.files);
        for service in wanted
            .addresses
            .iter()
            .filter(|service| service.is_possible())
        {
            match address::find(service).await {
                Ok(None) => {}
                Ok(Some(_)) => check.problems.push(format!(
                    "the destination has {} on {} already",
                    service.cidr(),
                    service.device
                )),
                Err(error) => check.problems.push(format!("at the destination: {error}")),
            }
        }
        Ok(check)
    }

    async fn check_container(&self, container: &Container, files: &WantedFiles) -> Result<Check> {
        let sends_root = self.sends_root(container, files);
        let runtime = match self.runtime(container) {
            Ok(runtime) => runtime,
            Err(error) => {
                return Ok(Check {
                    runtime: None,
                    problems: vec![format!("at the destination: {error}")],
                    sends_root,
                    missing_layers: None,
                    rooms: Vec::new(),
                });
            }
        };
        let bundle = self.bundle(container);
        if !sends_root && self.bundles.is_some() && !container.bundle_is_given {
            bundle::complete(&bundle, &container.config)?;
        }
        let volumes = files.volumes.iter().filter_map(|tree| tree.path.as_deref());
        let transferred = bundle::TransferredFiles {
            root: sends_root,
            volumes: volumes.collect(),
        };
        let mut problems = bundle::problems_there(&bundle, &container.config, &transferred);
        problems.extend(refusal(container));
        if let Some(state) = runtime.state(&container.id).await? {
            problems.push(format!(
                "the destination has a container {} already ({}): delete it there",
                container.id, state.status
            ));
        }
        Ok(Check {
            runtime: Some(runtime.version().await?),
            problems,
            sends_root,
            missing_layers: None,
            rooms: Vec::new(),
        })
    }
}

impl Session {
    /// The command line of a container's restore.
    pub(super) fn restore_container(&self, container: &Container, lazily: bool) -> Result<Command> {
        let programs = &self.context.programs;
        let settings = Settings {
            criu: programs.criu.clone(),
            tcp: self.begin.tcp,
            work: Work::Restore { lazily },
            external: Vec::new(),
            lent: self.outputs.iter().map(OutputLog::lent).collect(),
        };
        let bin = criu_wrapper::prepare(&self.dir, &programs.pageferry, &settings)?;
        let runtime = self.context.runtime(container)?;
        let bundle = self.context.bundle(container);
        Ok(runtime.restore(&container.id, &self.images(), &bin, &bundle))
    }

    /// Ends what is left of a container whose restore, by the runtime `restore`, was given up.
    pub(super) async fn forget_container(&self, restore: ProcessName) {
        let Some(container) = &self.begin.container else {
            return;
        };
        // Runtimes handle no signals while they wait for CRIU.
        if let Ok(Some(criu)) = records::read::<ProcessName>(&self.dir.join(CRIU_PROCESS)) {
            // It may have ended by itself.
            let _ = criu.signal(Signal::SIGTERM as i32);
        }
        let start = Instant::now();
        while restore.is_alive() && start.elapsed() < END_LIMIT {
            sleep(LOOK_AGAIN).await;
        }
        let _ = restore.signal(Signal::SIGKILL as i32);
        let deleted = match self.context.runtime(container) {
            Ok(runtime) => runtime.delete(&container.id).await,
            Err(error) => Err(error),
        };
        if let Err(error) = deleted {
            tracing::error!("migration {}: {error}", self.begin.id);
        }
    }

    /// Sets the limits that the container had at the source.
    pub(super) async fn set_limits(&self) {
        let Some(container) = &self.begin.container else {
            return;
        };
        let Some(resources) = &container.resources else {
            return;
        };
        let path = self.dir.join("resources.json");
        let set = async {
            records::write(&path, resources)?;
            let runtime = self.context.runtime(container)?;
            runtime.update(&container.id, &path).await
        };
        if let Err(error) = set.await {
            // It lives here whatever its limits are.
            tracing::error!(
                "migration {}: the container's limits are not those of the source: {error}",
                self.begin.id
            );
        }
    }
}
