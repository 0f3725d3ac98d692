//! The requests about what a container prints; docs/openapi.json describes them.

use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use pageferry::limits::MIGRATION_JSON_BYTES_MAX;
use pageferry::migration::events::Step;
use pageferry::migration::messages::{OutputSeal, OutputStatus};

use super::answer::{Answer, Failure, parse, to_its_end};
use super::outputs::OutputLog;
use super::session::Session;
use super::session_table::AgentSession;
use super::sessions::Sessions;

/// What is answered about outputs.
pub(super) fn router(sessions: Sessions) -> Router {
    Router::new()
        .route("/v1/migrations/{id}/outputs/{number}", get(status))
        .route("/v1/migrations/{id}/outputs/{number}/{offset}", put(store))
        .route("/v1/migrations/{id}/outputs/{number}/seal", post(seal))
        .layer(DefaultBodyLimit::max(MIGRATION_JSON_BYTES_MAX))
        .with_state(sessions)
}

fn output(session: &Session, number: usize) -> Result<&OutputLog, Failure> {
    let id = session.id();
    let output = session.outputs.get(number);
    output.ok_or_else(|| Failure::unknown(format!("migration {id} has no output {number}")))
}

async fn status(
    State(sessions): State<Sessions>,
    Path((id, number)): Path<(String, usize)>,
) -> Answer<OutputStatus> {
    let session = sessions.find(&id)?;
    Ok(Json(output(&session, number)?.status()?))
}

/// Appends to the source's part of a log.
async fn store(
    State(sessions): State<Sessions>,
    Path((id, number, offset)): Path<(String, usize, u64)>,
    body: Body,
) -> Answer<OutputStatus> {
    let session = sessions.find(&id)?;
    let stored = output(&session, number)?.store(offset, body).await;
    session.contact().note();
    Ok(Json(stored?))
}

/// The source's part of a log is whole.
async fn seal(
    State(sessions): State<Sessions>,
    Path((id, number)): Path<(String, usize)>,
    body: Bytes,
) -> Answer<OutputStatus> {
    let seal = parse::<OutputSeal>(&body)?;
    let session: Arc<Session> = sessions.find(&id)?;
    to_its_end(async move {
        let sealed = output(&session, number)?.seal(seal.bytes).await;
        session.events.ended(Step::Output, &sealed);
        Ok(Json(sealed?))
    })
    .await
}
