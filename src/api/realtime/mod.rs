//! The data plane over HTTP: follow, append, read.

pub mod append;
pub mod event;
pub mod records;
pub mod sse;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::HeaderValue;

use super::App;
use super::error::{Failure, Route};
use super::extract::{Asker, ChannelPath};

/// Tells the SDK which SSE format this is.
const STREAM_VERSION: (&str, &str) = ("x-stream-version", "v2");

/// Where a channel ends: `X-Last-Chunk-Index` is the number of its last record, 0 when it is empty.
#[utoipa::path(head, path = "/realtime/v1/sessions/{session}/{io}", tag = "realtime",
    operation_id = "headChannel", params(("session" = String, Path), ("io" = String, Path)),
    responses((status = 200, description = "The headers",
        headers(("X-Last-Chunk-Index" = u64), ("X-Stream-Version" = String)))))]
pub async fn head(
    State(app): State<App>,
    Asker(caller): Asker,
    path: ChannelPath,
) -> Result<Response, Failure> {
    let bounds = app.sessions.bounds(&caller, &path.session, &path.channel).await;
    let tail = bounds.map_err(|error| Failure::from(error).on(Route::Load))?.tail.seq_num;
    let index = HeaderValue::from(tail.saturating_sub(1));
    Ok(([STREAM_VERSION], [("x-last-chunk-index", index)], StatusCode::OK).into_response())
}

/// As for the main channel.
#[utoipa::path(head, path = "/realtime/v1/sessions/{session}/channels/{channel}/{io}", tag = "realtime",
    operation_id = "headNamedChannel",
    params(("session" = String, Path), ("channel" = String, Path), ("io" = String, Path)),
    responses((status = 200, description = "The headers",
        headers(("X-Last-Chunk-Index" = u64), ("X-Stream-Version" = String)))))]
pub async fn head_named(app: State<App>, asker: Asker, path: ChannelPath) -> Result<Response, Failure> {
    head(app, asker, path).await
}
