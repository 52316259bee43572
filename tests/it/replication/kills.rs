//! What kill -9 does to replicators: nothing that can be seen afterwards. And a source that confirms too early, as the control.

use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use sessiond::replication::pgwire::PgSource;
use sessiond::replication::source::{SourceError, WalEvent, WalSource};
use sessiond::replication::term::TermEnd;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::service::Installation;
use super::term::World;
use super::writers::changing;
use super::*;
use crate::harness::{Dice, clickhouse};

/// How long sessions change, and how many rows at least, while replicators are killed so often.
const DURATION: Duration = Duration::from_secs(30);
const CHANGES: usize = 20_000;
const KILLS: usize = 20;
/// Differences that a source makes which confirms what is not stored.
const LOST: usize = 100;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_kills_replicators_on_postgres_nothing_is_missing_stale_or_left_in_clickhouse() {
    let world = World::bare().await;
    let here = Installation {
        postgres: world.sql.database.url.clone(),
        clickhouse: world.clickhouse.clone(),
        slot: world.slot.name.clone(),
        url: world.inserts.url.clone(),
        ..Installation::fresh().await
    };
    let (stop, changes) = (CancellationToken::new(), AtomicUsize::new(0));
    let killing = async {
        let (begun, mut dice, mut amid) = (Instant::now(), Dice::new(5), 0);
        for kill in 0..KILLS {
            let mut replicator = here.replicate();
            world.slot.wait_for("active").await;
            // A time at random, and no event: that is what is tested. Three times of four while an insert is under way.
            sleep(Duration::from_millis(100 + dice.roll(900) as u64)).await;
            let mut inserts = world.inserts.watched();
            if kill % 4 != 0 {
                timeout(PATIENCE, inserts.wait_for(|open| *open > 0))
                    .await
                    .expect("an insert")
                    .expect("it runs");
            }
            amid += usize::from(*inserts.borrow() > 0);
            replicator.kill().await.expect("killed");
            world.slot.wait_for("NOT active").await;
        }
        assert!(amid >= KILLS / 2, "only {amid} of the kills came while an insert was open");
        while begun.elapsed() < DURATION || changes.load(Ordering::Relaxed) < CHANGES {
            sleep(Duration::from_millis(50)).await;
        }
        stop.cancel();
    };
    tokio::join!(changing(&world.sql, &changes, &stop), killing);
    let last = here.replicate();
    world.slot.wait_for("active").await;
    world.caught_up().await;
    world.assert_same().await;
    let versions: Vec<u64> = clickhouse::select(&world.clickhouse, "SELECT count() FROM sessions_v1").await;
    println!("{} changes, {} versions", changes.load(Ordering::Relaxed), versions[0]);
    drop(last);
    world.slot.wait_for("NOT active").await;
    world.slot.end().await;
}

/// Confirms what it tells, before anyone has stored it.
struct Hasty(PgSource);

#[async_trait]
impl WalSource for Hasty {
    async fn next(&mut self) -> Result<WalEvent, SourceError> {
        let event = self.0.next().await?;
        if let WalEvent::Commit { end } = event {
            self.0.confirm(end);
        }
        Ok(event)
    }

    fn confirm(&self, _: Lsn) {}

    async fn stop(self: Box<Self>) -> Result<(), SourceError> {
        Box::new(self.0).stop().await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_on_postgres_that_confirms_what_is_not_stored_loses_changes() {
    let mut world = World::fresh().await;
    // Longer than the time after which the server knows what is confirmed.
    world.options.flush_gap = Duration::from_secs(1);
    world.options.flush_rows = 1_000;
    let (stop, changes) = (CancellationToken::new(), AtomicUsize::new(0));
    let killing = async {
        let mut dice = Dice::new(5);
        for _ in 0..KILLS {
            let running = world.lead(&world.faulty, |source| Box::new(Hasty(source))).await;
            sleep(Duration::from_millis(300 + dice.roll(1_000) as u64)).await;
            running.kill().await;
        }
        stop.cancel();
    };
    tokio::join!(changing(&world.sql, &changes, &stop), killing);
    let running = world.lead(&world.clickhouse, |source| Box::new(Hasty(source))).await;
    world.caught_up().await;
    assert!(matches!(running.end().await, TermEnd::Stopped));
    world.slot.wait_for("NOT active").await;
    let differences = world.differences().await.len();
    assert!(differences >= LOST, "only {differences} differences: the kills prove little");
    world.slot.end().await;
}
