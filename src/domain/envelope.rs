//! The body of a data record: `{"data":<any JSON>,"id":"<part id>"}`.
//!
//! The append route stores the request body as a JSON *string*; direct writers store a JSON *value*. SDK
//! readers deduplicate by `id` inside a window, so it is unique per channel.

use bytes::Bytes;
use data_encoding::BASE64URL_NOPAD;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use super::channel::Direction;
use super::record::{Header, NewRecord, Record};

/// First header of a control record; its value is the subtype.
const CONTROL_HEADER: &[u8] = b"trigger-control";

/// A data record's body, borrowed from its bytes.
#[derive(Debug, Deserialize, Serialize)]
pub struct Envelope<'a> {
    /// The payload, exactly as it was written.
    #[serde(borrow)]
    pub data: &'a RawValue,
    /// The part id.
    pub id: String,
}

#[derive(Serialize)]
struct TextEnvelope<'a> {
    data: &'a str,
    id: &'a str,
}

/// Wraps a request body as the append route stores it.
pub fn wrap_text(text: &str, id: &str) -> Bytes {
    // Room for a quote escaped in every eighth place, so that most bodies are written without growing.
    let mut envelope = Vec::with_capacity(text.len() + text.len() / 8 + id.len() + 24);
    serde_json::to_writer(&mut envelope, &TextEnvelope { data: text, id })
        .expect("two strings always serialize, and memory takes them");
    Bytes::from(envelope)
}

/// Wraps JSON text as direct writers store a value.
fn wrap_json(json: &str, id: &str) -> Bytes {
    let id = Value::from(id).to_string();
    let mut envelope = String::with_capacity(json.len() + id.len() + 16);
    for part in ["{\"data\":", json, ",\"id\":", &id, "}"] {
        envelope.push_str(part);
    }
    Bytes::from(envelope)
}

/// Reads a record's envelope; `None` for control and command records and for foreign bodies.
pub fn unwrap(record: &Record) -> Option<Envelope<'_>> {
    if record.is_command() || record.body.is_empty() {
        return None;
    }
    serde_json::from_slice(&record.body).ok()
}

/// A payload to be appended.
#[derive(Clone, Debug)]
pub struct NewPayload<'a> {
    /// What it is.
    pub content: Content<'a>,
    /// The writer's own id of it: a repeat is stored once.
    pub part_id: Option<&'a str>,
}

/// The two kinds of payloads.
#[derive(Clone, Copy, Debug)]
pub enum Content<'a> {
    /// Text, stored as a JSON string.
    Text(&'a str),
    /// A JSON value, stored as it is.
    Json(&'a RawValue),
}

/// A payload as a data record of a channel. What clients send to `.in` loses the claim that only the server may make.
pub(super) fn record(direction: Direction, payload: &NewPayload<'_>) -> NewRecord {
    let given = match payload.content {
        Content::Text(text) => text,
        Content::Json(value) => value.get(),
    };
    let cleaned = (direction == Direction::In).then(|| without_forged_source(given)).flatten();
    let data = cleaned.as_deref().unwrap_or(given);
    let fresh;
    let id = match payload.part_id {
        Some(id) => id,
        None => {
            fresh = fresh_part_id();
            &fresh
        }
    };
    let body = match payload.content {
        Content::Text(_) => wrap_text(data, id),
        Content::Json(_) => wrap_json(data, id),
    };
    NewRecord { part_id: payload.part_id.map(Into::into), ..NewRecord::data(body) }
}

/// `payload.actionSource: "webhook"` is the server's own claim: a body that carries it loses it and is
/// serialized anew; every other body stays as it is, to the byte.
fn without_forged_source(text: &str) -> Option<String> {
    if !text.contains("actionSource") && !text.contains("\\u") {
        return None;
    }
    let mut body: Value = serde_json::from_str(text).ok()?;
    let payload = body.get_mut("payload")?.as_object_mut()?;
    if payload.get("actionSource")?.as_str()? != "webhook" {
        return None;
    }
    payload.remove("actionSource");
    Some(body.to_string())
}

/// 12 random bytes. The SDK's own writers use 7 characters, which is few enough to collide in a busy channel,
/// and readers drop a record whose id they have seen.
fn fresh_part_id() -> String {
    BASE64URL_NOPAD.encode(&uuid::Uuid::new_v4().as_bytes()[..12])
}

/// The subtype of a control record.
pub fn control(headers: &[Header]) -> Option<&str> {
    let (name, value) = headers.first()?;
    if name != CONTROL_HEADER {
        return None;
    }
    std::str::from_utf8(value).ok()
}

/// True if any header would make readers or the log take this record for an order.
pub(super) fn claims_control(record: &NewRecord) -> bool {
    record.headers.iter().any(|(name, _)| name.is_empty() || name.eq_ignore_ascii_case(CONTROL_HEADER))
}

/// True for the control record that ends an agent's turn.
pub(super) fn is_turn_complete(record: &Record) -> bool {
    control(&record.headers) == Some("turn-complete")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::record::Position;

    fn stored(body: Bytes) -> Record {
        Record { position: Position::default(), headers: vec![], body, metered_end: 0 }
    }

    #[test]
    fn text_comes_back_as_a_json_string() {
        let record = stored(wrap_text("{\"a\":\"\u{1f600}\\n\"}", "p1"));
        let envelope = unwrap(&record).expect("an envelope");
        assert_eq!(envelope.id, "p1");
        let text: String = serde_json::from_str(envelope.data.get()).expect("a string");
        assert_eq!(text, "{\"a\":\"\u{1f600}\\n\"}");
    }

    #[test]
    fn a_value_comes_back_to_the_byte_and_without_a_forged_source() {
        let value: Box<RawValue> = serde_json::from_str(r#"{"a": [1, 2.50]}"#).expect("JSON");
        let payload = NewPayload { content: Content::Json(&value), part_id: Some("p\"1") };
        let held = stored(record(Direction::In, &payload).body);
        let envelope = unwrap(&held).expect("an envelope");
        assert_eq!((envelope.data.get(), envelope.id.as_str()), (r#"{"a": [1, 2.50]}"#, "p\"1"));
        let forged: Box<RawValue> =
            serde_json::from_str(r#"{"payload":{"actionSource":"webhook"}}"#).expect("JSON");
        let payload = NewPayload { content: Content::Json(&forged), part_id: None };
        let held = stored(record(Direction::In, &payload).body);
        assert_eq!(unwrap(&held).expect("an envelope").data.get(), r#"{"payload":{}}"#);
    }

    #[test]
    fn anything_else_is_no_envelope() {
        for body in ["", "null", "[]", "{\"data\":1}", "plain"] {
            assert!(unwrap(&stored(Bytes::from(body))).is_none(), "{body}");
        }
    }

    #[test]
    fn a_forged_source_is_removed_and_every_other_body_stays_to_the_byte() {
        let clean = |text: &str| without_forged_source(text);
        let forged = r#"{"kind":"message","payload":{"actionSource":"webhook","a":1}}"#;
        assert_eq!(clean(forged).as_deref(), Some(r#"{"kind":"message","payload":{"a":1}}"#));
        let escaped = r#"{"payload":{"action\u0053ource":"web\u0068ook"}}"#;
        assert_eq!(clean(escaped).as_deref(), Some(r#"{"payload":{}}"#));
        for text in [
            r#"{ "payload": {"actionSource": "user"} }"#,
            r#"{"actionSource":"webhook"}"#,
            r#"actionSource webhook"#,
            r#"{"payload":[1]}"#,
        ] {
            assert_eq!(clean(text), None, "{text}");
        }
    }
}
