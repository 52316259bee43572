//! A read over the S2 wire: stored records, then live ones, within the bounds that the reader has set.

use std::hash::{BuildHasher, RandomState};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use s2_api::v1::stream as wire;

use super::error;
use super::target::Target;
use crate::api::App;
use crate::api::error::Failure;
use crate::domain::record::{BATCH_RECORDS_MAX, METERED_MAX, metered_size};
use crate::domain::{
    Clock, ConnectionBudget, Delivery, Error, Follow, FollowEvent, FollowOptions, Position, ReadStart,
    Record, Timestamp,
};
use crate::telemetry::{Door, GaugeGuard};

/// Longest wait of a read that answers once, as S2 has it.
const UNARY_WAIT_MAX: Duration = Duration::from_secs(60);
/// Shortest and longest silence before a heartbeat, in milliseconds.
const HEARTBEAT_MIN: u64 = 5000;
const HEARTBEAT_MAX: u64 = 15_000;

/// Where a read ends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Records.
    count: usize,
    /// Metered bytes.
    bytes: usize,
    /// Exclusive.
    until: Option<Timestamp>,
    /// Longest gap between records; `None` waits for ever.
    wait: Option<Duration>,
}

/// Something to give out.
pub(super) enum Output {
    /// Records, never none, and at most as many as one batch may have.
    Batch(Slice),
    /// Everything stored has been given out.
    Heartbeat(Position),
}

/// Some records of a batch that followers share.
pub(super) struct Slice {
    batch: Delivery,
    range: Range<usize>,
    /// The channel's tail, if these are known to end at it.
    pub tail: Option<Position>,
}

impl Slice {
    pub(super) fn records(&self) -> &[Record] {
        &self.batch.records[self.range.clone()]
    }

    /// Bytes made of these records, which keep their room until they are sent.
    pub(super) fn holding(&self, bytes: Bytes) -> Bytes {
        self.batch.holding(bytes)
    }
}

/// Where the query says to begin.
///
/// # Errors
/// `invalid` if it says so more than once, or begins at a time where it also ends.
pub(super) fn start(query: &wire::ReadStart, end: &wire::ReadEnd) -> Result<ReadStart, Failure> {
    if let (Some(at), Some(until)) = (query.timestamp, end.until)
        && at >= until
    {
        return Err(error::refusal(Error::invalid("timestamp", "must be before until")));
    }
    match (query.seq_num, query.timestamp, query.tail_offset) {
        (Some(seq_num), None, None) => Ok(ReadStart::SeqNum(seq_num)),
        (None, Some(at), None) => Ok(ReadStart::Timestamp(timestamp(at))),
        (None, None, offset) => Ok(ReadStart::TailOffset(offset.unwrap_or(0))),
        _ => {
            let fault =
                Error::invalid("seq_num", "excludes timestamp and tail_offset, which exclude each other");
            Err(error::refusal(fault))
        }
    }
}

fn timestamp(millis: u64) -> Timestamp {
    Timestamp::from_millis(i64::try_from(millis).unwrap_or(i64::MAX))
}

impl Bounds {
    /// Of a read that goes on.
    pub(super) fn streaming(end: &wire::ReadEnd) -> Self {
        let bounded = end.count.is_some() || end.bytes.is_some() || end.until.is_some();
        Self {
            count: end.count.unwrap_or(usize::MAX),
            bytes: end.bytes.unwrap_or(usize::MAX),
            until: end.until.map(timestamp),
            wait: end
                .wait
                .map(|seconds| Duration::from_secs(seconds.into()))
                .or(bounded.then_some(Duration::ZERO)),
        }
    }

    /// Of a read that answers once.
    pub(super) fn unary(end: &wire::ReadEnd) -> Self {
        let wait = Duration::from_secs(end.wait.unwrap_or(0).into());
        Self {
            count: end.count.unwrap_or(BATCH_RECORDS_MAX).min(BATCH_RECORDS_MAX),
            bytes: end.bytes.unwrap_or(METERED_MAX).min(METERED_MAX),
            until: end.until.map(timestamp),
            wait: Some(wait.min(UNARY_WAIT_MAX)),
        }
    }

    /// Whether the reader waits for records at the tail.
    fn follows(&self) -> bool {
        self.wait != Some(Duration::ZERO)
    }
}

/// A read in progress.
pub(super) struct Reader {
    follow: Follow,
    clock: Arc<dyn Clock>,
    left: Bounds,
    pending: Option<(Delivery, usize)>,
    tail: Position,
    deadline: Option<Timestamp>,
    heartbeat_every: Duration,
    heartbeat_at: Timestamp,
    over: bool,
    _guard: GaugeGuard,
}

impl Reader {
    /// Opens a channel for a read. Unless `clamp`, a start past what is written is refused; so is one at the tail, if the
    /// reader does not wait.
    ///
    /// # Errors
    /// As [`Sessions::follow`](crate::domain::Sessions::follow).
    pub(super) async fn open(
        app: &App,
        target: &Target,
        start: ReadStart,
        clamp: bool,
        bounds: Bounds,
        budget: &ConnectionBudget,
    ) -> Result<Self, Failure> {
        let Target { caller, session, channel } = target;
        let over = bounds.count == 0 || bounds.bytes == 0;
        let tail = app.sessions.bounds(caller, session, channel).await.map_err(error::refusal)?.tail;
        let (at, past) = match start {
            ReadStart::SeqNum(seq_num) => (seq_num == tail.seq_num, seq_num > tail.seq_num),
            ReadStart::TailOffset(offset) => (offset == 0, false),
            ReadStart::Timestamp(at) => (at > tail.timestamp || tail.seq_num == 0, false),
        };
        if !over && ((past && !clamp) || ((at || past) && !bounds.follows())) {
            return Err(error::unwritten(tail));
        }
        let options = FollowOptions { start, peek_settled: false, require_complete: false };
        let follow = app.sessions.follow(caller, session, channel, options, budget).await;
        let follow = follow.map_err(error::refusal)?;
        let now = app.clock.now();
        let spread = RandomState::new().hash_one(now) % (HEARTBEAT_MAX - HEARTBEAT_MIN);
        let heartbeat_every = Duration::from_millis(HEARTBEAT_MIN + spread);
        Ok(Self {
            follow,
            clock: app.clock.clone(),
            deadline: bounds.wait.map(|wait| now.plus(wait)),
            over,
            left: bounds,
            pending: None,
            tail,
            heartbeat_every,
            heartbeat_at: now.plus(heartbeat_every),
            _guard: app.metrics.follower(Door::S2),
        })
    }

    /// Whether its bounds are reached.
    pub(super) fn is_over(&self) -> bool {
        self.over
    }

    pub(super) fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// What comes next; `None` at the end. Cancel safe.
    ///
    /// # Errors
    /// What ends a follower; nothing comes after it.
    pub(super) async fn next(&mut self) -> Option<Result<Output, Failure>> {
        loop {
            if self.over {
                return None;
            }
            if let Some((batch, from)) = self.pending.take() {
                match self.take(batch, from) {
                    Some(output) => return Some(Ok(output)),
                    None => continue,
                }
            }
            let until = self.deadline.map_or(self.heartbeat_at, |at| at.min(self.heartbeat_at));
            let event = match self.follow.next(until).await {
                Ok(event) => event,
                Err(fault) => return Some(Err(self.fail(error::refusal(fault)))),
            };
            match event {
                FollowEvent::Batch(batch) => self.pending = Some((batch, 0)),
                FollowEvent::CaughtUp(tail) if self.left.follows() => return Some(Ok(self.heartbeat(tail))),
                FollowEvent::Reached if self.deadline.is_none_or(|at| self.clock.now() < at) => {
                    return Some(Ok(self.heartbeat(self.tail)));
                }
                FollowEvent::Stopping => return Some(Err(self.fail(error::stopping()))),
                FollowEvent::CaughtUp(_)
                | FollowEvent::Reached
                | FollowEvent::Closed(_)
                | FollowEvent::Expired(_)
                | FollowEvent::Settled => self.over = true,
            }
        }
    }

    /// The next records of a batch.
    fn take(&mut self, batch: Delivery, from: usize) -> Option<Output> {
        let (mut bytes, mut to) = (0, from);
        for record in batch.records[from..].iter().take(BATCH_RECORDS_MAX) {
            bytes += metered_size(&record.headers, &record.body);
            let late = self.left.until.is_some_and(|until| record.position.timestamp >= until);
            if late || bytes > self.left.bytes || to - from == self.left.count {
                self.over = true;
                break;
            }
            if bytes > METERED_MAX && to > from {
                bytes -= metered_size(&record.headers, &record.body);
                break;
            }
            to += 1;
        }
        let last = batch.records[from..to].last()?.position;
        self.left.count -= to - from;
        self.left.bytes = self.left.bytes.saturating_sub(bytes);
        self.over |= self.left.count == 0 || self.left.bytes == 0;
        let now = self.clock.now();
        self.deadline = self.left.wait.map(|wait| now.plus(wait));
        self.heartbeat_at = now.plus(self.heartbeat_every);
        let ends = to == batch.records.len();
        let tail = batch.tail.filter(|_| ends);
        self.tail = tail.unwrap_or(Position { seq_num: last.seq_num + 1, ..last });
        if !ends && !self.over {
            self.pending = Some((batch.clone(), to));
        }
        Some(Output::Batch(Slice { batch, range: from..to, tail }))
    }

    fn fail(&mut self, failure: Failure) -> Failure {
        self.over = true;
        failure
    }

    fn heartbeat(&mut self, tail: Position) -> Output {
        self.tail = tail;
        self.heartbeat_at = self.clock.now().plus(self.heartbeat_every);
        Output::Heartbeat(tail)
    }
}
