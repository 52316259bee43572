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
/// Versions of rebuilds lie below this; from here on they are the replicator's.
const VERSION_END: u64 = 1 << 56;

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
            self.writer.bury_older_than(newest).await?;
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
        let step = Step {
            version: self.version,
            after: self.after.as_ref().map_or_else(String::new, ToString::to_string),
            rows: self.progress.sessions,
            finished: self.progress.finished.into(),
        };
        let work = async {
            let mut insert = self.clickhouse.client().insert::<Step>("rebuilds").await?;
            for (name, value) in [("async_insert", "0")].iter().chain(self.clickhouse.cluster_settings()) {
                insert = insert.with_setting(*name, *value);
            }
            insert.write(&step).await?;
            insert.end().await
        };
        timely(self.clickhouse.options().insert_timeout, work).await
    }
}

/// When the last rebuild that was finished began; `None` if none was.
pub(super) async fn last_finished(clickhouse: &ClickHouse) -> Result<Option<Timestamp>, Fault> {
    let step = last_step(clickhouse, "WHERE finished = 1").await?;
    Ok(step.map(|step| Timestamp::from_millis(step.version.try_into().unwrap_or(i64::MAX))))
}

async fn last_step(clickhouse: &ClickHouse, which: &str) -> Result<Option<Step>, Fault> {
    let text = format!(
        "SELECT version, after, rows, finished FROM rebuilds {which} \
         ORDER BY version DESC, finished DESC, rows DESC LIMIT 1"
    );
    Ok(clickhouse.fetch(clickhouse.query(&text)).await?.into_iter().next())
}
