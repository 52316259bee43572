//! [`SqlIndex`]: lists, counts and tags straight from the metadata store, exact and without lag.
//!
//! A list is planned by hand, because at a million sessions a planner's wrong guess costs seconds. The most
//! selective field that the filter names leads: external id, tag, task, type, status, none. Each of its values
//! becomes one branch that walks one index in list order and stops after a page; the branches are merged in the
//! same statement, so that they see one snapshot. What else the filter names is checked row by row on the way.
//! SQLite is told the index (`INDEXED BY`); Postgres finds it by its statistics.
//!
//! Status is derived from two columns and the time of asking. The `lapsed` hint splits open sessions between two
//! indexes, and the few rows whose hint is stale come from a third (see `branches_by_status`).

use async_trait::async_trait;
use sea_orm::{ConnectionTrait, DbBackend, QueryResult, Statement, Value};
use tracing::instrument;

use crate::metadata::{SqlMetadata, fault, rows};
use sessiond_domain::error::{Error, Result};
use sessiond_domain::list::{Anchor, Filter, Page, PageRequest, TagQuery};
use sessiond_domain::port::ListIndex;
use sessiond_domain::session::Status;
use sessiond_domain::{EnvironmentId, Timestamp};

/// Lists over the connections of a [`SqlMetadata`].
#[derive(Clone, Debug)]
pub struct SqlIndex {
    store: SqlMetadata,
}

impl SqlIndex {
    /// An index that reads what `store` holds.
    pub fn new(store: SqlMetadata) -> Self {
        Self { store }
    }

    #[instrument(level = "debug", skip_all, name = "query")]
    async fn query(&self, sql: Sql<'_>, text: &str) -> Result<Vec<QueryResult>> {
        let statement = Statement::from_sql_and_values(sql.backend, text, sql.values);
        self.store.reader().query_all_raw(statement).await.map_err(fault)
    }

    fn sql<'a>(&self, environment: &'a EnvironmentId) -> Sql<'a> {
        Sql { backend: self.store.reader().get_database_backend(), environment, values: Vec::new() }
    }
}

#[async_trait]
impl ListIndex for SqlIndex {
    async fn list(
        &self,
        environment: &EnvironmentId,
        filter: &Filter,
        page: &PageRequest,
        now: Timestamp,
    ) -> Result<Page> {
        let Some(filter) = filter.possible() else {
            return Ok(Page::from_rows(page, Vec::new()));
        };
        let mut sql = self.sql(environment);
        let window = Window::of(page);
        let (branches, union) = sql.branches(&filter, &window, now);
        let keys = branches
            .iter()
            .map(|branch| format!("SELECT * FROM ({branch} {}) AS b", window.order_and_limit()))
            .collect::<Vec<_>>()
            .join(union);
        let way = window.way();
        let text = format!(
            "SELECT s.* FROM (SELECT * FROM ({keys}) AS u ORDER BY created_at {way}, id {way} LIMIT {}) AS k \
             CROSS JOIN sessions AS s WHERE {} AND s.id = k.id ORDER BY k.created_at {way}, k.id {way}",
            window.limit,
            sql.scope("s"),
        );
        let rows = self.query(sql, &text).await?;
        let sessions = rows.iter().map(rows::session).collect::<Result<_>>()?;
        Ok(Page::from_rows(page, sessions))
    }

    async fn count(&self, environment: &EnvironmentId, filter: &Filter, now: Timestamp) -> Result<u64> {
        let Some(filter) = filter.possible() else {
            return Ok(0);
        };
        let mut sql = self.sql(environment);
        let (branches, union) = sql.branches(&filter, &Window::ALL, now);
        let text = format!("SELECT count(*) AS n FROM ({}) AS u", branches.join(union));
        let rows = self.query(sql, &text).await?;
        let row = rows.first().ok_or_else(|| Error::internal("a count without a row"))?;
        let count: i64 = row.try_get("", "n").map_err(fault)?;
        u64::try_from(count).map_err(Error::internal)
    }

    /// Hops from one distinct tag to the next, so the cost grows with tags and not with sessions.
    async fn tags(&self, environment: &EnvironmentId, query: &TagQuery) -> Result<Vec<String>> {
        if !query.is_possible() {
            return Ok(Vec::new());
        }
        let mut sql = self.sql(environment);
        let text = sql.tags(query);
        let rows = self.query(sql, &text).await?;
        rows.iter().map(|row| row.try_get("", "tag").map_err(fault)).collect()
    }

    /// The metadata store answers for itself.
    async fn ping(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}

/// Which stretch of the list to walk, and which way.
struct Window<'a> {
    anchor: Option<&'a Anchor>,
    limit: usize,
}

impl<'a> Window<'a> {
    const ALL: Window<'static> = Window { anchor: None, limit: 0 };

    /// One row more than the page, to know whether there are more.
    fn of(page: &'a PageRequest) -> Self {
        Self { anchor: Some(&page.anchor), limit: page.size + 1 }
    }

    fn way(&self) -> &'static str {
        if matches!(self.anchor, Some(Anchor::Before(_))) { "ASC" } else { "DESC" }
    }

    fn order_and_limit(&self) -> String {
        let way = self.way();
        format!("ORDER BY created_at {way}, id {way} LIMIT {}", self.limit)
    }
}

/// What a branch walks.
#[derive(Clone, Copy)]
enum Walk<'a> {
    /// Rows of `sessions`, by one of its indexes.
    Sessions(&'static str),
    /// Rows of `session_tags` that have one tag.
    Tag(&'a str),
}

/// The field that leads is not checked again.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lead {
    ExternalId,
    TagsAll,
    TagsAny,
    Task,
    Kind,
    Status,
    Nothing,
}

impl Lead {
    fn of(filter: &Filter) -> Self {
        if !filter.external_ids.is_empty() {
            Self::ExternalId
        } else if !filter.tags_all.is_empty() {
            Self::TagsAll
        } else if !filter.tags_any.is_empty() {
            Self::TagsAny
        } else if !filter.task_identifiers.is_empty() {
            Self::Task
        } else if !filter.kinds.is_empty() {
            Self::Kind
        } else if !filter.statuses.is_any() {
            Self::Status
        } else {
            Self::Nothing
        }
    }
}

/// A statement in the making. Every part of it that reads a table begins with [`Sql::scope`].
struct Sql<'a> {
    backend: DbBackend,
    environment: &'a EnvironmentId,
    values: Vec<Value>,
}

impl Sql<'_> {
    /// A placeholder for `value`; both databases number them alike.
    fn bind(&mut self, value: impl Into<Value>) -> String {
        self.values.push(value.into());
        format!("${}", self.values.len())
    }

    fn bind_all<'v>(&mut self, values: impl IntoIterator<Item = &'v str>) -> String {
        let places: Vec<_> = values.into_iter().map(|value| self.bind(value)).collect();
        places.join(", ")
    }

    /// The condition that keeps a query inside its environment.
    fn scope(&mut self, table: &str) -> String {
        let place = self.bind(self.environment.as_str());
        format!("{table}.environment_id = {place}")
    }

    /// Selects of (`created_at`, `id`), one per value of the leading field, and how to join them.
    fn branches(
        &mut self,
        filter: &Filter,
        window: &Window<'_>,
        now: Timestamp,
    ) -> (Vec<String>, &'static str) {
        let lead = Lead::of(filter);
        let led: Vec<(Walk<'_>, String)> = match lead {
            Lead::ExternalId => {
                let ids = self.bind_all(filter.external_ids.iter().map(|id| id.as_str()));
                vec![(Walk::Sessions("sessions_by_external_id"), format!(" AND s.external_id IN ({ids})"))]
            }
            Lead::TagsAll => vec![(Walk::Tag(&filter.tags_all[0]), String::new())],
            Lead::TagsAny => filter.tags_any.iter().map(|tag| (Walk::Tag(tag), String::new())).collect(),
            Lead::Task => self.equals("sessions_by_task", "task_identifier", &filter.task_identifiers),
            Lead::Kind => self.equals("sessions_by_kind", "kind", &filter.kinds),
            Lead::Status => self.branches_by_status(filter.statuses.as_slice(), now),
            Lead::Nothing => vec![(Walk::Sessions("sessions_by_creation"), String::new())],
        };
        // Only a session with several of the tags can come from two branches.
        let union = if lead == Lead::TagsAny && led.len() > 1 { " UNION " } else { " UNION ALL " };
        let branches =
            led.into_iter().map(|(walk, condition)| self.branch(lead, walk, &condition, filter, window, now));
        (branches.collect(), union)
    }

    fn equals(
        &mut self,
        index: &'static str,
        column: &str,
        values: &[String],
    ) -> Vec<(Walk<'static>, String)> {
        let mut branch = |value: &String| {
            let place = self.bind(value.as_str());
            (Walk::Sessions(index), format!(" AND s.{column} = {place}"))
        };
        values.iter().map(&mut branch).collect()
    }

    /// Together the branches of a status hold exactly its rows, however stale the hint: those that the hint
    /// promises, checked against `now`, and those that it has not reached yet (or, if `now` lies before the last
    /// sweep, has reached too early), which are few and found by `expires_at`.
    fn branches_by_status(&mut self, statuses: &[Status], now: Timestamp) -> Vec<(Walk<'static>, String)> {
        const LIVE: &str = " AND s.closed_at IS NULL AND s.lapsed = 0";
        const LAPSED: &str = " AND s.closed_at IS NULL AND s.lapsed = 1";
        const BY_EXPIRY: Walk<'static> = Walk::Sessions("sessions_by_expiry");
        let walk = Walk::Sessions;
        let mut branches = Vec::new();
        if statuses.contains(&Status::Closed) {
            branches.push((walk("sessions_closed"), " AND s.closed_at IS NOT NULL".to_owned()));
        }
        match (statuses.contains(&Status::Active), statuses.contains(&Status::Expired)) {
            (true, true) => {
                branches.push((walk("sessions_live"), LIVE.to_owned()));
                branches.push((walk("sessions_lapsed"), LAPSED.to_owned()));
            }
            (true, false) => {
                let at = self.bind(now.millis());
                let live = format!("{LIVE} AND (s.expires_at IS NULL OR s.expires_at > {at})");
                branches.push((walk("sessions_live"), live));
                branches.push((BY_EXPIRY, format!("{LAPSED} AND s.expires_at > {at}")));
            }
            (false, true) => {
                let at = self.bind(now.millis());
                branches.push((walk("sessions_lapsed"), format!("{LAPSED} AND s.expires_at <= {at}")));
                branches.push((BY_EXPIRY, format!("{LIVE} AND s.expires_at <= {at}")));
            }
            (false, false) => {}
        }
        branches
    }

    fn branch(
        &mut self,
        lead: Lead,
        walk: Walk<'_>,
        condition: &str,
        filter: &Filter,
        window: &Window<'_>,
        now: Timestamp,
    ) -> String {
        let (row, id) = match walk {
            Walk::Sessions(_) => ("s", "s.id"),
            Walk::Tag(_) => ("t", "t.session_id"),
        };
        let columns = self.column_conditions(lead, filter, now);
        let mut conditions = format!("{}{condition}{columns}", self.scope(row));
        conditions.push_str(&self.bounds(row, id, filter, window));
        conditions.push_str(&self.tag_conditions(lead, row, id, filter));
        let from = match walk {
            Walk::Sessions(index) if self.backend == DbBackend::Sqlite => {
                format!("sessions AS s INDEXED BY {index}")
            }
            Walk::Sessions(_) => "sessions AS s".to_owned(),
            Walk::Tag(tag) => {
                let place = self.bind(tag);
                conditions.push_str(&format!(" AND t.tag = {place}"));
                if columns.is_empty() {
                    "session_tags AS t".to_owned()
                } else {
                    conditions.push_str(&format!(" AND s.id = t.session_id AND {}", self.scope("s")));
                    "session_tags AS t CROSS JOIN sessions AS s".to_owned()
                }
            }
        };
        format!("SELECT {row}.created_at AS created_at, {id} AS id FROM {from} WHERE {conditions}")
    }

    /// Conditions on columns of `sessions` that do not lead.
    fn column_conditions(&mut self, lead: Lead, filter: &Filter, now: Timestamp) -> String {
        let mut conditions = String::new();
        let words =
            [(Lead::Task, "task_identifier", &filter.task_identifiers), (Lead::Kind, "kind", &filter.kinds)];
        for (field, column, values) in words {
            if lead != field && !values.is_empty() {
                let places = self.bind_all(values.iter().map(String::as_str));
                conditions.push_str(&format!(" AND s.{column} IN ({places})"));
            }
        }
        if lead != Lead::Status && !filter.statuses.is_any() {
            let at = self.bind(now.millis());
            let any: Vec<String> =
                filter.statuses.as_slice().iter().map(|s| status_condition(*s, &at)).collect();
            conditions.push_str(&format!(" AND ({})", any.join(" OR ")));
        }
        conditions
    }

    /// Conditions on tags that do not lead.
    fn tag_conditions(&mut self, lead: Lead, row: &str, id: &str, filter: &Filter) -> String {
        let mut conditions = String::new();
        let led = usize::from(lead == Lead::TagsAll);
        let mut groups: Vec<&[String]> = filter.tags_all[led..].iter().map(std::slice::from_ref).collect();
        if lead != Lead::TagsAny && !filter.tags_any.is_empty() {
            groups.push(&filter.tags_any);
        }
        for group in groups {
            let scope = self.scope("x");
            let tags = self.bind_all(group.iter().map(String::as_str));
            conditions.push_str(&format!(
                " AND EXISTS (SELECT 1 FROM session_tags AS x WHERE {scope} AND x.tag IN ({tags}) \
                 AND x.created_at = {row}.created_at AND x.session_id = {id})"
            ));
        }
        conditions
    }

    /// At most one bound on each side, so that both databases can turn them into one stretch of the index.
    fn bounds(&mut self, row: &str, id: &str, filter: &Filter, window: &Window<'_>) -> String {
        let (mut newest, mut oldest) = (filter.created_to, filter.created_from);
        let mut conditions = String::new();
        let (cursor, sign) = match window.anchor {
            Some(Anchor::After(Some(cursor))) if newest.is_none_or(|to| to >= cursor.created_at) => {
                newest = None;
                (Some(cursor), "<")
            }
            Some(Anchor::Before(Some(cursor))) if oldest.is_none_or(|from| from <= cursor.created_at) => {
                oldest = None;
                (Some(cursor), ">")
            }
            _ => (None, ""),
        };
        if let Some(cursor) = cursor {
            let (at, session) = (self.bind(cursor.created_at.millis()), self.bind(cursor.id.as_str()));
            conditions.push_str(&format!(" AND ({row}.created_at, {id}) {sign} ({at}, {session})"));
        }
        for (bound, sign) in [(newest, "<="), (oldest, ">=")] {
            if let Some(at) = bound {
                let at = self.bind(at.millis());
                conditions.push_str(&format!(" AND {row}.created_at {sign} {at}"));
            }
        }
        conditions
    }

    /// Each step finds the next larger tag by its index; rows of a recursion come in the order they were made.
    fn tags(&mut self, query: &TagQuery) -> String {
        let prefix = query.prefix.as_deref().filter(|prefix| !prefix.is_empty());
        let first_scope = self.scope("t");
        let (first, inside) = match prefix {
            None => (String::new(), String::new()),
            Some(prefix) => {
                let (place, length) = (self.bind(prefix), prefix.chars().count());
                (format!(" AND t.tag >= {place}"), format!(" AND substr(tag, 1, {length}) = {place}"))
            }
        };
        let next_scope = self.scope("t");
        let contains = match query.contains.as_deref() {
            None => String::new(),
            Some(part) => {
                let place = self.bind(part.to_ascii_lowercase());
                // Both fold ASCII only: SQLite always, Postgres in the collation "C" of the column.
                match self.backend {
                    DbBackend::Postgres => format!(" AND strpos(lower(tag), {place}) > 0"),
                    _ => format!(" AND instr(lower(tag), {place}) > 0"),
                }
            }
        };
        format!(
            "WITH RECURSIVE hop(tag) AS (\
             SELECT (SELECT t.tag FROM session_tags AS t WHERE {first_scope}{first} ORDER BY t.tag LIMIT 1) \
             UNION ALL \
             SELECT (SELECT t.tag FROM session_tags AS t WHERE {next_scope} AND t.tag > hop.tag \
             ORDER BY t.tag LIMIT 1) FROM hop WHERE tag IS NOT NULL{inside}) \
             SELECT tag FROM hop WHERE tag IS NOT NULL{inside}{contains} LIMIT {} OFFSET {}",
            i64::try_from(query.limit).unwrap_or(i64::MAX),
            i64::try_from(query.offset).unwrap_or(i64::MAX),
        )
    }
}

fn status_condition(status: Status, now: &str) -> String {
    match status {
        Status::Active => {
            format!("(s.closed_at IS NULL AND (s.expires_at IS NULL OR s.expires_at > {now}))")
        }
        Status::Closed => "s.closed_at IS NOT NULL".to_owned(),
        Status::Expired => format!("(s.closed_at IS NULL AND s.expires_at <= {now})"),
    }
}
