//! Sessions brought to ClickHouse once more, as Postgres has them: what was refused, and what differs.

use std::collections::HashMap;

use super::backfill::wait_for_older_commits;
use super::batch::RowChange;
use super::flush::{Flusher, tuple};
use super::row::{COLUMNS, SortKey, Version};
use super::slot::SlotError;
use super::{Context, Epoch, Lsn, RowVersion};
use crate::domain::tenant::Environment;
use crate::store::index::clickhouse::stored_as;
use crate::store::metadata::{DeadLetter, Phase};

/// Sessions that are stored at once, each with metadata of up to a megabyte.
pub(super) const PORTION: usize = 50;

/// What a replay has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replayed {
    /// Sessions that were stored.
    pub stored: usize,
    /// Those that were refused again.
    pub refused: usize,
}

/// The epoch that changes of `slot` are stored under.
///
/// # Errors
/// [`SlotError::Unfit`] while nothing is replicated.
pub async fn current_epoch(context: &Context, slot: &str) -> Result<Epoch, SlotError> {
    let state = context.postgres.state(slot).await?;
    match state.filter(|state| matches!(state.phase, Phase::Backfilling | Phase::Streaming)) {
        Some(state) => Ok(Epoch(state.epoch)),
        None => Err(SlotError::Unfit(format!(
            "nothing is replicated by the slot {slot}: see `sessiond replicate status`"
        ))),
    }
}

/// Stores sessions of an environment as they stand, and tombstones where ClickHouse has one that Postgres has not. What streams in
/// beside it outweighs it if it is newer. Returns how many changes were refused, which are dead letters then.
///
/// # Errors
/// [`SlotError`]; it may be tried again.
pub async fn repair(
    flusher: &Flusher,
    epoch: Epoch,
    environment: &Environment,
    ids: &[&str],
) -> Result<usize, SlotError> {
    let context = flusher.context();
    // In this order: whatever is committed later than what is read below stands at the position or behind it.
    let version = RowVersion::new(epoch, Lsn(context.postgres.position().await?.saturating_sub(1)));
    wait_for_older_commits(context).await;
    let rows = context.postgres.sessions(COLUMNS, ids, &[]).await?.unwrap_or_default();
    let mut changes = HashMap::new();
    for columns in rows {
        // One without its key cannot be.
        let Ok(row) = Version::new(tuple(columns)) else { continue };
        changes.insert(row.key().clone(), RowChange { version, xid: None, row: Some(row) });
    }
    for row in stored_as(&context.clickhouse, environment, ids).await? {
        let key =
            SortKey { environment: row.environment_id, created_at: row.created_at, session: row.session_id };
        changes.entry(key).or_insert(RowChange { version, xid: None, row: None });
    }
    Ok(flusher.store_whole(changes).await)
}

/// Stores what the dead letters of `slot` are of, as it stands by now.
///
/// # Errors
/// [`SlotError`]; sessions replayed before the error stay replayed.
pub async fn replay(flusher: &Flusher, slot: &str) -> Result<Replayed, SlotError> {
    let (context, mut replayed) = (flusher.context(), Replayed::default());
    let epoch = current_epoch(context, slot).await?;
    // Read before the first is replayed: a session that is refused again is a new letter. Those of an epoch that has begun just
    // now are the next replay's.
    let mut letters = context.postgres.dead_letters(slot, None).await?;
    letters.retain(|letter| letter.epoch == epoch.0);
    let mut by_environment: HashMap<&str, Vec<&DeadLetter>> = HashMap::new();
    for letter in &letters {
        by_environment.entry(&letter.environment).or_default().push(letter);
    }
    for (environment, letters) in by_environment {
        let environment = flusher.environment(environment, None).await;
        for portion in letters.chunks(PORTION) {
            let mut ids: Vec<_> = portion.iter().map(|letter| letter.session.as_str()).collect();
            ids.sort_unstable();
            ids.dedup();
            // Of one that neither side knows there is nothing to be stored.
            let refused = match &environment {
                Some(environment) => repair(flusher, epoch, environment, &ids).await?,
                None => 0,
            };
            for letter in portion {
                context.postgres.replayed(&letter.id).await?;
            }
            replayed.refused += refused;
            replayed.stored += ids.len().saturating_sub(refused);
        }
    }
    Ok(replayed)
}
