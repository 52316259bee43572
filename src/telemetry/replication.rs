//! What the replicator shows. Zero on a replica that does not replicate.

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
    event: Event,
}

/// What became of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Event {
    /// It is new, or has changed.
    Upsert,
    /// It is gone.
    Delete,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FlushLabels {
    outcome: FlushOutcome,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum FlushOutcome {
    Stored,
    Failed,
}

/// The replicator's metrics. Cheap to clone.
#[derive(Clone)]
pub struct ReplicationMetrics {
    leading: Gauge,
    lag: Histogram,
    flushes: Family<FlushLabels, Counter>,
    flush_duration: Histogram,
    flush_rows: Histogram,
    sessions: Counter,
    events: Family<EventLabels, Counter>,
    retained: Gauge,
    dead_letters: Counter,
    epochs: Counter,
}

impl ReplicationMetrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            leading: Gauge::default(),
            lag: latency_histogram(),
            flushes: Family::default(),
            flush_duration: latency_histogram(),
            flush_rows: size_histogram(),
            sessions: Counter::default(),
            events: Family::default(),
            retained: Gauge::default(),
            dead_letters: Counter::default(),
            epochs: Counter::default(),
        };
        let registry = registry.sub_registry_with_prefix("replication");
        registry.register("leading", "1 while this replica reads the slot", metrics.leading.clone());
        registry.register_with_unit(
            "lag",
            "From the commit in Postgres to the row in ClickHouse, of the oldest change of a flush",
            Unit::Seconds,
            metrics.lag.clone(),
        );
        registry.register(
            "flushes",
            "Inserts into ClickHouse, by outcome; a failed one is repeated",
            metrics.flushes.clone(),
        );
        registry.register_with_unit(
            "flush_duration",
            "Time of an insert",
            Unit::Seconds,
            metrics.flush_duration.clone(),
        );
        registry.register("flush_rows", "Rows of an insert", metrics.flush_rows.clone());
        registry.register(
            "sessions_inserted",
            "Versions of sessions stored in ClickHouse",
            metrics.sessions.clone(),
        );
        registry.register("events", "Changes read from the WAL", metrics.events.clone());
        registry.register_with_unit(
            "wal_retained",
            "WAL that the slot holds, as the leader sees it",
            Unit::Bytes,
            metrics.retained.clone(),
        );
        registry.register(
            "dead_letters",
            "Rows set aside because ClickHouse refuses them",
            metrics.dead_letters.clone(),
        );
        registry.register(
            "epochs",
            "Times that this replica has led a new epoch, which copies every session",
            metrics.epochs.clone(),
        );
        metrics
    }

    /// This replica reads the slot, or does no longer.
    pub fn leading(&self, leads: bool) {
        self.leading.set(i64::from(leads));
        if !leads {
            self.retained.set(0);
        }
    }

    /// A change was read.
    pub fn event(&self, event: Event) {
        self.events.get_or_create(&EventLabels { event }).inc();
    }

    /// ClickHouse has taken rows.
    pub fn stored(&self, rows: usize, elapsed: Duration) {
        self.flushes.get_or_create(&FlushLabels { outcome: FlushOutcome::Stored }).inc();
        self.flush_duration.observe(elapsed.as_secs_f64());
        self.flush_rows.observe(rows as f64);
        self.sessions.inc_by(rows as u64);
    }

    /// ClickHouse has not.
    pub fn failed(&self) {
        self.flushes.get_or_create(&FlushLabels { outcome: FlushOutcome::Failed }).inc();
    }

    /// So long after its commit the oldest change of a flush is there.
    pub fn lag(&self, lag: Duration) {
        self.lag.observe(lag.as_secs_f64());
    }

    /// The slot holds so many bytes of WAL.
    pub fn retained(&self, bytes: u64) {
        self.retained.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// A row was set aside.
    pub fn dead_letter(&self) {
        self.dead_letters.inc();
    }

    /// A new epoch begins.
    pub fn epoch(&self) {
        self.epochs.inc();
    }
}
