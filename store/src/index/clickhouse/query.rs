//! What is asked, as text and parameters. No I/O.
//!
//! Nothing of a caller ever stands in a text: every value is a parameter of a type, `{p3:Array(String)}`.

use clickhouse::query::Query;

use super::row::ListedRow;
use sessiond_domain::list::{Anchor, Cursor, Filter, PageRequest, TagQuery};
use sessiond_domain::session::Status;
use sessiond_domain::{EnvironmentId, Timestamp};

/// The table, in the database that the connection names.
const TABLE: &str = "sessions_v1";
/// How many candidates are read beyond a page at first, and by what the number grows while too few of them are rows.
const SPARE_CANDIDATES: usize = 70;
const WIDER: usize = 8;

/// The three columns that every query begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tenant {
    pub(super) organization: String,
    pub(super) project: String,
    pub(super) environment: EnvironmentId,
}

/// A text and the values of its parameters.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Statement {
    pub(super) text: String,
    pub(super) parameters: Parameters,
    /// Settings that help this one.
    pub(super) settings: &'static [(&'static str, &'static str)],
}

impl Statement {
    /// The query that a connection makes of the text, with everything it needs.
    pub(super) fn bind(&self, query: Query) -> Query {
        let query = self.parameters.0.iter().enumerate().fold(query, |query, (at, value)| {
            let name = format!("p{at}");
            match value {
                Parameter::Text(text) => query.param(&name, text),
                Parameter::Texts(texts) => query.param(&name, texts),
                Parameter::Number(number) => query.param(&name, number),
            }
        });
        self.settings.iter().fold(query, |query, (name, value)| query.with_setting(*name, *value))
    }
}

/// The values of a statement, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Parameters(Vec<Parameter>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Parameter {
    Text(String),
    Texts(Vec<String>),
    Number(i64),
}

impl Parameters {
    fn place(&mut self, value: Parameter, kind: &str) -> String {
        self.0.push(value);
        format!("{{p{}:{kind}}}", self.0.len() - 1)
    }

    fn text(&mut self, text: &str) -> String {
        self.place(Parameter::Text(text.to_owned()), "String")
    }

    fn texts(&mut self, texts: Vec<String>) -> String {
        self.place(Parameter::Texts(texts), "Array(String)")
    }

    fn time(&mut self, time: Timestamp) -> String {
        let place = self.place(Parameter::Number(time.millis()), "Int64");
        format!("fromUnixTimestamp64Milli({place})")
    }
}

/// What rows must be, and its parameters.
struct Conditions {
    text: String,
    parameters: Parameters,
    settings: &'static [(&'static str, &'static str)],
}

impl Conditions {
    fn of(tenant: &Tenant) -> Self {
        let mut parameters = Parameters::default();
        let text = format!(
            "organization_id = {} AND project_id = {} AND environment_id = {}",
            parameters.text(&tenant.organization),
            parameters.text(&tenant.project),
            parameters.text(tenant.environment.as_str()),
        );
        Self { text, parameters, settings: &[] }
    }

    fn filtered(mut self, filter: &Filter, now: Timestamp) -> Self {
        let words = [
            ("type IN", &filter.kinds, ""),
            ("task_identifier IN", &filter.task_identifiers, ""),
            ("hasAny(tags,", &filter.tags_any, ")"),
            ("hasAll(tags,", &filter.tags_all, ")"),
        ];
        for (before, values, after) in words {
            if !values.is_empty() {
                let place = self.parameters.texts(values.clone());
                self.and(&format!("{before} {place}{after}"));
            }
        }
        if !filter.external_ids.is_empty() {
            let ids = filter.external_ids.iter().map(|id| id.as_str().to_owned()).collect();
            let place = self.parameters.texts(ids);
            self.and(&format!("external_id IN {place}"));
            // Few rows match: finding them by the skip index is faster than walking in order until a page is full.
            self.settings = &[("optimize_read_in_order", "0")];
        }
        if !filter.statuses.is_any() {
            let now = self.parameters.time(now);
            let any: Vec<_> =
                filter.statuses.as_slice().iter().map(|one| status_condition(*one, &now)).collect();
            self.and(&format!("({})", any.join(" OR ")));
        }
        for (sign, bound) in [(">=", filter.created_from), ("<=", filter.created_to)] {
            if let Some(bound) = bound {
                let place = self.parameters.time(bound);
                self.and(&format!("created_at {sign} {place}"));
            }
        }
        self
    }

    /// The time alone is what the primary key can use; the pair decides.
    fn from(mut self, way: Way, cursor: Option<&Cursor>) -> Self {
        if let Some(cursor) = cursor {
            let (at, id) =
                (self.parameters.time(cursor.created_at), self.parameters.text(cursor.id.as_str()));
            let sign = if way == Way::Older { "<" } else { ">" };
            self.and(&format!("created_at {sign}= {at} AND (created_at, session_id) {sign} ({at}, {id})"));
        }
        self
    }

    fn and(&mut self, condition: &str) {
        self.text.push_str(" AND ");
        self.text.push_str(condition);
    }

    fn into_statement(self, text: String) -> Statement {
        Statement { text, parameters: self.parameters, settings: self.settings }
    }
}

fn status_condition(status: Status, now: &str) -> String {
    match status {
        Status::Active => format!("(closed_at IS NULL AND (expires_at IS NULL OR expires_at > {now}))"),
        Status::Closed => "closed_at IS NOT NULL".to_owned(),
        Status::Expired => format!("(closed_at IS NULL AND expires_at <= {now})"),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Older,
    Newer,
}

/// A page, whose rows are looked for among a bounded number of candidates.
///
/// FINAL cannot stop at a limit: it reads all that the conditions leave. So a list is asked in one statement with two
/// parts. The inner part reads the first `limit` *candidates* in list order without FINAL: keys of which some version
/// matches. The outer part reads those keys with FINAL, which decides. Every row of the list is among the keys that have a
/// matching version, and the candidates are a prefix of these, so the rows found are a prefix of the list: a full page is
/// exact. A short one is asked for again: among all candidates if they are few, otherwise among more of them, and at last
/// without this detour. That they are few does not by itself make a short page exact: a merge in between makes them fewer.
#[derive(Debug)]
pub(super) struct PageQuery<'a> {
    tenant: &'a Tenant,
    filter: &'a Filter,
    way: Way,
    cursor: Option<&'a Cursor>,
    now: Timestamp,
    /// Rows wanted: one more than the page has, to know whether there are more.
    pub(super) wanted: usize,
}

impl<'a> PageQuery<'a> {
    pub(super) fn new(tenant: &'a Tenant, filter: &'a Filter, page: &'a PageRequest, now: Timestamp) -> Self {
        let (way, cursor) = match &page.anchor {
            Anchor::After(cursor) => (Way::Older, cursor.as_ref()),
            Anchor::Before(cursor) => (Way::Newer, cursor.as_ref()),
        };
        Self { tenant, filter, way, cursor, now, wanted: page.size + 1 }
    }

    /// Numbers of candidates to try, in order.
    pub(super) fn tries(&self) -> [usize; 3] {
        let first = self.wanted + SPARE_CANDIDATES;
        [first, first * WIDER, first * WIDER * WIDER]
    }

    /// The rows among these, nearest to the anchor first.
    pub(super) fn rows(&self, among: Among) -> Statement {
        let conditions = self.conditions();
        let (matching, order) = (&conditions.text, self.order());
        let keys = |limit: &str| {
            format!(
                " AND (created_at, session_id) IN (SELECT created_at, session_id FROM {TABLE} WHERE {matching}{limit})"
            )
        };
        let keys = match among {
            Among::First(limit) => keys(&format!(" {order} LIMIT {limit}")),
            Among::Candidates => keys(""),
            Among::Everything => String::new(),
        };
        let text = format!(
            "SELECT {} FROM {TABLE} FINAL WHERE {matching}{keys} {order} LIMIT {}",
            ListedRow::COLUMNS,
            self.wanted
        );
        conditions.into_statement(text)
    }

    /// Whether only sessions with tags or external ids of the caller's choice are wanted, of which there may be few.
    pub(super) fn asks_for_names(&self) -> bool {
        let Filter { tags_any, tags_all, external_ids, .. } = self.filter;
        !(tags_any.is_empty() && tags_all.is_empty() && external_ids.is_empty())
    }

    /// How many candidates there are, counted up to `limit`.
    pub(super) fn candidates(&self, limit: usize) -> Statement {
        let conditions = self.conditions();
        let matching = &conditions.text;
        let text = format!("SELECT count() FROM (SELECT 1 FROM {TABLE} WHERE {matching} LIMIT {limit})");
        conditions.into_statement(text)
    }

    fn conditions(&self) -> Conditions {
        Conditions::of(self.tenant).filtered(self.filter, self.now).from(self.way, self.cursor)
    }

    fn order(&self) -> &'static str {
        match self.way {
            Way::Older => "ORDER BY created_at DESC, session_id DESC",
            Way::Newer => "ORDER BY created_at ASC, session_id ASC",
        }
    }
}

/// Where the rows of a page are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Among {
    /// Among that many candidates, the first in list order.
    First(usize),
    /// Among all candidates, which should be few. Exact.
    Candidates,
    /// Everywhere. Exact.
    Everything,
}

/// How many sessions match.
pub(super) fn count(tenant: &Tenant, filter: &Filter, now: Timestamp) -> Statement {
    let conditions = Conditions::of(tenant).filtered(filter, now);
    let text = format!("SELECT count() FROM {TABLE} FINAL WHERE {}", conditions.text);
    conditions.into_statement(text)
}

/// Distinct tags in byte order.
pub(super) fn tags(tenant: &Tenant, query: &TagQuery) -> Statement {
    let mut conditions = Conditions::of(tenant);
    let mut wanted = Vec::new();
    if let Some(prefix) = &query.prefix {
        wanted.push(format!("startsWith(tag, {})", conditions.parameters.text(prefix)));
    }
    if let Some(part) = &query.contains {
        // `lower` folds ASCII only, which is what is promised.
        let place = conditions.parameters.text(&part.to_ascii_lowercase());
        wanted.push(format!("position(lower(tag), {place}) > 0"));
    }
    let wanted = if wanted.is_empty() { String::new() } else { format!(" WHERE {}", wanted.join(" AND ")) };
    let text = format!(
        "SELECT DISTINCT tag FROM (SELECT arrayJoin(tags) AS tag FROM {TABLE} FINAL WHERE {}){wanted} ORDER BY tag LIMIT {} \
         OFFSET {}",
        conditions.text, query.limit, query.offset
    );
    conditions.into_statement(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sessiond_domain::list::StatusSet;
    use sessiond_domain::{ExternalId, SessionId};

    fn tenant() -> Tenant {
        let environment = EnvironmentId::from_stored("env_here");
        Tenant { organization: "acme".to_owned(), project: "main".to_owned(), environment }
    }

    const NOW: Timestamp = Timestamp::from_millis(10_000);

    #[test]
    fn a_plain_page_reads_the_keys_first() {
        let (tenant, filter, page) = (tenant(), Filter::default(), PageRequest::first(20));
        let query = PageQuery::new(&tenant, &filter, &page, NOW);
        assert_eq!(query.tries(), [91, 728, 5824]);
        let matching =
            "organization_id = {p0:String} AND project_id = {p1:String} AND environment_id = {p2:String}";
        let order = "ORDER BY created_at DESC, session_id DESC";
        assert_eq!(
            query.rows(Among::First(91)).text,
            format!(
                "SELECT {} FROM sessions_v1 FINAL WHERE {matching} AND (created_at, session_id) IN (SELECT created_at, \
                 session_id FROM sessions_v1 WHERE {matching} {order} LIMIT 91) {order} LIMIT 21",
                ListedRow::COLUMNS
            )
        );
        assert!(!query.rows(Among::Candidates).text.contains("LIMIT 91"));
        assert!(!query.rows(Among::Everything).text.contains(" IN "));
    }

    #[test]
    fn a_page_the_other_way_turns_every_sign_and_order() {
        let cursor = Cursor { created_at: NOW, id: SessionId::from_stored("session_a") };
        let (tenant, filter) = (tenant(), Filter::default());
        for (anchor, sign, order) in
            [(Anchor::After(Some(cursor.clone())), "<", "DESC"), (Anchor::Before(Some(cursor)), ">", "ASC")]
        {
            let page = PageRequest { size: 1, anchor };
            let text = PageQuery::new(&tenant, &filter, &page, NOW).rows(Among::First(1)).text;
            let bound = format!(
                "created_at {sign}= fromUnixTimestamp64Milli({{p3:Int64}}) AND (created_at, session_id) {sign} \
                 (fromUnixTimestamp64Milli({{p3:Int64}}), {{p4:String}})"
            );
            assert_eq!(text.matches(&bound).count(), 2, "{text}");
            assert_eq!(text.matches(&format!("created_at {order}, session_id {order}")).count(), 2, "{text}");
        }
    }

    #[test]
    fn no_value_of_a_filter_stands_in_the_text() {
        let words = || vec!["it's {p0:String}; DROP".to_owned()];
        let filter = Filter {
            kinds: words(),
            tags_any: words(),
            tags_all: words(),
            task_identifiers: words(),
            external_ids: vec![ExternalId::from_stored("it's {p0:String}; DROP")],
            statuses: StatusSet::new(vec![Status::Active]),
            created_from: Some(NOW),
            created_to: Some(NOW),
        };
        let statement = count(&tenant(), &filter, NOW);
        assert!(!statement.text.contains("DROP"), "{}", statement.text);
        assert_eq!(statement.parameters.0.len(), 3 + 5 + 3);
        assert_eq!(statement.settings, [("optimize_read_in_order", "0")]);
        let query = TagQuery {
            prefix: Some("DROP".to_owned()),
            contains: Some("DROP".to_owned()),
            offset: 1,
            limit: 2,
        };
        assert!(!tags(&tenant(), &query).text.contains("DROP"));
    }
}
