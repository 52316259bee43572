//! The publication and the slot, made where they are missing, and the epoch that a slot is read under.

use super::pgwire::{SourceOptions, identify};
use super::source::SourceError;
use super::{Epoch, RowVersion};
use crate::domain::Error;
use crate::store::index::clickhouse::{Fault, SessionWriter};
use crate::store::metadata::{Phase, ReplicationStore};

/// A slot that can be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// What its changes are stored under.
    pub epoch: Epoch,
    /// Whether rows that are older than it are still to be copied.
    pub is_backfilling: bool,
}

/// Why there is no slot to be read.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// Somebody has to do something; the sentence says what.
    #[error("{0}")]
    Unfit(String),
    /// The replication connection cannot be made.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Postgres does not answer.
    #[error(transparent)]
    Postgres(#[from] Error),
    /// ClickHouse does not answer.
    #[error(transparent)]
    ClickHouse(#[from] Fault),
}

fn unfit<T>(sentence: impl Into<String>) -> Result<T, SlotError> {
    Err(SlotError::Unfit(sentence.into()))
}

/// Finds the slot of `options`, or makes it, its publication first: what is published when a change is made decides whether it is
/// told. Changes nothing where everything is in order. Of several processes one makes it.
///
/// # Errors
/// [`SlotError`]. A slot that is lost, or of another server than it was, is refused.
pub async fn ensure(
    options: &SourceOptions,
    postgres: &ReplicationStore,
    writer: &SessionWriter,
) -> Result<Slot, SlotError> {
    postgres.alone(ensure_alone(options, postgres, writer)).await?
}

async fn ensure_alone(
    options: &SourceOptions,
    postgres: &ReplicationStore,
    writer: &SessionWriter,
) -> Result<Slot, SlotError> {
    let (name, publication) = (&options.slot, &options.publication);
    let is_name = |byte: u8| byte == b'_' || byte.is_ascii_lowercase() || byte.is_ascii_digit();
    if !name.bytes().all(is_name) || !(1..=63).contains(&name.len()) || name.as_bytes()[0].is_ascii_digit() {
        return unfit(format!(
            "{name:?} cannot be a slot: a name is of 1 to 63 small letters, digits and underscores, and begins with no digit"
        ));
    }
    if let Some(obstacle) = postgres.obstacle().await? {
        return unfit(obstacle);
    }
    if !postgres.publish(publication).await? {
        return unfit(format!(
            "the publication {publication} does not publish all changes of sessions and nothing else: drop it, or set \
             replication.publication"
        ));
    }
    let identity = identify(options).await?;
    let (state, slot) = (postgres.state(name).await?, postgres.slot(name).await?);
    if slot.as_ref().is_some_and(|slot| !slot.is_ours) {
        return unfit(format!(
            "the slot {name} belongs to another database or program: set replication.slot"
        ));
    }
    let epoch = match (&state, &slot) {
        (Some(state), _) if state.phase == Phase::Creating => state.epoch,
        (Some(state), _) if matches!(state.phase, Phase::Dropped | Phase::Overrun) => {
            return unfit(format!("the slot {name} was dropped on purpose"));
        }
        (Some(_), None) => return unfit(format!("the slot {name} is gone, and with it the changes since")),
        (Some(_), Some(slot)) if slot.is_lost => {
            return unfit(format!("the log that the slot {name} needs is gone (see max_slot_wal_keep_size)"));
        }
        (Some(state), Some(_)) if state.system_identifier != identity.system_identifier => {
            return unfit(format!("this is another Postgres than the one that the slot {name} was made in"));
        }
        (Some(state), Some(_)) if state.timeline != identity.timeline => {
            return unfit(format!(
                "this Postgres was promoted or recovered since the slot {name} was made: it is on timeline {}, which was {}",
                identity.timeline, state.timeline
            ));
        }
        (Some(state), Some(_)) => {
            let is_backfilling = state.phase == Phase::Backfilling;
            return Ok(Slot { epoch: Epoch(state.epoch), is_backfilling });
        }
        (None, Some(_)) => {
            return unfit(format!(
                "the slot {name} is there, and the table replication does not know it: if nobody else reads it, drop it with \
                 SELECT pg_drop_replication_slot('{name}')"
            ));
        }
        (None, None) => {
            let newest = RowVersion(writer.newest_version().await?).epoch();
            match newest.0.checked_add(1) {
                Some(epoch) => epoch,
                None => {
                    return unfit("replication has begun anew 255 times: set another clickhouse.database");
                }
            }
        }
    };
    postgres.make_slot(name, epoch, &identity.system_identifier, identity.timeline).await?;
    tracing::info!(slot = name, epoch, "made the replication slot");
    Ok(Slot { epoch: Epoch(epoch), is_backfilling: true })
}
