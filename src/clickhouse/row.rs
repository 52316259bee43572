//! A row of the sessions table.

use clickhouse::Row;
use serde::{Deserialize, Serialize};

/// One version of one session. Fields stand in the order of the columns; times are Unix milliseconds.
///
/// The first eighteen columns and their order are those of `trigger_dev.sessions_v1` (wire contract, section 14); the last three
/// make a list answerable without Postgres.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, Row)]
pub struct SessionRow {
    /// Part of the sort key.
    pub environment_id: String,
    /// Organization slug; part of the sort key.
    pub organization_id: String,
    /// Project slug; part of the sort key.
    pub project_id: String,
    /// The session's id; part of the sort key.
    pub session_id: String,
    /// `dev`, `stg`, `preview` or `prod`.
    pub environment_type: String,
    /// The session's id once more: we have one id.
    pub friendly_id: String,
    /// Empty for none.
    pub external_id: String,
    /// `type` on the wire.
    pub r#type: String,
    /// Which task serves it.
    pub task_identifier: String,
    /// Labels.
    pub tags: Vec<String>,
    /// `{"data": metadata}` as JSON text, for analysis: keys come back sorted and numbers may be rounded.
    pub metadata: String,
    /// When it was closed.
    pub closed_at: Option<i64>,
    /// Empty for none.
    pub closed_reason: String,
    /// When it expires.
    pub expires_at: Option<i64>,
    /// Part of the sort key.
    pub created_at: i64,
    /// Last change.
    pub updated_at: i64,
    /// `epoch << 56 | lsn`: of two versions of a session the greater one holds.
    pub _version: u64,
    /// 1 for a tombstone.
    pub _is_deleted: u8,
    /// The metadata as it was written, as JSON text; empty for none.
    pub metadata_text: String,
    /// The trigger config, as JSON text; empty for none.
    pub trigger_config: String,
    /// The recorded run.
    pub current_run_id: String,
}

impl SessionRow {
    /// Which row it is a version of.
    pub fn key(&self) -> RowKey {
        RowKey {
            organization_id: self.organization_id.clone(),
            project_id: self.project_id.clone(),
            environment_id: self.environment_id.clone(),
            created_at: self.created_at,
            session_id: self.session_id.clone(),
        }
    }
}

/// The sort key of a row, in its order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowKey {
    /// Organization slug.
    pub organization_id: String,
    /// Project slug.
    pub project_id: String,
    /// The environment.
    pub environment_id: String,
    /// Unix milliseconds.
    pub created_at: i64,
    /// The session.
    pub session_id: String,
}
