//! The requests about layers; docs/openapi.json describes them.

use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use pageferry::error::{Error, Kind};
use pageferry::limits::MIGRATION_JSON_BYTES_MAX;
use pageferry::migration::messages::{Digest, Seal};

use super::answer::{Answer, Failure, parse, to_its_end};
use super::incoming::{blocking, store_tree};
use super::layers::LayerStore;

/// What is answered about layers.
pub(super) fn router(store: Arc<LayerStore>) -> Router {
    Router::new()
        .route("/v1/layers/{digest}", get(layer_index).put(layer_files))
        .route("/v1/layers/{digest}/seal", post(seal_layer))
        .layer(DefaultBodyLimit::max(MIGRATION_JSON_BYTES_MAX))
        .with_state(store)
}

fn named(digest: &str) -> std::result::Result<Digest, Failure> {
    digest
        .parse()
        .map_err(|error| Error::wrap(Kind::Protocol, "the name of a layer", error).into())
}

/// What is here of a layer that arrives; the bytes are described in files/sender.rs.
async fn layer_index(
    State(store): State<Arc<LayerStore>>,
    Path(digest): Path<String>,
) -> std::result::Result<Response, Failure> {
    let layer = named(&digest)?;
    let index = blocking(move || {
        let arriving = store.begin(&layer)?;
        arriving.contact.note();
        // Whoever was at it has lost its connection.
        arriving.tree.take_turn();
        arriving.tree.index()
    });
    let index = index.await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], index).into_response())
}

async fn layer_files(
    State(store): State<Arc<LayerStore>>,
    Path(digest): Path<String>,
    body: Body,
) -> Answer<()> {
    let layer = named(&digest)?;
    let arriving = store.find(&layer)?;
    store_tree(&arriving.tree, body, || arriving.contact.note()).await?;
    Ok(Json(()))
}

async fn seal_layer(
    State(store): State<Arc<LayerStore>>,
    Path(digest): Path<String>,
    body: Bytes,
) -> Answer<()> {
    let layer = named(&digest)?;
    let seal = parse::<Seal>(&body)?;
    to_its_end(async move {
        blocking(move || store.seal(&layer, &seal)).await?;
        Ok(Json(()))
    })
    .await
}
