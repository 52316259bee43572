//! Latencies and what is told of them.

use std::time::Duration;

use hdrhistogram::Histogram;

/// Latencies as they come; one histogram per task would weigh more than the tasks.
#[derive(Default)]
pub(crate) struct Latency(Vec<u64>);

/// The percentiles that the tables show, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spread {
    pub(crate) count: usize,
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

impl Latency {
    pub(crate) fn record(&mut self, took: Duration) {
        self.record_nanos(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }

    pub(crate) fn record_nanos(&mut self, nanos: u64) {
        self.0.push(nanos);
    }

    pub(crate) fn join(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    pub(crate) fn spread(&self) -> anyhow::Result<Spread> {
        let mut histogram = Histogram::<u64>::new(3)?;
        for nanos in &self.0 {
            histogram.record((*nanos).max(1))?;
        }
        let ms = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e6;
        Ok(Spread { count: self.0.len(), p50: ms(0.5), p99: ms(0.99) })
    }
}

/// The middle of the values; of an even number, the lower middle.
pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied()
}
