//! Records in the JSON of S2: text as it is, or everything in base64.

use std::io::Write;

use bytes::Bytes;
use http::HeaderMap;
use s2_api::data::{FORMAT_HEADER, Format};

use super::error;
use crate::api::error::Failure;
use crate::api::realtime::event;
use crate::domain::{Position, Record};

/// The format that a request asks for.
pub(super) fn asked(headers: &HeaderMap) -> Result<Format, Failure> {
    let Some(value) = headers.get(&FORMAT_HEADER) else { return Ok(Format::default()) };
    let format = value.to_str().ok().and_then(|text| text.parse().ok());
    format.ok_or_else(|| error::bad("bad_header", "s2-format must be raw or base64"))
}

/// A batch that was read: `{"records":[...],"tail"?}`.
pub(super) fn batch(format: Format, records: &[Record], tail: Option<Position>) -> Vec<u8> {
    let mut out = BEGIN.to_vec();
    self::records(&mut out, format, records, &mut true);
    end(&mut out, tail);
    out
}

/// How a batch begins.
pub(super) const BEGIN: &[u8] = b"{\"records\":[";

/// Appends records of a batch.
pub(super) fn records(out: &mut Vec<u8>, format: Format, records: &[Record], is_first: &mut bool) {
    out.reserve(records.iter().map(|record| record.body.len() * 4 / 3 + 96).sum());
    for record in records {
        if !std::mem::take(is_first) {
            out.push(b',');
        }
        self::record(out, format, record);
    }
}

/// Appends the end of a batch.
pub(super) fn end(out: &mut Vec<u8>, tail: Option<Position>) {
    out.push(b']');
    if let Some(Position { seq_num, timestamp }) = tail {
        put(out, format_args!(",\"tail\":{{\"seq_num\":{seq_num},\"timestamp\":{}}}", timestamp.millis()));
    }
    out.push(b'}');
}

fn record(out: &mut Vec<u8>, format: Format, record: &Record) {
    let Position { seq_num, timestamp } = record.position;
    put(out, format_args!("{{\"seq_num\":{seq_num},\"timestamp\":{}", timestamp.millis()));
    if !record.headers.is_empty() {
        out.extend_from_slice(b",\"headers\":[");
        for (index, (name, value)) in record.headers.iter().enumerate() {
            out.extend_from_slice(if index == 0 { b"[" } else { b",[" });
            text(out, format, name);
            out.push(b',');
            text(out, format, value);
            out.push(b']');
        }
        out.push(b']');
    }
    if !record.body.is_empty() {
        out.extend_from_slice(b",\"body\":");
        text(out, format, &record.body);
    }
    out.push(b'}');
}

fn text(out: &mut Vec<u8>, format: Format, bytes: &Bytes) {
    match format {
        Format::Raw => event::write_text(out, bytes),
        Format::Base64 => put(out, format_args!("\"{}\"", data_encoding::BASE64.encode_display(bytes))),
    }
}

/// Formats into a buffer; writing to memory cannot fail.
fn put(out: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    let _ = out.write_fmt(text);
}
