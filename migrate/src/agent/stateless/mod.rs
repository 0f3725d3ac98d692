//! Containers that are started anew here: made of an image that the source sends, started, kept or ended.
//!
//! ```text
//! DIR/ID/stateless.json   the request that began it
//!        state.json       the last state that was decided: kept, or aborted
//!        bundle/          config.json and rootfs/: the container runs there as long as it lives
//!        runtime.log
//! ```
//!
//! What is decided when is in [`pageferry::migration::StatelessState`].

mod http;
mod image;
mod ready;
mod root;
mod session;

use std::collections::BTreeMap;
use std::fs;
use std::sync::{Arc, Mutex, PoisonError};

use pageferry::error::{Error, Kind, Result};
use pageferry::limits::MIGRATIONS_MAX;
use pageferry::migration::messages::{ContainerBegin, MigrationId, Wanted, WantedFiles};

pub(super) use http::router;

use super::containers::refusal;
use super::context::AgentContext;
use crate::runtime::bundle;
use session::Session;

/// All of one agent's.
#[derive(Clone, Debug)]
pub(super) struct Containers {
    context: Arc<AgentContext>,
    known: Arc<Mutex<BTreeMap<MigrationId, Arc<Session>>>>,
}

impl Containers {
    /// Finds what an earlier agent left, and ends what it had not kept.
    pub(super) fn open(context: &Arc<AgentContext>) -> Result<Containers> {
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
                Err(error) => tracing::error!("container of {id}: {error}"),
            }
        }
        Ok(Containers {
            context: Arc::clone(context),
            known: Arc::new(Mutex::new(known)),
        })
    }

    /// Begins a move, if nothing is in its way.
    async fn begin(&self, begin: ContainerBegin) -> Result<Arc<Session>> {
        begin.check().map_err(|error| {
            Error::wrap(Kind::Protocol, "this container cannot come here", error)
        })?;
        let problems = self.problems(&begin).await?;
        if !problems.is_empty() {
            return Err(Error::new(Kind::Usage, problems.join("; ")));
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let under_way = known.values().filter(|session| !session.is_decided());
        if under_way.count() >= MIGRATIONS_MAX {
            let text = format!("{MIGRATIONS_MAX} containers are under way: try again later");
            return Err(Error::new(Kind::Usage, text));
        }
        let id = begin.id.clone();
        let session = Session::begin(&self.context, begin)?;
        known.insert(id, Arc::clone(&session));
        Ok(session)
    }

    /// What is in the way of a container here.
    async fn problems(&self, begin: &ContainerBegin) -> Result<Vec<String>> {
        let wanted = Wanted {
            container: None,
            addresses: begin.addresses.clone(),
            files: WantedFiles::default(),
        };
        let mut problems = self.context.check(&wanted).await?.problems;
        if let Some(overlay) = &begin.overlay
            && self.context.layers.missing(overlay).is_none()
        {
            let text = "the destination cannot mount an overlay: let layers travel as files (--layers never)";
            problems.push(text.to_owned());
        }
        let config = &begin.container.config;
        problems.extend(bundle::sources_missing(config, &[], "at the destination"));
        problems.extend(refusal(&begin.container));
        let id = &begin.container.id;
        match self.context.runtime(&begin.container) {
            Err(error) => problems.push(format!("at the destination: {error}")),
            Ok(runtime) => {
                if let Some(state) = runtime.state(id).await? {
                    problems.push(format!(
                        "the destination has a container {id} already ({}): delete it there",
                        state.status
                    ));
                }
            }
        }
        Ok(problems)
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
