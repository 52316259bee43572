//! [`SessionWriter`]: rows into the table.

use std::time::Duration;

use super::client::{ClickHouse, Fault, timely};
use super::row::SessionRow;

/// What every insert is sent with.
const INSERT_SETTINGS: [(&str, &str); 5] = [
    // A server's default may be to queue, and to answer before the rows are anywhere.
    ("async_insert", "0"),
    ("input_format_binary_read_json_as_string", "1"),
    // Of `{"a":{"b":1},"a.b":2}` the column can keep one; without this it refuses both.
    ("type_json_skip_duplicated_paths", "1"),
    ("input_format_json_infer_array_of_dynamic_from_array_of_different_types", "1"),
    // Rows of one page may be from more than the hundred months that are allowed otherwise.
    ("max_partitions_per_insert_block", "0"),
];

/// Longest that tombstones for one month may take: FINAL reads all of its rows.
const BURY_TIMEOUT: Duration = Duration::from_secs(600);

/// Writes versions of sessions. The greatest version of a session counts, in whatever order they come.
#[derive(Clone, Debug)]
pub struct SessionWriter {
    clickhouse: ClickHouse,
}

impl SessionWriter {
    /// A writer on this connection.
    pub fn new(clickhouse: ClickHouse) -> Self {
        Self { clickhouse }
    }

    /// Stores rows as one insert. Once it has returned they are there, on a single server synced to its disk, on a cluster
    /// on a quorum of replicas. Repeating it changes nothing.
    ///
    /// # Errors
    /// [`Fault::Away`], [`Fault::TimedOut`], [`Fault::Refused`]; after each of them some rows may be stored.
    pub async fn insert(&self, rows: &[SessionRow]) -> Result<(), Fault> {
        let (clickhouse, limit) = (&self.clickhouse, self.clickhouse.options().insert_timeout);
        let work = async {
            // With validation the crate sends the type `JSON` without its parameters, which the server refuses.
            let client = clickhouse.client().clone().with_validation(false);
            let mut insert = client.insert::<SessionRow>("sessions_v1").await?;
            for (name, value) in INSERT_SETTINGS.iter().chain(clickhouse.cluster_settings()) {
                insert = insert.with_setting(*name, *value);
            }
            for row in rows {
                insert.write(row).await?;
            }
            insert.end().await
        };
        timely(limit, work).await
    }

    /// As [`SessionWriter::insert`]; a row whose metadata the column of type `JSON` cannot take is stored with `{}` there.
    /// Returns how many there were of those.
    ///
    /// # Errors
    /// As [`SessionWriter::insert`].
    pub async fn insert_or_blank(&self, rows: Vec<SessionRow>) -> Result<usize, Fault> {
        let (mut blanked, mut parts) = (0, vec![rows]);
        while let Some(mut rows) = parts.pop() {
            match self.insert(&rows).await {
                // Halved until what is refused is alone.
                Err(fault) if fault.is_of_a_row() && rows.len() > 1 => {
                    let rest = rows.split_off(rows.len() / 2);
                    parts.extend([rest, rows]);
                }
                Err(fault) if fault.is_of_a_row() && self.clickhouse.options().metadata_column => {
                    let rows: Vec<_> = rows.into_iter().map(SessionRow::without_metadata_column).collect();
                    self.insert(&rows).await?;
                    blanked += 1;
                }
                other => other?,
            }
        }
        Ok(blanked)
    }

    /// The greatest version that is stored; 0 if there is none.
    ///
    /// # Errors
    /// As [`ClickHouse::fetch`].
    pub async fn newest_version(&self) -> Result<u64, Fault> {
        let newest = self.clickhouse.query("SELECT max(_version) FROM sessions_v1");
        Ok(self.clickhouse.fetch_at_length::<u64>(newest).await?.into_iter().next().unwrap_or_default())
    }

    /// The connection.
    pub fn clickhouse(&self) -> &ClickHouse {
        &self.clickhouse
    }

    /// Into how many parts the month is split that is split into the most.
    ///
    /// # Errors
    /// As [`ClickHouse::fetch`].
    pub async fn most_parts(&self) -> Result<u64, Fault> {
        let parts = "SELECT ifNull(max(parts), 0) FROM (SELECT count() AS parts FROM system.parts \
                     WHERE database = {database:String} AND table = 'sessions_v1' AND active GROUP BY partition_id)";
        let parts = self.clickhouse.query(parts).param("database", self.clickhouse.database());
        Ok(self.clickhouse.fetch::<u64>(parts).await?.into_iter().next().unwrap_or_default())
    }

    /// Puts a tombstone in the place of every session whose newest version is older than `version`. Its own is one less, so
    /// that it hides nothing that was stored at `version`.
    ///
    /// # Errors
    /// As [`SessionWriter::insert`].
    pub async fn tombstone_older_than(&self, version: u64) -> Result<(), Fault> {
        let months = "SELECT DISTINCT partition_id FROM system.parts \
                      WHERE database = {database:String} AND table = 'sessions_v1' AND active";
        let months = self.clickhouse.query(months).param("database", self.clickhouse.database());
        for month in self.clickhouse.fetch::<String>(months).await? {
            self.tombstone_in(&month, version).await?;
        }
        Ok(())
    }

    async fn tombstone_in(&self, partition: &str, version: u64) -> Result<(), Fault> {
        let text = "INSERT INTO sessions_v1 (environment_id, organization_id, project_id, session_id, environment_type, \
             friendly_id, type, created_at, updated_at, _version, _is_deleted) \
             SELECT environment_id, organization_id, project_id, session_id, environment_type, friendly_id, type, \
             created_at, updated_at, {tombstone:UInt64}, 1 FROM sessions_v1 FINAL \
             WHERE _partition_id = {partition:String} AND _version < {version:UInt64}";
        let query = self.clickhouse.client().query_raw(text).param("partition", partition);
        let query = query.param("version", version).param("tombstone", version.saturating_sub(1));
        let settings = INSERT_SETTINGS.iter().chain(self.clickhouse.cluster_settings());
        let query = settings.fold(query, |query, (name, value)| query.with_setting(*name, *value));
        timely(BURY_TIMEOUT, query.execute()).await
    }
}
