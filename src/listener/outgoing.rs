//! Answers on their way to a socket: in pieces, no more of them at once than the client takes.
//!
//! The HTTP library asks a body for its next piece before it knows whether there is room for it, and over HTTP/2 keeps
//! that piece for as long as the client gives its stream no window. So the pieces are small, the next one is given
//! out when the last one has been written, and what an answer waits with is reserved from the connection's budget.

use std::fmt;
use std::future::{Future, poll_fn};
use std::ops::RangeInclusive;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http_body::{Body as _, Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::domain::ConnectionBudget;
use crate::domain::send_budget::{Reservation, Reserved, holding};

/// Smallest and largest number of bytes that may be on their way: the more a client takes, the more it is sent ahead.
const AHEAD: RangeInclusive<usize> = 16 * 1024..=64 * 1024;
/// Largest piece over HTTP/2, where a stream lives as long as now and then a whole piece is written.
const WATCHED_PIECE: usize = 16 * 1024;
/// Over HTTP/1.1 pieces up to this size are not counted: the library takes few of them at once.
const SMALL: usize = 1024;

tokio::task_local! {
    /// What is on its way on the HTTP/2 stream that this task serves.
    static FLIGHT: Arc<Flight>;
}

/// The bytes of one answer that have been given out and not yet been written.
#[derive(Debug)]
struct Flight {
    bytes: AtomicUsize,
    began: Instant,
    /// When some of them were last written, in milliseconds since `began`.
    moved_at: AtomicU64,
    body: Mutex<Option<Waker>>,
    /// Of the stream; where the connection is one stream the socket counts what is taken.
    stream: OnceLock<ConnectionBudget>,
}

impl Flight {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            bytes: AtomicUsize::new(0),
            began: Instant::now(),
            moved_at: AtomicU64::new(0),
            body: Mutex::default(),
            stream: OnceLock::new(),
        })
    }

    fn moved(&self) {
        let millis = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.moved_at.store(millis, Ordering::Relaxed);
    }

    fn len(&self) -> usize {
        self.bytes.load(Ordering::Acquire)
    }

    /// Ready once less than `limit` bytes are on their way.
    fn poll_below(&self, limit: usize, cx: &Context<'_>) -> Poll<()> {
        if self.len() < limit {
            return Poll::Ready(());
        }
        *self.body.lock().unwrap_or_else(PoisonError::into_inner) = Some(cx.waker().clone());
        // What was written in between had nobody to wake.
        if self.len() < limit { Poll::Ready(()) } else { Poll::Pending }
    }

    /// When it will have been still for `limit`; `None` while nothing is on its way and nothing waits for room.
    fn still_at(&self, limit: Duration) -> Option<Instant> {
        let since = if self.len() > 0 {
            Some(self.began + Duration::from_millis(self.moved_at.load(Ordering::Relaxed)))
        } else {
            self.stream.get()?.waits_still_since()
        };
        since.map(|since| since + limit)
    }

    fn carry(self: &Arc<Self>, bytes: Bytes, room: Option<Arc<Reservation>>) -> Bytes {
        if self.bytes.fetch_add(bytes.len(), Ordering::AcqRel) == 0 {
            self.moved();
        }
        let landing = Landing { len: bytes.len(), flight: self.clone(), _room: room };
        holding(bytes, landing)
    }
}

/// A piece on its way. Dropped with the piece: once it is written, or with the connection.
struct Landing {
    len: usize,
    flight: Arc<Flight>,
    _room: Option<Arc<Reservation>>,
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.flight.bytes.fetch_sub(self.len, Ordering::AcqRel);
        self.flight.moved();
        if let Some(stream) = self.flight.stream.get() {
            stream.landed(self.len);
        }
        let waker = self.flight.body.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// The body of an answer as the HTTP library gets it.
pub(super) struct Outgoing {
    body: Body,
    budget: ConnectionBudget,
    /// Whether room must be reserved here for what the body gives out.
    reserves: bool,
    reserving: Option<BoxFuture<'static, Reservation>>,
    /// What is left of a frame of the body, and its room.
    rest: Bytes,
    room: Option<Arc<Reservation>>,
    flight: Option<Arc<Flight>>,
    /// Whether the task that serves the answer is watched.
    is_watched: bool,
    /// Whether that task must live until everything is written. A small answer goes out with its end.
    outlives: bool,
    /// How the body has ended.
    end: Option<Option<axum::Error>>,
}

/// Notes whose budget an HTTP/2 stream is served within, before anything waits for room in it.
pub(super) fn begin(budget: &ConnectionBudget) {
    // There is one request to a stream.
    let _ = FLIGHT.try_with(|flight| flight.stream.set(budget.clone()));
}

/// An answer that is sent within the budget of its connection.
pub(super) fn within(budget: ConnectionBudget, mut response: Response) -> http::Response<Outgoing> {
    budget.answered();
    let reserves = response.extensions_mut().remove::<Reserved>().is_none();
    response.map(|body| {
        let is_small = body.size_hint().upper().is_some_and(|size| size <= SMALL as u64);
        let flight = FLIGHT.try_with(Arc::clone).ok();
        Outgoing {
            body,
            budget,
            reserves,
            reserving: None,
            rest: Bytes::new(),
            room: None,
            is_watched: flight.is_some(),
            outlives: flight.is_some() && !is_small,
            flight,
            end: None,
        }
    })
}

impl Outgoing {
    fn piece(&mut self) -> Bytes {
        let most = if self.is_watched { WATCHED_PIECE } else { *AHEAD.end() };
        let piece = self.rest.split_to(self.rest.len().min(most));
        let room = if self.rest.is_empty() { self.room.take() } else { self.room.clone() };
        if !self.is_watched && piece.len() <= SMALL && room.is_none() {
            return piece;
        }
        self.flight.get_or_insert_with(Flight::new).carry(piece, room)
    }

    /// Ready once no more is on its way than `limit`.
    fn poll_written(&self, limit: usize, cx: &Context<'_>) -> Poll<()> {
        self.flight.as_ref().map_or(Poll::Ready(()), |flight| flight.poll_below(limit, cx))
    }
}

impl http_body::Body for Outgoing {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = self.get_mut();
        loop {
            if let Some(end) = &mut this.end {
                let end = end.take();
                // The library forgets what is on its way when a body fails.
                if this.outlives && this.poll_written(1, cx).is_pending() {
                    this.end = Some(end);
                    return Poll::Pending;
                }
                return Poll::Ready(end.map(Err));
            }
            ready!(this.poll_written(this.budget.piece().clamp(*AHEAD.start(), *AHEAD.end()), cx));
            if let Some(reserving) = &mut this.reserving {
                this.room = Some(Arc::new(ready!(reserving.as_mut().poll(cx))));
                this.reserving = None;
            }
            if !this.rest.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(this.piece()))));
            }
            match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                None => this.end = Some(None),
                Some(Err(error)) => this.end = Some(Some(error)),
                Some(Ok(frame)) => match frame.into_data() {
                    Err(other) => return Poll::Ready(Some(Ok(other))),
                    Ok(data) => {
                        if this.reserves && data.len() > SMALL {
                            let (budget, len) = (this.budget.clone(), data.len());
                            this.reserving = Some(Box::pin(async move { budget.reserve(len).await }));
                        }
                        this.rest = data;
                    }
                },
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        let written = !self.outlives || self.flight.as_ref().is_none_or(|flight| flight.len() == 0);
        let ended = match &self.end {
            Some(end) => end.is_none(),
            None => self.body.is_end_stream(),
        };
        self.rest.is_empty() && written && ended
    }

    fn size_hint(&self) -> SizeHint {
        let (rest, below) = (self.rest.len() as u64, self.body.size_hint());
        let mut hint = SizeHint::new();
        if let Some(upper) = below.upper() {
            hint.set_upper(upper + rest);
        }
        hint.set_lower(below.lower() + rest);
        hint
    }
}

impl fmt::Debug for Outgoing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outgoing").field("budget", &self.budget).finish_non_exhaustive()
    }
}

/// Serves an HTTP/2 stream, and drops it once what it has given out has been still for `limit`: the library then resets it.
/// One that has nothing on its way is left alone.
pub(super) async fn watched(stream: impl Future<Output = ()>, limit: Duration) {
    let flight = Flight::new();
    FLIGHT.scope(flight.clone(), unless_still(stream, &flight, limit)).await;
}

async fn unless_still(stream: impl Future<Output = ()>, flight: &Flight, limit: Duration) {
    let mut stream = pin!(stream);
    let mut alarm: Option<Pin<Box<Sleep>>> = None;
    poll_fn(move |cx| {
        if stream.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        loop {
            let Some(at) = flight.still_at(limit) else {
                alarm = None;
                return Poll::Pending;
            };
            if at <= Instant::now() {
                tracing::debug!("reset a stream whose client does not read");
                return Poll::Ready(());
            }
            // One that is too early is kept: a moment that moves with every piece must not cost a timer each.
            ready!(alarm.get_or_insert_with(|| Box::pin(sleep_until(at))).as_mut().poll(cx));
            alarm = None;
        }
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::SendBudget;

    #[tokio::test]
    async fn a_stream_that_waits_for_room_while_its_client_takes_nothing_is_given_up() {
        let connection = SendBudget::new(usize::MAX, 1).connection();
        // By another stream of the client, which does not read.
        let _all_there_is = connection.reserve(usize::MAX).await;
        let served = async {
            let budget = connection.request();
            begin(&budget);
            let answer = Response::new(Body::from(vec![0; 2 * SMALL]));
            let mut body = pin!(within(budget, answer).into_body());
            poll_fn(|cx| body.as_mut().poll_frame(cx)).await;
            panic!("it was given room that there is not");
        };
        let given_up = watched(served, Duration::from_millis(50));
        tokio::time::timeout(Duration::from_secs(30), given_up).await.expect("before the test gives up");
    }

    #[tokio::test]
    async fn a_body_gives_its_room_back_once_it_is_answered_however_long_that_is_written() {
        let all = SendBudget::new(usize::MAX, 1);
        let budget = all.connection().request();
        budget.keep(budget.try_receive(1000, 0).expect("room"));
        assert_eq!(all.lent(), 1000);
        let _unwritten = within(budget, Response::new(Body::empty()));
        assert_eq!(all.lent(), 0);
    }
}
