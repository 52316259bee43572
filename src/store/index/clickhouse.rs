//! [`ClickHouseIndex`]: lists, counts and tags from the table that the replicator feeds, exact as of how far it has come.
//!
//! The table holds several versions of a session until its parts are merged, and `FINAL`, which picks the newest, cannot
//! stop at a page: it reads all of a tenant. So a page is looked up in two steps. Which sessions may be on it is asked
//! without `FINAL`, in list order and with the whole filter: any version that matches will do. The newest version of just
//! these is then read with `FINAL`. Whatever belongs before the last candidate is a candidate itself, so a full page is
//! exact, and so is a short one if there were no further candidates. Where many versions of few sessions have used the
//! candidates up, the second step is done again on a longer stretch, and at last on all of it. (ADR 19)

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use clickhouse::query::Query;
use clickhouse::{Row, RowOwned, RowRead};
use serde::Deserialize;
use tracing::instrument;

use crate::clickhouse::{ClickHouse, Fault};
use crate::domain::error::{Error, Result};
use crate::domain::list::{Anchor, Cursor, Filter, Page, PageRequest, TagQuery};
use crate::domain::port::{ListIndex, MetadataStore};
use crate::domain::session::{Closure, Session, Status};
use crate::domain::{EnvironmentId, ExternalId, RunId, SessionId, Timestamp};

/// Candidates for each row wanted, of which a tenth may be other versions or match no longer.
const CANDIDATES_PER_ROW: usize = 2;
const CANDIDATES_MIN: usize = 120;
/// How much further the second try looks.
const WIDER: usize = 8;

/// Lists over the table of a [`ClickHouse`].
pub struct ClickHouseIndex {
    clickhouse: ClickHouse,
    /// Only for what an environment is called.
    store: Arc<dyn MetadataStore>,
    timeout: Duration,
    tenants: Mutex<HashMap<EnvironmentId, Arc<Tenant>>>,
}

/// What rows of an environment begin with in the sort key.
struct Tenant {
    organization: String,
    project: String,
    environment: String,
}

impl ClickHouseIndex {
    /// An index whose every query ends within `timeout`.
    pub fn new(clickhouse: ClickHouse, store: Arc<dyn MetadataStore>, timeout: Duration) -> Self {
        Self { clickhouse, store, timeout, tenants: Mutex::default() }
    }

    async fn tenant(&self, environment: &EnvironmentId) -> Result<Arc<Tenant>> {
        let known = || self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tenant) = known().get(environment).cloned() {
            return Ok(tenant);
        }
        let found = self.store.environments().await?.into_iter().find(|one| one.id == *environment);
        let found = found.ok_or(Error::NotFound("environment"))?;
        let tenant = Arc::new(Tenant {
            organization: found.organization,
            project: found.project,
            environment: found.id.to_string(),
        });
        known().insert(environment.clone(), tenant.clone());
        Ok(tenant)
    }

    /// A query with the parameters that `conditions` names.
    #[instrument(level = "debug", skip_all, name = "query")]
    async fn fetch<T: RowOwned + RowRead>(&self, sql: &str, conditions: &Conditions<'_>) -> Result<Vec<T>> {
        let query = conditions.bind(self.clickhouse.query(sql));
        let seconds = self.timeout.as_secs_f64().to_string();
        let query = query.with_setting("max_execution_time", seconds);
        let rows = tokio::time::timeout(self.timeout, self.clickhouse.fetch(query)).await;
        rows.unwrap_or(Err(Fault::TimedOut(self.timeout))).map_err(away)
    }

    async fn read(&self, conditions: &Conditions<'_>, window: &Window, keys: &str) -> Result<Vec<Listed>> {
        let sql = format!(
            "SELECT ?fields FROM {} FINAL WHERE {}{keys} {} LIMIT {}",
            self.clickhouse.table(),
            conditions.text(),
            window.order(),
            window.limit
        );
        self.fetch(&sql, conditions).await
    }

    async fn rows(&self, conditions: &mut Conditions<'_>, window: &Window) -> Result<Vec<Listed>> {
        for candidates in [window.candidates(), window.candidates() * WIDER] {
            let sql = format!(
                "SELECT ?fields FROM {} WHERE _is_deleted = 0 AND {} {} LIMIT {candidates}",
                self.clickhouse.table(),
                conditions.text(),
                window.order()
            );
            let found: Vec<Key> = self.fetch(&sql, conditions).await?;
            let Some(last) = found.last() else { return Ok(Vec::new()) };
            let keys = if candidates == window.candidates() {
                conditions.candidates = dedup(&found);
                " AND created_at IN arrayMap(x -> fromUnixTimestamp64Milli(x), {times:Array(Int64)}) \
                 AND session_id IN {ids:Array(String)}"
                    .to_owned()
            } else {
                conditions.last = last.created_at;
                format!(" AND created_at {} fromUnixTimestamp64Milli({{last:Int64}})", window.towards())
            };
            let rows = self.read(conditions, window, &keys).await?;
            if rows.len() == window.limit || found.len() < candidates {
                return Ok(rows);
            }
        }
        self.read(conditions, window, "").await
    }
}

/// The times and ids of candidates, each once.
fn dedup(found: &[Key]) -> (Vec<i64>, Vec<String>) {
    let mut times: Vec<_> = found.iter().map(|key| key.created_at).collect();
    let mut ids: Vec<_> = found.iter().map(|key| key.session_id.clone()).collect();
    times.dedup();
    ids.sort_unstable();
    ids.dedup();
    (times, ids)
}

fn away(fault: Fault) -> Error {
    match fault {
        Fault::Row { .. } => Error::internal(fault),
        fault => Error::unavailable("the index of lists", fault),
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
        let window = Window::of(page);
        let mut conditions = Conditions::new(&tenant, filter, now);
        conditions.anchor = Some(&page.anchor);
        let rows = self.rows(&mut conditions, &window).await?;
        let sessions: Result<_, Fault> = rows.into_iter().map(|row| row.into_session(environment)).collect();
        Ok(Page::from_rows(page, sessions.map_err(away)?))
    }

    async fn count(&self, environment: &EnvironmentId, filter: &Filter, now: Timestamp) -> Result<u64> {
        let tenant = self.tenant(environment).await?;
        let conditions = Conditions::new(&tenant, filter, now);
        let sql =
            format!("SELECT count() FROM {} FINAL WHERE {}", self.clickhouse.table(), conditions.text());
        let counts: Vec<u64> = self.fetch(&sql, &conditions).await?;
        counts.first().copied().ok_or_else(|| Error::internal("a count without a row"))
    }

    async fn tags(&self, environment: &EnvironmentId, query: &TagQuery) -> Result<Vec<String>> {
        if query.limit == 0 {
            return Ok(Vec::new());
        }
        let tenant = self.tenant(environment).await?;
        let filter = Filter::default();
        let mut conditions = Conditions::new(&tenant, &filter, Timestamp::from_millis(0));
        conditions.words = query.prefix.clone().into_iter().chain(query.contains.clone()).collect();
        let mut wanted = String::new();
        if query.prefix.is_some() {
            wanted.push_str(" AND startsWith(tag, {words:Array(String)}[1])");
        }
        if query.contains.is_some() {
            wanted.push_str(" AND positionCaseInsensitive(tag, {words:Array(String)}[-1]) > 0");
        }
        let sql = format!(
            "SELECT DISTINCT tag FROM (SELECT arrayJoin(tags) AS tag FROM {} FINAL WHERE {}) WHERE 1{wanted} \
             ORDER BY tag LIMIT {} OFFSET {}",
            self.clickhouse.table(),
            conditions.text(),
            query.limit,
            query.offset
        );
        self.fetch(&sql, &conditions).await
    }
}

/// Which stretch of the list, and which way.
struct Window {
    ascending: bool,
    limit: usize,
}

impl Window {
    /// One row more than the page, to know whether there are more.
    fn of(page: &PageRequest) -> Self {
        Self { ascending: matches!(page.anchor, Anchor::Before(_)), limit: page.size + 1 }
    }

    fn candidates(&self) -> usize {
        (self.limit * CANDIDATES_PER_ROW).max(CANDIDATES_MIN)
    }

    fn order(&self) -> String {
        let way = if self.ascending { "ASC" } else { "DESC" };
        format!("ORDER BY created_at {way}, session_id {way}")
    }

    /// Up to the last candidate, that one included.
    fn towards(&self) -> &'static str {
        if self.ascending { "<=" } else { ">=" }
    }
}

/// What rows must fulfil. The text names parameters only, so nothing of a caller is ever read as SQL.
struct Conditions<'a> {
    tenant: &'a Tenant,
    filter: &'a Filter,
    now: Timestamp,
    anchor: Option<&'a Anchor>,
    candidates: (Vec<i64>, Vec<String>),
    last: i64,
    words: Vec<String>,
}

impl<'a> Conditions<'a> {
    fn new(tenant: &'a Tenant, filter: &'a Filter, now: Timestamp) -> Self {
        let (anchor, candidates, last, words) = Default::default();
        Self { tenant, filter, now, anchor, candidates, last, words }
    }

    fn cursor(&self) -> Option<&Cursor> {
        match self.anchor? {
            Anchor::After(cursor) | Anchor::Before(cursor) => cursor.as_ref(),
        }
    }

    fn text(&self) -> String {
        const CURSOR: &str = "fromUnixTimestamp64Milli({cursor_time:Int64})";
        let filter = self.filter;
        let mut text = "organization_id = {organization:String} AND project_id = {project:String} \
                        AND environment_id = {environment:String}"
            .to_owned();
        if self.cursor().is_some() {
            let (time, both) = match self.anchor {
                Some(Anchor::Before(_)) => (">=", ">"),
                _ => ("<=", "<"),
            };
            // The time alone is what the index of the table can use.
            text.push_str(&format!(
                " AND created_at {time} {CURSOR} AND (created_at, session_id) {both} ({CURSOR}, {{cursor_id:String}})"
            ));
        }
        for (given, condition) in [
            (!filter.kinds.is_empty(), "type IN {kinds:Array(String)}"),
            (!filter.task_identifiers.is_empty(), "task_identifier IN {tasks:Array(String)}"),
            (!filter.external_ids.is_empty(), "external_id IN {externals:Array(String)}"),
            (!filter.tags_any.is_empty(), "hasAny(tags, {tags_any:Array(String)})"),
            (!filter.tags_all.is_empty(), "hasAll(tags, {tags_all:Array(String)})"),
            (filter.created_from.is_some(), "created_at >= fromUnixTimestamp64Milli({from:Int64})"),
            (filter.created_to.is_some(), "created_at <= fromUnixTimestamp64Milli({to:Int64})"),
        ] {
            if given {
                text.push_str(" AND ");
                text.push_str(condition);
            }
        }
        if !filter.statuses.is_any() {
            let any: Vec<_> =
                filter.statuses.as_slice().iter().map(|status| status_condition(*status)).collect();
            text.push_str(&format!(" AND ({})", any.join(" OR ")));
        }
        text
    }

    /// Gives every parameter that a text may name; one that is not named is no fault.
    fn bind(&self, query: Query) -> Query {
        let filter = self.filter;
        let bound = |time: Option<Timestamp>| {
            time.unwrap_or(Timestamp::from_millis(0)).millis().clamp(TIME_MIN, TIME_MAX)
        };
        let cursor = self.cursor();
        let externals: Vec<_> = filter.external_ids.iter().map(|id| id.as_str()).collect();
        query
            .param("organization", &self.tenant.organization)
            .param("project", &self.tenant.project)
            .param("environment", &self.tenant.environment)
            .param("now", self.now.millis())
            .param("cursor_time", bound(cursor.map(|cursor| cursor.created_at)))
            .param("cursor_id", cursor.map_or("", |cursor| cursor.id.as_str()))
            .param("kinds", &filter.kinds)
            .param("tasks", &filter.task_identifiers)
            .param("externals", externals)
            .param("tags_any", &filter.tags_any)
            .param("tags_all", &filter.tags_all)
            .param("from", bound(filter.created_from))
            .param("to", bound(filter.created_to))
            .param("times", &self.candidates.0)
            .param("ids", &self.candidates.1)
            .param("last", self.last)
            .param("words", &self.words)
    }
}

/// What a `DateTime64(3)` can hold: the years 1900 to 2299.
const TIME_MIN: i64 = -2_208_988_800_000;
const TIME_MAX: i64 = 10_413_791_999_999;

fn status_condition(status: Status) -> &'static str {
    match status {
        Status::Closed => "closed_at IS NOT NULL",
        Status::Expired => "(closed_at IS NULL AND expires_at <= fromUnixTimestamp64Milli({now:Int64}))",
        Status::Active => {
            "(closed_at IS NULL AND (expires_at IS NULL OR expires_at > fromUnixTimestamp64Milli({now:Int64})))"
        }
    }
}

/// A candidate.
#[derive(Debug, Row, Deserialize)]
struct Key {
    created_at: i64,
    session_id: String,
}

/// Everything of a session, in the columns that hold it.
#[derive(Debug, Row, Deserialize)]
struct Listed {
    session_id: String,
    external_id: String,
    r#type: String,
    task_identifier: String,
    tags: Vec<String>,
    closed_at: Option<i64>,
    closed_reason: String,
    expires_at: Option<i64>,
    created_at: i64,
    updated_at: i64,
    metadata_text: String,
    trigger_config: String,
    current_run_id: String,
}

impl Listed {
    fn into_session(self, environment: &EnvironmentId) -> Result<Session, Fault> {
        let object = |text: &str, column| match text {
            "" => Ok(None),
            text => serde_json::from_str(text)
                .map_err(|_| Fault::Row { column, session: self.session_id.clone() }),
        };
        let time = |millis: Option<i64>| millis.map(Timestamp::from_millis);
        let given = |text: String| Some(text).filter(|text| !text.is_empty());
        Ok(Session {
            metadata: object(&self.metadata_text, "metadata_text")?,
            trigger_config: object(&self.trigger_config, "trigger_config")?,
            id: SessionId::from_stored(&self.session_id),
            environment: environment.clone(),
            external_id: given(self.external_id).map(|id| ExternalId::from_stored(&id)),
            kind: self.r#type,
            task_identifier: self.task_identifier,
            tags: self.tags,
            current_run_id: RunId::from_stored(&self.current_run_id),
            created_at: Timestamp::from_millis(self.created_at),
            updated_at: Timestamp::from_millis(self.updated_at),
            expires_at: time(self.expires_at),
            closed: time(self.closed_at).map(|at| Closure { at, reason: given(self.closed_reason) }),
        })
    }
}
