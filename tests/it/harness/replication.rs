//! A replicator between a test's own Postgres database and a ClickHouse, and an index that waits for it.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sea_orm::{ConnectionTrait, Database, DatabaseConnection, DbBackend, Statement};
use secrecy::SecretString;
use sessiond::domain::error::Result;
use sessiond::domain::list::{Filter, Page, PageRequest, TagQuery};
use sessiond::domain::{EnvironmentId, ListIndex, SystemClock, Timestamp};
use sessiond::replication::leader::{Replicator, ReplicatorOptions};
use sessiond::replication::pgwire::SourceOptions;
use sessiond::replication::term::TermOptions;
use sessiond::replication::{Context, Lsn};
use sessiond::store::index::clickhouse::{ClickHouse, ClickHouseIndex};
use sessiond::store::metadata::SqlMetadata;
use sessiond::telemetry::Metrics;
use tokio::sync::{Mutex, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::clickhouse::{connect, options};

/// Longest that a test waits for replication.
const PATIENCE: Duration = Duration::from_secs(60);

/// A name that no other test has: slots are of the whole server.
pub fn slot_name() -> String {
    format!("slot_{}", uuid::Uuid::new_v4().simple())
}

/// What a replicator from `store` to `clickhouse` works with.
pub fn context(store: &SqlMetadata, clickhouse: &ClickHouse) -> Context {
    let metrics = Metrics::new().replication().clone();
    let clock = Arc::new(SystemClock);
    Context::new(store.clone(), store.clone(), clickhouse.clone(), Arc::default(), metrics, clock)
}

/// How a test reads its slot: in small batches, and often.
pub fn term_options(slot: &str) -> TermOptions {
    TermOptions {
        slot: slot.to_owned(),
        name: "the test".to_owned(),
        flush_rows: 50,
        flush_bytes: 1 << 20,
        flush_gap: Duration::from_millis(20),
        in_flight: 4,
        memory: 8 << 20,
        max_wal: 10 << 30,
        heartbeat: Duration::from_millis(100),
        silence: Duration::from_secs(10),
        drain: Duration::from_secs(10),
    }
}

/// Up to where the log of a server is on disk: everything that was committed stands before.
pub async fn flushed(connection: &DatabaseConnection) -> Lsn {
    let query = "SELECT pg_current_wal_flush_lsn()::text AS place";
    let row = connection.query_one_raw(Statement::from_string(DbBackend::Postgres, query)).await;
    let place: String = row.expect("asked").expect("a row").try_get("", "place").expect("text");
    place.parse().expect("a place")
}

/// Drops a slot, whoever reads it.
pub async fn drop_slot(url: &str, slot: &str) {
    let connection = Database::connect(url).await.expect("connects");
    let query = format!(
        "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = '{slot}' AND active; \
         SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = '{slot}'"
    );
    let dropped = async {
        // The one that read it may not have ended yet.
        while connection.execute_unprepared(&query).await.is_err() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, dropped).await.expect("the slot is dropped in time");
}

/// A `ClickHouseIndex` of what a replicator brings from Postgres. Each question waits until it has brought what was committed
/// before. No SQL answers for it.
pub struct CaughtUp {
    index: ClickHouseIndex,
    connection: DatabaseConnection,
    reached: watch::Receiver<Lsn>,
    /// What Postgres had when it was last caught up with.
    seen: Mutex<String>,
    url: String,
    slot: String,
    stop: CancellationToken,
    replicating: JoinHandle<()>,
}

impl CaughtUp {
    /// From the database `store` at `postgres` to one of its own on the engine at `clickhouse`.
    pub async fn over(postgres: &str, store: &SqlMetadata, clickhouse: &str) -> Self {
        let (clickhouse, slot) = (connect(options(clickhouse)), slot_name());
        let url = SecretString::from(postgres.to_owned());
        let options = ReplicatorOptions {
            source: SourceOptions::new(&url, &slot, "ours").expect("a URL"),
            // Few parts, which questions are to be asked of: reading many is slow.
            term: TermOptions { flush_gap: Duration::from_millis(100), ..term_options(&slot) },
            poll: Duration::from_millis(50),
            longest_pause: Duration::from_millis(200),
        };
        let replicator = Replicator::new(options, context(store, &clickhouse));
        let (reached, stop) = (replicator.reached(), CancellationToken::new());
        let stopped = stop.clone();
        let replicating = tokio::spawn(async move { replicator.run(stopped).await });
        let index = ClickHouseIndex::new(clickhouse, Arc::new(store.clone()), Arc::default());
        let built = async {
            while index.ping().await.is_err() {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, built).await.expect("what was there is copied");
        let connection = Database::connect(postgres).await.expect("connects");
        let seen = Mutex::default();
        Self { index, connection, reached, seen, url: postgres.to_owned(), slot, stop, replicating }
    }

    async fn catch_up(&self) {
        // Whatever has changed a row, or made or deleted one, has changed this.
        let query = "SELECT count(*) || ' ' || coalesce(sum(xmin::text::bigint), 0) AS state FROM sessions";
        let query = Statement::from_string(DbBackend::Postgres, query);
        let row = self.connection.query_one_raw(query).await.expect("asked").expect("a row");
        let state: String = row.try_get("", "state").expect("text");
        let mut seen = self.seen.lock().await;
        if *seen == state {
            return;
        }
        let (place, mut reached) = (flushed(&self.connection).await, self.reached.clone());
        let caught_up = timeout(PATIENCE, reached.wait_for(|reached| *reached >= place)).await;
        caught_up.expect("it catches up in time").expect("it runs");
        *seen = state;
    }
}

impl Drop for CaughtUp {
    fn drop(&mut self) {
        self.stop.cancel();
        self.replicating.abort();
        let (url, slot) = (self.url.clone(), self.slot.clone());
        // Nothing can be waited for here but a thread, and after a failure another one would only hide it.
        let dropping = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(drop_slot(&url, &slot));
        });
        let dropped = dropping.join();
        assert!(dropped.is_ok() || std::thread::panicking(), "the slot is left behind");
    }
}

#[async_trait]
impl ListIndex for CaughtUp {
    async fn list(
        &self,
        environment: &EnvironmentId,
        filter: &Filter,
        page: &PageRequest,
        now: Timestamp,
    ) -> Result<Page> {
        self.catch_up().await;
        self.index.list(environment, filter, page, now).await
    }

    async fn count(&self, environment: &EnvironmentId, filter: &Filter, now: Timestamp) -> Result<u64> {
        self.catch_up().await;
        self.index.count(environment, filter, now).await
    }

    async fn tags(&self, environment: &EnvironmentId, query: &TagQuery) -> Result<Vec<String>> {
        self.catch_up().await;
        self.index.tags(environment, query).await
    }

    async fn ping(&self) -> Result<Vec<String>> {
        self.index.ping().await
    }
}
