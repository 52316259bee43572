//! ClickHouse, and the replicator that feeds it from Postgres.

use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use url::Url;

use super::fault;
use crate::domain::Violation;

/// Where lists, counts and tags are answered from, if not from the metadata store.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ClickHouseConfig {
    /// `http(s)://host:port`; `None` leaves lists to the metadata store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<Url>,
    /// Who we are to it.
    pub user: String,
    /// Unset for none.
    #[serde(default, serialize_with = "super::masked", skip_serializing_if = "Option::is_none")]
    pub password: Option<SecretString>,
    /// Database; made if there is none.
    pub database: String,
    /// Table; made if there is none.
    pub table: String,
    /// For `ON CLUSTER`, with a cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
    /// Which table engine a new table gets.
    pub engine: ClickHouseEngine,
    /// Longest a list, count or tags query may take.
    #[serde(with = "humantime_serde")]
    pub query_timeout: Duration,
    /// Answer from the metadata store while ClickHouse is away.
    pub fallback: bool,
}

/// Which table engine a new table gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ClickHouseEngine {
    /// One node, each insert synced to its disk.
    Single,
    /// `ReplicatedReplacingMergeTree`, which needs Keeper; inserts wait for a quorum.
    Replicated,
}

/// The replicator.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ReplicationConfig {
    /// Run it beside the server. `sessiond replicate` runs it alone, whatever this says.
    pub enabled: bool,
    /// A direct URL of the Postgres primary, past any pooler; `None` for the metadata store's.
    #[serde(default, serialize_with = "super::masked", skip_serializing_if = "Option::is_none")]
    pub url: Option<SecretString>,
    /// Logical slot; also names the state row.
    pub slot: String,
    /// Publication.
    pub publication: String,
    /// Rows of a flush at most.
    pub batch_rows: usize,
    /// Bytes of a flush at most.
    pub batch_bytes: usize,
    /// Least time between two flushes.
    #[serde(with = "humantime_serde")]
    pub linger: Duration,
    /// Flushes under way at most.
    pub concurrency: usize,
    /// Bytes of rows in memory at most.
    pub memory: usize,
    /// After this silence a leader counts as frozen, and a connection as dead.
    #[serde(with = "humantime_serde")]
    pub leader_timeout: Duration,
    /// How often a follower looks whether the slot is free.
    #[serde(with = "humantime_serde")]
    pub retry_interval: Duration,
    /// How often the leader writes a message of its own into the WAL.
    #[serde(with = "humantime_serde")]
    pub heartbeat: Duration,
    /// WAL that the slot may hold, in bytes; past it the slot is dropped and everything is replicated anew later.
    pub max_wal: u64,
    /// How long a list with a consistency token waits at most.
    #[serde(with = "humantime_serde")]
    pub visibility_timeout: Duration,
}

impl ClickHouseConfig {
    pub(super) fn validate(&self, faults: &mut Vec<Violation>) {
        if let Some(url) = &self.url
            && (!matches!(url.scheme(), "http" | "https") || url.host().is_none() || url.query().is_some())
        {
            faults.push(fault("clickhouse.url", "must be an http or https URL without query"));
        }
        for (field, name) in [
            ("clickhouse.database", Some(&self.database)),
            ("clickhouse.table", Some(&self.table)),
            ("clickhouse.cluster", self.cluster.as_ref()),
        ] {
            if name.is_some_and(|name| !is_name(name)) {
                faults
                    .push(fault(field, "must be 1 to 63 of a-z, A-Z, 0-9 and '_', and begin with no digit"));
            }
        }
    }
}

impl ReplicationConfig {
    pub(super) fn validate(&self, faults: &mut Vec<Violation>) {
        for (field, name) in
            [("replication.slot", &self.slot), ("replication.publication", &self.publication)]
        {
            if !is_name(name) || name.bytes().any(|byte| byte.is_ascii_uppercase()) {
                faults.push(fault(field, "must be 1 to 63 of a-z, 0-9 and '_', and begin with no digit"));
            }
        }
        let url = self.url.as_ref().map(SecretString::expose_secret);
        if url.is_some_and(|url| !url.starts_with("postgres:") && !url.starts_with("postgresql:")) {
            faults.push(fault("replication.url", "must begin with postgres:"));
        }
        let seconds = Duration::from_secs;
        for (field, value, least, most) in [
            ("replication.linger", self.linger, Duration::ZERO, seconds(10)),
            ("replication.leader_timeout", self.leader_timeout, seconds(2), seconds(3600)),
            ("replication.retry_interval", self.retry_interval, Duration::from_millis(10), seconds(60)),
            ("replication.heartbeat", self.heartbeat, Duration::from_millis(100), self.leader_timeout / 2),
            ("replication.visibility_timeout", self.visibility_timeout, Duration::ZERO, seconds(30)),
        ] {
            if !(least..=most).contains(&value) {
                faults.push(fault(field, &format!("must be {least:?} to {most:?}")));
            }
        }
        for (field, value, most) in [
            ("replication.batch_rows", self.batch_rows, 1_000_000),
            ("replication.batch_bytes", self.batch_bytes, 1 << 30),
            ("replication.concurrency", self.concurrency, 64),
            ("replication.memory", self.memory, 1 << 34),
        ] {
            if !(1..=most).contains(&value) {
                faults.push(fault(field, &format!("must be 1 to {most}")));
            }
        }
    }
}

/// What both databases take for a name without quotes.
fn is_name(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        && !name.starts_with(|first: char| first.is_ascii_digit())
}
