//! What Postgres and ClickHouse have of every session, each read by SQL of the tests' own.

use std::collections::BTreeMap;
use std::fmt;

use sessiond::store::index::clickhouse::ClickHouse;

use super::*;
use crate::harness::clickhouse;

/// Every column that is compared, and what is no part of it.
pub(super) const ROW: &str = "environment_id, organization_id, project_id, session_id, environment_type, friendly_id, external_id, type, \
                   task_identifier, tags, '{}' AS metadata, closed_at, closed_reason, expires_at, created_at, updated_at, \
                   is_test, toUInt64(0) AS _version, toUInt8(0) AS _is_deleted, document";

/// Rows by the id of the session and the time when it was created, which rows of ClickHouse are told apart by.
pub(super) type Side = BTreeMap<(String, i64), Value>;

/// Postgres, and ClickHouse.
pub(super) async fn both(postgres: &DatabaseConnection, clickhouse: &ClickHouse) -> [Side; 2] {
    let query = "SELECT s.id, s.created_at, jsonb_build_object(\
            'environment', s.environment_id, 'organization', e.organization, 'project', e.project, \
            'environmentType', e.kind, 'friendlyId', s.id, 'externalId', coalesce(s.external_id, ''), 'type', s.kind, \
            'task', s.task_identifier, 'tags', s.tags, 'closedAt', s.closed_at, \
            'closedReason', coalesce(s.closed_reason, ''), 'expiresAt', s.expires_at, 'createdAt', s.created_at, \
            'updatedAt', s.updated_at, 'isTest', 0, 'column', '{}'::jsonb, 'document', jsonb_build_object(\
                'metadata', s.metadata, 'triggerConfig', s.trigger_config, 'closedReason', s.closed_reason, \
                'currentRunId', s.current_run_id))::text AS row \
         FROM sessions s JOIN environments e ON e.id = s.environment_id";
    let query = Statement::from_string(DbBackend::Postgres, query);
    let rows = postgres.query_all_raw(query).await.expect("asked");
    let stored = rows.into_iter().map(|row| {
        let text: String = row.try_get("", "row").expect("text");
        let mut value: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(value["environmentType"], "prod", "all environments of these tests are");
        value["environmentType"] = json!("PRODUCTION");
        let key = (row.try_get("", "id").expect("text"), row.try_get("", "created_at").expect("a number"));
        (key, value)
    });
    let ours = clickhouse::select(clickhouse, &format!("SELECT {ROW} FROM sessions_v1 FINAL")).await;
    let copied = ours.into_iter().map(|row: SessionRow| {
        let value = json!({
            "environment": row.environment_id, "organization": row.organization_id, "project": row.project_id,
            "environmentType": row.environment_type, "friendlyId": row.friendly_id, "externalId": row.external_id,
            "type": row.r#type, "task": row.task_identifier, "tags": row.tags, "closedAt": row.closed_at,
            "closedReason": row.closed_reason, "expiresAt": row.expires_at, "createdAt": row.created_at,
            "updatedAt": row.updated_at, "isTest": row.is_test,
            "column": serde_json::from_str::<Value>(&row.metadata).expect("JSON"),
            "document": serde_json::from_str::<Value>(&row.document).expect("JSON"),
        });
        ((row.session_id, row.created_at), value)
    });
    [stored.collect(), copied.collect()]
}

/// What is not the same on both sides, by the ids of sessions.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Differences {
    /// Only Postgres has them.
    missing: Vec<String>,
    /// ClickHouse has another version of them.
    stale: Vec<String>,
    /// Only ClickHouse has them.
    phantom: Vec<String>,
}

impl Differences {
    pub(super) async fn between(postgres: &DatabaseConnection, clickhouse: &ClickHouse) -> Self {
        let [stored, copied] = both(postgres, clickhouse).await;
        assert!(!stored.is_empty(), "there is nothing to compare");
        let mut found = Self::default();
        for (key, row) in &stored {
            match copied.get(key) {
                None => found.missing.push(key.0.clone()),
                Some(copy) if copy != row => found.stale.push(key.0.clone()),
                Some(_) => {}
            }
        }
        found.phantom.extend(copied.into_keys().filter(|key| !stored.contains_key(key)).map(|key| key.0));
        found
    }

    pub(super) fn len(&self) -> usize {
        let Self { missing, stale, phantom } = self;
        missing.len() + stale.len() + phantom.len()
    }
}

impl fmt::Display for Differences {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { missing, stale, phantom } = self;
        write!(f, "{} missing, {} stale, {} phantom", missing.len(), stale.len(), phantom.len())
    }
}
