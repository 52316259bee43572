//! Who fills the tables: each leader of a replication leaves its mark here, so that no other one fills them beside it, and lists
//! know whether they are kept up to date.

use clickhouse::Row;
use serde::Deserialize;

use super::client::{ClickHouse, Fault, timely};
use sessiond_domain::Timestamp;

/// The mark of a replication, of its last heartbeat. It tells whose the tables are, and by that heartbeat whether they, or the
/// database that they are filled from, were put back to an older state since.
#[derive(Clone, Debug, PartialEq, Eq, Row, Deserialize)]
pub struct Marker {
    /// Which database it copies from.
    pub installation: String,
    /// By which slot.
    pub slot: String,
    /// Under which epoch.
    pub epoch: u8,
    /// How many heartbeats there have been.
    pub beat: u64,
    /// Everything before this place in the log is here.
    pub lsn: u64,
    /// How often it beats, in milliseconds.
    pub heartbeat_ms: u32,
}

/// The marks of all replications that fill this database.
///
/// # Errors
/// As [`ClickHouse::fetch`].
pub async fn markers(clickhouse: &ClickHouse) -> Result<Vec<Marker>, Fault> {
    let text = "SELECT installation, slot, epoch, beat, lsn, heartbeat_ms FROM replication_markers FINAL";
    let query = clickhouse.query(text);
    // A replica that lags must not say that there is no mark.
    let settings = clickhouse.cluster_settings().iter();
    let query = settings.fold(query, |query, (name, value)| query.with_setting(*name, *value));
    clickhouse.fetch(query).await
}

/// Leaves a mark in the place of the one before, unless that is of a later heartbeat: a process that was frozen must not put its own
/// in the place of its successor's.
///
/// # Errors
/// As [`SessionWriter::insert`](super::SessionWriter::insert).
pub async fn mark(clickhouse: &ClickHouse, marker: &Marker) -> Result<(), Fault> {
    let text = "INSERT INTO replication_markers (installation, slot, epoch, beat, lsn, heartbeat_ms) \
                SELECT {installation:String}, {slot:String}, {epoch:UInt8}, {beat:UInt64}, {lsn:UInt64}, {heartbeat_ms:UInt32} \
                WHERE (SELECT max(beat) FROM replication_markers WHERE installation = {installation:String} \
                AND slot = {slot:String} AND epoch = {epoch:UInt8}) < {beat:UInt64}";
    let Marker { installation, slot, epoch, beat, lsn, heartbeat_ms } = marker;
    let query = clickhouse.client().query_raw(text).param("installation", installation).param("slot", slot);
    let query = query.param("epoch", epoch).param("beat", beat).param("lsn", lsn);
    let query = query.param("heartbeat_ms", heartbeat_ms);
    let settings = [("async_insert", "0"), ("insert_quorum_parallel", "0")];
    let settings = settings.iter().chain(clickhouse.cluster_settings());
    let query = settings.fold(query, |query, (name, value)| query.with_setting(*name, *value));
    timely(clickhouse.options().insert_timeout, query.execute()).await
}

/// When the last mark was left, if the next ones are missing.
pub(super) async fn left_since(clickhouse: &ClickHouse) -> Result<Option<Timestamp>, Fault> {
    // Three of them, and a moment for those of a new leader.
    let text = "SELECT toUnixTimestamp64Milli(at) FROM replication_markers \
                WHERE at = (SELECT max(at) FROM replication_markers) \
                AND dateDiff('millisecond', at, now64(3)) > 3 * heartbeat_ms + 5000 LIMIT 1";
    match clickhouse.fetch::<i64>(clickhouse.query(text)).await {
        Ok(since) => Ok(since.first().copied().map(Timestamp::from_millis)),
        // Filled before there were marks, and not by a replicator of this version since.
        Err(fault) if fault.is_of_a_missing_table() => Ok(None),
        Err(fault) => Err(fault),
    }
}
