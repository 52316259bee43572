//! Appends one request body as one record.

use std::time::Instant;

use axum::Json;
use axum::extract::State;
use http::HeaderMap;
use serde::Serialize;
use utoipa::ToSchema;

use crate::api::App;
use crate::api::error::{self, Failure, Route};
use crate::api::extract::{Asker, ChannelPath, LimitedBody};
use crate::domain::Error;
use crate::domain::record::METERED_MAX;
use crate::telemetry::Outcome;

/// The record is durable.
#[derive(Debug, Serialize, ToSchema)]
pub struct AppendResponse {
    /// Always true.
    pub ok: bool,
    /// Its sequence number; for a repeat of a part id the original one.
    pub seq: u64,
}

/// Appends the body, UTF-8 text of any kind, at most 1,048,576 bytes. `out` takes secret keys only.
#[utoipa::path(post, path = "/realtime/v1/sessions/{session}/{io}/append", tag = "realtime",
    operation_id = "append", request_body(content = String, content_type = "text/plain"),
    params(("session" = String, Path), ("io" = String, Path),
        ("X-Part-Id" = Option<String>, Header, description = "Makes a repeat answer the original place")),
    responses((status = 200, description = "Durable", body = AppendResponse)))]
pub async fn append(
    State(app): State<App>,
    Asker(caller): Asker,
    headers: HeaderMap,
    path: ChannelPath,
    body: Result<LimitedBody<METERED_MAX>, Failure>,
) -> Result<Json<AppendResponse>, Failure> {
    let begin = Instant::now();
    let direction = path.channel.direction;
    let refuse = |failure: Failure| failure.on(Route::Append(direction));
    let LimitedBody(body) = body.map_err(refuse)?;
    let text =
        std::str::from_utf8(&body).map_err(|_| refuse(Failure::bad_request("Request body is not UTF-8")))?;
    let part_id = headers.get("x-part-id").map(|value| value.to_str()).transpose();
    let part_id = part_id.map_err(|_| refuse(Failure::bad_request("X-Part-Id is not printable ASCII")))?;
    let part_id = part_id.filter(|id| !id.is_empty());
    let result = app.sessions.append_text(&caller, &path.session, &path.channel, text, part_id).await;
    let outcome = match &result {
        Ok(ack) if ack.repeated => Outcome::Repeated,
        Ok(_) => Outcome::Stored,
        Err(Error::Unavailable { .. } | Error::Internal(_)) => Outcome::Failed,
        Err(_) => Outcome::Refused,
    };
    app.metrics.append(direction, outcome, begin.elapsed());
    let ack = result.map_err(|error| {
        let too_large = match &error {
            Error::TooLarge { size, limit, .. } => Some(error::record_too_large(*size, *limit)),
            _ => None,
        };
        let mut failure = refuse(error.into());
        if let Some(message) = too_large {
            failure.message = message;
        }
        failure
    })?;
    let seq = ack.seq_nums.first().copied().unwrap_or(ack.start.seq_num);
    Ok(Json(AppendResponse { ok: true, seq }))
}

/// As for the main channel.
#[utoipa::path(post, path = "/realtime/v1/sessions/{session}/channels/{channel}/{io}/append",
    tag = "realtime", operation_id = "appendNamed", params(("channel" = String, Path)))]
pub async fn append_named(
    app: State<App>,
    asker: Asker,
    headers: HeaderMap,
    path: ChannelPath,
    body: Result<LimitedBody<METERED_MAX>, Failure>,
) -> Result<Json<AppendResponse>, Failure> {
    append(app, asker, headers, path, body).await
}
