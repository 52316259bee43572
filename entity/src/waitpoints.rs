//! `waitpoints`: who waits for input, and how each wait ended.

use sea_orm::entity::prelude::*;

/// A row.
#[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
#[sea_orm(table_name = "waitpoints")]
pub struct Model {
    /// `waitpoint_...`
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: String,
    /// The environment that owns it.
    pub environment_id: String,
    /// The session whose channel it waits on.
    pub session_id: String,
    /// `in` or `out`.
    pub io: String,
    /// The run that waits.
    pub run_id: String,
    /// The last record that the waiter has seen.
    pub after_seq_num: Option<i64>,
    /// When it times out.
    pub timeout_at: Option<i64>,
    /// When its session expires, which never changes.
    pub expires_at: Option<i64>,
    /// A list of words.
    pub tags: Json,
    /// The caller's key, while it counts.
    pub idempotency_key: Option<String>,
    /// Until when the key counts.
    pub key_expires_at: Option<i64>,
    /// Creation time.
    pub created_at: i64,
    /// When the wait ended; written once, with the two columns below.
    pub completed_at: Option<i64>,
    /// `record`, `timeout`, `closed` or `expired`.
    pub outcome: Option<String>,
    /// The record that ended it.
    pub seq_num: Option<i64>,
}

/// None are declared: rows are joined by hand.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
