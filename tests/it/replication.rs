//! From Postgres to ClickHouse: what the stream of changes of a real server is made into.

mod chaos;
mod compare;
mod dead_letters;
mod held;
mod kills;
mod large;
mod leader;
mod restored;
mod service;
mod slot;
mod source;
mod takeover;
mod term;
mod verify;
mod writers;

use std::collections::HashMap;
use std::time::Duration;

use bytes::{Buf, Bytes};
use sea_orm::{ConnectionTrait, DatabaseConnection, DbBackend, Statement};
use secrecy::SecretString;
use serde_json::{Value, json};
use sessiond::domain::tenant::Environment;
use sessiond::domain::{Closure, MetadataStore, Session, SessionId, SessionPatch, SessionRef};
use sessiond::replication::batch::{Batch, Batcher, CHUNK};
use sessiond::replication::pgoutput::{Change, Column, Decoder, Tuple};
use sessiond::replication::pgwire::SourceOptions;
use sessiond::replication::row::{COLUMNS, SortKey, Version};
use sessiond::replication::{Epoch, Lsn, RowVersion};
use sessiond::store::index::clickhouse::SessionRow;

use tokio::time::{sleep, timeout};

use crate::harness::database::{HERE, Sql, at, named, session, words};
use crate::harness::replication;

/// Longest that a test waits for what must happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// A slot of a test's own, and what reads it. Slots are of the whole server, whatever database they decode.
struct Slot {
    connection: DatabaseConnection,
    name: String,
    decoder: Decoder,
    batcher: Batcher,
    truncated: Option<RowVersion>,
}

impl Slot {
    async fn make(sql: &Sql) -> Self {
        let slot = Self::named(sql).await;
        slot.create().await;
        slot
    }

    /// Not made yet.
    async fn named(sql: &Sql) -> Self {
        let connection = sql.database.connect().await;
        let name = replication::slot_name();
        let (decoder, batcher) = (Decoder::new("sessions", COLUMNS), Batcher::new(Epoch(3)));
        Self { connection, name, decoder, batcher, truncated: None }
    }

    async fn create(&self) {
        self.run("CREATE PUBLICATION ours FOR TABLE sessions").await;
        self.run(&format!("SELECT pg_create_logical_replication_slot('{}', 'pgoutput')", self.name)).await;
    }

    /// Everything that has been committed since the last time, as one batch, but for what stands before a chunk's end.
    async fn read(&mut self) -> Batch {
        let changes = format!(
            "SELECT data FROM pg_logical_slot_get_binary_changes('{}', NULL, NULL, 'proto_version', '1', \
             'publication_names', 'ours')",
            self.name
        );
        let statement = Statement::from_string(DbBackend::Postgres, changes);
        let rows = self.connection.query_all_raw(statement).await.expect("changes");
        for row in rows {
            self.message(row.try_get::<Vec<u8>>("", "data").expect("bytes").into());
        }
        assert!(self.batcher.may_end());
        self.batcher.end()
    }

    fn message(&mut self, mut message: Bytes) {
        match message[0] {
            b'B' => {
                message.advance(1);
                let (commit, micros, xid) = (message.get_u64(), message.get_i64(), message.get_u32());
                self.batcher.begin(Lsn(commit), micros / 1000 + 946_684_800_000, xid);
            }
            b'C' => {
                message.advance(1 + 1 + 8);
                self.batcher.commit(Lsn(message.get_u64()));
            }
            _ => match self.decoder.decode(message).expect("a message") {
                Change::Truncate => self.truncated = Some(self.batcher.truncate().expect("versions").at),
                change => self.batcher.take(change).expect("taken"),
            },
        }
    }

    async fn run(&self, sql: &str) {
        self.connection.execute_unprepared(sql).await.expect("run");
    }

    /// As somebody with SQL would: nobody does through the server.
    async fn delete(&self, id: &SessionId) {
        self.run(&format!(
            "DELETE FROM session_runs WHERE session_id = '{id}'; DELETE FROM sessions WHERE id = '{id}'"
        ))
        .await;
    }

    async fn end(self) {
        self.run(&format!("SELECT pg_drop_replication_slot('{}')", self.name)).await;
    }
}

impl Slot {
    /// How the replication protocol reads it, through the server at `url` if that is given.
    fn options(&self, sql: &Sql) -> SourceOptions {
        self.options_at(&sql.database.url)
    }

    fn options_at(&self, url: &str) -> SourceOptions {
        SourceOptions::new(&SecretString::from(url.to_owned()), &self.name, "ours").expect("a URL")
    }

    async fn text(&self, what: &str) -> String {
        let query = format!(
            "SELECT ({what})::text AS found FROM pg_replication_slots WHERE slot_name = '{}'",
            self.name
        );
        let row = self.connection.query_one_raw(Statement::from_string(DbBackend::Postgres, query)).await;
        // Nothing is true of a slot that is not there.
        let found =
            row.expect("asked").and_then(|row| row.try_get::<Option<String>>("", "found").expect("text"));
        found.unwrap_or_default()
    }

    /// Ends the connection that reads it, by the server.
    async fn cut(&self) {
        let query = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name";
        self.run(&format!("{query} = '{}'", self.name)).await;
    }

    /// Waits until this is true of the slot.
    async fn wait_for(&self, what: &str) {
        let until = async {
            while self.text(what).await != "true" {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, until).await.unwrap_or_else(|_| panic!("{what} before the test gives up"));
    }
}

fn key(session: &Session) -> SortKey {
    SortKey {
        environment: HERE.to_owned(),
        created_at: session.created_at.millis(),
        session: session.id.to_string(),
    }
}

async fn here(sql: &Sql) -> Environment {
    sql.store
        .environments()
        .await
        .expect("environments")
        .into_iter()
        .find(|one| one.id == sql.here)
        .expect("one")
}

fn parsed(row: &SessionRow) -> (SessionRow, Value) {
    let document = serde_json::from_str(&row.document).expect("JSON");
    (SessionRow { document: String::new(), ..row.clone() }, document)
}

fn version_of<'a>(batch: &'a Batch, session: &Session) -> &'a Version {
    batch.rows[&key(session)].row.as_ref().expect("a row")
}

/// The columns of a session as texts, as a query gives them.
async fn stored(connection: &DatabaseConnection, session: &Session) -> Tuple {
    let columns: Vec<_> = COLUMNS.iter().map(|column| format!("{column}::text AS {column}")).collect();
    let query = format!("SELECT {} FROM sessions WHERE id = '{}'", columns.join(", "), session.id);
    let row = connection.query_one_raw(Statement::from_string(DbBackend::Postgres, query)).await;
    let row = row.expect("asked").expect("a row");
    let text = |column: &&str| row.try_get::<Option<String>>("", column).expect("text");
    COLUMNS.iter().map(|column| text(column).map_or(Column::Null, |text| Column::Text(text.into()))).collect()
}

/// Checks that the stream says of a session what the store does.
async fn same_as_stored(sql: &Sql, batch: &Batch, session: &Session) {
    let address = SessionRef::Id(session.id.clone());
    let stored = sql.store.find_session(&sql.here, &address).await.expect("asked").expect("stored");
    let (environment, version) = (here(sql).await, batch.rows[&key(session)].version);
    let streamed = version_of(batch, session).row(&environment, version).expect("a row");
    assert_eq!(parsed(&streamed), parsed(&SessionRow::new(stored, &environment, version.0)));
}

#[tokio::test]
async fn a_stream_on_postgres_says_of_every_session_what_the_store_says() {
    let sql = Sql::postgres().await;
    let mut slot = Slot::make(&sql).await;
    let Value::Object(metadata) = json!({"a": null, "b.c": 1.0, "big": 1_180_591_620_717_411_303_424u128.to_string(), "é": "\u{1F600}\\u0000"})
    else {
        unreachable!("an object")
    };
    let rich = Session {
        tags: words(&["a", "b:c", "quote\"d"]),
        metadata: Some(metadata),
        expires_at: Some(at(9_000)),
        ..named("rich")
    };
    let (plain, closed) = (session(2_000), session(3_000));
    for one in [&rich, &plain, &closed] {
        sql.create(one.clone()).await;
    }
    let closure = Closure { at: at(4_000), reason: Some(String::new()) };
    sql.store.close_session(&sql.here, &closed.id, &closure).await.expect("closed");

    let batch = slot.read().await;
    assert_eq!(batch.rows.len(), 3, "one row for each session, though one has changed twice");
    for one in [&rich, &plain, &closed] {
        same_as_stored(&sql, &batch, one).await;
    }
    assert!(batch.rows[&key(&closed)].version > batch.rows[&key(&plain)].version);
    assert!(batch.reached.is_some() && batch.committed_at.is_some_and(|millis| millis > 1_700_000_000_000));
    slot.end().await;
}

#[tokio::test]
async fn a_stream_on_postgres_tells_of_a_change_what_its_tombstone_needs() {
    let sql = Sql::postgres().await;
    let mut slot = Slot::make(&sql).await;
    let (moved, gone) = (session(1_000), session(2_000));
    for one in [&moved, &gone] {
        sql.create(one.clone()).await;
    }
    slot.read().await;
    slot.run(&format!("UPDATE sessions SET created_at = 1500 WHERE id = '{}'", moved.id)).await;
    slot.delete(&gone.id).await;
    let batch = slot.read().await;
    let rows: HashMap<_, _> =
        batch.rows.iter().map(|(key, change)| (key.clone(), change.row.is_some())).collect();
    let now = Session { created_at: at(1_500), ..moved.clone() };
    assert_eq!(rows, HashMap::from([(key(&moved), false), (key(&now), true), (key(&gone), false)]));
    assert_eq!(batch.rows[&key(&moved)].version, batch.rows[&key(&now)].version);
    same_as_stored(&sql, &batch, &now).await;

    slot.run("TRUNCATE sessions CASCADE").await;
    let batch = slot.read().await;
    assert_eq!(batch.rows.len(), 0);
    let truncated = slot.truncated.expect("it is told");
    assert!(truncated.0 > RowVersion::new(Epoch(3), Lsn(0)).0);
    slot.end().await;
}

#[tokio::test]
async fn a_stream_on_postgres_leaves_out_what_is_stored_out_of_line_and_has_not_changed() {
    let sql = Sql::postgres().await;
    let mut slot = Slot::make(&sql).await;
    // Random, or it would be compressed and stay in the row.
    let noise: String =
        std::iter::repeat_with(|| uuid::Uuid::new_v4().simple().to_string()).take(500).collect();
    let Value::Object(metadata) = json!({ "noise": noise }) else { unreachable!("an object") };
    let large = Session { metadata: Some(metadata), ..session(1_000) };
    sql.create(large.clone()).await;
    let tag = async |tag: &str| {
        let patch = SessionPatch { tags: Some(words(&[tag])), ..SessionPatch::default() };
        sql.store.update_session(&sql.here, &large.id, patch, at(5_000)).await.expect("updated");
    };
    tag("first").await;
    let batch = slot.read().await;
    assert!(version_of(&batch, &large).is_whole(), "the insert is in the same batch");
    same_as_stored(&sql, &batch, &large).await;
    slot.run("UPDATE sessions SET updated_at = updated_at + 1").await;
    let mut batch = slot.read().await;
    let change = batch.rows.get_mut(&key(&large)).expect("the change");
    let row = change.row.as_mut().expect("a row");
    assert!(!row.is_whole());
    row.row(&here(&sql).await, change.version).expect_err("a column is missing");
    row.complete_from(&stored(&slot.connection, &large).await);
    same_as_stored(&sql, &batch, &large).await;
    slot.end().await;
}

#[tokio::test]
async fn a_stream_on_postgres_gives_each_chunk_of_a_large_transaction_a_version() {
    let sql = Sql::postgres().await;
    let mut slot = Slot::make(&sql).await;
    let rows = 2 * CHUNK + 500;
    let insert = format!(
        "INSERT INTO sessions (id, environment_id, kind, task_identifier, tags, current_run_id, created_at, updated_at) \
         SELECT 'session_' || n, '{HERE}', 'chat', 'agent', '[]', 'run_' || n, n, n FROM generate_series(1, {rows}) n"
    );
    slot.run(&insert).await;
    let batch = slot.read().await;
    let mut counts: HashMap<u64, u32> = HashMap::new();
    for change in batch.rows.values() {
        *counts.entry(change.version.0).or_default() += 1;
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_unstable();
    let first = counts[0].0;
    assert_eq!(counts, [(first, CHUNK), (first + 1, CHUNK), (first + 2, 500)]);
    slot.end().await;
}
