//! List queries over HTTP against a million sessions, which are put straight into the migrated database.

use std::fs;
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde_json::Value;

use super::http;
use super::ours;
use super::report::{Metric, Sample, Table};
use super::rows::{Bench, fresh};
use super::server::Server;
use super::stats::Latency;
use super::target::Target;
use crate::{packages, process};

/// Sessions in the database.
const SESSIONS: u32 = 1_000_000;
/// Milliseconds between two creations.
const APART: u64 = 1000;
/// Requests before those that are timed, and the most that are.
const WARM: usize = 5;
const REQUESTS: usize = 200;

/// What is listed: the name of the row and the query of the request.
const FILTERS: [(&str, &str); 12] = [
    ("no filter", ""),
    ("status ACTIVE", "filter[status]=ACTIVE"),
    ("status CLOSED", "filter[status]=CLOSED"),
    ("status EXPIRED", "filter[status]=EXPIRED"),
    ("type, 1 in 10", "filter[type]=batch"),
    ("task, 1 in 23", "filter[taskIdentifier]=task-7"),
    ("externalId", "filter[externalId]=seed-500000"),
    ("tag, 1 in 3", "filter[tags]=prod"),
    ("tag, 1 in 997", "filter[tags]=team-123"),
    ("status and type", "filter[status]=ACTIVE&filter[type]=batch"),
    ("status, task and tag", "filter[status]=CLOSED&filter[taskIdentifier]=task-7&filter[tags]=prod"),
    ("two statuses", "filter[status]=ACTIVE,EXPIRED"),
];

impl Bench<'_> {
    /// Seeds, starts the server again, and asks every filter for its first page and one in the middle.
    pub(crate) fn lists(&mut self, target: &dyn Target) -> anyhow::Result<()> {
        packages::debian(&["sqlite3"])?;
        let home = fresh(&self.home, "lists")?;
        target.start(&home)?.stop_keeping_data();
        let began = Instant::now();
        seed(&home)?;
        println!("seeded {SESSIONS} sessions in {:.0} s", began.elapsed().as_secs_f64());
        let server = target.start(&home)?;
        let mut stream = server.connect()?;
        let middle = format!("filter[createdAt][to]={}", middle(&server, &mut stream)?);
        for (row, filter) in FILTERS {
            let found = page(&server, &mut stream, filter)?["data"].as_array().map_or(0, Vec::len);
            ensure!(found == if row == "externalId" { 1 } else { 50 }, "{row}: {found} sessions on a page");
            let first = self.time_page(&server, &mut stream, filter)?;
            let to_middle = page(&server, &mut stream, &format!("{filter}&{middle}"))?;
            let cursor = to_middle["pagination"]["next"].as_str();
            let mid = cursor.map(|cursor| {
                self.time_page(&server, &mut stream, &format!("{filter}&page[after]={cursor}"))
            });
            let mut values = Vec::new();
            for (timed, p50, p99) in [
                (Some(first), Metric::FirstP50, Metric::FirstP99),
                (mid.transpose()?, Metric::MidP50, Metric::MidP99),
            ] {
                let Some(timed) = timed else { continue };
                let spread = timed.spread()?;
                values.extend([(p50, spread.p50), (p99, spread.p99)]);
            }
            let server = target.name().to_owned();
            self.samples.push(Sample { table: Table::Lists, row: row.to_owned(), server, values });
        }
        Ok(())
    }

    fn time_page(&self, server: &Server, stream: &mut TcpStream, query: &str) -> anyhow::Result<Latency> {
        let mut latency = Latency::default();
        let began = Instant::now();
        for number in 0..WARM + REQUESTS {
            let one = Instant::now();
            page(server, stream, query)?;
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

/// One page of 50.
fn page(server: &Server, stream: &mut TcpStream, query: &str) -> anyhow::Result<Value> {
    let query = query.trim_matches('&').replace('[', "%5B").replace(']', "%5D");
    let line = format!("GET /api/v1/sessions?page%5Bsize%5D=50&{query}");
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let (status, body) = http::exchange(stream, &ours::ask(line.trim_end_matches('&'), server, &[]))?;
    ensure!(status == 200, "{line} answered {status}: {}", String::from_utf8_lossy(&body));
    Ok(serde_json::from_slice(&body)?)
}

/// Half the way back from the newest session, in milliseconds since 1970.
fn middle(server: &Server, stream: &mut TcpStream) -> anyhow::Result<u64> {
    let newest = page(server, stream, "")?;
    let id = newest["data"][0]["id"].as_str().context("the list is empty")?;
    // The seeded ids begin with their time.
    let millis = id.get("session_".len().."session_".len() + 12).context("a short id")?;
    Ok(u64::from_str_radix(millis, 16)? - APART * u64::from(SESSIONS) / 2)
}

/// 60 in 100 of type chat, 30 agent, 10 batch; 23 tasks; 39 in 97 closed; of the others a quarter has expired and
/// another will; a third is tagged prod, and each has one of 997 team tags. Prime counts, so that no two go together.
fn seed(home: &Path) -> anyhow::Result<()> {
    let script = format!(
        "PRAGMA synchronous = OFF;
PRAGMA cache_size = -400000;
BEGIN;
CREATE TEMP TABLE place AS SELECT
    (SELECT id FROM environments LIMIT 1) AS environment,
    CAST(strftime('%s', 'now') AS INTEGER) * 1000 AS now;
INSERT INTO sessions SELECT
    'session_' || printf('%012x', now - ({SESSIONS} - value) * {APART}) || lower(hex(randomblob(7))),
    environment, 'seed-' || value, NULL,
    CASE WHEN value % 10 < 6 THEN 'chat' WHEN value % 10 < 9 THEN 'agent' ELSE 'batch' END,
    'task-' || (value % 23),
    CASE WHEN value % 3 = 0 THEN json_array('prod', 'team-' || (value % 997))
        ELSE json_array('team-' || (value % 997)) END,
    json_object('user', 'user-' || value, 'plan', 'pro'),
    json_object('basePayload', json_object('model', 'large')),
    'run_' || printf('%026x', value),
    now - ({SESSIONS} - value) * {APART}, now - ({SESSIONS} - value) * {APART},
    CASE WHEN value % 97 < 39 THEN NULL
        WHEN value % 101 < 25 THEN now - 1000 WHEN value % 101 < 50 THEN now + 86400000 END,
    CASE WHEN value % 97 < 39 THEN now - ({SESSIONS} - value) * {APART} + 500 END,
    CASE WHEN value % 97 < 39 THEN 'done' END,
    CASE WHEN value % 97 >= 39 AND value % 101 < 25 THEN 1 ELSE 0 END
    FROM generate_series(1, {SESSIONS}), place;
INSERT INTO session_tags
    SELECT environment_id, json_each.value, created_at, sessions.id FROM sessions, json_each(sessions.tags)
    ORDER BY 1, 2, 3, 4;
COMMIT;
PRAGMA wal_checkpoint(TRUNCATE);
"
    );
    let file = home.join("seed.sql");
    fs::write(&file, script)?;
    let read = format!(".read '{}'", file.display());
    process::run(Command::new("sqlite3").arg("-bail").arg(home.join("data/metadata.db")).arg(read))
}
