//! Hands out what a direct writer needs: a token for one channel, and where to write.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode};
use serde::Serialize;
use utoipa::ToSchema;

use super::{BASIN, target};
use crate::api::App;
use crate::api::error::{Failure, Route};
use crate::api::extract::{Asker, ChannelPath};
use crate::api::origin::Origin;
use crate::domain::SessionRef;

/// What says that the headers are there.
#[derive(Serialize, ToSchema)]
pub struct InitializeResponse {
    /// Of the wire: always `v2`, S2's.
    version: &'static str,
}

/// Prepares a channel for direct writes over the S2 wire: the answer's headers say with which token, where and under
/// which name. `out` takes secret keys only.
#[utoipa::path(put, path = "/realtime/v1/sessions/{session}/{io}", tag = "realtime",
    operation_id = "initializeChannel", params(("session" = String, Path), ("io" = String, Path)),
    responses((status = 202, description = "The headers name the stream and open it", body = InitializeResponse,
        headers(("X-S2-Access-Token" = String), ("X-S2-Stream-Name" = String), ("X-S2-Basin" = String),
            ("X-S2-Endpoint" = String), ("X-S2-Flush-Interval-Ms" = u64), ("X-S2-Max-Retries" = u32)))))]
pub async fn initialize(
    State(app): State<App>,
    Asker(caller): Asker,
    origin: Origin,
    path: ChannelPath,
) -> Result<Response, Failure> {
    let found = app.sessions.initialize(&caller, &path.session, &path.channel).await;
    let found = found.map_err(|error| Failure::from(error).on(Route::Initialize))?;
    let session = found.map_or_else(|| path.session.clone(), |session| SessionRef::Id(session.id.clone()));
    let direct = &app.config.direct;
    let token = app.auth.direct_token(&caller, &path.session, &session, &path.channel, direct.token_ttl)?;
    let endpoint = match &direct.endpoint {
        Some(endpoint) => endpoint.as_str().trim_end_matches('/').to_owned(),
        None => format!("{}/v1", origin.0),
    };
    let mut response = (StatusCode::ACCEPTED, Json(InitializeResponse { version: "v2" })).into_response();
    for (name, value) in [
        ("x-s2-access-token", token),
        ("x-s2-stream-name", target::stream_name(&session, &path.channel)),
        ("x-s2-basin", BASIN.to_owned()),
        ("x-s2-endpoint", endpoint),
        ("x-s2-flush-interval-ms", direct.flush_interval.as_millis().to_string()),
        // Announced as upstream does; its writer ignores it.
        ("x-s2-max-retries", "10".to_owned()),
    ] {
        let value = HeaderValue::try_from(value).map_err(crate::domain::Error::internal)?;
        response.headers_mut().insert(name, value);
    }
    Ok(response)
}

/// As for the main channel.
#[utoipa::path(put, path = "/realtime/v1/sessions/{session}/channels/{channel}/{io}", tag = "realtime",
    operation_id = "initializeNamedChannel", params(("channel" = String, Path)))]
pub async fn initialize_named(
    app: State<App>,
    asker: Asker,
    origin: Origin,
    path: ChannelPath,
) -> Result<Response, Failure> {
    initialize(app, asker, origin, path).await
}
