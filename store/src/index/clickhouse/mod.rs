//! Lists from ClickHouse, for where SQL lists would be slow or a burden on Postgres.
//!
//! `query` says what is asked and why that is exact; `client` sends it, bounded in time; [`ClickHouseIndex`] is the port.
//! `writer` stores rows, `rebuild` copies all of them from the metadata store, `schema` makes the tables.

mod breaker;
mod client;
mod environments;
mod query;
mod rebuild;
mod row;
mod schema;
mod writer;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use clickhouse::{RowOwned, RowRead};
use tokio::sync::OnceCell;
use tracing::instrument;

use breaker::Breaker;
pub use client::{ClickHouse, ClickHouseOptions, Fault};
use environments::Environments;
use query::{PageQuery, Statement, Tenant};
pub use rebuild::{Progress, Rebuild};
use row::ListedRow;
pub use row::SessionRow;
use sessiond_domain::error::{Error, Result};
use sessiond_domain::list::{Filter, Page, PageRequest, TagQuery};
use sessiond_domain::port::{ListIndex, MetadataStore};
use sessiond_domain::{EnvironmentId, Timestamp};
pub use writer::SessionWriter;

/// What lists answer until there is something to list.
const NOT_BUILT: &str = "the list index has not been built: run `sessiond index rebuild`";
/// Longest that [`ListIndex::ping`] waits: probes of readiness are impatient.
const PING_TIMEOUT: Duration = Duration::from_secs(1);

/// Lists over one database of ClickHouse.
pub struct ClickHouseIndex {
    clickhouse: ClickHouse,
    environments: Environments,
    breaker: Breaker,
    /// Set once the tables have been found usable.
    usable: OnceCell<()>,
    repeats: AtomicU64,
}

impl ClickHouseIndex {
    /// An index of the sessions of `store`. Nothing is asked before the first list, so ClickHouse may be away.
    pub fn new(clickhouse: ClickHouse, store: Arc<dyn MetadataStore>) -> Self {
        let breaker = Breaker::new(clickhouse.options().query_timeout);
        Self {
            environments: Environments::new(store),
            clickhouse,
            breaker,
            usable: OnceCell::new(),
            repeats: AtomicU64::new(0),
        }
    }

    /// Pages that needed more candidates than the first look had.
    pub fn repeats(&self) -> u64 {
        self.repeats.load(Ordering::Relaxed)
    }

    #[instrument(level = "debug", skip_all, name = "query")]
    async fn fetch<T: RowOwned + RowRead>(&self, statement: &Statement) -> Result<Vec<T>> {
        let query = statement.bind(self.clickhouse.query(&statement.text));
        self.breaker.run(self.clickhouse.fetch(query)).await
    }

    /// Refuses until there are tables of ours, and something in them.
    async fn require_usable(&self) -> Result<()> {
        let check = || async {
            self.breaker.run(schema::migrate(&self.clickhouse)).await?;
            match self.breaker.run(rebuild::last_finished(&self.clickhouse)).await? {
                Some(_) => Ok(()),
                None => Err(Error::NotReady(NOT_BUILT)),
            }
        };
        self.usable.get_or_try_init(check).await.copied()
    }

    /// `None` if nothing of the environment can be there.
    async fn tenant(&self, environment: &EnvironmentId) -> Result<Option<Tenant>> {
        self.require_usable().await?;
        if let Some(known) = self.environments.find(environment).await? {
            let (organization, project) = (known.organization.clone(), known.project.clone());
            return Ok(Some(Tenant { organization, project, environment: environment.clone() }));
        }
        let found: Vec<(String, String)> = self.fetch(&query::tenant_of(environment)).await?;
        let tenant =
            |(organization, project)| Tenant { organization, project, environment: environment.clone() };
        Ok(found.into_iter().next().map(tenant))
    }

    /// The rows of a page, exactly; see [`PageQuery`].
    async fn rows(&self, page: &PageQuery<'_>) -> Result<Vec<ListedRow>> {
        let mut rows = Vec::new();
        for candidates in page.tries() {
            rows = self.fetch(&page.rows(candidates)).await?;
            let Some(limit) = candidates.filter(|_| rows.len() < page.wanted) else { break };
            let counts: Vec<u64> = self.fetch(&page.candidates(limit)).await?;
            if counts.first().is_some_and(|count| *count < limit as u64) {
                break;
            }
            self.repeats.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(candidates = limit, rows = rows.len(), "a page needs more candidates");
        }
        Ok(rows)
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
        let tenant = self.tenant(environment).await?;
        let (Some(tenant), Some(filter)) = (tenant, filter.possible()) else {
            return Ok(Page::from_rows(page, Vec::new()));
        };
        let rows = self.rows(&PageQuery::new(&tenant, &filter, page, now)).await?;
        let sessions =
            rows.into_iter().map(|row| row.into_session(environment)).collect::<Result<_, Fault>>()?;
        Ok(Page::from_rows(page, sessions))
    }

    async fn count(&self, environment: &EnvironmentId, filter: &Filter, now: Timestamp) -> Result<u64> {
        let tenant = self.tenant(environment).await?;
        let (Some(tenant), Some(filter)) = (tenant, filter.possible()) else { return Ok(0) };
        let counts: Vec<u64> = self.fetch(&query::count(&tenant, &filter, now)).await?;
        counts.first().copied().ok_or_else(|| Error::internal("a count without a row"))
    }

    async fn tags(&self, environment: &EnvironmentId, query: &TagQuery) -> Result<Vec<String>> {
        let Some(tenant) = self.tenant(environment).await?.filter(|_| query.is_possible()) else {
            return Ok(Vec::new());
        };
        self.fetch(&query::tags(&tenant, query)).await
    }

    async fn ping(&self) -> Result<Vec<String>> {
        let asked = async {
            self.require_usable().await?;
            self.breaker.run(rebuild::last_finished(&self.clickhouse)).await
        };
        let built = tokio::time::timeout(PING_TIMEOUT, asked).await;
        let built = built.map_err(|_| Fault::TimedOut(PING_TIMEOUT))??;
        let stale = |at: Timestamp| format!("lists are of {at}: nothing keeps them up to date");
        Ok(built.map(stale).into_iter().collect())
    }
}
