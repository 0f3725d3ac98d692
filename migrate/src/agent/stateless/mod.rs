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

use std::sync::Arc;

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::{ContainerBegin, Wanted, WantedFiles};

pub(super) use http::router;

use super::containers::refusal;
use super::session_table::SessionTable;
use crate::runtime::bundle;
use session::Session;

/// All of one agent's.
pub(super) type Containers = SessionTable<Session>;

impl Containers {
    /// Begins a move, if nothing is in its way.
    async fn begin(&self, begin: ContainerBegin) -> Result<Arc<Session>> {
        begin.check().map_err(|error| {
            Error::wrap(Kind::Protocol, "this container cannot be received", error)
        })?;
        let problems = self.problems(&begin).await?;
        if !problems.is_empty() {
            return Err(Error::new(Kind::Usage, problems.join("; ")));
        }
        let id = begin.id.clone();
        self.add(&id, || Session::begin(self.context(), begin))
    }

    /// What is in the way of a container here.
    async fn problems(&self, begin: &ContainerBegin) -> Result<Vec<String>> {
        let wanted = Wanted {
            container: None,
            addresses: begin.addresses.clone(),
            files: WantedFiles::default(),
        };
        let mut problems = self.context().check(&wanted).await?.problems;
        if let Some(overlay) = &begin.overlay
            && self.context().layers.missing(overlay).is_none()
        {
            let text = "the destination cannot mount an overlay: let layers travel as files (--layers never)";
            problems.push(text.to_owned());
        }
        let config = &begin.container.config;
        problems.extend(bundle::sources_missing(config, &[], "at the destination"));
        problems.extend(refusal(&begin.container));
        let id = &begin.container.id;
        match self.context().runtime(&begin.container) {
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
}
