//! One term of a leader: from the moment it holds the slot until it loses it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::batch::{Batch, Cut};
use super::confirm::Tracker;
use super::decode::{Change, DecodeError, Decoder};
use super::flush::{Flusher, Pace};
use super::postgres::{Lsn, Postgres};
use super::wal::{WalError, WalEvent, WalSource};
use crate::config::ReplicationConfig;
use crate::domain::{Clock, SystemClock};
use crate::telemetry::Event;

/// How often the leader looks how much WAL its slot holds.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long a leader that stops waits for its flushes.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// What the leader's own messages in the WAL are called.
const HEARTBEAT: &str = "sessiond.heartbeat";

/// Why a term is over.
#[derive(Debug, thiserror::Error)]
pub(super) enum TermEnd {
    /// The server stops.
    #[error("the server stops")]
    Stopped,
    /// The connection is gone, or the slot.
    #[error("the stream of changes broke")]
    Wal(#[from] WalError),
    /// We cannot read what Postgres sends.
    #[error("the stream of changes cannot be read")]
    Decode(#[from] DecodeError),
    /// Not even our own heartbeat has come back.
    #[error("nothing was heard for {0:?}")]
    Silence(Duration),
    /// Every session was removed at once, which no row tells.
    #[error("the table was truncated")]
    Truncated,
    /// ClickHouse is away, and the slot holds more than it may.
    #[error("the slot holds {0} bytes of WAL, which is more than replication.max_wal")]
    TooMuchWal(u64),
}

/// What a term works with.
pub(super) struct Term {
    pub(super) source: Box<dyn WalSource>,
    pub(super) flusher: Flusher,
    pub(super) config: ReplicationConfig,
    pub(super) epoch: u8,
    /// Who leads, for people.
    pub(super) name: String,
}

/// A task that ends with its owner.
struct Owned(AbortHandle);

impl Owned {
    fn spawn(work: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(work).abort_handle())
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Stored {
    flush: u64,
    bytes: usize,
    committed_at: Option<i64>,
}

struct Stream {
    source: Box<dyn WalSource>,
    flusher: Flusher,
    config: ReplicationConfig,
    pace: Arc<Pace>,
    decoder: Decoder,
    batch: Batch,
    tracker: Tracker,
    flights: JoinSet<Stored>,
    in_flight: usize,
    next_flush: Instant,
    heard: Instant,
    reached: watch::Sender<Lsn>,
}

impl Term {
    /// Streams until something ends it. The source is released in order if the server stops.
    pub(super) async fn run(self, stop: &CancellationToken) -> TermEnd {
        let Self { source, flusher, config, epoch, name } = self;
        let postgres = flusher.postgres.clone();
        let (reached, reached_rx) = watch::channel(Lsn::default());
        let (published_tx, mut published) = watch::channel(Lsn::default());
        let publish = publish(postgres.clone(), config.slot.clone(), epoch, name, reached_rx, published_tx);
        let _publisher = Owned::spawn(publish);
        let _heart = Owned::spawn(beat(postgres, config.heartbeat));
        let mut stream = Stream {
            source,
            pace: flusher.pace.clone(),
            flusher,
            decoder: Decoder::default(),
            batch: Batch::new(epoch),
            tracker: Tracker::default(),
            flights: JoinSet::new(),
            in_flight: 0,
            next_flush: Instant::now(),
            heard: Instant::now(),
            reached,
            config,
        };
        let end = stream.run(stop, &mut published).await;
        if matches!(end, TermEnd::Stopped) {
            stream.drain(&mut published).await;
            stream.source.stop().await;
        }
        end
    }
}

impl Stream {
    async fn run(&mut self, stop: &CancellationToken, published: &mut watch::Receiver<Lsn>) -> TermEnd {
        let mut look = interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.flush_if_due();
            let silent_at = self.heard + self.config.leader_timeout;
            let may_read = self.may_read();
            tokio::select! {
                biased;
                () = stop.cancelled() => return TermEnd::Stopped,
                Some(stored) = self.flights.join_next() => match stored {
                    Ok(stored) => self.stored(&stored),
                    // Only an abort or a panic ends a flush otherwise; the next term begins at what is confirmed.
                    Err(error) => {
                        tracing::error!(%error, "a flush ended without an answer");
                        return WalError::Closed.into();
                    }
                },
                Ok(()) = published.changed() => self.source.confirm(*published.borrow_and_update()),
                () = sleep_until(self.next_flush), if self.waits_for_pause() => {}
                _ = look.tick() => {
                    if let Some(end) = self.look().await {
                        return end;
                    }
                }
                event = self.source.next(), if may_read => {
                    self.heard = Instant::now();
                    if let Err(end) = event.map_err(TermEnd::from).and_then(|event| self.take(event)) {
                        return end;
                    }
                }
                () = sleep_until(silent_at), if may_read => {
                    return TermEnd::Silence(self.config.leader_timeout);
                }
            }
            if !may_read {
                self.heard = Instant::now();
            }
        }
    }

    fn take(&mut self, event: WalEvent) -> Result<(), TermEnd> {
        let free = match event {
            WalEvent::Begin(commit) => {
                self.batch.begin(commit);
                None
            }
            WalEvent::Change(message) => match self.decoder.change(&message)? {
                Change::Nothing => None,
                Change::Truncate => return Err(TermEnd::Truncated),
                change => {
                    let deleted = matches!(change, Change::Delete(_));
                    self.flusher.metrics.event(if deleted { Event::Delete } else { Event::Upsert });
                    self.batch.take(change)?;
                    None
                }
            },
            WalEvent::Commit(end, at) => self.batch.commit(end, at),
            WalEvent::Idle(_) if self.batch.is_open() => None,
            WalEvent::Idle(place) => self.batch.idle(place),
        };
        if let Some(place) = free.and_then(|place| self.tracker.idle(place)) {
            self.reach(place);
        }
        Ok(())
    }

    fn stored(&mut self, stored: &Stored) {
        self.in_flight -= stored.bytes;
        if let Some(at) = stored.committed_at {
            let lag = SystemClock.now().millis().saturating_sub(at);
            self.flusher.metrics.lag(Duration::from_millis(u64::try_from(lag).unwrap_or_default()));
        }
        if let Some(place) = self.tracker.done(stored.flush) {
            self.reach(place);
        }
    }

    /// Everything up to `place` is stored.
    fn reach(&self, place: Lsn) {
        self.reached.send_if_modified(|reached| {
            let further = place > *reached;
            *reached = place.max(*reached);
            further
        });
    }

    fn is_full(&self) -> bool {
        self.batch.len() >= self.config.batch_rows || self.batch.bytes() >= self.config.batch_bytes
    }

    fn may_read(&self) -> bool {
        !self.is_full() && self.in_flight + self.batch.bytes() < self.config.memory
    }

    /// A full batch goes as soon as there is room; any other one when nothing is under way.
    fn may_flush(&self) -> bool {
        let room = if self.is_full() && !self.batch.is_in_order() { self.config.concurrency } else { 1 };
        !self.batch.is_empty() && self.flights.len() < room
    }

    fn waits_for_pause(&self) -> bool {
        self.may_flush() && !self.is_full()
    }

    fn flush_if_due(&mut self) {
        let now = Instant::now();
        if !self.may_flush() || (now < self.next_flush && !self.is_full()) {
            return;
        }
        self.next_flush = now + self.pace.pause();
        let cut = self.batch.cut();
        self.flush(cut);
    }

    fn flush(&mut self, cut: Cut) {
        let flush = self.tracker.begin(cut.reached);
        if cfg!(feature = "sabotage")
            && let Some(place) = self.tracker.done(flush)
        {
            self.reach(place);
        }
        let (bytes, committed_at) = (cut.bytes, cut.committed_at);
        self.in_flight += bytes;
        let flusher = self.flusher.clone();
        self.flights.spawn(async move {
            flusher.store(cut).await;
            Stored { flush, bytes, committed_at }
        });
    }

    /// Whether the slot holds more than it may while ClickHouse is away.
    async fn look(&self) -> Option<TermEnd> {
        let slot = timeout(LOOK_EVERY, self.flusher.postgres.slot(&self.config.slot)).await.ok()?.ok()??;
        self.flusher.metrics.retained(slot.retained);
        self.pace.failing()?;
        (slot.retained > self.config.max_wal).then_some(TermEnd::TooMuchWal(slot.retained))
    }

    /// Stores what has been read, and confirms it.
    async fn drain(&mut self, published: &mut watch::Receiver<Lsn>) {
        let work = async {
            if !self.batch.is_empty() {
                let cut = self.batch.cut();
                self.flush(cut);
            }
            while let Some(stored) = self.flights.join_next().await {
                if let Ok(stored) = stored {
                    self.stored(&stored);
                }
            }
            let last = *self.reached.borrow();
            if published.wait_for(|place| *place >= last).await.is_ok() {
                self.source.confirm(last);
            }
        };
        if timeout(DRAIN_TIMEOUT, work).await.is_err() {
            tracing::warn!(
                "stopping before everything that was read is in ClickHouse; another replica will read it again"
            );
        }
    }
}

/// Tells every replica how far we are; only then may Postgres forget it.
async fn publish(
    postgres: Postgres,
    slot: String,
    epoch: u8,
    name: String,
    mut reached: watch::Receiver<Lsn>,
    published: watch::Sender<Lsn>,
) {
    while reached.changed().await.is_ok() {
        let place = *reached.borrow_and_update();
        while let Err(error) = postgres.publish(&slot, epoch, place, &name).await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "cannot publish how far the replication is"
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        if published.send(place).is_err() {
            return;
        }
    }
}

/// Tells an idle database from a dead connection.
async fn beat(postgres: Postgres, every: Duration) {
    let mut beat = interval(every);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        beat.tick().await;
        if let Err(error) = postgres.emit(HEARTBEAT).await {
            tracing::debug!(%error, "no heartbeat");
        }
    }
}
