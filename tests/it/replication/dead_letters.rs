//! Rows that ClickHouse does not take, made by a constraint of its table.

use sea_orm::Database;
use tokio::time::Instant;

use super::service::{Installation, create, degraded};
use super::term::World;
use super::*;
use crate::harness::clickhouse;

const POISON: &str =
    "ALTER TABLE {database}.sessions_v1 ADD CONSTRAINT no_poison CHECK task_identifier != 'poison'";
const CURE: &str = "ALTER TABLE {database}.sessions_v1 DROP CONSTRAINT no_poison";

fn row(number: u32, task: &str) -> String {
    format!(
        "INSERT INTO sessions (id, environment_id, kind, task_identifier, tags, metadata, current_run_id, created_at, updated_at) \
         SELECT 'session_' || lpad(n::text, 6, '0'), environments.id, 'chat', '{task}', '[\"a\"]', '{{\"secret\": 1}}', 'run_' || n, n, n \
         FROM generate_series({number}, {number}) n, (SELECT id FROM environments LIMIT 1) environments"
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_of_postgres_that_clickhouse_refuses_delay_no_others_and_can_be_replayed() {
    let here = Installation::fresh().await;
    let server = here.serve("a").await;
    let first = create(&server.url, json!({"externalId": "first"})).await;
    here.stored(&first, |_| true).await;
    here.wait_for("all is copied", |seen| seen["phase"] == "streaming").await;
    here.clickhouse_does(POISON).await;

    // Two of a thousand, in one transaction.
    let database = Database::connect(&here.postgres).await.expect("connects");
    let rows: Vec<_> = (1..=1_000)
        .map(|number| row(number, if matches!(number, 300 | 777) { "poison" } else { "agent" }))
        .collect();
    database.execute_unprepared(&format!("BEGIN; {}; COMMIT", rows.join("; "))).await.expect("made");
    let begun = Instant::now();
    let count = async || {
        let count = "SELECT count() FROM sessions_v1 FINAL";
        clickhouse::select::<u64>(&here.clickhouse, count).await[0]
    };
    let others = async {
        while count().await < 999 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, others).await.expect("the others are there in time");
    // What is asked for is a second; on a machine that does much else it may take longer.
    println!("the others are there after {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    // And all of a batch.
    let two = format!("BEGIN; {}; {}; COMMIT", row(2_001, "poison"), row(2_002, "poison"));
    database.execute_unprepared(&two).await.expect("made");
    let seen = here.wait_for("all are dead letters", |seen| seen["deadLetters"] == 4).await;
    assert!(seen["problems"].to_string().contains("refuses 4 changes"), "{seen}");
    let later = create(&server.url, json!({"externalId": "later"})).await;
    here.stored(&later, |_| true).await;

    let (listed, letters) = here.run(&["dead-letters"]).await;
    assert!(listed && letters["count"] == 4, "{letters}");
    let letters = letters["deadLetters"].as_array().expect("a list");
    let mut sessions: Vec<_> =
        letters.iter().map(|letter| letter["session"].as_str().expect("an id")).collect();
    sessions.sort_unstable();
    assert_eq!(sessions, ["session_000300", "session_000777", "session_002001", "session_002002"]);
    for letter in letters {
        assert_eq!(letter["reason"], "ClickHouse refuses (code 469)", "it says nothing of the row");
    }
    degraded(&server.url, |text| text.contains("replicate dead-letters")).await;

    // As long as nothing is mended they are refused again, and one that has become whole by itself is not.
    let mended = "UPDATE sessions SET task_identifier = 'agent' WHERE id = 'session_002002'";
    database.execute_unprepared(mended).await.expect("changed");
    here.stored("session_002002", |_| true).await;
    let (replayed, answer) = here.run(&["dead-letters", "--replay"]).await;
    assert!(!replayed && answer == json!({"stored": 1, "refused": 3}), "{answer}");
    assert_eq!(here.run(&["dead-letters"]).await.1["count"], 3);

    here.clickhouse_does(CURE).await;
    let (replayed, answer) = here.run(&["dead-letters", "--replay"]).await;
    assert!(replayed && answer == json!({"stored": 3, "refused": 0}), "{answer}");
    let (same, answer) = here.run(&["verify"]).await;
    assert!(same && answer["compared"] == 1_004, "{answer}");
    here.wait_for("nothing is wrong", |seen| seen["problems"] == json!([])).await;
    assert!(server.terminate().await.success());
    here.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_of_clickhouse_that_somebody_has_changed_costs_no_row_of_postgres() {
    let world = World::fresh().await;
    let change = async |text: &str| {
        let text = text.replace("{database}", &world.clickhouse.options().database);
        let client = ::clickhouse::Client::default().with_url(clickhouse::url());
        client.query_raw(&text).execute().await.expect("done");
    };
    change("ALTER TABLE {database}.sessions_v1 MODIFY COLUMN task_identifier Enum8('' = 0, 'other' = 1)")
        .await;
    let running = world.lead(&world.faulty, |source| Box::new(source)).await;
    world.sql.create(session(1_000)).await;
    world.sql.create(session(2_000)).await;
    // It has tried more than once.
    let mut inserts = world.inserts.watched();
    for _ in 0..3 {
        for is_open in [true, false] {
            let seen = timeout(PATIENCE, inserts.wait_for(|open| (*open > 0) == is_open)).await;
            seen.expect("an insert in time").expect("it runs");
        }
    }
    assert_eq!(world.postgres().count_dead_letters(&world.slot.name).await.expect("asked"), 0);
    change("ALTER TABLE {database}.sessions_v1 MODIFY COLUMN task_identifier String DEFAULT ''").await;
    world.caught_up().await;
    world.assert_same().await;
    running.end().await;
    world.slot.wait_for("NOT active").await;
    world.slot.end().await;
}
