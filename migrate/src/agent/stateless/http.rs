//! The requests about containers that are started anew; docs/openapi.json describes them.

use std::io;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use pageferry::error::{Error, Kind, Result};
use pageferry::limits::MIGRATION_JSON_BYTES_MAX;
use pageferry::migration::events::Step;
use pageferry::migration::messages::{
    ContainerAddresses, ContainerBegin, ContainerCreate, ContainerStart, ContainerStatus,
};
use tokio::io::{AsyncWriteExt, DuplexStream};
use tokio::time::timeout;
use tokio_stream::StreamExt;
use tokio_util::io::SyncIoBridge;

use super::Containers;
use crate::agent::answer::{Answer, parse, to_its_end};
use crate::agent::session_table::AgentSession;

/// How long a source may be silent within an image.
const IMAGE_SILENCE: Duration = Duration::from_secs(60);

/// Buffered between the connection and the unpacking of an image, bytes.
const BUFFER_BYTES: usize = 256 << 10;

/// What is answered about containers.
pub(in crate::agent) fn router(containers: Containers) -> Router {
    Router::new()
        .route("/v1/containers", post(begin))
        .route("/v1/containers/{id}", get(status))
        .route("/v1/containers/{id}/image", put(image))
        .route("/v1/containers/{id}/create", post(create))
        .route("/v1/containers/{id}/start", post(start))
        .route("/v1/containers/{id}/keep", post(keep))
        .route("/v1/containers/{id}/addresses", post(addresses))
        .route("/v1/containers/{id}/cancel", post(cancel))
        .layer(DefaultBodyLimit::max(MIGRATION_JSON_BYTES_MAX))
        .with_state(containers)
}

async fn begin(State(containers): State<Containers>, body: Bytes) -> Answer<ContainerStatus> {
    let begin = parse::<ContainerBegin>(&body)?;
    to_its_end(async move {
        let session = containers.begin(begin).await?;
        tracing::info!("container {} is to come", session.id());
        Ok(Json(session.status()))
    })
    .await
}

async fn status(
    State(containers): State<Containers>,
    Path(id): Path<String>,
) -> Answer<ContainerStatus> {
    Ok(Json(containers.find(&id)?.status()))
}

/// Takes the files of the container: a layer without whiteouts, compressed by zstd.
async fn image(
    State(containers): State<Containers>,
    Path(id): Path<String>,
    body: Body,
) -> Answer<ContainerStatus> {
    let session = containers.find(&id)?;
    to_its_end(async move {
        session.events.begin(Step::Files);
        let (near, far) = tokio::io::duplex(BUFFER_BYTES);
        let passed = tokio::spawn(pass(body, near));
        let stored = session.store(SyncIoBridge::new(far)).await;
        // What was stored may be whole for the unpacking, and the connection broken all the same.
        let passed = passed.await.map_err(|error| {
            Error::wrap(Kind::Io, "an image was ended", io::Error::other(error))
        })?;
        let stored = stored.and(passed);
        session.events.ended(Step::Files, &stored);
        stored?;
        session.contact().note();
        Ok(Json(session.status()))
    })
    .await
}

/// Passes an image on, as long as it comes.
async fn pass(body: Body, mut to: DuplexStream) -> Result<()> {
    let mut parts = body.into_data_stream();
    loop {
        let next = timeout(IMAGE_SILENCE, parts.next()).await.map_err(|_| {
            let text = format!(
                "nothing of the image arrived for {} s",
                IMAGE_SILENCE.as_secs()
            );
            Error::new(Kind::PeerLost, text)
        })?;
        let Some(part) = next else {
            return Ok(());
        };
        let part =
            part.map_err(|error| Error::wrap(Kind::PeerLost, "the image breaks off", error))?;
        if to.write_all(&part).await.is_err() {
            // Whoever unpacks has stopped reading, and says why.
            return Ok(());
        }
    }
}

async fn create(
    State(containers): State<Containers>,
    Path(id): Path<String>,
    body: Bytes,
) -> Answer<ContainerStatus> {
    let request = parse::<ContainerCreate>(&body)?;
    let session = containers.find(&id)?;
    to_its_end(async move {
        let made = session.create(&request).await;
        if made.is_err() {
            session.events.ended(Step::Start, &made);
        }
        Ok(Json(made?))
    })
    .await
}

/// Starts it, and answers when it is ready.
async fn start(
    State(containers): State<Containers>,
    Path(id): Path<String>,
    body: Bytes,
) -> Answer<ContainerStatus> {
    let request = parse::<ContainerStart>(&body)?;
    let session = containers.find(&id)?;
    to_its_end(async move { Ok(Json(session.start_with_events(&request).await?)) }).await
}

async fn keep(
    State(containers): State<Containers>,
    Path(id): Path<String>,
) -> Answer<ContainerStatus> {
    let session = containers.find(&id)?;
    to_its_end(async move { Ok(Json(session.keep().await?)) }).await
}

async fn addresses(
    State(containers): State<Containers>,
    Path(id): Path<String>,
    body: Bytes,
) -> Answer<ContainerStatus> {
    let request = parse::<ContainerAddresses>(&body)?;
    let session = containers.find(&id)?;
    to_its_end(async move { Ok(Json(session.move_addresses(request.up).await?)) }).await
}

async fn cancel(
    State(containers): State<Containers>,
    Path(id): Path<String>,
) -> Answer<ContainerStatus> {
    let session = containers.find(&id)?;
    to_its_end(async move { Ok(Json(session.cancel().await)) }).await
}
