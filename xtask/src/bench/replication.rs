//! Sessions on Postgres, lists from ClickHouse: how soon a write is listed, how fast a backlog drains, how long a page of
//! millions takes. The engine is the one that the tests use.

use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::Value;

use super::http;
use super::ours::{KEY, base_url};
use super::report::{Metric, OURS, Sample, Table};
use super::rows::{Bench, fresh};
use super::server::Server;
use super::stats::Latency;
use crate::clickhouse::{self, ClickHouse};
use crate::postgres::Postgres;
use crate::process;
use crate::workspace::Workspace;

/// Writes a second of the freshness rows.
const RATES: [u64; 2] = [100, 1000];
/// Connections that write.
const WRITERS: u64 = 8;
/// Connections that each wait for one session at a time to be listed.
const WATCHERS: u64 = 4;
/// Sessions that wait in the slot for the drain row.
const BACKLOG: u64 = 200_000;
/// Longest a session may take to be listed.
const NEVER: Duration = Duration::from_secs(30);
/// What the system whose API we speak is set up as by default, as far as it says how fresh lists are: a flush a second, of
/// 100 rows, one at a time.
const ORIGINAL: &str = "set up as the original";
const PLAIN: &str = "plain FINAL";
/// Requests before those that are timed, and the most that are.
const WARM: usize = 3;
const REQUESTS: usize = 60;

/// Name of a freshness row.
pub(crate) fn freshness(rate: u64) -> String {
    format!("{rate} writes/s")
}

/// The drain row.
pub(crate) const DRAIN: &str = "200,000 sessions in the slot";

/// Both databases, for one row.
struct Backends {
    postgres: Postgres,
    clickhouse: ClickHouse,
    binary: PathBuf,
    home: PathBuf,
}

impl Backends {
    fn start(workspace: &Workspace, binary: &Path, home: PathBuf) -> anyhow::Result<Self> {
        Ok(Self {
            postgres: Postgres::start()?,
            clickhouse: ClickHouse::start(&clickhouse::install(workspace)?)?,
            binary: binary.to_owned(),
            home,
        })
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.arg("--data").arg(self.home.join("data")).args(arguments);
        command
            .env("SESSIOND_SECRET_KEY", KEY)
            .env("SESSIOND_AUTH__MASTER_KEY", "0f".repeat(32))
            .env("SESSIOND_HTTP__RATE_LIMIT__KEY_PER_10S", "0")
            .env("SESSIOND_METADATA__URL", self.postgres.url())
            .env("SESSIOND_METADATA__CONNECTIONS", "16")
            .env("SESSIOND_CLICKHOUSE__URL", self.clickhouse.url())
            .env("SESSIOND_REPLICATION__ENABLED", "true");
        command
    }

    fn serve(&self, original: bool) -> anyhow::Result<Server> {
        let mut command = self.command(&["serve", "--listen", "127.0.0.1:0"]);
        if original {
            command
                .env("SESSIOND_REPLICATION__LINGER", "1s")
                .env("SESSIOND_REPLICATION__BATCH_ROWS", "100")
                .env("SESSIOND_REPLICATION__CONCURRENCY", "1");
        }
        Server::start(&mut command, &self.home, base_url)
    }

    /// What a statement prints.
    fn psql(&self, sql: &str) -> anyhow::Result<String> {
        let mut psql = Command::new(self.postgres.binaries().join("psql"));
        psql.args(["-qAt", "-v", "ON_ERROR_STOP=1", "-c", sql]).arg(self.postgres.url());
        process::answer(&mut psql).with_context(|| format!("psql failed: {sql}"))
    }

    /// What a query of ClickHouse answers.
    fn ask(&self, sql: &str) -> anyhow::Result<String> {
        let address: SocketAddr = self.clickhouse.url().trim_start_matches("http://").parse()?;
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(600)))?;
        let length = sql.len().to_string();
        let mut request = http::request(
            "POST /?max_execution_time=600",
            address,
            &[("Content-Length", &length), ("Connection", "close")],
        );
        request.extend_from_slice(sql.as_bytes());
        let (status, body) = http::exchange(&mut stream, &request)?;
        let text = String::from_utf8_lossy(&body).trim().to_owned();
        ensure!(status == 200, "ClickHouse answered {status}: {text}");
        Ok(text)
    }
}

fn bearer() -> String {
    format!("Bearer {KEY}")
}

fn create(address: SocketAddr, name: &str) -> Vec<u8> {
    let body =
        format!(r#"{{"type":"bench","externalId":"{name}","tags":["bench"],"taskIdentifier":"bench"}}"#);
    let length = body.len().to_string();
    let headers = [
        ("Authorization", bearer()),
        ("Content-Type", "application/json".to_owned()),
        ("Content-Length", length),
    ];
    let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let mut request = http::request("POST /api/v1/sessions", address, &headers);
    request.extend_from_slice(body.as_bytes());
    request
}

fn list(address: SocketAddr, query: &str, key: &str) -> Vec<u8> {
    let query = query.replace('[', "%5B").replace(']', "%5D");
    let bearer = format!("Bearer {key}");
    http::request(&format!("GET /api/v1/sessions?{query}"), address, &[("Authorization", &bearer)])
}

fn page(stream: &mut TcpStream, request: &[u8]) -> anyhow::Result<Value> {
    let (status, body) = http::exchange(stream, request)?;
    ensure!(status == 200, "a list answered {status}: {}", String::from_utf8_lossy(&body));
    Ok(serde_json::from_slice(&body)?)
}

impl Bench<'_> {
    /// From the request of a create to the first list that shows it, without a token.
    pub(crate) fn freshness(&mut self, workspace: &Workspace, binary: &Path) -> anyhow::Result<()> {
        for rate in RATES {
            for (name, original) in [(OURS, false), (ORIGINAL, true)] {
                let backends = Backends::start(workspace, binary, fresh(&self.home, "replication")?)?;
                let server = backends.serve(original)?;
                until_listed(&server)?;
                let latency = watch(&server, rate, self.time.max(Duration::from_secs(10)))?;
                let spread = latency.spread()?;
                self.samples.push(Sample {
                    table: Table::Freshness,
                    row: freshness(rate),
                    server: name.to_owned(),
                    values: vec![(Metric::P50, spread.p50), (Metric::P99, spread.p99)],
                });
            }
        }
        Ok(())
    }

    /// Rows a second from a slot that has been waiting.
    pub(crate) fn drain(&mut self, workspace: &Workspace, binary: &Path) -> anyhow::Result<()> {
        let backends = Backends::start(workspace, binary, fresh(&self.home, "replication")?)?;
        let server = backends.serve(false)?;
        until_listed(&server)?;
        drop(server);
        let environment = backends.psql("SELECT id FROM environments LIMIT 1")?;
        // Transactions of 200, as a busy server's group commits come.
        let insert = format!(
            "DO $$ BEGIN FOR part IN 0..{parts} LOOP INSERT INTO sessions (id, environment_id, external_id, kind, \
             task_identifier, tags, metadata, current_run_id, created_at, updated_at) SELECT 'session_' || lpad(n::text, 26, '0'), \
             '{environment}', 'backlog-' || n, 'bench', 'bench', '[\"bench\", \"drain\"]', '{{\"user\": \"someone\", \"plan\": \"pro\"}}', \
             'run_' || n, 1700000000000 + n, 1700000000000 + n FROM generate_series(part * 200 + 1, part * 200 + 200) AS n; COMMIT; \
             END LOOP; END $$",
            parts = BACKLOG / 200 - 1,
        );
        backends.psql(&insert)?;
        let mut replicator = Replicator::start(&backends)?;
        let count = format!("SELECT count() FROM {TABLE} WHERE task_identifier = 'bench'");
        let leads = || backends.psql("SELECT count(*) FROM pg_replication_slots WHERE active");
        while leads()? != "1" {
            replicator.check()?;
            thread::sleep(Duration::from_millis(5));
        }
        let began = Instant::now();
        while backends.ask(&count)?.parse::<u64>()? < BACKLOG + 1 {
            replicator.check()?;
            ensure!(began.elapsed() < Duration::from_secs(300), "the backlog does not drain");
            thread::sleep(Duration::from_millis(20));
        }
        let rate = BACKLOG as f64 / began.elapsed().as_secs_f64();
        self.samples.push(Sample {
            table: Table::Drain,
            row: DRAIN.to_owned(),
            server: OURS.to_owned(),
            values: vec![(Metric::PerSecond, rate)],
        });
        Ok(())
    }

    /// Pages, counts and tags over HTTP and GraphQL, beside plain `FINAL` asked of ClickHouse itself.
    pub(crate) fn scale(
        &mut self,
        workspace: &Workspace,
        binary: &Path,
        sessions: u64,
    ) -> anyhow::Result<()> {
        let backends = Backends::start(workspace, binary, fresh(&self.home, "replication")?)?;
        let server = backends.serve(false)?;
        until_listed(&server)?;
        let small = backends.command(&["environments", "create", "small", "--json"]).output()?;
        let small: Value = serde_json::from_slice(&small.stdout).context("no second environment")?;
        let small_key = small["secretKey"].as_str().context("no key")?.to_owned();
        let small_id = backends.psql("SELECT id FROM environments WHERE slug = 'small'")?;
        let big_id = backends.psql("SELECT id FROM environments WHERE slug <> 'small'")?;
        let began = Instant::now();
        seed(&backends, sessions, &big_id, &small_id)?;
        println!("seeded {sessions} sessions in {:.0} s", began.elapsed().as_secs_f64());
        for (tenant, id, key) in [("half of all", big_id.as_str(), KEY), ("1 in 1200", &small_id, &small_key)]
        {
            for (what, filter, sql) in FILTERS {
                let row = format!("{} M, {tenant}: {what}", sessions / 1_000_000);
                let scope = format!(
                    "organization_id = 'default' AND project_id = 'default' AND environment_id = '{id}'"
                );
                let plain = format!(
                    "SELECT session_id, external_id, type, task_identifier, tags, closed_at, closed_reason, expires_at, created_at, \
                     updated_at, metadata_text FROM {TABLE} FINAL WHERE {scope} AND {sql} \
                     ORDER BY created_at DESC, session_id DESC LIMIT 51 FORMAT Null"
                );
                let mut stream = server.connect()?;
                let request = list(server.address, &format!("page[size]=50&{filter}"), key);
                let ours = self.time(|| page(&mut stream, &request).map(drop))?;
                let theirs = self.time(|| backends.ask(&plain).map(drop))?;
                self.tell_scale(&row, ours, theirs)?;
            }
            for (what, field, plain) in [
                (
                    "count",
                    "sessionsCount",
                    format!(
                        "SELECT count() FROM {TABLE} FINAL WHERE environment_id = '{id}' AND organization_id = 'default' AND project_id = 'default'"
                    ),
                ),
                (
                    "tags",
                    "tags",
                    format!(
                        "SELECT DISTINCT arrayJoin(tags) AS tag FROM {TABLE} FINAL WHERE environment_id = '{id}' AND organization_id = 'default' AND project_id = 'default' ORDER BY tag LIMIT 50"
                    ),
                ),
            ] {
                let row = format!("{} M, {tenant}: {what}", sessions / 1_000_000);
                let query = if field == "tags" {
                    r#"{"query":"{ sessionTags(first: 50) }"}"#
                } else {
                    r#"{"query":"{ sessions(first: 1) { totalCount } }"}"#
                };
                let mut stream = server.connect()?;
                let length = query.len().to_string();
                let bearer = format!("Bearer {key}");
                let headers = [
                    ("Authorization", bearer.as_str()),
                    ("Content-Type", "application/json"),
                    ("Content-Length", &length),
                ];
                let mut request = http::request("POST /graphql", server.address, &headers);
                request.extend_from_slice(query.as_bytes());
                let ours = self.time(|| {
                    let answer = page(&mut stream, &request)?;
                    ensure!(answer["errors"].is_null(), "{answer}");
                    Ok(())
                })?;
                let theirs = self.time(|| backends.ask(&plain).map(drop))?;
                self.tell_scale(&row, ours, theirs)?;
            }
        }
        Ok(())
    }

    fn tell_scale(&mut self, row: &str, ours: Latency, theirs: Latency) -> anyhow::Result<()> {
        for (server, latency) in [(OURS, ours), (PLAIN, theirs)] {
            let spread = latency.spread()?;
            self.samples.push(Sample {
                table: Table::Scale,
                row: row.to_owned(),
                server: server.to_owned(),
                values: vec![(Metric::P50, spread.p50), (Metric::P99, spread.p99)],
            });
        }
        Ok(())
    }

    fn time(&self, mut ask: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<Latency> {
        let mut latency = Latency::default();
        let began = Instant::now();
        for number in 0..WARM + REQUESTS {
            let one = Instant::now();
            ask()?;
            if number >= WARM {
                latency.record(one.elapsed());
            }
            if began.elapsed() > self.time && number > WARM {
                break;
            }
        }
        Ok(latency)
    }
}

const TABLE: &str = "trigger_dev.sessions_v1";

/// What is listed: the name, the query of our request, the condition in SQL.
const FILTERS: [(&str, &str, &str); 5] = [
    ("no filter", "", "1"),
    ("status", "filter[status]=CLOSED", "closed_at IS NOT NULL"),
    (
        "status and tag",
        "filter[status]=CLOSED&filter[tags]=prod",
        "closed_at IS NOT NULL AND hasAny(tags, ['prod'])",
    ),
    ("rare tag", "filter[tags]=team-99991", "hasAny(tags, ['team-99991'])"),
    (
        "a month ago",
        "filter[createdAt][to]=1761000000000",
        "created_at <= fromUnixTimestamp64Milli(1761000000000)",
    ),
];

/// Half of the rows in the big environment, 1 in 1200 in the small one, the rest over a thousand others; six months; one
/// in ten has a second version, a tenth of those a tombstone. Parts are left as the inserts and merges leave them.
fn seed(backends: &Backends, sessions: u64, big: &str, small: &str) -> anyhow::Result<()> {
    let columns = "environment_id, organization_id, project_id, session_id, environment_type, friendly_id, external_id, type, \
                   task_identifier, tags, metadata, closed_at, closed_reason, expires_at, created_at, updated_at, _version, \
                   _is_deleted, metadata_text, trigger_config, current_run_id";
    let rows = |version: u64, filter: &str, deleted: &str| {
        format!(
            "INSERT INTO {TABLE} ({columns}) SELECT multiIf(number % 2 = 0, '{big}', number % 1200 = 1, '{small}', \
             concat('env_other_', toString(number % 1009))), 'default', 'default', \
             concat('session_', lower(hex(sipHash64(number))), leftPad(toString(number), 10, '0')) AS sid, 'prod', sid, \
             concat('seed-', toString(number)), ['chat', 'agent', 'batch'][number % 3 + 1], concat('task-', toString(number % 23)), \
             arrayFilter(x -> x != '', [if(number % 3 = 0, 'prod', ''), if(number % 20011 = 4, 'team-99991', concat('team-', toString(number % 997)))]), \
             concat('{{\"data\":{{\"user\":\"user-', toString(number), '\",\"plan\":\"pro\"}}}}'), \
             if(number % 97 < 39, fromUnixTimestamp64Milli(toInt64(1763000000000)), NULL), if(number % 97 < 39, 'done', ''), \
             NULL, fromUnixTimestamp64Milli(toInt64(1748000000000 + intDiv(number * 15000000000, {sessions}))) AS created, created, \
             {version}, {deleted}, concat('{{\"user\":\"user-', toString(number), '\",\"plan\":\"pro\"}}'), '', \
             concat('run_', toString(number)) FROM numbers({sessions}) WHERE {filter}"
        )
    };
    let epoch = 1u64 << 56;
    backends.ask(&rows(epoch + 1000, "1", "0"))?;
    backends.ask(&rows(
        epoch + 2000,
        "number % 10 = 3 OR number % 20 = 4",
        "number % 100 = 3 OR number % 200 = 4",
    ))?;
    Ok(())
}

/// Waits until the server answers a list, which it does once a replicator has made the table.
fn until_listed(server: &Server) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut stream = server.connect()?;
    let (status, _) = http::exchange(&mut stream, &create(server.address, "first"))?;
    ensure!(status == 201, "a create answered {status}");
    loop {
        let request = list(server.address, "filter[externalId]=first", KEY);
        let (status, body) = http::exchange(&mut stream, &request)?;
        if status == 200
            && serde_json::from_slice::<Value>(&body)?["data"].as_array().is_some_and(|rows| !rows.is_empty())
        {
            return Ok(());
        }
        ensure!(began.elapsed() < NEVER, "lists do not work: {status}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Writes at `rate` and watches a few of what is written. An open loop: a slow answer does not slow the writers down.
fn watch(server: &Server, rate: u64, time: Duration) -> anyhow::Result<Latency> {
    let address = server.address;
    let written = AtomicU64::new(0);
    let latency = Mutex::new(Latency::default());
    let began = Instant::now();
    thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let written = &written;
                scope.spawn(move || -> anyhow::Result<()> {
                    let mut stream = connect(address)?;
                    let pause = Duration::from_secs_f64(WRITERS as f64 / rate as f64);
                    let mut due = began + pause.mul_f64(writer as f64 / WRITERS as f64);
                    while began.elapsed() < time {
                        thread::sleep(due.saturating_duration_since(Instant::now()));
                        due += pause;
                        let number = written.fetch_add(1, Ordering::Relaxed);
                        let (status, _) =
                            http::exchange(&mut stream, &create(address, &format!("write-{rate}-{number}")))?;
                        ensure!(status == 201, "a create answered {status}");
                    }
                    Ok(())
                })
            })
            .collect();
        let watchers: Vec<_> = (0..WATCHERS)
            .map(|watcher| {
                let latency = &latency;
                scope.spawn(move || -> anyhow::Result<()> {
                    let mut stream = connect(address)?;
                    for number in 0.. {
                        if began.elapsed() > time {
                            break;
                        }
                        let name = format!("watched-{rate}-{watcher}-{number}");
                        let asked = Instant::now();
                        let (status, _) = http::exchange(&mut stream, &create(address, &name))?;
                        ensure!(status == 201, "a create answered {status}");
                        let request = list(address, &format!("filter[externalId]={name}"), KEY);
                        while page(&mut stream, &request)?["data"].as_array().is_none_or(Vec::is_empty) {
                            ensure!(asked.elapsed() < NEVER, "{name} is never listed");
                            thread::sleep(Duration::from_millis(2));
                        }
                        latency.lock().expect("no panic while held").record(asked.elapsed());
                        // Not in step with the flushes.
                        thread::sleep(Duration::from_millis(17 + number % 31));
                    }
                    Ok(())
                })
            })
            .collect();
        for thread in writers.into_iter().chain(watchers) {
            thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        }
        anyhow::Ok(())
    })?;
    let reached = written.load(Ordering::Relaxed) as f64 / time.as_secs_f64();
    ensure!(reached > 0.9 * rate as f64, "only {reached:.0} writes a second were possible");
    Ok(latency.into_inner().expect("no panic while held"))
}

fn connect(address: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// `sessiond replicate`.
struct Replicator(Child);

impl Replicator {
    fn start(backends: &Backends) -> anyhow::Result<Self> {
        let mut command = backends.command(&["replicate"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self(command.spawn()?))
    }

    fn check(&mut self) -> anyhow::Result<()> {
        ensure!(self.0.try_wait()?.is_none(), "the replicator ended");
        Ok(())
    }
}

impl Drop for Replicator {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
