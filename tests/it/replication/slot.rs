//! The publication, the slot and the rows that are older than it.

use sea_orm::TransactionTrait;
use sessiond::replication::backfill;
use sessiond::replication::slot::{self as slots, SlotError};
use sessiond::replication::status::status;
use sessiond::store::metadata::Phase;
use tokio::task::JoinHandle;

use super::term::World;
use super::*;
use crate::harness::clickhouse;
use crate::harness::database::TestDatabase;

impl World {
    pub(super) async fn ensured(&self) -> Result<Epoch, SlotError> {
        let context = self.context(&self.clickhouse);
        timeout(PATIENCE, slots::ensure(&self.source, &context)).await.expect("an answer in time")
    }

    async fn refusal(&self) -> String {
        match self.ensured().await {
            Err(SlotError::Unfit(sentence)) => sentence,
            other => panic!("{other:?}"),
        }
    }

    async fn phase(&self) -> Phase {
        self.phase_or_none().await.expect("a row")
    }

    /// Waits until the second sweep is done.
    async fn swept(&self) {
        let swept = async {
            while self.postgres().pending_sweep(&self.slot.name, 1).await.expect("asked").is_some() {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, swept).await.expect("it is done in time");
    }

    pub(super) fn backfilling(&self) -> JoinHandle<()> {
        let (flusher, name) = (self.flusher(&self.faulty), self.slot.name.clone());
        tokio::spawn(async move { backfill::run(&flusher, &name, Epoch(1)).await })
    }
}

#[tokio::test]
async fn a_first_start_on_postgres_makes_publication_slot_and_row_and_a_second_finds_them() {
    let world = World::bare().await;
    let (one, other) = tokio::join!(world.ensured(), world.ensured());
    let (one, other) = (one.expect("a slot"), other.expect("a slot"));
    assert_eq!(one, other, "of two at once one makes it");
    assert_eq!(one, Epoch(1));
    assert_eq!(world.phase().await, Phase::Backfilling);
    let before = world.slot.text("confirmed_flush_lsn").await;
    assert_eq!(world.ensured().await.expect("a slot"), one);
    assert_eq!(world.slot.text("confirmed_flush_lsn").await, before);

    // Cut off while it was made: whatever is there is not trusted.
    world.slot.run("UPDATE replication SET phase = 'creating'").await;
    assert_eq!(world.ensured().await.expect("a slot"), one, "the epoch was never used");
    assert_eq!(world.phase().await, Phase::Backfilling);
    world.slot.end().await;
}

#[tokio::test]
async fn what_is_not_ours_on_postgres_is_refused_with_a_sentence() {
    let world = World::bare().await;
    world.ensured().await.expect("a slot");
    world.slot.run("UPDATE replication SET phase = 'dropped'").await;
    let refusal = world.refusal().await;
    assert!(refusal.contains("an operator has dropped") && refusal.contains("replicate start"), "{refusal}");
    world.slot.run("UPDATE replication SET phase = 'streaming'").await;

    world.slot.run("DROP PUBLICATION ours; CREATE PUBLICATION ours FOR TABLE sessions, environments").await;
    let refusal = world.refusal().await;
    assert!(refusal.contains("the publication ours"), "{refusal}");
    world.slot.run("DROP PUBLICATION ours; CREATE PUBLICATION ours FOR TABLE sessions").await;

    world.slot.run("ALTER TABLE sessions REPLICA IDENTITY DEFAULT").await;
    let refusal = world.refusal().await;
    assert!(refusal.contains("replica identity"), "{refusal}");
    world.slot.run("ALTER TABLE sessions REPLICA IDENTITY USING INDEX sessions_by_creation").await;

    // Slots are of the whole server.
    let drop_it = format!("SELECT pg_drop_replication_slot('{}')", world.slot.name);
    world.slot.run(&drop_it).await;
    let elsewhere = TestDatabase::postgres().await.connect().await;
    let make = format!("SELECT pg_create_logical_replication_slot('{}', 'pgoutput')", world.slot.name);
    elsewhere.execute_unprepared(&make).await.expect("made");
    let refusal = world.refusal().await;
    assert!(refusal.contains("another database"), "{refusal}");
    elsewhere.execute_unprepared(&drop_it).await.expect("dropped");

    world.slot.run("DELETE FROM replication").await;
    world.slot.run(&make).await;
    let refusal = world.refusal().await;
    assert!(refusal.contains("does not know it"), "{refusal}");
    world.slot.end().await;
}

#[tokio::test]
async fn whatever_is_lost_on_postgres_is_told_and_begins_a_new_epoch() {
    let world = World::bare().await;
    let mut epoch = world.ensured().await.expect("a slot");
    let drop_it = format!("SELECT pg_drop_replication_slot('{}')", world.slot.name);
    for (broken, sentence) in [
        ("UPDATE replication SET system_identifier = system_identifier || '0'", "another Postgres"),
        ("UPDATE replication SET timeline = timeline + 1", "promoted or recovered"),
        ("UPDATE replication SET phase = 'overrun'", "replication.max_wal"),
        ("DROP PUBLICATION ours", "the publication is gone"),
        (&drop_it, "the slot is gone"),
    ] {
        world.slot.run("UPDATE replication SET phase = 'streaming'").await;
        world.slot.run(broken).await;
        let context = world.context(&world.clickhouse);
        let seen = status(&world.source, Duration::from_secs(5), &context).await.expect("asked");
        assert!(seen.problems.iter().any(|problem| problem.contains(sentence)), "{:?}", seen.problems);
        let next = world.ensured().await.expect("a slot");
        assert_eq!(next, Epoch(epoch.0 + 1), "{sentence}");
        assert_eq!(world.phase().await, Phase::Backfilling);
        assert_eq!(world.ensured().await.expect("a slot"), next, "once");
        epoch = next;
    }
    world.slot.end().await;
}

#[tokio::test]
async fn a_page_of_older_rows_on_postgres_is_as_large_as_it_may_be() {
    let world = World::bare().await;
    for (number, length) in [(1, 10), (2, 3_000), (3, 900), (4, 10), (5, 10)] {
        let row = format!(
            "INSERT INTO sessions (id, environment_id, kind, task_identifier, tags, metadata, current_run_id, created_at, updated_at) \
             VALUES ('session_{number}', '{HERE}', 'chat', 'agent', '[]', '{{\"text\": \"{}\"}}', 'run', 1, 1)",
            "x".repeat(length)
        );
        world.slot.run(&row).await;
    }
    let (mut after, mut pages) = (String::new(), Vec::new());
    loop {
        let page = world.postgres().page(&["id"], &after, 2, 1_000).await.expect("a page");
        let Some(last) = page.last().and_then(|columns| columns[0].clone()) else { break };
        pages.push(page.len());
        after = last;
    }
    // Alone what is too large, then what fits, and never more than two.
    assert_eq!(pages, [1, 1, 2, 1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_on_postgres_that_were_read_before_a_truncate_are_not_left_by_it() {
    let world = World::bare().await;
    let flusher = world.flusher(&world.clickhouse);
    let one = session(1_000);
    world.sql.create(one.clone()).await;
    let reading = flusher.reading_older().await;
    let page = world.postgres().page(COLUMNS, "", 10, 1 << 20).await.expect("a page");
    let (burying, bury) = (flusher.clone(), RowVersion::new(Epoch(1), Lsn(500)));
    let truncate = tokio::spawn(async move { burying.tombstone_up_to(bury).await });
    flusher.store_older(page, RowVersion::new(Epoch(1), Lsn(0))).await;
    assert!(!truncate.is_finished(), "it waits until what was read is stored");
    drop(reading);
    timeout(PATIENCE, truncate).await.expect("it ends in time").expect("no panic");
    let left: Vec<u64> = clickhouse::select(&world.clickhouse, "SELECT count() FROM sessions_v1 FINAL").await;
    assert_eq!(left, [0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_on_postgres_that_are_older_than_the_slot_are_there_and_what_is_gone_is_not() {
    let world = World::bare().await;
    let rows = format!(
        "INSERT INTO sessions (id, environment_id, kind, task_identifier, tags, current_run_id, created_at, updated_at) \
         SELECT 'session_' || lpad(n::text, 6, '0'), '{HERE}', 'chat', 'agent', '[]', 'run_' || n, n, n \
         FROM generate_series(1, 1300) n"
    );
    world.slot.run(&rows).await;
    // Copied by a rebuild, and gone since.
    let gone = session(77);
    let environment = here(&world.sql).await;
    let stale = SessionRow::new(gone, &environment, 5);
    world.writer().insert(&[stale]).await.expect("stored");

    // One that has written and is still open when the slot is made: the slot waits for it.
    let open = world.sql.database.connect().await;
    let one = "INSERT INTO sessions (id, environment_id, kind, task_identifier, tags, current_run_id, created_at, updated_at) \
               VALUES ('session_open', 'env_here', 'chat', 'agent', '[]', 'run_open', 1, 1)";
    let transaction = open.begin().await.expect("begins");
    transaction.execute_unprepared(one).await.expect("written");
    let (ensured, ()) = tokio::join!(world.ensured(), async {
        while world.phase_or_none().await.is_none() {
            sleep(Duration::from_millis(10)).await;
        }
        transaction.commit().await.expect("committed");
    });
    ensured.expect("a slot");
    assert_eq!(world.phase().await, Phase::Backfilling);

    let running = world.lead(&world.clickhouse, |source| Box::new(source)).await;
    let backfilling = world.backfilling();
    world.slot.run("UPDATE sessions SET tags = '[\"new\"]' WHERE created_at % 100 = 0").await;
    world.slot.run("DELETE FROM sessions WHERE created_at % 100 = 1").await;
    while world
        .postgres()
        .state(&world.slot.name)
        .await
        .expect("asked")
        .expect("a row")
        .backfilled_to
        .is_none()
    {
        assert!(!backfilling.is_finished(), "it is seen under way");
        sleep(Duration::from_millis(2)).await;
    }
    // Cut off after a page or two, it goes on where it was.
    backfilling.abort();
    let _ = backfilling.await;
    let backfilling = world.backfilling();
    let copied = async {
        while world.phase().await != Phase::Streaming {
            assert!(!backfilling.is_finished(), "it stays to look once more");
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, copied).await.expect("it is done in time");
    world.caught_up().await;
    world.assert_same().await;

    // An insert of an earlier epoch that comes late: its writer was frozen.
    backfilling.abort();
    world.writer().insert(&[SessionRow::new(session(78), &environment, 6)]).await.expect("stored");
    world.slot.run("UPDATE replication SET swept_at = swept_at - 600000").await;
    let backfilling = world.backfilling();
    world.swept().await;
    world.assert_same().await;

    // And one that comes late of a row that a TRUNCATE has taken.
    world.slot.run("TRUNCATE sessions CASCADE").await;
    world.sql.create(session(5_000)).await;
    world.caught_up().await;
    let late = RowVersion::new(Epoch(1), Lsn(1)).0;
    world.writer().insert(&[SessionRow::new(session(79), &environment, late)]).await.expect("stored");
    assert_eq!(world.differences().await.len(), 1);
    world.slot.run("UPDATE replication SET swept_at = swept_at - 600000").await;
    // As a new leader does: the one before has slept since.
    backfilling.abort();
    let backfilling = world.backfilling();
    world.swept().await;
    world.assert_same().await;
    backfilling.abort();
    running.end().await;
    world.slot.wait_for("NOT active").await;
    world.slot.end().await;
}
