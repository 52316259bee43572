//! The body of a data record: `{"data":<any JSON>,"id":"<part id>"}`.
//!
//! The append route stores the request body as a JSON *string*; direct writers store a JSON *value*. SDK
//! readers deduplicate by `id` inside a window, so it is unique per channel.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use bytes::Bytes;
use data_encoding::BASE64URL_NOPAD;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use super::channel::Direction;
use super::close;
use super::error::{Error, Result};
use super::record::{Header, NewRecord, PART_ID_MAX, PartIds, Record, SeqNum};

/// First header of a control record; its value is the subtype.
pub(super) const CONTROL_HEADER: &[u8] = b"trigger-control";
/// Header of a `turn-complete`: the last record of `.in` that the turn has seen.
const SEEN_INPUT_HEADER: &[u8] = b"session-in-event-id";

/// Why a part id is refused that would be taken for the server's own.
const RESERVED: &str = "begins with what only the server's own records begin with";

/// A data record's body, borrowed from its bytes.
#[derive(Debug, Deserialize, Serialize)]
pub struct Envelope<'a> {
    /// The payload, exactly as it was written.
    #[serde(borrow)]
    pub data: &'a RawValue,
    /// The part id.
    #[serde(borrow)]
    pub id: Cow<'a, str>,
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

/// The part id in a body; `None` if the body is no envelope.
pub fn part_id(body: &[u8]) -> Option<Cow<'_, str>> {
    serde_json::from_slice(body).ok().map(|envelope: Envelope<'_>| envelope.id)
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
///
/// # Errors
/// [`Error::Invalid`] for a JSON string sent to `.in` that is no text, because of half a surrogate pair, and for a part id
/// that is reserved.
pub(super) fn record(direction: Direction, payload: &NewPayload<'_>) -> Result<NewRecord> {
    let (given, cleaned) = match (payload.content, direction) {
        (Content::Text(text), Direction::In) => (text, without_forged_source(text)),
        (Content::Json(value), Direction::In) => (value.get(), value_without_forged_source(value.get())?),
        (Content::Text(text), Direction::Out) => (text, None),
        (Content::Json(value), Direction::Out) => (value.get(), None),
    };
    let data = cleaned.as_deref().unwrap_or(given);
    let fresh;
    let id = match payload.part_id {
        Some(id) if close::is_reserved(id) => return Err(Error::invalid("partId", RESERVED)),
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
    Ok(NewRecord { part_id: payload.part_id.map(Into::into), ..NewRecord::data(body) })
}

/// Makes the records of a direct writer, who wraps them himself, what the append routes would have made of them: what is
/// sent to `.in` loses the claim that only the server may make. Returns what their part ids are worth: a batch in which
/// every record is an envelope of its own is known again if it is sent twice.
///
/// # Errors
/// As [`record`].
pub(super) fn adopt(direction: Direction, records: &mut [NewRecord]) -> Result<PartIds> {
    if direction == Direction::In {
        if records.iter().any(|record| has_reserved_id(&record.body)) {
            return Err(Error::invalid("id", RESERVED));
        }
        for record in records.iter_mut() {
            if let Some(body) = body_without_forged_source(&record.body)? {
                record.body = body;
            }
        }
    }
    let mut ids = BTreeSet::new();
    for record in records.iter() {
        match envelope_id(record) {
            Some(id) if ids.insert(id.clone()) => {}
            _ => return Ok(PartIds::Lasting),
        }
    }
    for record in records.iter_mut() {
        record.part_id = envelope_id(record);
    }
    Ok(PartIds::Recent)
}

/// Whether a reader might take the id of a body for one that only the server's own records have: any of them, whatever else
/// the body or its headers say.
fn has_reserved_id(body: &Bytes) -> bool {
    let Ok(text) = std::str::from_utf8(body) else { return false };
    if !text.contains(close::PART_PREFIX) && !text.contains("\\u") {
        return false;
    }
    let Ok(Fields(fields)) = serde_json::from_str(text) else { return false };
    let reserved = |(name, value): &(&RawValue, &RawValue)| {
        is_text(name, "id")
            && serde_json::from_str(value.get()).is_ok_and(|id: String| close::is_reserved(&id))
    };
    fields.iter().any(reserved)
}

/// The id of a data record's envelope, if it could be a part id.
fn envelope_id(record: &NewRecord) -> Option<Arc<str>> {
    if !record.headers.is_empty() || record.body.first() != Some(&b'{') {
        return None;
    }
    let Envelope { id, .. } = serde_json::from_slice(&record.body).ok()?;
    (1..=PART_ID_MAX).contains(&id.len()).then(|| id.into())
}

/// As [`without_forged_source`], for the data inside an envelope, and whatever a reader might take for one.
fn body_without_forged_source(body: &Bytes) -> Result<Option<Bytes>> {
    let Ok(text) = std::str::from_utf8(body) else { return Ok(None) };
    if !may_name_source(text) {
        return Ok(None);
    }
    let Ok(Fields(fields)) = serde_json::from_str(text) else { return Ok(None) };
    let mut cleaned = Vec::with_capacity(fields.len());
    for (name, value) in &fields {
        cleaned.push(if is_text(name, "data") { value_without_forged_source(value.get())? } else { None });
    }
    Ok(cleaned.iter().any(Option::is_some).then(|| {
        let fields = fields.iter().zip(&cleaned);
        Fields::write(
            fields.map(|((name, value), cleaned)| {
                (name.get(), cleaned.as_deref().unwrap_or_else(|| value.get()))
            }),
        )
        .into()
    }))
}

/// The fields of a JSON object as they were written. Nothing inside them is looked at, so that neither depth, nor
/// numbers, nor half a surrogate pair keeps one from being read that a JavaScript reader would read.
struct Fields<'a>(Vec<(&'a RawValue, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Read<'a>(PhantomData<&'a ()>);

        impl<'de: 'a, 'a> Visitor<'de> for Read<'a> {
            type Value = Fields<'a>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Fields<'a>, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Fields(fields))
            }
        }

        deserializer.deserialize_map(Read(PhantomData))
    }
}

impl Fields<'_> {
    fn write<'b>(fields: impl Iterator<Item = (&'b str, &'b str)>) -> String {
        let fields: Vec<_> = fields.map(|(name, value)| format!("{name}:{value}")).collect();
        format!("{{{}}}", fields.join(","))
    }
}

fn is_text(json: &RawValue, text: &str) -> bool {
    serde_json::from_str::<String>(json.get()).is_ok_and(|own| own == text)
}

/// `payload.actionSource: "webhook"` is the server's own claim: a body that carries it loses it and the white space
/// between its fields; every other body stays as it is, to the byte.
fn without_forged_source(text: &str) -> Option<String> {
    if !may_name_source(text) {
        return None;
    }
    let Fields(body) = serde_json::from_str(text).ok()?;
    // A field may be repeated, and readers differ in which one counts.
    let cleaned: Vec<_> = body
        .iter()
        .map(|(name, value)| is_text(name, "payload").then(|| payload_without_forged_source(value)).flatten())
        .collect();
    cleaned.iter().any(Option::is_some).then(|| {
        let fields = body.iter().zip(&cleaned);
        Fields::write(
            fields.map(|((name, value), cleaned)| {
                (name.get(), cleaned.as_deref().unwrap_or_else(|| value.get()))
            }),
        )
    })
}

fn payload_without_forged_source(payload: &RawValue) -> Option<String> {
    let Fields(fields) = serde_json::from_str(payload.get()).ok()?;
    let forged =
        |(name, value): &&(&RawValue, &RawValue)| is_text(name, "actionSource") && is_text(value, "webhook");
    fields.iter().any(|field| forged(&field)).then(|| {
        let honest = fields.iter().filter(|field| !forged(field));
        Fields::write(honest.map(|(name, value)| (name.get(), value.get())))
    })
}

/// As [`without_forged_source`], for a JSON value. A string is stored just as a text is, so it is judged as one.
fn value_without_forged_source(json: &str) -> Result<Option<String>> {
    if !json.starts_with('"') || !may_name_source(json) {
        return Ok(without_forged_source(json));
    }
    let text: String = serde_json::from_str(json)
        .map_err(|_| Error::invalid("data", "must not contain half of a surrogate pair"))?;
    Ok(without_forged_source(&text).map(|cleaned| Value::from(cleaned).to_string()))
}

/// Looks for the name, and for the one way of writing letters that hides it. Cheap, because every record to `.in`
/// is asked.
fn may_name_source(json: &str) -> bool {
    json.contains("actionSource") || json.contains("\\u")
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

/// True for a record that carries a payload: neither a command nor a control record.
pub(super) fn is_data(record: &Record) -> bool {
    !record.is_command() && control(&record.headers).is_none()
}

/// True for the control record that ends an agent's turn.
pub(super) fn is_turn_complete(record: &Record) -> bool {
    control(&record.headers) == Some("turn-complete")
}

/// The last record of `.in` that the agent had seen when its turn was complete, if the control record says so.
pub(super) fn seen_input(record: &Record) -> Option<SeqNum> {
    let (_, value) = record.headers.iter().find(|(name, _)| name == SEEN_INPUT_HEADER)?;
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// True for a data record of a client that asks the agent for a turn: of the kind `message`, and neither an action, which is of
/// that kind too, nor a close.
pub(super) fn is_message(record: &Record) -> bool {
    #[derive(Deserialize)]
    struct Chunk<'a> {
        #[serde(borrow)]
        kind: Cow<'a, str>,
        #[serde(borrow)]
        payload: Option<&'a RawValue>,
    }
    #[derive(Deserialize)]
    struct Payload<'a> {
        #[serde(borrow)]
        trigger: Cow<'a, str>,
    }
    let Some(Envelope { data, .. }) = unwrap(record) else { return false };
    // Written as a text by the append route, as a value by others.
    let text: String;
    let mut chunk = data.get();
    if chunk.starts_with('"') {
        text = serde_json::from_str(chunk).unwrap_or_default();
        chunk = &text;
    }
    let Ok(Chunk { kind, payload }) = serde_json::from_str(chunk) else { return false };
    let trigger = payload.and_then(|payload| serde_json::from_str(payload.get()).ok());
    let trigger = trigger.map(|Payload { trigger }| trigger);
    kind == "message" && !matches!(trigger.as_deref(), Some("action" | "close"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Position;

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
        let held = stored(record(Direction::In, &payload).expect("text").body);
        let envelope = unwrap(&held).expect("an envelope");
        assert_eq!((envelope.data.get(), envelope.id.as_ref()), (r#"{"a": [1, 2.50]}"#, "p\"1"));
        let forged: Box<RawValue> =
            serde_json::from_str(r#"{"payload":{"actionSource":"webhook"}}"#).expect("JSON");
        let payload = NewPayload { content: Content::Json(&forged), part_id: None };
        let held = stored(record(Direction::In, &payload).expect("text").body);
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

    #[test]
    fn nothing_that_a_reader_would_read_hides_a_forged_source() {
        let deep = format!("{}1{}", "[".repeat(300), "]".repeat(300));
        for other in [&deep, r#""\ud800""#, "123456789012345678901234567890.10", "1e999"] {
            let forged = format!(r#"{{"payload":{{"x":{other},"actionSource":"webhook"}},"y":{other}}}"#);
            let clean = format!(r#"{{"payload":{{"x":{other}}},"y":{other}}}"#);
            assert_eq!(without_forged_source(&forged), Some(clean));
        }
        for (forged, clean) in [
            (r#" {"\ud800": 1, "payload": {"actionSource": "webhook"}} "#, r#"{"\ud800":1,"payload":{}}"#),
            (
                r#"{"payload":{"actionSource":"webhook"},"payload":{"actionSource":"webhook"}}"#,
                r#"{"payload":{},"payload":{}}"#,
            ),
            (
                r#"{"payload":{"actionSource":"user","actionSource":"webhook"}}"#,
                r#"{"payload":{"actionSource":"user"}}"#,
            ),
        ] {
            assert_eq!(without_forged_source(forged).as_deref(), Some(clean));
        }
    }

    #[test]
    fn a_direct_writers_envelope_is_cleaned_on_the_way_in_and_names_its_part() {
        let adopted = |direction, bodies: &[&str]| {
            let mut records: Vec<_> = bodies.iter().map(|body| NewRecord::data(body.to_string())).collect();
            let part_ids = adopt(direction, &mut records).expect("text");
            let texts = records.iter().map(|record| String::from_utf8_lossy(&record.body).into_owned());
            let ids = records.iter().map(|record| record.part_id.as_deref().unwrap_or_default().to_owned());
            (part_ids, texts.collect::<Vec<_>>(), ids.collect::<Vec<_>>())
        };
        let forged = r#"{"data":{"payload":{"actionSource":"webhook"}},"id":"abc1234"}"#;
        let (part_ids, texts, ids) = adopted(Direction::In, &[forged]);
        assert_eq!((part_ids, ids[0].as_str()), (PartIds::Recent, "abc1234"));
        assert_eq!(texts[0], r#"{"data":{"payload":{}},"id":"abc1234"}"#);
        assert_eq!(adopted(Direction::Out, &[forged]).1[0], forged, "the agent is not a client");
        for hidden in [
            r#"{"data":1,"d\u0061ta":{"payload":{"actionSource":"webhook"}},"id":"a"}"#,
            r#"{"id":7,"data":"{\"payload\":{\"actionSource\":\"webhook\"}}"}"#,
        ] {
            assert!(!adopted(Direction::In, &[hidden]).1[0].contains("actionSource"), "{hidden}");
        }
        let honest = [r#"{"data":"x","id":"a"}"#, r#"{"data":"x","id":"b"}"#];
        assert_eq!(adopted(Direction::In, &honest).2, ["a", "b"]);
        for other in [[honest[0], "plain"], [honest[0], honest[0]], [honest[0], r#"{"data":1,"id":""}"#]] {
            let (part_ids, _, ids) = adopted(Direction::Out, &other);
            assert_eq!((part_ids, ids), (PartIds::Lasting, vec![String::new(), String::new()]), "{other:?}");
        }
    }

    #[test]
    fn no_direct_writer_hides_the_close_behind_a_record_with_its_id() {
        let id = "session-closed:session_a";
        for body in [
            format!(r#"{{"data":1,"id":"{id}"}}"#),
            format!(r#" {{"data":1,"id":"{id}"}}"#),
            format!(r#"{{"id":"a","data":1,"id":"{id}"}}"#),
            format!(r#"{{"id":"{id}"}}"#),
            r#"{"data":1,"i\u0064":"session\u002dclosed:session_a"}"#.to_owned(),
        ] {
            for header in [None, Some(("x".into(), "y".into()))] {
                let headers = header.into_iter().collect();
                let mut records =
                    [NewRecord::data("plain"), NewRecord { headers, ..NewRecord::data(body.clone()) }];
                assert!(matches!(adopt(Direction::In, &mut records), Err(Error::Invalid(_))), "{body}");
            }
        }
        let mut honest = [NewRecord::data(format!(r#"{{"data":"{id}","id":"a"}}"#))];
        assert!(adopt(Direction::In, &mut honest).is_ok());
        let mut agents = [NewRecord::data(format!(r#"{{"data":1,"id":"{id}"}}"#))];
        assert!(adopt(Direction::Out, &mut agents).is_ok(), "no record of the server's has an id there");
    }

    #[test]
    fn a_json_string_is_judged_as_the_text_that_it_holds() {
        let send = |direction, json: &str| {
            let value: Box<RawValue> = serde_json::from_str(json).expect("JSON");
            record(direction, &NewPayload { content: Content::Json(&value), part_id: Some("p") })
        };
        let data = |record: Result<NewRecord>| {
            let held = stored(record.expect("text").body);
            unwrap(&held).expect("an envelope").data.get().to_owned()
        };
        let forged = r#""{\"payload\":{\"actionSource\":\"webhook\"}}""#;
        assert_eq!(data(send(Direction::In, forged)), r#""{\"payload\":{}}""#);
        let hidden = r#""{\"payload\":{\"action\\u0053ource\":\"web\u0068ook\"}}""#;
        assert_eq!(data(send(Direction::In, hidden)), r#""{\"payload\":{}}""#);
        assert_eq!(data(send(Direction::Out, forged)), forged, "the agent is not a client");
        let honest = r#""a \u00e9 actionSource""#;
        assert_eq!(data(send(Direction::In, honest)), honest);
        let broken =
            send(Direction::In, r#""{\"payload\":{\"actionSource\":\"webhook\",\"x\":\"\ud800\"}}""#);
        assert!(matches!(broken, Err(Error::Invalid(_))), "{broken:?}");
    }
}
