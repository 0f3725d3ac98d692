//! Logs of both sides, beside the report: what happened there is told in one event log, and the files in which programs
//! say what went wrong are fetched if a migration fails.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pageferry::error::{Error, Result};
use pageferry::limits::LOG_FETCH_BYTES_MAX;
use pageferry::migration::events::{Side, Step};
use pageferry::migration::messages::MigrationId;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use crate::client::{AgentClient, is_of_agent};
use crate::events::{Details, Events, read_end};

/// How long all logs of the other side may take.
const LIMIT: Duration = Duration::from_secs(10);

/// Logs that an agent may have of a migration, by the names of its interface.
const THERE: [&str; 5] = ["criu", "runtime", "lazy-client", "page-server", "service"];

/// Logs here, in the directory of the migration.
const HERE: [(&str, &str); 7] = [
    ("criu", "images/dump.log"),
    ("runtime", "images/runtime.log"),
    ("runtime", "runtime.log"),
    ("page-server", "memory.log"),
    ("page-server", "forwarder.log"),
    ("guard", "guard.log"),
    ("hooks", "hooks.log"),
];

/// A log that was stored.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct LogFile {
    /// The host that it is from.
    pub(crate) side: Side,
    /// The program whose log it is: `criu`, `runtime`, `lazy-client`, `page-server`, `service`.
    pub(crate) program: String,
    /// Where it is here: the last part of the log, at most 1 MiB.
    pub(crate) path: PathBuf,
}

/// Where logs are stored: beside the report, or in the directory of the migration without one.
pub(super) fn place(report: Option<&Path>, dir: &Path) -> PathBuf {
    match report {
        Some(report) => {
            let mut name = report.as_os_str().to_owned();
            name.push(".logs");
            PathBuf::from(name)
        }
        None => dir.join("logs"),
    }
}

/// Brings what the destination's event log says into this one.
pub(super) async fn merge(client: &AgentClient, id: &MigrationId, events: &Events) {
    let path = format!("/v1/logs/{id}/events");
    let asked = timeout(LIMIT, client.get_bytes(&path, LOG_FETCH_BYTES_MAX)).await;
    let why = match asked {
        Ok(Ok(text)) => return events.merge(&text),
        // An agent that never heard of it has nothing to tell.
        Ok(Err(error)) if is_of_agent(&error) => return tracing::debug!("{error}"),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer after {} s", LIMIT.as_secs()),
    };
    let text = format!("the destination's events are missing: {why}");
    events.note(Step::Logs, Details::text(text));
}

/// Stores the logs of both sides in `to`. What cannot be had is missing, and that is told in the event log.
pub(super) async fn collect(
    client: &AgentClient,
    id: &MigrationId,
    (dir, to): (&Path, &Path),
    events: &Events,
) -> Vec<LogFile> {
    events.begin(Step::Logs);
    let mut stored = Vec::new();
    let here = HERE
        .iter()
        .filter_map(|(program, file)| Some((*program, read_end(&dir.join(file)).ok()?)));
    for (program, text) in here {
        stored.extend(store(to, Side::Source, program, &text, &stored));
    }
    let fetched = timeout(LIMIT, async {
        let mut logs = Vec::new();
        for program in THERE {
            let path = format!("/v1/logs/{id}/{program}");
            match client.get_bytes(&path, LOG_FETCH_BYTES_MAX).await {
                Ok(text) => logs.push((program, text)),
                Err(error) if is_of_agent(&error) => tracing::debug!("{error}"),
                Err(error) => return (logs, Some(error.to_string())),
            }
        }
        (logs, None)
    });
    let (logs, problem) = fetched.await.unwrap_or_else(|_| {
        let text = format!("no answer after {} s", LIMIT.as_secs());
        (Vec::new(), Some(text))
    });
    for (program, text) in logs {
        stored.extend(store(to, Side::Destination, program, &text, &stored));
    }
    match problem {
        Some(problem) => {
            let text = format!("the destination's logs are missing: {problem}");
            events.failed(Step::Logs, Details::text(text));
        }
        None => {
            let details = Details::text(to.display().to_string());
            events.done(Step::Logs, details);
        }
    }
    stored
}

/// Both, for whoever finishes a migration whose command died.
pub(super) async fn at_end(
    client: &AgentClient,
    id: &MigrationId,
    dir: &Path,
    (events, moved): (&Events, bool),
) {
    merge(client, id, events).await;
    if !moved {
        collect(client, id, (dir, &place(None, dir)), events).await;
    }
    let text = if moved { "moved" } else { "it runs here" };
    events.done(Step::End, Details::text(text));
}

/// Stores one log, unless it is empty or there is one of this program.
fn store(to: &Path, side: Side, program: &str, text: &[u8], stored: &[LogFile]) -> Option<LogFile> {
    let is_there = |log: &LogFile| log.side == side && log.program == program;
    if text.is_empty() || stored.iter().any(is_there) {
        return None;
    }
    let path = to.join(format!("{}-{program}.log", side.name()));
    match write(to, &path, text) {
        Ok(()) => Some(LogFile {
            side,
            program: program.to_owned(),
            path,
        }),
        Err(error) => {
            tracing::warn!("{error}");
            None
        }
    }
}

fn write(to: &Path, path: &Path, text: &[u8]) -> Result<()> {
    fs::create_dir_all(to).map_err(|error| Error::file("make the directory", to, error))?;
    // Names and addresses of processes' memory are nobody else's business.
    fs::set_permissions(to, fs::Permissions::from_mode(0o700))
        .map_err(|error| Error::file("protect", to, error))?;
    fs::write(path, text).map_err(|error| Error::file("write", path, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_lie_beside_the_report() {
        let dir = Path::new("/state/m-1");
        let beside = place(Some(Path::new("/tmp/move.json")), dir);
        assert_eq!(beside, Path::new("/tmp/move.json.logs"));
        assert_eq!(place(None, dir), Path::new("/state/m-1/logs"));
    }

    #[test]
    fn the_first_log_of_a_program_is_stored() {
        let tmp = tempfile::tempdir().unwrap();
        let to = tmp.path().join("logs");
        assert_eq!(store(&to, Side::Source, "criu", b"", &[]), None);
        let first = store(&to, Side::Source, "criu", b"1", &[]).unwrap();
        let stored = [first];
        assert_eq!(store(&to, Side::Source, "criu", b"2", &stored), None);
        let there = store(&to, Side::Destination, "criu", b"3", &stored).unwrap();
        assert_eq!(fs::read(&stored[0].path).unwrap(), b"1");
        assert!(there.path.ends_with("destination-criu.log"));
        let mode = fs::metadata(&to).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }
}
