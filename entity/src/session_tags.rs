//! `session_tags`: the tags of sessions once more, as the index that tag filters and tag lists walk.

use sea_orm::entity::prelude::*;

/// A row; the columns stand in the order of the key.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "session_tags")]
pub struct Model {
    /// The session's environment.
    #[sea_orm(primary_key, auto_increment = false)]
    pub environment_id: String,
    /// The tag.
    #[sea_orm(primary_key, auto_increment = false)]
    pub tag: String,
    /// The session's creation time.
    #[sea_orm(primary_key, auto_increment = false)]
    pub created_at: i64,
    /// The session.
    #[sea_orm(primary_key, auto_increment = false)]
    pub session_id: String,
}

/// None are declared: rows are joined by hand.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
