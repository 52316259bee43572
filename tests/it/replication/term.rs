//! From a slot of a real Postgres into a real ClickHouse.

use std::sync::Arc;

use async_trait::async_trait;

use sessiond::domain::Timestamp;
use sessiond::replication::Context;
use sessiond::replication::flush::Flusher;
use sessiond::replication::leader::ReplicatorOptions;
use sessiond::replication::pgwire::PgSource;
use sessiond::replication::slot as slots;
use sessiond::replication::source::{SourceError, WalEvent, WalSource};
use sessiond::replication::term::{Term, TermEnd, TermOptions};
use sessiond::store::index::clickhouse::{ClickHouse, ClickHouseOptions, Marker, SessionWriter, mark};
use sessiond::store::metadata::{Phase, ReplicationStore};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::compare::{Differences, both};
use super::*;
use crate::harness::proxy::FaultyInserts;
use crate::harness::{clickhouse, replication};

/// A Postgres, a ClickHouse, and a slot between them.
pub(super) struct World {
    pub(super) sql: Sql,
    pub(super) clickhouse: ClickHouse,
    /// The same behind a proxy that lets inserts fail. Whatever is killed writes here.
    pub(super) faulty: ClickHouse,
    pub(super) inserts: FaultyInserts,
    pub(super) slot: Slot,
    pub(super) source: SourceOptions,
    pub(super) options: TermOptions,
}

/// A term that runs.
pub(super) struct Running {
    stop: CancellationToken,
    term: JoinHandle<TermEnd>,
}

impl World {
    /// With a slot that is read from its beginning on.
    pub(super) async fn fresh() -> Self {
        Self::bare().await.streaming().await
    }

    async fn streaming(self) -> Self {
        let world = self;
        world.slot.create().await;
        let state = format!(
            "INSERT INTO replication (slot, epoch, system_identifier, timeline, slot_lsn, phase) \
             VALUES ('{}', 1, 'of the test', 1, 0, 'streaming')",
            world.slot.name
        );
        world.slot.run(&state).await;
        world
    }

    /// On the server whose synchronous standby never comes, without a slot.
    pub(super) async fn synchronous() -> Self {
        Self::on(Sql::synchronous().await).await
    }

    /// The same with a slot.
    pub(super) async fn synchronous_streaming() -> Self {
        Self::synchronous().await.streaming().await
    }

    /// Without a slot.
    pub(super) async fn bare() -> Self {
        Self::on(Sql::postgres().await).await
    }

    async fn on(sql: Sql) -> Self {
        let clickhouse = clickhouse::connect(clickhouse::options(&clickhouse::url()));
        // Of nothing: it makes the tables.
        clickhouse::rebuild(&clickhouse, Arc::new(sql.store.clone()), Timestamp::from_millis(1)).await;
        let slot = Slot::named(&sql).await;
        let options = replication::term_options(&slot.name);
        let source = slot.options(&sql);
        let inserts = FaultyInserts::before(&clickhouse::url()).await;
        let through = ClickHouseOptions { url: inserts.url.clone(), ..clickhouse.options().clone() };
        let faulty = clickhouse::connect(through);
        Self { sql, clickhouse, faulty, inserts, slot, source, options }
    }

    pub(super) fn postgres(&self) -> ReplicationStore {
        ReplicationStore::new(self.sql.store.clone())
    }

    pub(super) fn writer(&self) -> SessionWriter {
        SessionWriter::new(self.clickhouse.clone())
    }

    pub(super) fn context(&self, clickhouse: &ClickHouse) -> Context {
        replication::context(&self.sql.store, clickhouse)
    }

    pub(super) fn flusher(&self, clickhouse: &ClickHouse) -> Flusher {
        Flusher::new(self.context(clickhouse), &self.slot.name)
    }

    pub(super) async fn phase_or_none(&self) -> Option<Phase> {
        self.postgres().state(&self.slot.name).await.expect("asked").map(|state| state.phase)
    }

    fn term(&self, source: Box<dyn WalSource>, clickhouse: &ClickHouse) -> Term {
        Term::new(source, self.flusher(clickhouse), Epoch(1), self.options.clone())
    }

    /// Reads the slot, once nobody else does, into `clickhouse`.
    pub(super) async fn lead(
        &self,
        clickhouse: &ClickHouse,
        wrap: impl Fn(PgSource) -> Box<dyn WalSource>,
    ) -> Running {
        self.slot.wait_for("NOT active").await;
        self.mark().await;
        let source = PgSource::open(&self.source).await.expect("a stream").0;
        let (stop, term) = (CancellationToken::new(), self.term(wrap(source), clickhouse));
        let stopped = stop.clone();
        Running { stop, term: tokio::spawn(async move { term.run(&stopped).await }) }
    }

    /// Of a replicator that looks often.
    pub(super) fn replicator_options(&self) -> ReplicatorOptions {
        let poll = Duration::from_millis(50);
        let (source, term) = (self.source.clone(), self.options.clone());
        ReplicatorOptions { source, term, poll, longest_pause: 4 * poll }
    }

    /// As a replicator does before it leads.
    async fn mark(&self) {
        let context = self.context(&self.clickhouse);
        let marker = Marker {
            installation: slots::installation(&context).await.expect("asked"),
            slot: self.slot.name.clone(),
            epoch: 1,
            beat: 1,
            lsn: 0,
            heartbeat_ms: 100,
        };
        mark(&self.clickhouse, &marker).await.expect("marked");
    }

    /// Waits until everything that has been committed is stored.
    pub(super) async fn caught_up(&self) {
        let place = replication::flushed(&self.slot.connection).await;
        self.slot.wait_for(&format!("confirmed_flush_lsn >= '{place}'")).await;
    }

    pub(super) async fn differences(&self) -> Differences {
        Differences::between(&self.slot.connection, &self.clickhouse).await
    }

    pub(super) async fn assert_same(&self) {
        let [stored, copied] = both(&self.slot.connection, &self.clickhouse).await;
        assert!(!stored.is_empty(), "there is nothing to compare");
        for (key, row) in &stored {
            assert_eq!(copied.get(key), Some(row), "{key:?}");
        }
        assert_eq!(copied.len(), stored.len(), "nothing is there that is gone");
    }
}

impl Running {
    pub(super) async fn end(self) -> TermEnd {
        self.stop.cancel();
        timeout(PATIENCE, self.term).await.expect("it ends in time").expect("no panic")
    }

    /// As kill -9 would end it.
    pub(super) async fn kill(self) {
        self.term.abort();
        assert!(self.term.await.is_err_and(|error| error.is_cancelled()), "it was still running");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_changes_on_postgres_comes_to_clickhouse() {
    let world = World::fresh().await;
    let running = world.lead(&world.clickhouse, |source| Box::new(source)).await;
    let sessions: Vec<_> = (0..5).map(|number| session(1_000 * number)).collect();
    for one in &sessions {
        world.sql.create(one.clone()).await;
    }
    let closure = Closure { at: at(9_000), reason: Some(String::new()) };
    world.sql.store.close_session(&world.sql.here, &sessions[0].id, &closure).await.expect("closed");
    let patch = SessionPatch { tags: Some(words(&["a", "b:c"])), ..SessionPatch::default() };
    world
        .sql
        .store
        .update_session(&world.sql.here, &sessions[1].id, patch, at(9_000))
        .await
        .expect("updated");
    world.slot.delete(&sessions[2].id).await;
    world.slot.run(&format!("UPDATE sessions SET created_at = 7 WHERE id = '{}'", sessions[3].id)).await;
    world.caught_up().await;
    world.assert_same().await;

    world.slot.run("TRUNCATE sessions CASCADE").await;
    world.sql.create(session(5_000)).await;
    world.caught_up().await;
    world.assert_same().await;

    // Of an environment that is gone itself, and that a new leader has never heard of.
    let elsewhere = Session { environment: world.sql.elsewhere.clone(), ..session(6_000) };
    world.sql.create(elsewhere.clone()).await;
    world.caught_up().await;
    assert!(matches!(running.end().await, TermEnd::Stopped));
    world.slot.delete(&elsewhere.id).await;
    world.slot.run(&format!("DELETE FROM environments WHERE id = '{}'", world.sql.elsewhere)).await;
    let running = world.lead(&world.clickhouse, |source| Box::new(source)).await;
    world.caught_up().await;
    world.assert_same().await;

    // An idle server is confirmed too: what others write, and our own heartbeats.
    world.slot.run("CREATE TABLE noise AS SELECT repeat('x', 1000) FROM generate_series(1, 2000)").await;
    world.caught_up().await;
    assert!(matches!(running.end().await, TermEnd::Stopped));
    world.slot.wait_for("NOT active").await;
    world.slot.end().await;
}

/// Says nothing of what it is told, as where all of it is of other tables.
struct Quiet(PgSource);

#[async_trait]
impl WalSource for Quiet {
    async fn next(&mut self) -> Result<WalEvent, SourceError> {
        while let Ok(event) = self.0.next().await {
            if let WalEvent::KeepAlive { wal_end } = event {
                self.0.confirm(wal_end);
            }
        }
        std::future::pending().await
    }

    fn confirm(&self, _: Lsn) {}

    async fn stop(self: Box<Self>) -> Result<(), SourceError> {
        Box::new(self.0).stop().await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_of_postgres_that_is_silent_is_left_only_when_the_server_does_not_read_on() {
    let mut world = World::fresh().await;
    world.options.silence = Duration::from_millis(200);
    let running = world.lead(&world.clickhouse, |source| Box::new(Quiet(source))).await;
    for turn in 0..20 {
        let place = replication::flushed(&world.slot.connection).await;
        world.slot.run(&format!("CREATE TABLE noise_{turn} AS SELECT 1 AS one")).await;
        world.slot.wait_for(&format!("confirmed_flush_lsn > '{place}'")).await;
    }
    assert!(!running.term.is_finished(), "the server reads on, and nothing is amiss");
    world.slot.cut().await;
    let end = timeout(PATIENCE, running.term).await.expect("it ends in time").expect("no panic");
    assert!(matches!(end, TermEnd::Silence(_)), "{end:?}");
    world.slot.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inserts_come_less_often_while_clickhouse_is_behind_with_merging() {
    let world = World::bare().await;
    let (flusher, environment) = (world.flusher(&world.clickhouse), here(&world.sql).await);
    let least = Duration::from_millis(50);
    assert_eq!(flusher.next_gap(least, least).await, least);
    let database = &world.clickhouse.options().database;
    let command = |text: String| async move {
        let client = ::clickhouse::Client::default().with_url(clickhouse::url());
        client.query_raw(&text).execute().await.expect("done");
    };
    command(format!("SYSTEM STOP MERGES {database}.sessions_v1")).await;
    let rows = (0..160).map(|number| SessionRow::new(session(number), &environment, 7));
    for row in rows {
        world.writer().insert(&[row]).await.expect("stored");
    }
    let mut gap = least;
    for millis in [100, 200, 400, 800, 1_600, 2_000, 2_000] {
        gap = flusher.next_gap(gap, least).await;
        assert_eq!(gap, Duration::from_millis(millis));
    }
    command(format!("SYSTEM START MERGES {database}.sessions_v1")).await;
    command(format!("OPTIMIZE TABLE {database}.sessions_v1 FINAL")).await;
    for millis in [1_000, 500, 250, 125] {
        gap = flusher.next_gap(gap, least).await;
        assert_eq!(gap, Duration::from_millis(millis));
    }
}
