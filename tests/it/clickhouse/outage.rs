//! ClickHouse away, or silent: through the wire.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sessiond::store::index::clickhouse::ClickHouse;

use crate::harness::clickhouse::{self, Engine, connect, options};
use crate::harness::{Answer, TestServer};

const SESSIONS: &str = "/api/v1/sessions";
const TIMEOUT: Duration = Duration::from_millis(500);

/// A server with one session, whose lists come from this database.
async fn server(clickhouse: &ClickHouse, fallback: sessiond::config::Fallback) -> TestServer {
    let options = clickhouse.options();
    let server = TestServer::start_with(|config| {
        config.clickhouse.url = Some(options.url.parse().expect("a URL"));
        config.clickhouse.database.clone_from(&options.database);
        config.clickhouse.lists = sessiond::config::ListSource::ClickHouse;
        config.clickhouse.query_timeout = TIMEOUT;
        config.clickhouse.fallback = fallback;
    })
    .await;
    server.create(json!({"externalId": "one", "tags": ["a"]})).await;
    server
}

async fn rebuilt(clickhouse: &ClickHouse, server: &TestServer) {
    let store = server.control().await.store;
    clickhouse::rebuild(clickhouse, store, sessiond::domain::Timestamp::from_millis(1)).await;
}

async fn readyz(server: &TestServer) -> (u16, Value) {
    let answer = server.http.get(format!("{}/readyz", server.url)).send().await.expect("answers");
    (answer.status().as_u16(), answer.json().await.expect("JSON"))
}

fn is_refusal(answer: &Answer) -> bool {
    answer.status.as_u16() == 503 && answer.header("retry-after").is_some()
}

/// The first list waits for the timeout at most, those after it do not wait.
async fn costs_one_wait(server: &TestServer) {
    let started = Instant::now();
    assert!(is_refusal(&server.get(SESSIONS).await));
    assert!(started.elapsed() < TIMEOUT + Duration::from_millis(500), "{:?}", started.elapsed());
    let started = Instant::now();
    for _ in 0..100 {
        assert!(is_refusal(&server.get(SESSIONS).await));
    }
    assert!(started.elapsed() < Duration::from_millis(50) * 100, "{:?}", started.elapsed());
    let (status, body) = readyz(server).await;
    assert_eq!((status, &body["degraded"]), (200, &json!(["the list index is unavailable"])), "{body}");
    let query = json!({"query": "{ sessions(first: 1) { edges { node { id } } } }"});
    let answer = server.post("/graphql", &query).await;
    assert_eq!(answer.json()["errors"][0]["extensions"]["code"], "UNAVAILABLE", "{answer:?}");
    // What is no list does not care.
    server.get(&format!("{SESSIONS}/one")).await.expect(200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_connection_is_refused_at_once() {
    let server = server(&connect(options("http://127.0.0.1:1")), sessiond::config::Fallback::None).await;
    costs_one_wait(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_engine_costs_one_wait_and_is_back_by_itself() {
    let engine = Engine::start();
    let clickhouse = connect(options(&engine.url()));
    let server = server(&clickhouse, sessiond::config::Fallback::None).await;
    rebuilt(&clickhouse, &server).await;
    let listed = server.get(SESSIONS).await.expect(200);
    assert_eq!(listed["data"][0]["externalId"], "one");
    engine.signal("STOP");
    costs_one_wait(&server).await;
    engine.signal("CONT");
    let started = Instant::now();
    while server.get(SESSIONS).await.status.as_u16() != 200 {
        assert!(started.elapsed() < Duration::from_secs(2), "it is back, and lists are not");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_fall_back_to_the_metadata_store_where_they_may() {
    let engine = Engine::start();
    let clickhouse = connect(options(&engine.url()));
    let server = server(&clickhouse, sessiond::config::Fallback::Sql).await;
    let sentence = "the list index has not been built: run `sessiond index rebuild`, or `sessiond replicate`";
    let meanwhile = "lists come from the metadata store meanwhile";
    assert_eq!(server.get(SESSIONS).await.expect(200)["data"][0]["externalId"], "one");
    assert_eq!(readyz(&server).await.1["degraded"], json!([format!("{sentence}; {meanwhile}")]));
    rebuilt(&clickhouse, &server).await;
    server.create(json!({"externalId": "two"})).await;
    // For a moment it is remembered that there was nothing to list. ClickHouse is behind, by which it is told.
    let started = Instant::now();
    while server.get(SESSIONS).await.expect(200)["data"].as_array().map(Vec::len) != Some(1) {
        assert!(started.elapsed() < Duration::from_secs(5), "lists still come from the metadata store");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    engine.signal("STOP");
    let listed = server.get(SESSIONS).await.expect(200);
    assert_eq!(listed["data"].as_array().map(Vec::len), Some(2), "{listed}");
    let (status, body) = readyz(&server).await;
    assert_eq!(status, 200);
    assert_eq!(body["degraded"], json!([format!("the list index is unavailable; {meanwhile}")]));
    engine.signal("CONT");
}

#[tokio::test]
async fn lists_are_refused_in_words_before_the_first_rebuild() {
    let server = server(&connect(options(&clickhouse::url())), sessiond::config::Fallback::None).await;
    let answer = server.get(SESSIONS).await;
    assert!(is_refusal(&answer), "{answer:?}");
    let sentence = "the list index has not been built: run `sessiond index rebuild`, or `sessiond replicate`";
    assert_eq!(answer.json()["error"], sentence);
    assert_eq!(readyz(&server).await.1["degraded"], json!([sentence]));
}
