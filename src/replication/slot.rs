//! The publication and the slot, made where they are missing, and the epoch that a slot is read under.

use super::pgwire::{SourceOptions, identify};
use super::source::SourceError;
use super::{Context, Epoch, RowVersion};
use crate::domain::Error;
use crate::store::index::clickhouse::{Fault, Marker, SessionWriter, markers};
use crate::store::metadata::{Phase, Place, Published};

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

/// What there is of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// It can be read. What its changes are stored under.
    Ready(Epoch),
    /// It is not there yet, and can be made: under this epoch, if somebody has begun to, otherwise under the next one.
    Missing(Option<Epoch>),
}

/// Finds the slot of `options`, or makes it, its publication first: what is published when a change is made decides whether it is
/// told. Of several processes one makes it. Returns the epoch that it is read under.
///
/// # Errors
/// [`SlotError`]. A slot that is lost, or of another server than it was, is refused.
pub async fn ensure(options: &SourceOptions, context: &Context) -> Result<Epoch, SlotError> {
    context.postgres.alone(ensure_alone(options, context)).await?
}

async fn ensure_alone(options: &SourceOptions, context: &Context) -> Result<Epoch, SlotError> {
    let (name, postgres) = (&options.slot, &context.postgres);
    let epoch = match look(options, context).await? {
        Found::Ready(epoch) => return Ok(epoch),
        Found::Missing(Some(epoch)) => epoch,
        Found::Missing(None) => next_epoch(context, Epoch(0)).await?,
    };
    // Before anything is made: another replication may fill the tables.
    is_marked(context, name, Epoch(u8::MAX)).await?;
    if postgres.published(&options.publication).await? == Published::Nothing {
        postgres.publish(&options.publication).await?;
    }
    let identity = identify(options).await?;
    postgres.make_slot(name, epoch.0, &identity.system_identifier, identity.timeline).await?;
    tracing::info!(slot = name, epoch = epoch.0, "made the replication slot");
    Ok(epoch)
}

/// Whether the replication by `slot` under `epoch` has left its mark in ClickHouse, which then has everything that it has stored.
///
/// # Errors
/// [`SlotError::Unfit`] if another replication fills the tables.
pub async fn is_marked(context: &Context, slot: &str, epoch: Epoch) -> Result<bool, SlotError> {
    let (ours, database) = (installation(context).await?, context.clickhouse.database());
    let mut found = false;
    for Marker { installation, slot: by, epoch: under, .. } in markers(&context.clickhouse).await? {
        if installation != ours {
            return unfit(format!(
                "{database} in ClickHouse is filled from another database, {installation}: set another clickhouse.database, or, if that \
                 one is gone for good, ALTER TABLE {database}.replication_markers DELETE WHERE installation = '{installation}'"
            ));
        }
        if by != slot {
            return unfit(format!(
                "{database} in ClickHouse is filled by the slot {by}: set replication.slot, or another clickhouse.database, or, if that \
                 one is gone for good, ALTER TABLE {database}.replication_markers DELETE WHERE slot = '{by}'"
            ));
        }
        if under > epoch.0 {
            return unfit(format!(
                "{database} in ClickHouse has been filled under epoch {under} of the slot {slot}, and Postgres knows of {}: \
                 it was put back to an older state. {}",
                epoch.0,
                anew(slot)
            ));
        }
        found |= under == epoch.0;
    }
    Ok(found)
}

/// What names the database that is copied from.
///
/// # Errors
/// [`Error::Unavailable`].
pub async fn installation(context: &Context) -> Result<String, Error> {
    let Place { system_identifier, database } = context.postgres.place().await?;
    Ok(format!("{system_identifier}/{database}"))
}

/// How an operator begins anew.
fn anew(slot: &str) -> String {
    format!(
        "To copy everything anew: SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = '{slot}'; \
         DELETE FROM replication WHERE slot = '{slot}'"
    )
}

/// The one that outweighs whatever is in ClickHouse, and `old`.
///
/// # Errors
/// [`SlotError::Unfit`] if there is none.
pub async fn next_epoch(context: &Context, old: Epoch) -> Result<Epoch, SlotError> {
    let newest = SessionWriter::new(context.clickhouse.clone()).newest_version().await?;
    let marked = markers(&context.clickhouse).await?.into_iter().map(|marker| marker.epoch).max();
    match RowVersion(newest).epoch().max(old).0.max(marked.unwrap_or_default()).checked_add(1) {
        Some(epoch) => Ok(Epoch(epoch)),
        None => unfit("replication has begun anew 255 times: set another clickhouse.database"),
    }
}

/// Looks at the slot of `options`, and at what it needs. Changes nothing, and asks ClickHouse nothing.
///
/// # Errors
/// As [`ensure`].
pub async fn look(options: &SourceOptions, context: &Context) -> Result<Found, SlotError> {
    let (name, publication, postgres) = (&options.slot, &options.publication, &context.postgres);
    let is_name = |byte: u8| byte == b'_' || byte.is_ascii_lowercase() || byte.is_ascii_digit();
    if !name.bytes().all(is_name) || !(1..=63).contains(&name.len()) || name.as_bytes()[0].is_ascii_digit() {
        return unfit(format!(
            "{name:?} cannot be a slot: a name is of 1 to 63 small letters, digits and underscores, and begins with no digit"
        ));
    }
    let identity = identify(options).await?;
    let (place, ours) = (postgres.place().await?, context.metadata.place().await?);
    if place != ours
        || (&place.system_identifier, &place.database) != (&identity.system_identifier, &identity.database)
    {
        return unfit("replication.url leads to another database than metadata.url");
    }
    if let Some(obstacle) = postgres.obstacle().await? {
        return unfit(obstacle);
    }
    let published = postgres.published(publication).await?;
    if published == Published::Otherwise {
        return unfit(format!(
            "the publication {publication} does not publish all changes of sessions and nothing else: drop it, or set \
             replication.publication"
        ));
    }
    let (state, slot) = (postgres.state(name).await?, postgres.slot(name).await?);
    if slot.as_ref().is_some_and(|slot| !slot.is_ours) {
        return unfit(format!(
            "the slot {name} belongs to another database or program: set replication.slot"
        ));
    }
    let Some(state) = state else {
        if slot.is_some() {
            return unfit(format!(
                "the slot {name} is there, and the table replication does not know it: if nobody else reads it, drop it with \
                 SELECT pg_drop_replication_slot('{name}')"
            ));
        }
        return Ok(Found::Missing(None));
    };
    match state.phase {
        Phase::Creating => return Ok(Found::Missing(Some(Epoch(state.epoch)))),
        Phase::Dropped | Phase::Overrun => {
            return unfit(format!("the slot {name} was dropped on purpose. {}", anew(name)));
        }
        Phase::Backfilling | Phase::Streaming => {}
    }
    match slot {
        None => unfit(format!("the slot {name} is gone, and with it the changes since. {}", anew(name))),
        Some(slot) if slot.is_lost => unfit(format!(
            "the log that the slot {name} needs is gone (see max_slot_wal_keep_size). {}",
            anew(name)
        )),
        Some(_) if state.system_identifier != identity.system_identifier => unfit(format!(
            "this is another Postgres than the one that the slot {name} was made in. {}",
            anew(name)
        )),
        Some(_) if state.timeline != identity.timeline => unfit(format!(
            "this Postgres was promoted or recovered since the slot {name} was made: it is on timeline {}, which was {}. {}",
            identity.timeline,
            state.timeline,
            anew(name)
        )),
        Some(_) if published == Published::Nothing => unfit(format!(
            "the publication {publication} is gone, and changes that were made without it cannot be told. {}",
            anew(name)
        )),
        Some(_) => Ok(Found::Ready(Epoch(state.epoch))),
    }
}
