//! The requests for logs of a migration, of whatever kind it is; docs/openapi.json describes them.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use pageferry::error::{Error, Kind};
use pageferry::migration::messages::MigrationId;

use super::answer::Failure;
use super::context::AgentContext;
use crate::events::{EVENTS, read_end};

/// What is answered about logs.
pub(super) fn router(context: Arc<AgentContext>) -> Router {
    Router::new()
        .route("/v1/logs/{id}/{name}", get(log))
        .with_state(context)
}

/// Where a log is, in the directory of a migration: the first of these that is there.
fn places(name: &str) -> Option<&'static [&'static str]> {
    let places: &[&str] = match name {
        "events" => &[EVENTS],
        "criu" => &["images/restore.log"],
        "runtime" => &["images/runtime.log", "runtime.log"],
        "lazy-client" => &["images/lazy.log"],
        "page-server" => &["images/receive.log"],
        "service" => &["service.log"],
        _ => return None,
    };
    Some(places)
}

/// The end of a log.
async fn log(
    State(context): State<Arc<AgentContext>>,
    Path((id, name)): Path<(String, String)>,
) -> Result<Response, Failure> {
    let id: MigrationId = id
        .parse()
        .map_err(|error| Error::wrap(Kind::Protocol, "the request's path", error))?;
    let unknown = || Failure::unknown(format!("migration {id} has no log {name} here"));
    let dir = context.dir.join(id.to_string());
    let files = places(&name).ok_or_else(unknown)?;
    let files: Vec<PathBuf> = files.iter().map(|file| dir.join(file)).collect();
    let path = files.into_iter().find(|path| path.is_file());
    let path = path.ok_or_else(unknown)?;
    let read = path.clone();
    let bytes = tokio::task::spawn_blocking(move || read_end(&read)).await;
    let bytes = bytes.map_err(io::Error::other).and_then(|read| read);
    let bytes = bytes.map_err(|error| Error::file("read", &path, error))?;
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], bytes).into_response())
}
