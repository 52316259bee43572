//! The schema of the sessions table: versioned steps, each of which may run twice.

use super::{ClickHouse, Fault};
use crate::config::ClickHouseEngine;

/// Name of the table that remembers the steps. Several sessions tables may share it.
const HISTORY: &str = "sessiond_migrations";

/// Steps in order; a step is frozen once released. `{table}`, `{on_cluster}` and the like are filled in by [`Words`].
///
/// Columns, order and sort key are those that the wire contract names (section 14); `metadata_text`, `trigger_config` and
/// `current_run_id` make a row whole. The skip indexes are measured in ADR 18.
const STEPS: &[(u32, &str)] = &[(
    1,
    "CREATE TABLE IF NOT EXISTS {table} {on_cluster} (
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
        _version UInt64,
        _is_deleted UInt8 DEFAULT 0,
        metadata_text String DEFAULT '' CODEC(ZSTD(1)),
        trigger_config String DEFAULT '' CODEC(ZSTD(1)),
        current_run_id String DEFAULT '',
        INDEX by_tag tags TYPE bloom_filter(0.01) GRANULARITY 1,
        INDEX by_external_id external_id TYPE bloom_filter(0.01) GRANULARITY 1,
        INDEX by_task task_identifier TYPE bloom_filter(0.01) GRANULARITY 1
    ) ENGINE = {engine}
    PARTITION BY toYYYYMM(created_at)
    ORDER BY (organization_id, project_id, environment_id, created_at, session_id)
    SETTINGS {settings}",
)];

/// What stands in braces in a step.
struct Words {
    table: String,
    on_cluster: String,
    engine: &'static str,
    settings: &'static str,
}

impl Words {
    fn of(clickhouse: &ClickHouse) -> Self {
        let on_cluster = clickhouse.cluster().map_or_else(String::new, |name| format!("ON CLUSTER {name}"));
        let (engine, settings) = match clickhouse.engine() {
            // One node must survive a power cut by itself.
            ClickHouseEngine::Single => (
                "ReplacingMergeTree(_version, _is_deleted)",
                "fsync_after_insert = 1, fsync_part_directory = 1",
            ),
            // Path and name of the replica come from the server's own defaults and macros.
            ClickHouseEngine::Replicated => {
                ("ReplicatedReplacingMergeTree(_version, _is_deleted)", "index_granularity = 8192")
            }
        };
        Self { table: clickhouse.table(), on_cluster, engine, settings }
    }

    fn fill(&self, step: &str) -> String {
        step.replace("{table}", &self.table)
            .replace("{on_cluster}", &self.on_cluster)
            .replace("{engine}", self.engine)
            .replace("{settings}", self.settings)
    }
}

/// Brings the table to the schema of this binary. Two replicas may do it at once.
pub(super) async fn migrate(clickhouse: &ClickHouse) -> Result<(), Fault> {
    let words = Words::of(clickhouse);
    let (database, on_cluster) = (clickhouse.database(), &words.on_cluster);
    let history = format!("{database}.{HISTORY}");
    clickhouse.execute_anywhere(&format!("CREATE DATABASE IF NOT EXISTS {database} {on_cluster}")).await?;
    clickhouse
        .execute_anywhere(&format!(
            "CREATE TABLE IF NOT EXISTS {history} {on_cluster} (table String, step UInt32, applied_at DateTime DEFAULT now()) \
             ENGINE = {} ORDER BY (table, step)",
            match clickhouse.engine() {
                ClickHouseEngine::Single => "MergeTree",
                ClickHouseEngine::Replicated => "ReplicatedMergeTree",
            }
        ))
        .await?;
    let done: Vec<u32> = clickhouse
        .fetch(
            clickhouse
                .query(&format!("SELECT DISTINCT step FROM {history} WHERE table = {{table:String}}"))
                .param("table", clickhouse.name()),
        )
        .await?;
    let newest = STEPS.last().map_or(0, |(step, _)| *step);
    if let Some(&step) = done.iter().find(|step| **step > newest) {
        return Err(Fault::NewerSchema { table: clickhouse.table(), step });
    }
    for (step, sql) in STEPS.iter().filter(|(step, _)| !done.contains(step)) {
        clickhouse.execute_anywhere(&words.fill(sql)).await?;
        let insert = format!("INSERT INTO {history} (table, step) VALUES ('{}', {step})", clickhouse.name());
        clickhouse.execute_anywhere(&insert).await?;
        tracing::info!(table = clickhouse.table(), step, "migrated the ClickHouse table");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clickhouse::tests::config;

    #[test]
    fn a_cluster_gets_the_table_on_every_node() {
        let mut config = config("http://127.0.0.1:1");
        config.cluster = Some("main".to_owned());
        config.engine = ClickHouseEngine::Replicated;
        let sql = Words::of(&ClickHouse::new(&config)).fill(STEPS[0].1);
        assert!(
            sql.starts_with("CREATE TABLE IF NOT EXISTS trigger_dev.sessions_v1 ON CLUSTER main ("),
            "{sql}"
        );
        assert!(sql.contains("ENGINE = ReplicatedReplacingMergeTree(_version, _is_deleted)"), "{sql}");
        assert!(!sql.contains('{'), "{sql}");
    }
}
