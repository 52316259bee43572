//! How replication is, in words for its operator.

use std::time::Duration;

use serde::Serialize;

use super::pgwire::SourceOptions;
use super::slot::{Found, Loss, SlotError, look, newest_marker};
use super::{Context, Lsn, STALLED};
use crate::domain::error::Result;
use crate::store::index::clickhouse::{check_columns, is_migrated};
use crate::store::metadata::{Phase, ReplicationState};
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
    /// Changes that ClickHouse has refused, and that were not replayed.
    pub dead_letters: u64,
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
    let writer = postgres.oldest_writer().await?;
    match look(source, context).await.map(|seen| seen.found) {
        Err(SlotError::Postgres(error)) => return Err(error),
        Err(error) => problems.push(Chain(&error).to_string()),
        Ok(Found::Missing) => {
            problems.push("the slot has not been made: no replicator has come so far".to_owned());
        }
        Ok(Found::Unfinished(_)) => {
            problems.push(format!("the slot is being made, {}", until_over(writer.as_ref())));
        }
        Ok(Found::Lost(_, loss)) => {
            problems.push(format!("{loss}: a replicator makes it anew, and copies everything"));
        }
        Ok(Found::Ready(_)) if !is_read => {
            problems
                .push("nobody reads the slot: no replicator runs, or its log says what keeps it".to_owned());
        }
        Ok(Found::Ready(_)) => {
            if let Some(state) = &state {
                problems.extend(of_leader(state, heartbeat));
                let is_waiting = state.phase == Phase::Backfilling && state.backfilled_to.is_none();
                let is_long =
                    |(millis, _): &&(i64, String)| u128::from(millis.unsigned_abs()) > STALLED.as_millis();
                if let Some(writer) = writer.as_ref().filter(is_long).filter(|_| is_waiting) {
                    problems.push(format!("older sessions are not copied yet, {}", until_over(Some(writer))));
                }
            }
        }
    }
    let dead_letters = postgres.count_dead_letters(&source.slot).await?;
    if dead_letters > 0 {
        problems.push(format!(
            "ClickHouse refuses {dead_letters} changes: `sessiond replicate dead-letters` says which and why, with --replay it tries again"
        ));
    }
    problems.extend(of_clickhouse(source, context, state.as_ref()).await);
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
        dead_letters,
        problems,
    })
}

/// What slots and copies wait for.
fn until_over(writer: Option<&(i64, String)>) -> String {
    let oldest = writer.map_or_else(String::new, |(millis, whose)| {
        format!(": the oldest, of {whose}, has been open for {} s", millis / 1000)
    });
    format!("which waits until every transaction that has written is over{oldest}")
}

/// What is wrong with who reads the slot.
fn of_leader(state: &ReplicationState, heartbeat: Duration) -> Option<String> {
    let Some((name, unheard)) = &state.leader else {
        return Some(
            "the slot is read, and no replicator has been heard of: another program may read it".to_owned(),
        );
    };
    let millis = |number: i64| Duration::from_millis(number.try_into().unwrap_or_default());
    let (unheard, stalled, limit) = (millis(*unheard), millis(state.stalled), heartbeat * BEATS_MISSED);
    if unheard > limit {
        return Some(format!("the leader, {name}, was last heard of {} s ago", unheard.as_secs()));
    }
    let stalled = Some(stalled + STALLED).filter(|_| stalled > limit)?;
    Some(format!("the leader, {name}, has stored nothing for {} s: its log says why", stalled.as_secs()))
}

/// What is wrong with the tables.
async fn of_clickhouse(
    source: &SourceOptions,
    context: &Context,
    state: Option<&ReplicationState>,
) -> Option<String> {
    let looked = async {
        // A replicator makes tables that are missing.
        let marker = match is_migrated(&context.clickhouse).await? {
            true => {
                check_columns(&context.clickhouse).await?;
                newest_marker(context, &source.slot).await?
            }
            false => None,
        };
        Ok::<_, SlotError>(marker)
    };
    let marker = match looked.await {
        Err(error) => return Some(Chain(&error).to_string()),
        Ok(marker) => marker,
    };
    let state = state?;
    let beat = marker.filter(|marker| marker.epoch == state.epoch).map_or(0, |marker| marker.beat);
    (beat < state.marked).then(|| format!("{}: a replicator copies everything anew", Loss::ClickHouse))
}
