//! What waits for clients to read it, and what they have sent and is not answered: bounded in bytes, for each connection and
//! over all.
//!
//! Whoever reads records, or anything else of size, for a client reserves their room first and keeps it until the client
//! has them, so a client that does not read costs what it was lent and no more; and likewise whoever reads a body, until it
//! is answered. When everything is lent the connection that has moved nothing for the longest time is cut, so that the others
//! go on.

mod connection;
mod delivery;
mod receiving;
mod reservation;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep};

pub use self::delivery::{Delivery, cost, cost_of_read};
pub use self::reservation::{holding, holding_room};

/// Most bytes that may wait for one connection.
pub const CONNECTION_BYTES: usize = 4 << 20;
/// Bytes that may wait for a connection that has taken nothing yet, the first piece and what is said around it; as many more as
/// it earns are added.
const FIRST_BYTES: usize = 48 << 10;
/// So much the kernels on both sides take of what no client reads, so it earns nothing.
const UNREAD_BYTES: u64 = 256 << 10;
/// Largest budget.
pub const BUDGET_MAX: usize = u32::MAX as usize;
/// What is lent to a connection that has taken everything when there is no room.
const CREDIT_BYTES: usize = 8 << 10;
/// Metered bytes of the first piece that is read for a connection.
const FIRST_PIECE: usize = 16 << 10;
/// A piece is this part of what the connection has earned so far.
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
/// One answer, or all that one connection sends at once, takes this part of the whole at most.
const SHARE_PART: usize = 4;
/// This part of the whole may be lent to connections beyond what they have earned, and to large bodies. With it and their first
/// bytes 2000 connections that take nothing leave a twelfth of the default to those that do.
const ADVANCE_PART: usize = 2;
/// An advance of more is a large one. Those have so many quarters of what may be advanced, and a queue of their own: who
/// wants little does not wait behind them.
const LARGE_ADVANCE: usize = 256 << 10;
const LARGE_QUARTERS: usize = 3;
/// Downloads that one connection may have at once. A reverse proxy has those of many clients.
const CONNECTION_DOWNLOADS: usize = 16;

/// What may wait for all clients together: bytes, and blobs that are open while they are sent.
pub struct SendBudget {
    bytes: Pool,
    /// Parts of the bytes, for what connections are lent beyond what they have earned, and for bodies: [large](LARGE_ADVANCE)
    /// advances come out of one of their own, so that whoever waits for much does not hold up those that want little.
    advances: Pool,
    large_advances: Pool,
    downloads: Pool,
    began: Instant,
    connections: Mutex<HashMap<u64, Weak<Connection>>>,
    next: AtomicU64,
    /// Connections that were cut and not told yet, and when the last were.
    told: Mutex<(usize, Option<Instant>)>,
}

/// What is lent of one kind.
struct Pool {
    free: Arc<Semaphore>,
    limit: usize,
    /// When room was last made.
    relieved_at: Mutex<Option<Instant>>,
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
    /// Bytes of advances out of either part.
    advanced: AtomicUsize,
    advanced_large: AtomicUsize,
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
    large_advance: Option<OwnedSemaphorePermit>,
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
    LargeAdvances,
    Downloads,
}

impl SendBudget {
    /// A budget of so many bytes, at least [`CONNECTION_BYTES`] and at most [`BUDGET_MAX`], and of so many downloads.
    pub fn new(limit: usize, downloads: usize) -> Arc<Self> {
        let limit = limit.clamp(CONNECTION_BYTES, BUDGET_MAX);
        let advances = limit / ADVANCE_PART;
        let large = advances / 4 * LARGE_QUARTERS;
        Arc::new(Self {
            bytes: Pool::new(limit),
            advances: Pool::new(advances - large),
            large_advances: Pool::new(large),
            downloads: Pool::new(downloads.clamp(1, Semaphore::MAX_PERMITS)),
            began: Instant::now(),
            connections: Mutex::default(),
            next: AtomicU64::new(0),
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
            advanced_large: AtomicUsize::new(0),
            receives: Arc::new(Semaphore::new(self.share())),
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
        self.bytes.limit.saturating_sub(self.bytes.free.available_permits())
    }

    /// The most that one answer takes, or all that one connection sends at once.
    fn share(&self) -> usize {
        self.bytes.limit / SHARE_PART
    }

    fn pool(&self, kind: Kind) -> &Pool {
        match kind {
            Kind::Bytes => &self.bytes,
            Kind::Advances => &self.advances,
            Kind::LargeAdvances => &self.large_advances,
            Kind::Downloads => &self.downloads,
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// As much of so many bytes as may be lent at once beyond what a connection has earned.
    fn advance(&self, bytes: u32) -> u32 {
        bytes.min(u32::try_from(self.large_advances.limit).unwrap_or(u32::MAX))
    }

    /// Waits for an advance, which is no more than [`Self::advance`] allows.
    async fn acquire_advance(&self, bytes: u32) -> Permits {
        if let Some(free) = self.try_acquire_advance(bytes) {
            return free;
        }
        let mut permits = Permits::default();
        match is_large(bytes) {
            true => permits.large_advance = self.acquire(Kind::LargeAdvances, bytes).await,
            false => permits.advance = self.acquire(Kind::Advances, bytes).await,
        }
        permits
    }

    /// A small one may come out of the part for large ones.
    fn try_acquire_advance(&self, bytes: u32) -> Option<Permits> {
        let advance = if is_large(bytes) { None } else { self.advances.take(bytes) };
        let large_advance = if advance.is_some() { None } else { Some(self.large_advances.take(bytes)?) };
        Some(Permits { advance, large_advance, ..Permits::default() })
    }

    /// Waits for so many, and makes room while it does.
    async fn acquire(&self, kind: Kind, count: u32) -> Option<OwnedSemaphorePermit> {
        let pool = self.pool(kind);
        if let Some(permit) = pool.take(count) {
            return Some(permit);
        }
        let mut acquired = pin!(pool.free.clone().acquire_many_owned(count));
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
        let pool = self.pool(kind);
        let mut relieved_at = lock(&pool.relieved_at);
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
        let (mut freed, mut cut) = (0, 0);
        for (_, lent, connection) in stuck {
            if freed >= pool.limit.div_ceil(RELIEF_PART) {
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

/// Marks an answer whose bytes hold the room that they take, so that nobody reserves it again.
#[derive(Clone, Copy, Debug)]
pub struct Reserved;

fn is_large(advance: u32) -> bool {
    advance as usize > LARGE_ADVANCE
}

impl Pool {
    fn new(limit: usize) -> Self {
        Self { free: Arc::new(Semaphore::new(limit)), limit, relieved_at: Mutex::default() }
    }

    /// So many, if they are free at this moment.
    fn take(&self, count: u32) -> Option<OwnedSemaphorePermit> {
        self.free.clone().try_acquire_many_owned(count).ok()
    }
}

/// No guarded section leaves its value half changed, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for SendBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendBudget")
            .field("limit", &self.bytes.limit)
            .field("lent", &self.lent())
            .finish_non_exhaustive()
    }
}
