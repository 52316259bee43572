//! A follower with everything that can end it: the session's close or expiry, the caller's credentials.

use std::fmt;
use std::sync::Arc;

use futures_util::future::{BoxFuture, FutureExt};
use futures_util::stream::{BoxStream, StreamExt};
use tokio_util::sync::CancellationToken;

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
    /// The server stops; there may be more. The last event.
    Stopping,
}

/// What ends a follower besides its session.
#[derive(Clone)]
pub(super) struct Bounds {
    pub clock: Arc<dyn Clock>,
    pub timers: Arc<Timers>,
    /// Cancelled when the server begins to stop.
    pub stopping: CancellationToken,
}

/// One caller's live view of one channel.
///
/// It waits for two things only, the log and its alarm: revocation and a stop are flags, and whoever raises one
/// fires every alarm ([`Timers::wake_all`]). Each thing waited for costs a lock with every delivery.
pub struct Follow {
    stream: BoxStream<'static, Result<Item>>,
    bounds: Bounds,
    alarm: Option<(Timestamp, BoxFuture<'static, ()>)>,
    /// Alerts at the last look at the flags.
    alerts: Option<u64>,
    revoked: CancellationToken,
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
        bounds: Bounds,
    ) -> Self {
        Self {
            stream,
            bounds,
            alarm: None,
            alerts: None,
            revoked: caller.revoked.clone(),
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
    pub async fn next(&mut self, until: Timestamp) -> Result<FollowEvent> {
        loop {
            let now = self.bounds.clock.now();
            if self.credentials_end.is_some_and(|at| at <= now) {
                return Err(Error::Unauthenticated("Public Access Token is expired"));
            }
            let session_end = self.session_end.filter(|_| self.caught_up);
            let expired = session_end.filter(|at| *at <= now);
            if expired.is_none() && until <= now {
                return Ok(FollowEvent::Reached);
            }
            let wake = [self.credentials_end, session_end].into_iter().flatten().fold(until, Ord::min);
            self.arm(wake);
            if let Some(end) = self.alerted()? {
                return Ok(end);
            }
            let item = if let Some(at) = expired {
                match self.stream.next().now_or_never() {
                    Some(item) => item,
                    None => return Ok(FollowEvent::Expired(at)),
                }
            } else {
                let alarm = self.alarm.as_mut().map(|(_, alarm)| alarm);
                let ring = async {
                    match alarm {
                        Some(alarm) => alarm.await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    biased;
                    item = self.stream.next() => item,
                    () = ring => {
                        self.alarm = None;
                        continue;
                    }
                }
            };
            if let Some(event) = self.take(item)? {
                return Ok(event);
            }
        }
    }

    /// Looks at the flags if somebody may have raised one since the last look.
    fn alerted(&mut self) -> Result<Option<FollowEvent>> {
        let alerts = self.bounds.timers.alerts();
        if self.alerts.replace(alerts) == Some(alerts) {
            return Ok(None);
        }
        if self.revoked.is_cancelled() {
            return Err(Error::Unauthenticated("the key has been revoked"));
        }
        Ok(self.bounds.stopping.is_cancelled().then_some(FollowEvent::Stopping))
    }

    fn take(&mut self, item: Option<Result<Item>>) -> Result<Option<FollowEvent>> {
        let followed = match item {
            Some(Ok(Item::Attached(session))) => {
                self.session_end = session.expires_at;
                return Ok(None);
            }
            Some(Ok(Item::Followed(followed))) => followed,
            Some(Err(error)) => return Err(error),
            None => return Err(Error::Unavailable { what: "channel", source: None }),
        };
        Ok(Some(match followed {
            Followed::Batch(batch) => FollowEvent::Batch(batch),
            Followed::CaughtUp(_) if self.settled => FollowEvent::Settled,
            Followed::CaughtUp(tail) => {
                self.caught_up = true;
                FollowEvent::CaughtUp(tail)
            }
            Followed::Sealed(closure) => FollowEvent::Closed(closure),
        }))
    }

    /// Makes sure that something wakes this follower at `wake` or before. An alarm that is too early is kept: a
    /// deadline that moves with every record must not cost a timer operation for every record.
    fn arm(&mut self, wake: Timestamp) {
        if self.alarm.as_ref().is_none_or(|(at, _)| *at > wake) {
            self.alarm = Some((wake, self.bounds.timers.reached(wake).boxed()));
        }
    }
}

impl fmt::Debug for Follow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Follow").field("caught_up", &self.caught_up).field("settled", &self.settled).finish()
    }
}
