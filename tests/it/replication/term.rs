//! From a slot of a real Postgres into a real ClickHouse.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use sessiond::domain::{SessionId, Timestamp};
use sessiond::replication::Context;
use sessiond::replication::flush::Flusher;
use sessiond::replication::pgwire::PgSource;
use sessiond::replication::source::WalSource;
use sessiond::replication::term::{Term, TermEnd, TermOptions};
use sessiond::store::index::clickhouse::{ClickHouse, ClickHouseOptions, SessionWriter};
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
        Flusher::new(self.context(clickhouse))
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
        let source = PgSource::open(&self.source).await.expect("a stream").0;
        let (stop, term) = (CancellationToken::new(), self.term(wrap(source), clickhouse));
        let stopped = stop.clone();
        Running { stop, term: tokio::spawn(async move { term.run(&stopped).await }) }
    }

    /// Waits until everything that has been committed is stored.
    pub(super) async fn caught_up(&self) {
        let place = replication::flushed(&self.slot.connection).await;
        self.slot.wait_for(&format!("confirmed_flush_lsn >= '{place}'")).await;
    }

    /// What each side has of every session.
    async fn both(&self) -> [BTreeMap<String, (SessionRow, Value)>; 2] {
        let environments = self.sql.store.environments().await.expect("environments");
        let sessions = self.sql.store.scan_sessions(None, usize::MAX >> 1).await.expect("sessions");
        let rows = sessions.into_iter().map(|session| {
            let environment = environments.iter().find(|one| one.id == session.environment).expect("one");
            SessionRow { _is_deleted: 0, ..SessionRow::new(session, environment, 0) }
        });
        let ours =
            clickhouse::select(&self.clickhouse, &format!("SELECT {ROW} FROM sessions_v1 FINAL")).await;
        let by_id = |row: SessionRow| (row.session_id.clone(), parsed(&row));
        [rows.map(by_id).collect(), ours.into_iter().map(by_id).collect()]
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

    // An idle server is confirmed too: what others write, and our own heartbeats.
    world.slot.run("CREATE TABLE noise AS SELECT repeat('x', 1000) FROM generate_series(1, 2000)").await;
    world.caught_up().await;
    assert!(matches!(running.end().await, TermEnd::Stopped));
    world.slot.wait_for("NOT active").await;
    world.slot.end().await;
}
