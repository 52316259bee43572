//! The tables, and the engine that the tests run on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sessiond::domain::{Error, Filter, ListIndex, PageRequest};
use sessiond::store::index::clickhouse::{ClickHouse, ClickHouseIndex, Rebuild};

use crate::harness::clickhouse::{self, Engine, connect, options};
use crate::harness::database::{Sql, at, session};

/// What keeps lists from being answered, cause by cause.
async fn refusal(clickhouse: &ClickHouse, sql: &Sql) -> String {
    let index = ClickHouseIndex::new(clickhouse.clone(), Arc::new(sql.store.clone()), Arc::default());
    let listed = index.list(&sql.here, &Filter::default(), &PageRequest::first(1), at(1)).await;
    let error = listed.expect_err("nothing to list");
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

/// Makes a database without anything.
async fn empty_database() -> ClickHouse {
    let server = connect(options(&clickhouse::url()));
    let text = format!("CREATE DATABASE {}", server.options().database);
    run(&clickhouse::url(), &text).await;
    server
}

async fn run(url: &str, statement: &str) {
    let client = ::clickhouse::Client::default().with_url(url);
    client.query_raw(statement).execute().await.expect("runs");
}

#[tokio::test]
async fn lists_are_refused_in_words_until_a_rebuild_is_finished() {
    let sql = Sql::sqlite().await;
    sql.create(session(1000)).await;
    let clickhouse = connect(options(&clickhouse::url()));
    let sentence = "the list index has not been built: run `sessiond index rebuild`, or `sessiond replicate`";
    assert_eq!(refusal(&clickhouse, &sql).await, sentence);
    let store = Arc::new(sql.store.clone());
    let mut rebuild =
        Rebuild::begin(clickhouse.clone(), store.clone(), false, at(5000)).await.expect("begins");
    assert!(!rebuild.step().await.expect("copies").finished);
    assert_eq!(refusal(&clickhouse, &sql).await, sentence, "half a copy is none");
    assert!(rebuild.step().await.expect("copies").finished);
    let index = ClickHouseIndex::new(clickhouse, store, Arc::default());
    assert_eq!(index.count(&sql.here, &Filter::default(), at(1)).await.expect("counts"), 1);
}

#[tokio::test]
async fn tables_of_a_later_version_are_left_alone() {
    let sql = Sql::sqlite().await;
    let clickhouse = empty_database().await;
    let database = clickhouse.options().database.clone();
    clickhouse::rebuild(&clickhouse, Arc::new(sql.store.clone()), at(1)).await;
    run(&clickhouse::url(), &format!("INSERT INTO {database}.schema_steps (step) VALUES (1000)")).await;
    let refused = refusal(&clickhouse, &sql).await;
    assert!(
        refused.ends_with("are of schema 1000, and this program knows 2: use the later one"),
        "{refused}"
    );
}

#[tokio::test]
async fn a_table_of_another_program_is_left_alone() {
    let sql = Sql::sqlite().await;
    let clickhouse = empty_database().await;
    let database = clickhouse.options().database.clone();
    let create = format!("CREATE TABLE {database}.sessions_v1 (id String) ENGINE = MergeTree ORDER BY id");
    run(&clickhouse::url(), &create).await;
    let refused = refusal(&clickhouse, &sql).await;
    assert!(refused.contains("was not made by sessiond"), "{refused}");
    let begun = Rebuild::begin(clickhouse.clone(), Arc::new(sql.store.clone()), false, at(1)).await;
    assert!(matches!(begun.err(), Some(Error::Unavailable { .. })));
}

#[tokio::test]
async fn two_replicas_may_make_the_tables_at_once() {
    let sql = Sql::sqlite().await;
    let clickhouse = connect(options(&clickhouse::url()));
    let store = Arc::new(sql.store.clone());
    let begin = |millis| Rebuild::begin(clickhouse.clone(), store.clone(), false, at(millis));
    let begun = futures_util::future::join_all([begin(1), begin(2), begin(3), begin(4)]).await;
    for rebuild in begun {
        rebuild.expect("begins");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_sql_answers_for_the_third_adapter() {
    let engine = Engine::start();
    let sql = Sql::with_engine(&engine.url()).await;
    sql.create(session(1000)).await;
    let everything = Filter::default();
    let ask = || sql.index.count(&sql.here, &everything, at(1));
    assert_eq!(ask().await.expect("counts"), 1);
    drop(engine);
    assert!(matches!(ask().await, Err(Error::Unavailable { .. })));
}

#[tokio::test]
async fn an_engine_ends_with_who_started_it_and_keeps_what_it_stored() {
    let sql = Sql::sqlite().await;
    let store = Arc::new(sql.store.clone());
    let mut engine = Engine::start();
    let clickhouse = connect(options(&engine.url()));
    clickhouse::rebuild(&clickhouse, store.clone(), at(7)).await;
    engine.hang_up();
    let _engine = engine.restart();
    let index = ClickHouseIndex::new(clickhouse, store, Arc::default());
    // Readiness is impatient, and an engine that has just begun is slow.
    let answer = async {
        loop {
            if let Ok(degraded) = index.ping().await {
                return degraded;
            }
        }
    };
    let degraded = tokio::time::timeout(Duration::from_secs(30), answer).await.expect("it answers in time");
    assert_eq!(degraded, ["lists are of 1970-01-01T00:00:00.007Z: nothing keeps them up to date"]);
}

#[tokio::test]
async fn a_query_that_takes_too_long_is_given_up_there_too() {
    let mut options = options(&clickhouse::url());
    options.query_timeout = Duration::from_millis(200);
    options.database = "default".to_owned();
    let clickhouse = connect(options);
    let mark = uuid::Uuid::new_v4().simple().to_string();
    let text = format!(
        "SELECT sleepEachRow(0.1) AS {} FROM numbers(1000) SETTINGS max_block_size = 1",
        format_args!("mark_{mark}")
    );
    let started = Instant::now();
    let answer = clickhouse.fetch::<u8>(clickhouse.query(&text)).await;
    assert!(answer.is_err());
    assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
    let client = ::clickhouse::Client::default().with_url(clickhouse::url());
    let running =
        format!("SELECT count() FROM system.processes WHERE query LIKE 'SELECT sleepEachRow%{mark}%'");
    let deadline = Instant::now() + Duration::from_secs(1);
    while client.query_raw(&running).fetch_one::<u64>().await.expect("counts") > 0 {
        assert!(Instant::now() < deadline, "it still runs");
    }
}
