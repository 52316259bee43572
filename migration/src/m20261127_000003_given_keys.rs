//! Which keys were given verbatim, and are therefore never shown.

use sea_orm_migration::prelude::*;

#[derive(DeriveMigrationName)]
pub struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let connection = manager.get_connection();
        let add = "ALTER TABLE keys ADD COLUMN given BOOLEAN NOT NULL DEFAULT FALSE";
        connection.execute_unprepared(add).await?;
        // The label that a start has always given them.
        let mark = "UPDATE keys SET given = TRUE WHERE label = 'given at start'";
        connection.execute_unprepared(mark).await.map(drop)
    }
}
