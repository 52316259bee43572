//! Much at once: long transactions, much of others' in the log, and a ClickHouse that takes nothing for a while.

use std::sync::atomic::AtomicUsize;

use sessiond::replication::leader::{Replicator, ReplicatorOptions};
use sessiond::store::index::clickhouse::ClickHouse;
use tokio_util::sync::CancellationToken;

use super::service::Installation;
use super::term::World;
use super::writers::changing;
use super::*;
use crate::harness::clickhouse::{self, Engine, connect, options};
use crate::harness::replication::{context, drop_slot, flushed, slot_name, term_options};

/// Rows, of one transaction or of many.
const MANY: u32 = 50_000;
/// What a replicator may take in memory whatever happens, in KiB.
const MEMORY: usize = 250 << 10;

fn inserts(first: u32, last: u32, metadata: &str) -> String {
    format!(
        "INSERT INTO sessions (id, environment_id, kind, task_identifier, tags, metadata, current_run_id, created_at, updated_at) \
         SELECT 'session_' || lpad(n::text, 6, '0'), '{HERE}', 'chat', 'agent', '[\"a\"]', {metadata}, 'run_' || n, n, n \
         FROM generate_series({first}, {last}) n"
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_thousand_rows_of_one_transaction_on_postgres_are_all_there() {
    let mut world = World::fresh().await;
    world.options.flush_rows = 1_000;
    let running = world.lead(&world.clickhouse, |source| Box::new(source)).await;
    world.slot.run(&inserts(1, MANY, "NULL")).await;
    world.slot.run("UPDATE sessions SET tags = '[\"b\"]'").await;
    world.caught_up().await;
    world.assert_same().await;

    // What others write keeps nothing either.
    world
        .slot
        .run("CREATE TABLE noise AS SELECT md5(n::text) || repeat('x', 960) AS text FROM generate_series(1, 65536) n")
        .await;
    world.slot.wait_for("pg_current_wal_flush_lsn() - confirmed_flush_lsn < 1048576").await;
    running.end().await;
    world.slot.wait_for("NOT active").await;
    world.slot.end().await;
}

/// A replicator into a database of its own, that flushes so many rows at once.
async fn replicating(
    sql: &Sql,
    flush_rows: usize,
) -> (ClickHouse, String, tokio::sync::watch::Receiver<Lsn>, CancellationToken) {
    let (clickhouse, slot) = (connect(options(&clickhouse::url())), slot_name());
    let url = SecretString::from(sql.database.url.clone());
    let options = ReplicatorOptions {
        source: SourceOptions::new(&url, &slot, "ours").expect("a URL"),
        term: sessiond::replication::term::TermOptions { flush_rows, ..term_options(&slot) },
        poll: Duration::from_millis(50),
        longest_pause: Duration::from_millis(200),
    };
    let replicator = Replicator::new(options, context(&sql.store, &clickhouse));
    let (reached, stop) = (replicator.reached(), CancellationToken::new());
    let stopped = stop.clone();
    tokio::spawn(async move { replicator.run(stopped).await });
    // From the beginning on, so that both are told the same.
    let mut begun = reached.clone();
    timeout(PATIENCE, begun.wait_for(|reached| reached.0 > 0)).await.expect("in time").expect("it runs");
    (clickhouse, slot, reached, stop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_size_of_batches_on_postgres_changes_nothing_in_the_table() {
    let sql = Sql::postgres().await;
    let [small, large] = [replicating(&sql, 7).await, replicating(&sql, 1_000).await];
    let (stop, changes) = (CancellationToken::new(), AtomicUsize::new(0));
    let ending = async {
        while changes.load(std::sync::atomic::Ordering::Relaxed) < 3_000 {
            sleep(Duration::from_millis(20)).await;
        }
        stop.cancel();
    };
    tokio::join!(changing(&sql, &changes, &stop), ending);
    let place = flushed(&sql.database.connect().await).await;
    let mut tables = Vec::new();
    for (clickhouse, _, reached, _) in [&small, &large] {
        let mut reached = reached.clone();
        timeout(PATIENCE, reached.wait_for(|reached| *reached >= place))
            .await
            .expect("in time")
            .expect("it runs");
        // With its versions and its tombstones.
        let rows = "SELECT session_id, created_at, argMax(tuple(*, _version, _is_deleted), _version)::String AS row \
                    FROM sessions_v1 GROUP BY session_id, created_at ORDER BY session_id, created_at";
        let rows: Vec<(String, i64, String)> = clickhouse::select(
            clickhouse,
            &format!("SELECT session_id, toUnixTimestamp64Milli(created_at), row FROM ({rows})"),
        )
        .await;
        assert!(rows.len() > 100, "{}", rows.len());
        tables.push(rows);
    }
    assert_eq!(tables[0], tables[1]);
    for (_, slot, _, stop) in [small, large] {
        stop.cancel();
        drop_slot(&sql.database.url, &slot).await;
    }
}

/// Of a Postgres, and an engine of its own.
fn between(sql: &Sql, engine: &Engine) -> Installation {
    Installation {
        postgres: sql.database.url.clone(),
        clickhouse: connect(options(&engine.url())),
        slot: slot_name(),
        url: engine.url(),
        data: tempfile::tempdir().expect("a folder"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clickhouse_that_is_frozen_costs_no_memory_and_no_connection_to_postgres() {
    // A round of what each row has: 16 KiB, most of which compresses well where it is stored.
    const METADATA: &str = "jsonb_build_object('noise', repeat(md5(n::text), 512))";
    let (sql, engine) = (Sql::postgres().await, Engine::start());
    let here = between(&sql, &engine);
    let slot = Slot { name: here.slot.clone(), ..Slot::named(&sql).await };
    let replicator = here.replicate();
    let process = replicator.id().expect("it runs");
    here.wait_for("it streams", |seen| seen["phase"] == "streaming").await;
    let reader = slot.text("active_pid").await;
    engine.signal("STOP");
    for first in (1..MANY).step_by(1_000) {
        slot.run(&inserts(first, first + 999, METADATA)).await;
    }
    here.wait_for("it is told", |seen| seen["problems"].to_string().contains("has stored nothing for")).await;
    engine.signal("CONT");
    let place = flushed(&slot.connection).await;
    let caught_up = async {
        while slot.text(&format!("confirmed_flush_lsn >= '{place}'")).await != "true" {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(Duration::from_secs(120), caught_up).await.expect("all of it is stored");
    let peak = memory(process, "VmHWM");
    println!("{peak} KiB at most");
    assert!(peak < MEMORY, "{peak} KiB");
    assert_eq!(slot.text("active_pid").await, reader, "the stream has not been begun anew");
    let query =
        "SELECT md5(string_agg(id || md5(metadata ->> 'noise'), ',' ORDER BY id)) AS sum FROM sessions";
    let row = slot.connection.query_one_raw(Statement::from_string(DbBackend::Postgres, query)).await;
    let ours: String = row.expect("asked").expect("a row").try_get("", "sum").expect("text");
    let query = "SELECT lower(hex(MD5(arrayStringConcat(arraySort(groupArray(session_id || \
                 lower(hex(MD5(JSONExtractString(document, 'metadata', 'noise')))))), ',')))) FROM sessions_v1 FINAL";
    let theirs: Vec<String> = clickhouse::select(&here.clickhouse, query).await;
    assert_eq!(theirs, [ours]);
    drop(replicator);
    here.end().await;
}

/// A line of a process's status, in KiB.
fn memory(process: u32, line: &str) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).expect("a running process");
    let line = status.lines().find_map(|text| text.strip_prefix(line)).expect("a line");
    line.trim_start_matches(':').trim_end_matches("kB").trim().parse().expect("a number")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clickhouse_that_is_away_for_long_costs_postgres_no_more_log_than_it_may() {
    let (sql, engine) = (Sql::postgres().await, Engine::start());
    let here = between(&sql, &engine);
    let slot = Slot { name: here.slot.clone(), ..Slot::named(&sql).await };
    let replicator = here.command().env("SESSIOND_REPLICATION__MAX_WAL", "33554432").arg("replicate").spawn();
    let replicator = replicator.expect("the binary starts");
    here.wait_for("it streams", |seen| seen["phase"] == "streaming").await;
    engine.signal("STOP");
    slot.run(&inserts(1, 1_000, "NULL")).await;
    slot.run("CREATE TABLE noise AS SELECT md5(n::text) || repeat('x', 960) AS text FROM generate_series(1, 40000) n").await;
    let gone = |seen: &Value| seen["phase"] == "overrun" && seen["retainedBytes"].is_null();
    let seen = here.wait_for("the slot is dropped", gone).await;
    assert!(seen["problems"].to_string().contains("replication.max_wal"), "{seen}");
    slot.run("UPDATE sessions SET tags = '[\"b\"]'").await;
    engine.signal("CONT");
    let whole = |seen: &Value| seen["phase"] == "streaming" && seen["problems"] == json!([]);
    let seen = here.wait_for("everything is copied", whole).await;
    assert_eq!(seen["epoch"], 2);
    let copied: Vec<u64> =
        clickhouse::select(&here.clickhouse, "SELECT count() FROM sessions_v1 FINAL WHERE tags = ['b']")
            .await;
    assert_eq!(copied, [1_000]);
    drop(replicator);
    here.end().await;
}
