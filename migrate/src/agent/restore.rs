//! The restore of one migration at the agent, from its start to the last page.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::events::Step;
use pageferry::migration::messages::{FaultTimes, RestoreRequest, RuntimeKind, Status};
use pageferry::migration::{AgentEvent, AgentState};
use pageferry::observe::trace::TraceReader;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::sleep;

use super::commands;
use super::lazy_client::{self, LazyClient};
use super::session::{FAULTS, Session, round_name};
use super::session_table::AgentSession;
use crate::child::Program;
use crate::events::Details;
use crate::facts::now_us;
use crate::hook::{RESTORED, RESUMED, SCRIPT, SOCKET};
use crate::records;
use crate::runtime::runtime_log;

/// How often a lazy-client that an earlier agent started is looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

fn restore_title(runtime: RuntimeKind) -> &'static str {
    match runtime {
        RuntimeKind::Runc => "runc restore",
        RuntimeKind::Crun => "crun restore",
    }
}

impl Session {
    /// Restores, up to the moment before the first instruction. What comes after that is done by a task.
    pub(super) async fn restore(self: &Arc<Session>, request: &RestoreRequest) -> Result<Status> {
        if self.handle(AgentEvent::RestoreAsked).await.state != AgentState::Restoring {
            return Err(Error::new(
                Kind::Usage,
                "this migration cannot be restored now",
            ));
        }
        self.events.begin(Step::Restore);
        if let Err(error) = self.start_restore(request).await {
            self.fail(&error.to_string()).await;
        }
        let decided =
            |status: &Status| status.state == AgentState::Ready || status.state.is_decided();
        Ok(self.wait_for(decided).await)
    }

    async fn start_restore(self: &Arc<Session>, request: &RestoreRequest) -> Result<()> {
        self.install_files().await?;
        let images = self.images_dir()?;
        let socket = self.dir.join(SOCKET);
        let hooks = UnixListener::bind(&socket)
            .map_err(|error| Error::file("listen at", &socket, error))?;
        let script = self.dir.join(SCRIPT);
        let text = commands::hook_script(&self.context.programs, &self.dir);
        fs::write(&script, text)
            .and_then(|()| fs::set_permissions(&script, fs::Permissions::from_mode(0o700)))
            .map_err(|error| Error::file("write", &script, error))?;
        if let Some(port) = request.memory_port {
            let earlier = match self.lock().rounds {
                0 => None,
                last => Some(format!("../{}", round_name(last))),
            };
            let command = commands::lazy_client(
                &self.context.programs,
                &self.context.tls,
                &images,
                (self.from, port),
                earlier.as_deref(),
            );
            let log = images.join("lazy.log");
            let started_us = now_us();
            let lazy = LazyClient::start(command, &log, &self.dir).await?;
            let mut inner = self.lock();
            inner.lazy = Some(lazy);
            inner.lazy_us = Some(started_us);
        }
        for output in &self.outputs {
            output.prepare(&self.context.programs).await?;
        }
        self.bring_addresses_up().await?;
        let lazily = request.memory_port.is_some();
        let (title, log, mut command) = match &self.begin.container {
            Some(container) => (
                restore_title(container.runtime),
                runtime_log(&images),
                self.restore_container(container, lazily)?,
            ),
            None => (
                "criu restore",
                images.join("restore.log"),
                commands::restore(
                    &self.context.programs,
                    &images,
                    &script,
                    lazily,
                    self.begin.tcp,
                ),
            ),
        };
        let restore = Program::start(title, &mut command, &log)?;
        // A runtime's own log does not say what CRIU says.
        let restore = restore.with_criu_log(images.join("restore.log"));
        self.lock().restore = Some(restore.name());
        tokio::spawn(Session::follow_restore(Arc::clone(self), restore, hooks));
        let names = self.lock().lazy.as_ref().map(LazyClient::names);
        names.map_or(Ok(()), |names| lazy_client::keep(&self.dir, &names))
    }

    /// Handles the stages of the restore and waits for its end.
    async fn follow_restore(session: Arc<Session>, mut restore: Program, hooks: UnixListener) {
        let stages = async {
            loop {
                match hooks.accept().await {
                    Ok((stream, _)) => session.handle_stage(stream).await,
                    Err(error) => {
                        tracing::warn!("hook of {}: {error}", session.begin.id);
                        sleep(LOOK_AGAIN).await;
                    }
                }
            }
        };
        let ended = tokio::select! {
            ended = restore.succeed() => ended,
            never = stages => never,
        };
        session.lock().restore = None;
        match ended {
            // It was ended because of the decision, and CRIU wrote its statistics after that.
            Err(_) if session.status().state == AgentState::Aborted => session.remove_memory(),
            Err(error) if session.lock().resumed_us.is_some() => {
                tracing::warn!(
                    "migration {}: the processes run, and then: {error}",
                    session.begin.id
                );
                session.events.warn(&error.to_string());
                session.follow_memory().await;
            }
            Err(error) if session.is_decided() => {
                tracing::error!(
                    "migration {}: after the decision: {error}",
                    session.begin.id
                );
                let details = Details::error(&error.to_string());
                session.events.failed(Step::Resume, details);
                session.lock().problem = Some(error.to_string());
                session.changed.send_modify(|count| *count += 1);
                session.outlive_restore().await;
            }
            Err(error) => session.fail(&error.to_string()).await,
            Ok(()) => {
                session.set_limits().await;
                session.follow_memory().await;
            }
        }
    }

    async fn handle_stage(&self, stream: UnixStream) {
        let mut stage = String::new();
        let mut stream = BufReader::new(stream);
        if stream.read_line(&mut stage).await.is_err() {
            return;
        }
        match stage.trim_end() {
            RESTORED if !self.has_memory() => {
                // The stream ends here, and with it the restore.
                self.fail("lazy-client has ended before the processes ran")
                    .await;
            }
            RESTORED => {
                self.lock().waiting = Some(stream.into_inner());
                for output in &self.outputs {
                    output.let_go();
                }
                // First: whoever waits for the state may ask for the log.
                self.events.done(Step::Restore, Details::default());
                if self.handle(AgentEvent::Restored).await.state == AgentState::Aborted {
                    // It came too late for whoever discarded the others: the restore ends with its stream.
                    self.lock().waiting = None;
                }
            }
            RESUMED => {
                self.lock().resumed_us = Some(now_us());
                self.events.done(Step::Resume, Details::default());
                if self.begin.mode.is_lazy() {
                    self.events.begin(Step::Memory);
                }
                self.changed.send_modify(|count| *count += 1);
            }
            _ => {}
        }
    }

    /// Whether the memory of a lazy restore is still to be had.
    pub(super) fn has_memory(&self) -> bool {
        let inner = self.lock();
        !self.begin.mode.is_lazy() || inner.lazy.as_ref().is_some_and(LazyClient::is_alive)
    }

    /// Waits until all memory is there.
    async fn follow_memory(&self) {
        {
            let mut inner = self.lock();
            // A hook that could not reach the agent leaves the time of the restore's end.
            inner.resumed_us.get_or_insert_with(now_us);
        }
        self.changed.send_modify(|count| *count += 1);
        let lazy = self.lock().lazy.take();
        let ended = match lazy {
            Some(lazy) => lazy.succeed(&self.images()).await,
            None => Ok(()),
        };
        if let Err(error) = self.keep_fault_times() {
            tracing::warn!("migration {}: {error}", self.begin.id);
        }
        match ended {
            Ok(()) => self.complete().await,
            Err(error) => {
                tracing::error!("migration {}: {error}", self.begin.id);
                self.lose_memory(&error);
            }
        }
    }

    /// The restore has ended after the decision, and running processes were not reported. Those that do run all the
    /// same have their memory from lazy-client, which ends when the last of them is gone or has everything.
    async fn outlive_restore(&self) {
        let lazy = self.lock().lazy.take();
        if let Some(lazy) = lazy
            && let Err(error) = lazy.succeed(&self.images()).await
        {
            tracing::error!("migration {}: {error}", self.begin.id);
        }
        self.remove_memory();
    }

    /// No more memory will come: nobody reads what has arrived in files.
    fn lose_memory(&self, why: &Error) {
        self.lock().problem = Some(why.to_string());
        let details = Details::error(&why.to_string());
        self.events.failed(Step::Memory, details);
        self.changed.send_modify(|count| *count += 1);
        self.remove_memory();
    }

    /// Writes down when faults were: the trace itself goes with the images.
    fn keep_fault_times(&self) -> Result<()> {
        let path = self.images().join(commands::TRACE);
        let (lazy_us, resumed_us) = {
            let inner = self.lock();
            (inner.lazy_us, inner.resumed_us)
        };
        let (Some(lazy_us), Some(resumed_us)) = (lazy_us, resumed_us) else {
            return Ok(());
        };
        let mut faults = Vec::new();
        for record in TraceReader::open(&path)? {
            let record = record?;
            // A restore faults as well, before the processes run.
            let time = (lazy_us + record.time_us).saturating_sub(resumed_us);
            faults.push((time, u64::from(record.latency_us)));
        }
        records::write(&self.dir.join(FAULTS), &FaultTimes::of(&faults))
    }

    async fn complete(&self) {
        self.lock().complete_us = Some(now_us());
        if self.begin.mode.is_lazy() {
            self.events.done(Step::Memory, Details::default());
        }
        self.handle(AgentEvent::MemoryComplete).await;
        self.remove_memory();
    }

    /// The agent that started the lazy-client has died; the lazy-client may go on.
    pub(super) async fn wait_for_earlier_lazy_client(&self) {
        let ended = match self.begin.mode.is_lazy() {
            true => lazy_client::earlier_succeeds(&self.dir, &self.images()).await,
            false => Ok(()),
        };
        match ended {
            Err(error) => self.lose_memory(&error),
            Ok(()) => {
                self.lock().complete_us = Some(now_us());
                let actions = self.lock().agent.handle(AgentEvent::MemoryComplete);
                self.carry_out(actions).await;
                self.remove_memory();
            }
        }
    }
}
