//! One connection: what it holds and has taken, and the room that it waits for.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::{
    CONNECTION_BYTES, CONNECTION_DOWNLOADS, CREDIT_BYTES, Connection, ConnectionBudget, Download,
    FIRST_PIECE, InRequest, Kind, MOVE_PART, NEVER, PIECE_PART, Permits, Reservation, UNREAD_BYTES, lock,
};
use crate::record::METERED_MAX;

impl ConnectionBudget {
    /// For one request of the connection.
    pub fn request(&self) -> Self {
        Self { connection: self.connection.clone(), request: InRequest::new() }
    }

    /// Since when this request has waited for room while the connection did not move.
    pub fn waits_still_since(&self) -> Option<Instant> {
        let since = self.request.waits.load(Ordering::Relaxed);
        let still = since.max(self.connection.moved_at.load(Ordering::Relaxed));
        (since != NEVER).then(|| self.connection.process.began + Duration::from_millis(still))
    }

    /// Metered bytes that are to be read at once for this connection: few at first, more as it earns them.
    pub fn piece(&self) -> usize {
        let part = earned(self.connection.taken.load(Ordering::Relaxed)) / PIECE_PART;
        usize::try_from(part).unwrap_or(METERED_MAX).clamp(FIRST_PIECE, METERED_MAX)
    }

    /// Waits for room. More than the connection may have is lent once it has nothing else. Cancel safe. Whoever holds room
    /// must not wait for more of the same connection.
    pub async fn reserve(&self, bytes: usize) -> Reservation {
        if let Some(room) = self.try_acquire(bytes) {
            return room;
        }
        let _waiting = Waiting::begin(&self.request.waits, self.connection.process.now());
        let (this, (own, advance, shared)) = (self.clone(), self.permits(bytes));
        self.in_own_task(async move {
            let connection = &this.connection;
            // Never closed, so there are always permits.
            let own = connection.bytes.clone().acquire_many_owned(own).await.ok();
            let advance = connection.process.acquire_advance(advance).await;
            let shared = connection.process.acquire(Kind::Bytes, shared).await;
            this.lent(Permits { own, shared, ..advance })
        })
        .await
    }

    /// Room, if there is enough at this moment. A little is always lent to a connection that has taken everything, so that
    /// others which take nothing do not hold up what is live.
    pub fn try_reserve(&self, bytes: usize) -> Option<Reservation> {
        let free = self.try_acquire(bytes);
        let credit = || bytes <= CREDIT_BYTES && self.connection.held.load(Ordering::Relaxed) == 0;
        free.or_else(|| credit().then(|| self.lend(bytes, Permits::default())))
    }

    fn try_acquire(&self, bytes: usize) -> Option<Reservation> {
        let (own, advance, shared) = self.permits(bytes);
        let process = &self.connection.process;
        let own = self.connection.bytes.clone().try_acquire_many_owned(own).ok()?;
        let advance = process.try_acquire_advance(advance)?;
        let shared = process.bytes.take(shared)?;
        Some(self.lent(Permits { own: Some(own), shared: Some(shared), ..advance }))
    }

    pub(super) fn lent(&self, permits: Permits) -> Reservation {
        let bytes = permits.shared.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        self.lend(bytes, permits)
    }

    pub(super) fn lend(&self, bytes: usize, permits: Permits) -> Reservation {
        self.connection.hold(bytes);
        self.connection.count_advances(&permits);
        Reservation { connection: self.connection.clone(), bytes, permits }
    }

    /// Permits of the connection, of what is lent beyond those, and of the process for so many bytes.
    fn permits(&self, bytes: usize) -> (u32, u32, u32) {
        let shared = u32::try_from(bytes.min(CONNECTION_BYTES)).unwrap_or(u32::MAX);
        let granted = u32::try_from(self.connection.granted.load(Ordering::Relaxed)).unwrap_or(u32::MAX);
        let own = shared.min(granted);
        (own, self.connection.process.advance(shared - own), shared)
    }

    /// Waits for a place to keep a blob open in while it is sent. Cancel safe.
    pub async fn download(&self) -> Option<Download> {
        let connection = &self.connection;
        // Neither is ever closed, so there are always permits.
        let own = connection.downloads.clone().acquire_owned().await.ok()?;
        let shared = connection.process.acquire(Kind::Downloads, 1).await?;
        // A byte, so that one which takes nothing of what is sent uncounted can be told from one that has nothing open.
        Some(Download { _own: own, _shared: shared, _held: self.lend(1, Permits::default()) })
    }

    /// Waits in a task of its own: whoever polls this may stop for as long as its client likes not to read, and what it is lent
    /// meanwhile must count as held.
    async fn in_own_task(
        &self,
        reserving: impl Future<Output = Reservation> + Send + 'static,
    ) -> Reservation {
        let room = AbortOnDropHandle::new(tokio::spawn(reserving)).await;
        room.unwrap_or_else(|_| self.lent(Permits::default()))
    }

    /// So many bytes have gone to the client: as many more may wait for it, but for those that nobody need have read.
    pub fn took(&self, bytes: usize) {
        let before = self.connection.taken.fetch_add(bytes as u64, Ordering::Relaxed);
        self.connection.took(before, before + bytes as u64);
    }

    /// So many bytes have gone to a client with many streams, whether of one of them or not.
    pub fn sent(&self, bytes: usize) {
        self.connection.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// So many bytes of a stream are gone: to the client, or with the stream. The client has taken no more than was sent.
    pub fn landed(&self, bytes: usize) {
        let connection = &self.connection;
        let landed = connection.landed.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        let taken = landed.min(connection.sent.load(Ordering::Relaxed));
        let before = connection.taken.fetch_max(taken, Ordering::Relaxed);
        if taken > before {
            connection.took(before, taken);
        }
    }

    /// Completes when the connection must end because others need its room. One task at a time may wait.
    pub async fn cut(&self) {
        self.connection.cut.notified().await;
    }
}

/// Bytes that a connection which has taken so many may have beyond its first.
fn earned(taken: u64) -> u64 {
    taken.saturating_sub(UNREAD_BYTES)
}

/// A request waits for as long as this lives.
struct Waiting<'a>(&'a AtomicU64);

impl<'a> Waiting<'a> {
    fn begin(waits: &'a AtomicU64, now: u64) -> Self {
        waits.store(now, Ordering::Relaxed);
        Self(waits)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.store(NEVER, Ordering::Relaxed);
    }
}

impl InRequest {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { waits: AtomicU64::new(NEVER), received: Mutex::default() })
    }
}

impl Connection {
    fn moved(&self) {
        self.moved_from.store(self.passed(), Ordering::Relaxed);
        self.moved_at.store(self.process.now(), Ordering::Relaxed);
    }

    /// Holds so many bytes more.
    pub(super) fn hold(&self, bytes: usize) {
        if bytes > 0 {
            // First, or whoever looks for a connection to cut would see what is held and an old moment.
            if self.held.load(Ordering::Relaxed) == 0 {
                self.moved();
            }
            self.held.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// Counts the advances among these permits.
    pub(super) fn count_advances(&self, permits: &Permits) {
        let (small, large) = permits.advanced();
        self.advanced.fetch_add(small, Ordering::Relaxed);
        self.advanced_large.fetch_add(large, Ordering::Relaxed);
    }

    /// Those that are given back count no more.
    pub(super) fn discount_advances(&self, permits: &Permits) {
        let (small, large) = permits.advanced();
        self.advanced.fetch_sub(small, Ordering::Relaxed);
        self.advanced_large.fetch_sub(large, Ordering::Relaxed);
    }

    /// For how many milliseconds it has not moved; none while nothing waits for it.
    pub(super) fn still(&self, now: u64) -> Option<u64> {
        let holds = self.held.load(Ordering::Relaxed) > 0;
        holds.then(|| now.saturating_sub(self.moved_at.load(Ordering::Relaxed)))
    }

    pub(super) fn lent(&self, kind: Kind) -> usize {
        match kind {
            Kind::Bytes => self.held.load(Ordering::Relaxed),
            Kind::Advances => self.advanced.load(Ordering::Relaxed),
            Kind::LargeAdvances => self.advanced_large.load(Ordering::Relaxed),
            Kind::Downloads => CONNECTION_DOWNLOADS.saturating_sub(self.downloads.available_permits()),
        }
    }

    /// Bytes both ways.
    fn passed(&self) -> u64 {
        self.taken.load(Ordering::Relaxed).saturating_add(self.received.load(Ordering::Relaxed))
    }

    pub(super) fn may_have_moved(&self) {
        let held = self.held.load(Ordering::Relaxed);
        let since = self.passed().saturating_sub(self.moved_from.load(Ordering::Relaxed));
        if held > 0 && since >= held.div_ceil(MOVE_PART) as u64 {
            self.moved();
        }
    }

    /// The client has taken `taken` bytes, `before` of them before.
    pub(super) fn took(&self, before: u64, taken: u64) {
        self.may_have_moved();
        let bytes = usize::try_from(earned(taken) - earned(before)).unwrap_or(usize::MAX);
        let grown = |granted: usize| CONNECTION_BYTES.min(granted.saturating_add(bytes));
        let grow = |granted: usize| (granted < CONNECTION_BYTES).then(|| grown(granted));
        if let Ok(before) = self.granted.fetch_update(Ordering::Relaxed, Ordering::Relaxed, grow) {
            self.bytes.add_permits(grown(before) - before);
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        lock(&self.process.connections).remove(&self.number);
    }
}

impl fmt::Debug for ConnectionBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionBudget").field("held", &self.connection.held).finish_non_exhaustive()
    }
}
