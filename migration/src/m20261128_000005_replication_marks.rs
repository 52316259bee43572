//! What a replicator needs to see that either side was put back to an older state: the heartbeat that ClickHouse is known to have.
//! And the place of the last TRUNCATE, for a second sweep.

use sea_orm_migration::prelude::*;

#[derive(DeriveMigrationName)]
pub struct Migration;

const STEPS: &[&str] = &[
    "ALTER TABLE replication ADD COLUMN marked BIGINT NOT NULL DEFAULT 0",
    "ALTER TABLE replication ADD COLUMN truncated_lsn BIGINT NOT NULL DEFAULT 0",
];

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for step in STEPS {
            manager.get_connection().execute_unprepared(step).await?;
        }
        Ok(())
    }
}
