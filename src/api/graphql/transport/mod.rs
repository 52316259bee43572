//! The four ways to ask: HTTP, WebSocket (`graphql-transport-ws`), server-sent events and multipart. Each only
//! frames what the engine answers.

mod accept;
mod http;
mod messages;
mod multipart;
mod sse;
mod ws;

use ::http::Method;
use ::http::header::{ACCEPT, ALLOW, HeaderValue, UPGRADE};
use axum::Router;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::any;

use crate::api::App;
use crate::api::error::Failure;
use crate::api::trace::RequestId;

/// The one route.
pub(in crate::api) fn routes() -> Router<App> {
    Router::new().route(super::PATH, any(answer))
}

/// Somebody who opened the address in a browser.
fn is_visit(request: &Request) -> bool {
    let accept = request.headers().get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    request.uri().query().is_none() && accept.contains("text/html")
}

/// An offer of any other protocol is ignored (RFC 9110, 7.8).
fn offers_websocket(request: &Request) -> bool {
    let offers = request.headers().get_all(UPGRADE).iter().filter_map(|value| value.to_str().ok());
    offers.flat_map(|list| list.split(',')).any(|offer| offer.trim().eq_ignore_ascii_case("websocket"))
}

async fn answer(State(app): State<App>, Extension(id): Extension<RequestId>, request: Request) -> Response {
    match *request.method() {
        Method::GET if offers_websocket(&request) => ws::upgrade(app, id, request).await,
        Method::GET if is_visit(&request) => Redirect::to("playground/").into_response(),
        Method::GET | Method::POST => http::answer(app, id, request).await,
        _ => {
            let mut response = Failure::method_not_allowed().into_response();
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, POST"));
            response
        }
    }
}
