//! Copies the rows that are older than the slot. Resumable: the state row remembers how far it has come.
//!
//! A backfilled row has the lowest version of its epoch, so a change that streams in meanwhile always holds; a row that was
//! not there any more when its page was read is buried at the end, or by the tombstone that streams in.

use std::time::Duration;

use super::batch::version;
use super::convert;
use super::flush::{Flusher, Wanted, read};
use super::postgres::Status;

const PAGE: i64 = 5000;
/// How often to look whether the transactions that were running at the start have ended.
const LOOK_EVERY: Duration = Duration::from_millis(100);
const TRY_AGAIN: Duration = Duration::from_secs(2);

/// Copies everything that is left to copy, and then says that the epoch is whole.
pub(super) async fn run(flusher: Flusher, epoch: u8) {
    let Flusher { postgres, slot, .. } = &flusher;
    wait_for_running(&flusher).await;
    let state = flusher.persist(|| postgres.state(slot)).await;
    let mut cursor = match state {
        Some(state) if state.epoch == epoch && state.status == Status::Backfilling => {
            state.backfill_cursor.unwrap_or_default()
        }
        _ => return,
    };
    tracing::info!(epoch, from = cursor, "copying the sessions that are older than the slot");
    let mut copied = 0;
    loop {
        let page = flusher.persist(|| read(postgres, Wanted::Behind(&cursor, PAGE))).await;
        let Some(last) = page.last() else { break };
        last.id().clone_into(&mut cursor);
        copied += page.len();
        let mut rows = Vec::with_capacity(page.len());
        for columns in &page {
            let environment = flusher.persist(|| flusher.environments.find(columns.environment_id())).await;
            // One that was made and removed since the page was read streams in.
            let Some(environment) = environment else { continue };
            match convert::row(columns, &environment, version(epoch, 0)) {
                Ok(row) => rows.push(row),
                Err(error) => tracing::error!(session.id = columns.id(), %error, "cannot copy a session"),
            }
        }
        flusher.store_rows(rows).await;
        flusher.persist(|| save(&flusher, epoch, &cursor)).await;
    }
    while let Err(fault) = flusher.clickhouse.bury_before(epoch).await {
        tracing::warn!(error = fault.summary(), "cannot bury what is not there any more, trying again");
        tokio::time::sleep(TRY_AGAIN).await;
    }
    flusher.persist(|| postgres.set_status(slot, epoch, Status::Streaming)).await;
    tracing::info!(epoch, copied, "every session is in ClickHouse");
}

async fn save(flusher: &Flusher, epoch: u8, cursor: &str) -> Result<(), sqlx::Error> {
    sqlx::query("UPDATE replication_state SET backfill_cursor = $3 WHERE slot = $1 AND epoch = $2")
        .bind(&flusher.slot)
        .bind(i16::from(epoch))
        .bind(cursor)
        .execute(flusher.postgres.pool())
        .await
        .map(drop)
}

/// A commit that the slot lies behind may not be visible yet. Whoever runs now may be it.
async fn wait_for_running(flusher: &Flusher) {
    let newest = || sqlx::query_as("SELECT pg_snapshot_xmax(pg_current_snapshot())::text");
    let (newest,): (String,) = flusher.persist(|| newest().fetch_one(flusher.postgres.pool())).await;
    loop {
        let over =
            || sqlx::query_as("SELECT pg_snapshot_xmin(pg_current_snapshot()) >= $1::xid8").bind(&newest);
        let (over,): (bool,) = flusher.persist(|| over().fetch_one(flusher.postgres.pool())).await;
        if over {
            return;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
