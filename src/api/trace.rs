//! Request ids, W3C trace context, the access log and request metrics: the outermost layer.

use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::Method;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use tracing::Instrument;

use super::App;
use super::error::Failure;

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
        Self(
            headers
                .get(REQUEST_ID)
                .filter(sane)
                .cloned()
                .unwrap_or_else(|| header(&uuid::Uuid::new_v4().simple().to_string())),
        )
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }
}

fn header(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).expect("hexadecimal digits and dashes make a header value")
}

/// Where this request stands in a distributed trace.
struct Trace {
    trace_id: String,
    span_id: String,
    flags: String,
}

impl Trace {
    fn of(headers: &HeaderMap) -> Self {
        let random = uuid::Uuid::new_v4().simple().to_string();
        let span_id = random[..16].to_owned();
        let incoming = headers.get(TRACEPARENT).and_then(|value| parent(value.to_str().ok()?));
        let (trace_id, flags) =
            incoming.unwrap_or_else(|| (uuid::Uuid::new_v4().simple().to_string(), "00".to_owned()));
        Self { trace_id, span_id, flags }
    }

    fn header(&self) -> HeaderValue {
        header(&format!("00-{}-{}-{}", self.trace_id, self.span_id, self.flags))
    }
}

/// Trace id and flags of a well-formed `traceparent`.
fn parent(text: &str) -> Option<(String, String)> {
    let mut parts = text.splitn(5, '-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let hex = |text: &str, len: usize| {
        text.len() == len && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    let known = hex(version, 2) && version != "ff" && (version != "00" || parts.next().is_none());
    let zero = |text: &str| text.bytes().all(|b| b == b'0');
    let valid = known && hex(trace, 32) && hex(span, 16) && hex(flags, 2) && !zero(trace) && !zero(span);
    valid.then(|| (trace.to_owned(), flags.to_owned()))
}

/// Gives the request its id and span, and accounts for the answer.
pub async fn observe(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let begin = Instant::now();
    let id = RequestId::of(request.headers());
    let trace = Trace::of(request.headers());
    request.extensions_mut().insert(id.clone());
    let matched = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    let route = app.route_label(matched).unwrap_or(UNMATCHED);
    let method = method_label(request.method());
    let span = tracing::info_span!(
        "request",
        request.id = id.as_str(),
        trace.id = trace.trace_id,
        span.id = trace.span_id,
        route,
        method
    );
    let response = async {
        let mut response = next.run(request).await;
        if let Some(failure) = response.extensions_mut().remove::<Failure>() {
            log_fault(&failure);
            let headers = std::mem::take(response.headers_mut());
            response = failure.render(Some(id.as_str()));
            response.headers_mut().extend(headers);
        }
        let duration_ms = begin.elapsed().as_secs_f64() * 1000.0;
        tracing::debug!(status = response.status().as_u16(), duration_ms, "answered a request");
        response
    };
    let mut response = response.instrument(span).await;
    app.metrics.request(route, method, response.status().as_u16(), begin.elapsed());
    response.headers_mut().insert(REQUEST_ID, id.0);
    response.headers_mut().insert(TRACEPARENT, trace.header());
    response
}

fn log_fault(failure: &Failure) {
    if let Some(cause) = failure.cause() {
        tracing::error!(error = %Chain(cause), code = failure.code, "cannot answer a request");
    }
}

/// An error with its causes, on one line.
pub struct Chain<'a>(pub &'a (dyn std::error::Error + 'static));

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(cause) = source {
            write!(f, ": {cause}")?;
            source = cause.source();
        }
        Ok(())
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
        assert_eq!((trace.as_str(), flags.as_str()), ("4bf92f3577b34da6a3ce929d0e0e4736", "01"));
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
