//! `environments`: the unit of tenancy.

use sea_orm::entity::prelude::*;

/// A row.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "environments")]
pub struct Model {
    /// `env_...`
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: String,
    /// Organization slug.
    pub organization: String,
    /// Project slug.
    pub project: String,
    /// Environment slug.
    pub slug: String,
    /// `dev`, `stg`, `preview` or `prod`.
    pub kind: String,
    /// Creation time.
    pub created_at: i64,
}

/// None are declared: rows are joined by hand.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
