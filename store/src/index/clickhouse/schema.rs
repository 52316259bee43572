//! The schema: versioned steps, each of which may run twice, at once from two replicas too.

use clickhouse::Row;
use serde::Deserialize;

use super::client::{ClickHouse, Fault};

/// Remembers which steps have been taken, and shows that the tables are ours.
const STEPS_TABLE: &str = "schema_steps";
/// What an exact list cannot do without, and the first version that has it.
const NEEDED: (&str, &str) = ("use_skip_indexes_if_final_exact_mode", "25.5");

/// The steps, from 1 on, with the statements of each. A step is frozen once it is released. [`Words`] fills in what stands in
/// braces.
///
/// The columns and their order, the key and the engine are those of the sessions table that the published system keeps in
/// ClickHouse, so that its queries go on working. `document` is ours: what a list gives back, as text, because the type
/// `JSON` of `metadata` loses what it cannot hold (nulls, empty objects, keys with dots).
const STEPS: &[&[&str]] = &[
    &[
        "CREATE TABLE IF NOT EXISTS {database}.sessions_v1 {on_cluster} (
        environment_id String,
        organization_id String,
        project_id String,
        session_id String,
        environment_type LowCardinality(String),
        friendly_id String,
        external_id String DEFAULT '',
        type LowCardinality(String),
        task_identifier String DEFAULT '',
        tags Array(String) CODEC(ZSTD(1)),
        metadata JSON(max_dynamic_paths=256),
        closed_at Nullable(DateTime64(3)),
        closed_reason String DEFAULT '',
        expires_at Nullable(DateTime64(3)),
        created_at DateTime64(3),
        updated_at DateTime64(3),
        is_test UInt8 DEFAULT 0,
        _version UInt64,
        _is_deleted UInt8 DEFAULT 0,
        document String CODEC(ZSTD(1)),
        INDEX tags_bloom tags TYPE bloom_filter(0.01) GRANULARITY 1,
        INDEX external_bloom external_id TYPE bloom_filter(0.001) GRANULARITY 1
    ) ENGINE = {replicated}ReplacingMergeTree(_version, _is_deleted)
    PARTITION BY toYYYYMM(created_at, 'UTC')
    ORDER BY (organization_id, project_id, environment_id, created_at, session_id)
    SETTINGS {durable}, min_age_to_force_merge_seconds = 3600, min_age_to_force_merge_on_partition_only = 1",
        "CREATE TABLE IF NOT EXISTS {database}.rebuilds {on_cluster} (
        version UInt64,
        after String,
        rows UInt64,
        finished UInt8,
        at DateTime64(3) DEFAULT now64(3)
    ) ENGINE = {replicated}MergeTree ORDER BY (version, rows) SETTINGS {durable}",
    ],
    &["CREATE TABLE IF NOT EXISTS {database}.replication_markers {on_cluster} (
        installation String,
        slot String,
        epoch UInt8,
        beat UInt64,
        lsn UInt64,
        heartbeat_ms UInt32,
        at DateTime64(3) DEFAULT now64(3)
    ) ENGINE = {replicated}ReplacingMergeTree(at) ORDER BY (installation, slot, epoch) SETTINGS {durable}"],
];
/// The columns that rows are inserted into, as the server shows them.
const COLUMNS: [(&str, &str); 20] = [
    ("environment_id", "String"),
    ("organization_id", "String"),
    ("project_id", "String"),
    ("session_id", "String"),
    ("environment_type", "LowCardinality(String)"),
    ("friendly_id", "String"),
    ("external_id", "String"),
    ("type", "LowCardinality(String)"),
    ("task_identifier", "String"),
    ("tags", "Array(String)"),
    ("metadata", "JSON(max_dynamic_paths=256)"),
    ("closed_at", "Nullable(DateTime64(3))"),
    ("closed_reason", "String"),
    ("expires_at", "Nullable(DateTime64(3))"),
    ("created_at", "DateTime64(3)"),
    ("updated_at", "DateTime64(3)"),
    ("is_test", "UInt8"),
    ("_version", "UInt64"),
    ("_is_deleted", "UInt8"),
    ("document", "String"),
];
/// What lists need.
const LISTED: u32 = 1;

/// The newest step that this program knows.
const KNOWN: u32 = STEPS.len() as u32;

/// What stands in braces.
struct Words {
    database: String,
    on_cluster: String,
    replicated: &'static str,
    durable: &'static str,
}

impl Words {
    /// A single server must keep what it has acknowledged by itself; replicas do it by being several. Where a replicated
    /// table has its path and the name of its replica from is the server's own configuration.
    fn new(database: &str, cluster: Option<&str>) -> Self {
        let alone = cluster.is_none();
        Self {
            database: identifier(database),
            on_cluster: cluster.map_or_else(String::new, |name| format!("ON CLUSTER {}", identifier(name))),
            replicated: if alone { "" } else { "Replicated" },
            durable: if alone {
                "fsync_after_insert = 1, fsync_part_directory = 1"
            } else {
                "fsync_after_insert = 0, fsync_part_directory = 0"
            },
        }
    }

    fn fill(&self, text: &str) -> String {
        text.replace("{database}", &self.database)
            .replace("{on_cluster}", &self.on_cluster)
            .replace("{replicated}", self.replicated)
            .replace("{durable}", self.durable)
    }
}

/// A name as ClickHouse reads it whatever it holds.
fn identifier(name: &str) -> String {
    format!("`{}`", name.replace('\\', "\\\\").replace('`', "\\`"))
}

/// What a server has of ours.
struct Found {
    database: bool,
    /// The newest step that was taken; `None` without the table that notes them.
    step: Option<u32>,
    /// Whether the table of sessions is there.
    sessions: bool,
}

/// Looks, and changes nothing. Whether there is something to list.
///
/// # Errors
/// [`Fault::NewerSchema`], [`Fault::ForeignTable`], [`Fault::TooOld`]; otherwise what keeps the server from answering.
pub(super) async fn is_current(clickhouse: &ClickHouse) -> Result<bool, Fault> {
    let found = look(clickhouse).await?;
    Ok(found.sessions && found.step.is_some_and(|step| step >= LISTED))
}

/// Whether a replicator finds all the tables that it needs. Changes nothing.
///
/// # Errors
/// As [`migrate`].
pub async fn is_migrated(clickhouse: &ClickHouse) -> Result<bool, Fault> {
    let found = look(clickhouse).await?;
    Ok(found.sessions && found.step == Some(KNOWN))
}

/// Checks that nobody has changed the type of a column that rows are inserted into; otherwise a refusal says nothing about the
/// row. Further columns are allowed.
///
/// # Errors
/// [`Fault::Altered`]; otherwise what keeps the server from answering.
pub async fn check_columns(clickhouse: &ClickHouse) -> Result<(), Fault> {
    #[derive(Debug, Row, Deserialize)]
    struct Column {
        name: String,
        r#type: String,
    }
    let text =
        "SELECT name, type FROM system.columns WHERE database = {database:String} AND table = 'sessions_v1'";
    let query = clickhouse.query(text).param("database", clickhouse.database());
    let found = clickhouse.fetch::<Column>(query).await?;
    let is_there = |(name, kind): &(&str, &str)| {
        found.iter().any(|column| column.name == *name && column.r#type == *kind)
    };
    match COLUMNS.iter().find(|column| !is_there(column)) {
        None => Ok(()),
        Some((column, kind)) => {
            Err(Fault::Altered { database: clickhouse.database().to_owned(), column, kind })
        }
    }
}

/// Brings the tables to the schema of this program. Costs two questions where they are.
///
/// # Errors
/// [`Fault`]; one that names the cure for tables that are another program's or of a later version.
pub async fn migrate(clickhouse: &ClickHouse) -> Result<(), Fault> {
    let found = look(clickhouse).await?;
    let database = clickhouse.database();
    let words = Words::new(database, clickhouse.options().cluster.as_deref());
    if !found.database {
        clickhouse.define(&words.fill("CREATE DATABASE IF NOT EXISTS {database} {on_cluster}")).await?;
    }
    if found.step.is_none() {
        let steps = format!(
            "CREATE TABLE IF NOT EXISTS {{database}}.{STEPS_TABLE} {{on_cluster}} (step UInt32, taken_at DateTime DEFAULT \
             now()) ENGINE = {{replicated}}MergeTree ORDER BY step SETTINGS {{durable}}"
        );
        clickhouse.define(&words.fill(&steps)).await?;
    }
    let mut taken = found.step.unwrap_or(0);
    if taken > 0 && !found.sessions {
        // Somebody has dropped it alone. What the other tables say of it does not hold for the one that is made in its place.
        for table in ["rebuilds", "replication_markers"] {
            let text = format!("TRUNCATE TABLE IF EXISTS {{database}}.{table} {{on_cluster}}");
            clickhouse.define(&words.fill(&text)).await?;
        }
        taken = 0;
    }
    for (step, statements) in (1..).zip(STEPS).skip(taken as usize) {
        for statement in *statements {
            clickhouse.define(&words.fill(statement)).await?;
        }
        let noted = format!("INSERT INTO {{database}}.{STEPS_TABLE} (step) VALUES ({step})");
        clickhouse.define(&words.fill(&noted)).await?;
        tracing::info!(database, step, "brought the tables of ClickHouse up to date");
    }
    Ok(())
}

async fn look(clickhouse: &ClickHouse) -> Result<Found, Fault> {
    #[derive(Debug, Row, Deserialize)]
    struct Tables {
        has_database: u8,
        has_steps: u8,
        has_sessions: u8,
        has_setting: u8,
    }
    let name = clickhouse.database();
    let tables = clickhouse.ask(
        "SELECT ifNull((SELECT count() FROM system.databases WHERE name = {database:String}), 0) > 0 AS has_database, \
         countIf(name = 'schema_steps') > 0 AS has_steps, countIf(name = 'sessions_v1') > 0 AS has_sessions, \
         ifNull((SELECT count() FROM system.settings WHERE name = {needed:String}), 0) > 0 AS has_setting \
         FROM system.tables WHERE database = {database:String}",
    );
    let found: Tables = clickhouse.one(tables.param("needed", NEEDED.0).param("database", name)).await?;
    if found.has_setting == 0 {
        return Err(Fault::TooOld { setting: NEEDED.0, needed: NEEDED.1 });
    }
    if found.has_sessions == 1 && found.has_steps == 0 {
        return Err(Fault::ForeignTable { database: name.to_owned() });
    }
    let step = if found.has_steps == 0 { None } else { Some(newest_step(clickhouse).await?) };
    match step {
        Some(step) if step > KNOWN => {
            Err(Fault::NewerSchema { database: name.to_owned(), step, known: KNOWN })
        }
        step => Ok(Found { database: found.has_database == 1, step, sessions: found.has_sessions == 1 }),
    }
}

async fn newest_step(clickhouse: &ClickHouse) -> Result<u32, Fault> {
    let text = format!("SELECT max(step) FROM {}.{STEPS_TABLE}", identifier(clickhouse.database()));
    clickhouse.one(clickhouse.ask(&text)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_server_syncs_what_it_stores() {
        let words = Words::new("trigger_dev", None);
        let [sessions, rebuilds] = [0, 1].map(|at| words.fill(STEPS[0][at]));
        assert!(
            sessions.starts_with("CREATE TABLE IF NOT EXISTS `trigger_dev`.sessions_v1  ("),
            "{sessions}"
        );
        assert!(sessions.contains("ENGINE = ReplacingMergeTree(_version, _is_deleted)"), "{sessions}");
        for text in [sessions, rebuilds] {
            assert!(text.contains("fsync_after_insert = 1, fsync_part_directory = 1"), "{text}");
            assert!(!text.contains('{'), "{text}");
        }
    }

    #[test]
    fn a_cluster_gets_replicated_tables_on_every_node() {
        let words = Words::new("odd`name", Some("main"));
        let [sessions, rebuilds] = [0, 1].map(|at| words.fill(STEPS[0][at]));
        assert!(
            sessions.starts_with("CREATE TABLE IF NOT EXISTS `odd\\`name`.sessions_v1 ON CLUSTER `main` ("),
            "{sessions}"
        );
        assert!(
            sessions.contains("ENGINE = ReplicatedReplacingMergeTree(_version, _is_deleted)"),
            "{sessions}"
        );
        assert!(rebuilds.contains("ENGINE = ReplicatedMergeTree ORDER BY"), "{rebuilds}");
        for text in [sessions, rebuilds] {
            assert!(
                text.contains("fsync_after_insert = 0, fsync_part_directory = 0") && !text.contains('{'),
                "{text}"
            );
        }
    }
}
