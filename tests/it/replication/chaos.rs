//! Everything breaks at once, and not a column of a session may differ in the end.
//!
//! `cargo xtask chaos` runs more and longer rounds (`SESSIOND_CHAOS_ROUNDS`, `SESSIOND_CHAOS_SECONDS`, `SESSIOND_CHAOS_SEED`).

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use sea_orm::{ConnectionTrait, Database};

use super::world::World;
use crate::harness::Process;
use crate::harness::clickhouse::{Engine, config};
use crate::harness::postgres::{Cluster, Shutdown};
use crate::harness::rough::{RoughProxy, Weather};

const WRITERS: usize = 3;
/// Sessions that each writer works on.
const SESSIONS: u64 = 400;
const REPLICAS: usize = 2;

/// Random numbers that are the same for a seed (xorshift).
#[derive(Clone)]
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % sides
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().expect(name))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_missing_stale_or_left_over_after_everything_has_broken() {
    let rounds = setting("SESSIOND_CHAOS_ROUNDS", 1);
    let seconds = setting("SESSIOND_CHAOS_SECONDS", 20);
    let seed = setting("SESSIOND_CHAOS_SEED", u64::from(uuid::Uuid::new_v4().as_fields().0));
    let mut bad = 0;
    for number in 0..rounds {
        let seed = seed + number;
        let outcome = Round::new(seed).await.run(Duration::from_secs(seconds)).await;
        bad += usize::from(!outcome.differences.is_empty());
        println!(
            "round {}: seed {seed}, {} writes, {} sessions, {} kills, {} other faults, {} crashes of ClickHouse, {} differences {:?}",
            number + 1,
            outcome.writes,
            outcome.sessions,
            outcome.kills,
            outcome.faults,
            outcome.crashes,
            outcome.differences.len(),
            outcome.differences.iter().take(5).collect::<Vec<_>>(),
        );
    }
    assert_eq!(bad, 0, "rounds with differences, of {rounds}");
}

struct Outcome {
    writes: usize,
    sessions: usize,
    kills: usize,
    faults: usize,
    crashes: usize,
    differences: Vec<String>,
}

struct Round {
    dice: Dice,
    world: World,
    cluster: Cluster,
    postgres_proxy: RoughProxy,
    clickhouse_proxy: RoughProxy,
    engine: Option<Engine>,
    folder: tempfile::TempDir,
    replicas: Vec<Child>,
    kills: usize,
    faults: usize,
    crashes: usize,
}

impl Round {
    async fn new(seed: u64) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let cluster = Cluster::start().await;
        let engine = Engine::start(folder.path(), 0);
        let world = World::at(&cluster.url(), config(&engine.url())).await;
        let postgres_proxy = RoughProxy::before(cluster.port()).await;
        let clickhouse_proxy = RoughProxy::before(engine.port()).await;
        let mut round = Self {
            dice: Dice(seed | 1),
            world,
            cluster,
            postgres_proxy,
            clickhouse_proxy,
            engine: Some(engine),
            folder,
            replicas: Vec::new(),
            kills: 0,
            faults: 0,
            crashes: 0,
        };
        for _ in 0..REPLICAS {
            round.start_replica();
        }
        round
    }

    fn start_replica(&mut self) {
        let settings = [
            ("METADATA__URL", self.cluster.url_at(self.postgres_proxy.port)),
            ("AUTH__MASTER_KEY", "0f".repeat(32)),
            ("CLICKHOUSE__URL", format!("http://127.0.0.1:{}", self.clickhouse_proxy.port)),
            (
                "CLICKHOUSE__DATABASE",
                self.world.clickhouse.table().split('.').next().expect("a database").to_owned(),
            ),
            ("REPLICATION__SLOT", self.world.config.slot.clone()),
            ("REPLICATION__PUBLICATION", self.world.config.publication.clone()),
            ("REPLICATION__LEADER_TIMEOUT", "3s".to_owned()),
            ("REPLICATION__RETRY_INTERVAL", "100ms".to_owned()),
            ("REPLICATION__HEARTBEAT", "500ms".to_owned()),
            ("REPLICATION__BATCH_ROWS", "200".to_owned()),
            ("TELEMETRY__LOG", "off".to_owned()),
        ];
        let mut command = Command::new(Process::binary());
        command.arg("--data").arg(self.folder.path().join("replica")).arg("replicate");
        for (name, value) in settings {
            command.env(format!("SESSIOND_{name}"), value);
        }
        let log = std::env::var_os("SESSIOND_CHAOS_LOG");
        if let Some(log) = log {
            let file =
                std::fs::OpenOptions::new().create(true).append(true).open(Path::new(&log)).expect("a log");
            command.env("SESSIOND_TELEMETRY__LOG", "sessiond=info,pgwire_replication=warn").stderr(file);
        } else {
            command.stderr(Stdio::null());
        }
        self.replicas.push(command.stdout(Stdio::null()).spawn().expect("a replica"));
    }

    async fn run(mut self, time: Duration) -> Outcome {
        let over = Arc::new(AtomicBool::new(false));
        let writes = Arc::new(AtomicUsize::new(0));
        let writers: Vec<_> = (0..WRITERS)
            .map(|number| {
                let (url, over, writes) = (self.cluster.url(), over.clone(), writes.clone());
                let dice = Dice(self.dice.roll(u64::MAX >> 12) | 1);
                tokio::spawn(write(url, number, dice, over, writes))
            })
            .collect();
        let began = Instant::now();
        // Every round meets each fault; in which order is the seed's.
        let mut faults: Vec<u64> = (0..7).collect();
        for at in (1..faults.len()).rev() {
            faults.swap(at, usize::try_from(self.dice.roll(at as u64 + 1)).expect("small"));
        }
        while began.elapsed() < time || !faults.is_empty() {
            tokio::time::sleep(Duration::from_millis(500 + self.dice.roll(500))).await;
            self.supervise();
            self.kill_leader().await;
            match faults.pop() {
                Some(fault) => self.fault(fault).await,
                None => {
                    let fault = self.dice.roll(7);
                    self.fault(fault).await;
                }
            }
        }
        self.postgres_proxy.set(Weather::Fine);
        self.clickhouse_proxy.set(Weather::Fine);
        over.store(true, Ordering::Relaxed);
        for writer in writers {
            writer.await.expect("no panic");
        }
        self.world.connection = Database::connect(self.cluster.url()).await.expect("connects");
        let world = self.world.clone();
        let arrived = world.catch_up();
        tokio::pin!(arrived);
        while tokio::time::timeout(Duration::from_millis(200), &mut arrived).await.is_err() {
            self.supervise();
        }
        let differences = self.world.differences().await;
        let sessions =
            self.world.text("SELECT count(*)::text FROM sessions").await.parse().expect("a number");
        for replica in &mut self.replicas {
            let _ = replica.kill();
            let _ = replica.wait();
        }
        Outcome {
            writes: writes.load(Ordering::Relaxed),
            sessions,
            kills: self.kills,
            faults: self.faults,
            crashes: self.crashes,
            differences,
        }
    }

    /// Starts a ClickHouse again that has ended by itself, as whatever looks after a server does: the library aborts now and
    /// then when a connection breaks in the middle of a request. A replica never ends by itself.
    fn supervise(&mut self) {
        if let Some(engine) = self.engine.take_if(|engine| engine.ended().is_some()) {
            self.crashes += 1;
            self.engine = Some(Engine::start(self.folder.path(), engine.port()));
        }
        for replica in &mut self.replicas {
            assert!(replica.try_wait().expect("a child of ours").is_none(), "a replica has ended by itself");
        }
    }

    /// Whoever leads, by the state row.
    async fn leader(&self) -> Option<usize> {
        let connection = Database::connect(self.cluster.url()).await.ok()?;
        let statement = sea_orm::Statement::from_string(
            sea_orm::DbBackend::Postgres,
            "SELECT coalesce(max(leader), '') FROM replication_state",
        );
        let leader: String = connection.query_one_raw(statement).await.ok()??.try_get_by_index(0).ok()?;
        let id: u32 = leader.rsplit('/').next()?.parse().ok()?;
        self.replicas.iter().position(|replica| replica.id() == id)
    }

    async fn kill_leader(&mut self) {
        if let Some(at) = self.leader().await {
            let mut replica = self.replicas.swap_remove(at);
            replica.kill().expect("killed");
            replica.wait().expect("gone");
            self.kills += 1;
            self.start_replica();
        }
    }

    async fn fault(&mut self, fault: u64) {
        self.faults += 1;
        match fault {
            0 => self.clickhouse_for(Weather::Cutting, 3000).await,
            1 => self.clickhouse_for(Weather::Slow, 2000).await,
            2 => {
                let engine = self.engine.take().expect("it runs");
                let port = engine.port();
                engine.kill();
                tokio::time::sleep(Duration::from_millis(self.dice.roll(1500))).await;
                self.engine = Some(Engine::start(self.folder.path(), port));
            }
            3 => self.cluster.restart(Shutdown::Fast).await,
            4 => self.cluster.restart(Shutdown::Immediate).await,
            5 => {
                // Longer than a leader may be silent, so that it wakes up as one that leads no more.
                if let Some(at) = self.leader().await {
                    let id = self.replicas[at].id().to_string();
                    signal("STOP", &id);
                    tokio::time::sleep(Duration::from_millis(4500)).await;
                    signal("CONT", &id);
                }
            }
            _ => {
                self.postgres_proxy.set(Weather::Silent);
                tokio::time::sleep(Duration::from_millis(4500)).await;
                self.postgres_proxy.set(Weather::Fine);
            }
        }
    }

    async fn clickhouse_for(&self, weather: Weather, millis: u64) {
        self.clickhouse_proxy.set(weather);
        tokio::time::sleep(Duration::from_millis(millis)).await;
        self.clickhouse_proxy.set(Weather::Fine);
    }
}

impl Drop for Round {
    fn drop(&mut self) {
        for replica in &mut self.replicas {
            let _ = replica.kill();
            let _ = replica.wait();
        }
    }
}

fn signal(name: &str, id: &str) {
    let _ = Command::new("kill").args(["-s", name, id]).status();
}

/// Writes until it is over, through whatever Postgres does.
async fn write(url: String, number: usize, mut dice: Dice, over: Arc<AtomicBool>, writes: Arc<AtomicUsize>) {
    while !over.load(Ordering::Relaxed) {
        let Ok(connection) = Database::connect(&url).await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        while !over.load(Ordering::Relaxed) {
            match connection.execute_unprepared(&statement(number, &mut dice)).await {
                Ok(_) => drop(writes.fetch_add(1, Ordering::Relaxed)),
                Err(error) if error.to_string().contains("violates") => panic!("{error}"),
                Err(_) => break,
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// One transaction. What writes a session again changes something, so that a stale version shows.
fn statement(writer: usize, dice: &mut Dice) -> String {
    let id = format!("session_w{writer}_{:04}", dice.roll(SESSIONS));
    let upsert = |ids: &str, metadata: &str| {
        format!(
            "INSERT INTO sessions (id, environment_id, kind, task_identifier, tags, metadata, current_run_id, created_at, updated_at) \
             SELECT {ids}, 'env_here', 'chat', 'agent', '[\"a\"]', {metadata}, 'run', 1700000000000 + hashtext({ids}), 1 \
             ON CONFLICT (id) DO UPDATE SET kind = 'again', updated_at = sessions.updated_at + 1, metadata = excluded.metadata"
        )
    };
    let large = "(SELECT jsonb_build_object('text', string_agg(md5(random()::text), '')) FROM generate_series(1, 300))";
    match dice.roll(100) {
        0..30 => upsert(&format!("'{id}'"), "jsonb_build_object('n', random())"),
        30..35 => upsert(&format!("'{id}'"), large),
        35..65 => format!(
            "UPDATE sessions SET updated_at = updated_at + 1, kind = 'k' || (random() * 1000)::int WHERE id = '{id}'"
        ),
        65..73 => format!(
            "UPDATE sessions SET closed_at = 5, closed_reason = 'r' || random(), updated_at = updated_at + 1 WHERE id = '{id}'"
        ),
        73..83 => format!("DELETE FROM sessions WHERE id = '{id}'"),
        83..88 => format!(
            "UPDATE sessions SET created_at = created_at + 86400000 * 40 WHERE id = '{id}' AND created_at < 1800000000000"
        ),
        88..92 => format!(
            "UPDATE sessions SET environment_id = CASE environment_id WHEN 'env_here' THEN 'env_elsewhere' ELSE 'env_here' END, \
             updated_at = updated_at + 1 WHERE id = '{id}'"
        ),
        92..97 => {
            let from = dice.roll(SESSIONS - 100);
            format!(
                "BEGIN; INSERT INTO sessions (id, environment_id, kind, task_identifier, tags, current_run_id, created_at, updated_at) \
                 SELECT 'session_w{writer}_' || lpad(n::text, 4, '0'), 'env_here', 'many', 'agent', '[]', 'run', 1700000000000 + n, 1 \
                 FROM generate_series({from}, {from} + 99) AS n \
                 ON CONFLICT (id) DO UPDATE SET kind = 'many', updated_at = sessions.updated_at + 1; \
                 UPDATE sessions SET updated_at = updated_at + 1 WHERE id = '{id}'; COMMIT"
            )
        }
        _ => format!(
            "BEGIN; DELETE FROM sessions WHERE id = '{id}'; {}; COMMIT",
            upsert(&format!("'{id}'"), "'{\"back\": true}'")
        ),
    }
}
