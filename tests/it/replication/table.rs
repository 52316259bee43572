//! The table in ClickHouse: what a row comes back as, and which version of it holds.

use sessiond::clickhouse::{ClickHouse, Fault, SessionRow};

use crate::harness::clickhouse::{config, fresh, row, url};

async fn all(clickhouse: &ClickHouse) -> Vec<SessionRow> {
    clickhouse.scan(None, 1000).await.expect("scans")
}

fn ids(rows: &[SessionRow]) -> Vec<&str> {
    rows.iter().map(|row| row.session_id.as_str()).collect()
}

#[tokio::test]
async fn two_replicas_may_migrate_at_once_and_again() {
    let clickhouse = ClickHouse::new(&config(&url()));
    let (one, other) = tokio::join!(clickhouse.migrate(), clickhouse.migrate());
    one.expect("migrates");
    other.expect("migrates");
    clickhouse.migrate().await.expect("migrates again");
    clickhouse.ping().await.expect("is there");
}

#[tokio::test]
async fn a_table_of_a_newer_binary_is_left_alone() {
    let clickhouse = fresh().await;
    let sql = "INSERT INTO sessiond_migrations (table, step) VALUES ('sessions_v1', 99)";
    clickhouse.query(sql).execute().await.expect("a step of the future");
    let refused = clickhouse.migrate().await.expect_err("refuses");
    assert!(matches!(refused, Fault::NewerSchema { step: 99, .. }), "{refused}");
}

#[tokio::test]
async fn a_row_comes_back_as_it_went() {
    let clickhouse = fresh().await;
    let text = r#"{"a":{"b":1},"a.b":2,"list":[1,"x",null,{}],"emoji":"😀\u0000"}"#;
    let sent = SessionRow {
        external_id: "it's \\ 😀".to_owned(),
        tags: vec!["a:b".to_owned(), String::from("ä, ö"), "--".to_owned()],
        metadata: format!(r#"{{"data":{text}}}"#),
        metadata_text: text.to_owned(),
        trigger_config: r#"{"machine":"small"}"#.to_owned(),
        closed_at: Some(1_700_000_000_123),
        closed_reason: "done".to_owned(),
        expires_at: Some(1_800_000_000_456),
        ..row("session_a", 1_690_000_000_789, 7)
    };
    clickhouse.insert(std::slice::from_ref(&sent)).await.expect("stored");
    let [mut back] = <[SessionRow; 1]>::try_from(all(&clickhouse).await).expect("one row");
    assert!(back.metadata.contains("😀"), "{}", back.metadata);
    back.metadata.clone_from(&sent.metadata);
    assert_eq!(back, sent);
}

#[tokio::test]
async fn the_greatest_version_holds_in_whatever_order_it_comes() {
    let clickhouse = fresh().await;
    let named =
        |name: &str, version| SessionRow { external_id: name.to_owned(), ..row("session_a", 5, version) };
    clickhouse.insert(&[named("new", 9)]).await.expect("stored");
    clickhouse.insert(&[named("late", 8)]).await.expect("stored");
    assert_eq!(all(&clickhouse).await[0].external_id, "new");
    clickhouse.insert(&[SessionRow { _is_deleted: 1, ..named("", 10) }]).await.expect("stored");
    assert!(all(&clickhouse).await.is_empty(), "a tombstone hides it");
    clickhouse.insert(&[named("late", 9)]).await.expect("stored");
    assert!(all(&clickhouse).await.is_empty(), "and what comes late");
}

#[tokio::test]
async fn a_scan_goes_on_where_it_was() {
    let clickhouse = fresh().await;
    let mut rows: Vec<_> = (0..10).map(|n| row(&format!("session_{n}"), n / 3 * 1_000_000_000, 1)).collect();
    rows.push(SessionRow { environment_id: "env_z".to_owned(), ..row("session_z", 0, 1) });
    rows.push(SessionRow { organization_id: "zeta".to_owned(), ..row("session_y", 0, 1) });
    clickhouse.insert(&rows).await.expect("stored");
    let mut seen = Vec::new();
    loop {
        let after = seen.last().map(SessionRow::key);
        let page = clickhouse.scan(after.as_ref(), 4).await.expect("scans");
        if page.is_empty() {
            break;
        }
        seen.extend(page);
    }
    assert_eq!(ids(&seen), ids(&rows));
    assert!(seen.is_sorted_by_key(SessionRow::key));
}

#[tokio::test]
async fn the_end_of_a_backfill_buries_what_it_has_not_seen() {
    let clickhouse = fresh().await;
    let epoch = |epoch: u64, lsn: u64| epoch << 56 | lsn;
    let rows = [
        row("session_gone", 1, epoch(1, 50)),
        row("session_kept", 2, epoch(1, 60)),
        row("session_new", 3, epoch(2, 7)),
    ];
    clickhouse.insert(&rows).await.expect("stored");
    clickhouse.insert(&[row("session_kept", 2, epoch(2, 0))]).await.expect("backfilled");
    clickhouse
        .insert(&[SessionRow { _is_deleted: 1, ..row("session_back", 4, epoch(1, 70)) }])
        .await
        .expect("stored");
    clickhouse.insert(&[row("session_back", 4, epoch(2, 0))]).await.expect("backfilled");
    clickhouse.bury_before(2).await.expect("buries");
    assert_eq!(ids(&all(&clickhouse).await), ["session_kept", "session_new", "session_back"]);
    clickhouse.bury_before(2).await.expect("again");
    assert_eq!(all(&clickhouse).await.len(), 3);
}

#[tokio::test]
async fn a_refused_row_is_told_from_a_server_that_is_away() {
    let clickhouse = fresh().await;
    let bad = SessionRow { metadata: "{\"data\":".to_owned(), ..row("session_bad", 1, 1) };
    let refused = clickhouse.insert(&[row("session_a", 1, 1), bad]).await.expect_err("refuses");
    assert!(matches!(refused, Fault::Poison(_)), "{}", refused.summary());
    assert!(all(&clickhouse).await.is_empty(), "nothing of the batch is stored");
    let away = ClickHouse::new(&config("http://127.0.0.1:1")).ping().await.expect_err("nobody is there");
    assert!(matches!(away, Fault::Transient(_)), "{away}");
}

#[tokio::test]
async fn the_tags_index_is_used() {
    let clickhouse = fresh().await;
    let rows: Vec<_> = (0..60_000)
        .map(|n| SessionRow {
            tags: vec![
                format!("team:{}", n % 500),
                if n == 30_000 { "rare:tag" } else { "common" }.to_owned(),
            ],
            ..row(&format!("session_{n:08}"), n, 1)
        })
        .collect();
    clickhouse.insert(&rows).await.expect("stored");
    for (from, condition) in [
        ("sessions_v1", "hasAny(tags, ['rare:tag'])"),
        ("sessions_v1 FINAL", "hasAny(tags, ['rare:tag'])"),
        ("sessions_v1", "hasAll(tags, ['rare:tag', 'team:0'])"),
    ] {
        let sql = format!("EXPLAIN indexes = 1 SELECT session_id FROM {from} WHERE {condition}");
        let plan: Vec<String> = clickhouse.fetch(clickhouse.query(&sql)).await.expect("a plan");
        let at = plan.iter().position(|line| line.contains("Name: by_tag")).expect("the index is asked");
        let granules =
            plan[at..].iter().find_map(|line| line.trim().strip_prefix("Granules: ")).expect("granules");
        let (read, all) = granules.split_once('/').expect("of all");
        let (read, all): (u32, u32) = (read.parse().expect("a number"), all.parse().expect("a number"));
        assert!(read <= 2 && all >= 7, "{from} {condition}: {granules}");
        let sql = format!("SELECT session_id FROM {from} WHERE {condition}");
        let found: Vec<String> = clickhouse.fetch(clickhouse.query(&sql)).await.expect("found");
        assert_eq!(found, ["session_00030000"]);
    }
}

#[tokio::test]
async fn an_acknowledged_insert_survives_a_kill() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = crate::harness::clickhouse::Engine::start(folder.path(), 0);
    let (settings, port) = (config(&engine.url()), engine.port());
    let clickhouse = ClickHouse::new(&settings);
    clickhouse.migrate().await.expect("migrates");
    clickhouse.insert(&[row("session_a", 1, 1)]).await.expect("stored");
    engine.kill();
    assert!(matches!(clickhouse.insert(&[row("session_b", 1, 1)]).await, Err(Fault::Transient(_))));
    let _engine = crate::harness::clickhouse::Engine::start(folder.path(), port);
    assert_eq!(ids(&all(&clickhouse).await), ["session_a"]);
}
