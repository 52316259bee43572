//! The one table from what went wrong to what the wire says: status, body, `x-should-retry`.
//!
//! Faults of ours show a fixed sentence and the request id; [`super::trace`] adds the id and logs them, once.

use std::sync::Arc;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::header::{ACCEPT_ENCODING, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use http::{HeaderMap, StatusCode};
use serde_json::{Map, Value, json};

use crate::domain::error::RateLimit;
use crate::domain::{Code, Direction, Error, Violation};

/// Tells the SDK whether a retry can help.
pub const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// What a caller reads when the fault is ours.
const OUR_FAULT: &str = "Internal Server Error";
const AWAY: &str = "Service temporarily unavailable; please try again";
/// Seconds after which a backend that was away may be asked again.
const AWAY_FOR: HeaderValue = HeaderValue::from_static("1");

/// Which kind of route refuses, where clients expect different words for the same fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Reads something.
    Load,
    /// Changes or closes a session.
    Change,
    /// Appends to a channel of this direction.
    Append(Direction),
    /// Prepares a channel for direct writes.
    Initialize,
    /// Hands a session over to its next run.
    Handover,
    /// Waits for input, or answers who waits.
    Wait,
}

/// A refusal, ready for the wire.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The status.
    pub status: StatusCode,
    /// The stable word.
    pub code: &'static str,
    /// What a caller reads.
    pub message: String,
    /// What else the body says.
    extra: Map<String, Value>,
    /// The whole body, where a protocol has a shape of its own.
    shape: Option<Box<Map<String, Value>>>,
    /// `x-should-retry`, where the status alone would mislead the SDK.
    retry: Option<bool>,
    headers: HeaderMap,
    cause: Option<Arc<Error>>,
}

/// The status of a code. No catch-all arm: a new code must be given its place here.
pub fn status(code: Code) -> StatusCode {
    match code {
        Code::BadRequest | Code::SessionExpired => StatusCode::BAD_REQUEST,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::Unauthorized | Code::ScopesExceedKeyAccess => StatusCode::FORBIDDEN,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::Conflict | Code::SessionClosed => StatusCode::CONFLICT,
        Code::FencingTokenMismatch | Code::SeqNumMismatch => StatusCode::PRECONDITION_FAILED,
        Code::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        Code::ValidationFailed | Code::IdempotencyMismatch => StatusCode::UNPROCESSABLE_ENTITY,
        Code::CursorExpired => StatusCode::GONE,
        Code::CursorAhead => StatusCode::RANGE_NOT_SATISFIABLE,
        Code::RateLimited => StatusCode::TOO_MANY_REQUESTS,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// What the SDK would retry although it cannot help (and 404, on which the contract is explicit).
fn should_retry(status: StatusCode, code: Code) -> Option<bool> {
    let misled = matches!(status.as_u16(), 404 | 408 | 409);
    (misled && !code.retryable()).then_some(false)
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Arc::new(error).into()
    }
}

impl From<Arc<Error>> for Failure {
    fn from(error: Arc<Error>) -> Self {
        let code = error.code();
        let status = status(code);
        let mut failure = Self::new(status, code.as_str(), error.detail());
        failure.retry = should_retry(status, code);
        match error.as_ref() {
            Error::Malformed(violation) => {
                failure = failure.with("details", violations(std::slice::from_ref(violation)));
            }
            Error::Invalid(list) => {
                failure.message = error.to_string();
                failure = failure.with("details", violations(list));
            }
            Error::Denied(_) => {
                failure = failure.with("param", json!("access_token")).with("type", json!("authorization"));
            }
            Error::ScopesExceeded(scopes) => failure = failure.with("deniedScopes", json!(scopes)),
            Error::Closed { at, reason } => {
                failure = failure.with("closedAt", json!(at.to_string())).with("closedReason", json!(reason));
            }
            Error::Trimmed { earliest } => failure = failure.with("earliest", json!(earliest.to_string())),
            Error::CursorAhead { tail } => failure = failure.with("tail", json!(tail.to_string())),
            Error::RateLimited(limit) => {
                failure.headers = rate_headers(*limit);
                // Not every door has headers.
                failure = failure
                    .with("retryAfterMs", json!(limit.wait.as_nanos().div_ceil(1_000_000) as u64))
                    .with("limit", json!(limit.limit))
                    .with("remaining", json!(limit.remaining))
                    .with("reset", json!(limit.reset.millis()));
            }
            Error::Unavailable { .. } => {
                failure.message = AWAY.to_owned();
                failure.headers.insert(RETRY_AFTER, AWAY_FOR);
            }
            Error::NotReady(_) => {
                failure.headers.insert(RETRY_AFTER, AWAY_FOR);
            }
            Error::Internal(_) => failure.message = OUR_FAULT.to_owned(),
            _ => {}
        }
        if status.is_server_error() {
            failure.cause = Some(error);
        }
        failure
    }
}

impl Failure {
    /// A refusal that no rule of the core knows.
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            extra: Map::new(),
            shape: None,
            retry: None,
            headers: HeaderMap::new(),
            cause: None,
        }
    }

    /// A request that cannot be read.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, Code::BadRequest.as_str(), message)
    }

    /// A path that cannot name anything.
    pub fn params(fault: &Violation) -> Self {
        Self::bad_request("Params Error").with("details", violations(std::slice::from_ref(fault)))
    }

    /// A query that cannot be read.
    pub fn query(faults: &[Violation]) -> Self {
        Self::bad_request("Query Error").with("details", violations(faults))
    }

    /// A body whose types are wrong.
    pub fn types(faults: &[Violation]) -> Self {
        let words: Vec<_> =
            faults.iter().map(|fault| format!("{} at \"{}\"", fault.message, fault.field)).collect();
        Self::bad_request(format!("Validation error: {}", words.join("; ")))
            .with("details", violations(faults))
    }

    /// A body over the limit of its route.
    pub fn body_too_large() -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, Code::TooLarge.as_str(), "Request body too large")
            .closing_connection()
    }

    /// A body in a content coding, where none is decoded.
    pub fn body_encoded() -> Self {
        let message = "Request body must not be encoded: this route decodes no Content-Encoding";
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message)
            .header(ACCEPT_ENCODING, HeaderValue::from_static("identity"))
    }

    /// A body that did not arrive in time.
    pub fn body_timeout() -> Self {
        let mut failure = Self::new(
            StatusCode::REQUEST_TIMEOUT,
            "request_timeout",
            "Request body was not received in time",
        );
        failure.retry = Some(true);
        failure.closing_connection()
    }

    /// A path that is not routed.
    pub fn no_route() -> Self {
        Self { retry: Some(false), ..Self::new(StatusCode::NOT_FOUND, Code::NotFound.as_str(), "Not found") }
    }

    /// A path of the run engine, which is another program.
    pub fn no_run_engine() -> Self {
        let message = "This server has no run engine: it keeps sessions, and runs no tasks. Call this route where your tasks run";
        Self { retry: Some(false), ..Self::new(StatusCode::NOT_FOUND, "no_run_engine", message) }
    }

    /// A path that does not know the method.
    pub fn method_not_allowed() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "Method not allowed")
    }

    /// A feature that this server does not have.
    pub fn not_implemented(message: &str) -> Self {
        Self { retry: Some(false), ..Self::new(StatusCode::NOT_IMPLEMENTED, "not_implemented", message) }
    }

    /// Says which methods may be used instead.
    #[must_use]
    pub fn allowing(mut self, methods: &'static str) -> Self {
        self.headers.insert(http::header::ALLOW, HeaderValue::from_static(methods));
        self
    }

    /// Adds a header.
    #[must_use]
    pub fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.insert(name, value);
        self
    }

    /// Adds a field to the body.
    #[must_use]
    pub fn with(mut self, field: &str, value: Value) -> Self {
        self.extra.insert(field.to_owned(), value);
        self
    }

    /// With a body of another shape.
    #[must_use]
    pub fn in_shape(mut self, body: Map<String, Value>) -> Self {
        self.shape = Some(Box::new(body));
        self
    }

    /// In the words that clients expect of this route.
    #[must_use]
    pub fn on(mut self, route: Route) -> Self {
        if self.code == Code::NotFound.as_str() {
            self.message = match route {
                Route::Load => "Not found",
                Route::Change => "Session not found",
                Route::Initialize => "Session not found",
                Route::Handover if self.message == "run not found" => {
                    "callingRunId not found in this environment"
                }
                Route::Append(_) | Route::Handover => "Resource not found",
                Route::Wait if self.message == "run not found" => "Run not found",
                Route::Wait if self.message == "session not found" => "Session not found",
                Route::Wait => "Waitpoint not found",
            }
            .to_owned();
        }
        match route {
            Route::Initialize => return self.refused_by_state("initialize a channel on"),
            Route::Handover => return self.refused_by_state("end-and-continue"),
            _ => {}
        }
        let Route::Append(direction) = route else { return self };
        if self.code == Code::SessionClosed.as_str() {
            self.message = "Cannot append to a closed session".to_owned();
            self.retry = Some(false);
            // The agent's side reads 400, the browser's transport waits for 409.
            if direction == Direction::Out {
                self.status = StatusCode::BAD_REQUEST;
            }
        } else if self.code == Code::SessionExpired.as_str() {
            self.message = "Cannot append to an expired session".to_owned();
            self.retry = Some(false);
        }
        self.with("ok", json!(false))
    }

    fn refused_by_state(mut self, what: &str) -> Self {
        let state = match self.code {
            code if code == Code::SessionClosed.as_str() => "a closed",
            code if code == Code::SessionExpired.as_str() => "an expired",
            _ => return self,
        };
        self.status = StatusCode::BAD_REQUEST;
        self.message = format!("Cannot {what} {state} session");
        self.retry = Some(false);
        self
    }

    fn closing_connection(mut self) -> Self {
        self.headers.insert(http::header::CONNECTION, HeaderValue::from_static("close"));
        self
    }

    /// What else there is to say, by field.
    pub fn details(&self) -> &Map<String, Value> {
        &self.extra
    }

    /// Headers of the answer, such as the state of a rate limit.
    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// The fault of ours that is behind this, for the log.
    pub fn cause(&self) -> Option<&Error> {
        self.cause.as_deref()
    }

    /// The body; the request id is shown with faults of ours.
    pub fn body(&self, request_id: Option<&str>) -> Value {
        let mut body = self.shape.as_deref().cloned().unwrap_or_else(|| {
            let mut body = Map::new();
            body.insert("error".to_owned(), json!(self.message));
            body.insert("code".to_owned(), json!(self.code));
            body.extend(self.extra.clone());
            body
        });
        if let Some(id) = request_id.filter(|_| self.status.is_server_error()) {
            body.insert("requestId".to_owned(), json!(id));
        }
        Value::Object(body)
    }

    /// The whole response.
    pub fn render(&self, request_id: Option<&str>) -> Response {
        let mut response = Response::new(Body::from(self.body(request_id).to_string()));
        *response.status_mut() = self.status;
        *response.headers_mut() = self.headers.clone();
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(retry) = self.retry {
            let word = if retry { "true" } else { "false" };
            response.headers_mut().insert(SHOULD_RETRY, HeaderValue::from_static(word));
        }
        response
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut response = self.render(None);
        if self.status.is_server_error() {
            response.extensions_mut().insert(self);
        }
        response
    }
}

/// The append that is too large, in the words that clients look for.
pub fn record_too_large(size: u64, limit: u64) -> String {
    format!("Record metered size {size} bytes exceeds the S2 per-record limit of {limit} bytes")
}

fn violations(list: &[Violation]) -> Value {
    list.iter().map(|fault| json!({"field": fault.field, "message": fault.message})).collect()
}

fn rate_headers(limit: RateLimit) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(RETRY_AFTER, HeaderValue::from(limit.wait.as_millis().div_ceil(1000) as u64));
    headers.insert("x-ratelimit-limit", HeaderValue::from(limit.limit));
    headers.insert("x-ratelimit-remaining", HeaderValue::from(limit.remaining));
    headers.insert("x-ratelimit-reset", HeaderValue::from(limit.reset.millis()));
    headers
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Timestamp;

    #[test]
    fn every_code_has_its_status_and_says_whether_to_retry() {
        let table: Vec<_> = Code::ALL
            .into_iter()
            .map(|code| {
                let status = status(code);
                (code.as_str(), status.as_u16(), should_retry(status, code))
            })
            .collect();
        assert_eq!(
            table,
            [
                ("not_found", 404, Some(false)),
                ("conflict", 409, Some(false)),
                ("session_closed", 409, Some(false)),
                ("session_expired", 400, None),
                ("unauthenticated", 401, None),
                ("unauthorized", 403, None),
                ("scopes_exceed_key_access", 403, None),
                ("bad_request", 400, None),
                ("validation_failed", 422, None),
                ("too_large", 413, None),
                ("fencing_token_mismatch", 412, None),
                ("seq_num_mismatch", 412, None),
                ("idempotency_mismatch", 422, None),
                ("cursor_expired", 410, None),
                ("cursor_ahead", 416, None),
                ("rate_limited", 429, None),
                ("unavailable", 503, None),
                ("internal", 500, None),
            ]
        );
    }

    #[test]
    fn the_refusal_of_a_scope_reads_exactly_as_clients_know_it() {
        let body = Failure::from(Error::Denied("Unauthorized")).body(None);
        assert_eq!(
            body,
            json!({"error": "Unauthorized", "code": "unauthorized", "param": "access_token",
                   "type": "authorization"})
        );
    }

    #[test]
    fn an_append_to_a_closed_session_differs_by_direction_only_in_status() {
        for (direction, status) in [(Direction::In, 409), (Direction::Out, 400)] {
            let closed = Error::Closed { at: Timestamp::default(), reason: Some("done".to_owned()) };
            let failure = Failure::from(closed).on(Route::Append(direction));
            assert_eq!(failure.status.as_u16(), status);
            assert_eq!(failure.render(None).headers()[SHOULD_RETRY], "false");
            let body = failure.body(None);
            assert_eq!(body["ok"], false);
            assert_eq!(body["code"], "session_closed");
            assert_eq!(body["closedReason"], "done");
            assert_eq!(body["error"], "Cannot append to a closed session");
        }
    }

    #[test]
    fn who_asks_too_often_reads_when_to_come_back_in_headers_and_body() {
        let wait = std::time::Duration::from_millis(1001);
        let reset = Timestamp::from_millis(5000);
        let failure = Failure::from(Error::RateLimited(RateLimit { limit: 9, remaining: 2, reset, wait }));
        let response = failure.render(None);
        for (name, value) in [
            ("retry-after", "2"),
            ("x-ratelimit-limit", "9"),
            ("x-ratelimit-remaining", "2"),
            ("x-ratelimit-reset", "5000"),
        ] {
            assert_eq!(response.headers()[name], value, "{name}");
        }
        let body = failure.body(None);
        assert_eq!(
            [&body["retryAfterMs"], &body["limit"], &body["remaining"], &body["reset"]],
            [&json!(1001), &json!(9), &json!(2), &json!(5000)]
        );
    }

    #[test]
    fn a_fault_of_ours_shows_the_request_id_and_nothing_of_the_cause() {
        let failure = Failure::from(Error::internal("the secret path /x"));
        let body = failure.body(Some("r1"));
        assert_eq!(body, json!({"error": OUR_FAULT, "code": "internal", "requestId": "r1"}));
        assert!(failure.cause().is_some());
    }
}
