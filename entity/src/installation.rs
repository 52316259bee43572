//! `installation`: the one row that describes this store itself.

use sea_orm::entity::prelude::*;

/// A row; there is one, with `id` 1.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "installation")]
pub struct Model {
    /// Always 1.
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: i16,
    /// The log that belongs to this store, once one has claimed it.
    pub log_id: Option<String>,
    /// Grows with every change of any key.
    pub key_revision: i64,
}

/// None are declared: rows are joined by hand.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
