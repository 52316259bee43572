//! Scalars, each with the document that specifies it.

use std::fmt::Display;
use std::str::FromStr;

use async_graphql::{InputValueError, InputValueResult, Scalar, ScalarType, Value};

use crate::domain::{SeqNum, Timestamp};

/// A moment: RFC 3339, UTC, with milliseconds. On input any RFC 3339 offset is accepted.
#[derive(Clone, Copy, Debug)]
pub struct DateTime(pub Timestamp);

/// A moment: RFC 3339, UTC, with milliseconds. On input any RFC 3339 offset is accepted.
#[Scalar(name = "DateTime", specified_by_url = "https://www.rfc-editor.org/rfc/rfc3339")]
impl ScalarType for DateTime {
    fn parse(value: Value) -> InputValueResult<Self> {
        let Value::String(text) = &value else { return Err(InputValueError::expected_type(value)) };
        let moment = Timestamp::parse(text);
        moment.map(Self).ok_or_else(|| InputValueError::custom("must be an RFC 3339 date and time"))
    }

    fn is_valid(value: &Value) -> bool {
        matches!(value, Value::String(text) if Timestamp::parse(text).is_some())
    }

    fn to_value(&self) -> Value {
        Value::String(self.0.to_string())
    }
}

/// A whole number from 0 to 2^64 - 1 as decimal digits in a string, because JSON numbers lose digits above 2^53. On
/// input a number is accepted too.
#[derive(Clone, Copy, Debug)]
pub struct UInt64(pub u64);

/// A whole number from 0 to 2^64 - 1 as decimal digits in a string, because JSON numbers lose digits above 2^53. On
/// input a number is accepted too.
#[Scalar(name = "UInt64", specified_by_url = "https://www.rfc-editor.org/rfc/rfc7493#section-2.2")]
impl ScalarType for UInt64 {
    fn parse(value: Value) -> InputValueResult<Self> {
        number(&value)
            .map(Self)
            .ok_or_else(|| InputValueError::custom("must be a whole number from 0 to 2^64 - 1"))
    }

    fn is_valid(value: &Value) -> bool {
        number(value).is_some()
    }

    fn to_value(&self) -> Value {
        Value::String(self.0.to_string())
    }
}

fn number(value: &Value) -> Option<u64> {
    match value {
        Value::Number(number) => number.as_u64(),
        Value::String(text) => digits(text),
        _ => None,
    }
}

fn digits<N: FromStr>(text: &str) -> Option<N> {
    let all = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    all.then(|| text.parse().ok()).flatten()
}

/// The place of a record in its channel: its sequence number in decimal digits. Resuming `after` it gives the next
/// record. The same cursor works in REST and in the `Last-Event-ID` of server-sent events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor(pub SeqNum);

/// The place of a record in its channel: its sequence number in decimal digits. Resuming `after` it gives the next
/// record. The same cursor works in REST and in the `Last-Event-ID` of server-sent events.
#[Scalar(name = "Cursor", specified_by_url = "https://relay.dev/graphql/connections.htm#sec-Cursor")]
impl ScalarType for Cursor {
    fn parse(value: Value) -> InputValueResult<Self> {
        number(&value).map(Self).ok_or_else(|| InputValueError::custom("is not a cursor of a record"))
    }

    fn is_valid(value: &Value) -> bool {
        number(value).is_some()
    }

    fn to_value(&self) -> Value {
        Value::String(self.0.to_string())
    }
}

impl Display for Cursor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Cursor {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        digits(text).map(Self).ok_or(())
    }
}

/// Any JSON value.
#[derive(Clone, Debug)]
pub struct Json(pub Value);

/// Any JSON value.
#[Scalar(name = "JSON", specified_by_url = "https://www.rfc-editor.org/rfc/rfc8259")]
impl ScalarType for Json {
    fn parse(value: Value) -> InputValueResult<Self> {
        Ok(Self(value))
    }

    fn to_value(&self) -> Value {
        self.0.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sixty_four_bit_number_keeps_every_digit() {
        let most = Value::String(u64::MAX.to_string());
        assert_eq!(UInt64::parse(most.clone()).expect("reads").to_value(), most);
        assert_eq!(UInt64::parse(Value::Number(7.into())).expect("reads").0, 7);
        for text in ["", "-1", "+1", " 1", "1.0", "18446744073709551616", "x"] {
            assert!(!UInt64::is_valid(&Value::String(text.to_owned())), "{text}");
            assert!(text.parse::<Cursor>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_moment_is_read_with_any_offset_and_written_in_utc() {
        let read = DateTime::parse(Value::String("2026-01-01T01:00:00+01:00".to_owned())).expect("reads");
        assert_eq!(read.to_value(), Value::String("2026-01-01T00:00:00.000Z".to_owned()));
        assert!(!DateTime::is_valid(&Value::Number(1.into())));
    }
}
