//! The rows: which load, on which servers, in which order. Every row of a round gets a server of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum;
use tokio::runtime::Runtime;

use super::catchup::catch_up;
use super::delivery::{Plan, deliver};
use super::load;
use super::machine::sync_floor;
use super::record;
use super::report::{Metric, Sample, Samples, Table};
use super::server::Server;
use super::stats::Spread;
use super::target::Target;

/// Sessions of the ack rows.
const SESSIONS: [usize; 3] = [1, 64, 1000];
/// A delivery row: channels, followers of each, appends a second over all.
type Delivery = (usize, usize, f64);
/// What the servers are compared by.
pub(crate) const DELIVERIES: [Delivery; 4] =
    [(1, 1, 50.0), (1, 100, 50.0), (1, 1000, 10.0), (1000, 1, 500.0)];
/// Records of the catch-up row.
const RECORDS: u64 = 100_000;
/// A memory row: its name, channels, followers of each.
type Memory = (&'static str, usize, usize);
/// The memory rows.
pub(crate) const MEMORY: [Memory; 3] =
    [("1 channel x 1000", 1, 1000), (CROWD, 1, 10_000), ("1000 channels x 1", 1000, 1)];
/// The one that only ours is measured by: Redis serves fewer connections as it is installed.
pub(crate) const CROWD: &str = "1 channel x 10000";
/// The catch-up row.
pub(crate) const CATCH_UP: &str = "100,000 records";

/// A group of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Row {
    /// Append to ack at 1, 64 and 1000 sessions
    Ack,
    /// Append to delivery at 1, 100 and 1000 followers and 1000 x 1
    Delivery,
    /// Reading 100,000 records
    CatchUp,
    /// Direct writes over the S2 wire: append sessions and single requests, on 1 and on 1000 streams
    Direct,
    /// Memory of idle followers
    Memory,
    /// Delivery, catch-up and memory over GraphQL beside SSE, and a page of sessions; ours only
    Graphql,
    /// List queries over 1,000,000 sessions, ours only
    Lists,
    /// Lists, counts and tags from ClickHouse over 1,000,000 sessions beside plain FINAL, and inserts into it
    ClickhouseLists,
    /// From Postgres to ClickHouse: how soon a session is in lists, and how fast a backlog drains; ours and a plain copy
    Replication,
}

/// Name of an ack row.
pub(crate) fn ack(sessions: usize) -> String {
    format!("{sessions} session{}", if sessions == 1 { "" } else { "s" })
}

/// Name of a delivery row.
pub(crate) fn delivery(channels: usize, followers: usize) -> String {
    format!("{channels} channel{} x {followers}", if channels == 1 { "" } else { "s" })
}

/// What every row needs.
pub(crate) struct Bench<'a> {
    pub(crate) runtime: &'a Runtime,
    /// Folder of the servers' data.
    pub(crate) home: PathBuf,
    /// Time of one measurement.
    pub(crate) time: Duration,
    /// Rounds of the ack rows, of which the median counts.
    pub(crate) rounds: u32,
    pub(crate) samples: Samples,
}

impl Bench<'_> {
    /// A fresh server in a folder of its own.
    pub(crate) fn start(&self, target: &dyn Target) -> anyhow::Result<Server> {
        let home = fresh(&self.home, "server")?;
        target.start(&home)
    }

    /// Every round sees all targets, so that a busy moment of the disk does not hit one alone; `extra` get one
    /// row. The floor is measured beside each round.
    pub(crate) fn ack(
        &mut self,
        targets: &[Box<dyn Target>],
        extra: &[Box<dyn Target>],
        floors: &mut Vec<Spread>,
    ) -> anyhow::Result<()> {
        for _ in 0..self.rounds {
            for target in targets {
                self.ack_round(target.as_ref(), &SESSIONS)?;
            }
            for target in extra {
                self.ack_round(target.as_ref(), &[64])?;
            }
            floors.push(sync_floor(&self.home)?);
        }
        Ok(())
    }

    fn ack_round(&mut self, target: &dyn Target, counts: &[usize]) -> anyhow::Result<()> {
        let server = self.start(target)?;
        for count in counts {
            let sessions = names("ack", *count);
            target.create(&server, &sessions)?;
            let requests = sessions.iter().map(|session| target.append(&server, session)).collect();
            let acks = self.runtime.block_on(load::answers(&server, requests, self.time))?;
            self.samples.push(Sample {
                table: Table::Ack,
                row: ack(*count),
                server: target.name().to_owned(),
                values: acks.values(),
            });
        }
        Ok(())
    }

    pub(crate) fn delivery(&mut self, targets: &[Box<dyn Target>], rows: &[Delivery]) -> anyhow::Result<()> {
        for &(channels, followers, rate) in rows {
            for target in targets {
                let server = self.start(target.as_ref())?;
                let plan = Plan { channels: names("deliver", channels), followers, rate, time: self.time };
                target.create(&server, &plan.channels)?;
                let delivered = self.runtime.block_on(deliver(target.as_ref(), &server, &plan))?;
                self.samples.push(Sample {
                    table: Table::Delivery,
                    row: delivery(channels, followers),
                    server: target.name().to_owned(),
                    values: vec![
                        (Metric::P50, delivered.spread.p50),
                        (Metric::P99, delivered.spread.p99),
                        (Metric::ServerUs, delivered.server_us),
                        (Metric::ClientUs, delivered.client_us),
                        (Metric::Lost, delivered.lost as f64),
                    ],
                });
            }
        }
        Ok(())
    }

    pub(crate) fn catch_up(&mut self, targets: &[Box<dyn Target>]) -> anyhow::Result<()> {
        for target in targets {
            let server = self.start(target.as_ref())?;
            let sessions = names("history", 1);
            target.create(&server, &sessions)?;
            self.runtime.block_on(load::fill(target.as_ref(), &server, &sessions[0], RECORDS))?;
            let ways = target.catch_up(&server, &sessions[0]).len();
            for way in 0..ways {
                let (name, _) = target.catch_up(&server, &sessions[0]).swap_remove(way);
                let reader = || target.catch_up(&server, &sessions[0]).swap_remove(way).1;
                let caught_up = catch_up(&server, RECORDS, self.time, reader)?;
                let per_second = caught_up.rate * 1e6 / caught_up.bytes as f64 * RECORDS as f64;
                self.samples.push(Sample {
                    table: Table::CatchUp,
                    row: CATCH_UP.to_owned(),
                    server: format!("{}, {name}", target.name()),
                    values: vec![
                        (Metric::MegabytesPerSecond, caught_up.rate),
                        (Metric::RecordMegabytes, per_second * record::LEN as f64 / 1e6),
                        (Metric::PerSecond, per_second),
                        (Metric::ServerUs, caught_up.server_us),
                        (Metric::BytesPerRecord, caught_up.bytes as f64 / RECORDS as f64),
                    ],
                });
            }
        }
        Ok(())
    }
}

/// An empty folder below `home`.
pub(crate) fn fresh(home: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let folder = home.join(name);
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// Names of sessions.
pub(crate) fn names(prefix: &str, count: usize) -> Vec<String> {
    (0..count).map(|number| format!("{prefix}-{count}-{number}")).collect()
}
