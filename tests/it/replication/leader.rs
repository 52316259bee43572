//! Several replicators at once, and what becomes of their work when they are killed.

use std::sync::atomic::AtomicUsize;

use sessiond::replication::leader::{Health, Replicator, ReplicatorOptions};
use sessiond::store::metadata::Phase;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::term::World;
use super::writers::changing;
use super::*;
use crate::harness::clickhouse;

/// A replicator that runs.
struct Running {
    health: watch::Receiver<Health>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Running {
    fn start(world: &World) -> Self {
        Self::with(world, world.replicator_options())
    }

    fn with(world: &World, options: ReplicatorOptions) -> Self {
        let replicator = Replicator::new(options, world.context(&world.faulty));
        let (health, stop) = (replicator.health(), CancellationToken::new());
        let stopped = stop.clone();
        let task = tokio::spawn(async move { replicator.run(stopped).await });
        Self { health, stop, task }
    }

    async fn is(&mut self, wanted: impl Fn(&Health) -> bool) -> Health {
        let seen = timeout(PATIENCE, self.health.wait_for(wanted)).await;
        seen.expect("before the test gives up").expect("it runs").clone()
    }

    async fn end(self) {
        self.stop.cancel();
        timeout(PATIENCE, self.task).await.expect("it stops in time").expect("no panic");
    }

    /// As kill -9 would end it.
    async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_replicators_on_postgres_one_leads_and_another_goes_on_when_it_is_killed() {
    let world = World::bare().await;
    for number in 0..20 {
        world.sql.create(session(1_000 + number)).await;
    }
    let mut leader = Running::start(&world);
    leader.is(|health| *health == Health::Leading).await;
    let mut follower = Running::start(&world);
    follower.is(|health| *health == Health::Following).await;
    let changes = CancellationToken::new();
    let killing = async {
        for _ in 0..6 {
            std::mem::replace(&mut leader, follower).kill().await;
            leader.is(|health| *health == Health::Leading).await;
            let mut next = Running::start(&world);
            next.is(|health| *health == Health::Following).await;
            follower = next;
        }
        changes.cancel();
        (leader, follower)
    };
    let made = AtomicUsize::new(0);
    let ((), (leader, follower)) = tokio::join!(changing(&world.sql, &made, &changes), killing);
    let made = made.into_inner();
    assert!(made > 50, "{made} changes");
    world.caught_up().await;
    world.assert_same().await;
    for running in [follower, leader] {
        running.end().await;
    }
    world.slot.wait_for("NOT active").await;
    world.slot.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replicator_says_what_keeps_it_from_postgres_and_goes_on_when_that_is_mended() {
    let world = World::bare().await;
    world.sql.create(session(1_000)).await;
    world.slot.run("CREATE PUBLICATION ours FOR TABLE environments").await;
    let mut running = Running::start(&world);
    let failing = running.is(|health| matches!(health, Health::Failing(_))).await;
    assert!(matches!(&failing, Health::Failing(why) if why.contains("the publication ours")), "{failing:?}");
    world.slot.run("DROP PUBLICATION ours").await;
    running.is(|health| *health == Health::Leading).await;
    world.caught_up().await;
    let older = async {
        while world.phase_or_none().await != Some(Phase::Streaming) {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, older).await.expect("older rows are copied");
    world.assert_same().await;
    // As the server ends connections when it restarts.
    world.slot.cut().await;
    running.is(|health| matches!(health, Health::Failing(_))).await;
    running.is(|health| *health == Health::Leading).await;
    world.sql.create(session(2_000)).await;
    world.caught_up().await;
    world.assert_same().await;
    running.end().await;
    world.slot.wait_for("NOT active").await;
    world.slot.end().await;
}

impl World {
    /// Waits until everything is copied under `epoch`, and what has changed since.
    pub(super) async fn whole(&self, epoch: u8) {
        let whole = async {
            loop {
                let state = self.postgres().state(&self.slot.name).await.expect("asked");
                if state.is_some_and(|state| state.epoch == epoch && state.phase == Phase::Streaming) {
                    return;
                }
                sleep(Duration::from_millis(10)).await;
            }
        };
        if timeout(PATIENCE, whole).await.is_err() {
            let state = self.postgres().state(&self.slot.name).await;
            panic!("everything is not copied in time: {state:?}");
        }
        self.caught_up().await;
        self.assert_same().await;
    }

    /// Has ClickHouse do what is no query.
    async fn command(&self, text: &str) {
        let text = text.replace("{database}", &self.clickhouse.options().database);
        let client = ::clickhouse::Client::default().with_url(clickhouse::url());
        client.query_raw(&text).execute().await.expect("done");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_a_leader_of_postgres_loses_is_made_good_without_a_hand() {
    let world = World::bare().await;
    let ids: Vec<_> = (0..5).map(|number| session(1_000 * number)).collect();
    for one in &ids {
        world.sql.create(one.clone()).await;
    }
    let name = &world.slot.name;
    let replicator = Running::start(&world);
    world.whole(1).await;

    // The slot, under its reader.
    let dropped = format!(
        "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = '{name}' AND active; \
         SELECT pg_drop_replication_slot('{name}')"
    );
    let dropping = async { while world.slot.connection.execute_unprepared(&dropped).await.is_err() {} };
    timeout(PATIENCE, dropping).await.expect("dropped");
    world.slot.delete(&ids[0].id).await;
    world.sql.create(session(10_000)).await;
    world.whole(2).await;

    // The publication, for a while in which something has changed.
    world.slot.run("DROP PUBLICATION ours").await;
    world.slot.delete(&ids[1].id).await;
    world.slot.run("CREATE PUBLICATION ours FOR TABLE sessions").await;
    world.sql.create(session(11_000)).await;
    world.whole(3).await;

    // The table in ClickHouse alone.
    world.command("DROP TABLE {database}.sessions_v1 SYNC").await;
    world.whole(4).await;

    // ClickHouse is put back to an older state: a row is missing, and the heartbeats that Postgres knows to be there.
    replicator.end().await;
    let missing = "DELETE FROM {database}.sessions_v1 WHERE created_at = fromUnixTimestamp64Milli(11000)";
    world.command(missing).await;
    assert_eq!(world.differences().await.len(), 1);
    world.slot.run("UPDATE replication SET beats = beats + 1000, marked = beats + 1000").await;
    let replicator = Running::start(&world);
    world.whole(5).await;

    // Under a leader too.
    world.command(missing).await;
    let older = "INSERT INTO {database}.replication_markers SELECT * REPLACE(toUInt64(1) AS beat, now64(3) AS at) \
                 FROM {database}.replication_markers FINAL";
    let epoch = async || world.postgres().state(&world.slot.name).await.expect("asked").expect("a row").epoch;
    let noticed = async {
        // The leader may put its next heartbeat over it before it looks.
        while epoch().await == 5 {
            world.command(older).await;
        }
    };
    timeout(PATIENCE, noticed).await.expect("the leader sees that its heartbeats are gone");
    world.whole(6).await;

    // Postgres is put back: it knows of fewer heartbeats than ClickHouse has.
    replicator.end().await;
    world.slot.run("UPDATE replication SET beats = 1, marked = 1").await;
    let replicator = Running::start(&world);
    world.whole(7).await;

    // More of the log than it may.
    replicator.kill().await;
    world.slot.run("CREATE TABLE noise AS SELECT repeat('x', 1000) FROM generate_series(1, 2000)").await;
    world.slot.delete(&ids[2].id).await;
    let mut options = world.replicator_options();
    options.term.max_wal = 1 << 20;
    let replicator = Running::with(&world, options);
    world.whole(8).await;
    replicator.end().await;
    world.slot.wait_for("NOT active").await;
    world.slot.end().await;
}
