//! What a replicator shows. All of it is zero in a process without one.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::{latency_histogram, size_histogram};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EventLabels {
    event: ReplicationEvent,
}

/// What the stream of changes tells of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum ReplicationEvent {
    /// It is new.
    Insert,
    /// It has changed.
    Update,
    /// It is gone.
    Delete,
    /// All of them are gone.
    Truncate,
}

/// The metrics of a replicator. Cheap to clone.
#[derive(Clone)]
pub struct ReplicationMetrics {
    leading: Gauge,
    lag: Histogram,
    batches: Counter,
    batch_size: Histogram,
    duration: Histogram,
    inserted: Counter,
    retries: Counter,
    events: Family<EventLabels, Counter>,
    retained: Gauge,
    gap: Gauge<f64, AtomicU64>,
    overruns: Counter,
    beginnings: Counter,
    refused: Counter,
    letters: Gauge,
}

impl ReplicationMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            leading: Gauge::default(),
            lag: latency_histogram(),
            batches: Counter::default(),
            batch_size: size_histogram(),
            duration: latency_histogram(),
            inserted: Counter::default(),
            retries: Counter::default(),
            events: Family::default(),
            retained: Gauge::default(),
            gap: Gauge::default(),
            overruns: Counter::default(),
            beginnings: Counter::default(),
            refused: Counter::default(),
            letters: Gauge::default(),
        };
        let Self {
            leading,
            lag,
            batches,
            batch_size,
            duration,
            inserted,
            retries,
            events,
            retained,
            gap,
            overruns,
            beginnings,
            refused,
            letters,
        } = metrics.clone();
        let registry = registry.sub_registry_with_prefix("replication");
        registry.register("leading", "1 while this process reads the replication slot", leading);
        registry.register_with_unit(
            "lag",
            "From the commit in Postgres to the row in ClickHouse, of the oldest change of a batch",
            Unit::Seconds,
            lag,
        );
        registry.register("batches_flushed", "Batches that ClickHouse has stored", batches);
        registry.register("batch_size", "Rows of a batch", batch_size);
        registry.register_with_unit(
            "flush_duration",
            "Time until a batch was stored, with its retries",
            Unit::Seconds,
            duration,
        );
        registry.register("sessions_inserted", "Versions of sessions that ClickHouse has stored", inserted);
        registry.register("insert_retries", "Inserts that have failed, and were made again", retries);
        registry.register("events_processed", "Changes that the stream has told", events);
        registry.register_with_unit(
            "wal_retained",
            "Write-ahead log that Postgres keeps for the slot, as of the last heartbeat",
            Unit::Bytes,
            retained,
        );
        registry.register_with_unit(
            "flush_gap",
            "Shortest time between two inserts that are not full; longer while ClickHouse has many parts to merge",
            Unit::Seconds,
            gap,
        );
        registry.register(
            "overruns",
            "Slots that kept more of the log than replication.max_wal, and were dropped",
            overruns,
        );
        registry.register(
            "epochs",
            "How often this process had everything copied, the first time included",
            beginnings,
        );
        registry.register("rows_refused", "Changes that became dead letters", refused);
        registry.register(
            "dead_letters",
            "Dead letters that wait to be replayed, as of the last heartbeat",
            letters,
        );
        metrics
    }

    /// This process reads the slot, or does no longer.
    pub fn leading(&self, leads: bool) {
        self.leading.set(leads.into());
        if !leads {
            self.retained.set(0);
            self.gap.set(0.0);
            self.letters.set(0);
        }
    }

    /// The stream has told a change.
    pub fn event(&self, event: ReplicationEvent) {
        self.events.get_or_create(&EventLabels { event }).inc();
    }

    /// A batch is stored, so long after it set out, and after the first of its commits.
    pub fn flushed(&self, rows: usize, elapsed: Duration, lag: Option<Duration>) {
        self.batches.inc();
        self.batch_size.observe(rows as f64);
        self.duration.observe(elapsed.as_secs_f64());
        if let Some(lag) = lag {
            self.lag.observe(lag.as_secs_f64());
        }
    }

    /// So many rows are stored.
    pub fn inserted(&self, rows: usize) {
        self.inserted.inc_by(rows as u64);
    }

    /// An insert has failed, and is made again.
    pub fn retried(&self) {
        self.retries.inc();
    }

    /// Inserts that are not full are so far apart.
    pub fn flush_gap(&self, gap: Duration) {
        self.gap.set(gap.as_secs_f64());
    }

    /// So many changes became dead letters.
    pub fn refused(&self, changes: usize) {
        self.refused.inc_by(changes as u64);
    }

    /// So many dead letters wait.
    pub fn dead_letters(&self, letters: u64) {
        self.letters.set(i64::try_from(letters).unwrap_or(i64::MAX));
    }

    /// A slot kept more of the log than it may.
    pub fn overrun(&self) {
        self.overruns.inc();
    }

    /// A new epoch: everything is copied.
    pub fn epoch_begun(&self) {
        self.beginnings.inc();
    }

    /// Postgres keeps so many bytes for the slot.
    pub fn retained(&self, bytes: u64) {
        self.retained.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }
}
