//! Which keys were given verbatim, and are therefore never shown.

use sea_orm_migration::prelude::*;

#[derive(DeriveMigrationName)]
pub struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let sql = "ALTER TABLE keys ADD COLUMN given BOOLEAN NOT NULL DEFAULT FALSE";
        manager.get_connection().execute_unprepared(sql).await.map(drop)
    }
}
