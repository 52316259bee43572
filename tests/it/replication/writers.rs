//! Writers, which make changes of every kind.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio_util::sync::CancellationToken;

use super::*;
use crate::harness::Dice;

/// Makes changes of every kind by three writers, until they are told to end, and counts the rows in `changes`.
pub(super) async fn changing(sql: &Sql, changes: &AtomicUsize, stop: &CancellationToken) {
    let writing = async |seed: u64| {
        let mut writer = Writer::new(sql, seed, &format!("kind-{seed}")).await;
        while !stop.is_cancelled() {
            let changed = writer.change().await.expect("a change");
            changes.fetch_add(changed, Ordering::Relaxed);
        }
        writer.connection.close().await.expect("closed");
    };
    futures_util::future::join_all((1..4).map(writing)).await;
}

/// Changes the sessions of a kind, which nobody else does.
pub(super) struct Writer<'a> {
    sql: &'a Sql,
    connection: DatabaseConnection,
    seed: u64,
    dice: Dice,
    kind: String,
    alive: Vec<SessionId>,
    turn: i64,
}

impl<'a> Writer<'a> {
    /// What it does is decided by `seed`, and by the sessions that there are.
    pub(super) async fn new(sql: &'a Sql, seed: u64, kind: &str) -> Self {
        let connection = sql.database.connect().await;
        let query = format!("SELECT id FROM sessions WHERE kind = '{kind}' ORDER BY id");
        let rows = connection.query_all_raw(Statement::from_string(DbBackend::Postgres, query)).await;
        let alive = rows.expect("asked").into_iter().map(|row| {
            let id: String = row.try_get("", "id").expect("text");
            SessionId::from_stored(&id)
        });
        let alive = alive.collect();
        Self { sql, connection, seed, dice: Dice::new(seed), kind: kind.to_owned(), alive, turn: 0 }
    }

    /// Makes a change, or tries to: of so many rows.
    pub(super) async fn change(&mut self) -> anyhow::Result<usize> {
        self.turn += 1;
        let (seed, turn, now) = (self.seed, self.turn, at(10_000 + self.turn));
        let changed = match self.dice.roll(13) {
            0..4 => {
                let new = self.new_session();
                let id = new.id.clone();
                self.sql.store.create_session(new, None).await?;
                self.alive.push(id);
                1
            }
            _ if self.alive.is_empty() => 0,
            4..8 => {
                let patch = SessionPatch {
                    tags: Some(vec![format!("tag-{seed}-{turn}")]),
                    ..SessionPatch::default()
                };
                let id = self.pick();
                self.sql.store.update_session(&self.sql.here, &id, patch, now).await?;
                1
            }
            8 => {
                let closure = Closure { at: now, reason: self.dice.one_in(2).then(|| "done".to_owned()) };
                let id = self.pick();
                self.sql.store.close_session(&self.sql.here, &id, &closure).await?;
                1
            }
            9 => {
                let gone = self.alive.swap_remove(self.dice.roll(self.alive.len()));
                self.run(&format!(
                    "DELETE FROM session_runs WHERE session_id = '{gone}'; DELETE FROM sessions WHERE id = '{gone}'"
                ))
                .await?;
                1
            }
            10 => {
                let moved = self.pick();
                self.run(&format!("UPDATE sessions SET created_at = created_at + 1 WHERE id = '{moved}'"))
                    .await?
            }
            11 => {
                // What is stored out of line is not told again.
                let id = self.pick();
                self.run(&format!("UPDATE sessions SET updated_at = updated_at + 1 WHERE id = '{id}'"))
                    .await?
            }
            _ => {
                let many = format!(
                    "UPDATE sessions SET updated_at = updated_at + {seed} WHERE id IN \
                     (SELECT id FROM sessions WHERE kind = '{}' ORDER BY id DESC LIMIT 180)",
                    self.kind
                );
                self.run(&many).await?
            }
        };
        Ok(changed)
    }

    fn new_session(&mut self) -> Session {
        let created = i64::try_from(1_000 + self.dice.roll(1_000_000)).expect("small");
        let mut new = Session { kind: self.kind.clone(), ..session(created) };
        if self.dice.one_in(3) {
            let noise: String = (0..200).map(|_| uuid::Uuid::new_v4().simple().to_string()).collect();
            let Value::Object(metadata) = json!({ "noise": noise }) else { unreachable!("an object") };
            new.metadata = Some(metadata);
        }
        new
    }

    fn pick(&mut self) -> SessionId {
        self.alive[self.dice.roll(self.alive.len())].clone()
    }

    /// Runs statements as one transaction; how many rows the last of them has changed.
    async fn run(&self, sql: &str) -> anyhow::Result<usize> {
        Ok(usize::try_from(self.connection.execute_unprepared(sql).await?.rows_affected())?)
    }
}
