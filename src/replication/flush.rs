//! Brings rows to ClickHouse, for as long as it takes. What ClickHouse will never take is set aside and remembered.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, Row as _};

use super::batch::{Cut, Fate};
use super::convert::{self, Columns};
use super::decode::Key;
use super::environments::Environments;
use super::postgres::Postgres;
use crate::clickhouse::{ClickHouse, Fault, SessionRow};
use crate::telemetry::ReplicationMetrics;

const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// The longest pause between flushes, while ClickHouse merges more slowly than we insert.
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// Most ids that one query asks for.
const QUERY_IDS: usize = 1000;

/// How often to flush, and since when ClickHouse refuses.
#[derive(Debug)]
pub(super) struct Pace {
    linger: Duration,
    pause_micros: AtomicU64,
    failing: Mutex<Option<(Instant, String)>>,
}

impl Pace {
    pub(super) fn new(linger: Duration) -> Arc<Self> {
        let pause_micros = AtomicU64::new(micros(linger));
        Arc::new(Self { linger, pause_micros, failing: Mutex::default() })
    }

    /// Least time between two flushes.
    pub(super) fn pause(&self) -> Duration {
        Duration::from_micros(self.pause_micros.load(Ordering::Relaxed))
    }

    fn failed(&self, fault: &Fault) {
        let mut failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        let since = failing.as_ref().map_or_else(Instant::now, |(since, _)| *since);
        *failing = Some((since, fault.summary()));
        if matches!(fault, Fault::TooManyParts(_)) {
            let longer = (self.pause() * 2).clamp(Duration::from_millis(100), PAUSE_MAX);
            self.pause_micros.store(micros(longer), Ordering::Relaxed);
        }
    }

    fn stored(&self) {
        *self.failing.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let shorter = (self.pause() * 7 / 8).max(self.linger);
        self.pause_micros.store(micros(shorter), Ordering::Relaxed);
    }

    /// Since when ClickHouse takes nothing, and what it says.
    pub(super) fn failing(&self) -> Option<(Instant, String)> {
        self.failing.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Stores rows of one epoch.
#[derive(Clone)]
pub(super) struct Flusher {
    pub(super) clickhouse: ClickHouse,
    pub(super) postgres: Postgres,
    pub(super) environments: Environments,
    pub(super) slot: String,
    pub(super) pace: Arc<Pace>,
    /// Counts rows that are set aside; 0 once there is no letter left.
    pub(super) letters: Arc<AtomicU64>,
    pub(super) metrics: ReplicationMetrics,
}

impl Flusher {
    /// Stores a cut. Comes back only when every row of it is stored or set aside.
    pub(super) async fn store(&self, cut: Cut) {
        let rows = self.rows(cut.rows).await;
        self.store_rows(rows).await;
    }

    /// As [`Flusher::store`], for rows that are whole.
    pub(super) async fn store_rows(&self, mut rows: Vec<SessionRow>) {
        // The order of the table, so that the server has less to sort.
        rows.sort_by_cached_key(SessionRow::key);
        let mut parts = vec![rows.as_slice()];
        let mut refused = Vec::new();
        while let Some(part) = parts.pop() {
            if part.is_empty() {
                continue;
            }
            match (self.insert(part).await, part) {
                (Ok(()), _) => {}
                (Err(fault), [row]) => refused.push((row, fault)),
                (Err(_), _) => {
                    let (front, back) = part.split_at(part.len() / 2);
                    parts.extend([back, front]);
                }
            }
        }
        for (row, fault) in &refused {
            self.store_refused(row, fault).await;
        }
        let letters = self.letters.load(Ordering::Relaxed);
        if letters > 0 && refused.len() < rows.len() {
            let left = self.clear_letters(&rows).await;
            if !left {
                // Unless another one was set aside meanwhile.
                let _ = self.letters.compare_exchange(letters, 0, Ordering::Relaxed, Ordering::Relaxed);
            }
        }
    }

    /// Tries until ClickHouse has taken the rows, or will never.
    async fn insert(&self, rows: &[SessionRow]) -> Result<(), Fault> {
        let mut limit = BACKOFF_MIN;
        loop {
            let began = Instant::now();
            match self.clickhouse.insert(rows).await {
                Ok(()) => {
                    self.pace.stored();
                    self.metrics.stored(rows.len(), began.elapsed());
                    return Ok(());
                }
                Err(fault @ Fault::Poison(_)) => return Err(fault),
                Err(fault) => {
                    self.pace.failed(&fault);
                    self.metrics.failed();
                    tracing::warn!(
                        error = fault.summary(),
                        rows = rows.len(),
                        "ClickHouse takes no rows, trying again"
                    );
                    tokio::time::sleep(limit.mul_f64(jitter())).await;
                    limit = (limit * 2).min(BACKOFF_MAX);
                }
            }
        }
    }

    /// Most often it is the metadata, as JSON for analysis, that ClickHouse cannot read (a number beyond 64 bits); lists need
    /// only its text.
    async fn store_refused(&self, row: &SessionRow, fault: &Fault) {
        let plain = SessionRow { metadata: "{}".to_owned(), ..row.clone() };
        match self.insert(&[plain]).await {
            Ok(()) => {
                tracing::warn!(
                    session.id = row.session_id,
                    error = fault.summary(),
                    "stored without metadata as JSON"
                );
            }
            Err(fault) => {
                tracing::error!(
                    session.id = row.session_id,
                    error = fault.summary(),
                    "set a row aside as a dead letter"
                );
                self.set_aside(row, &fault.summary()).await;
            }
        }
    }

    async fn set_aside(&self, row: &SessionRow, error: &str) {
        self.letters.fetch_add(1, Ordering::Relaxed);
        self.metrics.dead_letter();
        self.persist(|| async {
            sqlx::query(
                "INSERT INTO replication_dead_letters (slot, session_id, environment_id, version, error, found_at) \
                 VALUES ($1, $2, $3, $4::numeric, $5, (extract(epoch FROM clock_timestamp()) * 1000)::bigint) \
                 ON CONFLICT (slot, session_id) DO UPDATE SET version = excluded.version, error = excluded.error, \
                 found_at = excluded.found_at WHERE replication_dead_letters.version <= excluded.version",
            )
            .bind(&self.slot)
            .bind(&row.session_id)
            .bind(&row.environment_id)
            .bind(row._version.to_string())
            .bind(error)
            .execute(self.postgres.pool())
            .await
            .map(drop)
        })
        .await;
    }

    /// A later version that ClickHouse has taken makes a letter void. Whether any letter is left.
    async fn clear_letters(&self, rows: &[SessionRow]) -> bool {
        let (ids, versions): (Vec<_>, Vec<_>) =
            rows.iter().map(|row| (row.session_id.clone(), row._version.to_string())).unzip();
        let (left,): (bool,) = self
            .persist(|| async {
                sqlx::query(
                    "DELETE FROM replication_dead_letters AS letter \
                     USING unnest($2::text[], $3::text[]) AS stored (id, version) \
                     WHERE letter.slot = $1 AND letter.session_id = stored.id AND letter.version < stored.version::numeric",
                )
                .bind(&self.slot)
                .bind(&ids)
                .bind(&versions)
                .execute(self.postgres.pool())
                .await?;
                sqlx::query_as("SELECT EXISTS (SELECT 1 FROM replication_dead_letters WHERE slot = $1)")
                    .bind(&self.slot)
                    .fetch_one(self.postgres.pool())
                    .await
            })
            .await;
        left
    }

    /// The rows of a cut, whole.
    async fn rows(&self, mut fates: Vec<(Key, Fate, u64)>) -> Vec<SessionRow> {
        self.complete(&mut fates).await;
        let mut rows = Vec::with_capacity(fates.len());
        for (key, fate, version) in fates {
            let environment = self.persist(|| self.environments.find(&key.environment_id)).await;
            let Some(environment) = environment else {
                tracing::error!(session.id = key.id, "a session of an environment that does not exist");
                continue;
            };
            match fate {
                Fate::Gone => {
                    rows.push(convert::tombstone(
                        &key.id,
                        &key.environment_id,
                        key.created_at,
                        &environment,
                        version,
                    ));
                }
                Fate::Row(columns) => match convert::row(&columns, &environment, version) {
                    Ok(row) => rows.push(row),
                    Err(error) => {
                        tracing::error!(session.id = key.id, %error, "set a row aside as a dead letter");
                        let row = convert::tombstone(
                            &key.id,
                            &key.environment_id,
                            key.created_at,
                            &environment,
                            version,
                        );
                        self.set_aside(&row, &error.to_string()).await;
                    }
                },
            }
        }
        rows
    }

    /// Reads the large columns that the WAL did not tell, because they have not changed. They may be of a later version,
    /// which follows; a row that is gone is told to be gone later.
    async fn complete(&self, fates: &mut Vec<(Key, Fate, u64)>) {
        let partial = |fate: &Fate| matches!(fate, Fate::Row(columns) if columns.is_partial());
        let ids: Vec<String> =
            fates.iter().filter(|(_, fate, _)| partial(fate)).map(|(key, ..)| key.id.clone()).collect();
        if ids.is_empty() {
            return;
        }
        let mut found = HashMap::new();
        for some in ids.chunks(QUERY_IDS) {
            let rows = self.persist(|| read(&self.postgres, Wanted::These(some))).await;
            found.extend(rows.into_iter().map(|columns| (columns.id().to_owned(), columns)));
        }
        fates.retain_mut(|(key, fate, _)| match fate {
            Fate::Row(columns) if columns.is_partial() => {
                let whole = found.get(&key.id);
                whole.inspect(|whole| columns.complete_from(whole)).is_some()
            }
            _ => true,
        });
    }

    /// Asks Postgres until it answers.
    pub(super) async fn persist<T, F>(&self, ask: impl Fn() -> F) -> T
    where
        F: Future<Output = Result<T, sqlx::Error>>,
    {
        let mut limit = BACKOFF_MIN;
        loop {
            match ask().await {
                Ok(answer) => return answer,
                Err(error) => {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "Postgres does not answer, trying again"
                    );
                    tokio::time::sleep(limit.mul_f64(jitter())).await;
                    limit = (limit * 2).min(BACKOFF_MAX);
                }
            }
        }
    }
}

/// Which rows of `sessions`.
pub(super) enum Wanted<'a> {
    /// With these ids.
    These(&'a [String]),
    /// So many behind this id, in order.
    Behind(&'a str, i64),
}

/// Rows of `sessions`, whole.
pub(super) async fn read(postgres: &Postgres, wanted: Wanted<'_>) -> Result<Vec<Columns>, sqlx::Error> {
    let select = format!("SELECT {} FROM sessions WHERE ", convert::select());
    let rows = match wanted {
        Wanted::These(ids) => {
            sqlx::query(AssertSqlSafe(format!("{select} id = ANY($1)")))
                .bind(ids)
                .fetch_all(postgres.pool())
                .await?
        }
        Wanted::Behind(id, limit) => {
            sqlx::query(AssertSqlSafe(format!("{select} id > $1 ORDER BY id LIMIT $2")))
                .bind(id)
                .bind(limit)
                .fetch_all(postgres.pool())
                .await?
        }
    };
    rows.iter().map(columns_of).collect()
}

/// A row that [`convert::select`] has selected.
pub(super) fn columns_of(row: &PgRow) -> Result<Columns, sqlx::Error> {
    let mut columns = Columns { small: Default::default(), large: Default::default() };
    let small = columns.small.len();
    for (at, text) in columns.small.iter_mut().enumerate() {
        *text = row.try_get(at)?;
    }
    for (at, text) in columns.large.iter_mut().enumerate() {
        *text = Some(row.try_get(small + at)?);
    }
    Ok(columns)
}

/// 0 to 1, so that replicas do not ask in step.
pub(super) fn jitter() -> f64 {
    let random = uuid::Uuid::new_v4().as_u64_pair().0 >> 11;
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit")]
    let fraction = random as f64 / (1u64 << 53) as f64;
    fraction
}
