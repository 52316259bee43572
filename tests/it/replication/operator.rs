//! What an operator sees, and what happens when ClickHouse is away for too long.

use std::time::Duration;

use serde_json::Value;
use sessiond::replication::{Difference, Health, Postgres, Verifier};
use tokio::process::Command;

use super::world::World;
use crate::harness::Process;
use crate::harness::clickhouse::{Engine, config, row};

impl World {
    fn verifier(&self) -> Verifier {
        let postgres = Postgres::new(&self.sql.database.url.as_str().into()).expect("a URL");
        Verifier::new(postgres, self.clickhouse.clone(), self.config.slot.clone())
    }

    /// Runs `sessiond replicate ...`; whether it succeeded, and what it printed.
    async fn command(&self, args: &[&str]) -> (bool, String) {
        let folder = tempfile::tempdir().expect("a folder");
        let output = Command::new(Process::binary())
            .arg("--data")
            .arg(folder.path())
            .arg("replicate")
            .args(args)
            .env("SESSIOND_METADATA__URL", &self.sql.database.url)
            .env("SESSIOND_AUTH__MASTER_KEY", "0f".repeat(32))
            .env("SESSIOND_CLICKHOUSE__URL", crate::harness::clickhouse::url())
            .env("SESSIOND_CLICKHOUSE__DATABASE", self.clickhouse.table().split('.').next().expect("a name"))
            .env("SESSIOND_REPLICATION__SLOT", &self.config.slot)
            .env("SESSIOND_REPLICATION__HEARTBEAT", "500ms")
            .output()
            .await
            .expect("runs");
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(text).expect("UTF-8"))
    }
}

#[tokio::test]
async fn every_kind_of_difference_is_found_and_mended() {
    let world = World::new().await;
    let running = world.replicate("one");
    world.insert(1, 3000, &[]).await;
    world.agree().await;
    world.until_streaming().await;
    let report = world.verifier().compare().await.expect("compares");
    assert_eq!((report.compared, report.differences.len()), (3000, 0));

    let found = world
        .clickhouse
        .find(&["session_00000007".to_owned(), "session_00001500".to_owned()])
        .await
        .expect("found");
    for mut gone in found {
        if gone.session_id == "session_00000007" {
            gone._is_deleted = 1;
        } else {
            gone.r#type = "another".to_owned();
        }
        gone._version += 1;
        world.clickhouse.insert(&[gone]).await.expect("stored");
    }
    world.clickhouse.insert(&[row("session_phantom", 5, 9)]).await.expect("stored");
    let report = world.verifier().compare().await.expect("compares");
    let found: Vec<_> = report.differences.iter().map(|(id, found)| (id.as_str(), *found)).collect();
    assert_eq!(
        found,
        [
            ("session_00000007", Difference::Missing),
            ("session_00001500", Difference::Stale),
            ("session_phantom", Difference::Phantom)
        ]
    );
    let (agrees, text) = world.command(&["verify"]).await;
    assert!(!agrees && text.contains("1 missing, 1 stale, 1 phantom"), "{text}");
    let (agrees, text) = world.command(&["verify", "--repair", "--json"]).await;
    assert!(agrees, "{text}");
    assert_eq!(serde_json::from_str::<Value>(&text).expect("JSON")["repaired"], 3);
    world.agree().await;
    running.stop().await;
    world.forget_slot().await;
}

#[tokio::test]
async fn a_comparison_is_right_while_writes_go_on() {
    let world = World::new().await;
    let running = world.replicate("one");
    world.insert(1, 2000, &[]).await;
    world.until_streaming().await;
    let verifier = world.verifier();
    let comparing = async {
        for _ in 0..5 {
            let report = verifier.compare().await.expect("compares");
            assert_eq!(report.differences.len(), 0, "{report:?}");
        }
    };
    let writing = async {
        loop {
            world.execute("UPDATE sessions SET updated_at = updated_at + 1 WHERE id IN (SELECT id FROM sessions ORDER BY random() LIMIT 20)").await;
            world
                .execute(
                    "DELETE FROM sessions WHERE id IN (SELECT id FROM sessions ORDER BY random() LIMIT 1)",
                )
                .await;
        }
    };
    tokio::select! {
        () = comparing => {}
        () = writing => {}
    }
    running.stop().await;
    world.forget_slot().await;
}

#[tokio::test]
async fn status_tells_what_is_wrong_in_words() {
    let world = World::new().await;
    let (fine, text) = world.command(&["status"]).await;
    assert!(!fine && text.contains("nothing has been replicated yet"), "{text}");
    let running = world.replicate("one");
    world.insert(1, 10, &[]).await;
    world.agree().await;
    world.until_streaming().await;
    let (fine, text) = world.command(&["status"]).await;
    assert!(fine && text.contains("being read") && text.contains("epoch         1 streaming"), "{text}");
    let (dropped, text) = world.command(&["drop-slot"]).await;
    assert!(!dropped && text.contains("--force"), "{text}");
    running.stop().await;
    let (fine, text) = world.command(&["status", "--json"]).await;
    assert!(!fine && text.contains("nobody reads the slot") && text.contains("drop-slot"), "{text}");
    let (dropped, text) = world.command(&["drop-slot"]).await;
    assert!(dropped && text.contains("new epoch"), "{text}");
    let (fine, text) = world.command(&["status"]).await;
    assert!(!fine && text.contains("the slot is gone"), "{text}");
}

#[tokio::test]
async fn dead_letters_are_listed_and_sent_once_more() {
    let world = World::new().await;
    world.clickhouse.migrate().await.expect("migrates");
    let constrain = |sql: &'static str| async { world.clickhouse.query(sql).execute().await.expect(sql) };
    constrain("ALTER TABLE sessions_v1 ADD CONSTRAINT mild CHECK type != 'poison'").await;
    let running = world.replicate("one");
    world.insert(1, 5, &[]).await;
    world.execute("UPDATE sessions SET kind = 'poison' WHERE id = 'session_00000003'").await;
    world.catch_up().await;
    let (_, text) = world.command(&["dead-letters"]).await;
    assert!(text.contains("session_00000003") && text.contains("code 469"), "{text}");
    constrain("ALTER TABLE sessions_v1 DROP CONSTRAINT mild").await;
    let (sent, text) = world.command(&["dead-letters", "--replay", "session_00000003"]).await;
    assert!(sent, "{text}");
    world.agree().await;
    world.catch_up().await;
    let work = async {
        while world.command(&["dead-letters", "--json"]).await.1.trim() != "[]" {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), work).await.expect("the letter is void");
    running.stop().await;
    world.forget_slot().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_holds_too_much_is_dropped_and_healed() {
    let folder = tempfile::tempdir().expect("a folder");
    let engine = Engine::start(folder.path(), 0);
    let port = engine.port();
    let mut world = World::on(config(&engine.url())).await;
    world.config.max_wal = 2 << 20;
    let mut running = world.replicate("one");
    world.insert(1, 20, &[]).await;
    world.agree().await;
    world.until_streaming().await;
    engine.kill();
    world.insert(21, 40, &[]).await;
    world.execute("DELETE FROM sessions WHERE id <= 'session_00000005'").await;
    world.execute("CREATE TABLE noise AS SELECT md5(n::text) FROM generate_series(1, 200000) AS n").await;
    let dropped = async {
        while world.text("SELECT status FROM replication_state").await != "dropped" {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), dropped).await.expect("it is dropped");
    World::until(&mut running.health, |health| matches!(health, Health::Failing(_))).await;
    let slots =
        format!("SELECT count(*)::text FROM pg_replication_slots WHERE slot_name = '{}'", world.config.slot);
    while world.text(&slots).await != "0" {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    world.insert(41, 50, &[]).await;
    let _engine = Engine::start(folder.path(), port);
    world.agree().await;
    world.until_streaming().await;
    assert_eq!(world.text("SELECT epoch::text FROM replication_state").await, "2");
    world.agree().await;
    running.stop().await;
    world.forget_slot().await;
}
