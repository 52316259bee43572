//! Reads over the S2 wire: once, in JSON or protobuf; or on and on, as server-sent events or frames.

use std::convert::Infallible;

use axum::body::Body;
use axum::extract::{Extension, Query, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
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
use crate::api::trace::{Chain, RequestId};
use crate::domain::record::{ReadLimit, metered_size};
use crate::domain::send_budget::{Reservation, Reserved, cost_of_read};
use crate::domain::{ConnectionBudget, Error, ReadStart, Timestamp};

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
    let bounds = Bounds::unary(&end);
    let mut reader = Reader::open(&app, &target, start, clamp, bounds, &budget.prepaid()).await?;
    // Whoever waits for records may wait long, and then gets what followers share.
    let stored = !reader.is_at_tail();
    let most = cost_of_read(ReadLimit { count: bounds.count, bytes: bounds.bytes });
    let mut room = if stored { Some(budget.reserve(most).await) } else { None };
    let read = once(&mut reader, &mut room).await?;
    let room = match room {
        Some(room) => room,
        None => budget.reserve(read.iter().map(Slice::cost).sum()).await,
    };
    let (media_type, body) = match accept.as_ref().and_then(JsonOrProto::from_mime) {
        Some(JsonOrProto::Proto) => (PROTOBUF, proto_batch(&read).encode_to_vec()),
        _ => {
            let batches = read.iter().flat_map(Slice::records).cloned().collect::<Vec<_>>();
            let body = format::batch(format, &batches, read.last().and_then(|slice| slice.tail));
            ("application/json", body)
        }
    };
    let body = Body::from(room.around(body.into()));
    Ok(([(CONTENT_TYPE, HeaderValue::from_static(media_type))], Extension(Reserved), body).into_response())
}

/// What one read answers: everything stored within its bounds, or the first that comes while it waits, which it does without
/// room.
async fn once(reader: &mut Reader, room: &mut Option<Reservation>) -> Result<Vec<Slice>, Failure> {
    let (mut read, mut waited) = (Vec::new(), false);
    while let Some(output) = reader.next().await {
        match output? {
            Output::Batch(slice) => read.push(slice),
            Output::Heartbeat(_) if read.is_empty() => {
                *room = None;
                waited = true;
                continue;
            }
            Output::Heartbeat(_) => break,
        }
        if waited {
            break;
        }
    }
    Ok(read)
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
        if let Some(cause) = failure.cause() {
            tracing::error!(request.id = self.id.as_str(), error = %Chain(cause), "a reader has failed");
        }
        match self.form {
            Form::Events { .. } => event::error(&failure.body(Some(self.id.as_str()))),
            Form::Frames(_) => error::terminal(failure, self.id.as_str()),
        }
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
                    Output::Heartbeat(tail) => {
                        proto::ReadBatch { records: Vec::new(), tail: Some(proto_position(*tail)) }
                    }
                    Output::Batch(slice) => proto_batch(std::slice::from_ref(slice)),
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

fn proto_batch(slices: &[Slice]) -> proto::ReadBatch {
    let header = |(name, value): &(Bytes, Bytes)| proto::Header { name: name.clone(), value: value.clone() };
    let records = slices.iter().flat_map(Slice::records).map(|record| {
        let proto::StreamPosition { seq_num, timestamp } = proto_position(record.position);
        let headers = record.headers.iter().map(header).collect();
        proto::SequencedRecord { seq_num, timestamp, headers, body: record.body.clone() }
    });
    let tail = slices.last().and_then(|slice| slice.tail).map(proto_position);
    proto::ReadBatch { records: records.collect(), tail }
}
