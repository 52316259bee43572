//! Sessions on their way from Postgres to ClickHouse: how soon one that was created is in lists, and how fast a backlog
//! drains. Both databases are those that the tests run against, with their data where the servers keep theirs.

mod copy;
mod drain;
pub(super) mod freshness;

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;
use serde_json::Value;

use self::copy::BATCH;
pub(super) use self::drain::BACKLOG_ROW;
use super::clickhouse::Engine;
use super::rows::{Bench, fresh};
use super::server::Server;
use super::{http, ours};
use crate::postgres::Postgres;
use crate::workspace::Workspace;
use crate::{packages, process};

/// Longest that an installation may take to be ready, and a session to be stored.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked whether something has come to pass that is not measured.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// What a system that looks for changes once a second cannot be better than, in milliseconds at the median: half of its
/// interval. sessiond replaces one of those. Told, and not measured.
const POLLER_P50: u32 = 500;

impl Bench<'_> {
    /// Measures both on one installation. Returns what should stand above the tables.
    ///
    /// # Errors
    /// If a session is not stored, or is stored and not listed.
    pub(crate) fn replication(
        &mut self,
        workspace: &Workspace,
        binary: &Path,
    ) -> anyhow::Result<Vec<String>> {
        packages::debian(&["postgresql"])?;
        let installation = Installation::start(workspace, binary, fresh(&self.home, "replication")?)?;
        let server = installation.serve()?;
        for round in 0..self.rounds {
            self.freshness(&installation, &server, round)?;
        }
        drop(server);
        for round in 0..self.rounds {
            self.drain(&installation, round)?;
        }
        Ok(vec![
            format!(
                "server: ClickHouse {}, as the tests run it",
                installation.engine.tell("SELECT version()")?
            ),
            format!("server: Postgres {}, as the tests run it", installation.sql("SHOW server_version")?),
            format!(
                "beside the time from create to list, not measured: looking for changes once a second takes {POLLER_P50} ms \
                 at the median or more"
            ),
            format!(
                "{}: a cursor over the sessions of the backlog, and inserts of {BATCH} as JSONEachRow, one after the other",
                copy::NAME
            ),
        ])
    }
}

/// Both databases, and the program that brings sessions from one to the other.
struct Installation {
    postgres: Postgres,
    engine: Engine,
    binary: PathBuf,
    home: PathBuf,
}

impl Installation {
    /// Starts the databases with their data below `home`.
    fn start(workspace: &Workspace, binary: &Path, home: PathBuf) -> anyhow::Result<Self> {
        Ok(Self {
            postgres: Postgres::start_below(&home)?,
            engine: Engine::start(workspace, &home)?,
            binary: binary.to_owned(),
            home,
        })
    }

    /// What the program runs with; the rest is as it comes.
    fn settings(&self) -> [(&'static str, &str); 5] {
        [
            ("SESSIOND_METADATA__URL", self.postgres.url()),
            ("SESSIOND_AUTH__MASTER_KEY", "0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f"),
            ("SESSIOND_CLICKHOUSE__URL", self.engine.url()),
            ("SESSIOND_CLICKHOUSE__LISTS", "clickhouse"),
            ("SESSIOND_REPLICATION__ENABLED", "true"),
        ]
    }

    /// A server with a replicator. Returns once the slot is made and what is created comes to lists.
    fn serve(&self) -> anyhow::Result<Server> {
        let server = ours::start(&self.binary, &fresh(&self.home, "server")?, &self.settings())?;
        until("the replicator streams", || Ok(self.sql("SELECT phase FROM replication")? == "streaming"))?;
        ours::create(&server, &mut server.connect()?, "first")?;
        until("the first session is listed", || is_listed(&server, "first"))?;
        Ok(server)
    }

    /// What a statement of Postgres returns.
    fn sql(&self, sql: &str) -> anyhow::Result<String> {
        let text = process::quiet(self.postgres.psql()?.args(["-c", sql]))?;
        Ok(text.trim_end().to_owned())
    }

    /// What a statement of ClickHouse counts.
    fn count(&self, sql: &str) -> anyhow::Result<u64> {
        Ok(self.engine.tell(sql)?.parse()?)
    }
}

/// Whether a list of the server has the session. A list that is refused for now has not.
fn is_listed(server: &Server, session: &str) -> anyhow::Result<bool> {
    let line = format!("GET /api/v1/sessions?filter%5BexternalId%5D={session}");
    let (status, body) = http::exchange(&mut server.connect()?, &ours::ask(&line, server, &[]))?;
    if status == 503 {
        return Ok(false);
    }
    ensure!(status == 200, "a list answered {status}: {}", String::from_utf8_lossy(&body));
    let body: Value = serde_json::from_slice(&body)?;
    Ok(body["data"].as_array().is_some_and(|sessions| !sessions.is_empty()))
}

/// Waits for something that is not measured.
fn until(what: &str, mut has_come: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let began = Instant::now();
    while !has_come()? {
        ensure!(began.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        thread::sleep(LOOK_EVERY);
    }
    Ok(())
}
