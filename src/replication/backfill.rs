//! Copies the rows that are older than the slot.
//!
//! They have the lowest version of their epoch, so what streams in meanwhile counts. What of an earlier epoch is not there any more gets
//! a tombstone at the end.

use std::time::Duration;

use tokio::time::sleep;

use super::flush::{Flusher, surely};
use super::row::COLUMNS;
use super::{Epoch, Lsn, RowVersion};
use crate::store::metadata::ReplicationStore;

/// Sessions copied in one step. Each has metadata of up to a megabyte.
const PAGE: u64 = 500;
/// How often it is looked whether older transactions are over.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Copies what is left to copy under `epoch`, for as long as it takes. Ends as well when the epoch is over. To be begun once the
/// slot is there.
pub async fn run(flusher: &Flusher, postgres: &ReplicationStore, slot: &str, epoch: Epoch) {
    let ask = || async { Ok(postgres.state(slot).await?.filter(|state| state.epoch == epoch.0)) };
    let Some(state) = surely("replication", ask).await else { return };
    wait_for_older_commits(postgres).await;
    let (version, mut after) = (RowVersion::new(epoch, Lsn(0)), state.backfilled_to.unwrap_or_default());
    let mut copied = 0;
    loop {
        let page = surely("sessions", || postgres.page(COLUMNS, &after, PAGE)).await;
        let Some(last) = page.last().and_then(|columns| columns[0].clone()) else { break };
        copied += page.len();
        flusher.store_older(page, version).await;
        after = last;
        if !surely("replication", || postgres.backfilled(slot, epoch.0, Some(&after))).await {
            return;
        }
    }
    flusher.bury_before(version).await;
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
async fn wait_for_older_commits(postgres: &ReplicationStore) {
    let barrier = surely("transactions", || postgres.barrier()).await;
    let past = || postgres.is_past(&barrier);
    while !surely("transactions", past).await {
        sleep(LOOK_EVERY).await;
    }
}
