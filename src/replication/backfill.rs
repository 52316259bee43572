//! Copies the rows that are older than the slot.
//!
//! They have the lowest version of their epoch, so what streams in meanwhile counts. What of an earlier epoch is not there any more gets
//! a tombstone at the end, and once more a while later: a writer of that epoch may have been frozen with an insert on its way.

use std::time::Duration;

use tokio::time::sleep;

use super::flush::Flusher;
use super::row::COLUMNS;
use super::{Context, Epoch, Lsn, RowVersion, surely};
use crate::domain::Error;
use crate::store::metadata::Phase;

/// Sessions copied in one step at most, and bytes that what is large in them may take together.
const PAGE: (u32, u32) = (500, 4 << 20);
/// How often it is looked whether older transactions are over.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How often it is asked whether a second sweep is due: of a TRUNCATE, or of an earlier epoch.
const SWEEP_POLL: Duration = Duration::from_secs(30);
/// Within what time an insert arrives that was sent under an earlier epoch.
const LATEST_INSERT: Duration = Duration::from_secs(600);

/// Copies the sessions that are older than the slot, then writes tombstones for late inserts of rows that are gone, a TRUNCATE's
/// included. Returns only if the epoch is over at the start; otherwise it runs until it is aborted with its term.
pub async fn run(flusher: &Flusher, slot: &str, epoch: Epoch) {
    let context = flusher.context();
    let postgres = &context.postgres;
    let ask = || async { Ok::<_, Error>(postgres.state(slot).await?.filter(|state| state.epoch == epoch.0)) };
    let Some(state) = surely("replication", ask).await else { return };
    if state.phase == Phase::Backfilling {
        copy(flusher, slot, epoch, state.backfilled_to.unwrap_or_default()).await;
    }
    loop {
        let Some((since, place)) = surely("replication", || postgres.pending_sweep(slot, epoch.0)).await
        else {
            sleep(SWEEP_POLL).await;
            continue;
        };
        let left = LATEST_INSERT.saturating_sub(Duration::from_millis(since.try_into().unwrap_or_default()));
        if left.is_zero() {
            flusher.tombstone_before(RowVersion::new(epoch, Lsn(place))).await;
            surely("replication", || postgres.note_swept(slot, epoch.0, place)).await;
        } else {
            sleep(left).await;
        }
    }
}

async fn copy(flusher: &Flusher, slot: &str, epoch: Epoch, mut after: String) {
    let (context, version) = (flusher.context(), RowVersion::new(epoch, Lsn(0)));
    let postgres = &context.postgres;
    wait_for_older_commits(context).await;
    let mut copied = 0;
    loop {
        let _reading = flusher.reading_older().await;
        let (rows, bytes) = PAGE;
        let page = surely("sessions", || postgres.page(COLUMNS, &after, rows, bytes)).await;
        let Some(last) = page.last().and_then(|columns| columns[0].clone()) else { break };
        copied += page.len();
        flusher.store_older(page, version).await;
        after = last;
        if !surely("replication", || postgres.backfilled(slot, epoch.0, Some(&after))).await {
            return;
        }
    }
    flusher.tombstone_before(version).await;
    flusher.note_whole(version, copied as u64).await;
    if surely("replication", || postgres.backfilled(slot, epoch.0, None)).await {
        tracing::info!(
            slot,
            epoch = epoch.0,
            copied,
            "copied the sessions that are older than the replication slot"
        );
    }
}

/// A transaction whose commit stands before the slot, and so is not streamed, may not be visible yet: its backend is late, or it
/// waits for a synchronous standby. Once every transaction that has begun by now is over, all of these are.
pub(super) async fn wait_for_older_commits(context: &Context) {
    let postgres = &context.postgres;
    let barrier = surely("transactions", || postgres.barrier()).await;
    let past = || postgres.is_past(&barrier);
    while !surely("transactions", past).await {
        sleep(LOOK_EVERY).await;
    }
}
