//! How replication is, in words for its operator.

use std::time::Duration;

use serde::Serialize;

use super::pgwire::SourceOptions;
use super::slot::{Found, SlotError, look};
use super::{Context, Lsn};
use crate::domain::error::Result;
use crate::store::metadata::Phase;
use crate::telemetry::Chain;

/// How many heartbeats may be missing before it is said that a leader is silent.
const BEATS_MISSED: u32 = 3;

/// How replication is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// The slot.
    pub slot: String,
    /// What is being done with it; `None` if nobody has made it.
    pub phase: Option<&'static str>,
    /// How often replication has begun anew, from 1.
    pub epoch: Option<u8>,
    /// Whether a process reads it.
    pub is_read: bool,
    /// Who leads, or led last.
    pub leader: Option<String>,
    /// Milliseconds since it was last heard of.
    pub leader_unheard_ms: Option<i64>,
    /// The last session that was copied, while older ones are being copied.
    pub backfilled_to: Option<String>,
    /// Everything before this place in the log was in ClickHouse at the last heartbeat.
    pub flushed: Option<String>,
    /// Bytes of the log that are not confirmed yet.
    pub behind_bytes: Option<u64>,
    /// Bytes of the log that Postgres keeps for the slot.
    pub retained_bytes: Option<u64>,
    /// What is wrong, a sentence each.
    pub problems: Vec<String>,
}

/// Looks at both sides, and changes nothing.
///
/// # Errors
/// [`Error::Unavailable`](crate::domain::Error::Unavailable) if Postgres does not answer. What else fails is among the problems.
pub async fn status(source: &SourceOptions, heartbeat: Duration, context: &Context) -> Result<Status> {
    let postgres = &context.postgres;
    let (state, slot) = (postgres.state(&source.slot).await?, postgres.slot(&source.slot).await?);
    let mut problems = Vec::new();
    let is_read = slot.as_ref().is_some_and(|slot| slot.is_ours && slot.is_active);
    match look(source, context).await {
        Err(SlotError::Postgres(error)) => return Err(error),
        Err(error) => problems.push(Chain(&error).to_string()),
        Ok(Found::Missing(_)) if state.is_none() => {
            problems.push("the slot has not been made: no replicator has come so far".to_owned());
        }
        Ok(Found::Missing(_)) => problems.push(match postgres.oldest_writer().await? {
            Some((millis, pid)) => format!(
                "the slot is being made, which takes until every transaction that has written is over: the oldest, of process \
                 {pid}, has been open for {} s",
                millis / 1000
            ),
            None => "the slot is being made".to_owned(),
        }),
        Ok(Found::Ready(_)) if !is_read => {
            problems.push("nobody reads the slot: no replicator runs, or its log says what keeps it".to_owned());
        }
        Ok(Found::Ready(_)) => {
            let limit = (heartbeat * BEATS_MISSED).as_millis();
            let leader = state.as_ref().and_then(|state| state.leader.as_ref());
            if let Some((name, millis)) = leader.filter(|(_, millis)| millis.unsigned_abs() as u128 > limit) {
                problems.push(format!("the leader, {name}, was last heard of {} s ago", millis / 1000));
            }
        }
    }
    if let Err(fault) = context.clickhouse.ping().await {
        problems.push(Chain(&fault).to_string());
    }
    let leader = state.as_ref().and_then(|state| state.leader.clone());
    let (leader, leader_unheard_ms) = leader.unzip();
    Ok(Status {
        slot: source.slot.clone(),
        phase: state.as_ref().map(|state| state.phase.as_str()),
        epoch: state.as_ref().map(|state| state.epoch),
        is_read,
        leader,
        leader_unheard_ms,
        backfilled_to: state
            .as_ref()
            .filter(|state| state.phase == Phase::Backfilling)
            .and_then(|state| state.backfilled_to.clone()),
        flushed: state.as_ref().map(|state| Lsn(state.flushed).to_string()),
        behind_bytes: slot.as_ref().map(|slot| slot.behind),
        retained_bytes: slot.as_ref().map(|slot| slot.retained),
        problems,
    })
}
