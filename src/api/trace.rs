//! The outermost layer: request ids, W3C trace context, CORS, the access log and request metrics.

use std::panic::AssertUnwindSafe;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use http::Method;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use tracing::Instrument;

use super::App;
use super::cors;
use super::error::Failure;
use crate::domain::Error;
use crate::telemetry::Chain;

/// Names a request in logs and answers.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// Longest request id taken over from a caller.
const REQUEST_ID_MAX: usize = 128;
/// The route label of a request that matched none.
const UNMATCHED: &str = "unmatched";

/// The id of the request at hand.
#[derive(Clone, Debug)]
pub struct RequestId(pub HeaderValue);

impl RequestId {
    /// Takes over a sane id of the caller's, or makes one.
    fn of(headers: &HeaderMap) -> Self {
        let sane = |value: &&HeaderValue| {
            (1..=REQUEST_ID_MAX).contains(&value.len()) && value.as_bytes().iter().all(u8::is_ascii_graphic)
        };
        let given = headers.get(REQUEST_ID).filter(sane).cloned();
        Self(given.unwrap_or_else(|| header(uuid::Uuid::new_v4().simple().encode_lower(&mut [0; 32]))))
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }
}

fn header(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).expect("hexadecimal digits and dashes make a header value")
}

/// The `traceparent` of this request: the caller's trace or a new one, and a span of ours.
fn traceparent(headers: &HeaderMap) -> HeaderValue {
    let incoming = headers.get(TRACEPARENT).and_then(|value| parent(value.to_str().ok()?));
    let (mut trace, mut span) = ([0; 32], [0; 32]);
    let (trace, flags) = match incoming {
        Some(incoming) => incoming,
        None => (&*uuid::Uuid::new_v4().simple().encode_lower(&mut trace), "00"),
    };
    let span = &uuid::Uuid::new_v4().simple().encode_lower(&mut span)[..16];
    header(&format!("00-{trace}-{span}-{flags}"))
}

/// Trace id and flags of a well-formed `traceparent`.
fn parent(text: &str) -> Option<(&str, &str)> {
    let mut parts = text.splitn(5, '-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let hex = |text: &str, len: usize| {
        text.len() == len && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    let known = hex(version, 2) && version != "ff" && (version != "00" || parts.next().is_none());
    let zero = |text: &str| text.bytes().all(|b| b == b'0');
    let valid = known && hex(trace, 32) && hex(span, 16) && hex(flags, 2) && !zero(trace) && !zero(span);
    valid.then_some((trace, flags))
}

/// Around every route: gives the request its identity and span, lets pages of other origins in, accounts for the
/// answer. One layer for all of it, because every request pays for every layer.
pub async fn observe(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let begin = Instant::now();
    let id = RequestId::of(request.headers());
    let traceparent = traceparent(request.headers());
    let origin = cors::allowed_origin(app.config.allowed_origins.as_deref(), request.headers());
    request.extensions_mut().insert(id.clone());
    let matched = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    let route = app.route_label(matched).unwrap_or(UNMATCHED);
    let method = method_label(request.method());
    let span =
        tracing::debug_span!("request", request.id = id.as_str(), trace.parent = ?traceparent, route, method);
    let mut response = if request.method() == Method::OPTIONS {
        cors::preflight(origin, request.headers())
    } else {
        // A connection carries other requests, before this one and behind it.
        let mut response = AssertUnwindSafe(next.run(request).instrument(span.clone()))
            .catch_unwind()
            .await
            .unwrap_or_else(|_| Failure::from(Error::internal("the handler has panicked")).into_response());
        if let Some(failure) = response.extensions_mut().remove::<Failure>() {
            log_fault(&failure, &id, &traceparent);
            response = failure.render(Some(id.as_str()));
        }
        cors::mark(response.headers_mut(), origin);
        response
    };
    let elapsed = begin.elapsed();
    span.in_scope(|| {
        let duration_ms = elapsed.as_secs_f64() * 1000.0;
        tracing::debug!(status = response.status().as_u16(), duration_ms, "answered a request");
    });
    app.metrics.request(route, method, response.status().as_u16(), elapsed);
    response.headers_mut().insert(REQUEST_ID, id.0);
    response.headers_mut().insert(TRACEPARENT, traceparent);
    response
}

fn log_fault(failure: &Failure, id: &RequestId, traceparent: &HeaderValue) {
    if let Some(cause) = failure.cause() {
        tracing::error!(
            request.id = id.as_str(), trace.parent = ?traceparent, error = %Chain(cause), code = failure.code,
            "cannot answer a request"
        );
    }
}

/// The method as a label; a caller's invention is not one.
fn method_label(method: &Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PUT" => "PUT",
        "PATCH" => "PATCH",
        "DELETE" => "DELETE",
        "OPTIONS" => "OPTIONS",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_well_formed_parent_is_continued() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let (trace, flags) = parent(good).expect("well-formed");
        assert_eq!((trace, flags), ("4bf92f3577b34da6a3ce929d0e0e4736", "01"));
        for text in [
            "",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
        ] {
            assert!(parent(text).is_none(), "{text}");
        }
    }

    #[test]
    fn a_strange_request_id_is_replaced() {
        let mut headers = HeaderMap::new();
        headers.insert(REQUEST_ID, HeaderValue::from_static("abc-1"));
        assert_eq!(RequestId::of(&headers).as_str(), "abc-1");
        headers.insert(REQUEST_ID, HeaderValue::from_static("a b"));
        assert_eq!(RequestId::of(&headers).as_str().len(), 32);
    }
}
