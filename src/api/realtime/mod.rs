//! The data plane over HTTP: follow, append, read.

pub mod append;
pub mod event;
pub mod records;
pub mod sse;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::{HeaderName, HeaderValue};

use super::App;
use super::error::{Failure, Route};
use super::extract::{Asker, ChannelPath};
use super::trace::RequestId;
use crate::domain::{Caller, Result, SeqNum};

/// Tells the SDK which SSE format this is.
const STREAM_VERSION: (&str, &str) = ("x-stream-version", "v2");
/// The channel's tail, where a reader has asked for what comes after a record that the channel does not have.
const CURSOR_AHEAD: HeaderName = HeaderName::from_static("x-cursor-ahead");

/// What is said to whoever asks for the records from `start` on, if that lies beyond the tail: records that were given out
/// are lost, or the cursor is another channel's. A refusal would be taken for an outage by the SDK, which asks again and
/// again; so the answer goes on at the tail and says it.
async fn cursor_ahead(
    app: &App,
    caller: &Caller,
    path: &ChannelPath,
    start: SeqNum,
    id: &RequestId,
) -> Result<Option<(HeaderName, HeaderValue)>> {
    if start == 0 {
        return Ok(None);
    }
    let tail = app.sessions.tail_before(caller, &path.session, &path.channel, start).await?;
    Ok(tail.map(|tail| {
        app.metrics.cursor_ahead();
        tracing::warn!(
            request.id = id.as_str(), session.id = %path.session, io = path.channel.direction.as_str(),
            channel = path.channel.name.as_ref().map(|name| name.as_str()), cursor = start - 1, tail,
            "a reader goes on at the tail: it has been given records that the channel does not have"
        );
        (CURSOR_AHEAD, HeaderValue::from(tail))
    }))
}

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
    operation_id = "headNamedChannel", params(("channel" = String, Path)))]
pub async fn head_named(app: State<App>, asker: Asker, path: ChannelPath) -> Result<Response, Failure> {
    head(app, asker, path).await
}
