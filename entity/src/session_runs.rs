//! `session_runs`: every run that a session has had.

use sea_orm::entity::prelude::*;

/// A row.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "session_runs")]
pub struct Model {
    /// `run_...`
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: String,
    /// The session's environment.
    pub environment_id: String,
    /// The session.
    pub session_id: String,
    /// `initial`, `continuation`, `upgrade` or `manual`.
    pub reason: String,
    /// The run that it took over from.
    pub previous_run_id: Option<String>,
    /// The idempotency key of the request that made it.
    pub request_key: Option<String>,
    /// When it was recorded.
    pub triggered_at: i64,
}

/// None are declared: rows are joined by hand.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
