//! Changes as they stream, and the epochs that heal what a stream cannot tell.

use std::time::Duration;

use sessiond::domain::{Closure, MetadataStore, SessionPatch};
use sessiond::replication::Health;

use super::world::World;
use crate::harness::database::{at, named, words};

#[tokio::test]
async fn whatever_happens_to_a_session_arrives() {
    let world = World::new().await;
    let running = world.replicate("one");
    let session = world.sql.create(named("first")).await.session;
    world.agree().await;
    let patch = SessionPatch {
        tags: Some(words(&["red", "ä:ö, ü"])),
        metadata: Some(Some(
            serde_json::from_str(r#"{"z":1,"a.b":{"c":[1,null,"x"]},"a":{"b":2}}"#).expect("JSON"),
        )),
        external_id: Some(None),
        ..SessionPatch::default()
    };
    world.sql.store.update_session(&world.sql.here, &session.id, patch, at(2000)).await.expect("updated");
    world.agree().await;
    let closure = Closure { at: at(3000), reason: Some("done".to_owned()) };
    world.sql.store.close_session(&world.sql.here, &session.id, &closure).await.expect("closed");
    world.agree().await;
    world.execute("DELETE FROM session_runs").await;
    world.execute("DELETE FROM sessions").await;
    world.agree().await;
    assert!(world.clickhouse.scan(None, 10).await.expect("scans").is_empty());
    running.stop().await;
}

#[tokio::test]
async fn rows_from_before_the_slot_are_copied_and_a_second_boot_copies_nothing() {
    let world = World::new().await;
    world.insert(1, 12_000, &[("closed_at", "CASE WHEN n % 3 = 0 THEN n END")]).await;
    let running = world.replicate("one");
    world.until_streaming().await;
    world.agree().await;
    running.stop().await;
    world.insert(20_001, 20_010, &[]).await;
    let running = world.replicate("two");
    world.agree().await;
    assert_eq!(world.text("SELECT epoch || status FROM replication_state").await, "1streaming");
    running.stop().await;
}

#[tokio::test]
async fn what_has_not_changed_of_a_large_row_stays() {
    let world = World::new().await;
    let running = world.replicate("one");
    // Random, so that it is stored out of line, compressed or not.
    let large = "(SELECT jsonb_build_object('text', string_agg(md5(random()::text || i || n), '')) FROM generate_series(1, 500) AS i)";
    world.insert(1, 20, &[("metadata", large), ("trigger_config", large)]).await;
    world.agree().await;
    world.execute("UPDATE sessions SET updated_at = updated_at + 1, closed_reason = 'x'").await;
    world.agree().await;
    world.execute("UPDATE sessions SET metadata = '{}' WHERE id < 'session_00000010'").await;
    world.execute("UPDATE sessions SET updated_at = updated_at + 1").await;
    world.agree().await;
    running.stop().await;
}

#[tokio::test]
async fn a_transaction_larger_than_a_batch_arrives_with_its_last_version() {
    let mut world = World::new().await;
    world.config.batch_rows = 100;
    let running = world.replicate("one");
    // Every row twice in one transaction, cut many more times than a commit has versions.
    world
        .execute(
            "BEGIN; INSERT INTO sessions (id, environment_id, kind, task_identifier, tags, current_run_id, created_at, updated_at) \
             SELECT 'session_' || n, 'env_here', 'chat', 'agent', '[]', 'run', n, n FROM generate_series(1, 6000) AS n; \
             UPDATE sessions SET kind = 'last', updated_at = updated_at + 1; COMMIT",
        )
        .await;
    world.agree().await;
    running.stop().await;
}

#[tokio::test]
async fn a_key_that_changes_leaves_nothing_behind() {
    let world = World::new().await;
    let running = world.replicate("one");
    world.insert(1, 10, &[]).await;
    world.agree().await;
    world.execute("UPDATE sessions SET created_at = created_at + 5000000000").await;
    world.agree().await;
    world.execute("UPDATE sessions SET environment_id = 'env_elsewhere'").await;
    world.agree().await;
    running.stop().await;
}

#[tokio::test]
async fn of_two_replicas_one_leads_and_the_other_takes_over() {
    let world = World::new().await;
    let mut one = world.replicate("one");
    World::until(&mut one.health, |health| matches!(health, Health::Leading { .. })).await;
    let mut two = world.replicate("two");
    World::until(&mut two.health, |health| *health == Health::Following).await;
    world.insert(1, 10, &[]).await;
    world.agree().await;
    one.crash().await;
    world.insert(11, 20, &[]).await;
    World::until(&mut two.health, |health| matches!(health, Health::Leading { epoch: 1 })).await;
    world.agree().await;
    let mut three = world.replicate("three");
    World::until(&mut three.health, |health| *health == Health::Following).await;
    two.stop().await;
    World::until(&mut three.health, |health| matches!(health, Health::Leading { epoch: 1 })).await;
    world.insert(21, 30, &[]).await;
    world.agree().await;
    three.stop().await;
}

#[tokio::test]
async fn a_slot_that_is_gone_begins_a_new_epoch_that_tells_everything() {
    let world = World::new().await;
    let running = world.replicate("one");
    world.insert(1, 50, &[]).await;
    world.execute("DELETE FROM sessions WHERE id <= 'session_00000005'").await;
    world.agree().await;
    world.until_streaming().await;
    running.stop().await;
    world.execute(&format!("SELECT pg_drop_replication_slot('{}')", world.config.slot)).await;
    world.execute("DELETE FROM sessions WHERE id <= 'session_00000010'").await;
    world.execute("UPDATE sessions SET kind = 'changed' WHERE id > 'session_00000030'").await;
    world.insert(100, 110, &[]).await;
    // One that was deleted before, again.
    world.insert(3, 3, &[]).await;
    let running = world.replicate("two");
    world.agree().await;
    world.until_streaming().await;
    assert_eq!(world.text("SELECT epoch::text FROM replication_state").await, "2");
    world.agree().await;
    running.stop().await;
}

#[tokio::test]
async fn a_slot_that_somebody_made_anew_is_not_trusted() {
    let world = World::new().await;
    let running = world.replicate("one");
    world.insert(1, 5, &[]).await;
    world.agree().await;
    world.until_streaming().await;
    running.stop().await;
    let slot = &world.config.slot;
    world.execute(&format!("SELECT pg_drop_replication_slot('{slot}')")).await;
    world.insert(6, 10, &[]).await;
    world.execute(&format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')")).await;
    let running = world.replicate("two");
    world.agree().await;
    assert_eq!(world.text("SELECT epoch::text FROM replication_state").await, "2");
    running.stop().await;
}

#[tokio::test]
async fn a_truncated_table_is_empty_on_the_other_side_too() {
    let world = World::new().await;
    let running = world.replicate("one");
    world.insert(1, 50, &[]).await;
    world.agree().await;
    world.execute("TRUNCATE sessions CASCADE").await;
    world.insert(60, 70, &[]).await;
    world.agree().await;
    running.stop().await;
}

#[tokio::test]
async fn an_idle_slot_holds_no_wal() {
    let world = World::new().await;
    let running = world.replicate("one");
    world.insert(1, 5, &[]).await;
    world.agree().await;
    world.execute("CREATE TABLE noise AS SELECT md5(n::text) FROM generate_series(1, 200000) AS n").await;
    let before = world.text("SELECT pg_current_wal_lsn()::text").await;
    let behind = format!(
        "SELECT (confirmed_flush_lsn >= '{before}')::text FROM pg_replication_slots WHERE slot_name = '{}'",
        world.config.slot
    );
    let work = async {
        while world.text(&behind).await != "true" {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), work).await.expect("it is confirmed");
    running.stop().await;
}

#[tokio::test]
async fn a_row_that_clickhouse_refuses_is_set_aside_and_its_neighbours_arrive() {
    let world = World::new().await;
    world.clickhouse.migrate().await.expect("migrates");
    let constraint = "ALTER TABLE sessions_v1 ADD CONSTRAINT mild CHECK type != 'poison'";
    world.clickhouse.query(constraint).execute().await.expect("a constraint");
    let running = world.replicate("one");
    world.insert(1, 40, &[]).await;
    world.agree().await;
    world.execute("UPDATE sessions SET kind = 'poison' WHERE id = 'session_00000007'").await;
    world.execute("UPDATE sessions SET kind = 'mild'").await;
    world.agree().await;
    world
        .execute(
            "BEGIN; UPDATE sessions SET kind = 'poison' WHERE id = 'session_00000007'; \
             UPDATE sessions SET kind = 'well' WHERE id > 'session_00000007'; COMMIT",
        )
        .await;
    let letters = "SELECT coalesce(string_agg(session_id, ','), '') FROM replication_dead_letters";
    let work = async {
        while world.text(letters).await != "session_00000007" || world.differences().await.len() != 1 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), work)
        .await
        .expect("one letter, and nothing else is missing");
    world.execute("UPDATE sessions SET kind = 'cured' WHERE id = 'session_00000007'").await;
    world.agree().await;
    let work = async {
        while !world.text(letters).await.is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), work).await.expect("the letter is void");
    running.stop().await;
}

#[tokio::test]
async fn metadata_that_clickhouse_cannot_hold_as_json_is_listed_all_the_same() {
    let world = World::new().await;
    let running = world.replicate("one");
    world.insert(1, 5, &[("metadata", r#"'{"big":123456789012345678901234567890}'"#)]).await;
    world.agree().await;
    assert_eq!(world.text("SELECT count(*)::text FROM replication_dead_letters").await, "0");
    running.stop().await;
}
