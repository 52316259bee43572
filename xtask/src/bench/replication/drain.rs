//! How fast sessions that have waited in the slot come to ClickHouse, beside a plain copy of the same ones.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::copy::{self, copy};
use super::{Installation, until};
use crate::bench::report::{Metric, OURS, Sample, Table};
use crate::bench::rows::{Bench, fresh};
use crate::process;

/// The row.
pub(in crate::bench) const BACKLOG_ROW: &str = "200,000 sessions";
/// Sessions of a backlog, and how many are of one transaction.
pub(super) const BACKLOG: u64 = 200_000;
const TRANSACTION: u64 = 1000;
/// Longest that a backlog may take.
const DRAINED_WITHIN: Duration = Duration::from_secs(300);
/// How often the rows are counted meanwhile.
const COUNT_EVERY: Duration = Duration::from_millis(20);

/// What is there without reading it, repeated rows included; and exactly.
const ALL: &str = "SELECT count() FROM trigger_dev.sessions_v1";
const EXACT: &str = "SELECT count() FROM trigger_dev.sessions_v1 FINAL";

impl Bench<'_> {
    /// Writes a backlog for the slot, has it drained, and copies the same sessions another way. Nothing else runs.
    pub(super) fn drain(&mut self, installation: &Installation, round: u32) -> anyhow::Result<()> {
        until("nobody reads the slot", || {
            Ok(installation.sql("SELECT count(*) FROM pg_replication_slots WHERE active")? == "0")
        })?;
        let task = format!("backlog-{round}");
        installation.sql(&backlog(&task, round))?;
        installation.engine.calm()?;
        let ours = drained(installation)?;
        installation.engine.calm()?;
        let theirs = copy(installation, &task)?;
        for (server, took) in [(OURS, ours), (copy::NAME, theirs)] {
            self.samples.push(Sample {
                table: Table::Drain,
                row: BACKLOG_ROW.to_owned(),
                server: server.to_owned(),
                values: vec![(Metric::PerSecond, BACKLOG as f64 / took.as_secs_f64())],
            });
        }
        Ok(())
    }
}

/// The statement that writes a backlog, all of one task, in transactions of its own.
fn backlog(task: &str, round: u32) -> String {
    format!(
        "DO $$ BEGIN FOR part IN 0..{last} LOOP \
         INSERT INTO sessions (id, environment_id, external_id, kind, task_identifier, tags, metadata, current_run_id, \
         created_at, updated_at) \
         SELECT 'session_{round:018}' || lpad(n::text, 8, '0'), (SELECT min(id) FROM environments), '{task}-' || n, 'bench', \
         '{task}', '[\"bench\", \"drain\"]', '{{\"user\": \"someone\", \"plan\": \"pro\"}}', 'run_' || lpad(n::text, 26, '0'), \
         1700000000000 + n, 1700000000000 + n \
         FROM generate_series(part * {TRANSACTION} + 1, (part + 1) * {TRANSACTION}) AS n; \
         COMMIT; END LOOP; END $$",
        last = BACKLOG / TRANSACTION - 1,
    )
}

/// From the start of a replicator to the moment when all of the backlog is stored.
fn drained(installation: &Installation) -> anyhow::Result<Duration> {
    let whole = installation.count(EXACT)? + BACKLOG;
    let began = Instant::now();
    let mut replicator = Replicator::start(installation)?;
    // FINAL reads everything, which would cost the replicator time, so it is asked only when it may say yes.
    while installation.count(ALL)? < whole || installation.count(EXACT)? < whole {
        replicator.check()?;
        ensure!(began.elapsed() < DRAINED_WITHIN, "the backlog has not drained within {DRAINED_WITHIN:?}");
        thread::sleep(COUNT_EVERY);
    }
    let took = began.elapsed();
    let stored = installation.count(EXACT)?;
    ensure!(stored == whole, "{stored} sessions are stored instead of {whole}");
    replicator.stop()?;
    Ok(took)
}

/// `sessiond replicate`.
struct Replicator {
    child: Child,
    log: PathBuf,
}

impl Replicator {
    fn start(installation: &Installation) -> anyhow::Result<Self> {
        let home = fresh(&installation.home, "replicator")?;
        let log = home.join("printed");
        let printed = File::create(&log)?;
        let mut command = Command::new(&installation.binary);
        command.args(["replicate", "--data"]).arg(home.join("data")).envs(installation.settings());
        command.stdin(Stdio::null()).stdout(printed.try_clone()?).stderr(printed);
        let child = command.spawn().context("cannot start sessiond replicate")?;
        Ok(Self { child, log })
    }

    /// Fails if it has ended.
    fn check(&mut self) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("the replicator ended with {status}; it printed:\n{}", fs::read_to_string(&self.log)?);
        }
        Ok(())
    }

    /// Stops it in order, so that what it has stored is confirmed and is not told again.
    fn stop(mut self) -> anyhow::Result<()> {
        process::quiet(Command::new("kill").args(["-s", "TERM", &self.child.id().to_string()]))?;
        until("the replicator ends", || Ok(self.child.try_wait()?.is_some()))
    }
}

impl Drop for Replicator {
    fn drop(&mut self) {
        // Nothing to do once it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
