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

mod http;
mod runner;
mod service;
mod session;
mod snapshot;

use std::sync::Arc;

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::ReplayBegin;

pub(super) use http::router;

use super::session_table::SessionTable;
use session::Session;

/// All of one agent's.
pub(super) type Replays = SessionTable<Session>;

impl Replays {
    /// Begins a move.
    fn begin(&self, begin: ReplayBegin) -> Result<Arc<Session>> {
        begin.check().map_err(|error| {
            Error::wrap(Kind::Protocol, "this service cannot be received", error)
        })?;
        let id = begin.id.clone();
        self.add(&id, || Session::begin(self.context(), begin))
    }
}
