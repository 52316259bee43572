//! What ends everything that outlives a request: the caller's credentials and the server's stop.

use std::fmt;
use std::sync::Arc;

use futures_util::future::{BoxFuture, FutureExt};
use tokio_util::sync::CancellationToken;

use super::access::Caller;
use super::clock::{Clock, Timestamp};
use super::error::{Error, Result};
use super::timer::Timers;

/// Where a [`Lifeline`] gets the time and the word to stop.
#[derive(Clone)]
pub(super) struct Bounds {
    pub clock: Arc<dyn Clock>,
    pub timers: Arc<Timers>,
    /// Cancelled when the server begins to stop.
    pub stopping: CancellationToken,
}

/// Why something that outlives a request must end.
#[derive(Debug)]
pub enum Cut {
    /// The credentials that it was begun with have ended.
    Credentials(Error),
    /// The server stops.
    Stopping,
}

/// How long one caller may go on.
///
/// It waits for one thing only, its alarm: revocation and a stop are flags, and whoever raises one fires every alarm
/// ([`Timers::wake_all`]). Each thing waited for costs a lock with every delivery.
pub(super) struct Lifeline {
    bounds: Bounds,
    alarm: Option<(Timestamp, BoxFuture<'static, ()>)>,
    /// Alerts at the last look at the flags.
    alerts: Option<u64>,
    revoked: Option<CancellationToken>,
    credentials_end: Option<Timestamp>,
}

impl Lifeline {
    /// Of a caller, or of nobody, whom only a stop ends.
    pub fn new(caller: Option<&Caller>, bounds: Bounds) -> Self {
        Self {
            bounds,
            alarm: None,
            alerts: None,
            revoked: caller.map(|caller| caller.revoked.clone()),
            credentials_end: caller.and_then(|caller| caller.expires_at),
        }
    }

    /// The time by which everything is judged.
    pub fn now(&self) -> Timestamp {
        self.bounds.clock.now()
    }

    /// Answers if it is over at `now`, and makes sure that [`Lifeline::ring`] completes at `wake` or before.
    pub fn check(&mut self, now: Timestamp, wake: Timestamp) -> Option<Cut> {
        if self.credentials_end.is_some_and(|at| at <= now) {
            return Some(Cut::Credentials(Error::Unauthenticated("Public Access Token is expired")));
        }
        self.arm(self.credentials_end.map_or(wake, |end| end.min(wake)));
        self.alerted()
    }

    /// Waits until there is a reason to check again. Cancel safe.
    pub async fn ring(&mut self) {
        match &mut self.alarm {
            Some((_, alarm)) => alarm.await,
            None => std::future::pending().await,
        }
        self.alarm = None;
    }

    /// Waits until it is over.
    pub async fn ended(mut self) -> Cut {
        loop {
            let now = self.now();
            if let Some(cut) = self.check(now, Timestamp::from_millis(i64::MAX)) {
                return cut;
            }
            self.ring().await;
        }
    }

    /// Looks at the flags if somebody may have raised one since the last look.
    fn alerted(&mut self) -> Option<Cut> {
        let alerts = self.bounds.timers.alerts();
        if self.alerts.replace(alerts) == Some(alerts) {
            return None;
        }
        if self.revoked.as_ref().is_some_and(CancellationToken::is_cancelled) {
            return Some(Cut::Credentials(Error::Unauthenticated("the key has been revoked")));
        }
        self.bounds.stopping.is_cancelled().then_some(Cut::Stopping)
    }

    /// An alarm that is too early is kept: a deadline that moves with every record must not cost a timer operation for
    /// every record.
    fn arm(&mut self, wake: Timestamp) {
        if self.alarm.as_ref().is_none_or(|(at, _)| *at > wake) {
            self.alarm = Some((wake, self.bounds.timers.reached(wake).boxed()));
        }
    }
}

impl Cut {
    /// The credentials' end as an error; `Ok` for a stop.
    pub(super) fn credentials(self) -> Result<()> {
        match self {
            Self::Credentials(error) => Err(error),
            Self::Stopping => Ok(()),
        }
    }
}

impl fmt::Debug for Lifeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Lifeline")
    }
}
