//! What followers share: one window per followed channel, holding its newest batches and its tail.
//!
//! Knows neither how records are stored nor who appends them. A follower that finds its place outside the
//! window reads the store instead, so a window may forget anything at any time and nothing is lost.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use sessiond_domain::record::{Position, RecordBatch, SeqNum, metered_size};
use sessiond_domain::{ChannelAddress, ChannelKey, Closure, SessionId};

/// Most batches a window holds.
const WINDOW_BATCHES: usize = 64;
/// Most metered bytes a window holds; the newest batch is always kept.
const WINDOW_BYTES: u64 = 64 * 1024;

/// Every followed channel.
#[derive(Debug, Default)]
pub(crate) struct Live {
    sessions: Mutex<HashMap<SessionId, HashMap<ChannelAddress, Arc<Window>>>>,
    /// Windows there are, so that a writer nobody follows takes no lock.
    windows: AtomicUsize,
}

/// The newest batches of one channel. See [`Window::take`].
#[derive(Debug, Default)]
pub(crate) struct Window {
    ring: Mutex<Ring>,
    changed: Notify,
    /// Counted under the lock of [`Live::sessions`].
    followers: AtomicUsize,
}

#[derive(Debug, Default)]
struct Ring {
    /// Consecutive, the last one ending at `tail`.
    batches: VecDeque<(Arc<RecordBatch>, u64)>,
    bytes: u64,
    tail: Position,
    sealed: Option<Closure>,
}

/// What a window has for a follower.
#[derive(Debug)]
pub(crate) enum Taken {
    /// The records from its place on.
    Batch(Arc<RecordBatch>),
    /// The records from its place on are no longer here: read the store.
    Behind,
    /// Nothing yet.
    AtTail(Position),
    /// Nothing, ever.
    Sealed(Position, Closure),
}

/// Keeps a channel's window for as long as it lives.
#[derive(Debug)]
pub(crate) struct Subscription {
    live: Arc<Live>,
    key: ChannelKey,
    window: Arc<Window>,
}

impl Live {
    /// Opens the window of a channel. To miss nothing, subscribe first and ask the store for the tail after.
    pub(crate) fn subscribe(self: &Arc<Self>, key: &ChannelKey) -> Subscription {
        let mut sessions = lock(&self.sessions);
        let addresses = sessions.entry(key.session.clone()).or_default();
        let window = addresses.entry(key.address.clone()).or_insert_with(|| {
            self.windows.fetch_add(1, Ordering::SeqCst);
            Arc::default()
        });
        window.followers.fetch_add(1, Ordering::Relaxed);
        Subscription { live: self.clone(), key: key.clone(), window: window.clone() }
    }

    /// The window of a channel, if anybody follows it.
    pub(crate) fn window(&self, key: &ChannelKey) -> Option<Arc<Window>> {
        if self.windows.load(Ordering::SeqCst) == 0 {
            return None;
        }
        lock(&self.sessions).get(&key.session)?.get(&key.address).cloned()
    }

    /// Tells the followers of every channel of a session that nothing comes any more.
    pub(crate) fn seal(&self, session: &SessionId, closure: &Closure) {
        let windows: Vec<_> =
            lock(&self.sessions).get(session).into_iter().flat_map(HashMap::values).cloned().collect();
        for window in windows {
            window.seal(closure);
        }
    }

    /// Followed channels.
    pub(crate) fn len(&self) -> usize {
        self.windows.load(Ordering::SeqCst)
    }
}

impl Window {
    /// Adds what has just become durable, in order; `tail` is the channel's tail after it. Without batches
    /// followers are sent to the store.
    pub(crate) fn publish(&self, batches: Vec<Arc<RecordBatch>>, tail: Position) {
        let mut ring = lock(&self.ring);
        for batch in batches {
            ring.push(batch);
        }
        ring.raise(tail);
        drop(ring);
        self.changed.notify_waiters();
    }

    /// Tells the tail that the store has. Never moves it back.
    pub(crate) fn raise(&self, tail: Position) {
        lock(&self.ring).raise(tail);
    }

    /// Marks the end.
    pub(crate) fn seal(&self, closure: &Closure) {
        lock(&self.ring).sealed.get_or_insert_with(|| closure.clone());
        self.changed.notify_waiters();
    }

    /// What there is for a follower whose next record is `next`.
    pub(crate) fn take(&self, next: SeqNum) -> Taken {
        let ring = lock(&self.ring);
        if next >= ring.tail.seq_num {
            return match &ring.sealed {
                Some(closure) => Taken::Sealed(ring.tail, closure.clone()),
                None => Taken::AtTail(ring.tail),
            };
        }
        let index = ring.batches.partition_point(|(batch, _)| batch.next_seq_num() <= Some(next));
        let Some((batch, _)) = ring.batches.get(index) else { return Taken::Behind };
        let batch = batch.clone();
        drop(ring);
        match batch.records.first().map(|record| record.position.seq_num) {
            Some(first) if first == next => Taken::Batch(batch),
            Some(first) if first < next => {
                let skip = usize::try_from(next - first).unwrap_or(usize::MAX).min(batch.records.len());
                Taken::Batch(Arc::new(RecordBatch::new(batch.records[skip..].to_vec(), batch.tail)))
            }
            _ => Taken::Behind,
        }
    }
}

impl Ring {
    fn push(&mut self, batch: Arc<RecordBatch>) {
        let (Some(first), Some(last)) = (batch.records.first(), batch.records.last()) else { return };
        let newest = self.batches.back().and_then(|(batch, _)| batch.next_seq_num());
        if newest != Some(first.position.seq_num) {
            self.clear();
        }
        let sizes = batch.records.iter().map(|record| metered_size(&record.headers, &record.body) as u64);
        let bytes = sizes.sum();
        self.tail = self.tail.max_by_seq_num(Position {
            seq_num: last.position.seq_num + 1,
            timestamp: last.position.timestamp,
        });
        self.batches.push_back((batch, bytes));
        self.bytes += bytes;
        while self.batches.len() > 1 && (self.batches.len() > WINDOW_BATCHES || self.bytes > WINDOW_BYTES) {
            if let Some((_, bytes)) = self.batches.pop_front() {
                self.bytes -= bytes;
            }
        }
    }

    fn raise(&mut self, tail: Position) {
        self.tail = self.tail.max_by_seq_num(tail);
        let newest = self.batches.back().and_then(|(batch, _)| batch.next_seq_num());
        if newest.is_some_and(|newest| newest != self.tail.seq_num) {
            self.clear();
        }
    }

    fn clear(&mut self) {
        self.batches.clear();
        self.bytes = 0;
    }
}

trait MaxBySeqNum {
    fn max_by_seq_num(self, other: Self) -> Self;
}

impl MaxBySeqNum for Position {
    fn max_by_seq_num(self, other: Self) -> Self {
        if other.seq_num > self.seq_num { other } else { self }
    }
}

impl Subscription {
    /// The window.
    pub(crate) fn window(&self) -> &Window {
        &self.window
    }

    /// The window, for whoever fills it.
    pub(crate) fn shared(&self) -> Arc<Window> {
        self.window.clone()
    }

    /// What there is at `next`. A follower that has `caught_up` waits at the tail until there is more.
    pub(crate) async fn next(&self, next: SeqNum, caught_up: bool) -> Taken {
        loop {
            // Made before looking: a change in between wakes it.
            let changed = self.window.changed.notified();
            match self.window.take(next) {
                Taken::AtTail(_) if caught_up => changed.await,
                taken => return taken,
            }
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut sessions = lock(&self.live.sessions);
        if self.window.followers.fetch_sub(1, Ordering::Relaxed) > 1 {
            return;
        }
        if let Some(addresses) = sessions.get_mut(&self.key.session) {
            addresses.remove(&self.key.address);
            self.live.windows.fetch_sub(1, Ordering::SeqCst);
            if addresses.is_empty() {
                sessions.remove(&self.key.session);
            }
        }
    }
}

/// No guarded section leaves its value half changed, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sessiond_domain::{Direction, Record, Timestamp};

    fn batch(from: u64, count: u64, body: usize) -> Arc<RecordBatch> {
        let size = 8 + body as u64;
        let records = (from..from + count).map(|seq_num| Record {
            position: Position { seq_num, timestamp: Timestamp::from_millis(1) },
            headers: vec![],
            body: vec![0; body].into(),
            metered_end: (seq_num + 1) * size,
        });
        Arc::new(RecordBatch::new(records.collect(), None))
    }

    fn tail(seq_num: u64) -> Position {
        Position { seq_num, timestamp: Timestamp::from_millis(1) }
    }

    #[test]
    fn a_place_inside_a_batch_gets_the_rest_of_it() {
        let window = Window::default();
        window.publish(vec![batch(0, 4, 1), batch(4, 4, 1)], tail(8));
        let Taken::Batch(rest) = window.take(6) else { panic!("a batch") };
        assert_eq!(rest.records[0].position.seq_num, 6);
        assert!(matches!(window.take(8), Taken::AtTail(_)));
    }

    #[test]
    fn a_gap_or_an_overflow_sends_followers_to_the_store_and_the_newest_batch_stays() {
        let window = Window::default();
        window.publish(vec![batch(0, 1, 1)], tail(1));
        window.publish(vec![], tail(2));
        assert!(matches!(window.take(1), Taken::Behind));
        window.publish(vec![batch(2, 1, 300_000)], tail(3));
        window.publish(vec![batch(3, 1, 300_000)], tail(4));
        assert!(matches!(window.take(2), Taken::Behind));
        assert!(matches!(window.take(3), Taken::Batch(_)));
        for seq_num in 4..200 {
            window.publish(vec![batch(seq_num, 1, 1)], tail(seq_num + 1));
        }
        assert!(matches!(window.take(200 - WINDOW_BATCHES as u64), Taken::Batch(_)));
        assert!(matches!(window.take(199 - WINDOW_BATCHES as u64), Taken::Behind));
    }

    #[test]
    fn a_window_lives_as_long_as_its_followers() {
        let live = Arc::new(Live::default());
        let key = ChannelKey::main(SessionId::from_stored("session_a"), Direction::In);
        let [one, two] = [live.subscribe(&key), live.subscribe(&key)];
        drop(one);
        assert!(live.window(&key).is_some());
        drop(two);
        assert!(live.window(&key).is_none());
        assert_eq!(live.len(), 0);
        assert!(lock(&live.sessions).is_empty());
    }
}
