//! From a slot of a real Postgres into a real ClickHouse.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;

use sessiond::domain::{SessionId, Timestamp};
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

use super::*;
use crate::harness::proxy::FaultyInserts;
use crate::harness::{Dice, clickhouse, replication};

/// Every column that is compared, and what is no part of it.
pub(super) const ROW: &str = "environment_id, organization_id, project_id, session_id, environment_type, friendly_id, external_id, type, \
                   task_identifier, tags, '{}' AS metadata, closed_at, closed_reason, expires_at, created_at, updated_at, \
                   is_test, toUInt64(0) AS _version, toUInt8(0) AS _is_deleted, document";

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

    /// What each side has of every session, each read by SQL of the test's own.
    async fn both(&self) -> [BTreeMap<String, Value>; 2] {
        let query = "SELECT s.id, jsonb_build_object(\
                'environment', s.environment_id, 'organization', e.organization, 'project', e.project, \
                'environmentType', e.kind, 'friendlyId', s.id, 'externalId', coalesce(s.external_id, ''), 'type', s.kind, \
                'task', s.task_identifier, 'tags', s.tags, 'closedAt', s.closed_at, \
                'closedReason', coalesce(s.closed_reason, ''), 'expiresAt', s.expires_at, 'createdAt', s.created_at, \
                'updatedAt', s.updated_at, 'isTest', 0, 'column', '{}'::jsonb, 'document', jsonb_build_object(\
                    'metadata', s.metadata, 'triggerConfig', s.trigger_config, 'closedReason', s.closed_reason, \
                    'currentRunId', s.current_run_id))::text AS row \
             FROM sessions s JOIN environments e ON e.id = s.environment_id";
        let query = Statement::from_string(DbBackend::Postgres, query);
        let rows = self.slot.connection.query_all_raw(query).await.expect("asked");
        let stored = rows.into_iter().map(|row| {
            let text: String = row.try_get("", "row").expect("text");
            let mut value: Value = serde_json::from_str(&text).expect("JSON");
            assert_eq!(value["environmentType"], "prod", "all environments of these tests are");
            value["environmentType"] = json!("PRODUCTION");
            (row.try_get("", "id").expect("text"), value)
        });
        let ours =
            clickhouse::select(&self.clickhouse, &format!("SELECT {ROW} FROM sessions_v1 FINAL")).await;
        let copied = ours.into_iter().map(|row: SessionRow| {
            let value = json!({
                "environment": row.environment_id, "organization": row.organization_id, "project": row.project_id,
                "environmentType": row.environment_type, "friendlyId": row.friendly_id, "externalId": row.external_id,
                "type": row.r#type, "task": row.task_identifier, "tags": row.tags, "closedAt": row.closed_at,
                "closedReason": row.closed_reason, "expiresAt": row.expires_at, "createdAt": row.created_at,
                "updatedAt": row.updated_at, "isTest": row.is_test,
                "column": serde_json::from_str::<Value>(&row.metadata).expect("JSON"),
                "document": serde_json::from_str::<Value>(&row.document).expect("JSON"),
            });
            (row.session_id, value)
        });
        [stored.collect(), copied.collect()]
    }

    /// Sessions of which the two sides say different things.
    pub(super) async fn differences(&self) -> Vec<String> {
        let [stored, copied] = self.both().await;
        assert!(!stored.is_empty(), "there is nothing to compare");
        let ids = stored.keys().chain(copied.keys().filter(|id| !stored.contains_key(*id)));
        ids.filter(|id| stored.get(*id) != copied.get(*id)).cloned().collect()
    }

    pub(super) async fn assert_same(&self) {
        let [stored, copied] = self.both().await;
        assert!(!stored.is_empty(), "there is nothing to compare");
        for (id, row) in &stored {
            assert_eq!(copied.get(id), Some(row), "{id}");
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

/// Makes changes of every kind by three writers, until they are told to end, and counts the rows in `changes`.
pub(super) async fn changing(sql: &Sql, changes: &AtomicUsize, stop: &CancellationToken) {
    let writers = (1..4).map(|seed| change(sql, seed, changes, stop));
    futures_util::future::join_all(writers).await;
}

/// Makes changes of every kind to sessions of its own, until it is told to end.
async fn change(sql: &Sql, seed: u64, changes: &AtomicUsize, stop: &CancellationToken) {
    let (mut dice, kind) = (Dice::new(seed), format!("kind-{seed}"));
    let connection = sql.database.connect().await;
    let (mut alive, mut turn): (Vec<SessionId>, i64) = (Vec::new(), 0);
    while !stop.is_cancelled() {
        turn += 1;
        let now = at(10_000 + turn);
        let pick = |dice: &mut Dice, alive: &[SessionId]| alive[dice.roll(alive.len())].clone();
        let changed = match dice.roll(13) {
            0..4 => {
                let created = i64::try_from(1_000 + dice.roll(1_000_000)).expect("small");
                let mut new = Session { kind: kind.clone(), ..session(created) };
                if dice.one_in(3) {
                    let noise: String = (0..200).map(|_| uuid::Uuid::new_v4().simple().to_string()).collect();
                    let Value::Object(metadata) = json!({ "noise": noise }) else {
                        unreachable!("an object")
                    };
                    new.metadata = Some(metadata);
                }
                alive.push(new.id.clone());
                sql.create(new).await;
                1
            }
            _ if alive.is_empty() => 0,
            4..8 => {
                let patch =
                    SessionPatch { tags: Some(vec![format!("tag-{turn}")]), ..SessionPatch::default() };
                let id = pick(&mut dice, &alive);
                sql.store.update_session(&sql.here, &id, patch, now).await.expect("updated");
                1
            }
            8 => {
                let closure = Closure { at: now, reason: (dice.one_in(2)).then(|| "done".to_owned()) };
                sql.store.close_session(&sql.here, &pick(&mut dice, &alive), &closure).await.expect("closed");
                1
            }
            9 => {
                let gone = alive.swap_remove(dice.roll(alive.len()));
                let delete = format!(
                    "DELETE FROM session_runs WHERE session_id = '{gone}'; DELETE FROM sessions WHERE id = '{gone}'"
                );
                connection.execute_unprepared(&delete).await.expect("gone");
                1
            }
            10 => {
                let moved = pick(&mut dice, &alive);
                let move_it = format!("UPDATE sessions SET created_at = created_at + 1 WHERE id = '{moved}'");
                connection.execute_unprepared(&move_it).await.expect("moved");
                1
            }
            11 => {
                // What is stored out of line is not told again.
                let id = pick(&mut dice, &alive);
                let touch = format!("UPDATE sessions SET updated_at = updated_at + 1 WHERE id = '{id}'");
                connection.execute_unprepared(&touch).await.expect("touched");
                1
            }
            _ => {
                let many = format!(
                    "UPDATE sessions SET updated_at = updated_at + {seed} WHERE id IN \
                     (SELECT id FROM sessions WHERE kind = '{kind}' ORDER BY id DESC LIMIT 180)"
                );
                connection
                    .execute_unprepared(&many)
                    .await
                    .expect("a transaction of many changes")
                    .rows_affected()
            }
        };
        changes.fetch_add(usize::try_from(changed).expect("small"), Ordering::Relaxed);
    }
    connection.close().await.expect("closed");
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
