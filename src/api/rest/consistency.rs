//! Consistency tokens over HTTP: writes answer one, lists take it.

use axum::response::Response;
use http::Method;
use http::header::{HeaderMap, HeaderName, HeaderValue};

use crate::api::App;
use crate::api::error::Failure;
use crate::api::trace::Chain;
use crate::domain::ConsistencyToken;

/// On answers of writes and on requests of lists.
pub const HEADER: HeaderName = HeaderName::from_static("x-sessiond-consistency");

/// The routes that change what lists show.
const WRITES: [(Method, &str); 4] = [
    (Method::POST, "/api/v1/sessions"),
    (Method::PATCH, "/api/v1/sessions/{session}"),
    (Method::POST, "/api/v1/sessions/{session}/close"),
    (Method::POST, "/api/v1/sessions/{session}/end-and-continue"),
];

/// Before a request: what a token for it will be of, if its answer is to carry one.
pub(in crate::api) fn before(app: &App, method: &Method, route: &str) -> Option<u8> {
    if is_write(method.as_str(), route) { app.sessions.token_epoch() } else { None }
}

/// Whether a route changes what lists show; the method in any case.
pub(in crate::api) fn is_write(method: &str, route: &str) -> bool {
    WRITES.iter().any(|(of, path)| of.as_str().eq_ignore_ascii_case(method) && *path == route)
}

/// After it: adds the token to a good answer.
pub(in crate::api) async fn after(app: &App, epoch: Option<u8>, response: &mut Response) {
    let Some(epoch) = epoch.filter(|_| response.status().is_success()) else { return };
    if let Some(token) = token(app, epoch).await
        && let Ok(value) = HeaderValue::from_str(&token.encode())
    {
        response.headers_mut().insert(HEADER, value);
    }
}

/// The token for what has just been written. Without one the write stands all the same.
pub(in crate::api) async fn token(app: &App, epoch: u8) -> Option<ConsistencyToken> {
    app.sessions
        .token(epoch)
        .await
        .inspect_err(|error| {
            tracing::warn!(error = %Chain(error), "cannot make a consistency token for a write that was made");
        })
        .ok()
}

/// The token that a request carries.
pub(in crate::api) fn of(headers: &HeaderMap) -> Result<Option<ConsistencyToken>, Failure> {
    let Some(value) = headers.get(HEADER) else { return Ok(None) };
    let text = value.to_str().unwrap_or_default();
    read(HEADER.as_str(), text).map(Some)
}

/// Reads a token; a refusal names the field it was in.
pub(in crate::api) fn read(field: &str, text: &str) -> Result<ConsistencyToken, Failure> {
    ConsistencyToken::decode(field, text).map_err(|error| {
        let message = error.to_string();
        let mut failure = Failure::from(error);
        failure.message = message;
        failure
    })
}
