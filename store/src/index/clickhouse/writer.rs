//! [`SessionWriter`]: rows into the table.

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
    /// [`Fault::Refused`] if it stored none; after [`Fault::Away`] and [`Fault::TimedOut`] nobody knows what it stored.
    pub async fn insert(&self, rows: &[SessionRow]) -> Result<(), Fault> {
        let (clickhouse, limit) = (&self.clickhouse, self.clickhouse.options().insert_timeout);
        let work = async {
            // With validation the crate sends the type `JSON` without its parameters, which the server refuses.
            let client = clickhouse.client().clone().with_validation(false);
            let mut insert = client.insert::<SessionRow>("sessions_v1").await?;
            for (name, value) in INSERT_SETTINGS {
                insert = insert.with_setting(name, value);
            }
            if clickhouse.options().cluster.is_some() {
                insert = insert.with_setting("insert_quorum", "auto");
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
        match self.insert(&rows).await {
            Err(fault) if fault.is_of_a_row() && self.clickhouse.options().metadata_column => {}
            other => return other.map(|()| 0),
        }
        let mut blanked = 0;
        for row in rows {
            match self.insert(std::slice::from_ref(&row)).await {
                Err(fault) if fault.is_of_a_row() => {
                    self.insert(&[row.without_metadata_column()]).await?;
                    blanked += 1;
                }
                other => other?,
            }
        }
        Ok(blanked)
    }

    /// Puts a tombstone of `version` in the place of every session whose newest version is older.
    ///
    /// # Errors
    /// As [`SessionWriter::insert`].
    pub async fn bury_older_than(&self, version: u64) -> Result<(), Fault> {
        let text = "INSERT INTO sessions_v1 (environment_id, organization_id, project_id, session_id, environment_type, \
             friendly_id, type, created_at, updated_at, _version, _is_deleted) \
             SELECT environment_id, organization_id, project_id, session_id, environment_type, friendly_id, type, \
             created_at, updated_at, {version:UInt64}, 1 FROM sessions_v1 FINAL WHERE _version < {version:UInt64}";
        let query = self.clickhouse.client().query_raw(text).param("version", version);
        let query =
            query.with_setting("async_insert", "0").with_setting("max_partitions_per_insert_block", "0");
        self.clickhouse.execute(query).await
    }
}
