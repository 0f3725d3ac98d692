//! One container that comes to be started anew.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::events::{Step, Writer};
use pageferry::migration::messages::{
    ContainerBegin, ContainerStart, ContainerStatus, Digest, MigrationId, Ready, ServiceAddress,
};
use pageferry::migration::{StatelessEvent, StatelessState};
use pageferry::sys::owned_process::ProcessName;
use tokio::sync::Mutex as Turn;
use tokio::time::{Instant, sleep, sleep_until};

use super::ready::ReadinessCheck;
use crate::address::{self, Attributes};
use crate::agent::context::AgentContext;
use crate::drain;
use crate::events::{Details, Events};
use crate::facts::now_us;
use crate::records;
use crate::runtime::Runtime;

/// The request that began it, as it is kept.
const BEGIN: &str = "stateless.json";

/// The last state that was decided.
const STATE: &str = "state.json";

/// Addresses that may be on their devices, as they are kept.
const ADDRESSES: &str = "addresses.json";

/// Between two questions whether it is ready.
const ASK_AGAIN: Duration = Duration::from_millis(10);

/// The same where a question starts a program in the container.
const RUN_AGAIN: Duration = Duration::from_millis(100);

/// See the module's text.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) context: Arc<AgentContext>,
    pub(super) dir: PathBuf,
    pub(super) begin: ContainerBegin,
    pub(super) events: Events,
    /// What changes the container is done by one task at a time.
    pub(super) turn: Turn<()>,
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
    /// When the source was last in contact.
    last_contact: Instant,
}

impl Session {
    /// Makes the directory of a container that is to come.
    pub(super) fn begin(
        context: &Arc<AgentContext>,
        begin: ContainerBegin,
    ) -> Result<Arc<Session>> {
        let dir = context.dir.join(begin.id.to_string());
        fs::create_dir(&dir).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => {
                let text = format!("there has been a migration {} already", begin.id);
                Error::new(Kind::Usage, text)
            }
            _ => Error::file("make the directory", &dir, error),
        })?;
        // A container's files may hold secrets: they are for the agent's user alone.
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700))
            .map_err(|error| Error::file("protect", &dir, error))
            .and_then(|()| records::write(&dir.join(BEGIN), &begin))
            .inspect_err(|_| {
                // Nothing has begun: the name is free again.
                let _ = fs::remove_dir(&dir);
            })?;
        let session = Session::new(context, dir, begin, StatelessState::Receiving);
        let text = format!("container {}", session.begin.container.id);
        session.events.done(Step::Begin, Details::text(text));
        tokio::spawn(Session::watch_for_silence(Arc::clone(&session)));
        Ok(session)
    }

    fn new(
        context: &Arc<AgentContext>,
        dir: PathBuf,
        begin: ContainerBegin,
        state: StatelessState,
    ) -> Arc<Session> {
        let events = Events::new(Writer::Agent, Some(begin.id.clone()));
        events.in_dir(&dir);
        Arc::new(Session {
            context: Arc::clone(context),
            dir,
            begin,
            events,
            turn: Turn::new(()),
            inner: Mutex::new(Inner {
                state,
                problem: None,
                image: None,
                root: None,
                started_us: None,
                ready_us: None,
                last_contact: Instant::now(),
            }),
        })
    }

    /// Finds what an earlier agent left in the directory of `id`; `None` if it is no container's.
    pub(super) fn recover(
        context: &Arc<AgentContext>,
        id: &MigrationId,
    ) -> Result<Option<Arc<Session>>> {
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

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn id(&self) -> &MigrationId {
        &self.begin.id
    }

    /// Whether it is to be kept, or was ended.
    pub(super) fn is_decided(&self) -> bool {
        matches!(
            self.lock().state,
            StatelessState::Kept | StatelessState::Aborted
        )
    }

    /// Notes that the source was in contact.
    pub(super) fn note_contact(&self) {
        self.lock().last_contact = Instant::now();
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
            self.note_contact();
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
        records::write(&self.dir.join(ADDRESSES), &self.begin.addresses)?;
        for service in &self.begin.addresses {
            address::add(service, &Attributes::default()).await?;
        }
        self.events.done(Step::Address, Details::default());
        for service in self.begin.addresses.clone() {
            tokio::spawn(async move { address::announce(&service).await });
        }
        Ok(self.status())
    }

    /// Takes off what was brought up here, once: later the addresses may be somebody else's.
    async fn take_addresses_off(&self) {
        let path = self.dir.join(ADDRESSES);
        let up = records::read::<Vec<ServiceAddress>>(&path);
        let Ok(Some(services)) = up else {
            return;
        };
        for service in &services {
            if let Err(error) = address::remove(service).await {
                tracing::error!("container {}: {error}", self.begin.id);
            }
        }
        if let Err(error) = fs::remove_file(&path) {
            tracing::error!("cannot remove {}: {error}", path.display());
        }
    }

    /// Ends it because the source says so.
    pub(super) async fn cancel(&self) -> ContainerStatus {
        self.abort(StatelessEvent::AbortAsked, "the source gave it up")
            .await;
        self.status()
    }

    /// Ends it unless it is to be kept.
    pub(super) async fn end_unless_kept(&self, why: &str) {
        self.abort(StatelessEvent::Silence, why).await;
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

    /// Ends what was not kept when the source has sent nothing for too long.
    async fn watch_for_silence(session: Arc<Session>) {
        let limit = Duration::from_secs(session.begin.timeout_s.max(1));
        while !session.is_decided() {
            let deadline = session.lock().last_contact + limit;
            if deadline <= Instant::now() {
                let text = format!("the source has sent nothing for {} s", limit.as_secs());
                session.end_unless_kept(&text).await;
            }
            sleep_until(deadline).await;
        }
    }
}
