//! One container that comes to be started anew.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::events::Step;
use pageferry::migration::messages::{
    ContainerBegin, ContainerStart, ContainerStatus, Digest, MigrationId, Ready,
};
use pageferry::migration::{StatelessEvent, StatelessState};
use pageferry::sys::owned_process::ProcessName;
use tokio::sync::Mutex as Turn;
use tokio::time::{Instant, sleep};

use super::ready::ReadinessCheck;
use crate::agent::contact::Contact;
use crate::agent::context::AgentContext;
use crate::agent::session_table::AgentSession;
use crate::agent::{kept_addresses, session_dir};
use crate::drain;
use crate::events::{Details, Events};
use crate::facts::now_us;
use crate::records;
use crate::runtime::Runtime;

/// The request that began it, as it is kept.
const BEGIN: &str = "stateless.json";

/// The last state that was decided.
const STATE: &str = "state.json";

/// Between two questions whether it is ready.
const ASK_AGAIN: Duration = Duration::from_millis(10);

/// The same where a question starts a program in the container.
const RUN_AGAIN: Duration = Duration::from_millis(100);

/// See the module's text.
#[derive(Debug)]
pub(in crate::agent) struct Session {
    pub(super) context: Arc<AgentContext>,
    pub(super) dir: PathBuf,
    pub(super) begin: ContainerBegin,
    pub(super) events: Events,
    /// What changes the container is done by one task at a time.
    pub(super) turn: Turn<()>,
    contact: Contact,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) state: StatelessState,
    problem: Option<String>,
    /// Of the image that is here.
    pub(super) image: Option<Digest>,
    /// The container's first process, from its making on.
    pub(super) root: Option<ProcessName>,
    started_us: Option<u64>,
    ready_us: Option<u64>,
}

impl Session {
    /// Makes the directory of a container that is to come.
    pub(super) fn begin(
        context: &Arc<AgentContext>,
        begin: ContainerBegin,
    ) -> Result<Arc<Session>> {
        let dir = session_dir::make(context, &begin.id, (BEGIN, &begin))?;
        let session = Session::new(context, dir, begin, StatelessState::Receiving);
        let text = format!("container {}", session.begin.container.id);
        session.events.done(Step::Begin, Details::text(text));
        Ok(session)
    }

    fn new(
        context: &Arc<AgentContext>,
        dir: PathBuf,
        begin: ContainerBegin,
        state: StatelessState,
    ) -> Arc<Session> {
        Arc::new(Session {
            context: Arc::clone(context),
            events: session_dir::events(&dir, &begin.id),
            contact: Contact::of_seconds(begin.timeout_s),
            dir,
            begin,
            turn: Turn::new(()),
            inner: Mutex::new(Inner {
                state,
                problem: None,
                image: None,
                root: None,
                started_us: None,
                ready_us: None,
            }),
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn id(&self) -> &MigrationId {
        &self.begin.id
    }

    pub(super) fn status(&self) -> ContainerStatus {
        let inner = self.lock();
        ContainerStatus {
            id: self.begin.id.clone(),
            state: inner.state,
            problem: inner.problem.clone(),
            started_us: inner.started_us,
            ready_us: inner.ready_us,
        }
    }

    pub(super) fn bundle(&self) -> PathBuf {
        self.dir.join("bundle")
    }

    pub(super) fn log(&self) -> PathBuf {
        self.dir.join("runtime.log")
    }

    pub(super) fn runtime(&self) -> Result<Runtime> {
        self.context.runtime(&self.begin.container)
    }

    /// Takes an event in.
    pub(super) fn advance(&self, event: StatelessEvent) -> Result<()> {
        let mut inner = self.lock();
        match inner.state.after(event) {
            Some(state) => {
                inner.state = state;
                Ok(())
            }
            None => {
                let text = format!(
                    "container {}: this cannot be now, it is {:?}",
                    self.begin.id, inner.state
                );
                Err(Error::new(Kind::Usage, text))
            }
        }
    }

    /// The container's first process.
    pub(super) async fn find_root(&self, runtime: &Runtime) -> Result<ProcessName> {
        let id = &self.begin.container.id;
        let gone = || Error::new(Kind::PeerLost, format!("container {id} has no process"));
        let state = runtime.state(id).await?.ok_or_else(gone)?;
        ProcessName::of(state.pid).map_err(|_| gone())
    }

    /// Starts the container and waits until it is ready.
    async fn start(&self, request: &ContainerStart) -> Result<ContainerStatus> {
        let runtime = self.runtime()?;
        let id = &self.begin.container.id;
        {
            let _turn = self.turn.lock().await;
            self.advance(StatelessEvent::Ran)?;
            runtime.start(id).await?;
            self.lock().started_us = Some(now_us());
        }
        if let Some(ready) = &request.ready {
            self.wait_until_ready(&runtime, ready, request.limit())
                .await?;
        }
        self.lock().ready_us = Some(now_us());
        Ok(self.status())
    }

    /// The same, with its begin and end in the event log.
    pub(super) async fn start_with_events(
        &self,
        request: &ContainerStart,
    ) -> Result<ContainerStatus> {
        self.events.begin(Step::Start);
        let started = self.start(request).await;
        self.events.ended(Step::Start, &started);
        started
    }

    /// Sets the limits that the container had at the source, where they are not those of its configuration.
    pub(super) async fn set_limits(&self, runtime: &Runtime) {
        let Some(resources) = &self.begin.container.resources else {
            return;
        };
        let path = self.dir.join("resources.json");
        let set = async {
            records::write(&path, resources)?;
            runtime.update(&self.begin.container.id, &path).await
        };
        if let Err(error) = set.await {
            tracing::error!(
                "container {}: its limits are not those of the source: {error}",
                self.begin.id
            );
        }
    }

    async fn wait_until_ready(
        &self,
        runtime: &Runtime,
        ready: &Ready,
        limit: Duration,
    ) -> Result<()> {
        let id = &self.begin.container.id;
        let start = Instant::now();
        let pause = match ready {
            Ready::Exec(_) => RUN_AGAIN,
            _ => ASK_AGAIN,
        };
        loop {
            if self.lock().state != StatelessState::Started {
                let text = format!("container {} was ended meanwhile", self.begin.id);
                return Err(Error::new(Kind::Usage, text));
            }
            let root = self.lock().root.filter(ProcessName::is_alive);
            let Some(root) = root else {
                let text = format!(
                    "container {id} has ended at the destination before it was ready ({ready})"
                );
                return Err(Error::new(Kind::PeerLost, text));
            };
            let check = ReadinessCheck {
                runtime,
                id,
                pid: root.pid,
            };
            let why = match check.is_ready(ready).await {
                Ok(()) => return Ok(()),
                Err(why) => why,
            };
            self.contact.note();
            if start.elapsed() > limit {
                let text = format!(
                    "container {id} is not ready after {} ms at the destination ({ready}: {why})",
                    limit.as_millis()
                );
                return Err(Error::new(Kind::PeerLost, text));
            }
            sleep(pause).await;
        }
    }

    /// From now on nothing but the source's command ends the container.
    pub(super) async fn keep(&self) -> Result<ContainerStatus> {
        let _turn = self.turn.lock().await;
        let after = self.lock().state.after(StatelessEvent::KeepAsked);
        if after == Some(StatelessState::Kept) {
            let id = &self.begin.container.id;
            let root = self.lock().root;
            let runs = match root {
                Some(root) => root.is_alive(),
                // An earlier agent made it.
                None => self.runtime()?.runs(id).await?,
            };
            if !runs {
                let text = format!("container {id} has ended at the destination");
                return Err(Error::new(Kind::PeerLost, text));
            }
            // On disk before anybody relies on it.
            records::write(&self.dir.join(STATE), &StatelessState::Kept)?;
            self.events.done(Step::Commit, Details::text("kept"));
        }
        self.advance(StatelessEvent::KeepAsked)?;
        Ok(self.status())
    }

    /// Brings the addresses up here, or takes them off.
    pub(super) async fn move_addresses(&self, up: bool) -> Result<ContainerStatus> {
        let _turn = self.turn.lock().await;
        if !up {
            self.take_addresses_off().await;
            return Ok(self.status());
        }
        if self.lock().state != StatelessState::Kept {
            let text = format!("container {} is not to be kept yet", self.begin.id);
            return Err(Error::new(Kind::Usage, text));
        }
        kept_addresses::bring_up(&self.dir, self.begin.addresses.clone()).await?;
        self.events.done(Step::Address, Details::default());
        Ok(self.status())
    }

    async fn take_addresses_off(&self) {
        let of = format!("container {}", self.begin.id);
        kept_addresses::take_off(&self.dir, &of).await;
    }

    /// Ends it because the source says so.
    pub(super) async fn cancel(&self) -> ContainerStatus {
        self.abort(StatelessEvent::AbortAsked, "the source gave it up")
            .await;
        self.status()
    }

    async fn abort(&self, event: StatelessEvent, why: &str) {
        let was = {
            let mut inner = self.lock();
            let was = inner.state;
            let Some(state) = was.after(event) else {
                return;
            };
            inner.state = state;
            was
        };
        // Whoever waits until it is ready sees the state; whoever has the turn ends first.
        let _turn = self.turn.lock().await;
        if was != StatelessState::Aborted {
            tracing::warn!("container {}: {why}", self.begin.id);
            self.lock().problem = Some(why.to_owned());
            self.events.done(Step::Discard, Details::text(why));
        }
        if let Err(error) = records::write(&self.dir.join(STATE), &StatelessState::Aborted) {
            tracing::error!("container {}: {error}", self.begin.id);
        }
        if was == StatelessState::Kept {
            self.drain().await;
        }
        self.discard().await;
    }

    /// Clients may have been led here before it was given up.
    async fn drain(&self) {
        let limit = Duration::from_millis(self.begin.drain_ms);
        let drained = async {
            let runtime = self.runtime()?;
            match self.find_root(&runtime).await {
                Ok(root) => drain::wait(root, limit).await,
                // It has ended by itself.
                Err(_) => Ok(0),
            }
        };
        match drained.await {
            Ok(0) => {}
            Ok(open) => tracing::warn!(
                "container {}: {open} connections end with it",
                self.begin.id
            ),
            Err(error) => tracing::warn!("container {}: {error}", self.begin.id),
        }
    }

    /// Leaves nothing of the container.
    async fn discard(&self) {
        self.take_addresses_off().await;
        if let Err(error) = self.remove().await {
            tracing::error!("container {}: {error}", self.begin.id);
        }
    }
}

impl AgentSession for Session {
    const SUBJECT: &'static str = "container";

    fn recover(context: &Arc<AgentContext>, id: &MigrationId) -> Result<Option<Arc<Session>>> {
        let dir = context.dir.join(id.to_string());
        let Some(begin) = records::read::<ContainerBegin>(&dir.join(BEGIN))? else {
            return Ok(None);
        };
        let last = records::read::<StatelessState>(&dir.join(STATE))?;
        let session = Session::new(context, dir, begin, StatelessState::recover(last));
        if session.status().state == StatelessState::Aborted {
            session.lock().problem = Some("the agent was started again".to_owned());
            let ended = Arc::clone(&session);
            tokio::spawn(async move {
                let _turn = ended.turn.lock().await;
                ended.discard().await;
            });
        }
        Ok(Some(session))
    }

    /// Whether it is to be kept, or was ended.
    fn is_decided(&self) -> bool {
        matches!(
            self.lock().state,
            StatelessState::Kept | StatelessState::Aborted
        )
    }

    fn contact(&self) -> &Contact {
        &self.contact
    }

    async fn end_undecided(&self, why: &str) {
        self.abort(StatelessEvent::Silence, why).await;
    }
}
