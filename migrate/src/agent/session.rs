//! One migration at the agent: what [`pageferry::migration::Agent`] decides is carried out here.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::Signal;
use pageferry::error::{Error, Result};
use pageferry::migration::events::Step;
use pageferry::migration::messages::{Begin, MigrationId, Status};
use pageferry::migration::{Agent, AgentAction, AgentEvent, AgentRecord};
use pageferry::sys::owned_process::ProcessName;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::{Mutex as Turn, watch};
use tokio::time::sleep;

use super::contact::Contact;
use super::context::AgentContext;
use super::file_trees::Files;
use super::lazy_client::{self, LazyClient};
use super::outputs::OutputLog;
use super::session_dir;
use super::session_table::AgentSession;
use crate::child::Program;
use crate::events::{Details, Events};
use crate::hook::{RECORD, SCRIPT, SOCKET};
use crate::records;

/// The request that began a migration, as it is kept.
const BEGIN: &str = "begin.json";

/// When faults were, as it is kept.
pub(super) const FAULTS: &str = "faults.json";

/// Directory of the final images.
const IMAGES: &str = "images";

/// How long to wait before a record that could not be written is tried again.
const RECORD_AGAIN: Duration = Duration::from_secs(1);

/// One migration.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) context: Arc<AgentContext>,
    pub(super) dir: PathBuf,
    pub(super) begin: Begin,
    pub(super) from: IpAddr,
    pub(super) files: Files,
    pub(super) events: Events,
    pub(super) outputs: Vec<OutputLog>,
    /// Actions are carried out by one task at a time, in the order of the decisions.
    turn: Turn<()>,
    contact: Contact,
    inner: Mutex<Inner>,
    pub(super) changed: watch::Sender<u64>,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) agent: Agent,
    pub(super) problem: Option<String>,
    pub(super) rounds: u32,
    /// The port at which pages are received.
    pub(super) port: u16,
    pub(super) receiver: Option<Program>,
    pub(super) lazy: Option<LazyClient>,
    /// The restore that waits for the decision.
    pub(super) waiting: Option<UnixStream>,
    /// The whole tree of the restore that has been started.
    pub(super) restore: Option<ProcessName>,
    /// When lazy-client was started, µs since 1970.
    pub(super) lazy_us: Option<u64>,
    pub(super) resumed_us: Option<u64>,
    pub(super) complete_us: Option<u64>,
}

impl Session {
    /// Makes the directory of a migration.
    pub(super) fn begin(
        context: &Arc<AgentContext>,
        begin: Begin,
        from: IpAddr,
    ) -> Result<Arc<Session>> {
        let dir = session_dir::make(context, &begin.id, (BEGIN, &begin))?;
        let files = Files::prepare(context, &begin, &dir).inspect_err(|_| {
            let _ = fs::remove_file(dir.join(BEGIN)).and_then(|()| fs::remove_dir(&dir));
        })?;
        let session = Session::new(context, dir, begin, (from, files), Agent::new());
        let of_mode = format!("{} from {from}", session.begin.mode.name());
        session.events.done(Step::Begin, Details::text(of_mode));
        Ok(session)
    }

    fn new(
        context: &Arc<AgentContext>,
        dir: PathBuf,
        begin: Begin,
        (from, files): (IpAddr, Files),
        agent: Agent,
    ) -> Arc<Session> {
        Arc::new(Session {
            context: Arc::clone(context),
            outputs: OutputLog::all(&dir, &begin.id, &begin.outputs),
            events: session_dir::events(&dir, &begin.id),
            contact: Contact::of_seconds(begin.timeout_s),
            dir,
            begin,
            from,
            files,
            turn: Turn::new(()),
            inner: Mutex::new(Inner {
                agent,
                problem: None,
                rounds: 0,
                port: 0,
                receiver: None,
                lazy: None,
                waiting: None,
                restore: None,
                lazy_us: None,
                resumed_us: None,
                complete_us: None,
            }),
            changed: watch::Sender::new(0),
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn images(&self) -> PathBuf {
        self.dir.join(IMAGES)
    }

    /// The directory in which image files arrive.
    pub(super) fn images_dir(&self) -> Result<PathBuf> {
        let dir = self.images();
        make_dir(&dir)?;
        Ok(dir)
    }

    pub(super) fn id(&self) -> &MigrationId {
        &self.begin.id
    }

    pub(super) fn status(&self) -> Status {
        let summary = records::read(&self.images().join("lazy-summary.json"));
        let faults = records::read(&self.dir.join(FAULTS));
        let inner = self.lock();
        Status {
            id: self.begin.id.clone(),
            mode: self.begin.mode,
            state: inner.agent.state(),
            problem: inner.problem.clone(),
            rounds: inner.rounds,
            resumed_us: inner.resumed_us,
            complete_us: inner.complete_us,
            lazy_summary: match inner.complete_us {
                Some(_) => summary.unwrap_or_default(),
                None => None,
            },
            faults: match inner.complete_us {
                Some(_) => faults.unwrap_or_default(),
                None => None,
            },
        }
    }

    /// Tells each change from now on.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Waits until `reached` says so of the status.
    pub(super) async fn wait_for(&self, reached: impl Fn(&Status) -> bool) -> Status {
        let mut changes = self.changes();
        loop {
            let status = self.status();
            if reached(&status) {
                return status;
            }
            if changes.changed().await.is_err() {
                return status;
            }
        }
    }

    /// Takes `event` in and carries out what follows.
    pub(super) async fn handle(&self, event: AgentEvent) -> Status {
        let _turn = self.turn.lock().await;
        let actions = self.lock().agent.handle(event);
        self.carry_out(actions).await;
        self.status()
    }

    /// Ends the migration because of something that went wrong, unless it is decided.
    pub(super) async fn fail(&self, why: &str) {
        if !self.is_decided() {
            tracing::error!("migration {}: {why}", self.begin.id);
            self.lock().problem = Some(why.to_owned());
            let step = self.events.step().unwrap_or(Step::Begin);
            self.events.failed(step, Details::error(why));
            self.handle(AgentEvent::Failed).await;
        }
    }

    pub(super) async fn carry_out(&self, actions: Vec<AgentAction>) {
        let mut todo = std::collections::VecDeque::from(actions);
        while let Some(action) = todo.pop_front() {
            match action {
                // The restore is started by whoever asked, since it reports to itself.
                AgentAction::Restore => {}
                AgentAction::Record(record) => {
                    let event = match records::write(&self.dir.join(RECORD), &record) {
                        Ok(()) => {
                            self.note_record(record);
                            AgentEvent::Recorded(record)
                        }
                        Err(error) => {
                            tracing::error!("migration {}: {error}", self.begin.id);
                            self.lock().problem = Some(error.to_string());
                            // It may be there although the call failed.
                            match records::read::<AgentRecord>(&self.dir.join(RECORD)) {
                                Ok(Some(read)) if read == record => AgentEvent::Recorded(record),
                                _ if self.is_decided() => {
                                    self.record_later(record);
                                    AgentEvent::NotRecorded(record)
                                }
                                _ => AgentEvent::NotRecorded(record),
                            }
                        }
                    };
                    todo.extend(self.lock().agent.handle(event));
                }
                AgentAction::LetRun => self.run_processes().await,
                AgentAction::Discard => self.discard().await,
            }
        }
        self.changed.send_modify(|count| *count += 1);
    }

    /// Tells what is decided.
    fn note_record(&self, record: AgentRecord) {
        let step = match record {
            AgentRecord::Committed => Step::Commit,
            AgentRecord::Aborted => Step::Discard,
            AgentRecord::Complete => Step::End,
        };
        self.events.done(step, Details::text(record.to_string()));
    }

    /// Writes the record of what was decided as soon as there is room for it.
    fn record_later(&self, record: AgentRecord) {
        let path = self.dir.join(RECORD);
        tokio::spawn(async move {
            while path.parent().is_some_and(Path::exists) && records::write(&path, &record).is_err()
            {
                sleep(RECORD_AGAIN).await;
            }
        });
    }

    async fn run_processes(&self) {
        let waiting = self.lock().waiting.take();
        if let Some(mut waiting) = waiting {
            // If it is gone, the hook reads the record.
            let _ = waiting.write_all(b"g").await;
        }
        self.announce_addresses().await;
        self.settle_files();
    }

    async fn discard(&self) {
        let (waiting, receiver, lazy, restore) = {
            let mut inner = self.lock();
            (
                inner.waiting.take(),
                inner.receiver.take(),
                inner.lazy.take(),
                inner.restore.take(),
            )
        };
        // First: the source puts them back on its own device.
        self.take_addresses_down().await;
        // The hook of the restore fails, and so the restore ends the processes that it has made.
        drop(waiting);
        if let Some(mut receiver) = receiver {
            receiver.terminate();
            receiver.end().await;
        }
        if let Some(lazy) = lazy {
            lazy.end().await;
        }
        if let Some(restore) = restore {
            // It may have ended by itself.
            let _ = restore.signal(Signal::SIGTERM as i32);
            self.forget_container(restore).await;
        }
        lazy_client::end_earlier(&self.dir);
        for output in &self.outputs {
            if let Err(error) = output.give_up() {
                tracing::error!("migration {}: {error}", self.begin.id);
            }
        }
        self.give_files_up().await;
        self.remove_memory();
    }

    /// Removes what a migration does not need any more: its records and logs stay.
    pub(super) fn remove_memory(&self) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            if entry.path().is_dir() {
                keep_logs(&entry.path());
            }
        }
        for name in [SOCKET, SCRIPT] {
            // It may not have been made.
            let _ = fs::remove_file(self.dir.join(name));
        }
    }
}

impl AgentSession for Session {
    const SUBJECT: &'static str = "migration";

    fn recover(context: &Arc<AgentContext>, id: &MigrationId) -> Result<Option<Arc<Session>>> {
        let dir = context.dir.join(id.to_string());
        let Some(begin) = records::read::<Begin>(&dir.join(BEGIN))? else {
            return Ok(None);
        };
        let record = records::read::<AgentRecord>(&dir.join(RECORD))?;
        let (agent, actions) = Agent::recover(record);
        match record {
            Some(record) => {
                tracing::warn!("an earlier agent left migration {id}, recorded as {record}");
            }
            None => tracing::warn!("an earlier agent left migration {id} before any decision"),
        }
        let localhost = IpAddr::from([127, 0, 0, 1]);
        let files = Files::default();
        let session = Session::new(context, dir, begin, (localhost, files), agent);
        if matches!(record, None | Some(AgentRecord::Committed)) {
            let text = "the agent was started again";
            session.events.note(Step::Begin, Details::text(text));
        }
        if !session.is_decided() || record == Some(AgentRecord::Aborted) {
            session.lock().problem = Some("the agent was started again".to_owned());
        }
        let finishing = Arc::clone(&session);
        tokio::spawn(async move {
            let _turn = finishing.turn.lock().await;
            finishing.carry_out(actions).await;
            match record {
                Some(AgentRecord::Committed) => finishing.wait_for_earlier_lazy_client().await,
                // The earlier agent may not have come to it.
                Some(AgentRecord::Complete) => finishing.remove_memory(),
                _ => {}
            }
        });
        Ok(Some(session))
    }

    /// Whether nothing but memory can still arrive.
    fn is_decided(&self) -> bool {
        self.lock().agent.state().is_decided()
    }

    fn contact(&self) -> &Contact {
        &self.contact
    }

    async fn end_undecided(&self, why: &str) {
        self.fail(why).await;
    }
}

pub(super) fn round_name(number: u32) -> String {
    format!("round-{number}")
}

pub(super) fn make_dir(dir: &Path) -> Result<()> {
    match fs::create_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(Error::file("make the directory", dir, error))
        }
        _ => Ok(()),
    }
}

/// Removes the image files of a directory, and the directory if nothing else is in it.
pub(super) fn keep_logs(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        if !matches!(extension, Some("log" | "json")) {
            // What cannot be removed is seen by whoever looks for room.
            let _ = fs::remove_file(&path);
        }
    }
    let _ = fs::remove_dir(dir);
}
