//! [`Flusher`]: brings batches to ClickHouse, for as long as it takes. What it refuses for what a row holds becomes a dead letter, in
//! Postgres, before its batch counts as stored.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::TryFutureExt;
use tokio::sync::{Mutex, MutexGuard};
use tokio::time::Instant;

use super::batch::{Batch, RowChange};
use super::pgoutput::{Column, Tuple};
use super::row::{COLUMNS, SortKey, Version};
use super::{Context, RowVersion, surely};
use crate::domain::tenant::Environment;
use crate::domain::{Backoff, EnvironmentId};
use crate::store::index::clickhouse::{
    Environments, Fault, SessionRow, SessionWriter, check_columns, filed_environments, note_replicated,
};
use crate::store::metadata::DeadLetter;

/// The first pause before a transaction is looked at again that queries do not see yet, and the longest, before jitter.
const UNSEEN_PAUSE: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(500));
/// Sessions whose columns one query fetches, each with metadata of up to a megabyte, and bytes of what was fetched that are
/// stored at once.
const FETCHED: usize = 8;
const FETCHED_BYTES: usize = 8 << 20;

/// Parts of a month from which on inserts come less often, and how seldom they may become. A server slows inserts down by itself
/// at a thousand.
const MANY_PARTS: u64 = 150;
const LONGEST_GAP: Duration = Duration::from_secs(2);

/// Stores batches of one epoch.
#[derive(Clone)]
pub struct Flusher {
    context: Context,
    /// Whose dead letters are kept.
    slot: String,
    writer: SessionWriter,
    environments: Arc<Environments>,
    /// Held while columns that were fetched are in memory: nothing else counts them.
    fetching: Arc<Mutex<()>>,
    /// Held from when older rows are read to when they are stored, and while all rows are buried: what was read before a
    /// TRUNCATE must not be stored after it.
    older: Arc<Mutex<()>>,
}

impl Flusher {
    /// Stores by `context` what the stream of `slot` tells, and asks it for what that leaves out.
    pub fn new(context: Context, slot: &str) -> Self {
        let store = Arc::new(context.postgres.metadata().clone());
        Self {
            writer: SessionWriter::new(context.clickhouse.clone()),
            environments: Arc::new(Environments::new(store)),
            slot: slot.to_owned(),
            context,
            fetching: Arc::default(),
            older: Arc::default(),
        }
    }

    /// What it works with.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Stores a batch. Returns once every row of it is stored; ClickHouse and Postgres may be away meanwhile.
    pub async fn store(&self, batch: Batch) {
        let (begun, rows) = (Instant::now(), batch.rows.len());
        let is_partial = |change: &RowChange| change.row.as_ref().is_some_and(|row| !row.is_whole());
        let (partial, whole): (HashMap<_, _>, _) =
            batch.rows.into_iter().partition(|(_, change)| is_partial(change));
        self.store_whole(whole).await;
        self.store_partial(partial).await;
        let lag = batch.committed_at.map(|committed_at| {
            let millis = self.context.clock.now().millis().saturating_sub(committed_at);
            Duration::from_millis(millis.try_into().unwrap_or_default())
        });
        self.context.metrics.flushed(rows, begun.elapsed(), lag);
    }

    /// In portions, the columns that the stream has not repeated fetched for each.
    async fn store_partial(&self, mut partial: HashMap<SortKey, RowChange>) {
        while !partial.is_empty() {
            let _fetching = self.fetching.lock().await;
            let (mut portion, mut bytes) = (HashMap::new(), 0);
            while bytes < FETCHED_BYTES && !partial.is_empty() {
                let keys: Vec<_> = partial.keys().take(FETCHED).cloned().collect();
                let some = keys.into_iter().filter_map(|key| partial.remove_entry(&key)).collect();
                let whole = self.complete(some).await;
                bytes +=
                    whole.values().filter_map(|change| change.row.as_ref().map(Version::size)).sum::<usize>();
                portion.extend(whole);
            }
            self.store_whole(portion).await;
        }
    }

    /// Stores changes without missing columns. Returns once each is stored, or a dead letter: how many of those there are.
    pub(super) async fn store_whole(&self, changes: HashMap<SortKey, RowChange>) -> usize {
        let (rows, mut refused) = self.rows(changes).await;
        let mut parts = vec![rows];
        while let Some(mut rows) = parts.pop() {
            match self.insert(&rows).await {
                Ok(()) => self.context.metrics.inserted(rows.len()),
                // Halved until what is refused is alone: only its own attempt says that it is.
                Err(_) if rows.len() > 1 => {
                    let rest = rows.split_off(rows.len() / 2);
                    parts.extend([rest, rows]);
                }
                Err(fault) => {
                    let [row] = &rows[..] else { continue };
                    if !self.is_stored_without_column(row).await {
                        let (environment, session) = (row.environment_id.clone(), row.session_id.clone());
                        let version = RowVersion(row._version);
                        refused.push(self.dead_letter(environment, session, version, fault.to_string()));
                    }
                }
            }
        }
        self.keep(&refused).await;
        refused.len()
    }

    /// Tries until the rows are stored, whatever is away, or until ClickHouse refuses one of them for what it holds.
    async fn insert(&self, rows: &[SessionRow]) -> Result<(), Fault> {
        if rows.is_empty() {
            return Ok(());
        }
        let insert = async || match self.writer.insert(rows).await {
            // Of a table that somebody has changed no row is at fault.
            Err(fault) if fault.is_of_a_row() => {
                check_columns(&self.context.clickhouse).await.map(|()| Err(fault))
            }
            other => other.map(Ok),
        };
        surely("rows to ClickHouse", || insert().inspect_err(|_| self.context.metrics.retried())).await
    }

    /// Whether a row is taken once the column of type `JSON` does not hold its metadata, which lists do not read.
    async fn is_stored_without_column(&self, row: &SessionRow) -> bool {
        let has_column = self.context.clickhouse.options().metadata_column;
        has_column && self.insert(&[row.clone().without_metadata_column()]).await.is_ok()
    }

    /// What becomes of a change that cannot be stored. The reason says nothing of what the row holds.
    fn dead_letter(
        &self,
        environment: String,
        session: String,
        version: RowVersion,
        reason: String,
    ) -> DeadLetter {
        DeadLetter {
            id: format!("{}/{:016x}/{session}", self.slot, version.0),
            epoch: version.epoch().0,
            lsn: version.place().0,
            environment,
            session,
            reason,
            created_at: self.context.clock.now().millis(),
        }
    }

    async fn keep(&self, letters: &[DeadLetter]) {
        if letters.is_empty() {
            return;
        }
        for DeadLetter { session, reason, .. } in letters {
            tracing::error!(session.id = session, reason, "a change of a session is a dead letter");
        }
        let postgres = &self.context.postgres;
        surely("dead letters", || postgres.keep_dead_letters(&self.slot, letters)).await;
        self.context.metrics.refused(letters.len());
    }

    /// The gap between two inserts that are not full, after one of `gap`: twice as long, up to [`LONGEST_GAP`], while
    /// ClickHouse has not merged what there is, and half of it again afterwards, down to `least`.
    pub async fn next_gap(&self, gap: Duration, least: Duration) -> Duration {
        match self.writer.most_parts().await {
            Ok(parts) if parts > MANY_PARTS => (gap * 2).clamp(least, LONGEST_GAP.max(least)),
            Ok(_) => (gap / 2).max(least),
            Err(_) => gap,
        }
    }

    /// To be held from when older rows are read to when they are stored.
    pub async fn reading_older(&self) -> MutexGuard<'_, ()> {
        self.older.lock().await
    }

    /// Stores sessions as they stand, each a tuple of [`COLUMNS`] as text, at `version`. Returns once they are stored.
    pub async fn store_older(&self, sessions: Vec<Vec<Option<String>>>, version: RowVersion) {
        let versions = sessions.into_iter().filter_map(|columns| {
            let row = Version::new(tuple(columns));
            row.inspect_err(|error| tracing::error!(%error, "a session that cannot be read is left out")).ok()
        });
        let changes =
            versions.map(|row| (row.key().clone(), RowChange { version, xid: None, row: Some(row) }));
        self.store_whole(changes.collect()).await;
    }

    /// Puts tombstones in the place of all rows that are older than `version`, below it. Returns once it is done.
    pub async fn tombstone_before(&self, version: RowVersion) {
        surely("tombstones", || self.writer.tombstone_older_than(version.0)).await;
    }

    /// Puts tombstones at `version` in the place of all rows that are older. Returns once it is done.
    pub async fn tombstone_up_to(&self, version: RowVersion) {
        let _none = self.older.lock().await;
        // Whatever was told before has a lower version, so none is equal.
        self.tombstone_before(RowVersion(version.0 + 1)).await;
    }

    /// Says that all rows are there that are older than `version`, so many of them copied just now.
    pub async fn note_whole(&self, version: RowVersion, rows: u64) {
        let note = || note_replicated(&self.context.clickhouse, version.0, rows);
        surely("the end of a copy", note).await;
    }

    /// The rows of whole changes, in the order of the table, and what cannot be one.
    async fn rows(&self, changes: HashMap<SortKey, RowChange>) -> (Vec<SessionRow>, Vec<DeadLetter>) {
        let (mut rows, mut refused) = (Vec::with_capacity(changes.len()), Vec::new());
        // Most batches are of few environments.
        let mut environments: HashMap<String, Option<Arc<Environment>>> = HashMap::new();
        let has_column = self.context.clickhouse.options().metadata_column;
        for (key, change) in changes {
            if !environments.contains_key(&key.environment) {
                let found = self.environment(&key.environment, change.xid).await;
                environments.insert(key.environment.clone(), found);
            }
            // Its foreign key says that it was there; it was deleted with all of its sessions, by hand, and none of them is in
            // ClickHouse.
            let Some(environment) = &environments[&key.environment] else { continue };
            let row = match &change.row {
                None => {
                    Ok(SessionRow::tombstone(environment, &key.session, key.created_at, change.version.0))
                }
                Some(version) => version.row(environment, change.version),
            };
            match row {
                Ok(row) if has_column && change.row.is_some() => rows.push(row.with_metadata_column()),
                Ok(row) => rows.push(row),
                Err(error) => {
                    let SortKey { environment, session, .. } = key;
                    refused.push(self.dead_letter(environment, session, change.version, error.to_string()));
                }
            }
        }
        rows.sort_unstable_by(|one, other| order(one).cmp(&order(other)));
        (rows, refused)
    }

    /// Fetches the columns that the stream has not repeated. They may be of a later version, which then follows; a row that is
    /// gone is left out, because its tombstone follows.
    async fn complete(&self, mut changes: HashMap<SortKey, RowChange>) -> HashMap<SortKey, RowChange> {
        let ids: Vec<_> = changes.keys().map(|key| key.session.as_str()).collect();
        let xids: Vec<_> = changes.values().filter_map(|change| change.xid).collect();
        let mut found: HashMap<String, Tuple> = HashMap::new();
        for columns in self.fetch(&ids, &xids).await {
            let columns = tuple(columns);
            if let Ok(key) = SortKey::of(&columns) {
                found.insert(key.session, columns);
            }
        }
        changes.retain(|key, change| {
            let (Some(row), Some(now)) = (&mut change.row, found.get(&key.session)) else { return false };
            row.complete_from(now);
            row.is_whole()
        });
        changes
    }

    async fn fetch(&self, ids: &[&str], xids: &[u32]) -> Vec<Vec<Option<String>>> {
        let (first, longest) = UNSEEN_PAUSE;
        let mut unseen = Backoff::new(first, longest);
        loop {
            let found = surely("sessions", || self.context.postgres.sessions(COLUMNS, ids, xids)).await;
            match found {
                Some(rows) => return rows,
                None => unseen.pause().await,
            }
        }
    }

    /// The environment of this id; one that is gone as it is filed in ClickHouse, if it is.
    pub(super) async fn environment(&self, id: &str, xid: Option<u32>) -> Option<Arc<Environment>> {
        let id = EnvironmentId::from_stored(id);
        let mut found = surely("environments", || self.environments.find(&id)).await;
        if let (None, Some(xid)) = (&found, xid) {
            // It may have been made in the same transaction.
            self.fetch(&[], &[xid]).await;
            found = surely("environments", || self.environments.find(&id)).await;
        }
        if found.is_none() {
            let filed = || filed_environments(&self.context.clickhouse, Some(&id));
            let filed = surely("an environment", filed).await.into_iter().next();
            found = filed.map(|environment| self.environments.know(environment));
        }
        found
    }
}

/// Texts of a query as the stream would have them.
pub(super) fn tuple(columns: Vec<Option<String>>) -> Tuple {
    columns.into_iter().map(|text| text.map_or(Column::Null, |text| Column::Text(text.into()))).collect()
}

/// The order of the table, so that the server has less to sort.
fn order(row: &SessionRow) -> (&str, &str, &str, i64, &str) {
    (&row.organization_id, &row.project_id, &row.environment_id, row.created_at, &row.session_id)
}
