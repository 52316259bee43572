//! From the answer of a create to the session in lists, at a fixed rate of creates. A few of them are watched.
//!
//! The engine is asked for the watched ones, for all of them at once: what its table holds is in the next list, and that
//! costs a machine that both share less than a list of the server for each. The asking adds its pause and the time of one
//! question at most.

use std::panic;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};

use super::{Installation, PATIENCE, is_listed};
use crate::bench::clickhouse::{Engine, ask};
use crate::bench::ours;
use crate::bench::report::{Metric, OURS, Sample, Table};
use crate::bench::rows::Bench;
use crate::bench::server::Server;
use crate::bench::stats::Latency;

/// Creates a second, and which of them are watched: every third, every 47th. That is 33 and 21 a second, and not in step
/// with inserts that begin every 50 ms.
pub(in crate::bench) const RATES: [(u64, u64); 2] = [(100, 3), (1000, 47)];
/// Connections that create by turns.
const WRITERS: u64 = 16;
/// Seconds of creates before any is watched, and the fewest in which some are: 400 watched ones tell a p99.
const WARM_UP: u64 = 1;
const SECONDS: u64 = 20;
/// Pause between two questions for the watched ones.
const PAUSE: Duration = Duration::from_millis(10);
/// Longest that a create may take.
const ANSWERED_WITHIN: Duration = Duration::from_secs(30);

/// Name of a row.
pub(in crate::bench) fn row(rate: u64) -> String {
    format!("{rate} creates/s")
}

/// Creates at a fixed rate.
struct Load<'a> {
    server: &'a Server,
    /// What the names of its sessions begin with.
    name: String,
    rate: u64,
    /// Every so-manieth is watched.
    every: u64,
    /// How many are created.
    sessions: u64,
    start: Instant,
}

/// A session that is watched.
struct Created {
    name: String,
    /// When the create was answered.
    at: Instant,
}

impl Bench<'_> {
    /// Both rates, one after the other.
    pub(super) fn freshness(
        &mut self,
        installation: &Installation,
        server: &Server,
        round: u32,
    ) -> anyhow::Result<()> {
        for (rate, every) in RATES {
            let load = Load {
                server,
                name: format!("fresh-{round}-{rate}"),
                rate,
                every,
                sessions: rate * (WARM_UP + self.time.as_secs().max(SECONDS)),
                start: Instant::now(),
            };
            let (latency, reached) = load.run(&installation.engine)?;
            let spread = latency.spread()?;
            self.samples.push(Sample {
                table: Table::Freshness,
                row: row(rate),
                server: OURS.to_owned(),
                values: vec![
                    (Metric::PerSecond, reached),
                    (Metric::P50, spread.p50),
                    (Metric::P99, spread.p99),
                ],
            });
        }
        Ok(())
    }
}

impl Load<'_> {
    /// Creates all, and watches. Returns what it took each watched one to be stored, and the rate that was reached: where a
    /// machine that all share cannot hold it, as many as it can.
    ///
    /// # Errors
    /// If a watched session is not stored, or the last of them is not listed then.
    fn run(&self, engine: &Engine) -> anyhow::Result<(Latency, f64)> {
        let (watched, created) = mpsc::channel();
        let (latency, took) = thread::scope(|scope| {
            let watcher = scope.spawn(move || watch(engine, &created));
            let writers: Vec<_> = (0..WRITERS)
                .map(|first| {
                    let watched = watched.clone();
                    scope.spawn(move || self.write(first, &watched))
                })
                .collect();
            drop(watched);
            for writer in writers {
                joined(writer)?;
            }
            let took = self.start.elapsed();
            anyhow::Ok((joined(watcher)?, took))
        })?;
        let reached = self.sessions as f64 / took.as_secs_f64();
        let last = (self.sessions - 1) / self.every * self.every;
        ensure!(is_listed(self.server, &self.session(last))?, "what ClickHouse holds is not listed");
        Ok((latency, reached))
    }

    fn session(&self, number: u64) -> String {
        format!("{}-{number}", self.name)
    }

    /// Creates every session of one connection at its time, or as soon as the connection is free: the rate does not fall
    /// because an answer is late.
    fn write(&self, first: u64, watched: &Sender<Created>) -> anyhow::Result<()> {
        let mut stream = self.server.connect()?;
        stream.set_read_timeout(Some(ANSWERED_WITHIN))?;
        for number in (first..self.sessions).step_by(usize::try_from(WRITERS)?) {
            let due = self.start + Duration::from_micros(number * 1_000_000 / self.rate);
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let name = self.session(number);
            ours::create(self.server, &mut stream, &name)?;
            if number >= WARM_UP * self.rate && number.is_multiple_of(self.every) {
                // Without a watcher there is an error to tell already.
                let _ = watched.send(Created { name, at: Instant::now() });
            }
        }
        Ok(())
    }
}

/// Asks for what is watched until nobody creates any more and all is stored.
fn watch(engine: &Engine, created: &Receiver<Created>) -> anyhow::Result<Latency> {
    let (mut latency, mut waiting) = (Latency::default(), Vec::<Created>::new());
    let Ok(one) = created.recv() else { return Ok(latency) };
    waiting.push(one);
    let mut stream = engine.connect()?;
    loop {
        waiting.extend(created.try_iter());
        let names: Vec<_> = waiting.iter().map(|one| format!("'{}'", one.name)).collect();
        // Each has one version, so that FINAL would find the same.
        let sql = format!(
            "SELECT external_id FROM trigger_dev.sessions_v1 WHERE external_id IN ({})",
            names.join(", ")
        );
        let (_, stored) = ask(&mut stream, &engine.request(&sql))?;
        let (seen, stored) = (Instant::now(), String::from_utf8(stored)?);
        waiting.retain(|one| {
            let is_stored = stored.lines().any(|name| name == one.name);
            if is_stored {
                latency.record(seen - one.at);
            }
            !is_stored
        });
        if let Some(late) = waiting.iter().find(|one| one.at.elapsed() > PATIENCE) {
            bail!("{} is not stored within {PATIENCE:?}", late.name);
        }
        thread::sleep(PAUSE);
        if waiting.is_empty() {
            let Ok(one) = created.recv() else { return Ok(latency) };
            waiting.push(one);
        }
    }
}

fn joined<T>(thread: ScopedJoinHandle<'_, anyhow::Result<T>>) -> anyhow::Result<T> {
    thread.join().unwrap_or_else(|panicked| panic::resume_unwind(panicked))
}
