//! Pages are exact, however many versions of a session lie in the table.

use std::sync::{Arc, Mutex};

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, Uri};
use futures_util::{StreamExt, stream};
use serde::Deserialize;
use sessiond::domain::list::Anchor;
use sessiond::domain::{
    Cursor, ExternalId, Filter, ListIndex, PageRequest, SessionId, Status, StatusSet, Timestamp,
};
use sessiond::store::index::clickhouse::{ClickHouse, ClickHouseIndex, ClickHouseOptions};

use crate::harness::Dice;
use crate::harness::clickhouse::{connect, options, rebuild, url};
use crate::harness::database::{HERE, Sql, at, words};

const DAY: i64 = 86_400_000;
/// The first of seven months.
const START: i64 = 1_700_000_000_000;
const NOW: Timestamp = Timestamp::from_millis(START + 300 * DAY);
const SESSIONS: u32 = 70_000;
/// Sessions that have fifteen versions, one behind the other in list order.
const HOT: u32 = 1_000;
/// Pages that are compared.
const PAGES: u64 = 500;
/// Pages of them that the first candidates do not decide, at least.
const REPEATS: u64 = 20;

/// 70,000 sessions in 120,000 versions: changed ones, tombstones, old versions that came last, and a stretch of sessions with
/// fifteen versions of which only the newest says what counts. Made by the engine, whose merges are off.
async fn fill(clickhouse: &ClickHouse) {
    let client = clickhouse_client(clickhouse);
    client.query_raw("SYSTEM STOP MERGES sessions_v1").execute().await.expect("stopped");
    let insert = |version: u32, rows: String, deleted: &str| {
        let hot = SESSIONS - HOT;
        format!(
            "INSERT INTO sessions_v1 (environment_id, organization_id, project_id, session_id, environment_type, friendly_id, \
             external_id, type, task_identifier, tags, closed_at, expires_at, created_at, updated_at, _version, _is_deleted, \
             document) \
             WITH number AS n, cityHash64(n, {version}) AS dice, leftPad(toString(n), 8, '0') AS id, \
             n >= {hot} AND {version} < 18 AS hides, \
             fromUnixTimestamp64Milli({START} + if(n >= {hot}, 100 * {DAY} + toInt64(n) * 60000, \
             toInt64(cityHash64(n) % 17640) * 1000000)) AS created \
             SELECT if(n % 3 = 0, 'env_elsewhere', '{HERE}'), 'acme', if(n % 3 = 0, 'env_elsewhere', 'main'), \
             'session_' || id, 'PRODUCTION', 'session_' || id, if(n % 7 = 0, 'external-' || toString(n), ''), \
             if(n % 2 = 0, 'chat', 'agent'), if(n % 5 = 0, 'support', 'sales'), \
             if(hides, ['shown', 'common'], arrayConcat(if(dice % 3 = 0, ['common'], []), \
             if(n % 9973 = 1, ['rare'], []), if(dice % 40 = 1, ['team:' || toString(dice % 4)], []))), \
             if(dice % 4 = 0, created + INTERVAL 1 HOUR, NULL), if(dice % 3 = 1, created + INTERVAL 200 DAY, NULL), \
             created, created, {version}, {deleted}, '{{\"currentRunId\":\"run_a\"}}' FROM ({rows})"
        )
    };
    let all = format!("SELECT number FROM numbers({SESSIONS})");
    let which = |condition: &str| format!("{all} WHERE {condition}");
    let mut inserts = vec![
        insert(2, all.clone(), "0"),
        insert(3, which("number % 5 = 0"), "number % 15 = 0"),
        insert(1, which("number % 10 IN (1, 4, 7)"), "number % 10 = 1"),
    ];
    let hot = which(&format!("number >= {}", SESSIONS - HOT));
    inserts.extend((4..19).map(|version| insert(version, hot.clone(), "0")));
    for text in inserts {
        client.query_raw(&text).execute().await.expect("inserted");
    }
}

/// A client without the limits of ours.
fn clickhouse_client(clickhouse: &ClickHouse) -> clickhouse::Client {
    let ClickHouseOptions { url, database, .. } = clickhouse.options();
    clickhouse::Client::default().with_url(url).with_database(database)
}

/// A session as plain FINAL has it.
#[derive(Debug, clickhouse::Row, Deserialize)]
struct Listed {
    environment_id: String,
    session_id: String,
    external_id: String,
    r#type: String,
    task_identifier: String,
    tags: Vec<String>,
    closed_at: Option<i64>,
    expires_at: Option<i64>,
    created_at: i64,
}

impl Listed {
    fn matches(&self, filter: &Filter) -> bool {
        let any = |wanted: &[String], has: &String| wanted.is_empty() || wanted.contains(has);
        let status = match (self.closed_at, self.expires_at) {
            (Some(_), _) => Status::Closed,
            (None, Some(end)) if end <= NOW.millis() => Status::Expired,
            _ => Status::Active,
        };
        any(&filter.kinds, &self.r#type)
            && any(&filter.task_identifiers, &self.task_identifier)
            && (filter.external_ids.is_empty()
                || filter.external_ids.iter().any(|id| id.as_str() == self.external_id))
            && (filter.tags_any.is_empty() || filter.tags_any.iter().any(|tag| self.tags.contains(tag)))
            && filter.tags_all.iter().all(|tag| self.tags.contains(tag))
            && (filter.statuses.is_any() || filter.statuses.as_slice().contains(&status))
            && filter.created_from.is_none_or(|from| self.created_at >= from.millis())
            && filter.created_to.is_none_or(|to| self.created_at <= to.millis())
    }

    fn cursor(&self) -> Cursor {
        Cursor { created_at: at(self.created_at), id: SessionId::from_stored(&self.session_id) }
    }
}

/// A filled table, and what plain FINAL says of it, in list order.
async fn filled() -> (Sql, ClickHouse, Vec<Listed>) {
    let sql = Sql::sqlite().await;
    let clickhouse = connect(options(&url()));
    rebuild(&clickhouse, Arc::new(sql.store.clone()), at(1)).await;
    fill(&clickhouse).await;
    let client = clickhouse_client(&clickhouse);
    let versions: u64 =
        client.query_raw("SELECT count() FROM sessions_v1").fetch_one().await.expect("counts");
    assert_eq!(versions, 120_000, "versions");
    let text = "SELECT environment_id, session_id, external_id, type, task_identifier, tags, closed_at, expires_at, created_at \
                FROM sessions_v1 FINAL ORDER BY created_at DESC, session_id DESC SETTINGS use_skip_indexes = 0";
    let mut listed: Vec<Listed> = client.query_raw(text).fetch_all().await.expect("lists");
    listed.retain(|session| session.environment_id == HERE);
    (sql, clickhouse, listed)
}

/// A filter in which each field stands now and then, so that every one does in some hundred questions.
fn some_filter(dice: &mut Dice, listed: &[Listed]) -> Filter {
    let mut filter = Filter::default();
    let time = |dice: &mut Dice| at(listed[dice.roll(listed.len())].created_at);
    match dice.roll(16) {
        0 => filter.tags_any = words(&["shown", "rare"]),
        1 => filter.tags_all = words(&["common", "shown"]),
        2 | 3 => filter.tags_any = words(&[["rare", "team:1", "absent"][dice.roll(3)]]),
        4 | 5 => filter.tags_all = words(&["common"]),
        6 | 7 => {
            let ids = (0..20).map(|_| &listed[dice.roll(listed.len())].external_id);
            filter.external_ids =
                ids.filter(|id| !id.is_empty()).map(|id| ExternalId::from_stored(id)).collect();
        }
        _ => {}
    }
    if dice.one_in(4) {
        filter.kinds = words(&["chat"]);
    }
    if dice.one_in(4) {
        filter.task_identifiers = words(&[["support", "sales"][dice.roll(2)]]);
    }
    if dice.one_in(3) {
        filter.statuses = StatusSet::new(vec![Status::ALL[dice.roll(3)], Status::ALL[dice.roll(3)]]);
    }
    if dice.one_in(8) {
        filter.created_from = Some(time(dice));
    }
    if dice.one_in(8) {
        filter.created_to = Some(time(dice));
    }
    filter
}

/// A page from somewhere, often from the stretch with fifteen versions.
fn some_page(dice: &mut Dice, listed: &[Listed]) -> PageRequest {
    let hot = listed.iter().position(|session| session.session_id.as_str() >= "session_00069000");
    let place = if dice.one_in(6) { hot.expect("hot ones") } else { dice.roll(listed.len()) };
    let cursor = (!dice.one_in(6)).then(|| listed[place].cursor());
    let anchor = if dice.one_in(2) { Anchor::After(cursor) } else { Anchor::Before(cursor) };
    PageRequest::new(1 + dice.roll(100), anchor).expect("a size in range")
}

/// The ids of a page, by looking at every row.
fn expected(listed: &[Listed], filter: &Filter, page: &PageRequest) -> Vec<String> {
    let matching = listed.iter().filter(|session| session.matches(filter));
    let ids = |rows: &[&Listed]| rows.iter().map(|session| session.session_id.clone()).collect();
    match &page.anchor {
        Anchor::After(cursor) => {
            let older = matching.filter(|one| cursor.as_ref().is_none_or(|cursor| one.cursor() < *cursor));
            ids(&older.take(page.size).collect::<Vec<_>>())
        }
        Anchor::Before(cursor) => {
            let newer = matching.filter(|one| cursor.as_ref().is_none_or(|cursor| one.cursor() > *cursor));
            let newer: Vec<_> = newer.collect();
            ids(&newer[newer.len().saturating_sub(page.size)..])
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_hundred_pages_are_those_of_plain_final() {
    let (sql, clickhouse, listed) = filled().await;
    let index = ClickHouseIndex::new(clickhouse, Arc::new(sql.store.clone()), Arc::default());
    let (index, sql, listed) = (&index, &sql, &listed);
    let mut dice = Dice::new(0x5eed);
    let questions: Vec<_> =
        (0..PAGES).map(|_| (some_filter(&mut dice, listed), some_page(&mut dice, listed))).collect();
    let asked = stream::iter(&questions).map(|(filter, page)| async move {
        let answer = index.list(&sql.here, filter, page, NOW).await.expect("lists");
        let ids: Vec<_> = answer.sessions.iter().map(|session| session.id.to_string()).collect();
        assert_eq!(ids, expected(listed, filter, page), "{filter:?} {page:?}");
        ids.len()
    });
    let rows: Vec<usize> = asked.buffer_unordered(4).collect().await;
    assert!(rows.iter().filter(|rows| **rows > 0).count() > 300, "most questions have an answer: {rows:?}");
    let repeats = index.repeats();
    assert!(repeats >= REPEATS, "only {repeats} pages needed more candidates");
    for (filter, _) in questions.iter().take(20) {
        let count = index.count(&sql.here, filter, NOW).await.expect("counts");
        assert_eq!(count, listed.iter().filter(|one| one.matches(filter)).count() as u64, "{filter:?}");
    }
}

/// What was sent: path with its query, headers, body.
type Sent = Arc<Mutex<Vec<(Uri, HeaderMap, Bytes)>>>;

/// Hands requests on to the engine, and keeps them.
async fn recorder() -> (String, Sent) {
    async fn pass(State(sent): State<Sent>, uri: Uri, headers: HeaderMap, body: Bytes) -> Bytes {
        sent.lock().expect("sound").push((uri.clone(), headers.clone(), body.clone()));
        post(&uri, headers, body).await
    }
    let sent = Sent::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    let router = axum::Router::new().fallback(pass).with_state(sent.clone());
    tokio::spawn(async move { axum::serve(listener, router).await });
    (url, sent)
}

async fn post(uri: &Uri, mut headers: HeaderMap, body: Bytes) -> Bytes {
    for name in ["host", "content-length", "accept-encoding", "transfer-encoding"] {
        headers.remove(name);
    }
    // Uncompressed, so that it can be handed on as it is.
    let url = format!("{}{uri}", url()).replace("compress=1", "compress=0");
    let answer = reqwest::Client::new().post(url).headers(headers).body(body).send().await.expect("answers");
    answer.bytes().await.expect("a body")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_by_tag_leaves_granules_out_by_the_index_of_tags() {
    let (sql, filled, listed) = filled().await;
    let (url, sent) = recorder().await;
    let through = connect(ClickHouseOptions { url, ..filled.options().clone() });
    let index = ClickHouseIndex::new(through, Arc::new(sql.store.clone()), Arc::default());
    let filter = Filter { tags_any: words(&["rare"]), ..Filter::default() };
    let page = PageRequest::first(20);
    let answer = index.list(&sql.here, &filter, &page, NOW).await.expect("lists");
    assert_eq!(answer.sessions.len(), expected(&listed, &filter, &page).len());
    assert!(!answer.sessions.is_empty());
    let (uri, headers, body) = {
        let sent = sent.lock().expect("sound");
        let list = sent.iter().find(|(.., body)| String::from_utf8_lossy(body).contains("FINAL"));
        list.expect("the statement of the list").clone()
    };
    let text = String::from_utf8(body.to_vec()).expect("text");
    let explain = text.replacen("SELECT session_id", "EXPLAIN indexes = 1 SELECT session_id", 1);
    assert_ne!(explain, text);
    let uri: Uri = uri.to_string().replace("RowBinaryWithNamesAndTypes", "TSV").parse().expect("a path");
    let plan = String::from_utf8(post(&uri, headers, explain.into()).await.to_vec()).expect("text");
    let granules = |index: &str| {
        let after = plan.split(&format!("Name: {index}")).nth(1)?;
        let (read, all) = after.split("Granules: ").nth(1)?.lines().next()?.split_once('/')?;
        Some((read.trim().parse::<u32>().ok()?, all.trim().parse::<u32>().ok()?))
    };
    let (read, all) = granules("tags_bloom").unwrap_or_else(|| panic!("the index is not used:\n{plan}"));
    assert!(read < all, "{plan}");
}
