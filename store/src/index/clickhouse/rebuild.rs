//! [`Rebuild`]: copies every session of the metadata store into ClickHouse.
//!
//! The table `rebuilds` says how far one has come, so that one that was cut off goes on. Each has a version of its own, the
//! time at which it began, so what an earlier one has stored, and nobody has stored since, is gone from the store: at the
//! end it gets tombstones.

use std::sync::Arc;

use clickhouse::Row;
use serde::{Deserialize, Serialize};

use super::client::{ClickHouse, Fault, timely};
use super::environments::Environments;
use super::marker;
use super::row::SessionRow;
use super::schema;
use super::writer::SessionWriter;
use sessiond_domain::error::{Error, Result};
use sessiond_domain::port::MetadataStore;
use sessiond_domain::session::Session;
use sessiond_domain::{SessionId, Timestamp};

/// Sessions copied in one step at most, and what their documents may take together before a step is made smaller: the size
/// of metadata has no limit of its own.
const PAGE_MAX: usize = 500;
const PAGE_BYTES: usize = 8 << 20;
/// Versions of rebuilds lie below this; from here on they are a replicator's.
pub const VERSION_END: u64 = 1 << 56;

/// A rebuild under way.
pub struct Rebuild {
    clickhouse: ClickHouse,
    store: Arc<dyn MetadataStore>,
    environments: Environments,
    writer: SessionWriter,
    version: u64,
    after: Option<SessionId>,
    page: usize,
    progress: Progress,
}

/// How far a rebuild has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Sessions copied, by an earlier run of the same rebuild too.
    pub sessions: u64,
    /// Of those that this run has copied, those whose metadata the column of type `JSON` could not take; lists have it all the
    /// same.
    pub blanked: u64,
    /// Whether it is complete.
    pub finished: bool,
}

/// A row of `rebuilds`.
#[derive(Debug, Row, Serialize, Deserialize)]
struct Step {
    version: u64,
    after: String,
    rows: u64,
    finished: u8,
}

impl Rebuild {
    /// Begins one at `now`, or with `resume` goes on with the last one if that is not finished. Makes the tables if there
    /// are none.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if ClickHouse is away or its tables cannot be used.
    pub async fn begin(
        clickhouse: ClickHouse,
        store: Arc<dyn MetadataStore>,
        resume: bool,
        now: Timestamp,
    ) -> Result<Self> {
        schema::migrate(&clickhouse).await?;
        let last = last_step(&clickhouse, "").await?;
        // Its rows count for more than those of any rebuild.
        let newest = SessionWriter::new(clickhouse.clone()).newest_version().await?;
        if last.as_ref().map_or(newest, |step| step.version.max(newest)) >= VERSION_END {
            return Err(Error::NotReady(
                "a replicator keeps this index: `sessiond replicate` brings it up to date, and a copy beside it needs another \
                 clickhouse.database",
            ));
        }
        let mut rebuild = Self {
            environments: Environments::new(store.clone()),
            writer: SessionWriter::new(clickhouse.clone()),
            clickhouse,
            store,
            version: u64::try_from(now.millis()).unwrap_or(1),
            after: None,
            page: PAGE_MAX / 2,
            progress: Progress::default(),
        };
        match last {
            Some(step) if resume && step.finished == 0 => {
                rebuild.version = step.version;
                rebuild.after = Some(SessionId::from_stored(&step.after)).filter(|_| !step.after.is_empty());
                rebuild.progress.sessions = step.rows;
            }
            // Whatever the clock says: what this one stores must count against what earlier ones have stored, and its
            // tombstones, which are one less, against nothing that lives.
            Some(step) => rebuild.version = rebuild.version.max(step.version + 2),
            None => {}
        }
        if rebuild.version >= VERSION_END {
            return Err(Error::internal("the clock is beyond what a version can hold"));
        }
        rebuild.note().await?;
        Ok(rebuild)
    }

    /// How far it has come.
    pub fn progress(&self) -> Progress {
        self.progress
    }

    /// Copies the next page; at the end clears what is gone from the store, and says that lists may be asked.
    ///
    /// # Errors
    /// [`Error::Unavailable`]; the same step may be tried again.
    pub async fn step(&mut self) -> Result<Progress> {
        let page = self.store.scan_sessions(self.after.as_ref(), self.page).await?;
        if let Some(last) = page.last().map(|session| session.id.clone()) {
            let copied = page.len() as u64;
            let rows = self.rows(page).await?;
            let bytes: usize = rows.iter().map(|row| row.document.len()).sum();
            self.page =
                if bytes > PAGE_BYTES { (self.page / 2).max(1) } else { (self.page * 2).min(PAGE_MAX) };
            self.progress.blanked += self.writer.insert_or_blank(rows).await? as u64;
            self.progress.sessions += copied;
            self.after = Some(last);
        } else {
            // One that has begun after this one, and was faster, has not seen what this one stored.
            let newest = last_step(&self.clickhouse, "WHERE finished = 1").await?;
            let newest = newest.map_or(self.version, |step| step.version.max(self.version));
            self.writer.tombstone_older_than(newest).await?;
            self.progress.finished = true;
        }
        self.note().await?;
        Ok(self.progress)
    }

    async fn rows(&self, page: Vec<Session>) -> Result<Vec<SessionRow>> {
        let column = self.clickhouse.options().metadata_column;
        let mut rows = Vec::with_capacity(page.len());
        for session in page {
            let environment = self.environments.find(&session.environment).await?;
            let environment =
                environment.ok_or_else(|| Error::internal("a session without an environment"))?;
            let row = SessionRow::new(session, &environment, self.version);
            rows.push(if column { row.with_metadata_column() } else { row });
        }
        // In the order of the table, which spares the server the work.
        let key = |row: &SessionRow| (row.environment_id.clone(), row.created_at, row.session_id.clone());
        rows.sort_by_cached_key(key);
        Ok(rows)
    }

    async fn note(&self) -> Result<(), Fault> {
        let after = self.after.as_ref().map_or_else(String::new, ToString::to_string);
        let (version, rows) = (self.version, self.progress.sessions);
        note(&self.clickhouse, Step { version, after, rows, finished: self.progress.finished.into() }).await
    }
}

/// Who has made the copy that lists come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// A rebuild, which began then.
    Rebuild(Timestamp),
    /// A replicator; since when it does not keep it up to date any more, if it does not.
    Replication(Option<Timestamp>),
}

/// Where the newest whole copy is from; `None` if there is none.
pub(super) async fn origin(clickhouse: &ClickHouse) -> Result<Option<Origin>, Fault> {
    let Some(step) = last_step(clickhouse, "WHERE finished = 1").await? else { return Ok(None) };
    Ok(Some(match i64::try_from(step.version) {
        Ok(millis) if step.version < VERSION_END => Origin::Rebuild(Timestamp::from_millis(millis)),
        _ => Origin::Replication(marker::left_since(clickhouse).await?),
    }))
}

/// Says that everything is there that is older than what a replicator has stored at `version` and above.
///
/// # Errors
/// As [`SessionWriter::insert`].
pub async fn note_replicated(clickhouse: &ClickHouse, version: u64, rows: u64) -> Result<(), Fault> {
    note(clickhouse, Step { version, after: String::new(), rows, finished: 1 }).await
}

async fn note(clickhouse: &ClickHouse, step: Step) -> Result<(), Fault> {
    let work = async {
        let mut insert = clickhouse.client().insert::<Step>("rebuilds").await?;
        for (name, value) in [("async_insert", "0")].iter().chain(clickhouse.cluster_settings()) {
            insert = insert.with_setting(*name, *value);
        }
        insert.write(&step).await?;
        insert.end().await
    };
    timely(clickhouse.options().insert_timeout, work).await
}

async fn last_step(clickhouse: &ClickHouse, which: &str) -> Result<Option<Step>, Fault> {
    let text = format!(
        "SELECT version, after, rows, finished FROM rebuilds {which} \
         ORDER BY version DESC, finished DESC, rows DESC LIMIT 1"
    );
    Ok(clickhouse.fetch(clickhouse.query(&text)).await?.into_iter().next())
}
