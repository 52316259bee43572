//! `sessiond index rebuild`: whatever happens to it, lists are those of the metadata store afterwards.

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use sea_orm::ConnectionTrait;
use serde_json::{Value, json};
use sessiond::domain::list::Anchor;
use sessiond::domain::{Filter, ListIndex, MetadataStore, PageRequest, Session, StatusSet, Timestamp};
use sessiond::store::index::clickhouse::{ClickHouse, ClickHouseIndex, ClickHouseOptions};
use sessiond::store::index::sql::SqlIndex;
use tokio::process::Command;

use crate::harness::Process;
use crate::harness::clickhouse::{self, connect, options, select};
use crate::harness::database::{HERE, Sql, TestDatabase, at, session};
use crate::harness::seed::{self, Spread};

const NOW: Timestamp = Timestamp::from_millis(seed::NOW);
/// Enough for a dozen steps of a rebuild.
const MANY: u64 = 6_000;

/// The command, on this database and into that one.
fn rebuild(data: &Path, database: &TestDatabase, clickhouse: &ClickHouse) -> Command {
    let mut command = Command::new(Process::binary());
    command
        .args(["index", "rebuild", "--json", "--data"])
        .arg(data)
        .env("SESSIOND_METADATA__URL", &database.url)
        .env("SESSIOND_AUTH__MASTER_KEY", "ab".repeat(32))
        .env("SESSIOND_CLICKHOUSE__URL", &clickhouse.options().url)
        .env("SESSIOND_CLICKHOUSE__DATABASE", &clickhouse.options().database)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

async fn run(mut command: Command) -> Value {
    let output = command.output().await.expect("the binary starts");
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// Every session of a list, whole.
async fn all(index: &dyn ListIndex, sql: &Sql, filter: &Filter) -> Vec<Session> {
    let (mut sessions, mut cursor) = (Vec::new(), None);
    loop {
        let page = PageRequest::new(100, Anchor::After(cursor)).expect("a size in range");
        let page = index.list(&sql.here, filter, &page, NOW).await.expect("lists");
        cursor = page.next();
        sessions.extend(page.sessions);
        if cursor.is_none() {
            return sessions;
        }
    }
}

/// Lists and counts of both are the same.
async fn assert_same(sql: &Sql, clickhouse: &ClickHouse) {
    let ours = ClickHouseIndex::new(clickhouse.clone(), Arc::new(sql.store.clone()), Arc::default());
    let theirs = SqlIndex::new(sql.store.clone());
    let everything = Filter::default();
    let (ours_all, theirs_all) = tokio::join!(all(&ours, sql, &everything), all(&theirs, sql, &everything));
    assert_eq!(ours_all.len(), theirs_all.len());
    for (ours, theirs) in ours_all.iter().zip(&theirs_all) {
        assert_eq!(ours, theirs);
    }
    for status in sessiond::domain::Status::ALL {
        let filter = Filter { statuses: StatusSet::new(vec![status]), ..Filter::default() };
        let count = ours.count(&sql.here, &filter, NOW).await.expect("counts");
        assert_eq!(count, theirs.count(&sql.here, &filter, NOW).await.expect("counts"), "{status:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_rebuild_goes_on_where_it_was() {
    let sql = Sql::sqlite().await;
    seed::sessions(&sql.database.url, HERE, MANY, Spread::Uniform).await.expect("seeded");
    let data = tempfile::tempdir().expect("a folder");
    let clickhouse = connect(options(&clickhouse::url()));
    // Somewhere in the first steps.
    let enough = [1, 251, 751][usize::from(uuid::Uuid::new_v4().as_bytes()[0] % 3)];
    let mut child = rebuild(data.path(), &sql.database, &clickhouse).spawn().expect("the binary starts");
    let reached =
        format!("SELECT max(rows) FROM {}.rebuilds WHERE rows >= {enough}", clickhouse.options().database);
    let elsewhere =
        connect(ClickHouseOptions { database: "default".to_owned(), ..clickhouse.options().clone() });
    let patience = tokio::time::timeout(Duration::from_secs(60), async {
        // Refused until the tables are there.
        while !matches!(elsewhere.fetch::<u64>(elsewhere.query(&reached)).await.as_deref(), Ok([rows]) if *rows > 0)
        {
            tokio::task::yield_now().await;
        }
    });
    patience.await.expect("it gets so far");
    child.kill().await.expect("killed");
    assert_eq!(select::<u64>(&clickhouse, "SELECT countIf(finished = 1) FROM rebuilds").await, [0]);
    sql.database
        .connect()
        .await
        .execute_unprepared("DELETE FROM sessions WHERE created_at % 10 = 3")
        .await
        .expect("deleted");
    let mut resumed = rebuild(data.path(), &sql.database, &clickhouse);
    resumed.arg("--resume");
    run(resumed).await;
    assert_eq!(
        select::<u64>(&clickhouse, "SELECT uniqExact(version) FROM rebuilds").await,
        [1],
        "one rebuild"
    );
    // What the first run had copied, and was deleted before the second, only the next one can know.
    sql.database
        .connect()
        .await
        .execute_unprepared("DELETE FROM sessions WHERE created_at % 10 = 4")
        .await
        .expect("deleted");
    let answer = run(rebuild(data.path(), &sql.database, &clickhouse)).await;
    assert_eq!(answer, json!({"sessions": MANY * 8 / 10, "withoutMetadataColumn": 0}));
    assert_same(&sql, &clickhouse).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_metadata_holds_comes_back_as_it_was_stored() {
    let sql = Sql::sqlite().await;
    for (n, metadata) in [
        json!(null),
        json!({}),
        json!({"a": null, "b": {}, "c": []}),
        json!({"a.b": 1}),
        json!({"a": {"b": 1}, "a.b": 2}),
        json!({"float": 1.0, "large": u64::MAX, "small": i64::MIN}),
        serde_json::from_str(r#"{"huge": 1180591620717411303424}"#).expect("JSON"),
        json!({"mixed": [1, "two", {"three": 3}, [4], null]}),
        json!({"": "an empty key", "data": {"data": 1}, "text": "\u{1f600} \" \\ \n"}),
    ]
    .into_iter()
    .enumerate()
    {
        let metadata = metadata.as_object().cloned();
        sql.create(Session {
            metadata: metadata.clone(),
            trigger_config: metadata,
            ..session(1000 + n as i64)
        })
        .await;
    }
    let reasons = [None, Some(""), Some("done")];
    for (n, reason) in reasons.into_iter().enumerate() {
        let closed = sessiond::domain::Closure { at: at(5000), reason: reason.map(str::to_owned) };
        sql.create(Session { closed: Some(closed), ..session(2000 + n as i64) }).await;
    }
    for metadata_column in [false, true] {
        let clickhouse = connect(ClickHouseOptions { metadata_column, ..options(&clickhouse::url()) });
        let progress = clickhouse::rebuild(&clickhouse, Arc::new(sql.store.clone()), at(1)).await;
        assert_eq!(progress.sessions, 12);
        assert_same(&sql, &clickhouse).await;
        let filled =
            select::<u64>(&clickhouse, "SELECT countIf(toString(metadata) != '{}') FROM sessions_v1").await;
        assert_eq!(filled[0] > 0, metadata_column, "{filled:?}");
    }
}

/// Pages of one and the other in turn, from one end to the other.
async fn walk(indexes: [&dyn ListIndex; 2], sql: &Sql, forward: bool) -> Vec<Session> {
    let (mut pages, mut cursor) = (Vec::new(), None);
    for turn in 0.. {
        let anchor = if forward { Anchor::After(cursor) } else { Anchor::Before(cursor) };
        let page = PageRequest::new(7, anchor).expect("a size in range");
        let page = indexes[turn % 2].list(&sql.here, &Filter::default(), &page, NOW).await.expect("lists");
        cursor = if forward { page.next() } else { page.previous() };
        pages.push(page.sessions);
        if cursor.is_none() {
            break;
        }
    }
    if !forward {
        pages.reverse();
    }
    pages.concat()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_walk_may_change_between_sql_and_clickhouse_at_every_page() {
    let sql = Sql::postgres().await;
    for n in 0..100 {
        // Ten of each millisecond.
        sql.create(session(1000 + n / 10)).await;
    }
    let clickhouse = connect(options(&clickhouse::url()));
    clickhouse::rebuild(&clickhouse, Arc::new(sql.store.clone()), at(1)).await;
    let ours = ClickHouseIndex::new(clickhouse, Arc::new(sql.store.clone()), Arc::default());
    let theirs = SqlIndex::new(sql.store.clone());
    let expected = all(&theirs, &sql, &Filter::default()).await;
    assert_eq!(expected.len(), 100);
    for forward in [true, false] {
        assert_eq!(walk([&ours, &theirs], &sql, forward).await, expected);
        assert_eq!(walk([&theirs, &ours], &sql, forward).await, expected);
    }
    assert_eq!(sql.store.scan_sessions(None, 1000).await.expect("scans").len(), 100);
}
