//! One coarse timer for everybody who waits for a moment: a follower costs a list entry, not a timer.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::background::Ticker;
use super::clock::{Clock, Timestamp};

/// How late a wake-up may be. Every deadline of a stream is in whole seconds, so a quarter is fine.
const RESOLUTION: Duration = Duration::from_millis(250);
const RESOLUTION_MS: i64 = RESOLUTION.as_millis() as i64;

/// Wakes waiters when the clock reaches their moment, at most [`RESOLUTION`] late.
pub struct Timers {
    clock: Arc<dyn Clock>,
    /// Waiters by the end of their quarter second.
    slots: Mutex<BTreeMap<i64, Arc<Notify>>>,
    /// Counts [`Timers::wake_all`].
    alerts: AtomicU64,
}

impl Timers {
    /// Timers that follow `clock`. Nothing fires until [`Timers::run`] is polled.
    pub fn new(clock: Arc<dyn Clock>) -> Arc<Self> {
        Arc::new(Self { clock, slots: Mutex::default(), alerts: AtomicU64::new(0) })
    }

    /// Completes once `moment` has been reached. It must be created before the caller checks the clock
    /// for the last time, and then cannot miss the moment.
    pub fn reached(&self, moment: Timestamp) -> impl Future<Output = ()> + Send + 'static {
        let slot = moment.millis().div_euclid(RESOLUTION_MS).saturating_add(1);
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.entry(slot).or_default().clone().notified_owned()
    }

    /// Fires what is due, until `stop` is cancelled.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut ticker = Ticker::new(RESOLUTION, stop);
        while ticker.tick().await {
            self.fire();
        }
    }

    /// Wakes everybody, so that each looks around: a key was revoked, or the server stops.
    pub fn wake_all(&self) {
        // Counted first: who registers too late to be woken sees the new count.
        self.alerts.fetch_add(1, Ordering::SeqCst);
        self.fire_before(i64::MAX);
    }

    /// How often everybody was woken. Cheap; to be read after [`Timers::reached`].
    pub fn alerts(&self) -> u64 {
        self.alerts.load(Ordering::SeqCst)
    }

    fn fire(&self) {
        self.fire_before(self.clock.now().millis().div_euclid(RESOLUTION_MS) + 1);
    }

    fn fire_before(&self, slot: i64) {
        let due = {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            let later = slots.split_off(&slot);
            std::mem::replace(&mut *slots, later)
        };
        for slot in due.into_values() {
            slot.notify_waiters();
        }
    }
}

impl fmt::Debug for Timers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Timers")
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::clock::TestClock;

    #[test]
    fn a_waiter_wakes_at_its_moment_and_not_before() {
        let clock = TestClock::at(Timestamp::from_millis(10_000));
        let timers = Timers::new(Arc::new(clock.clone()));
        let mut wait = Box::pin(timers.reached(Timestamp::from_millis(10_900)));
        timers.fire();
        assert!(wait.as_mut().now_or_never().is_none());
        clock.advance(Duration::from_millis(800));
        timers.fire();
        assert!(wait.as_mut().now_or_never().is_none());
        clock.advance(Duration::from_millis(350));
        timers.fire();
        assert!(wait.as_mut().now_or_never().is_some());
    }

    #[test]
    fn a_moment_in_the_past_fires_at_the_next_beat() {
        let timers = Timers::new(Arc::new(TestClock::at(Timestamp::from_millis(10_000))));
        let wait = Box::pin(timers.reached(Timestamp::from_millis(5)));
        timers.fire();
        assert!(wait.now_or_never().is_some());
    }
}
