//! Finds on Postgres what has been changed lately, for a replica that may not have heard of it.
//!
//! BRIN, because it does not keep updates from staying on their page, and costs next to nothing to hold.

use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::DbBackend;

#[derive(DeriveMigrationName)]
pub struct Migration;

const INDEX: &str =
    "CREATE INDEX sessions_by_change ON sessions USING brin (updated_at) WITH (pages_per_range = 32)";

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let connection = manager.get_connection();
        if manager.get_database_backend() == DbBackend::Postgres {
            connection.execute_unprepared(INDEX).await?;
        }
        Ok(())
    }
}
