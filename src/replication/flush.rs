//! [`Flusher`]: brings batches to ClickHouse, for as long as it takes.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::sleep;

use super::RowVersion;
use super::batch::{Batch, RowChange};
use super::pgoutput::{Column, Tuple};
use super::row::{COLUMNS, SortKey, Version};
use crate::domain::error::Result;
use crate::domain::tenant::Environment;
use crate::domain::{EnvironmentId, MetadataStore};
use crate::store::index::clickhouse::{Fault, SessionRow, SessionWriter};
use crate::store::metadata::ReplicationStore;

/// The first pause before a failed attempt is made again, before jitter, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));
/// The same for a transaction that queries do not see yet.
const UNSEEN_PAUSE: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(500));
/// Sessions whose columns one query fetches. Each has metadata of up to a megabyte.
const FETCHED: usize = 8;

/// Stores batches of one epoch.
#[derive(Clone)]
pub struct Flusher {
    writer: SessionWriter,
    postgres: ReplicationStore,
    store: Arc<dyn MetadataStore>,
    metadata_column: bool,
    /// They never change.
    environments: Arc<Mutex<HashMap<String, Arc<Environment>>>>,
}

/// Pauses that double, each of a random part of its length: what fails together does not come back together.
struct Pauses {
    next: Duration,
    longest: Duration,
}

impl Pauses {
    fn new((first, longest): (Duration, Duration)) -> Self {
        Self { next: first, longest }
    }

    async fn pause(&mut self) {
        let random = RandomState::new().hash_one(self.next) % 1024;
        sleep(self.next.mul_f64(random as f64 / 1024.0)).await;
        self.next = (self.next * 2).min(self.longest);
    }
}

impl Flusher {
    /// A flusher that writes by `writer` what a stream tells, and asks `postgres` and `store` for what it leaves out.
    pub fn new(
        writer: SessionWriter,
        postgres: ReplicationStore,
        store: Arc<dyn MetadataStore>,
        metadata_column: bool,
    ) -> Self {
        Self { writer, postgres, store, metadata_column, environments: Arc::default() }
    }

    /// Stores a batch. Returns once every row of it is stored; ClickHouse and Postgres may be away meanwhile.
    pub async fn store(&self, batch: Batch) {
        let rows = self.rows(batch.rows).await;
        self.insert_surely(&rows).await;
    }

    async fn insert_surely(&self, rows: &[SessionRow]) {
        let mut pauses = Pauses::new(PAUSE);
        while let Err(fault) = self.insert(rows).await {
            tracing::warn!(
                error = &fault as &dyn std::error::Error,
                rows = rows.len(),
                "ClickHouse does not take rows; they are sent again"
            );
            pauses.pause().await;
        }
    }

    /// Stores sessions as they stand, each a tuple of [`COLUMNS`] as text, at `version`. Returns once they are stored.
    pub async fn store_older(&self, sessions: Vec<Vec<Option<String>>>, version: RowVersion) {
        let versions = sessions.into_iter().filter_map(|columns| Version::new(tuple(columns)).ok());
        let changes =
            versions.map(|row| (row.key().clone(), RowChange { version, xid: None, row: Some(row) }));
        let rows = self.rows(changes.collect()).await;
        self.insert_surely(&rows).await;
    }

    /// Puts tombstones in the place of all rows that are older than `version`, below it. Returns once it is done.
    pub async fn bury_before(&self, version: RowVersion) {
        let mut pauses = Pauses::new(PAUSE);
        while let Err(fault) = self.writer.bury_older_than(version.0).await {
            tracing::warn!(
                error = &fault as &dyn std::error::Error,
                "ClickHouse does not take tombstones; they are sent again"
            );
            pauses.pause().await;
        }
    }

    /// Puts tombstones at `version` in the place of all rows that are older. Returns once it is done.
    pub async fn bury(&self, version: RowVersion) {
        // Whatever was told before has a lower version, so none is equal.
        self.bury_before(RowVersion(version.0 + 1)).await;
    }

    async fn insert(&self, rows: &[SessionRow]) -> std::result::Result<(), Fault> {
        match rows {
            [] => Ok(()),
            rows if self.metadata_column => self.writer.insert_or_blank(rows.to_vec()).await.map(drop),
            rows => self.writer.insert(rows).await,
        }
    }

    /// The rows of a batch, whole, in the order of the table.
    async fn rows(&self, mut changes: HashMap<SortKey, RowChange>) -> Vec<SessionRow> {
        self.complete(&mut changes).await;
        let mut rows = Vec::with_capacity(changes.len());
        for (key, change) in changes {
            let Some(environment) = self.environment(&key.environment, change.xid).await else {
                // Its foreign key says that it was there; it was deleted with all of its sessions, by hand.
                tracing::error!(
                    session.id = key.session,
                    "a session of an environment that is gone is left out"
                );
                continue;
            };
            rows.push(match change.row {
                None => SessionRow::tombstone(&environment, &key.session, key.created_at, change.version.0),
                Some(version) => match version.row(&environment, change.version) {
                    Ok(row) if self.metadata_column => row.with_metadata_column(),
                    Ok(row) => row,
                    Err(error) => {
                        tracing::error!(session.id = key.session, %error, "a session that cannot be read is left out");
                        continue;
                    }
                },
            });
        }
        rows.sort_unstable_by(|one, other| order(one).cmp(&order(other)));
        rows
    }

    /// Fetches the columns that the stream has not repeated. They may be of a later version, which then follows; a row that is
    /// gone is left out, because its tombstone follows.
    async fn complete(&self, changes: &mut HashMap<SortKey, RowChange>) {
        let is_partial = |change: &RowChange| change.row.as_ref().is_some_and(|row| !row.is_whole());
        let partial: Vec<_> = changes.iter().filter(|(_, change)| is_partial(change)).collect();
        let mut found: HashMap<String, Tuple> = HashMap::new();
        for some in partial.chunks(FETCHED) {
            let ids: Vec<_> = some.iter().map(|(key, _)| key.session.as_str()).collect();
            let xids: Vec<_> = some.iter().filter_map(|(_, change)| change.xid).collect();
            for columns in self.fetch(&ids, &xids).await {
                let columns = tuple(columns);
                if let Ok(key) = SortKey::of(&columns) {
                    found.insert(key.session, columns);
                }
            }
        }
        changes.retain(|key, change| match &mut change.row {
            Some(row) if !row.is_whole() => {
                let now = found.get(&key.session);
                now.inspect(|now| row.complete_from(now)).is_some_and(|_| Version::is_whole(row))
            }
            _ => true,
        });
    }

    async fn fetch(&self, ids: &[&str], xids: &[u32]) -> Vec<Vec<Option<String>>> {
        let mut unseen = Pauses::new(UNSEEN_PAUSE);
        loop {
            let found = surely("sessions", || self.postgres.sessions(COLUMNS, ids, xids)).await;
            match found {
                Some(rows) => return rows,
                None => unseen.pause().await,
            }
        }
    }

    async fn environment(&self, id: &str, xid: Option<u32>) -> Option<Arc<Environment>> {
        if let Some(known) = self.known().get(id) {
            return Some(known.clone());
        }
        let find = || async {
            let all = self.store.environments().await?;
            Ok(all.into_iter().find(|one| one.id == EnvironmentId::from_stored(id)))
        };
        let mut found = surely("environments", find).await;
        if let (None, Some(xid)) = (&found, xid) {
            // It may have been made in the same transaction.
            self.fetch(&[], &[xid]).await;
            found = surely("environments", find).await;
        }
        let found = Arc::new(found?);
        self.known().insert(id.to_owned(), found.clone());
        Some(found)
    }

    fn known(&self) -> MutexGuard<'_, HashMap<String, Arc<Environment>>> {
        self.environments.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Texts of a query as the stream would have them.
fn tuple(columns: Vec<Option<String>>) -> Tuple {
    columns.into_iter().map(|text| text.map_or(Column::Null, |text| Column::Text(text.into()))).collect()
}

/// The order of the table, so that the server has less to sort.
fn order(row: &SessionRow) -> (&str, &str, &str, i64, &str) {
    (&row.organization_id, &row.project_id, &row.environment_id, row.created_at, &row.session_id)
}

/// Asks Postgres until it answers.
pub(super) async fn surely<T, F: Future<Output = Result<T>>>(what: &'static str, ask: impl Fn() -> F) -> T {
    let mut pauses = Pauses::new(PAUSE);
    loop {
        match ask().await {
            Ok(answer) => return answer,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, what, "Postgres does not answer the replicator; it is asked again");
            }
        }
        pauses.pause().await;
    }
}
