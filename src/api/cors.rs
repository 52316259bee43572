//! CORS as the public API does it: the origin is reflected, on errors too, and nothing is said without one.
//!
//! Written by hand because the preflight answers 200 with the body `{}` and a request without `Origin` gets no
//! CORS header at all, which tower-http's layer cannot do.

use axum::body::Body;
use axum::response::Response;
use http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS, CONTENT_TYPE,
    HeaderMap, HeaderValue, ORIGIN, VARY,
};

const METHODS: HeaderValue = HeaderValue::from_static("GET,HEAD,PUT,PATCH,POST,DELETE");
const MAX_AGE: HeaderValue = HeaderValue::from_static("300");
/// What a page of another origin may read.
const EXPOSED: HeaderValue = HeaderValue::from_static(
    "x-trigger-jwt,x-trigger-jwt-claims,X-Stream-Version,X-Session-Settled,X-Last-Chunk-Index,X-Cursor-Ahead,\
     X-S2-Access-Token,X-S2-Stream-Name,X-S2-Basin,X-S2-Flush-Interval-Ms,X-S2-Max-Retries,X-S2-Endpoint,\
     x-request-id,traceparent,x-should-retry,x-ratelimit-limit,x-ratelimit-remaining,x-ratelimit-reset,\
     retry-after",
);

/// The caller's origin, if it has one and may read answers.
pub(super) fn allowed_origin(allowed: Option<&[String]>, headers: &HeaderMap) -> Option<HeaderValue> {
    headers.get(ORIGIN).filter(|origin| is_allowed(allowed, origin)).cloned()
}

fn is_allowed(allowed: Option<&[String]>, origin: &HeaderValue) -> bool {
    allowed.is_none_or(|allowed| allowed.iter().any(|one| one.as_bytes() == origin.as_bytes()))
}

/// The answer to any OPTIONS request: whatever was asked for is allowed.
pub(super) fn preflight(origin: Option<HeaderValue>, request: &HeaderMap) -> Response {
    let asked = request.get(ACCESS_CONTROL_REQUEST_HEADERS).cloned();
    let mut response = Response::new(Body::from("{}"));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.append(VARY, HeaderValue::from_static("Origin"));
    let Some(origin) = origin else { return response };
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.insert(ACCESS_CONTROL_ALLOW_METHODS, METHODS);
    headers.insert(ACCESS_CONTROL_MAX_AGE, MAX_AGE);
    if let Some(asked) = asked {
        headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, asked);
        headers.append(VARY, HeaderValue::from_static("Access-Control-Request-Headers"));
    }
    response
}

/// Marks any other answer.
pub(super) fn mark(headers: &mut HeaderMap, origin: Option<HeaderValue>) {
    headers.append(VARY, HeaderValue::from_static("Origin"));
    let Some(origin) = origin else {
        headers.remove(ACCESS_CONTROL_EXPOSE_HEADERS);
        return;
    };
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.entry(ACCESS_CONTROL_EXPOSE_HEADERS).or_insert(EXPOSED);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin() -> Option<HeaderValue> {
        Some(HeaderValue::from_static("https://a.example"))
    }

    #[test]
    fn a_preflight_reflects_what_it_was_asked() {
        let mut request = HeaderMap::new();
        request.insert(ACCESS_CONTROL_REQUEST_HEADERS, HeaderValue::from_static("x-a,authorization"));
        let response = preflight(origin(), &request);
        assert_eq!(response.headers()[ACCESS_CONTROL_ALLOW_ORIGIN], "https://a.example");
        assert_eq!(response.headers()[ACCESS_CONTROL_ALLOW_HEADERS], "x-a,authorization");
        assert_eq!(response.headers()[ACCESS_CONTROL_ALLOW_METHODS], METHODS);
        assert_eq!(response.headers()[ACCESS_CONTROL_MAX_AGE], "300");
        assert_eq!(response.headers().get_all(VARY).iter().count(), 2);
    }

    #[test]
    fn without_an_origin_nothing_is_said() {
        let mut headers = HeaderMap::new();
        headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("*"));
        mark(&mut headers, None);
        assert!(headers.keys().all(|name| name == VARY));
    }

    #[test]
    fn a_route_that_exposes_everything_keeps_its_word() {
        let mut headers = HeaderMap::new();
        headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("*"));
        mark(&mut headers, origin());
        assert_eq!(headers[ACCESS_CONTROL_EXPOSE_HEADERS], "*");
    }

    #[test]
    fn a_list_of_origins_is_matched_exactly() {
        let list = ["https://a.example".to_owned()];
        assert!(is_allowed(Some(&list), &HeaderValue::from_static("https://a.example")));
        assert!(!is_allowed(Some(&list), &HeaderValue::from_static("https://a.example.evil")));
        assert!(is_allowed(None, &HeaderValue::from_static("null")));
    }
}
