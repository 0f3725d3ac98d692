//! All migrations of one agent: those under way, and those whose records were found at the start.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use pageferry::error::{Error, Kind, Result};
use pageferry::limits::MIGRATIONS_MAX;
use pageferry::migration::messages::{Begin, MigrationId, Status};

use super::context::AgentContext;
use super::session::Session;

/// See the module's text.
#[derive(Clone, Debug)]
pub(super) struct Sessions {
    context: Arc<AgentContext>,
    known: Arc<Mutex<BTreeMap<MigrationId, Arc<Session>>>>,
}

impl Sessions {
    /// Finds what an earlier agent left and finishes it.
    pub(super) fn open(context: AgentContext) -> Result<Sessions> {
        let context = Arc::new(context);
        let mut known = BTreeMap::new();
        let failed = |error| Error::file("read", &context.dir, error);
        for entry in fs::read_dir(&context.dir).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let Some(id) = name
                .to_str()
                .and_then(|name| name.parse::<MigrationId>().ok())
            else {
                continue;
            };
            match Session::recover(&context, &id) {
                Ok(Some(session)) => {
                    known.insert(id, session);
                }
                Ok(None) => {}
                Err(error) => tracing::error!("migration {id} cannot be finished: {error}"),
            }
        }
        Ok(Sessions {
            context,
            known: Arc::new(Mutex::new(known)),
        })
    }

    pub(super) fn context(&self) -> &Arc<AgentContext> {
        &self.context
    }

    /// Begins the migration that the host at `from` asks for.
    pub(super) fn begin(&self, begin: Begin, from: IpAddr) -> Result<Arc<Session>> {
        let wrong = |error| Error::wrap(Kind::Protocol, "this migration cannot be begun", error);
        begin.check().map_err(wrong)?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.contains_key(&begin.id) {
            let text = format!("there has been a migration {} already", begin.id);
            return Err(Error::new(Kind::Usage, text));
        }
        let under_way = known.values().filter(|session| !session.is_decided());
        if under_way.count() >= MIGRATIONS_MAX {
            let text = format!("{MIGRATIONS_MAX} migrations are under way: try again later");
            return Err(Error::new(Kind::Usage, text));
        }
        let id = begin.id.clone();
        let session = Session::begin(&self.context, begin, from)?;
        known.insert(id, Arc::clone(&session));
        Ok(session)
    }

    pub(super) fn find(&self, id: &MigrationId) -> Option<Arc<Session>> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(id).map(Arc::clone)
    }

    pub(super) fn statuses(&self) -> Vec<Status> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.values().map(|session| session.status()).collect()
    }

    /// Aborts what is not decided.
    pub(super) async fn shut_down(&self) {
        let all: Vec<Arc<Session>> = {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.values().cloned().collect()
        };
        for session in all {
            session.fail("the agent was stopped").await;
        }
    }
}
