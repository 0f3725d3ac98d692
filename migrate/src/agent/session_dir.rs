//! The directory of one migration at the agent, of whichever kind.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use pageferry::error::{Error, Kind, Result};
use pageferry::migration::events::Writer;
use pageferry::migration::messages::MigrationId;
use serde::Serialize;

use super::context::AgentContext;
use crate::events::Events;
use crate::records;

/// Makes the directory of `id`, with the request that began it in the file `name`.
///
/// Memory of processes, files of containers and what clients have sent lie there: it is for the agent's user alone.
pub(super) fn make<T: Serialize>(
    context: &AgentContext,
    id: &MigrationId,
    (name, begin): (&str, &T),
) -> Result<PathBuf> {
    let dir = context.dir.join(id.to_string());
    fs::create_dir(&dir).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => {
            let text = format!("there has been a migration {id} already");
            Error::new(Kind::Usage, text)
        }
        _ => Error::file("make the directory", &dir, error),
    })?;
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o700))
        .map_err(|error| Error::file("protect", &dir, error))
        .and_then(|()| records::write(&dir.join(name), begin))
        .inspect_err(|_| {
            // Nothing has begun: the name is free again.
            let _ = fs::remove_dir(&dir);
        })?;
    Ok(dir)
}

/// The event log in the directory `dir` of `id`.
pub(super) fn events(dir: &Path, id: &MigrationId) -> Events {
    let events = Events::new(Writer::Agent, Some(id.clone()));
    events.in_dir(dir);
    events
}
