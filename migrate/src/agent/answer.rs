//! Answers to requests, and errors among them.

use std::io;

use axum::Json;
use axum::body::Bytes;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use pageferry::error::{Error, Kind};
use pageferry::migration::messages::Problem;
use serde::de::DeserializeOwned;

/// An answer, or why there is none.
pub(super) type Answer<T> = Result<Json<T>, Failure>;

/// An error on its way to the caller.
pub(super) struct Failure {
    status: StatusCode,
    error: String,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let status = match error.kind() {
            Kind::Usage => StatusCode::CONFLICT,
            Kind::Protocol => StatusCode::BAD_REQUEST,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let error = error.to_string();
        Failure { status, error }
    }
}

impl Failure {
    pub(super) fn unknown(error: String) -> Failure {
        let status = StatusCode::NOT_FOUND;
        Failure { status, error }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let Failure { status, error } = self;
        tracing::warn!("a request failed: {error}");
        (status, Json(Problem { error })).into_response()
    }
}

/// Carries out what was asked, also if whoever asked is gone before the answer: half of it would leave programs that
/// nobody ends.
pub(super) async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Answer<T>> + Send + 'static,
) -> Answer<T> {
    tokio::spawn(work)
        .await
        .map_err(|error| Error::wrap(Kind::Io, "a request was ended", io::Error::other(error)))?
}

pub(super) fn parse<T: DeserializeOwned>(body: &Bytes) -> Result<T, Failure> {
    serde_json::from_slice(body)
        .map_err(|error| Error::wrap(Kind::Protocol, "the request is not understood", error).into())
}
