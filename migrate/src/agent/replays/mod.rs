//! Services that come as the log of what their clients have said: started here, told the log, and then their clients'.
//!
//! ```text
//! DIR/ID/replay.json    the request that began it
//!        state.json     the last state that was decided: kept, running, or aborted
//!        service.json   the leader of the service's processes
//!        service/       where it runs, as long as it lives
//!        service.log    what it prints
//!        snapshot       what it starts from
//! ```
//!
//! What is decided when is in [`pageferry::migration::ReplayState`].

mod addresses;
mod http;
mod runner;
mod service;
mod session;
mod snapshot;

use std::collections::BTreeMap;
use std::fs;
use std::sync::{Arc, Mutex, PoisonError};

use pageferry::error::{Error, Kind, Result};
use pageferry::limits::MIGRATIONS_MAX;
use pageferry::migration::messages::{MigrationId, ReplayBegin};

pub(super) use http::router;

use super::context::AgentContext;
use session::Session;

/// All of one agent's.
#[derive(Clone, Debug)]
pub(super) struct Replays {
    context: Arc<AgentContext>,
    known: Arc<Mutex<BTreeMap<MigrationId, Arc<Session>>>>,
}

impl Replays {
    /// Finds what an earlier agent left, and ends what it had not kept.
    pub(super) fn open(context: &Arc<AgentContext>) -> Result<Replays> {
        let mut known = BTreeMap::new();
        let failed = |error| Error::file("read", &context.dir, error);
        for entry in fs::read_dir(&context.dir).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let id = name.to_str().and_then(|name| name.parse().ok());
            let Some(id) = id else {
                continue;
            };
            match Session::recover(context, &id) {
                Ok(Some(session)) => {
                    known.insert(id, session);
                }
                Ok(None) => {}
                Err(error) => tracing::error!("service of {id}: {error}"),
            }
        }
        Ok(Replays {
            context: Arc::clone(context),
            known: Arc::new(Mutex::new(known)),
        })
    }

    /// Begins a move.
    fn begin(&self, begin: ReplayBegin) -> Result<Arc<Session>> {
        begin
            .check()
            .map_err(|error| Error::wrap(Kind::Protocol, "this service cannot come here", error))?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let under_way = known.values().filter(|session| !session.is_decided());
        if under_way.count() >= MIGRATIONS_MAX {
            let text = format!("{MIGRATIONS_MAX} services are under way: try again later");
            return Err(Error::new(Kind::Usage, text));
        }
        let id = begin.id.clone();
        let session = Session::begin(&self.context, begin)?;
        known.insert(id, Arc::clone(&session));
        Ok(session)
    }

    fn find(&self, id: &MigrationId) -> Option<Arc<Session>> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(id).map(Arc::clone)
    }

    /// Ends what is not to be kept.
    pub(super) async fn shut_down(&self) {
        let all: Vec<Arc<Session>> = {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.values().cloned().collect()
        };
        for session in all {
            session.end_unless_kept("the agent was stopped").await;
        }
    }
}
