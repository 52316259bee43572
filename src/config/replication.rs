//! The replicator, which keeps ClickHouse up to date from Postgres.

use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};

use super::fault;
use super::store::is_postgres;
use crate::domain::Violation;

/// Replication from Postgres to ClickHouse.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ReplicationConfig {
    /// Whether `serve` runs a replicator. `sessiond replicate` runs one whatever this says.
    pub enabled: bool,
    /// The primary of Postgres, past any pooler; `None` for `metadata.url`.
    #[serde(default, serialize_with = "super::masked", skip_serializing_if = "Option::is_none")]
    pub url: Option<SecretString>,
    /// The replication slot. Slots are of the whole server, whatever the database.
    pub slot: String,
    /// The publication.
    pub publication: String,
    /// Rows of one insert.
    pub flush_rows: usize,
    /// Bytes of one insert, roughly.
    pub flush_bytes: usize,
    /// Shortest time between two inserts that are not full.
    #[serde(with = "humantime_serde")]
    pub flush_gap: Duration,
    /// Full inserts that may be on their way at once.
    pub in_flight: usize,
    /// Bytes of rows that are held, roughly.
    pub memory: usize,
    /// Bytes of the write-ahead log that Postgres may keep for the slot. One that keeps more is dropped, and everything is copied
    /// once ClickHouse answers.
    pub max_wal: u64,
    /// How often a replicator that does not lead looks whether it may.
    #[serde(with = "humantime_serde")]
    pub poll: Duration,
    /// After how long without a sign of life Postgres takes the slot from a leader, and a leader gives its connection up.
    #[serde(with = "humantime_serde")]
    pub wal_sender_timeout: Duration,
    /// How often a leader puts a sign of life into the write-ahead log; three times within `wal_sender_timeout` at least.
    #[serde(with = "humantime_serde")]
    pub heartbeat: Duration,
}

/// The log of Postgres is kept in files of 16 MiB.
const LEAST_MAX_WAL: u64 = 32 << 20;

impl ReplicationConfig {
    /// How often a leader beats.
    pub fn heartbeat(&self) -> Duration {
        self.heartbeat.min(self.wal_sender_timeout / 3)
    }

    pub(super) fn validate(&self, faults: &mut Vec<Violation>) {
        if !is_slot(&self.slot) {
            faults.push(fault(
                "replication.slot",
                "must be 1 to 63 of a-z, 0-9 and '_', and begin with no digit",
            ));
        }
        if !(1..=63).contains(&self.publication.len()) {
            faults.push(fault("replication.publication", "must be 1 to 63 bytes long"));
        }
        if self.url.as_ref().is_some_and(|url| !is_postgres(url.expose_secret())) {
            faults.push(fault("replication.url", "must begin with postgres:"));
        }
        let millis = Duration::from_millis;
        for (field, value, least, most) in [
            ("replication.flush_gap", self.flush_gap, Duration::ZERO, millis(60_000)),
            ("replication.poll", self.poll, millis(10), millis(60_000)),
            ("replication.wal_sender_timeout", self.wal_sender_timeout, millis(1_000), millis(3_600_000)),
            ("replication.heartbeat", self.heartbeat, millis(100), millis(3_600_000)),
        ] {
            if !(least..=most).contains(&value) {
                faults.push(fault(field, &format!("must be {least:?} to {most:?}")));
            }
        }
        for (field, value, most) in [
            ("replication.flush_rows", self.flush_rows, 100_000),
            ("replication.flush_bytes", self.flush_bytes, 64 << 20),
            ("replication.in_flight", self.in_flight, 1_000),
            ("replication.memory", self.memory, 16 << 30),
        ] {
            if !(1..=most).contains(&value) {
                faults.push(fault(field, &format!("must be 1 to {most}")));
            }
        }
        if self.max_wal < LEAST_MAX_WAL {
            faults.push(fault("replication.max_wal", &format!("must be {LEAST_MAX_WAL} or more")));
        }
    }
}

/// What Postgres takes for the name of a slot, but for those that would have to be quoted.
fn is_slot(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name.bytes().all(|byte| byte == b'_' || byte.is_ascii_lowercase() || byte.is_ascii_digit())
        && !name.starts_with(|first: char| first.is_ascii_digit())
}
