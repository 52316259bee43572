//! Refusals in the words of S2: `{"code","message"}`, and for failed conditions what was found instead.

use std::sync::Arc;

use s2_api::v1::stream::s2s::{SessionMessage, TerminalMessage};
use serde_json::{Map, Value, json};

use super::BASIN;
use crate::api::error::Failure;
use crate::domain::{Code, Error, Position};

/// A refusal in the words of S2.
pub(super) fn refusal(error: Error) -> Failure {
    let error = Arc::new(error);
    let (status, word) = word(error.code());
    let mut failure = Failure::from(error.clone());
    failure.status = status.try_into().unwrap_or(failure.status);
    failure.code = word;
    let body = match error.as_ref() {
        Error::Fenced { expected } => json!({"fencing_token_mismatch": expected}),
        Error::SeqNumMismatch { tail } => json!({"seq_num_mismatch": tail}),
        _ => json!({"code": word, "message": failure.message}),
    };
    failure.in_shape(object(body))
}

/// A request that cannot be read, by S2's word for the part at fault.
pub(super) fn bad(word: &'static str, message: impl Into<String>) -> Failure {
    let mut failure = Failure::bad_request(message);
    failure.code = word;
    reshaped(failure)
}

/// A refusal of another layer in S2's shape, its code and status unchanged.
pub(super) fn reshaped(failure: Failure) -> Failure {
    let body = json!({"code": failure.code, "message": failure.message});
    failure.in_shape(object(body))
}

/// A read that begins where nothing has been written yet.
pub(super) fn unwritten(tail: Position) -> Failure {
    let failure =
        Failure::new(http::StatusCode::RANGE_NOT_SATISFIABLE, "unwritten", "nothing is written there");
    failure.in_shape(object(json!({"tail": {"seq_num": tail.seq_num, "timestamp": tail.timestamp.millis()}})))
}

/// What follows `/v1/` in S2's routes that make, list and change things, and count what was done.
const CONTROL_PLANE: [&str; 5] = ["access-tokens", "basins", "locations", "metrics", "streams"];

/// A path under `/v1/` that is not routed, by the segment that follows.
pub(in crate::api) fn unrouted(family: &str) -> Failure {
    if !CONTROL_PLANE.contains(&family) {
        return reshaped(Failure::no_route());
    }
    let message = format!(
        "This server has the records of S2, and nothing of its control plane. Its only basin is {BASIN}; a session, made \
         with POST /api/v1/sessions, has its streams from the start: sessions/{{session}}/in and sessions/{{session}}/out"
    );
    // Of the statuses that fit, the one that S2's clients do not repeat.
    reshaped(Failure::not_implemented(&message))
}

/// A method that a route of S2's does not have here.
pub(in crate::api) fn unallowed() -> Failure {
    reshaped(Failure::method_not_allowed())
}

/// The server stops; the writer may go on elsewhere or later.
pub(super) fn stopping() -> Failure {
    let status = http::StatusCode::SERVICE_UNAVAILABLE;
    reshaped(Failure::new(status, "server_draining", "the server is shutting down"))
}

/// The last frame of a session.
pub(super) fn terminal(failure: &Failure, request_id: &str) -> bytes::Bytes {
    let body = failure.body(Some(request_id)).to_string();
    SessionMessage::Terminal(TerminalMessage { status: failure.status.as_u16(), body }).encode()
}

/// Status and word. A closed or expired session, which S2 does not know, is a conflict that no retry mends.
fn word(code: Code) -> (u16, &'static str) {
    match code {
        Code::BadRequest => (400, "bad_query"),
        Code::Unauthenticated => (401, "authn"),
        Code::Unauthorized | Code::ScopesExceedKeyAccess => (403, "permission_denied"),
        Code::NotFound => (404, "stream_not_found"),
        Code::Conflict => (409, "conflict"),
        Code::SessionClosed => (409, "session_closed"),
        Code::SessionExpired => (409, "session_expired"),
        Code::FencingTokenMismatch => (412, "fencing_token_mismatch"),
        Code::SeqNumMismatch => (412, "seq_num_mismatch"),
        Code::CursorExpired => (410, "trimmed"),
        Code::CursorAhead => (416, "unwritten"),
        Code::TooLarge | Code::ValidationFailed | Code::IdempotencyMismatch => (422, "invalid"),
        Code::RateLimited => (429, "rate_limited"),
        Code::Unavailable => (503, "unavailable"),
        Code::Internal => (500, "other"),
    }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(object) => object,
        _ => Map::new(),
    }
}
