//! Lists from ClickHouse: pages, counts and tags of a server of ours, each beside the plain query that answers the same,
//! and what wide metadata costs an insert.
//!
//! Plain FINAL is asked of the engine itself, with its default settings: what ours has to do beside the query counts
//! against ours. Both are asked by turns, so that a busy moment of the machine does not hit one alone.

mod engine;
mod inserts;
mod seed;
mod tenants;

use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::{Value, json};

pub(super) use self::engine::Engine;
pub(super) use self::inserts::{ENGINE, MANY_KEYS, NO_METADATA};
use self::tenants::{Tenant, tenants};
use super::report::{Metric, OURS, Sample, Table};
use super::rows::{Bench, fresh};
use super::server::Server;
use super::stats::Latency;
use super::{http, ours};
use crate::workspace::Workspace;

/// How the tables name the query that ours is compared with.
pub(super) const PLAIN: &str = "plain FINAL";
/// The rows that have goals.
pub(super) const JUDGED_PAGES: [&str; 2] =
    ["half of all: no filter, first page", "half of all: no filter, middle page"];
/// Rows of a page.
const PAGE: usize = 50;
/// Requests before those that are timed, and the most that are.
const WARM: usize = 3;
const REQUESTS: usize = 200;
/// What a page of ours reads of a row.
const COLUMNS: &str = "session_id, external_id, type, task_identifier, tags, closed_at, expires_at, created_at, updated_at, \
                       document";
const ORDER: &str = "ORDER BY created_at DESC, session_id DESC";
/// Tags that are asked for.
const TAGS: usize = 100;

/// One filter, in each language it is asked in.
struct Filter {
    name: &'static str,
    rest: String,
    graphql: String,
    sql: String,
}

/// The filters; `external` is an external id that there is.
fn filters(external: &str) -> Vec<Filter> {
    let filter = |name, rest: &str, graphql: &str, sql: &str| Filter {
        name,
        rest: rest.to_owned(),
        graphql: graphql.to_owned(),
        sql: sql.to_owned(),
    };
    vec![
        filter("no filter", "", "{}", "1"),
        filter(
            "status ACTIVE",
            "&filter[status]=ACTIVE",
            "{ statuses: [ACTIVE] }",
            "closed_at IS NULL AND (expires_at IS NULL OR expires_at > now64(3))",
        ),
        filter(
            "tag, 1 in 3",
            "&filter[tags]=prod",
            r#"{ tags: { any: ["prod"] } }"#,
            "hasAny(tags, ['prod'])",
        ),
        filter(
            "tag, 1 in 20,011",
            "&filter[tags]=rare",
            r#"{ tags: { any: ["rare"] } }"#,
            "hasAny(tags, ['rare'])",
        ),
        filter(
            "externalId",
            &format!("&filter[externalId]={external}"),
            &format!(r#"{{ externalId: "{external}" }}"#),
            &format!("external_id IN ('{external}')"),
        ),
    ]
}

/// Something to ask of both: the row of the table, and the two requests.
struct Question {
    row: String,
    ours: Vec<u8>,
    plain: Vec<u8>,
}

impl Bench<'_> {
    /// Seeds an engine of its own, compares every answer with that of plain FINAL, and measures both; then inserts. Returns
    /// what should stand above the tables.
    ///
    /// # Errors
    /// If ours answers anything else than plain FINAL.
    pub(crate) fn clickhouse_lists(
        &mut self,
        workspace: &Workspace,
        binary: &Path,
    ) -> anyhow::Result<Vec<String>> {
        let home = fresh(&self.home, "clickhouse")?;
        let engine = Engine::start(workspace, &home)?;
        let tenants = tenants(binary, &home, &engine)?;
        let mut head =
            vec![format!("server: ClickHouse {}, as the tests run it", engine.tell("SELECT version()")?)];
        head.push(seed::seed(&engine, &tenants)?);
        let server = ours::start(
            binary,
            &home,
            &[("SESSIOND_CLICKHOUSE__URL", engine.url()), ("SESSIOND_CLICKHOUSE__LISTS", "clickhouse")],
        )?;
        for tenant in &tenants {
            head.push(self.lists_of(tenant, &server, &engine)?);
        }
        drop(server);
        self.inserts(&engine)?;
        Ok(head)
    }

    fn lists_of(&mut self, tenant: &Tenant, server: &Server, engine: &Engine) -> anyhow::Result<String> {
        let asked = Asked { tenant, server, engine };
        let external = engine.tell(&format!(
            "SELECT external_id FROM trigger_dev.sessions_v1 FINAL WHERE {} ORDER BY cityHash64(session_id) LIMIT 1",
            tenant.condition()
        ))?;
        let mut questions = Vec::new();
        for filter in filters(&external) {
            asked.compare_count(&filter)?;
            questions.push(asked.page(&filter, "first page", None)?);
            if let Some(cursor) = asked.middle(&filter)? {
                questions.push(asked.page(&filter, "middle page", Some(&cursor))?);
            }
            if ["no filter", "status ACTIVE"].contains(&filter.name) {
                questions.push(asked.count(&filter));
            }
        }
        questions.push(asked.tags()?);
        for question in questions {
            self.ask_by_turns(&asked, &question)?;
        }
        let rows = asked.engine.tell(&format!(
            "SELECT count() FROM trigger_dev.sessions_v1 FINAL WHERE {}",
            tenant.condition()
        ))?;
        Ok(format!(
            "{}: {rows} sessions; ids and numbers of all filters are those of plain FINAL",
            tenant.name
        ))
    }

    fn ask_by_turns(&mut self, asked: &Asked<'_>, question: &Question) -> anyhow::Result<()> {
        let (mut ours, mut plain) = (asked.server.connect()?, asked.engine.connect()?);
        let (mut ours_took, mut plain_took) = (Latency::default(), Latency::default());
        let began = Instant::now();
        for number in 0..WARM + REQUESTS {
            let (ours_one, _) = ask(&mut ours, &question.ours)?;
            let (plain_one, _) = ask(&mut plain, &question.plain)?;
            if number >= WARM {
                ours_took.record(ours_one);
                plain_took.record(plain_one);
            }
            if number > WARM && began.elapsed() > 2 * self.time {
                break;
            }
        }
        for (server, latency) in [(OURS, ours_took), (PLAIN, plain_took)] {
            let spread = latency.spread()?;
            self.samples.push(Sample {
                table: Table::ClickHouse,
                row: question.row.clone(),
                server: server.to_owned(),
                values: vec![(Metric::P50, spread.p50), (Metric::P99, spread.p99)],
            });
        }
        Ok(())
    }
}

/// Who asks whom.
struct Asked<'a> {
    tenant: &'a Tenant,
    server: &'a Server,
    engine: &'a Engine,
}

/// A place in a list: after the last session of a page.
struct Cursor {
    text: String,
    millis: u64,
    id: String,
}

impl Asked<'_> {
    fn row(&self, what: &str) -> String {
        format!("{}: {what}", self.tenant.name)
    }

    /// A page, which must be the same of both.
    fn page(&self, filter: &Filter, which: &str, cursor: Option<&Cursor>) -> anyhow::Result<Question> {
        let (after, bound) = cursor.map_or_else(Default::default, |Cursor { text, millis, id }| {
            let at = format!("fromUnixTimestamp64Milli({millis})");
            let bound = format!(" AND created_at <= {at} AND (created_at, session_id) < ({at}, '{id}')");
            (format!("&page[after]={text}"), bound)
        });
        let sql = |columns| {
            format!(
                "SELECT {columns} FROM trigger_dev.sessions_v1 FINAL WHERE {} AND {}{bound} {ORDER} LIMIT {}",
                self.tenant.condition(),
                filter.sql,
                PAGE + 1
            )
        };
        let question = Question {
            row: self.row(&format!("{}, {which}", filter.name)),
            ours: self.rest(&format!("{}{after}", filter.rest)),
            plain: self.engine.request(&format!("{} FORMAT RowBinary", sql(COLUMNS))),
        };
        self.compare_page(&question, &sql("session_id"))?;
        Ok(question)
    }

    fn count(&self, filter: &Filter) -> Question {
        Question {
            row: self.row(&format!("{}, count", filter.name)),
            ours: self.graphql(&count_query(filter)),
            plain: self.engine.request(&self.count_sql(filter)),
        }
    }

    /// The tags of both, which must be the same.
    fn tags(&self) -> anyhow::Result<Question> {
        let query = format!("{{ sessionTags(first: {TAGS}) }}");
        let sql = format!(
            "SELECT DISTINCT arrayJoin(tags) AS tag FROM trigger_dev.sessions_v1 FINAL WHERE {} ORDER BY tag LIMIT {TAGS}",
            self.tenant.condition()
        );
        let ours = self.answer(&self.graphql(&query))?;
        let ours: Vec<_> = texts(&ours["data"]["sessionTags"]);
        let plain = self.engine.tell(&sql)?;
        ensure!(!ours.is_empty() && ours.iter().eq(&plain.lines().collect::<Vec<_>>()), "the tags differ");
        Ok(Question {
            row: self.row("tags"),
            ours: self.graphql(&query),
            plain: self.engine.request(&format!("{sql} FORMAT RowBinary")),
        })
    }

    fn count_sql(&self, filter: &Filter) -> String {
        let tenant = self.tenant.condition();
        format!("SELECT count() FROM trigger_dev.sessions_v1 FINAL WHERE {tenant} AND {}", filter.sql)
    }

    /// Fails unless both find as many.
    fn compare_count(&self, filter: &Filter) -> anyhow::Result<()> {
        let ours = self.answer(&self.graphql(&count_query(filter)))?;
        let ours = &ours["data"]["sessions"]["totalCount"];
        let ours = ours.as_str().map_or_else(|| ours.to_string(), str::to_owned);
        let plain = self.engine.tell(&self.count_sql(filter))?;
        ensure!(ours == plain, "{}: ours counts {ours}, plain FINAL {plain}", self.row(filter.name));
        Ok(())
    }

    /// Fails unless both have the same sessions in the same order, and agree whether there are more.
    fn compare_page(&self, page: &Question, sql: &str) -> anyhow::Result<()> {
        let ours = self.answer(&page.ours)?;
        let sessions = ours["data"].as_array().context("a page without a list")?;
        let ours_ids: Vec<_> = sessions.iter().filter_map(|session| session["id"].as_str()).collect();
        let plain = self.engine.tell(sql)?;
        let plain: Vec<_> = plain.lines().collect();
        let same = ours_ids == plain[..plain.len().min(PAGE)];
        ensure!(same, "{}: ours lists {ours_ids:?}, plain FINAL {plain:?}", page.row);
        let more = ours["pagination"]["next"].is_string();
        ensure!(more == (plain.len() > PAGE), "{}: only one of them has more", page.row);
        Ok(())
    }

    /// The place after the first page of what was created before the middle of the time; `None` if less is there.
    fn middle(&self, filter: &Filter) -> anyhow::Result<Option<Cursor>> {
        let page = self.answer(&self.rest(&format!(
            "{}&filter[createdAt][to]={}",
            filter.rest,
            seed::middle(self.engine)
        )))?;
        let (Some(text), Some(last)) =
            (page["pagination"]["next"].as_str(), page["data"].as_array().and_then(|page| page.last()))
        else {
            return Ok(None);
        };
        let id = last["id"].as_str().context("a session without an id")?;
        // The seeded ids begin with their time.
        let digits = id.get("session_".len().."session_".len() + 12).context("a short id")?;
        Ok(Some(Cursor {
            text: text.to_owned(),
            millis: u64::from_str_radix(digits, 16)?,
            id: id.to_owned(),
        }))
    }

    fn rest(&self, query: &str) -> Vec<u8> {
        let query = query.replace('[', "%5B").replace(']', "%5D");
        self.request(&format!("GET /api/v1/sessions?page%5Bsize%5D={PAGE}{query}"), "")
    }

    fn graphql(&self, query: &str) -> Vec<u8> {
        self.request("POST /graphql", &json!({ "query": query }).to_string())
    }

    fn request(&self, line: &str, body: &str) -> Vec<u8> {
        let (bearer, length) = (format!("Bearer {}", self.tenant.key), body.len().to_string());
        let mut headers = vec![("Authorization", bearer.as_str())];
        if !body.is_empty() {
            headers.extend([("Content-Type", "application/json"), ("Content-Length", length.as_str())]);
        }
        let mut request = http::request(line, self.server.address, &headers);
        request.extend_from_slice(body.as_bytes());
        request
    }

    fn answer(&self, request: &[u8]) -> anyhow::Result<Value> {
        let (_, body) = ask(&mut self.server.connect()?, request)?;
        let body: Value = serde_json::from_slice(&body)?;
        ensure!(body.get("errors").is_none(), "answered {body}");
        Ok(body)
    }
}

fn count_query(filter: &Filter) -> String {
    format!("{{ sessions(first: 1, filter: {}) {{ totalCount }} }}", filter.graphql)
}

fn texts(value: &Value) -> Vec<&str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

/// Sends a request that must succeed; tells how long it took, and the body.
pub(super) fn ask(stream: &mut TcpStream, request: &[u8]) -> anyhow::Result<(Duration, Vec<u8>)> {
    stream.set_read_timeout(Some(Duration::from_secs(120)))?;
    let began = Instant::now();
    let (status, body) = http::exchange(stream, request)?;
    let took = began.elapsed();
    ensure!((200..300).contains(&status), "answered {status}: {}", String::from_utf8_lossy(&body));
    Ok((took, body))
}
