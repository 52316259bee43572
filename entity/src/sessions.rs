//! `sessions`: the source of truth of everything but records.

use sea_orm::entity::prelude::*;

/// A row.
#[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
#[sea_orm(table_name = "sessions")]
pub struct Model {
    /// `session_...`
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: String,
    /// The environment that owns it.
    pub environment_id: String,
    /// The caller's own id.
    pub external_id: Option<String>,
    /// The idempotency key of the create, for a session that was created without an external id.
    pub request_key: Option<String>,
    /// `type` on the wire.
    pub kind: String,
    /// Which task serves it.
    pub task_identifier: String,
    /// A list of words.
    pub tags: Json,
    /// An object.
    pub metadata: Option<Json>,
    /// An object.
    pub trigger_config: Option<Json>,
    /// The recorded run.
    pub current_run_id: String,
    /// Creation time.
    pub created_at: i64,
    /// Last change.
    pub updated_at: i64,
    /// When it expires.
    pub expires_at: Option<i64>,
    /// When it was closed.
    pub closed_at: Option<i64>,
    /// Why it was closed.
    pub closed_reason: Option<String>,
    /// 1 once a sweep has seen that `expires_at` passed. A hint that picks an index, never a status.
    pub lapsed: i16,
}

/// None are declared: rows are joined by hand.
#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
