//! A follower with everything that can end it: the session's close or expiry, the caller's credentials.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use futures_util::future::{BoxFuture, FutureExt};
use futures_util::stream::{BoxStream, StreamExt};
use tokio_util::sync::WaitForCancellationFutureOwned;

use super::access::Caller;
use super::clock::{Clock, Timestamp};
use super::error::{Error, Result};
use super::port::Followed;
use super::record::{Position, RecordBatch};
use super::session::{Closure, SharedSession};
use super::timer::Timers;

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
    Batch(Arc<RecordBatch>),
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
}

/// One caller's live view of one channel.
pub struct Follow {
    stream: BoxStream<'static, Result<Item>>,
    clock: Arc<dyn Clock>,
    timers: Arc<Timers>,
    alarm: Option<(Timestamp, BoxFuture<'static, ()>)>,
    revoked: Pin<Box<WaitForCancellationFutureOwned>>,
    credentials_end: Option<Timestamp>,
    session_end: Option<Timestamp>,
    caught_up: bool,
    settled: bool,
}

impl Follow {
    pub(super) fn new(
        stream: BoxStream<'static, Result<Item>>,
        caller: &Caller,
        settled: bool,
        clock: Arc<dyn Clock>,
        timers: Arc<Timers>,
    ) -> Self {
        Self {
            stream,
            clock,
            timers,
            alarm: None,
            revoked: Box::pin(caller.revoked.clone().cancelled_owned()),
            credentials_end: caller.expires_at,
            session_end: None,
            caught_up: false,
            settled,
        }
    }

    /// True if the channel's last turn was complete when the follower began and the caller asked to know.
    pub fn is_settled(&self) -> bool {
        self.settled
    }

    /// The next event; [`FollowEvent::Reached`] once the clock shows `until`. Cancel safe.
    ///
    /// # Errors
    /// [`Error::Unauthenticated`] when the caller's credentials end, or what the log says. Nothing comes
    /// after an error or a last event.
    pub async fn next(&mut self, until: Option<Timestamp>) -> Result<FollowEvent> {
        loop {
            let now = self.clock.now();
            if self.credentials_end.is_some_and(|at| at <= now) {
                return Err(Error::Unauthenticated("Public Access Token is expired"));
            }
            let expired = self.session_end.filter(|at| self.caught_up && *at <= now);
            if expired.is_none() && until.is_some_and(|at| at <= now) {
                return Ok(FollowEvent::Reached);
            }
            let session_end = self.session_end.filter(|_| self.caught_up);
            let wake = [self.credentials_end, session_end, until].into_iter().flatten().min();
            self.arm(wake);
            let alarm = self.alarm.as_mut().map(|(_, alarm)| alarm);
            let item = if let Some(at) = expired {
                match self.stream.next().now_or_never() {
                    Some(item) => item,
                    None => return Ok(FollowEvent::Expired(at)),
                }
            } else {
                tokio::select! {
                    biased;
                    () = self.revoked.as_mut() => {
                        return Err(Error::Unauthenticated("the key has been revoked"));
                    }
                    item = self.stream.next() => item,
                    () = async { match alarm { Some(alarm) => alarm.await, None => std::future::pending().await } } => {
                        self.alarm = None;
                        continue;
                    }
                }
            };
            match item {
                Some(Ok(Item::Attached(session))) => self.session_end = session.expires_at,
                Some(Ok(Item::Followed(Followed::Batch(batch)))) => return Ok(FollowEvent::Batch(batch)),
                Some(Ok(Item::Followed(Followed::CaughtUp(_)))) if self.settled => {
                    return Ok(FollowEvent::Settled);
                }
                Some(Ok(Item::Followed(Followed::CaughtUp(tail)))) => {
                    self.caught_up = true;
                    return Ok(FollowEvent::CaughtUp(tail));
                }
                Some(Ok(Item::Followed(Followed::Sealed(closure)))) => {
                    return Ok(FollowEvent::Closed(closure));
                }
                Some(Err(error)) => return Err(error),
                None => return Err(Error::Unavailable { what: "channel", source: None }),
            }
        }
    }

    /// Makes sure that something wakes this follower at `wake` or before. An alarm that is too early is
    /// kept: a deadline that moves with every record must not cost a timer operation for every record.
    fn arm(&mut self, wake: Option<Timestamp>) {
        let Some(wake) = wake else { return };
        if self.alarm.as_ref().is_none_or(|(at, _)| *at > wake) {
            self.alarm = Some((wake, self.timers.reached(wake).boxed()));
        }
    }
}

impl fmt::Debug for Follow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Follow").field("caught_up", &self.caught_up).field("settled", &self.settled).finish()
    }
}
