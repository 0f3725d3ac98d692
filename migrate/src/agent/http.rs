//! The agent's HTTP interface; docs/openapi.yaml describes it.

use std::convert::Infallible;
use std::io::{self, Read};
use std::path::{Component, Path as FilePath};
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{ConnectInfo, DefaultBodyLimit, Path, State};
use axum::http::{StatusCode, header};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use pageferry::error::{Error, Kind};
use pageferry::limits::{
    MIGRATION_IMAGE_FILES_MAX, MIGRATION_IMAGES_BYTES_MAX, MIGRATION_JSON_BYTES_MAX,
};
use pageferry::migration::messages::{
    Begin, HostFacts, MigrationId, Problem, Receiver, RestoreRequest, Status,
};
use pageferry::migration::{AgentEvent, AgentState};
use serde::de::DeserializeOwned;
use tokio_stream::wrappers::WatchStream;
use tokio_stream::{Stream, StreamExt};
use tokio_util::io::{StreamReader, SyncIoBridge};

use super::listen::{From as Caller, Listener};
use super::session::Session;
use super::sessions::Sessions;
use crate::facts;

/// An answer, or why there is none.
type Answer<T> = Result<Json<T>, Failure>;

/// An error on its way to the caller.
pub(super) struct Failure(Error);

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure(error)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = match self.0.kind() {
            Kind::Usage => StatusCode::CONFLICT,
            Kind::Protocol => StatusCode::BAD_REQUEST,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let error = self.0.to_string();
        tracing::warn!("a request failed: {error}");
        (status, Json(Problem { error })).into_response()
    }
}

/// Answers requests until the listener ends.
pub(super) async fn serve(listener: Listener, sessions: Sessions) -> io::Result<()> {
    let app = Router::new()
        .route("/v1/host", get(host))
        .route("/v1/migrations", get(list).post(begin))
        .route("/v1/migrations/{id}", get(status))
        .route("/v1/migrations/{id}/events", get(events))
        .route("/v1/migrations/{id}/rounds/{number}", post(round))
        .route(
            "/v1/migrations/{id}/rounds/{number}/stored",
            get(round_stored),
        )
        .route("/v1/migrations/{id}/pages", post(pages))
        .route("/v1/migrations/{id}/pages/stored", get(pages_stored))
        .route("/v1/migrations/{id}/images", put(images))
        .route("/v1/migrations/{id}/restore", post(restore))
        .route("/v1/migrations/{id}/commit", post(commit))
        .route("/v1/migrations/{id}/cancel", post(cancel))
        .route("/v1/migrations/{id}/complete", get(complete))
        .route("/metrics", get(metrics))
        .layer(DefaultBodyLimit::max(MIGRATION_JSON_BYTES_MAX))
        .with_state(sessions);
    let service = app.into_make_service_with_connect_info::<Caller>();
    axum::serve(listener, service).await
}

fn parse<T: DeserializeOwned>(body: &Bytes) -> Result<T, Failure> {
    serde_json::from_slice(body).map_err(|error| {
        Failure(Error::wrap(
            Kind::Protocol,
            "the request is not understood",
            error,
        ))
    })
}

fn find(sessions: &Sessions, id: &str) -> Result<Arc<Session>, Failure> {
    let id: MigrationId = id
        .parse()
        .map_err(|error| Error::wrap(Kind::Protocol, "the request's path", error))?;
    let session = sessions.find(&id)?;
    session.heard();
    Ok(session)
}

async fn host(State(sessions): State<Sessions>) -> Answer<HostFacts> {
    let place = sessions.place();
    Ok(Json(facts::of_host(&place.programs, &place.dir).await?))
}

async fn list(State(sessions): State<Sessions>) -> Json<Vec<Status>> {
    Json(sessions.statuses())
}

async fn begin(
    State(sessions): State<Sessions>,
    ConnectInfo(caller): ConnectInfo<Caller>,
    body: Bytes,
) -> Answer<Status> {
    let session = sessions.begin(parse::<Begin>(&body)?, caller.0)?;
    tracing::info!("migration {} begins, from {}", session.id(), caller.0);
    Ok(Json(session.status()))
}

async fn status(State(sessions): State<Sessions>, Path(id): Path<String>) -> Answer<Status> {
    Ok(Json(find(&sessions, &id)?.status()))
}

async fn events(
    State(sessions): State<Sessions>,
    Path(id): Path<String>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Failure> {
    let session = find(&sessions, &id)?;
    let changes = WatchStream::new(session.changes());
    let events = changes.map(move |_| {
        let event = Event::default().event("status").json_data(session.status());
        Ok(event.unwrap_or_default())
    });
    Ok(Sse::new(events))
}

async fn round(
    State(sessions): State<Sessions>,
    Path((id, number)): Path<(String, u32)>,
) -> Answer<Receiver> {
    Ok(Json(find(&sessions, &id)?.receive(Some(number)).await?))
}

async fn round_stored(
    State(sessions): State<Sessions>,
    Path((id, number)): Path<(String, u32)>,
) -> Answer<Status> {
    Ok(Json(find(&sessions, &id)?.received(Some(number)).await?))
}

async fn pages(State(sessions): State<Sessions>, Path(id): Path<String>) -> Answer<Receiver> {
    Ok(Json(find(&sessions, &id)?.receive(None).await?))
}

async fn pages_stored(State(sessions): State<Sessions>, Path(id): Path<String>) -> Answer<Status> {
    Ok(Json(find(&sessions, &id)?.received(None).await?))
}

/// Stores image files, which come as a tar stream.
async fn images(
    State(sessions): State<Sessions>,
    Path(id): Path<String>,
    body: Body,
) -> Answer<Status> {
    let session = find(&sessions, &id)?;
    if session.status().state != AgentState::Receiving {
        let text = "images cannot be stored now: the restore has begun";
        return Err(Error::new(Kind::Usage, text).into());
    }
    let dir = session.images_dir()?;
    let stream = body
        .into_data_stream()
        .map(|part| part.map_err(io::Error::other));
    let reader = SyncIoBridge::new(StreamReader::new(stream));
    let stored = tokio::task::spawn_blocking(move || unpack(reader, &dir));
    let stored = stored.await.map_err(|error| {
        Error::wrap(
            Kind::Io,
            "storing the images was ended",
            io::Error::other(error),
        )
    })?;
    stored?;
    Ok(Json(session.status()))
}

/// Unpacks plain files, and nothing else, into `dir`.
fn unpack(reader: impl Read, dir: &FilePath) -> Result<(), Error> {
    let failed = |error| Error::wrap(Kind::Protocol, "the stream of images", error);
    let mut archive = tar::Archive::new(reader.take(MIGRATION_IMAGES_BYTES_MAX));
    for (count, entry) in archive.entries().map_err(failed)?.enumerate() {
        let mut entry = entry.map_err(failed)?;
        let path = entry.path().map_err(failed)?.into_owned();
        let mut parts = path.components();
        let plain = matches!(
            (parts.next(), parts.next()),
            (Some(Component::Normal(_)), None)
        );
        let regular = entry.header().entry_type().is_file();
        if !plain || !regular || count >= MIGRATION_IMAGE_FILES_MAX {
            let text = format!("{:?} is no image file in one directory", path.display());
            return Err(Error::new(Kind::Protocol, text));
        }
        let path = dir.join(&path);
        // What arrives never replaces what is there.
        let mut file = std::fs::File::create_new(&path)
            .map_err(|error| Error::file("create", &path, error))?;
        io::copy(&mut entry, &mut file).map_err(|error| Error::file("write", &path, error))?;
    }
    Ok(())
}

async fn restore(
    State(sessions): State<Sessions>,
    Path(id): Path<String>,
    body: Bytes,
) -> Answer<Status> {
    let request = parse::<RestoreRequest>(&body)?;
    Ok(Json(find(&sessions, &id)?.restore(&request).await?))
}

/// The source's grant. The answer tells the decision, and after `committed` that the processes run.
async fn commit(State(sessions): State<Sessions>, Path(id): Path<String>) -> Answer<Status> {
    let session = find(&sessions, &id)?;
    let status = session.handle(AgentEvent::CommitAsked).await;
    if status.state != AgentState::Committed {
        return Ok(Json(status));
    }
    let runs = |status: &Status| status.resumed_us.is_some() || status.problem.is_some();
    Ok(Json(session.wait_for(runs).await))
}

async fn cancel(State(sessions): State<Sessions>, Path(id): Path<String>) -> Answer<Status> {
    let session = find(&sessions, &id)?;
    Ok(Json(session.handle(AgentEvent::AbortAsked).await))
}

/// Waits until all memory is there, or never will be.
async fn complete(State(sessions): State<Sessions>, Path(id): Path<String>) -> Answer<Status> {
    let session = find(&sessions, &id)?;
    let over = |status: &Status| match status.state {
        AgentState::Complete | AgentState::Aborted => true,
        AgentState::Committed => status.problem.is_some(),
        _ => false,
    };
    Ok(Json(session.wait_for(over).await))
}

async fn metrics(State(sessions): State<Sessions>) -> Response {
    let mut text = String::from(
        "# HELP pageferry_agent_migrations Migrations of this agent by state.\n\
         # TYPE pageferry_agent_migrations gauge\n",
    );
    let statuses = sessions.statuses();
    let states = [
        (AgentState::Receiving, "receiving"),
        (AgentState::Restoring, "restoring"),
        (AgentState::Ready, "ready"),
        (AgentState::Committed, "committed"),
        (AgentState::Complete, "complete"),
        (AgentState::Aborted, "aborted"),
    ];
    for (state, name) in states {
        let count = statuses
            .iter()
            .filter(|status| status.state == state)
            .count();
        text += &format!("pageferry_agent_migrations{{state=\"{name}\"}} {count}\n");
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}
