//! All migrations of processes with their memory at one agent.

use std::net::IpAddr;
use std::sync::Arc;

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::messages::{Begin, Status};

use super::free_pids;
use super::session::Session;
use super::session_table::SessionTable;

/// See the module's text.
pub(super) type Sessions = SessionTable<Session>;

impl Sessions {
    /// Begins the migration that the host at `from` asks for.
    pub(super) fn begin(&self, begin: Begin, from: IpAddr) -> Result<Arc<Session>> {
        let wrong = |error| Error::wrap(Kind::Protocol, "this migration cannot be begun", error);
        begin.check().map_err(wrong)?;
        if begin.container.is_none() {
            free_pids::leave_free(&begin.pids);
        }
        let id = begin.id.clone();
        self.add(&id, || Session::begin(self.context(), begin, from))
    }

    pub(super) fn statuses(&self) -> Vec<Status> {
        self.all().iter().map(|session| session.status()).collect()
    }
}
