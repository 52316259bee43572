//! Commits that a synchronous standby holds: they are in the log, and no query sees them.
//!
//! On a server of its own, whose standby never comes. Only commits of connections that ask for it wait.

use std::sync::Arc;

use sessiond::domain::SystemClock;
use sessiond::replication::Context;
use sessiond::replication::leader::{Health, Replicator};
use sessiond::store::metadata::{OpenOptions, Phase, SqlMetadata};
use sessiond::telemetry::Metrics;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::term::World;
use super::*;
use crate::harness::clickhouse;

/// A commit that waits.
struct Held {
    committing: JoinHandle<()>,
}

impl Held {
    /// Runs statements as one transaction, up to where its commit waits.
    async fn commit(world: &World, statements: String) -> Self {
        let connection = world.sql.database.connect().await;
        let committing = tokio::spawn(async move {
            let all = format!("SET synchronous_commit = on; BEGIN; {statements}; COMMIT");
            connection.execute_unprepared(&all).await.expect("committed in the end");
        });
        let waits = async {
            while count(
                world,
                "pg_stat_activity WHERE wait_event = 'SyncRep' AND datname = current_database()",
            )
            .await
                == 0
            {
                assert!(!committing.is_finished(), "nothing held it");
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, waits).await.expect("it waits for the standby");
        Self { committing }
    }

    /// Lets it commit without the standby.
    async fn release(self, world: &World) {
        world
            .slot
            .run("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND datname = current_database()")
            .await;
        timeout(PATIENCE, self.committing).await.expect("in time").expect("no panic");
    }
}

async fn count(world: &World, what: &str) -> i64 {
    let query = Statement::from_string(DbBackend::Postgres, format!("SELECT count(*) AS count FROM {what}"));
    let row = world.slot.connection.query_one_raw(query).await.expect("asked").expect("a row");
    row.try_get("", "count").expect("a number")
}

fn inserts(first: usize, last: usize, metadata: &str) -> String {
    format!(
        "INSERT INTO sessions (id, environment_id, kind, task_identifier, tags, metadata, current_run_id, created_at, updated_at) \
         SELECT 'session_' || n, '{HERE}', 'chat', 'agent', '[]', {metadata}, 'run_' || n, n, n \
         FROM generate_series({first}, {last}) n"
    )
}

/// Metadata that is stored out of line.
const LARGE: &str = "(SELECT jsonb_build_object('noise', string_agg(md5(n::text || m::text), '')) FROM generate_series(1, 300) m)";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_a_standby_of_postgres_holds_while_the_slot_is_made_is_there_after_the_copy() {
    let world = World::synchronous().await;
    world.slot.run(&inserts(1, 5, "NULL")).await;
    let held = Held::commit(&world, inserts(6, 8, LARGE)).await;
    let making = async {
        world.ensured().await.expect("a slot");
        assert_eq!(world.phase_or_none().await, Some(Phase::Backfilling));
        let running = world.lead(&world.clickhouse, |source| Box::new(source)).await;
        (running, world.backfilling())
    };
    let releasing = async {
        // Whether the server makes the slot beside it or only when it is over is the server's affair.
        let begun = async {
            while world.phase_or_none().await.is_none() {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, begun).await.expect("it is being made");
        let _ = timeout(Duration::from_secs(2), world.slot.wait_for("active")).await;
        held.release(&world).await;
    };
    let ((running, backfilling), ()) = tokio::join!(making, releasing);
    let copied = async {
        while world.phase_or_none().await != Some(Phase::Streaming) {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, copied).await.expect("older rows are copied");
    world.caught_up().await;
    world.assert_same().await;
    backfilling.abort();
    running.end().await;
    world.slot.wait_for("NOT active").await;
    world.slot.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_held_transaction_of_postgres_leaves_out_is_fetched_once_it_can_be_seen() {
    let world = World::synchronous_streaming().await;
    let running = world.lead(&world.clickhouse, |source| Box::new(source)).await;
    // The inserts of the large ones are in the first chunk, the updates, which leave the metadata out, in the second.
    let statements = format!(
        "{}; {}; UPDATE sessions SET tags = '[\"changed\"]' WHERE created_at <= 10",
        inserts(1, 10, LARGE),
        inserts(11, 1_100, "NULL")
    );
    let held = Held::commit(&world, statements).await;
    let stored = async {
        let query = "SELECT count() FROM sessions_v1";
        while clickhouse::select::<u64>(&world.clickhouse, query).await[0] < 1_000 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, stored).await.expect("the first chunk is stored before any query sees it");
    assert_eq!(count(&world, "sessions").await, 0, "it is held still");
    held.release(&world).await;
    world.caught_up().await;
    world.assert_same().await;
    running.end().await;
    world.slot.wait_for("NOT active").await;
    world.slot.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_lives_on_while_postgres_holds_every_commit_of_its_own_database() {
    let world = World::synchronous().await;
    world.slot.run(&inserts(1, 5, "NULL")).await;
    world.ensured().await.expect("a slot");
    let database = world.sql.database.url.rsplit('/').next().expect("a name").to_owned();
    // Of connections that are made from here on.
    world.slot.run(&format!("ALTER DATABASE {database} SET synchronous_commit = on")).await;
    let store =
        SqlMetadata::postgres_when_asked(&world.sql.database.url, OpenOptions::default()).expect("a URL");
    let metrics = Metrics::new().replication().clone();
    let clock = Arc::new(SystemClock);
    let context =
        Context::new(store.clone(), store, world.clickhouse.clone(), Arc::default(), metrics, clock);
    let replicator = Replicator::new(world.replicator_options(), context);
    let (mut health, stop) = (replicator.health(), CancellationToken::new());
    let stopped = stop.clone();
    let task = tokio::spawn(async move { replicator.run(stopped).await });
    let leads = health.wait_for(|health| *health == Health::Leading);
    timeout(PATIENCE, leads).await.expect("in time").expect("it runs");
    let lives = async {
        while count(&world, "replication WHERE beats >= 20 AND phase = 'streaming'").await == 0 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, lives).await.expect("heartbeats and the copy go on");
    assert_eq!(*health.borrow(), Health::Leading);
    world.assert_same().await;
    stop.cancel();
    timeout(PATIENCE, task).await.expect("it stops in time").expect("no panic");
    world.slot.wait_for("NOT active").await;
    world.slot.end().await;
}
