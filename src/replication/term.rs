//! [`Term`]: reads a slot from the moment when it is held to the moment when it is lost, and stores what it tells.
//!
//! Nothing is confirmed that is not stored. So whatever ends a term, a kill included, the next one is told of it again, and stores
//! the same rows under the same versions.

use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::batch::{Batch, BatchError, Batcher, Truncation};
use super::flush::Flusher;
use super::pgoutput::{Change, DecodeError, Decoder};
use super::progress::{Progress, Ticket};
use super::row::COLUMNS;
use super::slot::{self, SlotError};
use super::source::{SourceError, WalEvent, WalSource};
use super::{Context, DEAD_LETTERS, DEAD_LETTERS_HINDRANCE, Epoch, HINDRANCE, Lsn, NAME, STALLED, surely};
use crate::domain::{Error, Ticker};
use crate::store::index::clickhouse::is_migrated;
use crate::store::metadata::Beat;
use crate::telemetry::ReplicationEvent;

/// How many times as large as a full batch one becomes while there is no place for another on its way: ClickHouse stores few large
/// inserts sooner than many small ones.
const GROWTH: usize = 8;
/// Longest that it is waited for what the server says of a stream that is silent.
const INQUIRY: Duration = Duration::from_secs(5);

/// How a slot is read.
#[derive(Clone, Debug)]
pub struct TermOptions {
    /// The slot.
    pub slot: String,
    /// What the leader is called in the table `replication`.
    pub name: String,
    /// Rows of a full batch.
    pub flush_rows: usize,
    /// Bytes of a full batch, roughly.
    pub flush_bytes: usize,
    /// Shortest time between the beginnings of two batches that are not full.
    pub flush_gap: Duration,
    /// Full batches that may be on their way at once.
    pub in_flight: usize,
    /// Bytes that may wait or be on their way, roughly. A chunk of one transaction that takes more is held all the same.
    pub memory: usize,
    /// Bytes of the log that Postgres may keep for the slot. What keeps more is dropped.
    pub max_wal: u64,
    /// How often the leader puts a sign of life into the log.
    pub heartbeat: Duration,
    /// How long nothing may be heard, heartbeats included, before it is asked whether the server reads on: there may be much
    /// in the log that is none of ours. If it does not, the connection counts as broken.
    pub silence: Duration,
    /// Longest that the end of a term waits for what is on its way.
    pub drain: Duration,
}

impl TermOptions {
    /// How long heartbeats may fail.
    fn patience(&self) -> Duration {
        self.silence.max(INQUIRY)
    }
}

/// Why a term is over.
#[derive(Debug, thiserror::Error)]
pub enum TermEnd {
    /// It was told to end.
    #[error("the replicator stops")]
    Stopped,
    /// The stream is over.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A message cannot be read.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// A change cannot be taken.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// Nothing was heard for too long.
    #[error("nothing was heard of the stream for {0:?}")]
    Silence(Duration),
    /// Postgres has taken no heartbeat for too long. It may be shutting down, which waits for whoever reads a slot, and what we
    /// wait for may need an answer of the same server.
    #[error("Postgres has taken no heartbeat for {0:?}")]
    Unanswered(Duration),
    /// Replication has begun anew elsewhere, or its tables are gone.
    #[error("what has been replicated so far does not count any more")]
    Superseded,
    /// A fault of ours.
    #[error("a batch has failed")]
    Failed,
}

/// A slot that is held, and where its changes go.
pub struct Term {
    source: Box<dyn WalSource>,
    flusher: Flusher,
    epoch: Epoch,
    options: TermOptions,
}

/// A batch that is stored.
struct Stored {
    ticket: Ticket,
    bytes: usize,
}

struct Stream {
    source: Box<dyn WalSource>,
    flusher: Flusher,
    options: TermOptions,
    decoder: Decoder,
    batcher: Batcher,
    progress: Progress,
    /// `None` of one that has panicked.
    flights: JoinSet<Option<Stored>>,
    /// Bytes on their way.
    flying: usize,
    /// What is on its way must not be overtaken.
    in_order: bool,
    /// Shortest time between the beginnings of two batches that are not full.
    gap: watch::Receiver<Duration>,
    /// When a batch that is not full may begin.
    next_flush: Instant,
    heard: Instant,
    /// Up to where the server had read the log when it was asked last.
    sent: Option<u64>,
}

impl Term {
    /// Of a slot whose changes `source` tells, under `epoch`.
    pub fn new(source: Box<dyn WalSource>, flusher: Flusher, epoch: Epoch, options: TermOptions) -> Self {
        // With none of either nothing would ever be stored.
        let (flush_rows, in_flight) = (options.flush_rows.max(1), options.in_flight.max(1));
        Self { source, flusher, epoch, options: TermOptions { flush_rows, in_flight, ..options } }
    }

    /// What it stores under.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Stores what the slot tells until something ends it.
    pub async fn run(self, stop: &CancellationToken) -> TermEnd {
        let Self { source, flusher, epoch, options } = self;
        let (superseded, context) = (CancellationToken::new(), flusher.context().clone());
        let unanswered = CancellationToken::new();
        context.begin();
        let gap = watch::Sender::new(options.flush_gap);
        let told = watch::Sender::new((0, Lsn(0)));
        let look = {
            let (gap, told, flusher, options, superseded) =
                (gap.clone(), told.clone(), flusher.clone(), options.clone(), superseded.clone());
            async move {
                let attending = || attend(&flusher, &options, epoch, &superseded, (&told, &gap));
                flusher.context().background.survived("heartbeats in ClickHouse", attending).await;
            }
        };
        let heart = {
            let (options, ends) = (options.clone(), [superseded.clone(), unanswered.clone()]);
            async move {
                let beating = || beat(&context, &options, epoch, &ends, &told);
                context.background.survived("heartbeats of replication", beating).await;
            }
        };
        let _tasks =
            [AbortOnDropHandle::new(tokio::spawn(look)), AbortOnDropHandle::new(tokio::spawn(heart))];
        let mut stream = Stream {
            source,
            flusher,
            decoder: Decoder::new("sessions", COLUMNS),
            batcher: Batcher::new(epoch),
            progress: Progress::default(),
            flights: JoinSet::new(),
            flying: 0,
            in_order: false,
            gap: gap.subscribe(),
            next_flush: Instant::now(),
            heard: Instant::now(),
            sent: None,
            options,
        };
        let patience = stream.options.patience();
        let end = tokio::select! {
            end = stream.run(stop, &superseded) => end,
            () = unanswered.cancelled() => TermEnd::Unanswered(patience),
        };
        // Whoever leads next says so again.
        stream.flusher.context().background.hindered(DEAD_LETTERS, None);
        if matches!(end, TermEnd::Stopped) {
            stream.drain().await;
            if let Err(error) = stream.source.stop().await {
                tracing::debug!(%error, "the replication stream did not end in order");
            }
        }
        end
    }
}

impl Stream {
    async fn run(&mut self, stop: &CancellationToken, superseded: &CancellationToken) -> TermEnd {
        loop {
            self.flush_if_due();
            let may_read = self.may_read();
            if !may_read {
                // Silence is only what is heard of a stream that is listened to.
                self.heard = Instant::now();
            }
            let silent_at = self.heard + self.options.silence;
            tokio::select! {
                biased;
                () = stop.cancelled() => return TermEnd::Stopped,
                () = superseded.cancelled() => return TermEnd::Superseded,
                Some(stored) = self.flights.join_next() => match stored {
                    Ok(Some(stored)) => self.stored(&stored),
                    _ => return TermEnd::Failed,
                },
                () = sleep_until(self.next_flush), if self.waits_for_the_gap() => {}
                event = self.source.next(), if may_read => {
                    let event = match event {
                        Ok(event) => event,
                        Err(error) => return error.into(),
                    };
                    // What it waits for may take as long as ClickHouse is away. Its transaction is not confirmed meanwhile.
                    let taken = tokio::select! {
                        biased;
                        taken = self.take(event) => taken,
                        () = stop.cancelled() => return TermEnd::Stopped,
                        () = superseded.cancelled() => return TermEnd::Superseded,
                    };
                    if let Err(end) = taken {
                        return end;
                    }
                    self.heard = Instant::now();
                }
                () = sleep_until(silent_at), if may_read => {
                    let asked = stop.run_until_cancelled(self.reads_on()).await;
                    match asked {
                        None => return TermEnd::Stopped,
                        Some(true) => self.heard = Instant::now(),
                        Some(false) => return TermEnd::Silence(self.options.silence),
                    }
                }
            }
        }
    }

    /// Whether the server has read more of the log for us since the last time that nothing was heard of it.
    async fn reads_on(&mut self) -> bool {
        let asked = self.flusher.context().postgres.sent(&self.options.slot);
        let Ok(Ok(Some(sent))) = timeout(INQUIRY, asked).await else { return false };
        self.sent.replace(sent) != Some(sent)
    }

    async fn take(&mut self, event: WalEvent) -> Result<(), TermEnd> {
        let passed = match event {
            WalEvent::Begin { commit, committed_at, xid } => {
                self.batcher.begin(commit, committed_at, xid);
                None
            }
            WalEvent::Change(message) => {
                let change = self.decoder.decode(message)?;
                self.count(&change);
                match change {
                    Change::Truncate => self.truncate().await?,
                    change => self.batcher.take(change)?,
                }
                None
            }
            WalEvent::Commit { end } => self.batcher.commit(end),
            WalEvent::KeepAlive { wal_end } => self.batcher.pass(wal_end),
            WalEvent::Message { .. } => None,
        };
        if let Some(place) = passed.and_then(|place| self.progress.pass(place)) {
            self.reach(place);
        }
        Ok(())
    }

    fn count(&self, change: &Change) {
        let event = match change {
            Change::Insert(_) => ReplicationEvent::Insert,
            Change::Update { .. } => ReplicationEvent::Update,
            Change::Delete(_) => ReplicationEvent::Delete,
            Change::Truncate => ReplicationEvent::Truncate,
            Change::Nothing => return,
        };
        self.flusher.context().metrics.event(event);
    }

    /// What was told before is stored first, or a row would be buried that came back.
    async fn truncate(&mut self) -> Result<(), TermEnd> {
        let Truncation { at: version, next } = self.batcher.truncate()?;
        self.flush_rest().await?;
        let context = self.flusher.context().clone();
        let _flight = context.depart();
        self.flusher.tombstone_up_to(version).await;
        let slot = &self.options.slot;
        let noted = || context.postgres.note_truncate(slot, version.epoch().0, next.place().0);
        surely("a TRUNCATE", noted).await;
        Ok(())
    }

    /// Stores all that has been told. A batch may end here.
    async fn flush_rest(&mut self) -> Result<(), TermEnd> {
        // One after the other, because one may share versions with the other.
        self.land().await?;
        if self.batcher.rows() > 0 {
            let batch = self.batcher.end();
            self.flush(batch);
        }
        self.land().await
    }

    /// Waits for what is on its way.
    async fn land(&mut self) -> Result<(), TermEnd> {
        while let Some(stored) = self.flights.join_next().await {
            self.stored(&stored.ok().flatten().ok_or(TermEnd::Failed)?);
        }
        Ok(())
    }

    fn stored(&mut self, stored: &Stored) {
        self.flying -= stored.bytes;
        if self.flights.is_empty() {
            self.in_order = false;
        }
        if let Some(place) = self.progress.stored(stored.ticket) {
            self.reach(place);
        }
    }

    /// Everything before `place` is stored.
    fn reach(&self, place: Lsn) {
        self.flusher.context().reached.send_if_modified(|reached| {
            let is_further = place > *reached;
            *reached = place.max(*reached);
            is_further
        });
        self.source.confirm(place);
    }

    fn is_full(&self) -> bool {
        self.holds(1)
    }

    /// Whether what waits is so many full batches.
    fn holds(&self, times: usize) -> bool {
        let TermOptions { flush_rows, flush_bytes, .. } = self.options;
        self.batcher.rows() >= flush_rows.saturating_mul(times)
            || self.batcher.bytes() >= flush_bytes.saturating_mul(times)
    }

    fn may_read(&self) -> bool {
        // Within a chunk there is no way but on.
        if !self.batcher.may_end() && self.flights.is_empty() {
            return true;
        }
        !(self.holds(GROWTH) && self.batcher.may_end())
            && self.flying + self.batcher.bytes() < self.options.memory
    }

    /// Whether a batch may begin now, or once the gap is over.
    fn may_flush(&self) -> bool {
        let alone = !self.is_full() || self.batcher.is_in_order();
        let places = if alone { 1 } else { self.options.in_flight };
        self.batcher.rows() > 0 && self.batcher.may_end() && !self.in_order && self.flights.len() < places
    }

    fn waits_for_the_gap(&self) -> bool {
        self.may_flush() && !self.is_full()
    }

    fn flush_if_due(&mut self) {
        let now = Instant::now();
        if self.may_flush() && (self.is_full() || now >= self.next_flush) {
            self.next_flush = now + *self.gap.borrow();
            let batch = self.batcher.end();
            self.flush(batch);
        }
    }

    fn flush(&mut self, batch: Batch) {
        let (ticket, bytes) = (self.progress.begin(batch.reached), batch.bytes);
        self.flying += bytes;
        self.in_order = batch.in_order;
        let flusher = self.flusher.clone();
        let flight = self.flusher.context().depart();
        self.flights.spawn(async move {
            let _flight = flight;
            let storing = flusher.store(batch);
            flusher.context().background.caught("inserts of replication", storing).await?;
            Some(Stored { ticket, bytes })
        });
    }

    /// Stores and confirms what was read. Of a transaction that is still being told, what stands before the end of a chunk is
    /// left: it is told again.
    async fn drain(&mut self) {
        let patience = self.options.drain;
        let rest = async { if self.batcher.may_end() { self.flush_rest().await } else { self.land().await } };
        if timeout(patience, rest).await.is_err() {
            tracing::warn!("the replicator stops before all it has read is stored; it is read again");
        }
    }
}

/// Tells who leads and how far the stream is, and makes the stream say something.
async fn beat(
    context: &Context,
    options: &TermOptions,
    epoch: Epoch,
    [superseded, unanswered]: &[CancellationToken; 2],
    told: &watch::Sender<(u64, Lsn)>,
) {
    let Context { postgres, metrics, reached, background, .. } = context;
    let mut answered = Instant::now();
    // A beat that is late moves those behind it.
    let mut beats = Ticker::new(options.heartbeat, CancellationToken::new());
    while beats.tick().await {
        let place = *reached.borrow();
        let is_storing = context.longest_flight().is_none_or(|longest| longest < STALLED);
        background.hindered(NAME, (!is_storing).then_some(HINDRANCE));
        let beat = async {
            let beat = Beat {
                slot: &options.slot,
                epoch: epoch.0,
                leader: &options.name,
                flushed: place.0,
                is_storing,
            };
            let beat = postgres.beat(beat).await?;
            let retained = postgres.slot(&options.slot).await?.map_or(0, |slot| slot.retained);
            metrics.retained(retained);
            let letters = postgres.count_dead_letters(&options.slot).await?;
            metrics.dead_letters(letters);
            background.hindered(DEAD_LETTERS, (letters > 0).then_some(DEAD_LETTERS_HINDRANCE));
            if retained > options.max_wal {
                slot::overrun(context, &options.slot, epoch, retained).await?;
                return Ok(None);
            }
            Ok::<_, Error>(beat)
        };
        let beat = timeout_at(answered + options.patience(), beat).await;
        let beat = beat.unwrap_or_else(|late| Err(Error::unavailable("metadata", late)));
        if beat.is_ok() {
            answered = Instant::now();
        }
        match beat {
            // Where nothing can be stored, ClickHouse must not say that it is kept up to date.
            Ok(Some(_)) if !is_storing => {}
            Ok(Some(beat)) => drop(told.send_replace((beat, place))),
            Ok(None) => return superseded.cancel(),
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "no heartbeat of the replicator");
                if answered.elapsed() >= options.patience() {
                    return unanswered.cancel();
                }
            }
        }
    }
}

/// Shows in ClickHouse that the leader lives, looks whether another replication fills the tables, and keeps inserts apart while
/// it is behind with merging them. In a task of its own: ClickHouse may be silent for long.
async fn attend(
    flusher: &Flusher,
    options: &TermOptions,
    epoch: Epoch,
    superseded: &CancellationToken,
    (told, gap): (&watch::Sender<(u64, Lsn)>, &watch::Sender<Duration>),
) {
    let (context, mut told, mut was_behind) = (flusher.context(), told.subscribe(), false);
    // The last heartbeat that is known to be there.
    let mut marked = 0;
    while told.changed().await.is_ok() {
        let (beat, place) = *told.borrow_and_update();
        let before = *gap.borrow();
        let next = flusher.next_gap(before, options.flush_gap).await;
        context.metrics.flush_gap(next);
        gap.send_replace(next);
        match standing(context, options, epoch, marked).await {
            Ok(Standing::Ours) => was_behind = false,
            // Of a cluster, one server may not have heard of it yet.
            Ok(Standing::Behind) if !was_behind => {
                was_behind = true;
                continue;
            }
            Ok(Standing::Behind | Standing::Elsewhere) | Err(SlotError::Unfit(_)) => {
                tracing::error!("the tables of ClickHouse are not those that this replicator fills any more");
                return superseded.cancel();
            }
            Err(_) => continue,
        }
        match slot::leave_mark(context, options, epoch, (beat, place)).await {
            Ok(_) => marked = beat,
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "no heartbeat in ClickHouse");
            }
        }
    }
}

/// What ClickHouse says of who fills it.
enum Standing {
    /// This epoch.
    Ours,
    /// A heartbeat of this epoch is missing that was there.
    Behind,
    /// A later epoch does, or nobody can: a table is gone.
    Elsewhere,
}

async fn standing(
    context: &Context,
    options: &TermOptions,
    epoch: Epoch,
    marked: u64,
) -> Result<Standing, SlotError> {
    if !is_migrated(&context.clickhouse).await? {
        return Ok(Standing::Elsewhere);
    }
    Ok(match slot::newest_marker(context, &options.slot).await? {
        Some(marker) if marker.epoch > epoch.0 => Standing::Elsewhere,
        Some(marker) if marker.epoch == epoch.0 && marker.beat >= marked => Standing::Ours,
        _ => Standing::Behind,
    })
}
