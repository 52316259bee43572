//! Several replicators at once, and what becomes of their work when they are killed.

use std::sync::atomic::AtomicUsize;

use sessiond::replication::leader::{Health, Replicator};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::term::{World, changing};
use super::*;

/// A replicator that runs.
struct Running {
    health: watch::Receiver<Health>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Running {
    fn start(world: &World) -> Self {
        let replicator = Replicator::new(world.replicator_options(), world.context(&world.faulty));
        let (health, stop) = (replicator.health(), CancellationToken::new());
        let stopped = stop.clone();
        let task = tokio::spawn(async move { replicator.run(stopped).await });
        Self { health, stop, task }
    }

    async fn is(&mut self, wanted: impl Fn(&Health) -> bool) -> Health {
        let seen = timeout(PATIENCE, self.health.wait_for(wanted)).await;
        seen.expect("before the test gives up").expect("it runs").clone()
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
        running.stop.cancel();
        timeout(PATIENCE, running.task).await.expect("it stops in time").expect("no panic");
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
        while world.phase_or_none().await != Some(sessiond::store::metadata::Phase::Streaming) {
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
    running.stop.cancel();
    timeout(PATIENCE, running.task).await.expect("it stops in time").expect("no panic");
    world.slot.wait_for("NOT active").await;
    world.slot.end().await;
}
