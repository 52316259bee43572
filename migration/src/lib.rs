//! Schema history of the metadata store, for SQLite and Postgres.
//!
//! A step is frozen once released, so it spells its tables out and does not import `entity`.

mod m20261123_000001_initial;
mod m20261123_000002_waitpoints;
mod m20261127_000003_given_keys;
mod m20261128_000004_replication;
mod m20261128_000005_replication_marks;

pub use sea_orm_migration::MigratorTrait;
use sea_orm_migration::prelude::{MigrationTrait, async_trait};

/// Every step, oldest first.
pub struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![
            Box::new(m20261123_000001_initial::Migration),
            Box::new(m20261123_000002_waitpoints::Migration),
            Box::new(m20261127_000003_given_keys::Migration),
            Box::new(m20261128_000004_replication::Migration),
            Box::new(m20261128_000005_replication_marks::Migration),
        ]
    }
}

impl Migrator {
    /// Names of every step that this binary knows, oldest first.
    pub fn names() -> Vec<String> {
        Self::migrations().iter().map(|step| step.name().to_owned()).collect()
    }
}
