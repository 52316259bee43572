//! Reads over the S2 wire: once, in JSON or protobuf; or on and on, as server-sent events or frames.

use std::convert::Infallible;

use axum::body::Body;
use axum::extract::{Extension, Query, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use http::HeaderMap;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use prost::Message;
use s2_api::data::Format;
use s2_api::mime::{self, JsonOrProto};
use s2_api::v1::stream::s2s::{CompressionAlgorithm, SessionMessage};
use s2_api::v1::stream::sse::LastEventId;
use s2_api::v1::stream::{self as wire, proto};

use super::append::{json_position, proto_position};
use super::reader::{self, Bounds, Output, Reader, Slice};
use super::target::Target;
use super::{PROTOBUF, S2S, error, format};
use crate::api::App;
use crate::api::error::Failure;
use crate::api::realtime::event;
use crate::api::trace::RequestId;
use crate::domain::record::metered_size;
use crate::domain::send_budget::Reserved;
use crate::domain::{ConnectionBudget, Error, Position, ReadStart, Record, Timestamp};
use crate::telemetry::Chain;

/// Where the next record will stand: the S2 records API.
#[utoipa::path(get, path = "/v1/streams/{stream}/records/tail", tag = "s2", operation_id = "s2CheckTail",
    params(("stream" = String, Path, description = "As initialize has named it")),
    responses((status = 200, description = "The tail", body = Object)))]
pub async fn check_tail(State(app): State<App>, target: Target) -> Result<Response, Failure> {
    let bounds = app.sessions.bounds(&target.caller, &target.session, &target.channel).await;
    let tail = json_position(bounds.map_err(error::refusal)?.tail);
    Ok(axum::Json(wire::TailResponse { tail }).into_response())
}

/// Reads records: once, or with `Accept: text/event-stream` or `s2s/proto` for as long as the reader wants: the S2
/// records API.
#[utoipa::path(get, path = "/v1/streams/{stream}/records", tag = "s2", operation_id = "s2Read",
    params(("stream" = String, Path, description = "As initialize has named it"),
        ("seq_num" = Option<u64>, Query), ("timestamp" = Option<u64>, Query),
        ("tail_offset" = Option<u64>, Query), ("clamp" = Option<bool>, Query), ("count" = Option<u64>, Query),
        ("bytes" = Option<u64>, Query), ("until" = Option<u64>, Query), ("wait" = Option<u32>, Query)),
    responses((status = 200, description = "Records", content((Object = "application/json"),
            (Vec<u8> = "application/protobuf"), (String = "text/event-stream"), (Vec<u8> = "s2s/proto"))),
        (status = 416, description = "Nothing is written there yet", body = Object),
        (status = 422, description = "A start or an end that contradicts another", body = Object)))]
pub async fn read(
    State(app): State<App>,
    Extension(id): Extension<RequestId>,
    Extension(budget): Extension<ConnectionBudget>,
    target: Target,
    headers: HeaderMap,
    start: Result<Query<wire::ReadStart>, axum::extract::rejection::QueryRejection>,
    end: Result<Query<wire::ReadEnd>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, Failure> {
    let (Query(query), Query(end)) = start
        .and_then(|start| Ok((start, end?)))
        .map_err(|fault| error::bad("bad_query", fault.body_text()))?;
    let (start, clamp) = (reader::start(&query, &end)?, query.clamp.unwrap_or(false));
    let stream = |start, end: &wire::ReadEnd| {
        Reader::open(&app, &target, start, clamp, Bounds::streaming(end), &budget)
    };
    if mime::content_type(&headers).as_ref().is_some_and(mime::is_s2s_proto) {
        let compression = CompressionAlgorithm::from_accept_encoding(&headers);
        let reader = stream(start, &end).await?;
        return Ok(streamed(S2S, Streamed { reader, form: Form::Frames(compression), id, over: false }));
    }
    let format = format::asked(&headers)?;
    let accept = mime::accept(&headers);
    if accept.as_ref().is_some_and(mime::is_event_stream) {
        let (start, end, delivered) = resumed(start, end, &headers)?;
        let form = Form::Events { format, delivered };
        let reader = stream(start, &end).await?;
        return Ok(streamed("text/event-stream", Streamed { reader, form, id, over: false }));
    }
    let mut reader = Reader::open(&app, &target, start, clamp, Bounds::unary(&end), &budget).await?;
    let (mut first, mut waited) = (None, false);
    while let Some(output) = reader.next().await {
        match output? {
            Output::Batch(slice) => {
                first = Some(slice);
                break;
            }
            Output::Heartbeat(_) => waited = true,
        }
    }
    // Of what comes while it waits, the first batch is the answer.
    let is_whole = first.as_ref().is_none_or(|slice| waited || slice.tail.is_some()) || reader.is_over();
    let (media_type, mut text) = match accept.as_ref().and_then(JsonOrProto::from_mime) {
        Some(JsonOrProto::Proto) => (PROTOBUF, Text::Proto),
        _ => ("application/json", Text::Json { format, is_first: true }),
    };
    let begin = text.begin(first.as_ref(), is_whole);
    let body = if is_whole {
        Body::from(begin)
    } else {
        let tail = first.and_then(|slice| slice.tail);
        let rest = stream::try_unfold(Some(Once { reader, text, tail }), Once::next);
        let rest = rest.inspect_err(move |failure| log(failure, &id)).map_err(|failure| failure.message);
        Body::from_stream(stream::iter([Ok(begin)]).chain(rest))
    };
    Ok(([(CONTENT_TYPE, HeaderValue::from_static(media_type))], Extension(Reserved), body).into_response())
}

/// What a read that answers once is written as.
enum Text {
    Json { format: Format, is_first: bool },
    Proto,
}

impl Text {
    /// The first records, and the end if they are all.
    fn begin(&mut self, first: Option<&Slice>, is_whole: bool) -> Bytes {
        let mut out = match self {
            Self::Json { .. } => format::BEGIN.to_vec(),
            Self::Proto => Vec::new(),
        };
        if let Some(slice) = first {
            self.records(&mut out, slice);
        }
        if is_whole {
            self.end(&mut out, first.and_then(|slice| slice.tail));
        }
        hold(first, out)
    }

    fn records(&mut self, out: &mut Vec<u8>, slice: &Slice) {
        match self {
            Self::Json { format, is_first } => format::records(out, *format, slice.records(), is_first),
            // Messages of one type that follow each other are one message.
            Self::Proto => out.extend_from_slice(&proto_batch(slice.records(), None).encode_to_vec()),
        }
    }

    fn end(&self, out: &mut Vec<u8>, tail: Option<Position>) {
        match self {
            Self::Json { .. } => format::end(out, tail),
            Self::Proto => out.extend_from_slice(&proto_batch(&[], tail).encode_to_vec()),
        }
    }
}

/// Bytes in the room of what they are made of.
fn hold(slice: Option<&Slice>, bytes: Vec<u8>) -> Bytes {
    match slice {
        Some(slice) => slice.holding(bytes.into()),
        None => bytes.into(),
    }
}

/// The rest of a read that answers once.
struct Once {
    reader: Reader,
    text: Text,
    /// As it was when the last records were read.
    tail: Option<Position>,
}

impl Once {
    async fn next(this: Option<Self>) -> Result<Option<(Bytes, Option<Self>)>, Failure> {
        let Some(mut this) = this else { return Ok(None) };
        let mut out = Vec::new();
        match this.reader.next().await.transpose()? {
            Some(Output::Batch(slice)) => {
                this.text.records(&mut out, &slice);
                this.tail = slice.tail;
                Ok(Some((slice.holding(out.into()), Some(this))))
            }
            Some(Output::Heartbeat(_)) | None => {
                this.text.end(&mut out, this.tail);
                Ok(Some((out.into(), None)))
            }
        }
    }
}

/// A read of events goes on after the last event that the reader has seen, within what is left of its bounds.
fn resumed(
    start: ReadStart,
    mut end: wire::ReadEnd,
    headers: &HeaderMap,
) -> Result<(ReadStart, wire::ReadEnd, (usize, usize)), Failure> {
    let Some(value) = headers.get("last-event-id") else { return Ok((start, end, (0, 0))) };
    let last: Option<LastEventId> = value.to_str().ok().and_then(|text| text.parse().ok());
    let LastEventId { seq_num, count, bytes } =
        last.ok_or_else(|| error::bad("bad_header", "last-event-id must be SEQ_NUM,COUNT,BYTES"))?;
    end.count = end.count.map(|all| all.saturating_sub(count));
    end.bytes = end.bytes.map(|all| all.saturating_sub(bytes));
    Ok((ReadStart::SeqNum(seq_num.saturating_add(1)), end, (count, bytes)))
}

/// What a reader gets the records as.
enum Form {
    Events {
        format: Format,
        /// Records and metered bytes, over all connections of this read.
        delivered: (usize, usize),
    },
    Frames(CompressionAlgorithm),
}

/// A read that goes on.
struct Streamed {
    reader: Reader,
    form: Form,
    id: RequestId,
    over: bool,
}

fn streamed(media_type: &'static str, state: Streamed) -> Response {
    let parts = stream::unfold(state, |mut state| async move {
        let part = state.next().await?;
        Some((Ok::<_, Infallible>(part), state))
    });
    let mut response = Response::new(Body::from_stream(parts));
    response.extensions_mut().insert(Reserved);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, no-transform"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

impl Streamed {
    async fn next(&mut self) -> Option<Bytes> {
        if self.over {
            return None;
        }
        let output = self.reader.next().await;
        self.over = !matches!(output, Some(Ok(_)));
        match output {
            Some(Ok(output)) => {
                Some(self.form.write(&output, self.reader.now()).unwrap_or_else(|fault| self.fail(&fault)))
            }
            Some(Err(failure)) => Some(self.fail(&failure)),
            None => self.form.end(),
        }
    }

    fn fail(&mut self, failure: &Failure) -> Bytes {
        self.over = true;
        log(failure, &self.id);
        match self.form {
            Form::Events { .. } => event::error(&failure.body(Some(self.id.as_str()))),
            Form::Frames(_) => error::terminal(failure, self.id.as_str()),
        }
    }
}

fn log(failure: &Failure, id: &RequestId) {
    if let Some(cause) = failure.cause() {
        tracing::error!(request.id = id.as_str(), error = %Chain(cause), "a reader has failed");
    }
}

impl Form {
    fn write(&mut self, output: &Output, now: Timestamp) -> Result<Bytes, Failure> {
        match self {
            Self::Events { format, delivered } => Ok(match output {
                Output::Heartbeat(tail) => event::ping(now.millis(), *tail),
                Output::Batch(slice) => slice.holding(write_event(slice, *format, delivered)),
            }),
            Self::Frames(compression) => {
                let batch = match output {
                    Output::Heartbeat(tail) => proto_batch(&[], Some(*tail)),
                    Output::Batch(slice) => proto_batch(slice.records(), slice.tail),
                };
                let frame = SessionMessage::regular(*compression, &batch);
                let frame = frame.map_err(|fault| error::refusal(Error::internal(fault)))?.encode();
                Ok(match output {
                    Output::Heartbeat(_) => frame,
                    Output::Batch(slice) => slice.holding(frame),
                })
            }
        }
    }

    /// What tells the reader that nothing more comes.
    fn end(&self) -> Option<Bytes> {
        match self {
            Self::Events { .. } => Some(event::DONE),
            Self::Frames(_) => None,
        }
    }
}

fn write_event(slice: &Slice, format: Format, (count, bytes): &mut (usize, usize)) -> Bytes {
    let records = slice.records();
    *count += records.len();
    *bytes += records.iter().map(|record| metered_size(&record.headers, &record.body)).sum::<usize>();
    let seq_num = records.last().map_or(0, |record| record.position.seq_num);
    let id = LastEventId { seq_num, count: *count, bytes: *bytes };
    let mut out = format!("event: batch\nid: {id}\ndata: ").into_bytes();
    out.extend_from_slice(&format::batch(format, records, slice.tail));
    out.extend_from_slice(b"\n\n");
    out.into()
}

fn proto_batch(records: &[Record], tail: Option<Position>) -> proto::ReadBatch {
    let header = |(name, value): &(Bytes, Bytes)| proto::Header { name: name.clone(), value: value.clone() };
    let records = records.iter().map(|record| {
        let proto::StreamPosition { seq_num, timestamp } = proto_position(record.position);
        let headers = record.headers.iter().map(header).collect();
        proto::SequencedRecord { seq_num, timestamp, headers, body: record.body.clone() }
    });
    proto::ReadBatch { records: records.collect(), tail: tail.map(proto_position) }
}
