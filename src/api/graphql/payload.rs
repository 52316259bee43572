//! The payload of a record as GraphQL shows it.

use std::borrow::Cow;

use serde_json::value::RawValue;

use crate::domain::Record;
use crate::domain::envelope::{self, Envelope};

/// A record's envelope, opened.
pub(super) struct Payload<'a>(Envelope<'a>);

impl<'a> Payload<'a> {
    /// `None` for control records and for bodies without an envelope.
    pub fn of(record: &'a Record) -> Option<Self> {
        envelope::unwrap(record).map(Self)
    }

    /// The part id.
    pub fn part_id(&self) -> &str {
        &self.0.id
    }

    /// The payload as JSON text: a string that holds a JSON object or array is that value.
    pub fn json(&self) -> Cow<'a, str> {
        let raw = self.0.data.get();
        match self.string() {
            Some(text) if is_structure(&text) => text,
            _ => Cow::Borrowed(raw),
        }
    }

    /// The text that was written, or the JSON text of a value.
    pub fn text(&self) -> Cow<'a, str> {
        self.string().unwrap_or(Cow::Borrowed(self.0.data.get()))
    }

    fn string(&self) -> Option<Cow<'a, str>> {
        let raw = self.0.data.get();
        let inner = raw.strip_prefix('"')?.strip_suffix('"')?;
        if !inner.contains('\\') {
            return Some(Cow::Borrowed(inner));
        }
        serde_json::from_str(raw).ok().map(Cow::Owned)
    }
}

fn is_structure(text: &str) -> bool {
    let start = text.trim_start_matches([' ', '\t', '\n', '\r']);
    start.starts_with(['{', '[']) && serde_json::from_str::<&RawValue>(text).is_ok()
}

/// The body as text where it has no envelope; `None` for control records and for bytes that are not UTF-8.
pub(super) fn bare_text(record: &Record) -> Option<&str> {
    let body = (!record.body.is_empty() && !record.is_command()).then_some(&record.body)?;
    std::str::from_utf8(body).ok()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::domain::Position;

    fn record(body: &'static str) -> Record {
        Record { position: Position::default(), headers: vec![], body: Bytes::from(body), metered_end: 0 }
    }

    #[test]
    fn a_text_that_is_a_structure_is_shown_as_one_and_any_other_stays_text() {
        for (body, json, text) in [
            (r#"{"data":"hi","id":"p"}"#, r#""hi""#, "hi"),
            (r#"{"data":"42","id":"p"}"#, r#""42""#, "42"),
            (r#"{"data":" {\"a\":1}","id":"p"}"#, r#" {"a":1}"#, r#" {"a":1}"#),
            (r#"{"data":"[1]","id":"p"}"#, "[1]", "[1]"),
            (r#"{"data":"{a","id":"p"}"#, r#""{a""#, "{a"),
            (r#"{"data":"a\nb","id":"p"}"#, r#""a\nb""#, "a\nb"),
            (r#"{"data":{"a": 1},"id":"p"}"#, r#"{"a": 1}"#, r#"{"a": 1}"#),
            (r#"{"data":null,"id":"p"}"#, "null", "null"),
        ] {
            let record = record(body);
            let payload = Payload::of(&record).expect("an envelope");
            assert_eq!((payload.json().as_ref(), payload.text().as_ref()), (json, text), "{body}");
        }
    }

    #[test]
    fn a_body_without_an_envelope_is_text_only() {
        let record = record("plain");
        assert!(Payload::of(&record).is_none());
        assert_eq!(bare_text(&record), Some("plain"));
    }
}
