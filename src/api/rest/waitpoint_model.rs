//! The bodies and queries of waitpoints, in the words that the SDK's `wait` functions know.

use std::time::Duration;

use http::HeaderMap;
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::list::{self, Asked, Faults, many, note, one};
use super::model::Pagination;
use super::read::Reader;
use crate::api::error::Failure;
use crate::api::period::periods;
use crate::domain::envelope;
use crate::domain::record::Record;
use crate::domain::run::named_run;
use crate::domain::waitpoint::{WaitpointAnchor, WaitpointCursor, WaitpointPageRequest};
use crate::domain::{
    Direction, Error, NewWaitpoint, Outcome, RunId, SessionRef, Timestamp, Violation, WaitStatus, Waitpoint,
    WaitpointFilter,
};

/// How long an idempotency key counts, unless the caller says.
const KEY_TTL: Duration = Duration::from_secs(30 * 86_400);
/// Longest wait of one request.
pub const WAIT_MAX_SECONDS: u64 = 300;
/// What tells the SDK that a wait ended without a record.
const TIMEOUT_CODE: &str = "TRIGGER_WAITPOINT_TIMEOUT";

/// A wait. At most 10,240 bytes.
#[derive(Debug, ToSchema)]
#[schema(rename_all = "camelCase")]
#[allow(dead_code, reason = "read field by field; the type documents the body")]
pub struct WaitBody {
    /// `session_...` or an external id.
    session: String,
    /// `in` or `out`.
    io: String,
    /// Such as `30s`, `1d12h`, or a date; without it the wait has no end of its own.
    timeout: Option<String>,
    /// Finds the wait that was made before with this key, on the same channel. 1 to 2048 characters.
    idempotency_key: Option<String>,
    /// How long the key counts, such as `1h`, or a date; 30 days by default.
    #[schema(rename = "idempotencyKeyTTL")]
    idempotency_key_ttl: Option<String>,
    /// Labels to filter by: a string, or at most 10, of 1 to 128 characters.
    #[schema(value_type = Option<Value>)]
    tags: Option<Value>,
    /// The last record that the waiter has seen; without it every record that remains counts.
    last_seq_num: Option<u64>,
}

/// Reads the body of a wait.
pub fn wait(body: &Map<String, Value>, run: RunId, now: Timestamp) -> Result<NewWaitpoint, Failure> {
    let mut reader = Reader::new(body, "");
    let session = reader.required_text("session");
    let io = reader.required_text("io");
    let moment = |value: &Value| moment(value.as_str()?, now);
    let timeout_at = reader.field("timeout", "a period such as 30s, or a date", moment);
    let key_expires_at = reader.field("idempotencyKeyTTL", "a period such as 1h, or a date", moment);
    let tags = reader.field("tags", "a string or an array of strings", |value| match value {
        Value::String(tag) => Some(vec![tag.clone()]),
        Value::Array(tags) => tags.iter().map(|tag| tag.as_str().map(str::to_owned)).collect(),
        _ => None,
    });
    let after = reader.field("lastSeqNum", "a sequence number", Value::as_u64);
    let idempotency_key = reader.text("idempotencyKey");
    reader.finish()?;
    Ok(NewWaitpoint {
        run: Some(run),
        session: SessionRef::parse(&session)?,
        direction: Direction::parse(&io)?,
        after,
        timeout_at,
        tags: tags.unwrap_or_default(),
        idempotency_key,
        key_expires_at: Some(key_expires_at.unwrap_or_else(|| now.plus(KEY_TTL))),
    })
}

/// A span from now on, or a date.
pub fn moment(text: &str, now: Timestamp) -> Option<Timestamp> {
    periods(text).map(|period| now.plus(period)).or_else(|| Timestamp::parse(text))
}

/// The answer to a wait.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct WaitResponse {
    /// `waitpoint_...`
    pub waitpoint_id: String,
    /// True if the idempotency key has found it.
    pub is_cached: bool,
}

/// Done.
#[derive(Debug, Serialize, ToSchema)]
pub struct SuccessResponse {
    /// Always true.
    pub success: bool,
}

/// An answer to who waits. At most 1 MiB.
#[derive(Debug, ToSchema)]
#[allow(dead_code, reason = "read field by field; the type documents the body")]
pub struct CompleteBody {
    /// Any JSON: what the waiter gets.
    #[schema(value_type = Option<Value>)]
    data: Option<Value>,
}

/// Reads the body of an answer: its data as JSON text.
pub fn complete(body: &Map<String, Value>) -> Result<Box<RawValue>, Failure> {
    let data = body.get("data").unwrap_or(&Value::Null);
    to_raw_value(data).map_err(|error| Error::internal(error).into())
}

/// A waitpoint.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct WaitpointItem {
    /// `waitpoint_...`
    pub id: String,
    /// Where to POST an answer, with credentials that may write to the session.
    pub url: String,
    /// `WAITING`, `COMPLETED` or `TIMED_OUT`.
    pub status: &'static str,
    /// How it ended: `record`, `timeout`, `closed` or `expired`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub outcome: Option<&'static str>,
    /// The session whose channel it waits on.
    pub session_id: String,
    /// `in` or `out`.
    pub io: &'static str,
    /// Who waits.
    pub run_id: String,
    /// The last record that the waiter had seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub last_seq_num: Option<u64>,
    /// The record that has completed it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub seq_num: Option<u64>,
    /// Labels.
    pub tags: Vec<String>,
    /// When it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, format = DateTime)]
    pub completed_at: Option<String>,
    /// When it times out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, format = DateTime)]
    pub timeout_at: Option<String>,
    /// As given.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub idempotency_key: Option<String>,
    /// Until when the key counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, format = DateTime)]
    pub idempotency_key_expires_at: Option<String>,
    /// When it was created.
    #[schema(format = DateTime)]
    pub created_at: String,
    /// The payload of the record, or why there is none; absent in lists, while it waits, and once the record is trimmed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub output: Option<String>,
    /// What `output` is: `application/json` or `text/plain`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub output_type: Option<&'static str>,
    /// True if `output` says why there is no record.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub output_is_error: Option<bool>,
}

impl WaitpointItem {
    /// As lists show it.
    pub fn new(waitpoint: &Waitpoint) -> Self {
        let completion = waitpoint.completion.as_ref();
        let key = waitpoint.idempotency_key.as_ref();
        Self {
            id: waitpoint.id.to_string(),
            url: format!("/api/v1/waitpoints/tokens/{}/complete", waitpoint.id),
            status: waitpoint.status().as_str(),
            outcome: completion.map(|completion| completion.outcome.as_str()),
            session_id: waitpoint.session.to_string(),
            io: waitpoint.direction.as_str(),
            run_id: waitpoint.run.to_string(),
            last_seq_num: waitpoint.after,
            seq_num: completion.and_then(|completion| match completion.outcome {
                Outcome::Record(seq_num) => Some(seq_num),
                _ => None,
            }),
            tags: waitpoint.tags.clone(),
            completed_at: completion.map(|completion| completion.at.to_string()),
            timeout_at: waitpoint.timeout_at.map(|at| at.to_string()),
            idempotency_key: key.cloned(),
            idempotency_key_expires_at: key.and(waitpoint.key_expires_at).map(|at| at.to_string()),
            created_at: waitpoint.created_at.to_string(),
            output: None,
            output_type: None,
            output_is_error: None,
        }
    }

    /// With what has come of it.
    pub fn with_output(waitpoint: &Waitpoint, record: Option<&Record>) -> Self {
        let mut item = Self::new(waitpoint);
        let why = match waitpoint.completion.map(|completion| completion.outcome) {
            None | Some(Outcome::Record(_)) => None,
            Some(Outcome::TimedOut) => Some("Waitpoint timed out"),
            Some(Outcome::Closed) => Some("The session was closed"),
            Some(Outcome::Expired) => Some("The session expired"),
        };
        let (output, kind, is_error) = match (why, record) {
            (Some(why), _) => {
                (json!({"code": TIMEOUT_CODE, "message": why}).to_string(), "application/json", true)
            }
            (None, Some(record)) => {
                let (payload, kind) = payload(record);
                (payload, kind, false)
            }
            (None, None) => return item,
        };
        item.output = Some(output);
        item.output_type = Some(kind);
        item.output_is_error = Some(is_error);
        item
    }
}

/// What a record carries. The append route stores a body as a string, which may hold JSON; the SDK parses it.
fn payload(record: &Record) -> (String, &'static str) {
    let Some(envelope) = envelope::unwrap(record) else {
        return (String::from_utf8_lossy(&record.body).into_owned(), "text/plain");
    };
    match serde_json::from_str::<String>(envelope.data.get()) {
        Ok(text) if serde_json::from_str::<&RawValue>(&text).is_ok() => (text, "application/json"),
        Ok(text) => (text, "text/plain"),
        Err(_) => (envelope.data.get().to_owned(), "application/json"),
    }
}

/// A page of waitpoints.
#[derive(Debug, Serialize, ToSchema)]
pub struct WaitpointListResponse {
    /// Newest first.
    pub data: Vec<WaitpointItem>,
    /// Cursors.
    pub pagination: Pagination,
}

/// A read query of the list.
#[derive(Debug)]
pub struct WaitpointQuery {
    /// What to list.
    pub filter: WaitpointFilter,
    /// Of which session only.
    pub session: Option<SessionRef>,
    /// Which page of it.
    pub page: WaitpointPageRequest,
    /// How many pages the caller has come through.
    pub step: u64,
}

/// Reads the query of the list. `both_cursors` as in [`list::parse`].
pub fn query(query: &str, now: Timestamp, both_cursors: bool) -> Result<WaitpointQuery, Failure> {
    let fields = list::fields(query);
    let mut faults = Faults::new();
    let mut statuses = Vec::new();
    for word in fields.get("filter[status]").into_iter().flatten().flat_map(|value| value.split(',')) {
        match WaitStatus::parse(word.trim()) {
            Some(status) => statuses.push(status),
            None if word.trim().is_empty() => {}
            None => faults.push(Violation {
                field: "filter[status]".to_owned(),
                message: "must be WAITING, COMPLETED or TIMED_OUT".to_owned(),
            }),
        }
    }
    let session = one(&fields, "filter[session]");
    let session = session.and_then(|text| note(SessionRef::parse(text), &mut faults));
    let (created_from, created_to) = list::created(&fields, now, &mut faults);
    let asked = list::asked(&fields, both_cursors, WaitpointCursor::decode).and_then(page);
    let filter = WaitpointFilter {
        statuses,
        tags_any: many(&fields, "filter[tags]"),
        session: None,
        run: one(&fields, "filter[run]").map(named_run),
        idempotency_key: one(&fields, "filter[idempotencyKey]").map(str::to_owned),
        created_from,
        created_to,
    };
    match note(asked, &mut faults) {
        Some((page, step)) if faults.is_empty() => Ok(WaitpointQuery { filter, session, page, step }),
        _ => Err(Failure::query(&faults)),
    }
}

fn page(asked: Asked<WaitpointCursor>) -> crate::domain::Result<(WaitpointPageRequest, u64)> {
    let anchor = match asked.anchor {
        (cursor, false) => WaitpointAnchor::After(cursor),
        (cursor, true) => WaitpointAnchor::Before(cursor),
    };
    Ok((WaitpointPageRequest::new(asked.size, anchor)?, asked.step))
}

/// How long to wait: `wait` of the query, which must be in range, or the preference of RFC 7240, which is cut.
pub fn patience(query: &str, headers: &HeaderMap) -> Result<Duration, Failure> {
    let fields = list::fields(query);
    let seconds = match one(&fields, "wait") {
        Some(text) => text.parse().ok().filter(|seconds| *seconds <= WAIT_MAX_SECONDS).ok_or_else(|| {
            let message = format!("must be 0 to {WAIT_MAX_SECONDS} seconds");
            Failure::query(&[Violation { field: "wait".to_owned(), message }])
        })?,
        None => preferred(headers).unwrap_or_default().min(WAIT_MAX_SECONDS),
    };
    Ok(Duration::from_secs(seconds))
}

fn preferred(headers: &HeaderMap) -> Option<u64> {
    let preferences = headers.get_all("prefer").iter().filter_map(|value| value.to_str().ok());
    preferences.flat_map(|value| value.split(',')).find_map(|preference| {
        let (name, value) = preference.split_once('=')?;
        let value = value.split(';').next().unwrap_or_default().trim().trim_matches('"');
        name.trim().eq_ignore_ascii_case("wait").then(|| value.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use serde_json::json;

    use super::*;
    use crate::domain::Position;

    const NOW: Timestamp = Timestamp::from_millis(1_000_000_000);

    fn read(body: &Value) -> Result<NewWaitpoint, Failure> {
        wait(body.as_object().expect("an object"), named_run("run_a"), NOW)
    }

    #[test]
    fn a_wait_is_read_as_the_sdk_writes_it() {
        let new = read(&json!({"session": "s", "io": "in", "timeout": "1m", "tags": "a", "lastSeqNum": 0}));
        let new = new.expect("reads");
        assert_eq!(new.timeout_at, Some(NOW.plus(Duration::from_secs(60))));
        assert_eq!((new.after, new.tags, new.idempotency_key), (Some(0), vec!["a".to_owned()], None));
        let new = read(&json!({"session": "s", "io": "out", "timeout": "2030-01-02T00:00:00.000Z"}));
        assert_eq!(new.expect("reads").timeout_at, Timestamp::parse("2030-01-02T00:00:00Z"));
        for (field, value) in [
            ("session", json!(null)),
            ("session", json!(" s")),
            ("io", json!("up")),
            ("timeout", json!("soon")),
            ("timeout", json!(5)),
            ("tags", json!([1])),
            ("lastSeqNum", json!(-1)),
            ("lastSeqNum", json!(1.5)),
            ("idempotencyKey", json!(1)),
            ("idempotencyKeyTTL", json!("never")),
        ] {
            let mut body = json!({"session": "s", "io": "in"});
            body[field] = value;
            assert_eq!(read(&body).expect_err(field).status.as_u16(), 400, "{field}");
        }
    }

    #[test]
    fn patience_is_asked_for_in_two_ways() {
        let prefers = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert("prefer", http::HeaderValue::from_static(text));
            patience("", &headers).expect("a preference is never refused").as_secs()
        };
        assert_eq!(prefers("respond-async, wait=10"), 10);
        assert_eq!(prefers("Wait=\"7\"; x=y"), 7);
        assert_eq!(prefers("wait=9999"), WAIT_MAX_SECONDS);
        assert_eq!(prefers("wait=soon"), 0);
        assert_eq!(patience("wait=300", &HeaderMap::new()).expect("fits").as_secs(), 300);
        for query in ["wait=301", "wait=-1", "wait=x"] {
            assert_eq!(patience(query, &HeaderMap::new()).expect_err(query).status.as_u16(), 400);
        }
    }

    #[test]
    fn a_payload_is_json_where_a_reader_can_parse_it() {
        for (body, output) in [
            (r#"{"data":"{\"a\":1}","id":"x"}"#, (r#"{"a":1}"#, "application/json")),
            (r#"{"data":"yes, do","id":"x"}"#, ("yes, do", "text/plain")),
            (r#"{"data":"\"yes\"","id":"x"}"#, (r#""yes""#, "application/json")),
            (r#"{"data":{"a": 1},"id":"x"}"#, (r#"{"a": 1}"#, "application/json")),
            ("foreign", ("foreign", "text/plain")),
        ] {
            let record = Record {
                position: Position::default(),
                headers: vec![],
                body: Bytes::from_static(body.as_bytes()),
                metered_end: 0,
            };
            let (text, kind) = payload(&record);
            assert_eq!((text.as_str(), kind), output);
        }
    }
}
