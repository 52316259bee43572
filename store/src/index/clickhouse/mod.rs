//! Lists from ClickHouse, for where SQL lists would be slow or a burden on Postgres.
//!
//! `query` says what is asked and why that is exact; `client` sends it, bounded in time; [`ClickHouseIndex`] is the port.
//! `writer` stores rows, `rebuild` copies all of them from the metadata store, `schema` makes the tables.

mod breaker;
mod client;
mod environments;
mod marker;
mod query;
mod rebuild;
mod row;
mod schema;
mod stored;
mod writer;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use clickhouse::{RowOwned, RowRead};
use tokio::time::Instant;
use tracing::instrument;

use breaker::{Breaker, Probe};
pub use client::{ClickHouse, ClickHouseOptions, Fault};
pub use environments::Environments;
pub use marker::{Marker, mark, markers};
use query::{Among, PageQuery, Statement, Tenant};
use rebuild::Origin;
pub use rebuild::{Progress, Rebuild, VERSION_END, note_replicated};
use row::ListedRow;
pub use row::{SessionRow, SessionTexts};
pub use schema::{check_columns, is_migrated, migrate};
use sessiond_domain::error::{Error, Result};
use sessiond_domain::list::{Filter, Page, PageRequest, TagQuery};
use sessiond_domain::port::{ListIndex, MetadataStore};
use sessiond_domain::{Background, EnvironmentId, Timestamp};
pub use stored::{filed_environments, stored_as, stored_behind};
pub use writer::SessionWriter;

/// What lists answer until there is something to list.
const NOT_BUILT: &str =
    "the list index has not been built: run `sessiond index rebuild`, or `sessiond replicate`";
/// How long it is remembered that there is something to list: a replicator may have to copy everything anew.
const BUILT_FOR: Duration = Duration::from_secs(10);
/// How long it is remembered that there is nothing.
const NOT_BUILT_FOR: Duration = Duration::from_secs(1);
/// Longest that [`ListIndex::ping`] waits: probes of readiness are impatient.
const PING_TIMEOUT: Duration = Duration::from_millis(250);
/// Longest that a probe of a silent server waits.
const PROBE_TIMEOUT: Duration = Duration::from_millis(500);

/// Lists over one database of ClickHouse.
pub struct ClickHouseIndex {
    clickhouse: ClickHouse,
    environments: Environments,
    breaker: Breaker,
    /// Whether there is a whole copy in tables of ours, and until when that is taken for known.
    known: Mutex<Option<(bool, Instant)>>,
    repeats: AtomicU64,
}

impl ClickHouseIndex {
    /// An index of the sessions of `store`. Nothing is asked before the first list, so ClickHouse may be away.
    pub fn new(clickhouse: ClickHouse, store: Arc<dyn MetadataStore>, background: Arc<Background>) -> Self {
        let probed = clickhouse.clone();
        let probe: Probe = Arc::new(move || {
            let clickhouse = probed.clone();
            Box::pin(async move {
                let answer = tokio::time::timeout(PROBE_TIMEOUT, clickhouse.ping()).await;
                answer.unwrap_or(Err(Fault::TimedOut(PROBE_TIMEOUT)))
            })
        });
        Self {
            environments: Environments::new(store),
            breaker: Breaker::new(clickhouse.options().query_timeout, probe, background),
            clickhouse,
            known: Mutex::default(),
            repeats: AtomicU64::new(0),
        }
    }

    /// Looks that were repeated with more candidates, since the start.
    pub fn repeats(&self) -> u64 {
        self.repeats.load(Ordering::Relaxed)
    }

    /// Ends `answer` after the time that a list may take, however many statements it is.
    async fn in_time<T>(&self, answer: impl Future<Output = Result<T>>) -> Result<T> {
        let limit = self.clickhouse.options().query_timeout;
        match tokio::time::timeout(limit, answer).await {
            Ok(answer) => answer,
            Err(_) => {
                let fault = Fault::TimedOut(limit);
                self.breaker.silence(&fault);
                Err(fault.into())
            }
        }
    }

    #[instrument(level = "debug", skip_all, name = "query")]
    async fn fetch<T: RowOwned + RowRead>(&self, statement: &Statement) -> Result<Vec<T>> {
        let query = statement.bind(self.clickhouse.query(&statement.text));
        let asked = async {
            let answer = self.clickhouse.fetch(query).await;
            if answer.as_ref().is_err_and(Fault::is_of_a_missing_table) {
                *self.known() = None;
            }
            answer
        };
        self.breaker.run(asked).await
    }

    /// Refuses until there are tables of ours, and a whole copy in them.
    async fn require_usable(&self) -> Result<()> {
        let known = *self.known();
        match known.filter(|(_, until)| Instant::now() < *until) {
            Some((true, _)) => Ok(()),
            Some((false, _)) => Err(Error::NotReady(NOT_BUILT)),
            None => self.origin().await.map(drop),
        }
    }

    /// Where the copy that lists come from is from.
    async fn origin(&self) -> Result<Origin> {
        let look = async {
            match schema::is_current(&self.clickhouse).await? {
                true => rebuild::origin(&self.clickhouse).await,
                false => Ok(None),
            }
        };
        let origin = self.breaker.run_at_once(look).await?;
        let usable = origin.is_some();
        *self.known() = Some((usable, Instant::now() + if usable { BUILT_FOR } else { NOT_BUILT_FOR }));
        origin.ok_or(Error::NotReady(NOT_BUILT))
    }

    fn known(&self) -> MutexGuard<'_, Option<(bool, Instant)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None` for an environment that there is not.
    async fn tenant(&self, environment: &EnvironmentId) -> Result<Option<Tenant>> {
        self.require_usable().await?;
        let known = self.environments.find(environment).await?;
        Ok(known.map(|known| Tenant {
            organization: known.organization.clone(),
            project: known.project.clone(),
            environment: environment.clone(),
        }))
    }

    /// The rows of a page, exactly; see [`PageQuery`].
    async fn rows(&self, page: &PageQuery<'_>) -> Result<Vec<ListedRow>> {
        for (turn, limit) in page.tries().into_iter().enumerate() {
            // The first look is full but at the end of a list; where names are asked for, few candidates are common.
            let looked = turn == 0 && !page.asks_for_names();
            if looked && let Some(rows) = self.full_page(page, limit).await? {
                return Ok(rows);
            }
            let counts: Vec<u64> = self.fetch(&page.candidates(limit)).await?;
            if counts.first().is_some_and(|count| *count < limit as u64) {
                return self.fetch(&page.rows(Among::Candidates)).await;
            }
            if !looked && let Some(rows) = self.full_page(page, limit).await? {
                return Ok(rows);
            }
            self.repeats.fetch_add(1, Ordering::Relaxed);
        }
        self.fetch(&page.rows(Among::Everything)).await
    }

    /// The rows among the first candidates, if they fill the page.
    async fn full_page(&self, page: &PageQuery<'_>, candidates: usize) -> Result<Option<Vec<ListedRow>>> {
        let rows = self.fetch(&page.rows(Among::First(candidates))).await?;
        Ok(Some(rows).filter(|rows| rows.len() == page.wanted))
    }
}

#[async_trait]
impl ListIndex for ClickHouseIndex {
    async fn list(
        &self,
        environment: &EnvironmentId,
        filter: &Filter,
        page: &PageRequest,
        now: Timestamp,
    ) -> Result<Page> {
        let answer = async {
            let tenant = self.tenant(environment).await?;
            let (Some(tenant), Some(filter)) = (tenant, filter.possible()) else { return Ok(Vec::new()) };
            self.rows(&PageQuery::new(&tenant, &filter, page, now)).await
        };
        let rows = self.in_time(answer).await?;
        let sessions =
            rows.into_iter().map(|row| row.into_session(environment)).collect::<Result<_, Fault>>()?;
        Ok(Page::from_rows(page, sessions))
    }

    async fn count(&self, environment: &EnvironmentId, filter: &Filter, now: Timestamp) -> Result<u64> {
        let answer = async {
            let tenant = self.tenant(environment).await?;
            let (Some(tenant), Some(filter)) = (tenant, filter.possible()) else { return Ok(0) };
            let counts: Vec<u64> = self.fetch(&query::count(&tenant, &filter, now)).await?;
            counts.first().copied().ok_or_else(|| Error::internal("a count without a row"))
        };
        self.in_time(answer).await
    }

    async fn tags(&self, environment: &EnvironmentId, query: &TagQuery) -> Result<Vec<String>> {
        let answer = async {
            let tenant = self.tenant(environment).await?;
            let Some(tenant) = tenant.filter(|_| query.is_possible()) else { return Ok(Vec::new()) };
            self.fetch(&query::tags(&tenant, query)).await
        };
        self.in_time(answer).await
    }

    async fn ping(&self) -> Result<Vec<String>> {
        let Ok(origin) = tokio::time::timeout(PING_TIMEOUT, self.origin()).await else {
            // Nobody may have asked for a list.
            self.breaker.probe();
            return Err(Fault::TimedOut(PING_TIMEOUT).into());
        };
        Ok(match origin? {
            Origin::Rebuild(time) => vec![format!("lists are of {time}: nothing keeps them up to date")],
            Origin::Replication(None) => Vec::new(),
            Origin::Replication(Some(since)) => {
                vec![format!("lists are of {since}: no replicator keeps them up to date")]
            }
        })
    }
}
