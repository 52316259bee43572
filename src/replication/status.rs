//! What an operator must know, in words.

use serde::Serialize;

use super::postgres::{Postgres, Status};
use crate::clickhouse::ClickHouse;
use crate::config::ReplicationConfig;

/// How long a leader may be silent before that is told, as a multiple of the heartbeat.
const SILENT_BEATS: u32 = 4;

/// Where a replication stands.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Overview {
    /// Slot, as configured.
    pub slot: String,
    /// Whether there is such a slot.
    pub exists: bool,
    /// Whether somebody reads it.
    pub active: bool,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
    /// WAL that the slot holds, in bytes.
    pub retained: u64,
    /// What it may hold, in bytes.
    pub max_wal: u64,
    /// 0 before the first.
    pub epoch: u8,
    /// `preparing`, `backfilling`, `streaming` or `dropped`.
    pub status: Option<&'static str>,
    /// The last session that a backfill under way has copied.
    pub backfill_cursor: Option<String>,
    /// Everything committed up to here is in ClickHouse.
    pub flushed: Option<String>,
    /// WAL behind that, in bytes.
    pub behind: u64,
    /// Who leads, or has led last.
    pub leader: Option<String>,
    /// Unix milliseconds.
    pub leader_seen_at: Option<i64>,
    /// Rows that ClickHouse refuses.
    pub dead_letters: i64,
    /// What ClickHouse says, if it does not answer as it should.
    pub clickhouse: Option<String>,
    /// What is wrong, most urgent first; empty if nothing is.
    pub problems: Vec<String>,
}

/// Asks both sides.
///
/// # Errors
/// If Postgres is away.
pub async fn overview(
    postgres: &Postgres,
    clickhouse: &ClickHouse,
    config: &ReplicationConfig,
    now: i64,
) -> Result<Overview, sqlx::Error> {
    let mut seen = Overview { slot: config.slot.clone(), max_wal: config.max_wal, ..Overview::default() };
    if let Some(slot) = postgres.slot(&config.slot).await? {
        (seen.exists, seen.active, seen.retained) = (true, slot.active_pid.is_some(), slot.retained);
        seen.wal_status = Some(slot.wal_status);
    }
    if let Some(state) = postgres.state(&config.slot).await? {
        (seen.epoch, seen.status) = (state.epoch, Some(state.status.as_str()));
        seen.backfill_cursor = state.backfill_cursor.filter(|_| state.status == Status::Backfilling);
        seen.flushed = Some(state.flushed.to_string());
        seen.behind = postgres.wal_position().await?.0.saturating_sub(state.flushed.0);
        (seen.leader, seen.leader_seen_at) = (state.leader, state.leader_seen_at);
    }
    let (letters,): (i64,) = sqlx::query_as("SELECT count(*) FROM replication_dead_letters WHERE slot = $1")
        .bind(&config.slot)
        .fetch_one(postgres.pool())
        .await?;
    seen.dead_letters = letters;
    seen.clickhouse = clickhouse.ping().await.err().map(|fault| fault.summary());
    seen.problems = problems(&seen, config, now);
    Ok(seen)
}

fn problems(seen: &Overview, config: &ReplicationConfig, now: i64) -> Vec<String> {
    let mut problems = Vec::new();
    let mut tell = |wrong: bool, words: String| {
        if wrong {
            problems.push(words);
        }
    };
    let lost = seen.wal_status.as_deref() == Some("lost");
    let (mib, max_mib) = (seen.retained >> 20, seen.max_wal >> 20);
    tell(
        lost,
        "the WAL that the slot needs is gone; the leader begins a new epoch and copies every session"
            .to_owned(),
    );
    tell(
        seen.status == Some(Status::Dropped.as_str()),
        "the slot was dropped because it held more than max_wal; every session is copied once ClickHouse is back".to_owned(),
    );
    tell(
        !seen.exists && seen.status.is_none(),
        "nothing has been replicated yet: no replica has led".to_owned(),
    );
    tell(
        !seen.exists && seen.status.is_some() && seen.status != Some(Status::Dropped.as_str()),
        "the slot is gone; the next leader begins a new epoch and copies every session".to_owned(),
    );
    tell(
        seen.exists && !seen.active && !lost,
        format!(
            "nobody reads the slot, which holds {mib} MiB of WAL; start a replica with replication.enabled, or drop the slot \
             with `sessiond replicate drop-slot`"
        ),
    );
    let silent = now.saturating_sub(seen.leader_seen_at.unwrap_or(now));
    let patience = i64::try_from((config.heartbeat * SILENT_BEATS).as_millis()).unwrap_or(i64::MAX);
    tell(
        seen.active && silent > patience.max(2000),
        format!(
            "the leader has published nothing for {} s: ClickHouse is slow or away, or the leader is frozen",
            silent / 1000
        ),
    );
    if let Some(words) = &seen.clickhouse {
        tell(true, words.clone());
    }
    tell(
        seen.retained > seen.max_wal / 2,
        format!("the slot holds {mib} MiB of WAL; at {max_mib} MiB it is dropped"),
    );
    tell(
        seen.dead_letters > 0,
        format!(
            "{} sessions are not in ClickHouse, which refuses them: see `sessiond replicate dead-letters`",
            seen.dead_letters
        ),
    );
    tell(
        seen.status == Some(Status::Backfilling.as_str()),
        "sessions from before the slot are being copied; lists miss those that are not there yet".to_owned(),
    );
    problems
}
