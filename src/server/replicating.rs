//! The replicator of the settings.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use secrecy::ExposeSecret;

use super::open_clickhouse;
use crate::config::Config;
use crate::domain::{Background, Clock};
use crate::replication::Context;
use crate::replication::leader::{Replicator, ReplicatorOptions};
use crate::replication::pgwire::SourceOptions;
use crate::replication::term::TermOptions;
use crate::store::metadata::{OpenOptions, SqlMetadata};
use crate::telemetry::ReplicationMetrics;

/// Connections of a replicator beside the one that it reads the slot by: the heartbeat, the copy of older rows, columns that the
/// stream leaves out, and one to spare.
const CONNECTIONS: u32 = 4;
/// The longest pause before what has failed is tried again.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Longest that a stop waits for what is on its way to ClickHouse. What does not arrive in time is told to the next leader.
const DRAIN: Duration = Duration::from_secs(5);

/// What a replicator of these settings works with. Asks nobody: either side may be away.
///
/// # Errors
/// If a URL cannot be used.
pub fn open_context(
    config: &Config,
    metadata: SqlMetadata,
    (background, metrics): (Arc<Background>, ReplicationMetrics),
    clock: Arc<dyn Clock>,
) -> anyhow::Result<Context> {
    let options = OpenOptions { connections: CONNECTIONS, ..OpenOptions::default() };
    let postgres = SqlMetadata::postgres_when_asked(config.replication_url().expose_secret(), options)
        .context("cannot use replication.url")?;
    let clickhouse = open_clickhouse(&config.clickhouse)?;
    Ok(Context::new(metadata, postgres, clickhouse, background, metrics, clock))
}

/// The slot of these settings, and how it is read.
///
/// # Errors
/// If the URL cannot be used.
pub fn source_options(config: &Config) -> anyhow::Result<SourceOptions> {
    let replication = &config.replication;
    let mut source =
        SourceOptions::new(&config.replication_url(), &replication.slot, &replication.publication)
            .context("cannot use replication.url")?;
    source.wal_sender_timeout = replication.wal_sender_timeout;
    Ok(source)
}

/// A replicator of these settings, which does nothing yet.
///
/// # Errors
/// As [`source_options`].
pub fn replicator(config: &Config, context: Context) -> anyhow::Result<Replicator> {
    let replication = &config.replication;
    let term = TermOptions {
        slot: replication.slot.clone(),
        name: process_name(),
        flush_rows: replication.flush_rows,
        flush_bytes: replication.flush_bytes,
        flush_gap: replication.flush_gap,
        in_flight: replication.in_flight,
        memory: replication.memory,
        max_wal: replication.max_wal,
        heartbeat: replication.heartbeat(),
        silence: replication.wal_sender_timeout,
        drain: DRAIN,
    };
    let source = source_options(config)?;
    let options = ReplicatorOptions { source, term, poll: replication.poll, longest_pause: LONGEST_PAUSE };
    Ok(Replicator::new(options, context))
}

/// What other replicas call this process: its host and its number there.
fn process_name() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}/{}", host.trim(), std::process::id())
}
