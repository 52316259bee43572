//! `waitpoint_tags`: the tags of waitpoints once more, as the index that tag filters walk.

use sea_orm::entity::prelude::*;

/// A row; the columns stand in the order of the key.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "waitpoint_tags")]
pub struct Model {
    /// The waitpoint's environment.
    #[sea_orm(primary_key, auto_increment = false)]
    pub environment_id: String,
    /// The tag.
    #[sea_orm(primary_key, auto_increment = false)]
    pub tag: String,
    /// The waitpoint.
    #[sea_orm(primary_key, auto_increment = false)]
    pub waitpoint_id: String,
}

/// None are declared: rows are joined by hand.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
