//! A follower with everything that can end it: the session's close or expiry, the caller's credentials.

use std::cmp::Ordering;
use std::fmt;
use std::time::Duration;

use futures_util::future::FutureExt;
use futures_util::stream::{BoxStream, StreamExt};

use super::access::Caller;
use super::clock::Timestamp;
use super::error::{Error, Result};
use super::lifeline::{Bounds, Lifeline};
use super::port::Followed;
use super::record::{Position, SeqNum};
use super::send_budget::Delivery;
use super::session::{Closure, SharedSession};

/// How long a read of stored records may keep a follower from looking around.
const GLANCE: Duration = Duration::from_secs(1);

/// What the stream below a [`Follow`] yields.
pub(super) enum Item {
    /// The session exists; sent once, before any record.
    Attached(SharedSession),
    /// From the log.
    Followed(Followed),
}

/// What comes next on a channel.
#[derive(Debug)]
pub enum FollowEvent {
    /// Records, in order and without gaps.
    Batch(Delivery),
    /// Every stored record has been given out.
    CaughtUp(Position),
    /// The session is closed and every record has been given out. The last event.
    Closed(Closure),
    /// The session has expired and every record has been given out. The last event.
    Expired(Timestamp),
    /// The turn was settled when the stream began, and every record has been given out. The last event.
    Settled,
    /// The moment given to [`Follow::next`] has been reached.
    Reached,
    /// The server stops; there may be more. The last event.
    Stopping,
}

/// What a follower asks of its channel.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Demands {
    /// End after the stored records.
    pub settled: bool,
    /// Do not pass over a trimmed record in silence, nor over a start that lies beyond the tail.
    pub complete: bool,
    /// The record that comes next, once that is known.
    pub next: Option<SeqNum>,
}

/// One caller's live view of one channel.
pub struct Follow {
    stream: BoxStream<'static, Result<Item>>,
    lifeline: Lifeline,
    session: Option<SharedSession>,
    caught_up: bool,
    demands: Demands,
    /// Where it begins in the channel has been seen.
    begun: bool,
    is_settled: bool,
}

impl Follow {
    pub(super) fn new(
        stream: BoxStream<'static, Result<Item>>,
        caller: &Caller,
        demands: Demands,
        is_settled: bool,
        bounds: Bounds,
    ) -> Self {
        let lifeline = Lifeline::new(Some(caller), bounds);
        Self { stream, lifeline, session: None, caught_up: false, demands, begun: false, is_settled }
    }

    /// True if nothing was to be expected any more when the follower began: the session was closed or had expired, or the
    /// channel's last turn was complete and the caller asked to know.
    pub fn is_settled(&self) -> bool {
        self.is_settled
    }

    /// The session, as it was when the follower was attached to it; known with the first event.
    pub fn session(&self) -> Option<&SharedSession> {
        self.session.as_ref()
    }

    /// The next event; [`FollowEvent::Reached`] once the clock shows `until` and nothing stored is left to give out.
    /// Cancel safe.
    ///
    /// # Errors
    /// [`Error::Unauthenticated`] when the caller's credentials end, [`Error::Trimmed`] and [`Error::CursorAhead`] if the
    /// follower asked to be told, or what the log says. Nothing comes after an error or a last event.
    pub async fn next(&mut self, until: Timestamp) -> Result<FollowEvent> {
        loop {
            let now = self.lifeline.now();
            let session_end =
                self.session.as_ref().and_then(|session| session.expires_at).filter(|_| self.caught_up);
            let expired = session_end.filter(|at| *at <= now);
            let due = until <= now;
            // While stored records are being read, it is the reader that is slow, and not the channel that is silent.
            let reading = !self.caught_up && self.session.is_some();
            let until = if due && reading { now.plus(GLANCE) } else { until };
            let wake = session_end.map_or(until, |end| end.min(until));
            if let Some(cut) = self.lifeline.check(now, wake) {
                cut.credentials()?;
                return Ok(FollowEvent::Stopping);
            }
            let ends = expired.is_some() || (due && !reading);
            let item = if ends {
                match (self.stream.next().now_or_never(), expired) {
                    (Some(item), _) => item,
                    (None, Some(at)) => return Ok(FollowEvent::Expired(at)),
                    (None, None) => return Ok(FollowEvent::Reached),
                }
            } else {
                tokio::select! {
                    biased;
                    item = self.stream.next() => item,
                    () = self.lifeline.ring() => continue,
                }
            };
            if let Some(event) = self.take(item)? {
                return Ok(event);
            }
        }
    }

    fn take(&mut self, item: Option<Result<Item>>) -> Result<Option<FollowEvent>> {
        let followed = match item {
            Some(Ok(Item::Attached(session))) => {
                self.session = Some(session);
                return Ok(None);
            }
            Some(Ok(Item::Followed(followed))) => followed,
            Some(Err(error)) => return Err(error),
            None => return Err(Error::Unavailable { what: "channel", source: None }),
        };
        Ok(Some(match followed {
            Followed::Batch(batch) => {
                let first = batch.records.first().map(|record| record.position.seq_num);
                self.expect(first)?;
                self.demands.next = batch.next_seq_num();
                FollowEvent::Batch(batch)
            }
            Followed::CaughtUp(tail) => {
                self.expect(Some(tail.seq_num))?;
                self.demands.next = Some(tail.seq_num);
                if self.demands.settled {
                    return Ok(Some(FollowEvent::Settled));
                }
                self.caught_up = true;
                FollowEvent::CaughtUp(tail)
            }
            Followed::Behind => {
                self.caught_up = false;
                return Ok(None);
            }
            Followed::Sealed(closure) => FollowEvent::Closed(closure),
        }))
    }

    /// Refuses if records were trimmed between the last one and `next`, and if `next`, where the follower begins, is what
    /// the channel has instead of a start beyond its tail.
    fn expect(&mut self, next: Option<SeqNum>) -> Result<()> {
        let begins = !std::mem::replace(&mut self.begun, true);
        let (true, Some(expected), Some(next)) = (self.demands.complete, self.demands.next, next) else {
            return Ok(());
        };
        match next.cmp(&expected) {
            Ordering::Greater => Err(Error::Trimmed { earliest: next }),
            // Later on a live window may lag behind what was read from the store.
            Ordering::Less if begins => Err(Error::CursorAhead { tail: next }),
            Ordering::Less | Ordering::Equal => Ok(()),
        }
    }
}

impl fmt::Debug for Follow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Follow").field("caught_up", &self.caught_up).field("demands", &self.demands).finish()
    }
}
