//! Environments, keys, sessions and the tag index.
//!
//! Plain SQL, because partial indexes, collations and `WITHOUT ROWID` are what the lists live on. Where the two
//! databases differ a word in braces stands for the type or clause. Ids and tags are compared byte by byte.
//!
//! Indexes of `sessions`, all in list order (`created_at`, `id`) behind what they select by:
//! one for no filter, one each for `kind` and `task_identifier`, and three partial ones that split the rows into
//! closed, live and lapsed. `lapsed` is set by a sweep some time after `expires_at`, so the rows whose hint is
//! stale are found through `sessions_by_expiry`.

use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::DbBackend;

#[derive(DeriveMigrationName)]
pub struct Migration;

const TABLES: &[&str] = &[
    "CREATE TABLE environments (
        id {text} NOT NULL PRIMARY KEY,
        organization {text} NOT NULL,
        project {text} NOT NULL,
        slug {text} NOT NULL,
        kind {text} NOT NULL,
        created_at BIGINT NOT NULL,
        UNIQUE (organization, project, slug)
    )",
    "CREATE TABLE keys (
        id {text} NOT NULL PRIMARY KEY,
        environment_id {text} NOT NULL REFERENCES environments (id),
        label {text} NOT NULL,
        lookup {bytes} NOT NULL UNIQUE,
        sealed_secret {bytes} NOT NULL,
        hint {text} NOT NULL,
        scopes {json},
        created_at BIGINT NOT NULL,
        ends_at BIGINT
    )",
    "CREATE INDEX keys_by_environment ON keys (environment_id, created_at, id)",
    "CREATE TABLE sessions (
        id {text} NOT NULL PRIMARY KEY,
        environment_id {text} NOT NULL REFERENCES environments (id),
        external_id {text},
        request_key {text},
        kind {text} NOT NULL,
        task_identifier {text} NOT NULL,
        tags {json} NOT NULL,
        metadata {json},
        trigger_config {json},
        current_run_id {text} NOT NULL,
        created_at BIGINT NOT NULL,
        updated_at BIGINT NOT NULL,
        expires_at BIGINT,
        closed_at BIGINT,
        closed_reason {text},
        lapsed SMALLINT NOT NULL DEFAULT 0
    )",
    "CREATE UNIQUE INDEX sessions_by_external_id ON sessions (environment_id, external_id)",
    "CREATE UNIQUE INDEX sessions_by_request_key ON sessions (environment_id, request_key)
        WHERE request_key IS NOT NULL",
    "CREATE INDEX sessions_by_creation ON sessions (environment_id, created_at, id)",
    "CREATE INDEX sessions_by_kind ON sessions (environment_id, kind, created_at, id)",
    "CREATE INDEX sessions_by_task ON sessions (environment_id, task_identifier, created_at, id)",
    "CREATE INDEX sessions_closed ON sessions (environment_id, created_at, id) WHERE closed_at IS NOT NULL",
    "CREATE INDEX sessions_live ON sessions (environment_id, created_at, id, expires_at)
        WHERE closed_at IS NULL AND lapsed = 0",
    "CREATE INDEX sessions_lapsed ON sessions (environment_id, created_at, id, expires_at)
        WHERE closed_at IS NULL AND lapsed = 1",
    "CREATE INDEX sessions_by_expiry ON sessions (lapsed, environment_id, expires_at, created_at, id)
        WHERE closed_at IS NULL AND expires_at IS NOT NULL",
    "CREATE TABLE session_tags (
        environment_id {text} NOT NULL,
        tag {text} NOT NULL,
        created_at BIGINT NOT NULL,
        session_id {text} NOT NULL,
        PRIMARY KEY (environment_id, tag, created_at, session_id)
    ){clustered}",
    "CREATE TABLE installation (
        id SMALLINT NOT NULL PRIMARY KEY CHECK (id = 1),
        log_id {text},
        key_revision BIGINT NOT NULL
    )",
    "INSERT INTO installation (id, log_id, key_revision) VALUES (1, NULL, 0)",
];

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let [text, bytes, json, clustered] = match manager.get_database_backend() {
            DbBackend::Postgres => ["TEXT COLLATE \"C\"", "BYTEA", "JSONB", ""],
            _ => ["TEXT", "BLOB", "TEXT", " WITHOUT ROWID"],
        };
        for statement in TABLES {
            let sql = statement
                .replace("{text}", text)
                .replace("{bytes}", bytes)
                .replace("{json}", json)
                .replace("{clustered}", clustered);
            manager.get_connection().execute_unprepared(&sql).await?;
        }
        Ok(())
    }
}
