//! Rounds of chaos: whatever breaks between a Postgres and a ClickHouse, and in whatever order, in the end both say the same.
//!
//! `cargo xtask chaos` runs more of them, and longer ones. That they would find something is shown by the control in `kills`: a
//! source that confirms what is not stored loses changes there, of kills alone.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::sync::atomic::{AtomicUsize, Ordering};

use tempfile::TempDir;
use tokio::process::Child;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::compare::Differences;
use super::service::Installation;
use super::writers::Writer;
use super::*;
use crate::harness::Dice;
use crate::harness::clickhouse::{self, Engine};
use crate::harness::postgres_server::{PostgresServer, Shutdown};
use crate::harness::process::send;
use crate::harness::proxy::{FaultyInserts, SilentProxy};
use crate::harness::replication::{drop_slot, flushed};

/// How many rows change in a round at least.
const CHANGES: usize = 20_000;
/// How often each fault is made at least.
const TIMES: usize = 2;
/// Longest that a round waits for replicators, on a machine that does much else.
const PATIENCE: Duration = Duration::from_secs(120);
/// After how long Postgres takes the slot from a leader that is silent.
const SENDER_TIMEOUT: &str = "3s";
/// How long a writer rests between two changes, so that the machine has time for everybody else.
const REST: Duration = Duration::from_millis(20);
/// What the replicators are called.
const NAMES: [&str; 2] = ["one", "other"];
/// Lines of a replicator's log that are shown when a round fails.
const LINES: usize = 60;

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// kill -9 of a replicator.
    Kill,
    /// SIGSTOP of the leader until another one leads, then SIGCONT.
    Freeze,
    /// A fast restart of Postgres.
    Restart,
    /// An immediate restart of Postgres, or one after kill -9.
    Crash,
    /// kill -9 of ClickHouse.
    EngineKill,
    /// The connections of the leader to Postgres fall silent.
    SilentCut,
    /// The slot is dropped.
    NewEpoch,
}

impl Fault {
    const ALL: [Self; 7] = [
        Self::Kill,
        Self::Freeze,
        Self::Restart,
        Self::Crash,
        Self::EngineKill,
        Self::SilentCut,
        Self::NewEpoch,
    ];

    /// How often it is made in one pass: less often if it takes long.
    fn share(self) -> usize {
        match self {
            Self::Kill => 5,
            Self::EngineKill | Self::NewEpoch => 2,
            Self::Freeze | Self::Restart | Self::Crash | Self::SilentCut => 1,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kill => "kills of a replicator",
            Self::Freeze => "freezes of the leader",
            Self::Restart => "fast restarts of Postgres",
            Self::Crash => "immediate restarts of Postgres",
            Self::EngineKill => "kills of ClickHouse",
            Self::SilentCut => "silent cuts",
            Self::NewEpoch => "new epochs",
        })
    }
}

/// A process that replicates, by a way to Postgres of its own.
struct Replicator {
    way: SilentProxy,
    here: Installation,
    log: File,
    process: Child,
    /// Whether connections of the process lead nowhere. It is a while until it has given all of them up.
    is_cut: bool,
}

impl Replicator {
    /// Between the same as `direct`.
    async fn start(postgres: u16, direct: &Installation, log: File) -> Self {
        let way = SilentProxy::before(postgres).await;
        let here = Installation {
            postgres: direct.postgres.replace(&format!(":{postgres}/"), &format!(":{}/", way.port)),
            clickhouse: direct.clickhouse.clone(),
            slot: direct.slot.clone(),
            url: direct.url.clone(),
            data: tempfile::tempdir().expect("a folder"),
        };
        let process = run(&here, &log);
        Self { way, here, log, process, is_cut: false }
    }

    fn id(&self) -> u32 {
        self.process.id().expect("it runs")
    }

    async fn kill(&mut self) {
        self.process.kill().await.expect("killed");
    }

    fn start_again(&mut self) {
        (self.process, self.is_cut) = (run(&self.here, &self.log), false);
    }

    fn cut(&mut self) {
        self.way.cut();
        self.is_cut = true;
    }
}

fn run(here: &Installation, log: &File) -> Child {
    let log = || log.try_clone().expect("a log");
    let mut command = here.command();
    command.arg("replicate").env("SESSIOND_REPLICATION__WAL_SENDER_TIMEOUT", SENDER_TIMEOUT);
    command.stdout(log()).stderr(log()).spawn().expect("the binary starts")
}

/// What is broken, and what tells how it is.
struct Scene {
    postgres: PostgresServer,
    /// `None` while it is being started.
    engine: Option<Engine>,
    inserts: FaultyInserts,
    slot: Slot,
    /// Past the proxies.
    direct: Installation,
    replicators: [Replicator; 2],
    logs: TempDir,
    dice: Dice,
    /// What is left of a pass.
    due: Vec<Fault>,
    made: BTreeMap<Fault, usize>,
}

impl Scene {
    async fn set(seed: u64) -> (Self, Sql) {
        let (postgres, engine) = (PostgresServer::start(&[]).await, Engine::start());
        let sql = Sql::at(&postgres.url()).await;
        let (slot, inserts) = (Slot::named(&sql).await, FaultyInserts::of_all_kinds(&engine.url()).await);
        let direct = Installation {
            postgres: sql.database.url.clone(),
            clickhouse: clickhouse::connect(clickhouse::options(&engine.url())),
            slot: slot.name.clone(),
            url: inserts.url.clone(),
            data: tempfile::tempdir().expect("a folder"),
        };
        let logs = tempfile::tempdir().expect("a folder");
        let replicator = async |name: &str| {
            let log = File::options().create(true).append(true).open(logs.path().join(name)).expect("a log");
            Replicator::start(postgres.port(), &direct, log).await
        };
        let [one, other] = NAMES;
        let replicators = [replicator(one).await, replicator(other).await];
        let (dice, due, made) = (Dice::new(seed), Vec::new(), BTreeMap::new());
        let engine = Some(engine);
        (Self { postgres, engine, inserts, slot, direct, replicators, logs, dice, due, made }, sql)
    }

    /// The next fault, in an order that only the seed decides.
    fn draw(&mut self) -> Fault {
        if self.due.is_empty() {
            self.due = Fault::ALL.into_iter().flat_map(|fault| vec![fault; fault.share()]).collect();
            for place in (1..self.due.len()).rev() {
                self.due.swap(place, self.dice.roll(place + 1));
            }
        }
        self.due.pop().expect("it was filled")
    }

    /// Breaks one thing after the other until it is enough.
    async fn break_everything(&mut self, duration: Duration, changes: &AtomicUsize) {
        let begun = Instant::now();
        let is_enough = |made: &BTreeMap<Fault, usize>| {
            let often = Fault::ALL.iter().all(|fault| made.get(fault).is_some_and(|times| *times >= TIMES));
            often && begun.elapsed() >= duration && changes.load(Ordering::Relaxed) >= CHANGES
        };
        while !is_enough(&self.made) {
            let fault = self.draw();
            let now = begun.elapsed();
            self.make(fault).await;
            *self.made.entry(fault).or_default() += 1;
            let took = begun.elapsed() - now;
            println!(
                "{:5.1} s: {fault:?}, and it is led again after {:.2} s",
                now.as_secs_f64(),
                took.as_secs_f64()
            );
            // A time at random, and no event: whatever is under way then is what the next fault meets.
            sleep(Duration::from_millis(self.dice.roll(600) as u64)).await;
        }
    }

    /// Makes a fault, and waits until somebody leads.
    async fn make(&mut self, fault: Fault) {
        match fault {
            Fault::Kill => {
                let leader = self.led(|_| true).await;
                let killed = if self.dice.one_in(4) { 1 - leader } else { leader };
                self.amid_an_insert().await;
                self.replicators[killed].kill().await;
                self.replicators[killed].start_again();
            }
            Fault::Freeze => {
                let leader = self.busy_leader().await;
                let id = self.replicators[leader].id();
                send(id, libc::SIGSTOP);
                self.led(|now| now != leader).await;
                send(id, libc::SIGCONT);
            }
            Fault::Restart => {
                self.postgres.stop(Shutdown::Fast).await;
                self.postgres.start_again().await;
            }
            Fault::Crash => {
                let kills = self.dice.one_in(2);
                self.postgres.stop(if kills { Shutdown::Kill } else { Shutdown::Immediate }).await;
                self.postgres.start_again().await;
            }
            Fault::EngineKill => {
                self.amid_an_insert().await;
                let engine = self.engine.take().expect("it runs");
                let started = tokio::task::spawn_blocking(|| engine.restart()).await;
                self.engine = Some(started.expect("it starts"));
            }
            Fault::SilentCut => {
                let leader = self.busy_leader().await;
                self.replicators[leader].cut();
                self.led(|now| now != leader).await;
            }
            Fault::NewEpoch => {
                let before = self.epoch().await;
                drop_slot(&self.direct.postgres, &self.direct.slot).await;
                let anew = async {
                    while self.epoch().await <= before {
                        sleep(Duration::from_millis(20)).await;
                    }
                };
                timeout(PATIENCE, anew).await.expect("a new epoch");
            }
        }
        self.led(|_| true).await;
    }

    /// Which one leads, three times of four while an insert is under way, and while the other one could lead.
    async fn busy_leader(&mut self) -> usize {
        loop {
            let leader = self.led(|_| true).await;
            let follower = &mut self.replicators[1 - leader];
            if follower.is_cut {
                follower.kill().await;
                follower.start_again();
                *self.made.entry(Fault::Kill).or_default() += 1;
            }
            self.amid_an_insert().await;
            if self.leader().await == Some(leader) {
                return leader;
            }
        }
    }

    /// Waits three times of four until an insert is under way.
    async fn amid_an_insert(&mut self) {
        if !self.dice.one_in(4) {
            let mut inserts = self.inserts.watched();
            timeout(PATIENCE, inserts.wait_for(|open| *open > 0)).await.expect("an insert").expect("it runs");
        }
    }

    /// Waits until a replicator reads the slot that is wanted; which one.
    async fn led(&mut self, is_wanted: impl Fn(usize) -> bool) -> usize {
        let begun = Instant::now();
        loop {
            if let Some(leader) = self.leader().await.filter(|leader| is_wanted(*leader)) {
                return leader;
            }
            self.supervise();
            assert!(begun.elapsed() < PATIENCE, "nobody leads");
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// As whoever runs replicators does: one that finds no Postgres when it begins is begun again. No other one ends.
    fn supervise(&mut self) {
        for (replicator, name) in self.replicators.iter_mut().zip(NAMES) {
            let Some(ended) = replicator.process.try_wait().expect("a child") else { continue };
            let log = fs::read_to_string(self.logs.path().join(name)).expect("a log");
            let last = log.lines().last().unwrap_or_default();
            assert!(last.contains(" the metadata store: "), "it has ended by itself, {ended}: {last}");
            replicator.start_again();
        }
    }

    async fn leader(&self) -> Option<usize> {
        let query = "SELECT r.client_port::text AS port FROM pg_replication_slots s \
                     JOIN pg_stat_replication r ON r.pid = s.active_pid WHERE s.slot_name";
        let port = self.asked(&format!("{query} = '{}'", self.slot.name)).await?.parse().expect("a port");
        self.replicators.iter().position(|replicator| replicator.way.is_seen_at(port))
    }

    /// 0 before the first one.
    async fn epoch(&self) -> u8 {
        let query = format!("SELECT epoch::text FROM replication WHERE slot = '{}'", self.slot.name);
        self.asked(&query).await.map_or(0, |epoch| epoch.parse().expect("an epoch"))
    }

    /// The only text that a query gives. Connections that a restart has ended are replaced.
    async fn asked(&self, query: &str) -> Option<String> {
        let row =
            self.slot.connection.query_one_raw(Statement::from_string(DbBackend::Postgres, query)).await;
        row.expect("asked")?.try_get_by_index::<Option<String>>(0).expect("text")
    }

    /// Leaves one replicator alone, waits until it has done its work, and compares.
    async fn settle(&mut self) -> Differences {
        self.inserts.stop_failing();
        let leader = self.led(|_| true).await;
        self.replicators[1 - leader].kill().await;
        let place = flushed(&self.slot.connection).await;
        let passed = format!("confirmed_flush_lsn >= '{place}'");
        let caught_up = async {
            while self.slot.text(&passed).await != "true" {
                sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(PATIENCE, caught_up).await.expect("all of it is stored");
        let is_well = |seen: &Value| seen["phase"] == "streaming" && seen["problems"] == json!([]);
        self.direct.wait_for("all is well", is_well).await;
        Differences::between(&self.slot.connection, &self.direct.clickhouse).await
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for name in NAMES {
            let text = fs::read_to_string(self.logs.path().join(name)).unwrap_or_default();
            let lines: Vec<_> = text.lines().collect();
            println!("the log of the {name} replicator ends so:");
            for line in &lines[lines.len().saturating_sub(LINES)..] {
                println!("  {line}");
            }
        }
    }
}

/// Makes changes until it is told to end, whatever becomes of the server. Counts the rows, and what has failed.
async fn write(
    mut writer: Writer<'_>,
    changes: &AtomicUsize,
    failures: &AtomicUsize,
    stop: &CancellationToken,
) {
    while !stop.is_cancelled() {
        match writer.change().await {
            Ok(changed) => changes.fetch_add(changed, Ordering::Relaxed),
            Err(_) => failures.fetch_add(1, Ordering::Relaxed),
        };
        sleep(REST).await;
    }
}

/// A number from the environment.
fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect(name))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_breaks_nothing_is_missing_stale_or_left_over_on_postgres_and_clickhouse() {
    let duration = Duration::from_secs(setting("SESSIOND_TEST_CHAOS_SECONDS", 60));
    let seed = setting("SESSIOND_TEST_CHAOS_SEED", 1);
    let begun = Instant::now();
    let (mut scene, sql) = Scene::set(seed).await;
    let (stop, changes, failures) = (CancellationToken::new(), AtomicUsize::new(0), AtomicUsize::new(0));
    let mut writers = Vec::new();
    for number in 1..4 {
        let writer = Writer::new(&sql, 10 * seed + number, &format!("kind-{number}")).await;
        writers.push(write(writer, &changes, &failures, &stop));
    }
    let breaking = async {
        scene.break_everything(duration, &changes).await;
        stop.cancel();
    };
    tokio::join!(futures_util::future::join_all(writers), breaking);
    let differences = scene.settle().await;
    let (changes, failures) = (changes.into_inner(), failures.into_inner());
    println!(
        "chaos, seed {seed}: {changes} rows changed and {failures} changes failed in {:?}",
        begun.elapsed()
    );
    for (fault, times) in &scene.made {
        println!("{times:6} {fault}");
    }
    for (what, times) in scene.inserts.counts() {
        println!("{times:6} {what}");
        assert!(times > 0, "{what}");
    }
    println!("{differences}, under epoch {}", scene.epoch().await);
    assert_eq!(differences, Differences::default());
    assert!(Fault::ALL.iter().all(|fault| scene.made[fault] > 0), "{:?}", scene.made);
}
