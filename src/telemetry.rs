//! Metrics: their names and labels. Labels come from enums and route templates, never from a request.

use std::fmt;
use std::sync::atomic::AtomicI64;
use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::domain::Direction;

/// Upper bounds in seconds, from a cached read to a stalled disk.
const SECONDS: [f64; 11] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0];

/// How an append ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Outcome {
    /// Durable.
    Stored,
    /// Refused for a reason of the caller's.
    Refused,
    /// Failed for a reason of ours.
    Failed,
}

/// Which front end a follower came through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Door {
    /// Server-sent events.
    Sse,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: &'static str,
    method: &'static str,
    status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AppendLabels {
    direction: &'static str,
    outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DoorLabels {
    door: Door,
}

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// Every metric of the process.
pub struct Metrics {
    registry: Registry,
    requests: Histograms<RequestLabels>,
    appends: Histograms<AppendLabels>,
    followers: Family<DoorLabels, Gauge<i64, AtomicI64>>,
}

impl Metrics {
    /// Metrics at zero.
    pub fn new() -> Self {
        let histogram: fn() -> Histogram = || Histogram::new(SECONDS);
        let mut registry = Registry::with_prefix("sessiond");
        let requests = Histograms::new_with_constructor(histogram);
        let appends = Histograms::new_with_constructor(histogram);
        let followers = Family::default();
        registry.register("request_duration_seconds", "Time to response headers", requests.clone());
        registry.register("append_duration_seconds", "Time to a durable append", appends.clone());
        registry.register("followers", "Open followers", followers.clone());
        Self { registry, requests, appends, followers }
    }

    /// One answered request; `route` is the template that matched.
    pub fn request(&self, route: &'static str, method: &'static str, status: u16, elapsed: Duration) {
        let labels = RequestLabels { route, method, status };
        self.requests.get_or_create(&labels).observe(elapsed.as_secs_f64());
    }

    /// One append.
    pub fn append(&self, direction: Direction, outcome: Outcome, elapsed: Duration) {
        let labels = AppendLabels { direction: direction.as_str(), outcome };
        self.appends.get_or_create(&labels).observe(elapsed.as_secs_f64());
    }

    /// Counts a follower until the guard is dropped.
    pub fn follower(&self, door: Door) -> FollowerGuard {
        let gauge = self.followers.get_or_create(&DoorLabels { door }).clone();
        gauge.inc();
        FollowerGuard(gauge)
    }

    /// The Prometheus text form.
    pub fn render(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry);
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

/// A follower that is open.
#[derive(Debug)]
pub struct FollowerGuard(Gauge<i64, AtomicI64>);

impl Drop for FollowerGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}
