//! The sessions of one kind at an agent: those under way, and those whose records an earlier agent left.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pageferry::error::{Error, Kind, Result};
use pageferry::limits::MIGRATIONS_MAX;
use pageferry::migration::messages::MigrationId;
use tokio::time::{Instant, sleep_until};

use super::answer::Failure;
use super::contact::Contact;
use super::context::AgentContext;

/// One migration at the agent, of whichever kind.
pub(super) trait AgentSession: Debug + Send + Sync + Sized + 'static {
    /// What moves, in messages.
    const SUBJECT: &'static str;

    /// Finds what an earlier agent left in the directory of `id`, and finishes it; `None` if it is of another kind.
    fn recover(context: &Arc<AgentContext>, id: &MigrationId) -> Result<Option<Arc<Self>>>;

    /// Whether silence of the source, or the agent's end, changes nothing any more.
    fn is_decided(&self) -> bool;

    /// When the source was last in contact.
    fn contact(&self) -> &Contact;

    /// Gives it up unless it is decided.
    fn end_undecided(&self, why: &str) -> impl Future<Output = ()> + Send;
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct SessionTable<S> {
    context: Arc<AgentContext>,
    known: Arc<Mutex<BTreeMap<MigrationId, Arc<S>>>>,
}

impl<S> Clone for SessionTable<S> {
    fn clone(&self) -> SessionTable<S> {
        SessionTable {
            context: Arc::clone(&self.context),
            known: Arc::clone(&self.known),
        }
    }
}

impl<S: AgentSession> SessionTable<S> {
    /// Finds what an earlier agent left, and finishes it.
    pub(super) fn open(context: &Arc<AgentContext>) -> Result<SessionTable<S>> {
        let mut known = BTreeMap::new();
        let failed = |error| Error::file("read", &context.dir, error);
        for entry in fs::read_dir(&context.dir).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let id = name.to_str().and_then(|name| name.parse().ok());
            let Some(id) = id else {
                continue;
            };
            match S::recover(context, &id) {
                Ok(Some(session)) => {
                    known.insert(id, session);
                }
                Ok(None) => {}
                Err(error) => tracing::error!("{} {id} cannot be finished: {error}", S::SUBJECT),
            }
        }
        Ok(SessionTable {
            context: Arc::clone(context),
            known: Arc::new(Mutex::new(known)),
        })
    }

    pub(super) fn context(&self) -> &Arc<AgentContext> {
        &self.context
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<MigrationId, Arc<S>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the session `id` that `begin` begins, and ends it when its source is silent for too long.
    ///
    /// # Errors
    /// There has been one of this name, too many are under way, or `begin` fails.
    pub(super) fn add(
        &self,
        id: &MigrationId,
        begin: impl FnOnce() -> Result<Arc<S>>,
    ) -> Result<Arc<S>> {
        let mut known = self.lock();
        if known.contains_key(id) {
            let text = format!("there has been a migration {id} already");
            return Err(Error::new(Kind::Usage, text));
        }
        let under_way = known.values().filter(|session| !session.is_decided());
        if under_way.count() >= MIGRATIONS_MAX {
            let subject = S::SUBJECT;
            let text = format!("{MIGRATIONS_MAX} {subject}s are under way: try again later");
            return Err(Error::new(Kind::Usage, text));
        }
        let session = begin()?;
        tokio::spawn(watch_for_silence(Arc::clone(&session)));
        known.insert(id.clone(), Arc::clone(&session));
        Ok(session)
    }

    /// The session that a request of the source names, which is in contact by it.
    pub(super) fn find(&self, id: &str) -> std::result::Result<Arc<S>, Failure> {
        let id: MigrationId = id
            .parse()
            .map_err(|error| Error::wrap(Kind::Protocol, "the request's path", error))?;
        let session =
            self.lock().get(&id).map(Arc::clone).ok_or_else(|| {
                Failure::unknown(format!("the agent knows no {} {id}", S::SUBJECT))
            })?;
        session.contact().note();
        Ok(session)
    }

    pub(super) fn all(&self) -> Vec<Arc<S>> {
        self.lock().values().cloned().collect()
    }

    /// Gives up what is not decided.
    pub(super) async fn shut_down(&self) {
        for session in self.all() {
            session.end_undecided("the agent was stopped").await;
        }
    }
}

/// Gives `session` up when its source has sent nothing for too long.
async fn watch_for_silence<S: AgentSession>(session: Arc<S>) {
    while !session.is_decided() {
        let contact = session.contact();
        let deadline = contact.deadline();
        if deadline <= Instant::now() {
            let seconds = contact.limit().as_secs();
            let text = format!("the source has sent nothing for {seconds} s");
            return session.end_undecided(&text).await;
        }
        sleep_until(deadline).await;
    }
}
