//! ClickHouse: the table and its rows, shared by the index, which reads, and the replicator, which writes.

mod fault;
mod row;
mod schema;

use std::time::Duration;

use clickhouse::query::Query;
use clickhouse::{Client, RowOwned, RowRead};
use secrecy::ExposeSecret;

use crate::config::{ClickHouseConfig, ClickHouseEngine};
pub use fault::Fault;
pub use row::{RowKey, SessionRow};

/// Longest that an insert, a page of a scan or a step of a migration may take.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
const SORT_KEY: &str = "(organization_id, project_id, environment_id, created_at, session_id)";

/// A connection to the sessions table. Cheap to clone; says nothing to the server before it is asked to.
#[derive(Clone)]
pub struct ClickHouse {
    /// Names no database.
    server: Client,
    /// Names ours.
    client: Client,
    database: String,
    name: String,
    cluster: Option<String>,
    engine: ClickHouseEngine,
}

impl ClickHouse {
    /// The table that the settings name.
    pub fn new(config: &ClickHouseConfig) -> Self {
        let url = config.url.as_ref().map(ToString::to_string).unwrap_or_default();
        let mut server = Client::default()
            .with_url(url.trim_end_matches('/'))
            .with_user(&config.user)
            .with_product_info("sessiond", env!("CARGO_PKG_VERSION"));
        if let Some(password) = &config.password {
            server = server.with_password(password.expose_secret());
        }
        Self {
            client: server.clone().with_database(&config.database),
            server,
            database: config.database.clone(),
            name: config.table.clone(),
            cluster: config.cluster.clone(),
            engine: config.engine,
        }
    }

    /// `database.table`.
    pub fn table(&self) -> String {
        format!("{}.{}", self.database, self.name)
    }

    pub(crate) fn database(&self) -> &str {
        &self.database
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn cluster(&self) -> Option<&str> {
        self.cluster.as_deref()
    }

    pub(crate) fn engine(&self) -> ClickHouseEngine {
        self.engine
    }

    /// Brings the table to the schema of this binary, making database and table first if they are missing. Two replicas
    /// may do it at once.
    ///
    /// # Errors
    /// [`Fault::NewerSchema`] if the table is ahead; otherwise [`Fault::Transient`], [`Fault::TimedOut`].
    pub async fn migrate(&self) -> Result<(), Fault> {
        schema::migrate(self).await
    }

    /// Answers if ClickHouse does and the table is there.
    ///
    /// # Errors
    /// [`Fault::Transient`], [`Fault::TimedOut`].
    pub async fn ping(&self) -> Result<(), Fault> {
        let sql = format!("SELECT 1 FROM {} LIMIT 0", self.table());
        timely(Duration::from_secs(5), self.query(&sql).execute()).await
    }

    /// Stores rows as one insert. Once it has returned they are there: on a single node synced to its disk, with replicas
    /// on a quorum of them. Repeating it changes nothing, since a version of a session counts once.
    ///
    /// # Errors
    /// [`Fault::Poison`] if a row is refused, in which case none is stored; otherwise nobody knows whether they are.
    pub async fn insert(&self, rows: &[SessionRow]) -> Result<(), Fault> {
        let work = async {
            // The crate's header spells the type `JSON` without its parameters, which the server refuses.
            let client = self.client.clone().with_validation(false);
            let mut insert = client.insert::<SessionRow>(&self.name).await?;
            insert = self.insert_settings(insert);
            for row in rows {
                insert.write(row).await?;
            }
            insert.end().await
        };
        timely(WRITE_TIMEOUT, work).await
    }

    fn insert_settings(
        &self,
        insert: clickhouse::insert::Insert<SessionRow>,
    ) -> clickhouse::insert::Insert<SessionRow> {
        let insert = insert
            // A server's default may be to queue, and to answer before the rows are anywhere.
            .with_setting("async_insert", "0")
            .with_setting("input_format_binary_read_json_as_string", "1")
            .with_setting("type_json_skip_duplicated_paths", "1")
            .with_setting("input_format_json_infer_array_of_dynamic_from_array_of_different_types", "1");
        match self.engine {
            ClickHouseEngine::Single => insert,
            ClickHouseEngine::Replicated => insert.with_setting("insert_quorum", "auto"),
        }
    }

    /// Rows behind `after` in the order of the sort key, the newest version of each; no tombstones.
    ///
    /// # Errors
    /// [`Fault::Transient`], [`Fault::TimedOut`].
    pub async fn scan(&self, after: Option<&RowKey>, limit: usize) -> Result<Vec<SessionRow>, Fault> {
        let behind = match after {
            None => String::new(),
            Some(_) => format!(
                "WHERE {SORT_KEY} > ({{organization:String}}, {{project:String}}, {{environment:String}}, \
                 fromUnixTimestamp64Milli({{created:Int64}}), {{session:String}})"
            ),
        };
        let sql =
            format!("SELECT ?fields FROM {} FINAL {behind} ORDER BY {SORT_KEY} LIMIT {limit}", self.table());
        let mut query = self.query(&sql).with_setting("output_format_binary_write_json_as_string", "1");
        if let Some(key) = after {
            query = query
                .param("organization", &key.organization_id)
                .param("project", &key.project_id)
                .param("environment", &key.environment_id)
                .param("created", key.created_at)
                .param("session", &key.session_id);
        }
        self.fetch(query).await
    }

    /// The newest version of each of these sessions, in no order; no tombstones. At most a few thousand ids.
    ///
    /// # Errors
    /// [`Fault::Transient`], [`Fault::TimedOut`].
    pub async fn find(&self, sessions: &[String]) -> Result<Vec<SessionRow>, Fault> {
        let sql =
            format!("SELECT ?fields FROM {} FINAL WHERE session_id IN {{ids:Array(String)}}", self.table());
        let query = self.query(&sql).with_setting("output_format_binary_write_json_as_string", "1");
        self.fetch(query.param("ids", sessions)).await
    }

    /// Puts a tombstone in the place of every row that no version of `epoch` or later has reached, and lowers older
    /// tombstones below it. For the end of a backfill: what it has not seen has been deleted while no slot existed, and
    /// no old tombstone may tie with a backfilled row.
    ///
    /// # Errors
    /// [`Fault::Transient`], [`Fault::TimedOut`].
    pub async fn bury_before(&self, epoch: u8) -> Result<(), Fault> {
        let first = u64::from(epoch) << 56;
        let sql = format!(
            "INSERT INTO {table} (environment_id, organization_id, project_id, session_id, environment_type, friendly_id, \
             type, tags, created_at, updated_at, _version, _is_deleted) \
             SELECT environment_id, organization_id, project_id, session_id, environment_type, friendly_id, type, [], \
             created_at, updated_at, {version}, 1 FROM {table} FINAL WHERE _version < {first}",
            table = self.table(),
            version = first - 1,
        );
        let query = self.query(&sql).with_setting("async_insert", "0");
        timely(WRITE_TIMEOUT * 10, query.execute()).await
    }

    /// The newest epoch that any row is of; 0 for an empty table.
    ///
    /// # Errors
    /// [`Fault::Transient`], [`Fault::TimedOut`].
    pub async fn newest_epoch(&self) -> Result<u8, Fault> {
        let sql = format!("SELECT toUInt8(bitShiftRight(max(_version), 56)) FROM {}", self.table());
        Ok(self.fetch::<u8>(self.query(&sql)).await?.first().copied().unwrap_or_default())
    }

    /// A query on the database of the table. Values belong into its parameters.
    pub fn query(&self, sql: &str) -> Query {
        self.client.query(sql)
    }

    /// The rows of a query.
    ///
    /// # Errors
    /// [`Fault::Transient`], [`Fault::TimedOut`].
    pub async fn fetch<T: RowOwned + RowRead>(&self, query: Query) -> Result<Vec<T>, Fault> {
        timely(WRITE_TIMEOUT, query.fetch_all()).await
    }

    /// For statements that come before the database exists.
    async fn execute_anywhere(&self, sql: &str) -> Result<(), Fault> {
        timely(WRITE_TIMEOUT, self.server.query_raw(sql).execute()).await
    }
}

async fn timely<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, clickhouse::error::Error>>,
) -> Result<T, Fault> {
    match tokio::time::timeout(limit, work).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(Fault::TimedOut(limit)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn config(url: &str) -> ClickHouseConfig {
        ClickHouseConfig {
            url: Some(url.parse().expect("a URL")),
            user: "default".to_owned(),
            password: None,
            database: "trigger_dev".to_owned(),
            table: "sessions_v1".to_owned(),
            cluster: None,
            engine: ClickHouseEngine::Single,
            query_timeout: Duration::from_secs(10),
            fallback: false,
        }
    }
}
