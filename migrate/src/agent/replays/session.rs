//! One service that comes as the log of what its clients have said.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::body::{Body, Bytes};
use pageferry::error::{Error, Kind, Result};
use pageferry::migration::events::Step;
use pageferry::migration::messages::{
    Digest, MigrationId, ReplayBegin, ReplayFinish, ReplayStart, ReplayStatus, ServiceAddress,
};
use pageferry::migration::{ReplayEvent, ReplayState};
use pageferry::replay::{ReadEntry, decode};
use pageferry::sys::owned_process::ProcessName;
use tokio::sync::Mutex as Turn;
use tokio::time::timeout;

use super::runner::{Runner, Work};
use super::{service, snapshot};
use crate::agent::contact::Contact;
use crate::agent::context::AgentContext;
use crate::agent::session_table::AgentSession;
use crate::agent::{kept_addresses, session_dir};
use crate::events::{Details, Events};
use crate::records;
use crate::service_log::digest;

/// The request that began it, as it is kept.
const BEGIN: &str = "replay.json";

/// The last state that was decided.
const STATE: &str = "state.json";

/// The leader of the service's processes.
const SERVICE: &str = "service.json";

/// See the module's text.
#[derive(Debug)]
pub(in crate::agent) struct Session {
    dir: PathBuf,
    begin: ReplayBegin,
    events: Events,
    /// What changes the service is done by one task at a time.
    turn: Turn<()>,
    contact: Contact,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    state: ReplayState,
    problem: Option<String>,
    /// Of the snapshot that is here.
    snapshot: Option<Digest>,
    taken: u64,
    digest: Option<String>,
    runner: Option<Arc<Runner>>,
    service: Option<ProcessName>,
}

impl Session {
    /// Makes the directory of a service that is to come.
    pub(super) fn begin(context: &AgentContext, begin: ReplayBegin) -> Result<Arc<Session>> {
        let dir = session_dir::make(context, &begin.id, (BEGIN, &begin))?;
        let session = Session::new(dir, begin, ReplayState::Receiving);
        session.events.done(Step::Begin, Details::default());
        Ok(session)
    }

    fn new(dir: PathBuf, begin: ReplayBegin, state: ReplayState) -> Arc<Session> {
        Arc::new(Session {
            events: session_dir::events(&dir, &begin.id),
            contact: Contact::of_seconds(begin.timeout_s),
            dir,
            begin,
            turn: Turn::new(()),
            inner: Mutex::new(Inner {
                state,
                problem: None,
                snapshot: None,
                taken: 0,
                digest: None,
                runner: None,
                service: None,
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn id(&self) -> &MigrationId {
        &self.begin.id
    }

    pub(super) fn status(&self) -> ReplayStatus {
        let inner = self.lock();
        let runner = inner.runner.as_ref();
        ReplayStatus {
            id: self.begin.id.clone(),
            state: inner.state,
            problem: inner
                .problem
                .clone()
                .or_else(|| runner.and_then(|runner| runner.problem())),
            taken: inner.taken,
            replayed_bytes: runner.map_or(0, |runner| runner.bytes()),
            digest: inner.digest.clone(),
        }
    }

    fn after(&self, event: ReplayEvent) -> Result<ReplayState> {
        let inner = self.lock();
        inner.state.after(event).ok_or_else(|| {
            let problem = inner
                .problem
                .as_deref()
                .unwrap_or("the request is too early");
            let text = format!(
                "service {}: this cannot be now, it is {:?}: {problem}",
                self.begin.id, inner.state
            );
            Error::new(Kind::Usage, text)
        })
    }

    /// Stores what the service starts from, in place of an earlier one.
    pub(super) async fn store(&self, body: Body) -> Result<()> {
        let _turn = self.turn.lock().await;
        self.after(ReplayEvent::Started)?;
        let path = self.dir.join(snapshot::NAME);
        let sum = snapshot::store(&path, body).await?;
        self.lock().snapshot = Some(sum);
        Ok(())
    }

    /// Starts the service, and waits until it takes connections.
    pub(super) async fn start(&self, request: &ReplayStart) -> Result<ReplayStatus> {
        self.events.begin(Step::Start);
        let started = self.start_now(request).await;
        self.events.ended(Step::Start, &started);
        if started.is_ok() {
            self.events.begin(Step::Replay);
        }
        started
    }

    async fn start_now(&self, request: &ReplayStart) -> Result<ReplayStatus> {
        let _turn = self.turn.lock().await;
        let state = self.after(ReplayEvent::Started)?;
        if self.lock().snapshot != request.snapshot {
            let text = "the snapshot arrived damaged: send it again";
            return Err(Error::new(Kind::Protocol, text));
        }
        let path = self.dir.join(snapshot::NAME);
        let from = request.snapshot.as_ref().map(|_| path.as_path());
        let log = self.dir.join("service.log");
        let leader = service::start(&self.begin, &self.home(), from, &log).await?;
        self.lock().service = Some(leader);
        records::write(&self.dir.join(SERVICE), &leader)?;
        let runner = Arc::new(Runner::start(&self.begin)?);
        let mut inner = self.lock();
        // It may have been given up meanwhile: whoever did that waits for the turn, and ends the service.
        if inner.state == ReplayState::Receiving {
            inner.runner = Some(runner);
            inner.state = state;
        }
        drop(inner);
        Ok(self.status())
    }

    /// Where the service runs.
    fn home(&self) -> PathBuf {
        self.dir.join("service")
    }

    fn runner(&self) -> Result<Arc<Runner>> {
        self.after(ReplayEvent::Finished)?;
        let runner = self.lock().runner.clone();
        runner.ok_or_else(|| Error::new(Kind::Usage, "the service was not started"))
    }

    /// Takes the next part of the log, which begins with entry or byte `first`. Waits for room.
    pub(super) async fn take(&self, first: u64, part: Bytes) -> Result<ReplayStatus> {
        let _turn = self.turn.lock().await;
        let runner = self.runner()?;
        let taken = self.lock().taken;
        if first != taken {
            let text = format!("the next entry here is {taken}, not {first}");
            return Err(Error::new(Kind::Protocol, text));
        }
        let (work, count) = match self.begin.feed {
            Some(_) => {
                let count = part.len() as u64;
                (Work::Bytes(part), count)
            }
            None => entries(&part)?,
        };
        runner.give(work).await?;
        self.lock().taken += count;
        Ok(self.status())
    }

    /// Waits until the service was told everything, asks for its state, and stops it.
    pub(super) async fn finish(&self, request: &ReplayFinish) -> Result<ReplayStatus> {
        self.events.begin(Step::Rest);
        let finished = self.finish_now(request).await;
        self.events.ended(Step::Rest, &finished);
        let count = Details::counts(&[("bytes", self.status().replayed_bytes)]);
        if finished.is_ok() {
            self.events.done(Step::Replay, count);
        }
        finished
    }

    async fn finish_now(&self, request: &ReplayFinish) -> Result<ReplayStatus> {
        let _turn = self.turn.lock().await;
        let runner = self.runner()?;
        let taken = self.lock().taken;
        if request.sent != taken {
            let text = format!(
                "{} of the log were sent, and {taken} have arrived",
                request.sent
            );
            return Err(Error::new(Kind::Protocol, text));
        }
        runner.finish().await?;
        if let Some(command) = &request.digest {
            let asked = timeout(self.begin.stall(), digest(command, &self.begin.address)).await;
            let printed = asked.map_err(|_| {
                let text = format!(
                    "--digest says nothing at the destination ({} s: --stall)",
                    self.begin.stall().as_secs()
                );
                Error::new(Kind::PeerLost, text)
            })??;
            self.lock().digest = Some(printed.trim_ascii().escape_ascii().to_string());
        }
        // Behind the digest: that of the source is asked for while connections are open.
        runner.end().await?;
        let leader = self.leader()?;
        service::pause(leader)?;
        let state = self.after(ReplayEvent::Finished)?;
        self.lock().state = state;
        Ok(self.status())
    }

    fn leader(&self) -> Result<ProcessName> {
        let leader = self.lock().service;
        leader.filter(ProcessName::is_alive).ok_or_else(|| {
            let text = format!(
                "the service {} has ended at the destination; it wrote to {}",
                self.begin.id,
                self.dir.join("service.log").display()
            );
            Error::new(Kind::PeerLost, text)
        })
    }

    /// From now on nothing but the source's command ends the service.
    pub(super) async fn keep(&self) -> Result<ReplayStatus> {
        let _turn = self.turn.lock().await;
        self.leader()?;
        let state = self.after(ReplayEvent::KeepAsked)?;
        // On disk before anybody relies on it.
        records::write(&self.dir.join(STATE), &state)?;
        self.events.done(Step::Commit, Details::text("kept"));
        self.lock().state = state;
        Ok(self.status())
    }

    /// Brings addresses up here, or takes those off that were.
    pub(super) async fn move_addresses(
        &self,
        services: Vec<ServiceAddress>,
    ) -> Result<ReplayStatus> {
        let _turn = self.turn.lock().await;
        if services.is_empty() {
            self.take_addresses_off().await;
            return Ok(self.status());
        }
        self.after(ReplayEvent::ResumeAsked)?;
        kept_addresses::bring_up(&self.dir, services).await?;
        self.events.done(Step::Address, Details::default());
        Ok(self.status())
    }

    /// Lets the service go on: it is its clients' from now on.
    pub(super) async fn resume(&self) -> Result<ReplayStatus> {
        let _turn = self.turn.lock().await;
        let leader = self.leader()?;
        let state = self.after(ReplayEvent::ResumeAsked)?;
        records::write(&self.dir.join(STATE), &state)?;
        self.lock().state = state;
        service::resume(leader)?;
        self.events.done(Step::Resume, Details::default());
        snapshot::remove(&self.dir);
        Ok(self.status())
    }

    /// Ends it because the source says so.
    pub(super) async fn cancel(&self) -> Result<ReplayStatus> {
        self.after(ReplayEvent::AbortAsked)?;
        self.abort(ReplayEvent::AbortAsked, "the source gave it up")
            .await;
        Ok(self.status())
    }

    async fn abort(&self, event: ReplayEvent, why: &str) {
        let was = {
            let mut inner = self.lock();
            let was = inner.state;
            let Some(state) = was.after(event) else {
                return;
            };
            inner.state = state;
            // A request that waits for it gets an error, and gives its turn up.
            if let Some(runner) = inner.runner.take() {
                runner.stop();
            }
            was
        };
        let _turn = self.turn.lock().await;
        if was != ReplayState::Aborted {
            tracing::warn!("service {}: {why}", self.begin.id);
            self.lock().problem.get_or_insert_with(|| why.to_owned());
            self.events.done(Step::Discard, Details::text(why));
        }
        if let Err(error) = records::write(&self.dir.join(STATE), &ReplayState::Aborted) {
            tracing::error!("service {}: {error}", self.begin.id);
        }
        self.discard().await;
    }

    async fn take_addresses_off(&self) {
        let of = format!("service {}", self.begin.id);
        kept_addresses::take_off(&self.dir, &of).await;
    }

    /// Leaves nothing of the service but what it has printed.
    async fn discard(&self) {
        self.take_addresses_off().await;
        let leader = self.lock().service.take();
        if let Some(leader) = leader
            && let Err(error) = service::end(leader).await
        {
            tracing::error!("service {}: {error}", self.begin.id);
        }
        snapshot::remove(&self.dir);
        match fs::remove_dir_all(self.home()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::error!("cannot remove {}: {error}", self.home().display());
            }
            _ => {}
        }
    }
}

impl AgentSession for Session {
    const SUBJECT: &'static str = "service";

    fn recover(context: &Arc<AgentContext>, id: &MigrationId) -> Result<Option<Arc<Session>>> {
        let dir = context.dir.join(id.to_string());
        let Some(begin) = records::read::<ReplayBegin>(&dir.join(BEGIN))? else {
            return Ok(None);
        };
        let state = ReplayState::recover(records::read(&dir.join(STATE))?);
        let leader = records::read::<ProcessName>(&dir.join(SERVICE))?;
        let session = Session::new(dir, begin, state);
        session.lock().service = leader;
        match state {
            ReplayState::Aborted => {
                session.lock().problem = Some("the agent was started again".to_owned());
                let ended = Arc::clone(&session);
                tokio::spawn(async move {
                    let _turn = ended.turn.lock().await;
                    ended.discard().await;
                });
            }
            // The record comes first.
            ReplayState::Running => {
                if let Some(Err(error)) = leader.map(service::resume) {
                    tracing::warn!("{id}: {error}");
                }
            }
            _ => {}
        }
        Ok(Some(session))
    }

    /// Whether what becomes of it is decided.
    fn is_decided(&self) -> bool {
        use ReplayState::{Aborted, Kept, Running};
        matches!(self.lock().state, Kept | Running | Aborted)
    }

    fn contact(&self) -> &Contact {
        &self.contact
    }

    async fn end_undecided(&self, why: &str) {
        self.abort(ReplayEvent::Silence, why).await;
    }
}

/// The entries of a part of a recorder's log, and how many there are.
fn entries(part: &[u8]) -> Result<(Work, u64)> {
    let mut entries = Vec::new();
    let mut at = 0;
    while at < part.len() {
        match decode(&part[at..]) {
            ReadEntry::Whole(entry, length) => {
                entries.push((entry, length as u64));
                at += length;
            }
            ReadEntry::Partial(_) | ReadEntry::Damaged(_) => {
                let text = format!("byte {at} of a part of the log begins no entry");
                return Err(Error::new(Kind::Protocol, text));
            }
        }
    }
    let count = entries.len() as u64;
    Ok((Work::Entries(entries), count))
}
