//! What idle followers weigh, in the resident memory of the server.

use std::future::Future;
use std::thread;
use std::time::Duration;

use super::delivery::{Followers, Pace};
use super::report::{Metric, OURS, Sample, Table};
use super::rows::{Bench, CROWD, MEMORY, names};
use super::server::Server;
use super::target::Target;

/// How long a server may settle before its memory is read.
const SETTLE: Duration = Duration::from_millis(1500);

/// Name of a memory row.
pub(crate) fn weighed(row: &str, pace: Pace) -> String {
    format!("{row}{}", if pace == Pace::OneByOne { ", one by one" } else { "" })
}

/// A server that has settled, and its channels.
pub(crate) struct Idle {
    pub(crate) server: Server,
    pub(crate) channels: Vec<String>,
    /// KiB that it held before it had any.
    empty: u64,
}

impl Bench<'_> {
    /// 1000 followers of one channel, 10,000 of ours, and 1000 of a channel each.
    pub(crate) fn memory(&mut self, targets: &[Box<dyn Target>], pace: Pace) -> anyhow::Result<()> {
        for (row, channels, followers) in MEMORY {
            for target in targets.iter().map(AsRef::as_ref) {
                if row == CROWD && target.name() != OURS {
                    continue;
                }
                let idle = self.idle(target, channels)?;
                let follow = Followers::follow(target, &idle.server, &idle.channels, followers, pace);
                let grown = self.growth(&idle.server, follow)?;
                self.weigh(target, &weighed(row, pace), &idle, grown / (channels * followers) as f64);
            }
        }
        Ok(())
    }

    /// A fresh server with so many channels.
    pub(crate) fn idle(&self, target: &dyn Target, channels: usize) -> anyhow::Result<Idle> {
        let server = self.start(target)?;
        thread::sleep(SETTLE);
        let empty = server.rss()?;
        let channels = names("idle", channels);
        target.create(&server, &channels)?;
        thread::sleep(SETTLE);
        Ok(Idle { server, channels, empty })
    }

    /// KiB by which the server grows with these followers, who then leave.
    pub(crate) fn growth(
        &self,
        server: &Server,
        follow: impl Future<Output = anyhow::Result<Followers>>,
    ) -> anyhow::Result<f64> {
        let before = server.rss()?;
        let connected = self.runtime.block_on(follow)?;
        thread::sleep(SETTLE);
        let grown = server.rss()?.saturating_sub(before);
        self.runtime.block_on(connected.leave())?;
        Ok(grown as f64)
    }

    /// Notes what one follower weighs.
    pub(crate) fn weigh(&mut self, target: &dyn Target, row: &str, idle: &Idle, kib: f64) {
        self.samples.push(Sample {
            table: Table::Memory,
            row: row.to_owned(),
            server: target.name().to_owned(),
            values: vec![(Metric::KibPerFollower, kib), (Metric::EmptyMib, idle.empty as f64 / 1024.0)],
        });
    }
}
