//! Reads stored records: all of them, streamed in bounded memory, or one page.

use std::io::Write;

use axum::body::Body;
use axum::extract::{Extension, RawQuery, State};
use axum::response::{IntoResponse, Response};
use data_encoding::BASE64;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use http::header::{CONTENT_TYPE, HeaderValue};
use serde_json::Value;
use utoipa::ToSchema;

use super::event::{write_headers, write_text};
use crate::api::App;
use crate::api::error::{Failure, Route};
use crate::api::extract::{Asker, ChannelPath};
use crate::api::trace::RequestId;
use crate::domain::record::{BATCH_RECORDS_MAX, ReadLimit};
use crate::domain::send_budget::Reserved;
use crate::domain::{ConnectionBudget, Error, Record, RecordBatch, SeqNum, Violation, envelope};
use crate::telemetry::Chain;

const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// What the answer holds; it is written as it is read.
#[derive(ToSchema)]
#[allow(dead_code, reason = "documents what `write_records` writes")]
struct RecordsResponse {
    /// In order, without commands.
    records: Vec<RecordItem>,
    /// With `limit`, where more remain: for `afterEventId`.
    #[schema(nullable = false)]
    next: Option<String>,
}

/// One record.
#[derive(ToSchema)]
#[schema(rename_all = "camelCase")]
#[allow(dead_code, reason = "documents what `write_records` writes")]
struct RecordItem {
    /// What the writer put into the envelope: a string from the append route, any JSON from direct writers, an
    /// empty string for a control record and for a body in no envelope.
    #[schema(value_type = Value)]
    data: Value,
    /// Part id; empty where there is no envelope.
    id: String,
    /// Place in the channel.
    seq_num: u64,
    /// Pairs of name and value; absent without any.
    #[schema(nullable = false)]
    headers: Option<Vec<(String, String)>>,
    /// The body of a direct writer that is in no envelope, if it is UTF-8.
    #[schema(nullable = false)]
    text: Option<String>,
    /// Such a body that is not.
    #[schema(nullable = false)]
    base64: Option<String>,
}

/// Every record after a cursor, without commands; one page and a `next` cursor when `limit` is given.
#[utoipa::path(get, path = "/realtime/v1/sessions/{session}/{io}/records", tag = "realtime",
    operation_id = "readRecords",
    params(("session" = String, Path), ("io" = String, Path),
        ("afterEventId" = Option<String>, Query, description = "Digits; exclusive"),
        ("limit" = Option<u32>, Query, description = "1 to 1000; the whole answer without it")),
    responses((status = 200, description = "Records in order", body = RecordsResponse,
        headers(("X-Cursor-Ahead" = u64, description = "The tail, if the channel has no record at afterEventId: records \
            that were given out are lost, or the id is another channel's")))))]
pub async fn records(
    State(app): State<App>,
    Asker(caller): Asker,
    Extension(id): Extension<RequestId>,
    Extension(budget): Extension<ConnectionBudget>,
    path: ChannelPath,
    RawQuery(query): RawQuery,
) -> Result<Response, Failure> {
    let in_load = |error| Failure::from(error).on(Route::Load);
    let (start, page) = parse(query.as_deref().unwrap_or_default())?;
    let ahead = super::cursor_ahead(&app, &caller, &path, start, &id).await.map_err(in_load)?;
    let limit = page.map_or(ReadLimit::NONE, ReadLimit::count);
    let batches = app.sessions.drain(&caller, &path.session, &path.channel, start, limit, &budget).await;
    let mut batches = batches.map_err(in_load)?;
    let first = batches.next().await.transpose().map_err(in_load)?;
    let mut text = Text { is_page: page.is_some(), is_first: true, next: None };
    let mut begin = b"{\"records\":[".to_vec();
    let mut is_whole = true;
    if let Some(batch) = &first {
        text.write(&mut begin, batch);
        is_whole = batch.tail.is_some() || page == Some(batch.records.len());
    }
    if is_whole {
        text.end(&mut begin);
    }
    let begin = match first {
        Some(batch) => batch.holding(begin.into()),
        None => begin.into(),
    };
    let ahead = ahead.map(|header| [header]);
    let headers = (ahead, [(CONTENT_TYPE, JSON)], Extension(Reserved));
    if is_whole {
        return Ok((headers, Body::from(begin)).into_response());
    }
    let rest = stream::try_unfold(Some((batches, text)), |state| async move {
        let Some((mut batches, mut text)) = state else { return Ok(None) };
        let mut out = Vec::new();
        let Some(batch) = batches.next().await.transpose()? else {
            text.end(&mut out);
            return Ok(Some((out.into(), None)));
        };
        text.write(&mut out, &batch);
        Ok(Some((batch.holding(out.into()), Some((batches, text)))))
    });
    // After an error nothing follows: the body ends uncleanly.
    let rest = rest.inspect_err(move |error: &Error| {
        tracing::error!(request.id = id.as_str(), error = %Chain(error), "cannot go on reading records");
    });
    let body = Body::from_stream(stream::iter([Ok(begin)]).chain(rest));
    Ok((headers, body).into_response())
}

/// The text of an answer, as far as it is written.
struct Text {
    /// Of a page, which says where the next one begins.
    is_page: bool,
    is_first: bool,
    next: Option<SeqNum>,
}

impl Text {
    fn write(&mut self, out: &mut Vec<u8>, batch: &RecordBatch) {
        write_records(out, &batch.records, &mut self.is_first);
        let more = self.is_page && batch.tail.is_none();
        self.next = batch.records.last().filter(|_| more).map(|last| last.position.seq_num);
    }

    fn end(&self, out: &mut Vec<u8>) {
        out.push(b']');
        if let Some(next) = self.next {
            let _ = write!(out, ",\"next\":\"{next}\"");
        }
        out.push(b'}');
    }
}

/// As for the main channel.
#[utoipa::path(get, path = "/realtime/v1/sessions/{session}/channels/{channel}/{io}/records",
    tag = "realtime", operation_id = "readNamedRecords", params(("channel" = String, Path)))]
pub async fn records_named(
    app: State<App>,
    asker: Asker,
    id: Extension<RequestId>,
    budget: Extension<ConnectionBudget>,
    path: ChannelPath,
    query: RawQuery,
) -> Result<Response, Failure> {
    records(app, asker, id, budget, path, query).await
}

fn parse(query: &str) -> Result<(SeqNum, Option<usize>), Failure> {
    let fault = |field: &str, message: &str| {
        Failure::query(&[Violation { field: field.to_owned(), message: message.to_owned() }])
    };
    let (mut start, mut limit) = (0, None);
    for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
        if name == "afterEventId" {
            let digits = !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit());
            let after: Option<u64> = digits.then(|| value.parse().ok()).flatten();
            start =
                after.ok_or_else(|| fault("afterEventId", "must be a sequence number"))?.saturating_add(1);
        } else if name == "limit" {
            let count = value.parse().ok().filter(|count| (1..=BATCH_RECORDS_MAX).contains(count));
            limit = Some(count.ok_or_else(|| fault("limit", "must be 1 to 1000"))?);
        }
    }
    Ok((start, limit))
}

/// Records as members of a JSON array.
fn write_records(out: &mut Vec<u8>, records: &[Record], first: &mut bool) {
    out.reserve(records.iter().map(|record| record.body.len() + 64).sum());
    for record in records.iter().filter(|record| !record.is_command()) {
        if !std::mem::take(first) {
            out.push(b',');
        }
        out.extend_from_slice(b"{\"data\":");
        let envelope = envelope::unwrap(record);
        out.extend_from_slice(envelope.as_ref().map_or("\"\"", |envelope| envelope.data.get()).as_bytes());
        out.extend_from_slice(b",\"id\":");
        write_text(out, envelope.as_ref().map_or("", |envelope| envelope.id.as_ref()).as_bytes());
        let _ = write!(out, ",\"seqNum\":{}", record.position.seq_num);
        if !record.headers.is_empty() {
            out.extend_from_slice(b",\"headers\":");
            write_headers(out, record);
        }
        if envelope.is_none() {
            write_bare(out, &record.body);
        }
        out.push(b'}');
    }
}

/// The member of a record that shows a body in no envelope, if there is any.
fn write_bare(out: &mut Vec<u8>, body: &[u8]) {
    if body.is_empty() {
        return;
    }
    if std::str::from_utf8(body).is_ok() {
        out.extend_from_slice(b",\"text\":");
        write_text(out, body);
    } else {
        let _ = write!(out, ",\"base64\":\"{}\"", BASE64.encode_display(body));
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::domain::Position;

    #[test]
    fn a_cursor_is_digits_and_exclusive() {
        assert_eq!(parse("").expect("reads"), (0, None));
        assert_eq!(parse("afterEventId=4&limit=1000").expect("reads"), (5, Some(1000)));
        for query in ["afterEventId=", "afterEventId=-1", "afterEventId=1,2,3", "limit=0", "limit=1001"] {
            assert_eq!(parse(query).expect_err(query).message, "Query Error", "{query}");
        }
    }

    #[test]
    fn envelopes_are_unwrapped_and_commands_dropped() {
        let record = |seq_num, headers: &[(&'static str, &'static str)], body: &'static str| Record {
            position: Position { seq_num, ..Position::default() },
            headers: headers.iter().map(|(n, v)| (Bytes::from(*n), Bytes::from(*v))).collect(),
            body: Bytes::from(body),
            metered_end: 0,
        };
        let records = [
            record(0, &[], r#"{"data":{"a": 1},"id":"p"}"#),
            record(1, &[("", "trim")], "12345678"),
            record(2, &[("trigger-control", "turn-complete")], ""),
            record(3, &[("k", "v")], "{\"not\": \"ours\"}"),
        ];
        let expected = concat!(
            r#"{"data":{"a": 1},"id":"p","seqNum":0},"#,
            r#"{"data":"","id":"","seqNum":2,"headers":[["trigger-control","turn-complete"]]},"#,
            r#"{"data":"","id":"","seqNum":3,"headers":[["k","v"]],"text":"{\"not\": \"ours\"}"}"#
        );
        let mut out = Vec::new();
        write_records(&mut out, &records, &mut true);
        assert_eq!(out, expected.as_bytes());
    }
}
