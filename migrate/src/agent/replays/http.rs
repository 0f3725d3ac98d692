//! The requests about services that are told a log; docs/openapi.json describes them.

use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use pageferry::error::{Error, Kind};
use pageferry::limits::MIGRATION_JSON_BYTES_MAX;
use pageferry::migration::messages::{
    ReplayAddresses, ReplayBegin, ReplayFinish, ReplayStart, ReplayStatus,
};

use super::Replays;
use crate::agent::answer::{Answer, parse, to_its_end};
use crate::agent::session_table::AgentSession;

/// What is answered about services.
pub(in crate::agent) fn router(replays: Replays) -> Router {
    Router::new()
        .route("/v1/replays", post(begin))
        .route("/v1/replays/{id}", get(status))
        .route("/v1/replays/{id}/snapshot", put(snapshot))
        .route("/v1/replays/{id}/start", post(start))
        .route("/v1/replays/{id}/log/{number}", post(log))
        .route("/v1/replays/{id}/finish", post(finish))
        .route("/v1/replays/{id}/keep", post(keep))
        .route("/v1/replays/{id}/addresses", post(addresses))
        .route("/v1/replays/{id}/resume", post(resume))
        .route("/v1/replays/{id}/cancel", post(cancel))
        .layer(DefaultBodyLimit::max(MIGRATION_JSON_BYTES_MAX))
        .with_state(replays)
}

async fn begin(State(replays): State<Replays>, body: Bytes) -> Answer<ReplayStatus> {
    let session = replays.begin(parse::<ReplayBegin>(&body)?)?;
    tracing::info!("service {} is to come", session.id());
    Ok(Json(session.status()))
}

async fn status(State(replays): State<Replays>, Path(id): Path<String>) -> Answer<ReplayStatus> {
    Ok(Json(replays.find(&id)?.status()))
}

/// Takes what the service starts from.
async fn snapshot(
    State(replays): State<Replays>,
    Path(id): Path<String>,
    body: Body,
) -> Answer<ReplayStatus> {
    let session = replays.find(&id)?;
    to_its_end(async move {
        session.store(body).await?;
        session.contact().note();
        Ok(Json(session.status()))
    })
    .await
}

/// Starts it; answered when it takes connections.
async fn start(
    State(replays): State<Replays>,
    Path(id): Path<String>,
    body: Bytes,
) -> Answer<ReplayStatus> {
    let request = parse::<ReplayStart>(&body)?;
    let session = replays.find(&id)?;
    to_its_end(async move { Ok(Json(session.start(&request).await?)) }).await
}

/// Takes the next part of the log.
async fn log(
    State(replays): State<Replays>,
    Path((id, number)): Path<(String, u64)>,
    body: Bytes,
) -> Answer<ReplayStatus> {
    let session = replays.find(&id)?;
    to_its_end(async move { Ok(Json(session.take(number, body).await?)) }).await
}

async fn finish(
    State(replays): State<Replays>,
    Path(id): Path<String>,
    body: Bytes,
) -> Answer<ReplayStatus> {
    let request = parse::<ReplayFinish>(&body)?;
    request
        .check()
        .map_err(|error| Error::wrap(Kind::Protocol, "this cannot be asked", error))?;
    let session = replays.find(&id)?;
    to_its_end(async move { Ok(Json(session.finish(&request).await?)) }).await
}

async fn keep(State(replays): State<Replays>, Path(id): Path<String>) -> Answer<ReplayStatus> {
    let session = replays.find(&id)?;
    to_its_end(async move { Ok(Json(session.keep().await?)) }).await
}

async fn addresses(
    State(replays): State<Replays>,
    Path(id): Path<String>,
    body: Bytes,
) -> Answer<ReplayStatus> {
    let request = parse::<ReplayAddresses>(&body)?;
    request
        .check()
        .map_err(|error| Error::wrap(Kind::Protocol, "these cannot be received", error))?;
    let session = replays.find(&id)?;
    to_its_end(async move { Ok(Json(session.move_addresses(request.up).await?)) }).await
}

async fn resume(State(replays): State<Replays>, Path(id): Path<String>) -> Answer<ReplayStatus> {
    let session = replays.find(&id)?;
    to_its_end(async move { Ok(Json(session.resume().await?)) }).await
}

async fn cancel(State(replays): State<Replays>, Path(id): Path<String>) -> Answer<ReplayStatus> {
    let session = replays.find(&id)?;
    to_its_end(async move { Ok(Json(session.cancel().await?)) }).await
}
