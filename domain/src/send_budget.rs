//! What waits for clients to read it, and what they have sent and is not answered: bounded in bytes, for each connection and
//! over all.
//!
//! Whoever reads records, or anything else of size, for a client reserves their room first and keeps it until the client
//! has them, so a client that does not read costs what it was lent and no more; and likewise whoever reads a body, until it
//! is answered. When everything is lent the connection that has moved nothing for the longest time is cut, so that the others
//! go on.

use std::collections::HashMap;
use std::fmt;
use std::ops::Deref;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep};
use tokio_util::task::AbortOnDropHandle;

use crate::error::Result;
use crate::record::{BATCH_RECORDS_MAX, METERED_MAX, ReadLimit, Record, RecordBatch, metered_size};

/// Most bytes that may wait for one connection.
pub const CONNECTION_BYTES: usize = 4 << 20;
/// Bytes that may wait for a connection that has taken nothing yet; as many more as it takes are added.
const FIRST_BYTES: usize = 64 << 10;
/// Largest budget.
pub const BUDGET_MAX: usize = u32::MAX as usize;
/// What is lent to a connection that has taken everything when there is no room.
const CREDIT_BYTES: usize = 8 << 10;
/// Metered bytes of the first piece that is read for a connection.
const FIRST_PIECE: usize = 16 << 10;
/// A piece is this part of what the connection has taken so far.
const PIECE_PART: u64 = 4;
/// Copies of a record that exist while it waits: as it was read, and as the client gets it.
const COPIES: usize = 2;
/// As many bytes as the client likes.
const UNLIMITED: u64 = u64::MAX;
/// No moment.
const NEVER: u64 = u64::MAX;
/// What a record takes besides its bytes.
const RECORD_BYTES: usize = 192;
/// A piece holds at most one record for so many of its bytes.
const BYTES_PER_RECORD: usize = 256;
/// How long a connection that has not moved is left alone when others wait for room.
const PATIENCE: Duration = Duration::from_secs(2);
/// A connection has moved when it has taken this part of what it holds; one that takes a byte now and then has not.
const MOVE_PART: usize = 16;
/// How often whoever waits for room looks for a connection to cut.
const RELIEF_EVERY: Duration = Duration::from_millis(100);
/// Shortest pause between two lines in the log about it.
const TELL_EVERY: Duration = Duration::from_secs(10);
/// Room is made for this part of the whole at a time.
const RELIEF_PART: usize = 4;
/// The most of the whole that one answer takes, or all that one connection sends at once.
const SHARE_PART: usize = 4;
/// This part of the whole may be lent to connections beyond what they have earned, and to large bodies.
const ADVANCE_PART: usize = 2;
/// Downloads that one connection may have at once. A reverse proxy has those of many clients.
const CONNECTION_DOWNLOADS: usize = 16;

/// What may wait for all clients together: bytes, and blobs that are open while they are sent.
pub struct SendBudget {
    bytes: Arc<Semaphore>,
    limit: usize,
    /// A part of the bytes, for what connections are lent beyond what they have earned, and for large bodies: whoever waits for
    /// much does not hold up those that want little.
    advances: Arc<Semaphore>,
    downloads: Arc<Semaphore>,
    downloads_limit: usize,
    began: Instant,
    connections: Mutex<HashMap<u64, Weak<Connection>>>,
    next: AtomicU64,
    /// When room was last made, of each kind.
    relieved_at: Mutex<[Option<Instant>; 3]>,
    /// Connections that were cut and not told yet, and when the last were.
    told: Mutex<(usize, Option<Instant>)>,
}

/// One connection's part of a [`SendBudget`].
#[derive(Clone)]
pub struct ConnectionBudget {
    connection: Arc<Connection>,
    request: Arc<InRequest>,
}

/// What is known of one request of a connection.
struct InRequest {
    /// Since when it waits for room, in milliseconds since the budget began; [`NEVER`] while it does not.
    waits: AtomicU64,
    /// The room of what was received of it.
    received: Mutex<Vec<Reservation>>,
}

struct Connection {
    process: Arc<SendBudget>,
    number: u64,
    bytes: Arc<Semaphore>,
    /// Bytes that were put into `bytes`.
    granted: AtomicUsize,
    held: AtomicUsize,
    /// Bytes of advances.
    advanced: AtomicUsize,
    /// What it may send at once.
    receives: Arc<Semaphore>,
    downloads: Arc<Semaphore>,
    /// Bytes that the client has taken.
    taken: AtomicU64,
    /// Bytes of bodies and messages that it has sent.
    received: AtomicU64,
    /// What both were when the connection last moved.
    moved_from: AtomicU64,
    /// When it last moved, or something was first lent, in milliseconds since the budget began.
    moved_at: AtomicU64,
    /// Bytes that a socket with many streams has taken, of whatever kind.
    sent: AtomicU64,
    /// Bytes of those streams that were given out and are gone: sent, or given up.
    landed: AtomicU64,
    /// Bytes that the client may still send; [`UNLIMITED`] while nobody has said.
    may_send: AtomicU64,
    /// What a large message takes, and its room once it has begun: no [`Reservation`], which would keep the connection.
    large: Mutex<(usize, Permits)>,
    is_cut: AtomicBool,
    cut: Notify,
}

/// Room for bytes that wait for one connection; given back when dropped.
pub struct Reservation {
    connection: Arc<Connection>,
    bytes: usize,
    permits: Permits,
}

/// Of one reservation.
#[derive(Debug, Default)]
struct Permits {
    own: Option<OwnedSemaphorePermit>,
    advance: Option<OwnedSemaphorePermit>,
    shared: Option<OwnedSemaphorePermit>,
}

/// The place of a blob among those that are open while they are sent; given back when dropped.
#[derive(Debug)]
pub struct Download {
    _own: OwnedSemaphorePermit,
    _shared: OwnedSemaphorePermit,
    _held: Reservation,
}

/// What a budget lends.
#[derive(Clone, Copy)]
enum Kind {
    Bytes,
    Advances,
    Downloads,
}

impl SendBudget {
    /// A budget of so many bytes, at least [`CONNECTION_BYTES`] and at most [`BUDGET_MAX`], and of so many downloads.
    pub fn new(limit: usize, downloads: usize) -> Arc<Self> {
        let limit = limit.clamp(CONNECTION_BYTES, BUDGET_MAX);
        let downloads = downloads.clamp(1, Semaphore::MAX_PERMITS);
        Arc::new(Self {
            bytes: Arc::new(Semaphore::new(limit)),
            limit,
            advances: Arc::new(Semaphore::new(limit / ADVANCE_PART)),
            downloads: Arc::new(Semaphore::new(downloads)),
            downloads_limit: downloads,
            began: Instant::now(),
            connections: Mutex::default(),
            next: AtomicU64::new(0),
            relieved_at: Mutex::default(),
            told: Mutex::default(),
        })
    }

    /// A connection's part.
    pub fn connection(self: &Arc<Self>) -> ConnectionBudget {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let connection = Arc::new(Connection {
            process: self.clone(),
            number,
            bytes: Arc::new(Semaphore::new(FIRST_BYTES)),
            granted: AtomicUsize::new(FIRST_BYTES),
            held: AtomicUsize::new(0),
            advanced: AtomicUsize::new(0),
            receives: Arc::new(Semaphore::new(self.limit / SHARE_PART)),
            downloads: Arc::new(Semaphore::new(CONNECTION_DOWNLOADS)),
            taken: AtomicU64::new(0),
            received: AtomicU64::new(0),
            moved_from: AtomicU64::new(0),
            moved_at: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            landed: AtomicU64::new(0),
            may_send: AtomicU64::new(UNLIMITED),
            large: Mutex::default(),
            is_cut: AtomicBool::new(false),
            cut: Notify::new(),
        });
        lock(&self.connections).insert(number, Arc::downgrade(&connection));
        ConnectionBudget { connection, request: InRequest::new() }
    }

    /// Bytes that are lent at this moment.
    pub fn lent(&self) -> usize {
        self.limit.saturating_sub(self.bytes.available_permits())
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// As much of so many bytes as may be lent at once beyond what a connection has earned.
    fn advance(&self, bytes: u32) -> u32 {
        bytes.min(u32::try_from(self.limit / ADVANCE_PART).unwrap_or(u32::MAX))
    }

    /// Waits for so many, and makes room while it does.
    async fn acquire(&self, kind: Kind, count: u32) -> Option<OwnedSemaphorePermit> {
        let all = match kind {
            Kind::Bytes => &self.bytes,
            Kind::Advances => &self.advances,
            Kind::Downloads => &self.downloads,
        };
        if let Ok(permit) = all.clone().try_acquire_many_owned(count) {
            return Some(permit);
        }
        let mut acquired = pin!(all.clone().acquire_many_owned(count));
        loop {
            tokio::select! {
                biased;
                // Never closed, so there is always a permit.
                permit = &mut acquired => return permit.ok(),
                () = sleep(RELIEF_EVERY) => self.relieve(kind),
            }
        }
    }

    /// Cuts the connections that have not moved for the longest time, until enough of the whole is free.
    fn relieve(&self, kind: Kind) {
        let mut relieved_at = lock(&self.relieved_at);
        let relieved_at = &mut relieved_at[kind as usize];
        if relieved_at.is_some_and(|at| at.elapsed() < RELIEF_EVERY) {
            return;
        }
        *relieved_at = Some(Instant::now());
        let now = self.now();
        let patience = u64::try_from(PATIENCE.as_millis()).unwrap_or(u64::MAX);
        let connections: Vec<_> = lock(&self.connections).values().filter_map(Weak::upgrade).collect();
        let stuck = |connection: &Arc<Connection>| {
            let still = connection.still(now)?;
            let lent = connection.lent(kind);
            (lent > 0 && still >= patience).then(|| (still, lent, connection.clone()))
        };
        let mut stuck: Vec<_> = connections.iter().filter_map(stuck).collect();
        stuck.sort_unstable_by_key(|(still, ..)| std::cmp::Reverse(*still));
        let limit = match kind {
            Kind::Bytes => self.limit,
            Kind::Advances => self.limit / ADVANCE_PART,
            Kind::Downloads => self.downloads_limit,
        };
        let (mut freed, mut cut) = (0, 0);
        for (_, lent, connection) in stuck {
            if freed >= limit.div_ceil(RELIEF_PART) {
                break;
            }
            // Cut before and not gone yet: what it holds comes back without another's end.
            freed += lent;
            if !connection.is_cut.swap(true, Ordering::Relaxed) {
                connection.cut.notify_one();
                cut += 1;
            }
        }
        self.tell(cut);
    }

    /// Says what was cut, but not for every client of a flood.
    fn tell(&self, cut: usize) {
        let mut told = lock(&self.told);
        told.0 += cut;
        if told.0 > 0 && told.1.is_none_or(|at| at.elapsed() >= TELL_EVERY) {
            let message = "cut connections that neither read nor send, to make room for those that do";
            tracing::warn!(connections = told.0, "{message}");
            *told = (0, Some(Instant::now()));
        }
    }
}

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

    /// Metered bytes that are to be read at once for this connection: few at first, more as it takes them.
    pub fn piece(&self) -> usize {
        let part = self.connection.taken.load(Ordering::Relaxed) / PIECE_PART;
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
            let advance = connection.process.acquire(Kind::Advances, advance).await;
            let shared = connection.process.acquire(Kind::Bytes, shared).await;
            this.lent(Permits { own, advance, shared })
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
        let advance = process.advances.clone().try_acquire_many_owned(advance).ok()?;
        let shared = process.bytes.clone().try_acquire_many_owned(shared).ok()?;
        Some(self.lent(Permits { own: Some(own), advance: Some(advance), shared: Some(shared) }))
    }

    fn lent(&self, permits: Permits) -> Reservation {
        let bytes = permits.shared.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        self.lend(bytes, permits)
    }

    fn lend(&self, bytes: usize, permits: Permits) -> Reservation {
        self.connection.hold(bytes);
        self.connection.advanced.fetch_add(permits.advanced(), Ordering::Relaxed);
        Reservation { connection: self.connection.clone(), bytes, permits }
    }

    /// Permits of the connection, of what is lent beyond those, and of the process for so many bytes.
    fn permits(&self, bytes: usize) -> (u32, u32, u32) {
        let shared = u32::try_from(bytes.min(CONNECTION_BYTES)).unwrap_or(u32::MAX);
        let granted = u32::try_from(self.connection.granted.load(Ordering::Relaxed)).unwrap_or(u32::MAX);
        let own = shared.min(granted);
        (own, self.connection.process.advance(shared - own), shared)
    }

    /// Reads the next piece in room that is waited for. `read` gets the limit of a read, and is asked a second time when
    /// the first record alone is larger than the piece: nothing is kept while more room is waited for. Cancel safe.
    ///
    /// # Errors
    /// Those of `read`.
    pub async fn read<F>(&self, read: impl Fn(ReadLimit) -> F) -> Result<Delivery>
    where
        F: Future<Output = Result<Arc<RecordBatch>>>,
    {
        let piece = self.piece();
        let limit = ReadLimit { count: (piece / BYTES_PER_RECORD).clamp(1, BATCH_RECORDS_MAX), bytes: piece };
        let mut room = self.reserve(cost_of_read(limit)).await;
        let mut batch = read(limit).await?;
        let needed = cost(&batch.records);
        if needed > room.bytes() {
            drop((batch, room));
            room = self.reserve(needed).await;
            batch = read(ReadLimit::count(1)).await?;
        }
        room.shrink(cost(&batch.records));
        Ok(Delivery::new(batch, room))
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

    /// Room for so many bytes that are being received, `has` of which have some, if there is any at this moment; otherwise some
    /// is made for the next one. Little comes out of the whole, so that who sends much holds up no other.
    /// Nobody waits: what is not read fills the window that all streams of an HTTP/2 connection share, and those that have
    /// room then never get what is theirs.
    pub fn try_receive(&self, bytes: usize, has: usize) -> Option<Reservation> {
        let process = &self.connection.process;
        let bytes = bytes.min(process.limit / SHARE_PART);
        let large = bytes.saturating_sub(FIRST_BYTES) - has.min(bytes).saturating_sub(FIRST_BYTES);
        let [count, large] =
            [bytes - has.min(bytes), large].map(|count| u32::try_from(count).unwrap_or(u32::MAX));
        let own = self.connection.receives.clone().try_acquire_many_owned(count).ok()?;
        let rest = || {
            let advance = process.advances.clone().try_acquire_many_owned(large).ok()?;
            Some((advance, process.bytes.clone().try_acquire_many_owned(count).ok()?))
        };
        let Some((advance, shared)) = rest() else {
            process.relieve(Kind::Advances);
            process.relieve(Kind::Bytes);
            return None;
        };
        Some(self.lent(Permits { own: Some(own), advance: Some(advance), shared: Some(shared) }))
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

    /// A reservation again, of permits whose bytes count as held.
    fn retaken(&self, permits: Permits) -> Reservation {
        let bytes = permits.shared.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        Reservation { connection: self.connection.clone(), bytes, permits }
    }

    /// So many bytes were received.
    pub fn received(&self, bytes: usize) {
        let connection = &self.connection;
        connection.received.fetch_add(bytes as u64, Ordering::Relaxed);
        connection.may_have_moved();
    }

    /// The client may send so many bytes more, and up to `large` in room that is taken once they are not enough. Said again
    /// for every message where a library collects messages before we see any of them.
    pub fn allow(&self, bytes: usize, large: usize) {
        let before = std::mem::replace(&mut *lock(&self.connection.large), (large, Permits::default()));
        // What it holds counts as held until here.
        drop(self.retaken(before.1));
        self.connection.may_send.store(bytes as u64, Ordering::Relaxed);
    }

    /// Whether the client has sent more than it may.
    pub fn is_spent(&self) -> bool {
        self.connection.may_send.load(Ordering::Relaxed) == 0
    }

    /// The client has sent so many bytes. False if it may not, which it may not do again.
    pub fn spend(&self, bytes: usize) -> bool {
        let may_send = &self.connection.may_send;
        let left = may_send.load(Ordering::Relaxed);
        if left == UNLIMITED {
            return true;
        }
        let left = left.checked_sub(bytes as u64).or_else(|| self.begin_large(bytes));
        may_send.store(left.unwrap_or(0), Ordering::Relaxed);
        self.received(bytes);
        left.is_some()
    }

    /// So many of the bytes that the client has sent were none of its message.
    pub fn give_back(&self, bytes: usize) {
        let more = |left: u64| (left != UNLIMITED && left > 0).then(|| left.saturating_add(bytes as u64));
        // Nothing to give back where there is no limit, or where it is reached.
        let _ = self.connection.may_send.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
    }

    /// What may be sent after `bytes` of a large message, if there is room for one.
    fn begin_large(&self, bytes: usize) -> Option<u64> {
        let mut large = lock(&self.connection.large);
        let size = std::mem::take(&mut large.0);
        let left = size.checked_sub(bytes)?;
        large.1 = self.try_receive(size, 0)?.into_permits();
        Some(left as u64)
    }

    /// Keeps the room of what was received until the request is answered.
    pub fn keep(&self, room: Reservation) {
        lock(&self.request.received).push(room);
    }

    /// The request is answered.
    pub fn answered(&self) {
        lock(&self.request.received).clear();
    }

    /// So many bytes have gone to the client: as many more may wait for it.
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
    fn new() -> Arc<Self> {
        Arc::new(Self { waits: AtomicU64::new(NEVER), received: Mutex::default() })
    }
}

impl Connection {
    fn moved(&self) {
        self.moved_from.store(self.passed(), Ordering::Relaxed);
        self.moved_at.store(self.process.now(), Ordering::Relaxed);
    }

    /// Holds so many bytes more.
    fn hold(&self, bytes: usize) {
        if bytes > 0 {
            // First, or whoever looks for a connection to cut would see what is held and an old moment.
            if self.held.load(Ordering::Relaxed) == 0 {
                self.moved();
            }
            self.held.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// For how many milliseconds it has not moved; none while nothing waits for it.
    fn still(&self, now: u64) -> Option<u64> {
        let holds = self.held.load(Ordering::Relaxed) > 0;
        holds.then(|| now.saturating_sub(self.moved_at.load(Ordering::Relaxed)))
    }

    fn lent(&self, kind: Kind) -> usize {
        match kind {
            Kind::Bytes => self.held.load(Ordering::Relaxed),
            Kind::Advances => self.advanced.load(Ordering::Relaxed),
            Kind::Downloads => CONNECTION_DOWNLOADS.saturating_sub(self.downloads.available_permits()),
        }
    }

    /// Bytes both ways.
    fn passed(&self) -> u64 {
        self.taken.load(Ordering::Relaxed).saturating_add(self.received.load(Ordering::Relaxed))
    }

    fn may_have_moved(&self) {
        let held = self.held.load(Ordering::Relaxed);
        let since = self.passed().saturating_sub(self.moved_from.load(Ordering::Relaxed));
        if held > 0 && since >= held.div_ceil(MOVE_PART) as u64 {
            self.moved();
        }
    }

    /// The client has taken `taken` bytes, `before` of them before.
    fn took(&self, before: u64, taken: u64) {
        self.may_have_moved();
        let bytes = usize::try_from(taken - before).unwrap_or(usize::MAX);
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

impl Reservation {
    /// Bytes of it.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Gives back what is over `bytes`.
    pub fn shrink(&mut self, bytes: usize) {
        let bytes = bytes.min(self.bytes);
        self.connection.held.fetch_sub(self.bytes - bytes, Ordering::Relaxed);
        self.bytes = bytes;
        let advance = self.permits.advanced();
        let Permits { own, advance: lent, shared } = &mut self.permits;
        for permit in [own, lent, shared].into_iter().flatten() {
            drop(permit.split(permit.num_permits().saturating_sub(bytes)));
        }
        self.connection.advanced.fetch_sub(advance - self.permits.advanced(), Ordering::Relaxed);
    }

    /// The permits of what was received, which count as held until somebody takes that back.
    fn into_permits(mut self) -> Permits {
        self.bytes = 0;
        std::mem::take(&mut self.permits)
    }

    /// Room for what the server works on: nothing waits for the client until it [grows](Self::grow).
    #[must_use]
    pub fn at_work(mut self) -> Self {
        self.connection.held.fetch_sub(self.bytes, Ordering::Relaxed);
        self.bytes = 0;
        self
    }

    /// Waits until it is room for an answer of so many bytes. Of what the connection may have it takes what is free, and waits
    /// for nothing: others of the same connection, which have answers too, may wait likewise.
    pub async fn grow(&mut self, bytes: usize) {
        let wanted = (COPIES * bytes).min(self.connection.process.limit / SHARE_PART);
        let Some(shared) = &self.permits.shared else { return };
        let more = wanted.saturating_sub(shared.num_permits());
        if more > 0 {
            let free = more.min(self.connection.bytes.available_permits());
            let free = u32::try_from(free).unwrap_or(u32::MAX);
            let own = self.connection.bytes.clone().try_acquire_many_owned(free).ok();
            let more = u32::try_from(more).unwrap_or(u32::MAX);
            let process = &self.connection.process;
            let beyond = more - own.as_ref().map_or(0, |_| free);
            let advance = process.acquire(Kind::Advances, process.advance(beyond)).await;
            let shared = process.acquire(Kind::Bytes, more).await;
            self.absorb(Permits { own, advance, shared });
        }
        self.count();
    }

    /// Adds the room of another one of the same connection.
    pub fn merge(&mut self, mut other: Self) {
        self.absorb(other.take_permits());
        self.count();
    }

    fn take_permits(&mut self) -> Permits {
        self.connection.held.fetch_sub(std::mem::take(&mut self.bytes), Ordering::Relaxed);
        let permits = std::mem::take(&mut self.permits);
        self.connection.advanced.fetch_sub(permits.advanced(), Ordering::Relaxed);
        permits
    }

    fn absorb(&mut self, more: Permits) {
        self.connection.advanced.fetch_add(more.advanced(), Ordering::Relaxed);
        merge(&mut self.permits.own, more.own);
        merge(&mut self.permits.advance, more.advance);
        merge(&mut self.permits.shared, more.shared);
    }

    /// From now on all of it is held.
    fn count(&mut self) {
        let bytes = self.permits.shared.as_ref().map_or(self.bytes, OwnedSemaphorePermit::num_permits);
        self.connection.hold(bytes.saturating_sub(self.bytes));
        self.bytes = self.bytes.max(bytes);
    }

    /// Room for as many bytes more, as far as there is any: what is written may be longer than what was read.
    fn overdraw(&self, bytes: usize) -> Option<Self> {
        let more = u32::try_from(bytes.saturating_sub(self.bytes)).unwrap_or(u32::MAX);
        let permit = (more > 0 && self.permits.own.is_some())
            .then(|| self.connection.process.bytes.clone().try_acquire_many_owned(more).ok())??;
        let permits = Permits { shared: Some(permit), ..Permits::default() };
        let mut extra = Self { connection: self.connection.clone(), bytes: 0, permits };
        extra.count();
        Some(extra)
    }

    /// Bytes that keep what they need of this room until they are dropped.
    pub fn around(mut self, bytes: Bytes) -> Bytes {
        self.shrink(COPIES * bytes.len());
        let extra = self.overdraw(bytes.len());
        holding(bytes, (self, extra))
    }
}

fn merge(kept: &mut Option<OwnedSemaphorePermit>, more: Option<OwnedSemaphorePermit>) {
    match (kept, more) {
        (Some(kept), Some(more)) => kept.merge(more),
        (kept, more @ Some(_)) => *kept = more,
        (_, None) => {}
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        drop(self.take_permits());
    }
}

impl Permits {
    fn advanced(&self) -> usize {
        self.advance.as_ref().map_or(0, OwnedSemaphorePermit::num_permits)
    }
}

/// Records on their way to one client, and the room that they take until it has them.
#[derive(Clone, Debug)]
pub struct Delivery {
    batch: Arc<RecordBatch>,
    room: Arc<Reservation>,
}

impl Delivery {
    /// A batch in the room that was reserved for it.
    pub fn new(batch: Arc<RecordBatch>, room: Reservation) -> Self {
        Self { batch, room: Arc::new(room) }
    }

    /// The batch, which others may share.
    pub fn batch(&self) -> &Arc<RecordBatch> {
        &self.batch
    }

    /// The room.
    pub fn room(&self) -> Arc<Reservation> {
        self.room.clone()
    }

    /// Bytes made of these records, which keep the room until they are dropped.
    pub fn holding(&self, bytes: Bytes) -> Bytes {
        holding_room(bytes, self.room.clone())
    }
}

impl Deref for Delivery {
    type Target = RecordBatch;

    fn deref(&self) -> &RecordBatch {
        &self.batch
    }
}

/// Bytes that keep room which others may keep too.
pub fn holding_room(bytes: Bytes, room: Arc<Reservation>) -> Bytes {
    let extra = room.overdraw(bytes.len());
    holding(bytes, (room, extra))
}

/// Bytes that keep something until the last of them is dropped.
pub fn holding<T: Send + 'static>(bytes: Bytes, kept: T) -> Bytes {
    struct Holding<T>(Bytes, #[allow(dead_code, reason = "kept until it is dropped")] T);
    impl<T> AsRef<[u8]> for Holding<T> {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }
    Bytes::from_owner(Holding(bytes, kept))
}

/// The room that records take until their client has them.
pub fn cost(records: &[Record]) -> usize {
    let sizes = records.iter().map(|record| metered_size(&record.headers, &record.body));
    sizes.map(|size| COPIES * size + RECORD_BYTES).sum()
}

/// The room that a read takes at most, unless one record alone is larger.
pub fn cost_of_read(limit: ReadLimit) -> usize {
    COPIES * limit.bytes + RECORD_BYTES * limit.count
}

/// Marks an answer whose bytes hold the room that they take, so that nobody reserves it again.
#[derive(Clone, Copy, Debug)]
pub struct Reserved;

/// No guarded section leaves its value half changed, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for SendBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { limit, .. } = self;
        f.debug_struct("SendBudget").field("limit", limit).field("lent", &self.lent()).finish_non_exhaustive()
    }
}

impl fmt::Debug for ConnectionBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionBudget").field("held", &self.connection.held).finish_non_exhaustive()
    }
}

impl fmt::Debug for Reservation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Reservation").field(&self.bytes()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::future::FutureExt;

    #[tokio::test]
    async fn a_connection_has_little_and_gets_more_as_it_takes() {
        let budget = SendBudget::new(64 << 20, 1);
        let connection = budget.connection();
        assert_eq!(connection.piece(), FIRST_PIECE);
        let first = connection.try_reserve(FIRST_BYTES).expect("room");
        assert!(connection.try_reserve(CREDIT_BYTES + 1).is_none(), "more than it may have");
        assert!(connection.reserve(1).now_or_never().is_none(), "more than it may have");
        drop(first);
        connection.took(1 << 20);
        assert_eq!(connection.piece(), 256 << 10);
        let both = [connection.try_reserve(1 << 20), connection.try_reserve(FIRST_BYTES)];
        assert!(both.iter().all(Option::is_some), "as much as it has taken");
        assert_eq!(budget.lent(), (1 << 20) + FIRST_BYTES);
        drop(both);
        connection.took(1 << 30);
        assert_eq!(connection.piece(), METERED_MAX);
        assert_eq!(connection.try_reserve(usize::MAX).expect("room").bytes(), CONNECTION_BYTES);
        assert_eq!(budget.lent(), 0);
    }

    #[test]
    fn one_large_piece_is_lent_to_a_connection_that_has_nothing_else() {
        let budget = SendBudget::new(64 << 20, 1);
        let connection = budget.connection();
        let large = connection.try_reserve(2 << 20).expect("room");
        assert_eq!((large.bytes(), budget.lent()), (2 << 20, 2 << 20));
        assert!(connection.try_reserve(1).is_none(), "it has something");
        let rest = large.around(Bytes::from_static(b"x"));
        assert_eq!(budget.lent(), COPIES);
        let piece = rest.slice(..1);
        drop(rest);
        assert_eq!(budget.lent(), COPIES, "a part of it lives");
        drop(piece);
        assert_eq!(budget.lent(), 0);
    }

    #[test]
    fn what_is_written_longer_than_it_was_read_counts_too() {
        let budget = SendBudget::new(64 << 20, 1);
        let room = Arc::new(budget.connection().try_reserve(10).expect("room"));
        let bytes = holding_room(Bytes::from(vec![0; 1000]), room);
        assert_eq!(budget.lent(), 1000);
        drop(bytes);
        assert_eq!(budget.lent(), 0);
    }

    #[tokio::test]
    async fn when_all_is_lent_the_one_that_has_taken_nothing_for_longest_is_cut() {
        let budget = SendBudget::new(CONNECTION_BYTES, 1);
        let (oldest, old, reads) = (budget.connection(), budget.connection(), budget.connection());
        let part = CONNECTION_BYTES / 4;
        for connection in [&oldest, &old, &reads] {
            connection.took(2 * part);
        }
        let held = oldest.try_reserve(part).expect("room");
        sleep(Duration::from_millis(5)).await;
        let dripping = old.try_reserve(part).expect("room");
        let _read = reads.try_reserve(2 * part).expect("room");
        let live = budget.connection();
        live.took(2 * part);
        assert!(live.try_reserve(CREDIT_BYTES).is_some(), "a little is lent to one that takes everything");
        let reading = async {
            // The last one goes on reading, all that it holds in ten seconds. The younger one takes a byte now and then.
            loop {
                sleep(RELIEF_EVERY).await;
                reads.took(2 * part / 100);
                old.took(1);
            }
        };
        let waiting = async {
            tokio::select! {
                () = oldest.cut() => drop(held),
                () = old.cut() => panic!("the younger one was cut first"),
            }
            old.cut().await;
            drop(dripping);
        };
        let next = live.reserve(2 * part);
        tokio::select! {
            (room, ()) = futures_util::future::join(next, waiting) => assert_eq!(room.bytes(), 2 * part),
            () = reading => unreachable!("for ever"),
            () = reads.cut() => panic!("one that reads was cut"),
        }
    }

    #[test]
    fn who_has_taken_something_of_late_is_left_alone_however_much_it_holds() {
        let mut budget = SendBudget::new(CONNECTION_BYTES, 1);
        // Long ago, so that there is a moment which is out of patience.
        Arc::get_mut(&mut budget).expect("nobody else has it").began -= 2 * PATIENCE;
        let (still, reads) = (budget.connection(), budget.connection());
        let _held = still.try_reserve(1).expect("room");
        let _read = reads.try_reserve(CONNECTION_BYTES - 1).expect("room");
        still.connection.moved_at.store(0, Ordering::Relaxed);
        // Just now, however long this test is held up.
        reads.connection.moved_at.store(u64::MAX, Ordering::Relaxed);
        budget.relieve(Kind::Bytes);
        let is_cut = |budget: &ConnectionBudget| budget.connection.is_cut.load(Ordering::Relaxed);
        assert_eq!((is_cut(&still), is_cut(&reads)), (true, false));
    }

    #[tokio::test]
    async fn who_waits_for_much_does_not_hold_up_who_wants_little() {
        let budget = SendBudget::new(64 << 20, 1);
        let connections: Vec<_> = (0..9).map(|_| budget.connection()).collect();
        let mut large: Vec<_> =
            connections.iter().map(|connection| Box::pin(connection.reserve(CONNECTION_BYTES))).collect();
        let lent: Vec<_> = large.iter_mut().map(FutureExt::now_or_never).collect();
        assert_eq!(
            lent.iter().flatten().count(),
            8,
            "as many as fit into half of it, with what each has earned"
        );
        let little = budget.connection();
        assert!(little.reserve(FIRST_BYTES).now_or_never().is_some());
    }

    /// Lets so much time pass that whoever holds something and has not moved is stuck.
    async fn patience_ends() {
        sleep(PATIENCE + Duration::from_millis(50)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_server_works_on_is_not_stuck_before_its_answer_waits_for_the_client() {
        let budget = SendBudget::new(CONNECTION_BYTES, 1);
        let connection = budget.connection();
        let mut room = connection.try_reserve(FIRST_BYTES).expect("room").at_work();
        patience_ends().await;
        budget.relieve(Kind::Bytes);
        assert!(connection.cut().now_or_never().is_none(), "it is the server that takes its time");
        room.grow(1000).await;
        patience_ends().await;
        budget.relieve(Kind::Bytes);
        assert!(connection.cut().now_or_never().is_some(), "the client does not take the answer");
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_no_advance_is_not_cut_to_make_room_for_one() {
        let budget = SendBudget::new(CONNECTION_BYTES, 1);
        let [little, large] = [(); 2].map(|()| budget.connection());
        let _little = little.try_reserve(FIRST_BYTES).expect("room");
        sleep(Duration::from_millis(5)).await;
        let _large = large.try_reserve(CONNECTION_BYTES / 2).expect("room");
        patience_ends().await;
        budget.relieve(Kind::Advances);
        assert!(little.cut().now_or_never().is_none(), "it would free none");
        assert!(large.cut().now_or_never().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_download_of_which_nothing_is_counted_can_be_cut() {
        let budget = SendBudget::new(CONNECTION_BYTES, 1);
        let connection = budget.connection();
        let _place = connection.download().await.expect("a place");
        patience_ends().await;
        budget.relieve(Kind::Downloads);
        assert!(connection.cut().now_or_never().is_some());
    }

    #[test]
    fn pings_do_not_use_up_what_a_client_may_send() {
        let connection = SendBudget::new(64 << 20, 1).connection();
        connection.give_back(6);
        assert!(connection.spend(1 << 30), "nobody has set a limit");
        connection.allow(100, 0);
        for _ in 0..1000 {
            assert!(connection.spend(6));
            connection.give_back(6);
        }
        assert!(connection.spend(100) && connection.is_spent());
        connection.give_back(6);
        assert!(connection.is_spent() && !connection.spend(1), "what is over is over");
    }

    #[tokio::test]
    async fn what_is_lent_to_whom_nobody_polls_counts_as_held() {
        let budget = SendBudget::new(CONNECTION_BYTES, 1);
        let [first, stopped, third] = [(); 3].map(|()| budget.connection());
        let held = first.try_reserve(CONNECTION_BYTES).expect("room");
        let mut waiting = Box::pin(stopped.reserve(CONNECTION_BYTES));
        assert!(futures_util::poll!(&mut waiting).is_pending());
        drop(held);
        while budget.lent() == 0 || stopped.connection.held.load(Ordering::Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        let cut = async {
            stopped.cut().await;
            drop(waiting);
        };
        let both = futures_util::future::join(third.reserve(CONNECTION_BYTES), cut);
        let (room, ()) = tokio::time::timeout(Duration::from_secs(60), both).await.expect("room is made");
        assert_eq!(room.bytes(), CONNECTION_BYTES);
    }

    #[tokio::test]
    async fn a_download_that_does_not_move_makes_place_for_the_next() {
        let budget = SendBudget::new(CONNECTION_BYTES, 2 * CONNECTION_DOWNLOADS);
        let [stuck, moves, third] = [(); 3].map(|()| budget.connection());
        let mut places = Vec::new();
        for connection in [&stuck, &moves] {
            for _ in 0..CONNECTION_DOWNLOADS {
                places.push(connection.download().now_or_never().flatten().expect("a place"));
            }
            assert!(connection.download().now_or_never().is_none(), "more than one connection may have");
        }
        let _waits = [stuck.try_reserve(FIRST_BYTES), moves.try_reserve(FIRST_BYTES)].map(Option::unwrap);
        let rest = places.split_off(CONNECTION_DOWNLOADS);
        let reading = async {
            loop {
                sleep(RELIEF_EVERY).await;
                moves.took(FIRST_BYTES);
            }
        };
        let cut = async {
            tokio::select! {
                () = stuck.cut() => drop(places),
                () = moves.cut() => panic!("one that reads was cut"),
            }
        };
        tokio::select! {
            (place, ()) = futures_util::future::join(third.download(), cut) => assert!(place.is_some()),
            () = reading => unreachable!("for ever"),
        }
        drop(rest);
    }

    #[tokio::test]
    async fn an_answer_waits_for_the_room_of_its_whole_length() {
        let budget = SendBudget::new(CONNECTION_BYTES, 1);
        let (answered, other) = (budget.connection(), budget.connection());
        let mut room = answered.try_reserve(1).expect("room");
        let rest = other.try_reserve(CONNECTION_BYTES - 1).expect("room");
        assert!(room.grow(1000).now_or_never().is_none(), "there is no room");
        drop(rest);
        room.grow(1000).await;
        assert_eq!((room.bytes(), budget.lent()), (COPIES * 1000, COPIES * 1000));
    }

    #[test]
    fn what_is_given_up_counts_as_taken_no_further_than_something_was_sent() {
        let budget = SendBudget::new(64 << 20, 1);
        let connection = budget.connection();
        let room = |bytes: usize| connection.try_reserve(bytes).is_some();
        let _holds = connection.try_reserve(1).expect("room");
        connection.landed(1 << 20);
        assert!(!room(FIRST_BYTES), "nothing was sent");
        connection.sent(100);
        connection.landed(1);
        assert!(room(FIRST_BYTES + 99) && !room(FIRST_BYTES + 100));
        connection.sent(1 << 20);
        connection.landed(99);
        assert!(room(FIRST_BYTES + (1 << 20) + 99) && !room(FIRST_BYTES + (1 << 20) + 100));
    }

    #[tokio::test]
    async fn a_record_larger_than_the_piece_is_read_again_in_its_own_room() {
        let budget = SendBudget::new(64 << 20, 1);
        let connection = budget.connection();
        let batch = |size: usize| {
            let record = Record {
                position: crate::Position::default(),
                headers: Vec::new(),
                body: vec![b'x'; size].into(),
                metered_end: 0,
            };
            Arc::new(RecordBatch::new(vec![record], None))
        };
        let asked = Mutex::new(Vec::new());
        let read = |limit: ReadLimit| {
            lock(&asked).push((limit.count, budget.lent()));
            std::future::ready(Ok(batch(500_000)))
        };
        let delivery = connection.read(read).await.expect("reads");
        let needed = cost(&delivery.records);
        assert!(needed > 1_000_000);
        assert_eq!(*lock(&asked), [(64, 2 * FIRST_PIECE + 64 * RECORD_BYTES), (1, needed)]);
        drop(delivery);
        assert_eq!(budget.lent(), 0);
    }
}
