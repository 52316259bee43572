//! Server-sent events of one channel.
//!
//! A clean end tells the SDK that there is nothing more; whatever else ends a stream must not look like one.

use std::fmt;
use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Extension, State};
use axum::response::Response;
use bytes::Bytes;
use http::HeaderMap;
use http::header::{ACCESS_CONTROL_EXPOSE_HEADERS, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use http_body::Frame;

use super::event::{self, End};
use crate::api::App;
use crate::api::error::{Failure, Route};
use crate::api::extract::{Asker, ChannelPath};
use crate::api::trace::RequestId;
use crate::domain::record::{BATCH_RECORDS_MAX, METERED_MAX, Rendering, metered_size};
use crate::domain::send_budget::Reserved;
use crate::domain::{
    Clock, ConnectionBudget, Delivery, Error, Follow, FollowEvent, FollowOptions, Position, ReadStart,
    Record, SeqNum, Timestamp,
};
use crate::telemetry::{Chain, Door, GaugeGuard};

/// Gap between records after which a stream ends, unless the caller says otherwise.
const GAP_DEFAULT: u64 = 60;
const GAP_MAX: u64 = 600;
/// Shortest and longest silence before a ping, in milliseconds.
const PING_MIN: u64 = 5000;
const PING_MAX: u64 = 15_000;

/// What the API document says of a stream.
const EVENTS: &str = "batch, ping, error and end events. A clean end is an end event with a reason (closed, expired, settled, \
                      idle, token_expired) and, but for the last one, [DONE]";

/// Stored records, then live ones.
#[utoipa::path(get, path = "/realtime/v1/sessions/{session}/{io}", tag = "realtime",
    operation_id = "followChannel",
    params(("session" = String, Path), ("io" = String, Path),
        ("Last-Event-ID" = Option<String>, Header, description = "n, n-..., or n,c,b: resume after n"),
        ("Timeout-Seconds" = Option<u32>, Header, description = "1 to 600; longest gap between records"),
        ("X-Peek-Settled" = Option<String>, Header, description = "1: end at once if the turn is complete"),
        ("X-Trigger-Stream-Start" = Option<String>, Header, description = "latest: begin at the tail")),
    responses((status = 200, description = EVENTS, body = String,
        content_type = "text/event-stream",
        headers(("X-Session-Settled" = String, description = "true if nothing more is to be expected"),
            ("X-Cursor-Ahead" = u64, description = "The tail, if the channel has no record at Last-Event-ID: records \
                that were given out are lost, or the id is another channel's. The stream goes on at the tail")))))]
pub async fn follow(
    State(app): State<App>,
    Asker(caller): Asker,
    Extension(id): Extension<RequestId>,
    Extension(budget): Extension<ConnectionBudget>,
    headers: HeaderMap,
    path: ChannelPath,
) -> Result<Response, Failure> {
    let start = start(&headers)?;
    let options =
        FollowOptions { start, peek_settled: flag(&headers, "x-peek-settled", "1"), require_complete: false };
    let gap = gap(&headers)?;
    let ahead = match start {
        ReadStart::SeqNum(start) => super::cursor_ahead(&app, &caller, &path, start, &id).await,
        _ => Ok(None),
    };
    let ahead = ahead.map_err(|error| Failure::from(error).on(Route::Load))?;
    let follow = app.sessions.follow(&caller, &path.session, &path.channel, options, &budget).await;
    let follow = follow.map_err(|error| Failure::from(error).on(Route::Load))?;
    let settled = follow.is_settled();
    // The SDK's own reader, which names the version of its protocol, asks for a new token when a stream breaks, and takes a
    // clean end for the last. Its transport of chats, which names none, does the opposite.
    let renews = headers.contains_key("trigger-version");
    let token_ends = caller.expires_at.filter(|_| !renews && !caller.is_private());
    let stream = EventStream::new(&app, follow, gap, token_ends, id);
    let mut response = Response::new(Body::new(stream));
    response.extensions_mut().insert(Reserved);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, no-transform"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    headers.insert(super::STREAM_VERSION.0, HeaderValue::from_static(super::STREAM_VERSION.1));
    headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("*"));
    if settled {
        headers.insert("x-session-settled", HeaderValue::from_static("true"));
    }
    headers.extend(ahead);
    Ok(response)
}

/// As for the main channel.
#[utoipa::path(get, path = "/realtime/v1/sessions/{session}/channels/{channel}/{io}", tag = "realtime",
    operation_id = "followNamedChannel", params(("channel" = String, Path)))]
pub async fn follow_named(
    app: State<App>,
    asker: Asker,
    id: Extension<RequestId>,
    budget: Extension<ConnectionBudget>,
    headers: HeaderMap,
    path: ChannelPath,
) -> Result<Response, Failure> {
    follow(app, asker, id, budget, headers, path).await
}

fn flag(headers: &HeaderMap, name: &str, word: &str) -> bool {
    headers.get(name).is_some_and(|value| value.as_bytes() == word.as_bytes())
}

/// Where to begin: after the last event that the caller has seen.
fn start(headers: &HeaderMap) -> Result<ReadStart, Failure> {
    match headers.get("last-event-id").filter(|value| !value.is_empty()) {
        Some(value) => resume(value.to_str().unwrap_or_default())
            .map(ReadStart::SeqNum)
            .ok_or_else(|| Failure::bad_request("Invalid Last-Event-ID")),
        None if flag(headers, "x-trigger-stream-start", "latest") => Ok(ReadStart::TailOffset(0)),
        None => Ok(ReadStart::SeqNum(0)),
    }
}

/// `n`, `n-...` and `n,c,b` resume at n + 1.
fn resume(text: &str) -> Option<SeqNum> {
    let number = |text: &str| -> Option<u64> {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| text.parse().ok()).flatten()
    };
    let last = if let Some((first, _)) = text.split_once('-') {
        number(first)?
    } else {
        let mut parts = text.splitn(4, ',').map(number);
        let first = parts.next()??;
        match (parts.next(), parts.next(), parts.next()) {
            (None, None, None) | (Some(Some(_)), Some(Some(_)), None) => first,
            _ => return None,
        }
    };
    Some(last.saturating_add(1))
}

fn gap(headers: &HeaderMap) -> Result<Duration, Failure> {
    let Some(value) = headers.get("timeout-seconds") else { return Ok(Duration::from_secs(GAP_DEFAULT)) };
    let text = value.to_str().unwrap_or_default().trim();
    let seconds: i64 = text.parse().map_err(|_| Failure::bad_request("Invalid timeout seconds"))?;
    match u64::try_from(seconds) {
        Ok(seconds @ 1..=GAP_MAX) => Ok(Duration::from_secs(seconds)),
        Ok(0) | Err(_) => Err(Failure::bad_request("Timeout seconds must be greater than 0")),
        Ok(_) => Err(Failure::bad_request("Timeout seconds must be less than 600")),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    /// The error event has been handed out; it must reach the socket before the body fails.
    Flushing,
    Failing,
    Ended,
}

/// The body of a follower: polls [`Follow`] in place, so nothing but its own fields is kept while it waits.
struct EventStream {
    follow: Follow,
    clock: Arc<dyn Clock>,
    gap: Duration,
    /// When the caller's token ends, if that is a clean end for the caller.
    token_ends: Option<Timestamp>,
    ping_every: Duration,
    deadline: Timestamp,
    ping_at: Timestamp,
    tail: Position,
    /// The next record to hand out of a batch that does not fit one event.
    pending: Option<(Delivery, usize)>,
    next: SeqNum,
    phase: Phase,
    id: RequestId,
    _guard: GaugeGuard,
}

impl EventStream {
    fn new(app: &App, follow: Follow, gap: Duration, token_ends: Option<Timestamp>, id: RequestId) -> Self {
        let now = app.clock.now();
        let spread = RandomState::new().hash_one(id.as_str()) % (PING_MAX - PING_MIN);
        let ping_every = Duration::from_millis(PING_MIN + spread);
        Self {
            follow,
            clock: app.clock.clone(),
            gap,
            token_ends,
            ping_every,
            deadline: now.plus(gap),
            ping_at: now.plus(ping_every),
            tail: Position::default(),
            pending: None,
            next: 0,
            phase: Phase::Open,
            id,
            _guard: app.metrics.follower(Door::Sse),
        }
    }

    fn ping(&mut self, now: Timestamp) -> Bytes {
        self.ping_at = now.plus(self.ping_every);
        event::ping(now.millis(), self.tail)
    }

    fn end(&mut self, end: End) -> Bytes {
        self.phase = Phase::Ended;
        end.event()
    }

    fn fail(&mut self, error: Error) -> Bytes {
        self.phase = Phase::Flushing;
        let failure = Failure::from(error);
        if let Some(cause) = failure.cause() {
            tracing::error!(request.id = self.id.as_str(), error = %Chain(cause), "a follower has failed");
        }
        event::error(&failure.body(Some(self.id.as_str())))
    }

    fn stop(&mut self) -> Bytes {
        self.phase = Phase::Flushing;
        let body = serde_json::json!({"error": "The server is shutting down", "code": "unavailable"});
        event::error(&body)
    }

    /// The next event out of a batch; `None` when everything of it has been handed out before.
    fn batch(&mut self, batch: Delivery, from: usize) -> Option<Bytes> {
        let records = &batch.records[from..];
        let skipped = records.partition_point(|record| record.position.seq_num < self.next);
        let records = &records[skipped..];
        let last = records.last()?;
        let count = fitting(records);
        let now = self.clock.now();
        self.deadline = now.plus(self.gap);
        self.ping_at = now.plus(self.ping_every);
        self.next = records[count - 1].position.seq_num + 1;
        self.tail = batch.tail.unwrap_or(Position { seq_num: self.next, ..last.position });
        let whole = count == batch.records.len();
        let ends = count == records.len();
        let bytes = if whole {
            batch.batch().rendered(Rendering::Sse, |batch| event::batch(&batch.records, batch.tail))
        } else {
            event::batch(&records[..count], batch.tail.filter(|_| ends))
        };
        let bytes = batch.holding(bytes);
        if !ends {
            self.pending = Some((batch, from + skipped + count));
        }
        Some(bytes)
    }

    fn event(&mut self, event: Result<FollowEvent, Error>) -> Option<Bytes> {
        Some(match event {
            Ok(FollowEvent::Batch(batch)) => return self.batch(batch, 0),
            Ok(FollowEvent::CaughtUp(tail)) => {
                self.tail = tail;
                let now = self.clock.now();
                self.ping(now)
            }
            Ok(FollowEvent::Closed(_)) => self.end(End::Closed),
            Ok(FollowEvent::Expired(_)) => self.end(End::Expired),
            Ok(FollowEvent::Settled) => self.end(End::Settled),
            Ok(FollowEvent::Reached) => {
                let now = self.clock.now();
                if now >= self.deadline { self.end(End::Idle) } else { self.ping(now) }
            }
            Ok(FollowEvent::Stopping) => self.stop(),
            Err(Error::Unauthenticated(_)) if self.token_ends.is_some_and(|at| at <= self.clock.now()) => {
                self.end(End::TokenExpired)
            }
            Err(error) => self.fail(error),
        })
    }
}

/// How many of these records one event may hold.
fn fitting(records: &[Record]) -> usize {
    let mut bytes = 0;
    let fits = records.iter().take(BATCH_RECORDS_MAX).take_while(|record| {
        bytes += metered_size(&record.headers, &record.body);
        bytes <= METERED_MAX
    });
    fits.count().max(1)
}

impl http_body::Body for EventStream {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let this = self.get_mut();
        match this.phase {
            Phase::Open => {}
            Phase::Flushing => {
                // One turn of the connection's loop in which it writes out what it has.
                this.phase = Phase::Failing;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Phase::Failing => {
                this.phase = Phase::Ended;
                return Poll::Ready(Some(Err(io::Error::other("the stream was cut"))));
            }
            Phase::Ended => return Poll::Ready(None),
        }
        if let Some((batch, from)) = this.pending.take()
            && let Some(bytes) = this.batch(batch, from)
        {
            return Poll::Ready(Some(Ok(Frame::data(bytes))));
        }
        loop {
            let until = this.deadline.min(this.ping_at);
            // Cancel safe, so it is made anew for every poll and costs no memory in between.
            let next = pin!(this.follow.next(until)).poll(cx);
            let Poll::Ready(event) = next else { return Poll::Pending };
            if let Some(bytes) = this.event(event) {
                return Poll::Ready(Some(Ok(Frame::data(bytes))));
            }
        }
    }
}

impl fmt::Debug for EventStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EventStream")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_id_resumes_after_its_first_number() {
        for (text, next) in [("4", 5), ("4-0", 5), ("4-anything", 5), ("4,5,104", 5)] {
            assert_eq!(resume(text), Some(next), "{text}");
        }
        for text in ["", "-1", "x", "4,5", "4,5,x", "4,5,6,7", "+4", " 4", "4.0", "99999999999999999999"] {
            assert_eq!(resume(text), None, "{text}");
        }
    }

    #[test]
    fn a_timeout_is_1_to_600_seconds() {
        let read = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("timeout-seconds", text.parse().expect("a header"));
            gap(&headers).map_err(|failure| failure.message)
        };
        assert_eq!(read("1"), Ok(Duration::from_secs(1)));
        assert_eq!(read("600"), Ok(Duration::from_secs(600)));
        assert_eq!(read("0").expect_err("zero"), "Timeout seconds must be greater than 0");
        assert_eq!(read("-1").expect_err("negative"), "Timeout seconds must be greater than 0");
        assert_eq!(read("601").expect_err("long"), "Timeout seconds must be less than 600");
        assert_eq!(read("abc").expect_err("text"), "Invalid timeout seconds");
    }
}
