//! The runs of sessions, and waitpoints.
//!
//! `waitpoints_open` serves the pass that learns of waits made elsewhere, in order of creation over all environments;
//! `waitpoints_waiting` is the list of what is still open in one environment.

use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::DbBackend;

#[derive(DeriveMigrationName)]
pub struct Migration;

const TABLES: &[&str] = &[
    "CREATE TABLE session_runs (
        id {text} NOT NULL PRIMARY KEY,
        environment_id {text} NOT NULL REFERENCES environments (id),
        session_id {text} NOT NULL REFERENCES sessions (id),
        reason {text} NOT NULL,
        previous_run_id {text},
        request_key {text},
        triggered_at BIGINT NOT NULL
    )",
    "CREATE INDEX session_runs_by_session ON session_runs (environment_id, session_id, triggered_at, id)",
    "INSERT INTO session_runs (id, environment_id, session_id, reason, triggered_at)
        SELECT current_run_id, environment_id, id, 'initial', created_at FROM sessions",
    "CREATE TABLE waitpoints (
        id {text} NOT NULL PRIMARY KEY,
        environment_id {text} NOT NULL REFERENCES environments (id),
        session_id {text} NOT NULL REFERENCES sessions (id),
        io {text} NOT NULL,
        run_id {text} NOT NULL,
        after_seq_num BIGINT,
        timeout_at BIGINT,
        expires_at BIGINT,
        tags {json} NOT NULL,
        idempotency_key {text},
        key_expires_at BIGINT,
        created_at BIGINT NOT NULL,
        completed_at BIGINT,
        outcome {text},
        seq_num BIGINT
    )",
    "CREATE UNIQUE INDEX waitpoints_by_key ON waitpoints (environment_id, session_id, io, idempotency_key)
        WHERE idempotency_key IS NOT NULL",
    "CREATE INDEX waitpoints_by_creation ON waitpoints (environment_id, created_at, id)",
    "CREATE INDEX waitpoints_by_session ON waitpoints (environment_id, session_id, created_at, id)",
    "CREATE INDEX waitpoints_by_run ON waitpoints (environment_id, run_id, created_at, id)",
    "CREATE INDEX waitpoints_waiting ON waitpoints (environment_id, created_at, id) WHERE completed_at IS NULL",
    "CREATE INDEX waitpoints_open ON waitpoints (created_at, id) WHERE completed_at IS NULL",
    "CREATE TABLE waitpoint_tags (
        environment_id {text} NOT NULL,
        tag {text} NOT NULL,
        waitpoint_id {text} NOT NULL,
        PRIMARY KEY (environment_id, tag, waitpoint_id)
    ){clustered}",
];

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let [text, json, clustered] = match manager.get_database_backend() {
            DbBackend::Postgres => ["TEXT COLLATE \"C\"", "JSONB", ""],
            _ => ["TEXT", "TEXT", " WITHOUT ROWID"],
        };
        for statement in TABLES {
            let sql =
                statement.replace("{text}", text).replace("{json}", json).replace("{clustered}", clustered);
            manager.get_connection().execute_unprepared(&sql).await?;
        }
        Ok(())
    }
}
