//! The embedded log: every channel of this machine in one fjall database, written by one thread.
//!
//! Start at `writer`: it turns queued requests into groups (`group`), each one commit and one sync. Reads see
//! what is committed (`store`); followers share a live window ([`live`](super::live)); `sweep` forgets.
//! Knows no session rows: what is closed is what was sealed here.

mod codec;
mod follow;
mod group;
mod queue;
mod space;
mod state;
mod store;
mod sweep;
mod writer;

use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::{BoxFuture, FutureExt};
use futures_util::stream::BoxStream;
use quick_cache::sync::Cache;
use tokio::sync::{Semaphore, oneshot};
use tokio_util::task::AbortOnDropHandle;

use self::queue::{Append, Queue, Request, gone};
use self::space::Space;
use self::state::Memory;
pub use self::store::OpenError;
use self::store::Store;
use self::sweep::Wake;
use super::live::Live;
use super::observer::{CommitStats, LogObserver};
use sessiond_domain::port::{Condition, Followed};
use sessiond_domain::record::{Bounds, ReadLimit};
use sessiond_domain::{
    AppendAck, AppendInput, Background, ChannelKey, ChannelStore, Clock, Close, Closure, ConnectionBudget,
    Error, ReadStart, RecordBatch, Result, SessionId,
};

/// Reads that may wait for the disk at one time.
const READERS: usize = 16;
/// Channels whose bounds are known without a read.
const KNOWN_TAILS: usize = 16_384;

/// How the log is kept.
#[derive(Clone)]
pub struct LogOptions {
    /// Records older than this are trimmed; `None` keeps them.
    pub retention: Option<Duration>,
    /// How often what may be forgotten is looked for. Trimmed records are removed at once.
    pub sweep_every: Duration,
    /// Bytes of the disk that appends leave free; `None` for what suits its size.
    pub disk_reserve: Option<u64>,
    /// Who is told what the log does.
    pub observer: Arc<dyn LogObserver>,
    /// Who is told when a thread of the log fails.
    pub background: Arc<Background>,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self {
            retention: None,
            sweep_every: Duration::from_secs(300),
            disk_reserve: None,
            observer: Arc::new(()),
            background: Arc::default(),
        }
    }
}

impl fmt::Debug for LogOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { retention, sweep_every, disk_reserve, .. } = self;
        f.debug_struct("LogOptions")
            .field("retention", retention)
            .field("sweep_every", sweep_every)
            .field("disk_reserve", disk_reserve)
            .finish_non_exhaustive()
    }
}

/// What the writer, the sweeper, readers and followers share.
struct Shared {
    store: Store,
    space: Space,
    live: Arc<Live>,
    queue: Queue,
    /// Set by a failed write and never cleared: what the disk then holds is known only after a restart.
    poisoned: AtomicBool,
    /// Written by the writer alone, after the commit and before the ack.
    tails: Cache<ChannelKey, Bounds>,
    clock: Arc<dyn Clock>,
    observer: Arc<dyn LogObserver>,
    background: Arc<Background>,
    readers: Arc<Semaphore>,
    sweeper: mpsc::Sender<Wake>,
    sweeper_woken: AtomicBool,
}

impl Shared {
    fn wake_sweeper(&self) {
        if !self.sweeper_woken.swap(true, Ordering::SeqCst) {
            let _ = self.sweeper.send(Wake::Trimmed);
        }
    }

    fn sweep_woken(&self) {
        self.sweeper_woken.store(false, Ordering::SeqCst);
    }

    /// Takes no writes any more.
    fn poison(&self, error: &dyn fmt::Display) {
        if !self.poisoned.swap(true, Ordering::SeqCst) {
            self.observer.poisoned();
            tracing::error!(error = %error, "the log could not be written and takes no appends until a restart");
        }
    }

    /// Looks at what appends need. The engine's own threads may have failed since the last one, and then it says so only
    /// when it is asked.
    fn look(&self) -> Result<()> {
        let full = self.space.look();
        self.store.db.persist(fjall::PersistMode::Buffer).map_err(|error| {
            self.poison(&error);
            store::fault(error)
        })?;
        if full { Err(gone()) } else { Ok(()) }
    }

    /// Runs a read where it may wait for the disk.
    async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        read: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (shared, readers) = (self.clone(), self.readers.clone());
        let begin = |permit| {
            tokio::task::spawn_blocking(move || {
                let _permit = permit;
                read(&shared)
            })
        };
        if let Ok(permit) = readers.clone().try_acquire_owned() {
            return begin(permit).await.map_err(|cut| Error::interrupted(&cut))?;
        }
        // In a task of its own: whoever polls this may stop for as long as a client likes not to read, and must not have the
        // turn meanwhile.
        let turn = async move {
            let permit = readers.acquire_owned().await.map_err(Error::internal)?;
            begin(permit).await.map_err(|cut| Error::interrupted(&cut))?
        };
        AbortOnDropHandle::new(tokio::spawn(turn)).await.map_err(|cut| Error::interrupted(&cut))?
    }

    async fn read(
        self: &Arc<Self>,
        key: &ChannelKey,
        start: ReadStart,
        limit: ReadLimit,
    ) -> Result<RecordBatch> {
        if let Some(Bounds { tail, .. }) = self.tails.get(key) {
            let at_tail = match start {
                ReadStart::SeqNum(seq_num) => seq_num >= tail.seq_num,
                ReadStart::TailOffset(offset) => offset == 0,
                ReadStart::Timestamp(at) => at > tail.timestamp,
            };
            if at_tail {
                return Ok(RecordBatch::new(Vec::new(), Some(tail)));
            }
        }
        self.read_stored(key, start, limit).await
    }

    /// Reads the store whatever the last known tail was, which may for a moment be behind it.
    async fn read_stored(
        self: &Arc<Self>,
        key: &ChannelKey,
        start: ReadStart,
        limit: ReadLimit,
    ) -> Result<RecordBatch> {
        let key = key.clone();
        self.blocking(move |shared| shared.store.view().read(&key, start, limit)).await
    }
}

/// The log of one folder, which no other process can have open.
pub struct LogChannels {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl LogChannels {
    /// Files that a log has open at most.
    pub const FILES: u64 = store::FILES;

    /// Opens the log in `dir`, making it if there is none.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(
        dir: impl AsRef<Path>,
        options: LogOptions,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, OpenError> {
        let dir = dir.as_ref();
        let store = Store::open(dir)?;
        let corrupt = |error| OpenError::Corrupt { path: dir.to_owned(), source: Box::new(error) };
        let memory = Memory::new(store.next_number().map_err(corrupt)?);
        let (sweeper, wake) = mpsc::channel();
        let shared = Arc::new(Shared {
            space: Space::new(dir, options.disk_reserve),
            store,
            live: Arc::default(),
            queue: Queue::default(),
            poisoned: AtomicBool::new(false),
            tails: Cache::new(KNOWN_TAILS),
            clock,
            observer: options.observer.clone(),
            background: options.background.clone(),
            readers: Arc::new(Semaphore::new(READERS)),
            sweeper,
            sweeper_woken: AtomicBool::new(false),
        });
        let log = Self { shared: shared.clone(), threads: Mutex::default() };
        let io = |source| OpenError::Io { path: dir.to_owned(), source };
        let writer = {
            let shared = shared.clone();
            Builder::new()
                .name("log-writer".into())
                .spawn(move || writer::run(&shared, memory))
                .map_err(io)?
        };
        log.threads().push(writer);
        let sweeper = Builder::new().name("log-sweeper".into());
        log.threads().push(sweeper.spawn(move || sweep::run(&shared, &options, &wake)).map_err(io)?);
        Ok(log)
    }

    /// The log's own id, made once.
    pub fn log_id(&self) -> &str {
        &self.shared.store.log_id
    }

    /// Forgets now whatever may be forgotten, rather than at the next turn.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when the log does not write.
    pub async fn sweep(&self) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        self.shared.sweeper.send(Wake::Now(reply)).map_err(|_| gone())?;
        answer.await.unwrap_or_else(|_| Err(gone()))
    }

    /// Refuses further appends, commits those that wait, and ends the threads. Blocks for as long as that takes.
    pub fn close(&self) {
        self.shared.queue.close();
        let _ = self.shared.sweeper.send(Wake::Stop);
        for thread in self.threads().drain(..) {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }

    /// Channels that have followers.
    pub fn followed_channels(&self) -> usize {
        self.shared.live.len()
    }

    fn threads(&self) -> std::sync::MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self) -> Result<()> {
        if self.shared.poisoned.load(Ordering::SeqCst) { Err(gone()) } else { Ok(()) }
    }
}

impl Drop for LogChannels {
    fn drop(&mut self) {
        self.close();
    }
}

impl fmt::Debug for LogChannels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogChannels").field("log_id", &self.log_id()).finish_non_exhaustive()
    }
}

#[async_trait]
impl ChannelStore for LogChannels {
    fn append(&self, key: &ChannelKey, input: AppendInput) -> BoxFuture<'static, Result<AppendAck>> {
        let (reply, answer) = oneshot::channel();
        let queued = self
            .check()
            .and_then(|()| Append::prepare(input))
            .and_then(|append| self.shared.queue.push(Request::Append { key: key.clone(), append, reply }));
        async move {
            queued?;
            answer.await.unwrap_or_else(|_| Err(gone()))
        }
        .boxed()
    }

    async fn bounds(&self, key: &ChannelKey) -> Result<Bounds> {
        if let Some(bounds) = self.shared.tails.get(key) {
            return Ok(bounds);
        }
        let key = key.clone();
        self.shared.blocking(move |shared| shared.store.view().bounds(&key)).await
    }

    async fn read(&self, key: &ChannelKey, start: ReadStart, limit: ReadLimit) -> Result<Arc<RecordBatch>> {
        self.shared.read(key, start, limit).await.map(Arc::new)
    }

    async fn follow(
        &self,
        key: &ChannelKey,
        start: ReadStart,
        budget: &ConnectionBudget,
    ) -> Result<BoxStream<'static, Result<Followed>>> {
        follow::follow(self.shared.clone(), key.clone(), start, budget.clone()).await
    }

    async fn seal(&self, session: &SessionId, close: Close) -> Result<Closure> {
        self.check()?;
        let (reply, answer) = oneshot::channel();
        self.shared.queue.push(Request::Seal { session: session.clone(), close, reply })?;
        answer.await.unwrap_or_else(|_| Err(gone()))
    }

    async fn settle(&self, session: &SessionId) -> Result<()> {
        self.check()?;
        let (reply, answer) = oneshot::channel();
        self.shared.queue.push(Request::Settle { session: session.clone(), reply })?;
        answer.await.unwrap_or_else(|_| Err(gone()))
    }

    async fn unsettled(&self) -> Result<Vec<(SessionId, Closure)>> {
        self.shared.blocking(|shared| shared.store.unsettled()).await
    }

    async fn ping(&self) -> Result<()> {
        self.check()?;
        self.shared.blocking(Shared::look).await
    }

    fn condition(&self) -> Condition {
        if self.check().is_err() {
            Condition::Broken
        } else if self.shared.space.is_full() {
            Condition::Full
        } else {
            Condition::Sound
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sessiond_domain::{Direction, NewRecord, SystemClock};

    #[tokio::test]
    async fn a_poisoned_log_refuses_every_write_at_once_and_still_reads() {
        let folder = tempfile::tempdir().expect("a folder");
        let log =
            LogChannels::open(folder.path(), LogOptions::default(), Arc::new(SystemClock)).expect("opens");
        let key = ChannelKey::main(SessionId::from_stored("session_a"), Direction::In);
        let input = || AppendInput::one(NewRecord::data("a")).expect("fits");
        log.append(&key, input()).await.expect("appends");
        log.shared.poisoned.store(true, Ordering::SeqCst);
        let closure = Closure { at: SystemClock.now(), reason: None };
        for refused in [
            log.append(&key, input()).await.map(drop),
            log.seal(&key.session, closure.into()).await.map(drop),
            log.settle(&key.session).await,
            log.ping().await,
        ] {
            assert!(matches!(refused, Err(Error::Unavailable { what: "log", .. })), "{refused:?}");
        }
        assert_eq!(log.condition(), Condition::Broken);
        let read = log.read(&key, ReadStart::SeqNum(0), ReadLimit::BATCH).await.expect("reads");
        assert_eq!(read.records.len(), 1);
    }

    #[tokio::test]
    async fn a_read_that_nobody_polls_keeps_no_turn_of_others() {
        let folder = tempfile::tempdir().expect("a folder");
        let log =
            LogChannels::open(folder.path(), LogOptions::default(), Arc::new(SystemClock)).expect("opens");
        let key = ChannelKey::main(SessionId::from_stored("session_a"), Direction::In);
        log.append(&key, AppendInput::one(NewRecord::data("a")).expect("fits")).await.expect("appends");
        let read = || log.read(&key, ReadStart::SeqNum(0), ReadLimit::BATCH);
        let turns = log.shared.readers.clone().acquire_many_owned(READERS as u32).await.expect("all turns");
        let mut waiting: Vec<_> = (0..2 * READERS).map(|_| read()).collect();
        for read in &mut waiting {
            assert!(futures_util::poll!(read).is_pending());
        }
        drop(turns);
        let mine = tokio::time::timeout(Duration::from_secs(60), read()).await.expect("a turn");
        assert_eq!(mine.expect("reads").records.len(), 1);
        drop(waiting);
    }

    #[tokio::test]
    async fn a_full_disk_refuses_appends_and_nothing_else_until_there_is_room() {
        let folder = tempfile::tempdir().expect("a folder");
        let log =
            LogChannels::open(folder.path(), LogOptions::default(), Arc::new(SystemClock)).expect("opens");
        let key = ChannelKey::main(SessionId::from_stored("session_a"), Direction::In);
        let input = || AppendInput::one(NewRecord::data("a")).expect("fits");
        assert_eq!(log.condition(), Condition::Sound);
        log.shared.space.keep_free(u64::MAX);
        for refused in [log.append(&key, input()).await.map(drop), log.ping().await] {
            assert!(matches!(refused, Err(Error::Unavailable { what: "log", .. })), "{refused:?}");
        }
        assert_eq!(log.condition(), Condition::Full);
        let other = SessionId::from_stored("session_b");
        log.seal(&other, Closure { at: SystemClock.now(), reason: None }.into()).await.expect("sealed");
        log.settle(&other).await.expect("settled");
        log.sweep().await.expect("swept");
        log.shared.space.keep_free(0);
        // Whoever asks whether it is ready finds out, though no append is tried.
        log.ping().await.expect("answers");
        assert_eq!(log.condition(), Condition::Sound);
        assert_eq!(log.append(&key, input()).await.expect("appends").start.seq_num, 0);
    }
}
