//! The publication and the slot, made where they are missing, and the epoch that a slot is read under.
//!
//! A slot that is lost, and whatever else means that changes are missing between both sides, is a [`Loss`]: the next leader begins a new epoch
//! and copies everything.

use std::time::Duration;

use tokio::time::timeout;

use super::pgwire::{Identity, SourceOptions, identify};
use super::source::SourceError;
use super::term::TermOptions;
use super::{Context, Epoch, Lsn, RowVersion, millis};
use crate::domain::{Backoff, Error};
use crate::store::index::clickhouse::{Fault, Marker, SessionWriter, mark, markers};
use crate::store::metadata::{Phase, Place, Published, ReplicationState, SetupLock};

/// Longest that it is waited until the reader of a slot has let go of it.
const DROP_PATIENCE: Duration = Duration::from_secs(20);

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

/// Why what was replicated so far does not count any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Loss {
    /// Somebody has dropped the slot, or it was not copied with its server.
    #[error("the slot is gone, and with it the changes since")]
    Slot,
    /// The server has dropped what the slot needs.
    #[error("the log that the slot needs is gone (see max_slot_wal_keep_size)")]
    Log,
    /// It was dropped for what it kept.
    #[error("the slot kept more of the log than replication.max_wal")]
    Overrun,
    /// The slot is of another server.
    #[error("this is another Postgres than the one that the slot was made in")]
    System,
    /// The slot is of another timeline.
    #[error(
        "this Postgres was promoted or recovered since the slot was made: it is on timeline {now}, which was {then}"
    )]
    Timeline {
        /// When the slot was made.
        then: u32,
        /// Now.
        now: u32,
    },
    /// There is no publication.
    #[error("the publication is gone, and changes that were made without it cannot be told")]
    Publication,
    /// ClickHouse has more than Postgres knows of.
    #[error("this Postgres was put back to an older state of itself")]
    Rewound,
    /// ClickHouse has less than Postgres knows to be there.
    #[error("ClickHouse has lost what this slot had stored, or was put back to an older state")]
    ClickHouse,
}

/// What there is of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// It can be read. What its changes are stored under.
    Ready(Epoch),
    /// Nobody has made it.
    Missing,
    /// Somebody has begun to make it, under this epoch.
    Unfinished(Epoch),
    /// It is to be made anew, after this epoch.
    Lost(Epoch, Loss),
}

/// What [`look`] has seen.
#[derive(Debug)]
pub struct Seen {
    /// What there is of the slot.
    pub found: Found,
    identity: Identity,
    published: Published,
}

/// Finds the slot of `options`, or makes it, its publication first: what is published when a change is made decides whether it is
/// told. Of several processes one makes it. Returns the epoch that it is read under.
///
/// # Errors
/// [`SlotError`].
pub async fn ensure(options: &SourceOptions, context: &Context) -> Result<Epoch, SlotError> {
    // Mostly there is nothing to be made, and whoever is frozen here must not keep others from it.
    if let Found::Ready(epoch) = look(options, context).await?.found {
        return Ok(epoch);
    }
    let lock = context.postgres.lock().await?;
    let made = make(options, context, &lock).await;
    lock.release().await;
    made
}

async fn make(options: &SourceOptions, context: &Context, lock: &SetupLock) -> Result<Epoch, SlotError> {
    let (name, postgres) = (&options.slot, &context.postgres);
    let Seen { found, identity, published } = look(options, context).await?;
    // Before anything is made: another replication may fill the tables.
    newest_marker(context, name).await?;
    let epoch = match found {
        Found::Ready(epoch) => return Ok(epoch),
        Found::Missing => next_epoch(context, Epoch(0)).await?,
        // Nothing was stored under it, unless Postgres was put back since.
        Found::Unfinished(Epoch(epoch)) => next_epoch(context, Epoch(epoch.saturating_sub(1))).await?,
        Found::Lost(epoch, loss) => {
            tracing::warn!(slot = name, %loss, "the slot is made anew, and everything is copied");
            next_epoch(context, epoch).await?
        }
    };
    if published == Published::Nothing {
        postgres.publish(&options.publication).await?;
    }
    if !postgres.make_slot(lock, name, epoch.0, &identity.system_identifier, identity.timeline).await? {
        return unfit(format!("somebody else has made or dropped the slot {name} meanwhile"));
    }
    context.metrics.epoch_begun();
    tracing::info!(slot = name, epoch = epoch.0, "made the replication slot");
    Ok(epoch)
}

/// The newest mark that the replication by `slot` has left in ClickHouse.
///
/// # Errors
/// [`SlotError::Unfit`] if another replication fills the tables.
pub async fn newest_marker(context: &Context, slot: &str) -> Result<Option<Marker>, SlotError> {
    let (ours, database) = (installation(context).await?, context.clickhouse.database());
    let mut newest: Option<Marker> = None;
    for marker in markers(&context.clickhouse).await? {
        let Marker { installation, slot: by, epoch, .. } = &marker;
        if *installation != ours {
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
        if newest.as_ref().is_none_or(|newest| newest.epoch < *epoch) {
            newest = Some(marker);
        }
    }
    Ok(newest)
}

/// Leaves heartbeat `beat` in ClickHouse, with the place up to which everything is there, then notes in Postgres that it is. False
/// if the epoch is over.
///
/// # Errors
/// [`SlotError`].
pub async fn leave_mark(
    context: &Context,
    term: &TermOptions,
    epoch: Epoch,
    (beat, reached): (u64, Lsn),
) -> Result<bool, SlotError> {
    let marker = Marker {
        installation: installation(context).await?,
        slot: term.slot.clone(),
        epoch: epoch.0,
        beat,
        lsn: reached.0,
        heartbeat_ms: millis(term.heartbeat),
    };
    mark(&context.clickhouse, &marker).await?;
    Ok(context.postgres.marked(&term.slot, epoch.0, beat).await?)
}

/// Whether Postgres or ClickHouse was restored to an older state. A heartbeat is counted in Postgres first, left in
/// ClickHouse then, and noted in Postgres last; others may be at it. So `marked` is to be asked for first, then the mark and the greatest
/// version in ClickHouse, and what Postgres remembers, and up to where its log is on disk, last.
pub fn judge(
    marked: u64,
    (marker, newest): (Option<&Marker>, RowVersion),
    (state, flushed): (&ReplicationState, Lsn),
) -> Option<Loss> {
    let epoch = Epoch(state.epoch);
    let of_this = marker.filter(|marker| marker.epoch == epoch.0);
    let is_ahead = marker.is_some_and(|marker| marker.epoch > epoch.0)
        || of_this.is_some_and(|marker| marker.beat > state.beats || marker.lsn > flushed.0)
        || newest > RowVersion::new(epoch, flushed);
    if is_ahead {
        return Some(Loss::Rewound);
    }
    let has_lost = of_this.map_or(0, |marker| marker.beat) < marked;
    has_lost.then_some(Loss::ClickHouse)
}

/// What names the database that is copied from.
///
/// # Errors
/// [`Error::Unavailable`].
pub async fn installation(context: &Context) -> Result<String, Error> {
    let Place { system_identifier, database } = context.postgres.place().await?;
    Ok(format!("{system_identifier}/{database}"))
}

/// What is said of a slot that nobody is to make.
fn dropped(slot: &str) -> String {
    format!(
        "an operator has dropped the slot {slot}: `sessiond replicate start` has it made anew, and everything copied"
    )
}

/// The greatest version that ClickHouse has.
///
/// # Errors
/// [`Fault`].
pub async fn newest_version(context: &Context) -> Result<RowVersion, Fault> {
    Ok(RowVersion(SessionWriter::new(context.clickhouse.clone()).newest_version().await?))
}

/// The one that outweighs whatever is in ClickHouse, and `old`.
///
/// # Errors
/// [`SlotError::Unfit`] if there is none.
pub async fn next_epoch(context: &Context, old: Epoch) -> Result<Epoch, SlotError> {
    let newest = newest_version(context).await?.epoch();
    let marked = markers(&context.clickhouse).await?.into_iter().map(|marker| marker.epoch).max();
    match newest.max(old).0.max(marked.unwrap_or_default()).checked_add(1) {
        Some(epoch) => Ok(Epoch(epoch)),
        None => unfit("replication has begun anew 255 times: set another clickhouse.database"),
    }
}

/// Drops the slot `name` if nobody is to read it any more, or if it keeps more than `max_wal` bytes of the log. Asks ClickHouse
/// nothing, which may be away for just that long. To be called while nobody reads it.
///
/// # Errors
/// [`Error::Unavailable`].
pub async fn release(context: &Context, name: &str, max_wal: u64) -> Result<(), Error> {
    let postgres = &context.postgres;
    // In this order: of a slot that is made in between it is not known yet what it keeps.
    let Some(state) = postgres.state(name).await? else { return Ok(()) };
    let Some(slot) = postgres.slot(name).await?.filter(|slot| slot.is_ours) else { return Ok(()) };
    let is_over = match state.phase {
        Phase::Creating => false,
        Phase::Dropped | Phase::Overrun => true,
        Phase::Backfilling | Phase::Streaming => {
            slot.retained > max_wal && overrun(context, name, Epoch(state.epoch), slot.retained).await?
        }
    };
    if is_over && postgres.drop_slot(name).await? {
        tracing::warn!(slot = name, "dropped the replication slot");
    }
    Ok(())
}

/// Sets the phase `overrun` of a slot that keeps more than `max_wal`. True if it was being replicated.
///
/// # Errors
/// [`Error::Unavailable`].
pub async fn overrun(context: &Context, name: &str, epoch: Epoch, retained: u64) -> Result<bool, Error> {
    let was_read = context.postgres.overrun(name, epoch.0).await?;
    if was_read {
        context.metrics.overrun();
        tracing::error!(
            slot = name,
            retained,
            "the slot keeps more of the log than replication.max_wal: it is dropped, and everything is copied anew once ClickHouse answers"
        );
    }
    Ok(was_read)
}

/// Drops the slot `name`, whoever reads it, and has nobody make it anew before [`start`].
///
/// # Errors
/// [`SlotError::Unfit`] if it is another program's, or was never made, or cannot be taken from its reader.
pub async fn drop_slot(context: &Context, name: &str) -> Result<(), SlotError> {
    let postgres = &context.postgres;
    if postgres.slot(name).await?.is_some_and(|slot| !slot.is_ours) {
        return unfit(foreign(name));
    }
    if !postgres.forbid(name).await? {
        return unfit(format!("no replicator has made the slot {name}"));
    }
    let dropping = async {
        let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_millis(500));
        loop {
            // Its reader would find out at its next heartbeat; a process that makes it waits for transactions of others.
            postgres.disconnect(name).await?;
            match postgres.drop_slot(name).await {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) => {
                    tracing::debug!(error = &error as &dyn std::error::Error, "the slot is not dropped yet");
                }
            }
            backoff.pause().await;
        }
    };
    match timeout(DROP_PATIENCE, dropping).await {
        Ok(dropped) => dropped,
        Err(_) => unfit(format!("the slot {name} is still read: nobody reads it again, so drop it again")),
    }
}

/// Has the slot `name` made anew that [`drop_slot`] has dropped.
///
/// # Errors
/// [`SlotError::Unfit`] if it has not.
pub async fn start(context: &Context, name: &str) -> Result<(), SlotError> {
    match context.postgres.allow(name).await? {
        true => Ok(()),
        false => unfit(format!("the slot {name} is not one that `sessiond replicate drop-slot` has dropped")),
    }
}

fn foreign(name: &str) -> String {
    format!("the slot {name} belongs to another database or program: set replication.slot")
}

/// Looks at the slot of `options`, and at what it needs. Changes nothing, and asks ClickHouse nothing.
///
/// # Errors
/// As [`ensure`].
pub async fn look(options: &SourceOptions, context: &Context) -> Result<Seen, SlotError> {
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
        return unfit(foreign(name));
    }
    let found = match (state, slot) {
        (None, None) => Found::Missing,
        // It may be of another program that is only away, and what it keeps would be lost.
        (None, Some(_)) => {
            return unfit(format!(
                "the slot {name} is there, and the table replication does not know it: if nobody else reads it, drop it with \
                 SELECT pg_drop_replication_slot('{name}')"
            ));
        }
        (Some(state), slot) => {
            let (epoch, then, now) = (Epoch(state.epoch), state.timeline, identity.timeline);
            let lost = |loss| Found::Lost(epoch, loss);
            match (state.phase, slot) {
                (Phase::Dropped, _) => return unfit(dropped(name)),
                (Phase::Creating, _) => Found::Unfinished(epoch),
                (Phase::Overrun, _) => lost(Loss::Overrun),
                _ if state.system_identifier != identity.system_identifier => lost(Loss::System),
                _ if then != now => lost(Loss::Timeline { then, now }),
                (_, None) => lost(Loss::Slot),
                (_, Some(slot)) if slot.is_lost => lost(Loss::Log),
                _ if published == Published::Nothing => lost(Loss::Publication),
                _ => Found::Ready(epoch),
            }
        }
    };
    Ok(Seen { found, identity, published })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(beats: u64, marked: u64) -> ReplicationState {
        ReplicationState {
            epoch: 3,
            system_identifier: "1".to_owned(),
            timeline: 1,
            phase: Phase::Streaming,
            backfilled_to: None,
            beats,
            flushed: 0,
            leader: None,
            stalled: 0,
            marked,
        }
    }

    fn marker(epoch: u8, beat: u64, lsn: u64) -> Marker {
        Marker { installation: "1/d".to_owned(), slot: "s".to_owned(), epoch, beat, lsn, heartbeat_ms: 1 }
    }

    #[test]
    fn either_side_that_was_put_back_is_seen() {
        let version = |epoch, place| RowVersion::new(Epoch(epoch), Lsn(place));
        for (marker, newest, state, expected) in [
            (None, version(0, 9), state(0, 0), None),
            (None, version(2, 900), state(5, 0), None),
            (Some(marker(2, 90, 90)), version(2, 900), state(5, 0), None),
            (Some(marker(3, 5, 40)), version(3, 50), state(5, 5), None),
            (Some(marker(3, 5, 40)), version(3, 50), state(7, 4), None),
            (None, version(3, 50), state(5, 1), Some(Loss::ClickHouse)),
            (Some(marker(2, 90, 40)), version(3, 50), state(5, 1), Some(Loss::ClickHouse)),
            (Some(marker(3, 4, 40)), version(3, 50), state(7, 5), Some(Loss::ClickHouse)),
            (Some(marker(3, 6, 40)), version(3, 50), state(5, 5), Some(Loss::Rewound)),
            (Some(marker(3, 5, 51)), version(3, 50), state(5, 5), Some(Loss::Rewound)),
            (Some(marker(3, 5, 40)), version(3, 51), state(5, 5), Some(Loss::Rewound)),
            (Some(marker(4, 1, 40)), version(3, 50), state(5, 5), Some(Loss::Rewound)),
            (None, version(4, 1), state(5, 0), Some(Loss::Rewound)),
        ] {
            assert_eq!(
                judge(state.marked, (marker.as_ref(), newest), (&state, Lsn(50))),
                expected,
                "{marker:?} {newest:?} {state:?}"
            );
        }
    }
}
