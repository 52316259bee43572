//! From a slot of a real Postgres into a real ClickHouse.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use sessiond::domain::{SessionId, Timestamp};
use sessiond::replication::flush::Flusher;
use sessiond::replication::pgwire::PgSource;
use sessiond::replication::source::{SourceError, WalEvent, WalSource};
use sessiond::replication::term::{Term, TermEnd, TermOptions};
use sessiond::store::index::clickhouse::{ClickHouse, ClickHouseOptions, SessionWriter};
use sessiond::store::metadata::{Phase, ReplicationStore};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::harness::proxy::FaultyInserts;
use crate::harness::{Dice, clickhouse};

/// Every column that is compared, and what is no part of it.
const ROW: &str = "environment_id, organization_id, project_id, session_id, environment_type, friendly_id, external_id, type, \
                   task_identifier, tags, '{}' AS metadata, closed_at, closed_reason, expires_at, created_at, updated_at, \
                   is_test, toUInt64(0) AS _version, toUInt8(0) AS _is_deleted, document";

/// A Postgres, a ClickHouse, and a slot between them.
pub(super) struct World {
    pub(super) sql: Sql,
    pub(super) clickhouse: ClickHouse,
    /// The same behind a proxy that lets inserts fail. Whatever is killed writes here.
    pub(super) faulty: ClickHouse,
    inserts: FaultyInserts,
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
    async fn fresh() -> Self {
        let world = Self::bare().await;
        world.slot.create().await;
        let state = format!(
            "INSERT INTO replication (slot, epoch, system_identifier, timeline, slot_lsn, phase) \
             VALUES ('{}', 1, 'of the test', 1, 0, 'streaming')",
            world.slot.name
        );
        world.slot.run(&state).await;
        world
    }

    /// Without a slot.
    pub(super) async fn bare() -> Self {
        let sql = Sql::postgres().await;
        let clickhouse = clickhouse::connect(clickhouse::options(&clickhouse::url()));
        // Of nothing: it makes the tables.
        clickhouse::rebuild(&clickhouse, Arc::new(sql.store.clone()), Timestamp::from_millis(1)).await;
        let slot = Slot::named(&sql).await;
        let options = TermOptions {
            slot: slot.name.clone(),
            name: "the test".to_owned(),
            flush_rows: 50,
            flush_bytes: 1 << 20,
            flush_gap: Duration::from_millis(20),
            in_flight: 4,
            memory: 8 << 20,
            heartbeat: Duration::from_millis(100),
            silence: Duration::from_secs(10),
            drain: Duration::from_secs(10),
        };
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

    pub(super) fn flusher(&self, clickhouse: &ClickHouse) -> Flusher {
        let (writer, store) = (SessionWriter::new(clickhouse.clone()), Arc::new(self.sql.store.clone()));
        Flusher::new(writer, self.postgres(), store, false)
    }

    pub(super) async fn phase_or_none(&self) -> Option<Phase> {
        self.postgres().state(&self.slot.name).await.expect("asked").map(|state| state.phase)
    }

    fn term(&self, source: Box<dyn WalSource>, clickhouse: &ClickHouse) -> Term {
        Term::new(source, self.flusher(clickhouse), self.postgres(), Epoch(1), self.options.clone())
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
        let query =
            Statement::from_string(DbBackend::Postgres, "SELECT pg_current_wal_flush_lsn()::text AS place");
        let row = self.slot.connection.query_one_raw(query).await.expect("asked").expect("a row");
        let place: String = row.try_get("", "place").expect("text");
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
    async fn differences(&self) -> Vec<String> {
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
    async fn kill(self) {
        self.term.abort();
        assert!(self.term.await.is_err_and(|error| error.is_cancelled()), "it was still running");
    }
}

/// Makes changes of every kind by three writers, until they are told to end. Returns how many.
pub(super) async fn changing(sql: &Sql, stop: &CancellationToken) -> usize {
    let writers = (1..4).map(|seed| change(sql, seed, stop.clone()));
    futures_util::future::join_all(writers).await.into_iter().sum()
}

/// Makes changes of every kind, until it is told to end.
async fn change(sql: &Sql, seed: u64, stop: CancellationToken) -> usize {
    let mut dice = Dice::new(seed);
    let connection = sql.database.connect().await;
    let (mut alive, mut changes): (Vec<SessionId>, _) = (Vec::new(), 0);
    while !stop.is_cancelled() {
        changes += 1;
        let now = at(10_000 + changes as i64);
        let pick = |dice: &mut Dice, alive: &[SessionId]| alive[dice.roll(alive.len())].clone();
        match dice.roll(12) {
            0..4 => {
                let mut new = session(i64::try_from(1_000 + dice.roll(1_000_000)).expect("small"));
                if dice.one_in(3) {
                    let noise: String = (0..200).map(|_| uuid::Uuid::new_v4().simple().to_string()).collect();
                    let Value::Object(metadata) = json!({ "noise": noise }) else {
                        unreachable!("an object")
                    };
                    new.metadata = Some(metadata);
                }
                alive.push(new.id.clone());
                sql.create(new).await;
            }
            _ if alive.is_empty() => {}
            4..8 => {
                let patch =
                    SessionPatch { tags: Some(vec![format!("tag-{changes}")]), ..SessionPatch::default() };
                sql.store
                    .update_session(&sql.here, &pick(&mut dice, &alive), patch, now)
                    .await
                    .expect("updated");
            }
            8 => {
                let closure = Closure { at: now, reason: (dice.one_in(2)).then(|| "done".to_owned()) };
                sql.store.close_session(&sql.here, &pick(&mut dice, &alive), &closure).await.expect("closed");
            }
            9 => {
                let gone = alive.swap_remove(dice.roll(alive.len()));
                let delete = format!(
                    "DELETE FROM session_runs WHERE session_id = '{gone}'; DELETE FROM sessions WHERE id = '{gone}'"
                );
                connection.execute_unprepared(&delete).await.expect("gone");
            }
            10 => {
                let moved = pick(&mut dice, &alive);
                let move_it = format!("UPDATE sessions SET created_at = created_at + 1 WHERE id = '{moved}'");
                connection.execute_unprepared(&move_it).await.expect("moved");
            }
            _ => {
                let all = format!("UPDATE sessions SET updated_at = updated_at + {seed} WHERE kind = 'chat'");
                connection.execute_unprepared(&all).await.expect("a transaction of many changes");
            }
        }
    }
    connection.close().await.expect("closed");
    changes
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_kills_terms_on_postgres_nothing_is_missing_stale_or_left_in_clickhouse() {
    let world = World::fresh().await;
    kills(&world, |source| Box::new(source)).await;
    world.assert_same().await;
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
    let world = World::fresh().await;
    kills(&world, |source| Box::new(Hasty(source))).await;
    assert!(!world.differences().await.is_empty(), "the kills prove nothing");
    world.slot.end().await;
}

/// Kills one term after another while sessions change, behind a network that breaks, and lets the last one catch up.
async fn kills(world: &World, wrap: impl Fn(PgSource) -> Box<dyn WalSource>) {
    const KILLS: usize = 12;
    let stop = CancellationToken::new();
    let killing = async {
        let mut dice = Dice::new(5);
        for kill in 0..KILLS {
            let running = world.lead(&world.faulty, &wrap).await;
            // A time at random, and no event: that is what is tested. Every other time while an insert is under way.
            sleep(Duration::from_millis(50 + dice.roll(250) as u64)).await;
            if kill % 2 == 0 {
                let mut inserts = world.inserts.watched();
                timeout(PATIENCE, inserts.wait_for(|open| *open > 0))
                    .await
                    .expect("an insert")
                    .expect("it runs");
            }
            running.kill().await;
        }
        stop.cancel();
    };
    let (changes, ()) = tokio::join!(changing(&world.sql, &stop), killing);
    assert!(changes > 200, "{changes} changes");
    let running = world.lead(&world.clickhouse, &wrap).await;
    world.caught_up().await;
    assert!(matches!(running.end().await, TermEnd::Stopped));
    world.slot.wait_for("NOT active").await;
}
