//! Answers as JSON text, the same for every transport.

use std::sync::Arc;

use async_graphql::{Response, Value};
use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use serde_json::json;

use super::cost::COST_MAX;
use super::error::Fault;
use crate::api::trace::RequestId;
use crate::domain::Code;
use crate::domain::send_budget::{Reservation, holding_room};
use crate::telemetry::Chain;

/// Most errors in one result: a short document can be wrong in ten thousand places.
const ERRORS_MAX: usize = 20;

/// A text for a client, and the room that it takes until the client has it.
#[derive(Debug)]
pub(super) struct Text {
    /// JSON.
    pub json: String,
    /// None for what is too small to count.
    pub room: Option<Arc<Reservation>>,
}

impl Text {
    /// Bytes made of the text, which hold its room.
    pub fn holding(room: Option<Arc<Reservation>>, bytes: Bytes) -> Bytes {
        match room {
            Some(room) => holding_room(bytes, room),
            None => bytes,
        }
    }
}

/// One execution result.
#[derive(Debug)]
pub(super) struct Reply {
    /// The result as JSON.
    pub json: String,
    /// The status where the media type has one of its own for every result.
    pub status: StatusCode,
    /// Set when nothing was executed: the members of `errors`.
    pub refused: Option<Vec<Fault>>,
    /// Headers that go with a refusal.
    pub headers: HeaderMap,
    /// Executed without any error.
    pub is_whole: bool,
}

impl Reply {
    /// A result of the executor.
    pub fn new(response: Response, id: &RequestId, cost: usize) -> Self {
        let faults: Vec<Fault> = response.errors.into_iter().map(Fault::from).collect();
        log(&faults, id);
        let executed = response.data != Value::Null || faults.iter().any(Fault::is_in_data);
        if !faults.is_empty() && !executed {
            return Self::refused(faults, id);
        }
        let errors = errors(&faults, id);
        let extensions = json!({"cost": {"requested": cost, "limit": COST_MAX}});
        let is_whole = errors.is_none();
        let mut json = match errors {
            Some(errors) => format!("{{\"errors\":{errors},\"data\":"),
            None => "{\"data\":".to_owned(),
        };
        // A large answer is written once, where it belongs.
        write(&mut json, &response.data);
        json.push_str(&format!(",\"extensions\":{extensions}}}"));
        Self { is_whole, ..Self::answered(json) }
    }

    /// A result without any error.
    pub fn answered(json: String) -> Self {
        Self { json, status: StatusCode::OK, refused: None, headers: HeaderMap::new(), is_whole: true }
    }

    /// A request that was not executed.
    pub fn refusal(fault: impl Into<Fault>, id: &RequestId) -> Self {
        let faults = vec![fault.into()];
        log(&faults, id);
        Self::refused(faults, id)
    }

    /// Whether it was refused because it came too early.
    pub fn is_rate_limited(&self) -> bool {
        self.refused.iter().flatten().any(|fault| fault.failure.code == Code::RateLimited.as_str())
    }

    fn refused(faults: Vec<Fault>, id: &RequestId) -> Self {
        let first = faults.first().map(|fault| &fault.failure);
        let status = first.map_or(StatusCode::BAD_REQUEST, |failure| failure.status);
        let headers = first.map(|failure| failure.headers().clone()).unwrap_or_default();
        let json = format!("{{\"errors\":{}}}", errors(&faults, id).unwrap_or_default());
        Self { json, status, refused: Some(faults), headers, is_whole: false }
    }
}

/// Appends a value as JSON.
fn write(json: &mut String, value: &Value) {
    let mut bytes = std::mem::take(json).into_bytes();
    let len = bytes.len();
    if serde_json::to_writer(&mut bytes, value).is_err() {
        bytes.truncate(len);
        bytes.extend_from_slice(b"null");
    }
    *json = String::from_utf8(bytes).unwrap_or_default();
}

/// The member `errors`; absent when there is none.
pub(super) fn errors(faults: &[Fault], id: &RequestId) -> Option<String> {
    let list: Vec<_> = faults.iter().take(ERRORS_MAX).map(|fault| fault.to_json(id.as_str())).collect();
    (!list.is_empty()).then(|| serde_json::Value::Array(list).to_string())
}

/// Faults of ours go to the log, once.
pub(super) fn log(faults: &[Fault], id: &RequestId) {
    for fault in faults {
        if let Some(cause) = fault.failure.cause() {
            tracing::error!(request.id = id.as_str(), error = %Chain(cause), code = fault.failure.code, "cannot answer an operation");
        }
    }
}
