//! The four ways to ask: HTTP, WebSocket (`graphql-transport-ws`), server-sent events and multipart. Each only
//! frames what the engine answers.

mod accept;
mod http;
mod messages;
mod multipart;
mod sse;
mod ws;

use ::http::Method;
use ::http::header::{ALLOW, HeaderValue, UPGRADE};
use axum::Router;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::any;

use crate::api::App;
use crate::api::error::Failure;
use crate::api::trace::RequestId;

/// The one route.
pub(in crate::api) fn routes() -> Router<App> {
    Router::new().route(super::PATH, any(answer))
}

async fn answer(State(app): State<App>, Extension(id): Extension<RequestId>, request: Request) -> Response {
    match *request.method() {
        Method::GET if request.headers().contains_key(UPGRADE) => ws::upgrade(app, id, request).await,
        Method::GET | Method::POST => http::answer(app, id, request).await,
        _ => {
            let mut response = Failure::method_not_allowed().into_response();
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, POST"));
            response
        }
    }
}
