//! What the replicator to ClickHouse keeps in Postgres, and the index that names a row to it.
//!
//! `sessions_by_creation` becomes unique, so that it can be the replica identity: together with the environment's
//! organization and project, which never change, its columns are the sort key of the ClickHouse table.

use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::DbBackend;

#[derive(DeriveMigrationName)]
pub struct Migration;

const INDEX: &[&str] = &[
    "DROP INDEX sessions_by_creation",
    "CREATE UNIQUE INDEX sessions_by_creation ON sessions (environment_id, created_at, id)",
];

const TABLES: &[&str] = &[
    "CREATE TABLE replication_state (
        slot TEXT COLLATE \"C\" NOT NULL PRIMARY KEY,
        epoch SMALLINT NOT NULL CHECK (epoch BETWEEN 1 AND 255),
        system_identifier TEXT NOT NULL,
        timeline BIGINT NOT NULL,
        slot_lsn BIGINT NOT NULL,
        status TEXT NOT NULL,
        backfill_cursor TEXT COLLATE \"C\",
        flushed_lsn BIGINT NOT NULL,
        leader TEXT,
        leader_seen_at BIGINT,
        changed_at BIGINT NOT NULL
    )",
    "CREATE TABLE replication_dead_letters (
        slot TEXT COLLATE \"C\" NOT NULL,
        session_id TEXT COLLATE \"C\" NOT NULL,
        environment_id TEXT COLLATE \"C\" NOT NULL,
        version NUMERIC(20) NOT NULL,
        error TEXT NOT NULL,
        found_at BIGINT NOT NULL,
        PRIMARY KEY (slot, session_id)
    )",
];

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let connection = manager.get_connection();
        for sql in INDEX {
            connection.execute_unprepared(sql).await?;
        }
        if manager.get_database_backend() == DbBackend::Postgres {
            for sql in TABLES {
                connection.execute_unprepared(sql).await?;
            }
        }
        Ok(())
    }
}
