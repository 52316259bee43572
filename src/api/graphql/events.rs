//! What a follower of a channel sees, cut into GraphQL events.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::reply::Text;
use super::schema::{ChannelClosed, ChannelEvent, Cursor, DateTime, RecordNode, SessionStatus};
use super::selection::Selection;
use crate::domain::record::metered_size;
use crate::domain::send_budget::Reservation;
use crate::domain::{
    ChannelAddress, ChannelKey, Delivery, Follow, FollowEvent, Position, Record, RecordBatch, Result, SeqNum,
    Timestamp,
};
use crate::telemetry::GaugeGuard;

/// Most metered bytes of records in one event, unless one record alone is larger.
const EVENT_BYTES: usize = 256 * 1024;

/// One event, not yet in any form.
#[derive(Debug)]
pub(super) struct Event {
    pub channel: Option<Arc<ChannelKey>>,
    pub content: Content,
    /// The last record that was given out, commands included.
    pub last: Option<SeqNum>,
    pub tail: Position,
}

/// What an event is about.
#[derive(Debug)]
pub(super) enum Content {
    /// A part of a batch; it goes up to the end of the stored records if `caught_up`.
    Records { batch: Delivery, part: Range<usize>, caught_up: bool },
    /// The end of the stored records.
    CaughtUp,
    /// The end of the channel.
    Closed { at: Timestamp, reason: Option<String>, status: SessionStatus },
}

impl Event {
    /// The records, without commands.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        let records = match &self.content {
            Content::Records { batch, part, .. } => &batch.records[part.clone()],
            Content::CaughtUp | Content::Closed { .. } => &[],
        };
        records.iter().filter(|record| !record.is_command())
    }

    /// Whether everything stored has been given out.
    pub fn is_caught_up(&self) -> bool {
        !matches!(self.content, Content::Records { caught_up: false, .. })
    }

    /// The room of its records.
    pub fn room(&self) -> Option<Arc<Reservation>> {
        match &self.content {
            Content::Records { batch, .. } => Some(batch.room()),
            Content::CaughtUp | Content::Closed { .. } => None,
        }
    }

    /// The event as the schema's object.
    pub fn into_object(self) -> ChannelEvent {
        let node = |record: &Record| {
            let channel = self.channel.clone()?;
            Some(RecordNode { channel, record: record.clone() })
        };
        let closed = match &self.content {
            Content::Closed { at, reason, status } => {
                Some(ChannelClosed { at: DateTime(*at), reason: reason.clone(), status: *status })
            }
            Content::Records { .. } | Content::CaughtUp => None,
        };
        ChannelEvent {
            records: self.records().filter_map(node).collect(),
            end_cursor: self.last.map(Cursor),
            caught_up: self.is_caught_up(),
            tail: self.tail.into(),
            closed,
        }
    }
}

/// Cuts what a [`Follow`] yields into events of at most so many records.
pub(super) struct ChannelEvents {
    follow: Follow,
    address: ChannelAddress,
    channel: Option<Arc<ChannelKey>>,
    size: usize,
    /// What is left of a batch.
    pending: Option<(Delivery, usize)>,
    /// The room of what was given out last. Whoever asks for the next event has handed it on, so it is kept until then.
    held: Option<Arc<Reservation>>,
    last: Option<SeqNum>,
    tail: Position,
    caught_up: bool,
    ended: bool,
    _follower: GaugeGuard,
}

impl ChannelEvents {
    /// Events of at most `size` records; `after` is where the subscriber was.
    pub fn new(
        follow: Follow,
        address: ChannelAddress,
        size: usize,
        after: Option<Cursor>,
        follower: GaugeGuard,
    ) -> Self {
        let last = after.map(|cursor| cursor.0);
        Self {
            follow,
            address,
            channel: None,
            size,
            pending: None,
            held: None,
            last,
            tail: Position::default(),
            caught_up: false,
            ended: false,
            _follower: follower,
        }
    }

    /// The next event; `Ok(None)` when the server stops, `None` at the end. Cancel safe.
    pub async fn next(&mut self) -> Option<Result<Option<Event>>> {
        self.held = None;
        while !self.ended {
            if let Some((batch, from)) = self.pending.take() {
                if let Some(event) = self.cut(batch, from) {
                    return Some(Ok(Some(event)));
                }
                continue;
            }
            let event = match self.follow.next(Timestamp::from_millis(i64::MAX)).await {
                Ok(event) => event,
                Err(error) => {
                    self.ended = true;
                    return Some(Err(error));
                }
            };
            match event {
                FollowEvent::Batch(batch) => self.pending = Some((batch, 0)),
                FollowEvent::CaughtUp(tail) => {
                    if let Some(event) = self.at_tail(tail) {
                        return Some(Ok(Some(event)));
                    }
                }
                FollowEvent::Closed(closure) => {
                    return Some(Ok(Some(self.end(closure.at, closure.reason, SessionStatus::Closed))));
                }
                FollowEvent::Expired(at) => {
                    return Some(Ok(Some(self.end(at, None, SessionStatus::Expired))));
                }
                FollowEvent::Stopping => {
                    self.ended = true;
                    return Some(Ok(None));
                }
                FollowEvent::Reached | FollowEvent::Settled => {}
            }
        }
        None
    }

    /// The next event out of a batch; `None` if what is left of it are commands only.
    fn cut(&mut self, batch: Delivery, from: usize) -> Option<Event> {
        let rest = &batch.records[from..];
        let (mut count, mut bytes) = (0, 0);
        let mut taken = 0;
        for record in rest {
            bytes += metered_size(&record.headers, &record.body);
            if count > 0 && (count == self.size || bytes > EVENT_BYTES) {
                break;
            }
            taken += 1;
            count += usize::from(!record.is_command());
        }
        let part = from..from + taken;
        let ends = part.end == batch.records.len();
        self.last = batch.records[..part.end].last().map(|record| record.position.seq_num).or(self.last);
        self.tail = batch.tail.unwrap_or_else(|| end_of(&batch));
        if !ends {
            self.pending = Some((batch.clone(), part.end));
        }
        // Only what is told counts as told: commands alone make no event.
        if count == 0 {
            return None;
        }
        self.caught_up = ends && batch.tail.is_some();
        self.held = Some(batch.room());
        let content = Content::Records { batch, part, caught_up: self.caught_up };
        Some(self.event(content))
    }

    fn at_tail(&mut self, tail: Position) -> Option<Event> {
        let known = std::mem::replace(&mut self.caught_up, true);
        self.tail = tail;
        self.last = tail.seq_num.checked_sub(1);
        (!known).then(|| self.event(Content::CaughtUp))
    }

    fn end(&mut self, at: Timestamp, reason: Option<String>, status: SessionStatus) -> Event {
        self.ended = true;
        self.event(Content::Closed { at, reason, status })
    }

    fn event(&mut self, content: Content) -> Event {
        if self.channel.is_none() {
            let key = |session| ChannelKey { session, address: self.address.clone() };
            self.channel = self.follow.session().map(|session| Arc::new(key(session.id.clone())));
        }
        Event { channel: self.channel.clone(), content, last: self.last, tail: self.tail }
    }
}

fn end_of(batch: &RecordBatch) -> Position {
    batch
        .records
        .last()
        .map_or(Position::default(), |last| Position { seq_num: last.position.seq_num + 1, ..last.position })
}

/// Events of a channel as result text, made once for all subscribers that ask for the same fields.
pub(super) struct ChannelFeed {
    events: ChannelEvents,
    selection: Selection,
}

impl ChannelFeed {
    /// What `selection` shows of `events`.
    pub fn new(events: ChannelEvents, selection: Selection) -> Self {
        Self { events, selection }
    }

    /// The next execution result and its room; `Ok(None)` when the server stops, `None` at the end. Cancel safe.
    pub async fn next(&mut self) -> Option<Result<Option<Text>>> {
        let event = self.events.next().await?;
        let text = |event: Event| Text { room: event.room(), json: self.selection.result(&event) };
        Some(event.map(|event| event.map(text)))
    }
}

/// What the resolver of a subscription and the transport give each other, past the executor.
pub(super) struct Handover {
    feed: Mutex<Option<ChannelFeed>>,
    /// Kept until the resolver has begun to wait for events, so that a connection which takes nothing begins few.
    room: Mutex<Option<Reservation>>,
}

impl Handover {
    /// For a subscription that begins in `room`.
    pub fn new(room: Reservation) -> Self {
        Self { feed: Mutex::default(), room: Mutex::new(Some(room)) }
    }

    /// The resolver has nothing more to do than to wait for events.
    pub fn begun(&self) {
        self.room.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Gives what the resolver of a channel has prepared: a result is then written straight from the records.
    pub fn put(&self, feed: ChannelFeed) {
        *self.feed.lock().unwrap_or_else(PoisonError::into_inner) = Some(feed);
    }

    /// Takes it.
    pub fn take(&self) -> Option<ChannelFeed> {
        self.feed.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl fmt::Debug for Handover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Handover")
    }
}
