//! The agent's HTTP interface; docs/openapi.json describes it.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{ConnectInfo, DefaultBodyLimit, Path, State};
use axum::http::{HeaderMap, header};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use pageferry::error::{Error, Kind};
use pageferry::limits::MIGRATION_JSON_BYTES_MAX;
use pageferry::migration::events::Step;
use pageferry::migration::messages::{
    Begin, Check, HostFacts, Receiver, RestoreRequest, Seal, Status, Wanted,
};
use pageferry::migration::{AgentEvent, AgentState};
use tokio_stream::wrappers::WatchStream;
use tokio_stream::{Stream, StreamExt};
use tokio_util::io::{StreamReader, SyncIoBridge};

use super::answer::{Answer, Failure, parse, to_its_end};
use super::file_trees::wanted as wanted_files;
use super::listen::{From as Caller, Listener};
use super::session::Session;
use super::session_table::AgentSession;
use super::sessions::Sessions;
use crate::facts;
use crate::image_stream::unpack;

/// What who wants a stream of events accepts.
const EVENT_STREAM: &str = "text/event-stream";

/// Answers requests until the listener ends.
pub(super) async fn serve(listener: Listener, app: Router) -> io::Result<()> {
    let service = app.into_make_service_with_connect_info::<Caller>();
    axum::serve(listener, service).await
}

/// What is answered about migrations and the host.
pub(super) fn router(sessions: Sessions) -> Router {
    Router::new()
        .route("/v1/host", get(host))
        .route("/v1/check", post(check))
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
        .route(
            "/v1/migrations/{id}/files/{number}",
            get(file_index).put(files),
        )
        .route("/v1/migrations/{id}/files/{number}/seal", post(seal_files))
        .route("/v1/migrations/{id}/restore", post(restore))
        .route("/v1/migrations/{id}/commit", post(commit))
        .route("/v1/migrations/{id}/cancel", post(cancel))
        .route("/v1/migrations/{id}/complete", get(complete))
        .route("/metrics", get(metrics))
        .layer(DefaultBodyLimit::max(MIGRATION_JSON_BYTES_MAX))
        .with_state(sessions)
}

async fn host(State(sessions): State<Sessions>) -> Answer<HostFacts> {
    let context = sessions.context();
    Ok(Json(facts::of_host(&context.programs, &context.dir).await?))
}

async fn list(State(sessions): State<Sessions>) -> Json<Vec<Status>> {
    Json(sessions.statuses())
}

/// Looks at what is to come, and changes nothing.
async fn check(State(sessions): State<Sessions>, body: Bytes) -> Answer<Check> {
    let wanted = parse::<Wanted>(&body)?;
    Ok(Json(sessions.context().check(&wanted).await?))
}

async fn begin(
    State(sessions): State<Sessions>,
    ConnectInfo(caller): ConnectInfo<Caller>,
    body: Bytes,
) -> Answer<Status> {
    let begin = parse::<Begin>(&body)?;
    let wanted = Wanted {
        container: begin.container.clone(),
        addresses: begin.addresses.clone(),
        files: wanted_files(&begin),
    };
    let check = sessions.context().check(&wanted).await?;
    if !check.problems.is_empty() {
        return Err(Error::new(Kind::Usage, check.problems.join("; ")).into());
    }
    let session = sessions.begin(begin, caller.0)?;
    tracing::info!("migration {} begins, from {}", session.id(), caller.0);
    Ok(Json(session.status()))
}

/// Where a migration stands: once, or for who accepts a stream of events at each change.
async fn status(
    State(sessions): State<Sessions>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let session = sessions.find(&id)?;
    let accepted = headers.get_all(header::ACCEPT).iter();
    let mut accepted = accepted.filter_map(|value| value.to_str().ok());
    match accepted.any(|value| value.contains(EVENT_STREAM)) {
        true => Ok(stream_of(session).into_response()),
        false => Ok(Json(session.status()).into_response()),
    }
}

async fn events(
    State(sessions): State<Sessions>,
    Path(id): Path<String>,
) -> Result<Response, Failure> {
    Ok(stream_of(sessions.find(&id)?).into_response())
}

fn stream_of(session: Arc<Session>) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let changes = WatchStream::new(session.changes());
    let events = changes.map(move |_| {
        let event = Event::default().event("status").json_data(session.status());
        Ok(event.unwrap_or_default())
    });
    Sse::new(events)
}

async fn round(
    State(sessions): State<Sessions>,
    Path((id, number)): Path<(String, u32)>,
) -> Answer<Receiver> {
    let session = sessions.find(&id)?;
    to_its_end(async move { Ok(Json(session.receive(Some(number)).await?)) }).await
}

async fn round_stored(
    State(sessions): State<Sessions>,
    Path((id, number)): Path<(String, u32)>,
) -> Answer<Status> {
    let session = sessions.find(&id)?;
    to_its_end(async move { Ok(Json(session.received(Some(number)).await?)) }).await
}

async fn pages(State(sessions): State<Sessions>, Path(id): Path<String>) -> Answer<Receiver> {
    let session = sessions.find(&id)?;
    to_its_end(async move { Ok(Json(session.receive(None).await?)) }).await
}

async fn pages_stored(State(sessions): State<Sessions>, Path(id): Path<String>) -> Answer<Status> {
    let session = sessions.find(&id)?;
    to_its_end(async move { Ok(Json(session.received(None).await?)) }).await
}

/// Stores image files, which come as a tar stream.
async fn images(
    State(sessions): State<Sessions>,
    Path(id): Path<String>,
    body: Body,
) -> Answer<Status> {
    let session = sessions.find(&id)?;
    if session.status().state != AgentState::Receiving {
        let text = "images cannot be stored now: the restore has begun";
        return Err(Error::new(Kind::Usage, text).into());
    }
    let dir = session.images_dir()?;
    let stream = body
        .into_data_stream()
        .map(|part| part.map_err(io::Error::other));
    let reader = SyncIoBridge::new(StreamReader::new(stream));
    session.events.begin(Step::Images);
    let stored = tokio::task::spawn_blocking(move || unpack(reader, &dir));
    let stored = stored.await.map_err(|error| {
        Error::wrap(
            Kind::Io,
            "storing the images was ended",
            io::Error::other(error),
        )
    })?;
    session.events.ended(Step::Images, &stored);
    stored?;
    Ok(Json(session.status()))
}

/// What a tree of files holds by now; the bytes are described in files/sender.rs.
async fn file_index(
    State(sessions): State<Sessions>,
    Path((id, number)): Path<(String, usize)>,
) -> Result<Response, Failure> {
    let session = sessions.find(&id)?;
    let index = session.file_index(number).await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], index).into_response())
}

/// Stores what has changed of a tree of files.
async fn files(
    State(sessions): State<Sessions>,
    Path((id, number)): Path<(String, usize)>,
    body: Body,
) -> Answer<Status> {
    let session = sessions.find(&id)?;
    session.store_files(number, body).await?;
    Ok(Json(session.status()))
}

async fn seal_files(
    State(sessions): State<Sessions>,
    Path((id, number)): Path<(String, usize)>,
    body: Bytes,
) -> Answer<Status> {
    let seal = parse::<Seal>(&body)?;
    let session = sessions.find(&id)?;
    session.events.begin(Step::Files);
    let sealed = session.seal_files(number, seal).await;
    session.events.ended(Step::Files, &sealed);
    sealed?;
    Ok(Json(session.status()))
}

async fn restore(
    State(sessions): State<Sessions>,
    Path(id): Path<String>,
    body: Bytes,
) -> Answer<Status> {
    let request = parse::<RestoreRequest>(&body)?;
    let session = sessions.find(&id)?;
    to_its_end(async move { Ok(Json(session.restore(&request).await?)) }).await
}

/// The source's grant. The answer tells the decision, and after `committed` that the processes run.
async fn commit(State(sessions): State<Sessions>, Path(id): Path<String>) -> Answer<Status> {
    let session = sessions.find(&id)?;
    to_its_end(commit_session(session)).await
}

async fn commit_session(session: Arc<Session>) -> Answer<Status> {
    if !session.is_decided() && !session.has_memory() {
        session
            .fail("lazy-client has ended before the processes ran")
            .await;
    }
    let status = session.handle(AgentEvent::CommitAsked).await;
    if status.state != AgentState::Committed {
        return Ok(Json(status));
    }
    let runs = |status: &Status| status.resumed_us.is_some() || status.problem.is_some();
    Ok(Json(session.wait_for(runs).await))
}

async fn cancel(State(sessions): State<Sessions>, Path(id): Path<String>) -> Answer<Status> {
    let session = sessions.find(&id)?;
    to_its_end(async move { Ok(Json(session.handle(AgentEvent::AbortAsked).await)) }).await
}

/// Waits until all memory is there, or never will be.
async fn complete(State(sessions): State<Sessions>, Path(id): Path<String>) -> Answer<Status> {
    let session = sessions.find(&id)?;
    let over = |status: &Status| match status.state {
        AgentState::Complete | AgentState::Aborted => true,
        AgentState::Committed => status.problem.is_some(),
        _ => false,
    };
    Ok(Json(session.wait_for(over).await))
}

async fn metrics(State(sessions): State<Sessions>) -> Response {
    let text = metrics_of(&sessions.statuses());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

/// What there is to be counted, in the text format of Prometheus.
pub(crate) fn metrics_of(statuses: &[Status]) -> String {
    let mut text = String::from(
        "# HELP pageferry_agent_migrations Migrations of this agent by state.\n\
         # TYPE pageferry_agent_migrations gauge\n",
    );
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
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    /// tests/agent_http.rs asks for all that is documented; here all that there is must be documented.
    #[test]
    fn docs_name_each_route() {
        let document = include_str!("../../../docs/openapi.json");
        let document: serde_json::Value = serde_json::from_str(document).unwrap();
        let documented: BTreeSet<&str> = document["paths"]
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        let code = [
            include_str!("http.rs"),
            include_str!("layers_http.rs"),
            include_str!("logs_http.rs"),
            include_str!("outputs_http.rs"),
            include_str!("replays/http.rs"),
            include_str!("stateless/http.rs"),
        ];
        let routes: BTreeSet<&str> = code
            .iter()
            .flat_map(|code| code.split("#[cfg(test)]").next())
            .flat_map(|code| code.split('"'))
            .filter(|text| text.starts_with("/v1/") || *text == "/metrics")
            .collect();
        assert_eq!(routes, documented);
    }
}
