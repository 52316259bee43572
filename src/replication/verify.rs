//! Compares both sides, column by column, while writes go on; and mends what differs.

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use sqlx::Row as _;
use tokio::time::{Instant, sleep};

use super::batch::version;
use super::convert::{self, Columns, ConvertError};
use super::environments::{Environment, Environments};
use super::flush::{Wanted, columns_of, read};
use super::postgres::{Lsn, Postgres, Status};
use crate::clickhouse::{ClickHouse, Fault, RowKey, SessionRow};

/// Rows of either side that are in memory at once.
const PAGE: usize = 2000;
/// Longest that the replication may stand still.
const PATIENCE: Duration = Duration::from_secs(60);
/// Rows that differ and are looked at again; more are not worth the time, since something else is wrong.
const SUSPECTS_MAX: usize = 100_000;
/// How often a session that changes all the time is looked at before it is left alone.
const LOOKS_MAX: usize = 10;

/// Why the two sides cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// Postgres is away.
    #[error("Postgres does not answer")]
    Postgres(#[from] sqlx::Error),
    /// ClickHouse is away.
    #[error("ClickHouse does not answer")]
    ClickHouse(#[from] Fault),
    /// A row of Postgres that this binary does not understand.
    #[error("cannot read a session of Postgres")]
    Convert(#[from] ConvertError),
    /// Nobody replicates, or a backfill is under way.
    #[error("the replication has not come to {wanted} within {PATIENCE:?}: it is {status} at {reached}")]
    Behind {
        /// Where it had to come to.
        wanted: Lsn,
        /// Where it is.
        reached: Lsn,
        /// How far the epoch is.
        status: &'static str,
    },
    /// Nothing has ever been replicated.
    #[error("there is no replication with this slot yet")]
    NeverBegun,
}

/// How a session differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Difference {
    /// In Postgres only.
    Missing,
    /// Another version in ClickHouse.
    Stale,
    /// In ClickHouse only.
    Phantom,
}

/// What a comparison found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Sessions that were compared.
    pub compared: u64,
    /// Those that differ, by id.
    pub differences: BTreeMap<String, Difference>,
}

impl Report {
    /// How many differ in this way.
    pub fn count(&self, difference: Difference) -> usize {
        self.differences.values().filter(|found| **found == difference).count()
    }
}

/// Both sides of a replication.
pub struct Verifier {
    postgres: Postgres,
    clickhouse: ClickHouse,
    slot: String,
}

impl Verifier {
    /// Asks nobody yet.
    pub fn new(postgres: Postgres, clickhouse: ClickHouse, slot: String) -> Self {
        Self { postgres, clickhouse, slot }
    }

    /// Compares every column of every session, apart from the JSON that is for analysis. What changes meanwhile is looked
    /// at again.
    ///
    /// # Errors
    /// [`VerifyError`].
    pub async fn compare(&self) -> Result<Report, VerifyError> {
        self.catch_up().await?;
        let mut report = Report::default();
        let mut suspects = self.walk(&mut report.compared).await?;
        for _ in 0..LOOKS_MAX {
            if suspects.is_empty() {
                break;
            }
            suspects = self.look_again(suspects, &mut report).await?;
        }
        Ok(report)
    }

    /// Makes every session that differs come through the WAL once more, and buries those that are not there.
    ///
    /// # Errors
    /// [`VerifyError`].
    pub async fn repair(&self, report: &Report) -> Result<(), VerifyError> {
        let of = |wanted: fn(&Difference) -> bool| -> Vec<String> {
            let ids = report.differences.iter().filter(|(_, found)| wanted(found));
            ids.map(|(id, _)| id.clone()).collect()
        };
        touch(&self.postgres, &of(|found| *found != Difference::Phantom)).await?;
        let phantoms = of(|found| *found == Difference::Phantom);
        let epoch = self.postgres.state(&self.slot).await?.ok_or(VerifyError::NeverBegun)?.epoch;
        let now = version(epoch, self.postgres.wal_position().await?.0);
        let mut rows = self.clickhouse.find(&phantoms).await?;
        for row in &mut rows {
            (row._version, row._is_deleted) = (now.max(row._version), 1);
        }
        if !rows.is_empty() {
            self.clickhouse.insert(&rows).await?;
        }
        Ok(())
    }

    /// Waits until everything that is committed now is in ClickHouse.
    async fn catch_up(&self) -> Result<(), VerifyError> {
        let wanted = self.postgres.emit("sessiond.verify").await?;
        let mut moved = Instant::now();
        let mut last = Lsn::default();
        loop {
            let state = self.postgres.state(&self.slot).await?.ok_or(VerifyError::NeverBegun)?;
            if state.status == Status::Streaming && state.flushed >= wanted {
                return Ok(());
            }
            if state.flushed > last {
                (last, moved) = (state.flushed, Instant::now());
            }
            if moved.elapsed() > PATIENCE {
                return Err(VerifyError::Behind {
                    wanted,
                    reached: state.flushed,
                    status: state.status.as_str(),
                });
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Goes through both sides in the order of the sort key.
    async fn walk(&self, compared: &mut u64) -> Result<Vec<String>, VerifyError> {
        let (mut here, mut there) =
            (Here::new(self.postgres.clone()).await?, There::new(self.clickhouse.clone()));
        let mut suspects = Vec::new();
        while suspects.len() < SUSPECTS_MAX {
            let order = match (here.peek().await?, there.peek().await?) {
                (None, None) => break,
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(here), Some(there)) => here.key().cmp(&there.key()),
            };
            *compared += 1;
            let expected = if order.is_le() { here.take() } else { None };
            let found = if order.is_ge() { there.take() } else { None };
            if !same(expected.as_ref(), found.as_ref()) {
                suspects.extend(expected.or(found).map(|row| row.session_id));
            }
        }
        Ok(suspects)
    }

    /// Reads Postgres, waits until that has arrived, and reads ClickHouse. What Postgres holds otherwise by then is to be
    /// looked at once more.
    async fn look_again(
        &self,
        suspects: Vec<String>,
        report: &mut Report,
    ) -> Result<Vec<String>, VerifyError> {
        let environments = Environments::new(self.postgres.clone());
        let mut again = Vec::new();
        for ids in suspects.chunks(PAGE) {
            let before = self.expected(ids, &environments).await?;
            self.catch_up().await?;
            let found = self.clickhouse.find(ids).await?;
            let found: HashMap<_, _> = found.into_iter().map(|row| (row.session_id.clone(), row)).collect();
            let after = self.expected(ids, &environments).await?;
            for id in ids {
                let (expected, found) = (before.get(id), found.get(id));
                if same(expected, found) {
                    continue;
                }
                if expected != after.get(id) {
                    again.push(id.clone());
                    continue;
                }
                let difference = match (expected, found) {
                    (Some(_), None) => Difference::Missing,
                    (None, _) => Difference::Phantom,
                    (Some(_), Some(_)) => Difference::Stale,
                };
                report.differences.insert(id.clone(), difference);
            }
        }
        Ok(again)
    }

    async fn expected(
        &self,
        ids: &[String],
        environments: &Environments,
    ) -> Result<HashMap<String, SessionRow>, VerifyError> {
        let mut rows = HashMap::new();
        for columns in read(&self.postgres, Wanted::These(ids)).await? {
            if let Some(environment) = environments.find(columns.environment_id()).await? {
                let row = convert::row(&columns, &environment, 0)?;
                rows.insert(row.session_id.clone(), row);
            }
        }
        Ok(rows)
    }
}

/// Whether two rows say the same, whatever their versions.
fn same(expected: Option<&SessionRow>, found: Option<&SessionRow>) -> bool {
    let plain = |row: &SessionRow| SessionRow { _version: 0, metadata: String::new(), ..row.clone() };
    match (expected, found) {
        (Some(expected), Some(found)) => plain(expected) == plain(found),
        (expected, found) => expected.is_none() && found.is_none(),
    }
}

/// Changes rows without changing them, so that they come through the WAL with a version of their own.
pub(super) async fn touch(postgres: &Postgres, ids: &[String]) -> Result<(), sqlx::Error> {
    for some in ids.chunks(PAGE) {
        sqlx::query("UPDATE sessions SET lapsed = lapsed WHERE id = ANY($1)")
            .bind(some)
            .execute(postgres.pool())
            .await?;
    }
    Ok(())
}

/// Sessions of Postgres in the order of ClickHouse's sort key.
struct Here {
    postgres: Postgres,
    environments: VecDeque<(String, Environment)>,
    after: (i64, String),
    page: VecDeque<SessionRow>,
}

impl Here {
    async fn new(postgres: Postgres) -> Result<Self, VerifyError> {
        let rows: Vec<(String, String, String, String)> =
            sqlx::query_as("SELECT organization, project, id, kind FROM environments")
                .fetch_all(postgres.pool())
                .await?;
        let mut rows: Vec<_> = rows;
        rows.sort_unstable();
        let environments = rows
            .into_iter()
            .map(|(organization, project, id, kind)| (id, Environment { organization, project, kind }))
            .collect();
        Ok(Self { postgres, environments, after: (i64::MIN, String::new()), page: VecDeque::new() })
    }

    async fn peek(&mut self) -> Result<Option<&SessionRow>, VerifyError> {
        while self.page.is_empty() {
            let Some((id, environment)) = self.environments.front() else { return Ok(None) };
            let page = self.read(id).await?;
            let Some(last) = page.last() else {
                self.environments.pop_front();
                self.after = (i64::MIN, String::new());
                continue;
            };
            self.after = (last.created_at()?, last.id().to_owned());
            let rows: Result<_, _> =
                page.iter().map(|columns| convert::row(columns, environment, 0)).collect();
            self.page = rows?;
        }
        Ok(self.page.front())
    }

    async fn read(&self, environment: &str) -> Result<Vec<Columns>, sqlx::Error> {
        let sql = format!(
            "SELECT {} FROM sessions WHERE environment_id = $1 AND (created_at, id) > ($2, $3) \
             ORDER BY created_at, id LIMIT {PAGE}",
            convert::select()
        );
        let query =
            sqlx::query(sqlx::AssertSqlSafe(sql)).bind(environment).bind(self.after.0).bind(&self.after.1);
        query.fetch_all(self.postgres.pool()).await?.iter().map(columns_of).collect()
    }

    fn take(&mut self) -> Option<SessionRow> {
        self.page.pop_front()
    }
}

/// Sessions of ClickHouse in the order of its sort key.
struct There {
    clickhouse: ClickHouse,
    after: Option<RowKey>,
    page: VecDeque<SessionRow>,
    over: bool,
}

impl There {
    fn new(clickhouse: ClickHouse) -> Self {
        Self { clickhouse, after: None, page: VecDeque::new(), over: false }
    }

    async fn peek(&mut self) -> Result<Option<&SessionRow>, VerifyError> {
        if self.page.is_empty() && !self.over {
            self.page = self.clickhouse.scan(self.after.as_ref(), PAGE).await?.into();
            self.over = self.page.len() < PAGE;
            self.after = self.page.back().map(SessionRow::key).or(self.after.take());
        }
        Ok(self.page.front())
    }

    fn take(&mut self) -> Option<SessionRow> {
        self.page.pop_front()
    }
}

/// Rows that ClickHouse will not take.
pub struct DeadLetter {
    /// Whose row.
    pub session: String,
    /// Its environment.
    pub environment: String,
    /// Which version.
    pub version: String,
    /// What ClickHouse said.
    pub error: String,
    /// Unix milliseconds.
    pub found_at: i64,
}

/// The dead letters of a slot, oldest first.
///
/// # Errors
/// If Postgres is away.
pub async fn dead_letters(postgres: &Postgres, slot: &str) -> Result<Vec<DeadLetter>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT session_id, environment_id, version::text, error, found_at FROM replication_dead_letters \
         WHERE slot = $1 ORDER BY found_at, session_id",
    )
    .bind(slot)
    .fetch_all(postgres.pool())
    .await?;
    let letter = |row: &sqlx::postgres::PgRow| {
        Ok(DeadLetter {
            session: row.try_get(0)?,
            environment: row.try_get(1)?,
            version: row.try_get(2)?,
            error: row.try_get(3)?,
            found_at: row.try_get(4)?,
        })
    };
    rows.iter().map(letter).collect()
}

/// Lets the rows of dead letters come once more. A letter goes when its row is taken, or was deleted.
///
/// # Errors
/// If Postgres is away.
pub async fn replay(postgres: &Postgres, slot: &str, sessions: &[String]) -> Result<(), sqlx::Error> {
    touch(postgres, sessions).await?;
    sqlx::query(
        "DELETE FROM replication_dead_letters AS letter WHERE slot = $1 AND session_id = ANY($2) \
         AND NOT EXISTS (SELECT 1 FROM sessions WHERE id = letter.session_id)",
    )
    .bind(slot)
    .bind(sessions)
    .execute(postgres.pool())
    .await
    .map(drop)
}
