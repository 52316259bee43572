//! Rows as they are stored, for who compares them with the metadata store.

use clickhouse::Row;
use serde::Deserialize;

use super::client::{ClickHouse, Fault};
use super::row::{SessionRow, environment_kind};
use sessiond_domain::tenant::{Environment, EnvironmentKind};
use sessiond_domain::{EnvironmentId, Timestamp};

/// What is compared: versions are of the way that a row took, and the column of type `JSON` is there for people.
const COLUMNS: &str = "environment_id, organization_id, project_id, session_id, environment_type, friendly_id, external_id, type, \
                       task_identifier, tags, '{}' AS metadata, closed_at, closed_reason, expires_at, created_at, updated_at, \
                       is_test, toUInt64(0) AS _version, toUInt8(0) AS _is_deleted, document";
/// The rows of an environment, by the beginning of the sort key.
const OF_ENVIRONMENT: &str = "organization_id = {organization:String} AND project_id = {project:String} \
                              AND environment_id = {environment:String}";

#[derive(Debug, Row, Deserialize)]
struct Filed {
    environment_id: String,
    organization_id: String,
    project_id: String,
    environment_type: String,
}

impl From<Filed> for Environment {
    fn from(filed: Filed) -> Self {
        Self {
            id: EnvironmentId::from_stored(&filed.environment_id),
            organization: filed.organization_id,
            project: filed.project_id,
            slug: String::new(),
            kind: environment_kind(&filed.environment_type).unwrap_or(EnvironmentKind::Development),
            created_at: Timestamp::from_millis(0),
        }
    }
}

/// Environments as they are filed with their sessions; with an id that one alone. Reads the whole table.
///
/// # Errors
/// As [`ClickHouse::fetch`].
pub async fn filed_environments(
    clickhouse: &ClickHouse,
    id: Option<&EnvironmentId>,
) -> Result<Vec<Environment>, Fault> {
    let limit = if id.is_some() { "LIMIT 1" } else { "" };
    let text = format!(
        "SELECT DISTINCT environment_id, organization_id, project_id, environment_type FROM sessions_v1 \
         WHERE {{id:String}} = '' OR environment_id = {{id:String}} {limit}"
    );
    let query = clickhouse.query(&text).param("id", id.map_or("", EnvironmentId::as_str));
    Ok(clickhouse.fetch_at_length::<Filed>(query).await?.into_iter().map(Environment::from).collect())
}

/// The sessions of an environment that are stored behind one, up to another if there is one, in the order of creation; so many
/// at most.
///
/// # Errors
/// As [`ClickHouse::fetch`].
pub async fn stored_behind(
    clickhouse: &ClickHouse,
    environment: &Environment,
    after: (i64, &str),
    to: Option<(i64, &str)>,
    limit: usize,
) -> Result<Vec<SessionRow>, Fault> {
    let text = format!(
        "SELECT {COLUMNS} FROM sessions_v1 FINAL WHERE {OF_ENVIRONMENT} \
         AND created_at >= fromUnixTimestamp64Milli({{after:Int64}}) \
         AND (created_at > fromUnixTimestamp64Milli({{after:Int64}}) OR session_id > {{after_id:String}}) \
         AND ({{endless:UInt8}} OR created_at < fromUnixTimestamp64Milli({{to:Int64}}) \
            OR created_at = fromUnixTimestamp64Milli({{to:Int64}}) AND session_id <= {{to_id:String}}) \
         ORDER BY created_at, session_id LIMIT {limit}"
    );
    let ((after, after_id), (to, to_id), endless) = (after, to.unwrap_or_default(), to.is_none());
    let query =
        of_environment(clickhouse, &text, environment).param("after", after).param("after_id", after_id);
    let query = query.param("to", to).param("to_id", to_id).param("endless", u8::from(endless));
    clickhouse.fetch(query).await
}

/// What is stored of sessions of an environment, by their ids.
///
/// # Errors
/// As [`ClickHouse::fetch`].
pub async fn stored_as(
    clickhouse: &ClickHouse,
    environment: &Environment,
    ids: &[&str],
) -> Result<Vec<SessionRow>, Fault> {
    let text = format!(
        "SELECT {COLUMNS} FROM sessions_v1 FINAL WHERE {OF_ENVIRONMENT} AND session_id IN {{ids:Array(String)}}"
    );
    clickhouse.fetch(of_environment(clickhouse, &text, environment).param("ids", ids)).await
}

fn of_environment(
    clickhouse: &ClickHouse,
    text: &str,
    environment: &Environment,
) -> clickhouse::query::Query {
    clickhouse
        .query(text)
        .param("organization", &environment.organization)
        .param("project", &environment.project)
        .param("environment", environment.id.as_str())
}
