//! A Postgres database, a ClickHouse table, and replicators between them.

use std::collections::BTreeMap;
use std::time::Duration;

use sea_orm::{ConnectionTrait, DatabaseConnection, Statement};
use sessiond::clickhouse::{ClickHouse, SessionRow};
use sessiond::config::{ClickHouseConfig, ReplicationConfig};
use sessiond::replication::{Health, Replicator, ReplicatorOptions};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::harness::clickhouse;
use crate::harness::database::Sql;

/// How long a wait for something that must happen may take before the test fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// Both sides.
#[derive(Clone)]
pub struct World {
    pub sql: Sql,
    pub connection: DatabaseConnection,
    pub clickhouse: ClickHouse,
    pub config: ReplicationConfig,
}

/// A replicator at work.
pub struct Running {
    pub health: watch::Receiver<Health>,
    pub stop: DropGuard,
    pub task: JoinHandle<()>,
}

impl World {
    pub async fn new() -> Self {
        Self::on(clickhouse::config(&clickhouse::url())).await
    }

    pub async fn on(settings: ClickHouseConfig) -> Self {
        Self::between(Sql::postgres().await, settings).await
    }

    /// On a Postgres of the caller's.
    pub async fn at(postgres: &str, settings: ClickHouseConfig) -> Self {
        Self::between(Sql::at(postgres).await, settings).await
    }

    async fn between(sql: Sql, settings: ClickHouseConfig) -> Self {
        let connection = sql.database.connect().await;
        // A slot's name is the cluster's, not the database's.
        let slot = format!("slot_{}", uuid::Uuid::new_v4().simple());
        let config = ReplicationConfig {
            enabled: true,
            url: None,
            publication: "sessions_to_clickhouse".to_owned(),
            slot,
            batch_rows: 1000,
            batch_bytes: 1 << 20,
            linger: Duration::from_millis(5),
            concurrency: 4,
            memory: 16 << 20,
            leader_timeout: Duration::from_secs(4),
            retry_interval: Duration::from_millis(50),
            heartbeat: Duration::from_millis(500),
            max_wal: 1 << 40,
            visibility_timeout: Duration::from_secs(1),
        };
        Self { sql, connection, clickhouse: ClickHouse::new(&settings), config }
    }

    /// Starts a replicator, as a replica of this name.
    pub fn replicate(&self, name: &str) -> Running {
        self.replicate_through(name, &self.sql.database.url)
    }

    /// As [`World::replicate`], with another way to Postgres.
    pub fn replicate_through(&self, name: &str, url: &str) -> Running {
        let replicator = Replicator::new(ReplicatorOptions {
            config: self.config.clone(),
            url: url.into(),
            clickhouse: self.clickhouse.clone(),
            name: name.to_owned(),
            metrics: sessiond::telemetry::Metrics::new().replication().clone(),
        })
        .expect("a URL");
        let stop = CancellationToken::new();
        let health = replicator.health();
        let task = tokio::spawn(replicator.run(stop.clone()));
        Running { health, stop: stop.drop_guard(), task }
    }

    pub async fn execute(&self, sql: &str) {
        self.connection.execute_unprepared(sql).await.expect(sql);
    }

    pub async fn text(&self, sql: &str) -> String {
        let statement = Statement::from_string(sea_orm::DbBackend::Postgres, sql);
        let row = self.connection.query_one_raw(statement).await.expect(sql).expect("a row");
        row.try_get_by_index(0).expect("text")
    }

    /// A slot belongs to the cluster, and a cluster has few.
    pub async fn forget_slot(&self) {
        let slot = &self.config.slot;
        let drop = format!(
            "SELECT pg_drop_replication_slot(slot_name)::text FROM pg_replication_slots WHERE slot_name = '{slot}'"
        );
        while self.connection.execute_unprepared(&drop).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Sessions with plain columns, by SQL, in one transaction. `columns` are further ones.
    pub async fn insert(&self, from: usize, to: usize, columns: &[(&str, &str)]) {
        let (names, values): (Vec<_>, Vec<_>) = columns.iter().copied().unzip();
        let more = |words: Vec<&str>| words.iter().map(|word| format!(", {word}")).collect::<String>();
        self.execute(&format!(
            "INSERT INTO sessions (id, environment_id, kind, task_identifier, tags, current_run_id, created_at, updated_at{}) \
             SELECT 'session_' || lpad(n::text, 8, '0'), 'env_here', 'chat', 'agent', '[\"a\"]', 'run_' || n, \
             1700000000000 + n, 1700000000000 + n{} FROM generate_series({from}, {to}) AS n",
            more(names),
            more(values),
        ))
        .await;
    }

    /// Waits until every column of every session is the same on both sides.
    pub async fn agree(&self) {
        let work = async {
            while !self.differences().await.is_empty() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(PATIENCE, work).await.is_err() {
            let found = self.differences().await;
            panic!("{} differences, such as {:?}", found.len(), &found[..found.len().min(5)]);
        }
    }

    /// Waits until everything that has been committed is in ClickHouse.
    pub async fn catch_up(&self) {
        self.execute("SELECT pg_logical_emit_message(true, 'test', '')").await;
        let place = self.text("SELECT (pg_current_wal_lsn() - '0/0')::text").await;
        let arrived = format!(
            "SELECT (coalesce(max(flushed_lsn), 0) >= {place} AND max(status) = 'streaming')::text FROM replication_state"
        );
        let work = async {
            while self.text(&arrived).await != "true" {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(PATIENCE, work).await.expect("it arrives");
    }

    /// Sessions that are not the same on both sides, and how. Knows nothing of how the product converts or compares.
    pub async fn differences(&self) -> Vec<String> {
        let (there, here) = (self.clickhouse.scan(None, 1_000_000).await, self.rows().await);
        let Ok(there) = there else { return vec!["ClickHouse does not answer".to_owned()] };
        let there: BTreeMap<String, SessionRow> =
            there.into_iter().map(|row| (row.session_id.clone(), row)).collect();
        let mut found: Vec<String> = there
            .keys()
            .filter(|id| !here.contains_key(*id))
            .map(|id| format!("{id} is a phantom"))
            .collect();
        for (id, expected) in here {
            match there.get(&id) {
                None => found.push(format!("{id} is missing")),
                Some(row) if shown(row) != expected => {
                    found.push(format!("{id} is stale: {:?} is not {expected:?}", shown(row)));
                }
                Some(_) => {}
            }
        }
        found
    }

    async fn rows(&self) -> BTreeMap<String, Vec<serde_json::Value>> {
        let sql = "SELECT jsonb_build_array(id, environment_id, coalesce(external_id, ''), kind, task_identifier, tags, \
                   closed_at, coalesce(closed_reason, ''), expires_at, created_at, updated_at, metadata, trigger_config, \
                   current_run_id, (SELECT organization || '/' || project || '/' || e.kind FROM environments AS e WHERE e.id = environment_id)) \
                   FROM sessions";
        let statement = Statement::from_string(sea_orm::DbBackend::Postgres, sql);
        let rows = self.connection.query_all_raw(statement).await.expect("reads");
        rows.iter()
            .map(|row| {
                let serde_json::Value::Array(row) = row.try_get_by_index(0).expect("JSON") else {
                    panic!("an array")
                };
                (row[0].as_str().expect("an id").to_owned(), row)
            })
            .collect()
    }

    /// Waits until the replicator says so.
    pub async fn until(health: &mut watch::Receiver<Health>, is: impl Fn(&Health) -> bool) -> Health {
        let waited = tokio::time::timeout(PATIENCE, health.wait_for(|health| is(health))).await;
        waited.expect("it says so in time").expect("it runs").clone()
    }

    /// Waits until the state row says that every row has been copied.
    pub async fn until_streaming(&self) {
        let work = async {
            while self.text("SELECT coalesce(max(status), '') FROM replication_state").await != "streaming" {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, work).await.expect("the backfill ends");
    }
}

impl Running {
    /// Stops it in order.
    pub async fn stop(self) {
        drop(self.stop);
        self.task.await.expect("ends");
    }

    /// Ends it as a crash would: nothing is drained, nothing confirmed.
    pub async fn crash(self) {
        self.task.abort();
        let _ = self.task.await;
        self.stop.disarm();
    }
}

fn shown(row: &SessionRow) -> Vec<serde_json::Value> {
    use serde_json::json;
    let parsed = |text: &str| match text {
        "" => serde_json::Value::Null,
        text => serde_json::from_str(text).expect("JSON"),
    };
    vec![
        json!(row.session_id),
        json!(row.environment_id),
        json!(row.external_id),
        json!(row.r#type),
        json!(row.task_identifier),
        json!(row.tags),
        json!(row.closed_at),
        json!(row.closed_reason),
        json!(row.expires_at),
        json!(row.created_at),
        json!(row.updated_at),
        parsed(&row.metadata_text),
        parsed(&row.trigger_config),
        json!(row.current_run_id),
        json!(format!("{}/{}/{}", row.organization_id, row.project_id, row.environment_type)),
    ]
}
