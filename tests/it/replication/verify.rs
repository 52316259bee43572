//! `replicate verify`, on two sides that somebody has changed by hand.

use sessiond::store::index::clickhouse::SessionWriter;
use tokio_util::sync::CancellationToken;

use super::service::Installation;
use super::*;
use crate::harness::{Dice, clickhouse};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_changed_by_hand_on_postgres_or_clickhouse_is_found_and_mended_under_writers() {
    let sql = Sql::postgres().await;
    let here = Installation { postgres: sql.database.url.clone(), ..Installation::fresh().await };
    let replicator = here.replicate();
    let sessions: Vec<_> = (0..1_200).map(|number| session(1_000_000 + number)).collect();
    for one in &sessions {
        sql.create(one.clone()).await;
    }
    here.wait_for("all is copied", |seen| seen["phase"] == "streaming").await;
    let stop = CancellationToken::new();
    let changing = async {
        let mut dice = Dice::new(7);
        while !stop.is_cancelled() {
            // Others than those that are changed by hand.
            let id = sessions[20 + dice.roll(1_000)].id.clone();
            if dice.one_in(10) {
                sql.create(session(3_000_000)).await;
            }
            let patch = SessionPatch {
                tags: Some(vec![uuid::Uuid::new_v4().to_string()]),
                ..SessionPatch::default()
            };
            sql.store.update_session(&sql.here, &id, patch, at(5_000_000)).await.expect("updated");
            // A steady rate, and none that keeps the replicator behind.
            sleep(Duration::from_millis(5)).await;
        }
    };
    let verifying = async {
        let (same, found) = here.run(&["verify"]).await;
        assert!(same && found["compared"].as_u64() >= Some(1_200), "{found}");

        // In ClickHouse: one is lost, one is changed, and there are some that never were, more than are read at once.
        let id = |at: usize| sessions[at].id.to_string();
        let lost = format!("DELETE FROM {{database}}.sessions_v1 WHERE session_id = '{}'", id(7));
        here.clickhouse_does(&lost).await;
        let changed = format!(
            "ALTER TABLE {{database}}.sessions_v1 UPDATE tags = ['by hand'] WHERE session_id = '{}' SETTINGS mutations_sync = 2",
            id(8)
        );
        here.clickhouse_does(&changed).await;
        let environment = self::here(&sql).await;
        let phantoms: Vec<_> =
            (0..1_500).map(|number| SessionRow::new(session(2_000_000 + number), &environment, 1)).collect();
        SessionWriter::new(here.clickhouse.clone()).insert(&phantoms).await.expect("stored");
        // In Postgres, past the stream: as an import that nobody has told of.
        let connection = sql.database.connect().await;
        let past = format!(
            "BEGIN; ALTER PUBLICATION sessions_to_clickhouse_v1_publication SET (publish = 'insert, delete'); \
             UPDATE sessions SET tags = '[\"unheard\"]' WHERE id = '{}'; \
             ALTER PUBLICATION sessions_to_clickhouse_v1_publication SET (publish = 'insert, update, delete, truncate'); COMMIT",
            id(9)
        );
        connection.execute_unprepared(&past).await.expect("changed");

        let (same, found) = here.run(&["verify"]).await;
        assert!(!same, "{found}");
        assert_eq!(found["missing"], json!([id(7)]));
        let mut stale = [id(8), id(9)];
        stale.sort_unstable();
        assert_eq!(
            found["stale"],
            json!(stale),
            "one changed in ClickHouse, one in Postgres past the stream"
        );
        assert_eq!(found["phantom"].as_array().expect("ids").len(), phantoms.len(), "{found}");

        let (repaired, found) = here.run(&["verify", "--repair"]).await;
        assert!(repaired && found["repaired"] == true, "{found}");
        let (same, found) = here.run(&["verify"]).await;
        assert!(
            same && found["missing"] == json!([])
                && found["stale"] == json!([])
                && found["phantom"] == json!([]),
            "{found}"
        );
        stop.cancel();
    };
    tokio::join!(changing, verifying);
    let (same, found) = here.run(&["verify"]).await;
    assert!(same && found["unsettled"] == json!([]), "{found}");
    let rows = "SELECT count() FROM sessions_v1 FINAL";
    let rows = clickhouse::select::<u64>(&here.clickhouse, rows).await[0];
    assert_eq!(found["compared"], rows);
    drop(replicator);
    here.end().await;
}
