//! What metadata with many keys costs an insert: rows as the server writes them, which keep it as text.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::ask;
use super::engine::Engine;
use super::seed::VERSION;
use crate::bench::report::{Metric, Sample, Table};
use crate::bench::rows::Bench;
use crate::bench::stats::Latency;

/// How the table names the server that is measured.
pub(in crate::bench) const ENGINE: &str = "ClickHouse";
/// The rows of the table.
pub(in crate::bench) const NO_METADATA: &str = "metadata {}";
pub(in crate::bench) const MANY_KEYS: &str = "300 random keys";
const BATCHES: u64 = 10;
const BATCH: u64 = 1000;

impl Bench<'_> {
    /// Rows without metadata first, so that what the others leave in memory is not put down to them.
    pub(super) fn inserts(&mut self, engine: &Engine) -> anyhow::Result<()> {
        for (row, keys) in [(NO_METADATA, 0), (MANY_KEYS, 300)] {
            engine.calm()?;
            let before = engine.mib()?;
            let mut latency = Latency::default();
            for number in 0..BATCHES {
                // A connection that has waited for its rows may have been closed.
                let request = engine.insertion("sessions_v1", &batch(engine.began, number, keys)?);
                let (took, _) = ask(&mut engine.connect()?, &request)?;
                latency.record(took);
            }
            engine.calm()?;
            let (spread, after) = (latency.spread()?, engine.mib()?);
            self.samples.push(Sample {
                table: Table::Inserts,
                row: row.to_owned(),
                server: ENGINE.to_owned(),
                values: vec![
                    (Metric::P50, spread.p50),
                    (Metric::P99, spread.p99),
                    (Metric::MibBefore, before),
                    (Metric::MibAfter, after),
                ],
            });
        }
        Ok(())
    }
}

/// One insert: sessions of one moment, each with so many keys of its own.
fn batch(millis: u64, number: u64, keys: u64) -> anyhow::Result<String> {
    let time = format!("{}.{:03}", millis / 1000, millis % 1000);
    let mut text = String::new();
    for session in number * BATCH..(number + 1) * BATCH {
        let metadata: Map<String, Value> = (0..keys)
            .map(|key| (format!("{:016x}", scattered(session * keys + key)), Value::from(key)))
            .collect();
        let document = json!({ "metadata": metadata, "triggerConfig": {}, "closedReason": null, "currentRunId": "run_a" });
        let id = format!("session_{keys}_{session}");
        let row = json!({
            "environment_id": "env_inserts", "organization_id": "inserts", "project_id": "inserts",
            "session_id": id, "environment_type": "PRODUCTION", "friendly_id": id, "type": "chat",
            "task_identifier": "task", "tags": ["prod"], "metadata": {}, "created_at": time, "updated_at": time,
            "_version": VERSION, "document": document.to_string(),
        });
        writeln!(text, "{row}")?;
    }
    Ok(text)
}

/// A number that looks random: the output step of SplitMix64.
fn scattered(number: u64) -> u64 {
    let mixed = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
