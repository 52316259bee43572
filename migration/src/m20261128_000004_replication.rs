//! What replication to ClickHouse needs: an index that names a row to it, and how far it is.
//!
//! `sessions_by_creation` becomes unique, which it was by what it holds, so that it can be the replica identity: together with the
//! organization and the project of the environment, which never change, its columns are the sort key of the ClickHouse table.
//! So a row that is deleted, or moves, is told with what its tombstone needs.

use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::DbBackend;

#[derive(DeriveMigrationName)]
pub struct Migration;

const STEPS: &[&str] = &[
    "DROP INDEX sessions_by_creation",
    "CREATE UNIQUE INDEX sessions_by_creation ON sessions (environment_id, created_at, id)",
    // `epoch` counts how often replication has begun anew, from 1 to 255. `phase`: creating, backfilling, streaming, dropped or
    // overrun. `built`: 1 once a backfill of any epoch was complete. `beats` counts heartbeats of leaders.
    "CREATE TABLE replication (
        slot {text} NOT NULL PRIMARY KEY,
        epoch SMALLINT NOT NULL,
        system_identifier {text} NOT NULL,
        timeline BIGINT NOT NULL,
        slot_lsn BIGINT NOT NULL,
        phase {text} NOT NULL,
        built SMALLINT NOT NULL DEFAULT 0,
        backfilled_to {text},
        swept_at BIGINT,
        flushed_lsn BIGINT NOT NULL DEFAULT 0,
        flushed_at BIGINT,
        leader {text},
        leader_seen_at BIGINT,
        beats BIGINT NOT NULL DEFAULT 0
    )",
    // Changes that ClickHouse will never take. They hold no row: the one in `sessions` is the truth.
    "CREATE TABLE replication_dead_letters (
        id {text} NOT NULL PRIMARY KEY,
        slot {text} NOT NULL,
        epoch SMALLINT NOT NULL,
        lsn BIGINT NOT NULL,
        environment_id {text} NOT NULL,
        session_id {text} NOT NULL,
        reason {text} NOT NULL,
        created_at BIGINT NOT NULL,
        replayed_at BIGINT
    )",
];

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let (connection, backend) = (manager.get_connection(), manager.get_database_backend());
        let text = if backend == DbBackend::Postgres { "TEXT COLLATE \"C\"" } else { "TEXT" };
        for step in STEPS {
            connection.execute_unprepared(&step.replace("{text}", text)).await?;
        }
        if backend == DbBackend::Postgres {
            let identity = "ALTER TABLE sessions REPLICA IDENTITY USING INDEX sessions_by_creation";
            connection.execute_unprepared(identity).await?;
        }
        Ok(())
    }
}
