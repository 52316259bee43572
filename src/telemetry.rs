//! Logs and metrics. Every metric name and label stands here; labels come from enums and route templates only.

mod replication;

use std::fmt;
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::{LogFormat, TelemetryConfig};
use crate::domain::{Direction, Error, Result};
pub use replication::{ReplicationEvent, ReplicationMetrics};

/// 50 us to about 26 s, doubling.
fn latency_histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.000_05, 2.0, 20))
}

/// 1 to about 4000, doubling.
fn size_histogram() -> Histogram {
    Histogram::new(exponential_buckets(1.0, 2.0, 13))
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: &'static str,
    method: Verb,
    status: Class,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum Verb {
    Get,
    Head,
    Post,
    Put,
    Patch,
    Delete,
    Options,
    Other,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum Class {
    Success,
    Redirect,
    ClientError,
    ServerError,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AppendLabels {
    direction: Io,
    outcome: Outcome,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum Io {
    In,
    Out,
}

/// How an append ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Outcome {
    /// Stored.
    Stored,
    /// Known already; the original place was answered.
    Repeated,
    /// Refused because of the request or the session's state.
    Refused,
    /// Failed on our side.
    Failed,
}

/// Which door a follower came through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Door {
    /// Server-sent events.
    Sse,
    /// GraphQL over WebSocket.
    Websocket,
    /// GraphQL over server-sent events.
    GraphqlSse,
    /// GraphQL over multipart.
    Multipart,
    /// Reads over the S2 wire.
    S2,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FollowerLabels {
    door: Door,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TaskLabels {
    task: &'static str,
}

/// Everything that `/metrics` shows.
pub struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Histogram, fn() -> Histogram>,
    appends: Family<AppendLabels, Histogram, fn() -> Histogram>,
    followers: Family<FollowerLabels, Gauge>,
    connections: Gauge,
    websockets: Gauge,
    append_sessions: Gauge,
    cursors_ahead: Counter,
    task_faults: Family<TaskLabels, Counter>,
    commits: Histogram,
    commit_records: Histogram,
    commit_bytes: Counter,
    log_healthy: Gauge<f64, AtomicU64>,
    replication: ReplicationMetrics,
}

impl Metrics {
    /// All metrics at zero.
    pub fn new() -> Arc<Self> {
        let mut registry = Registry::with_prefix("sessiond");
        let mut metrics = Self {
            replication: ReplicationMetrics::register(&mut registry),
            registry,
            requests: Family::new_with_constructor(latency_histogram),
            appends: Family::new_with_constructor(latency_histogram),
            followers: Family::default(),
            connections: Gauge::default(),
            websockets: Gauge::default(),
            append_sessions: Gauge::default(),
            cursors_ahead: Counter::default(),
            task_faults: Family::default(),
            commits: latency_histogram(),
            commit_records: size_histogram(),
            commit_bytes: Counter::default(),
            log_healthy: Gauge::default(),
        };
        metrics.log_healthy.set(1.0);
        // A gauge that was never touched is not shown.
        for door in [Door::Sse, Door::Websocket, Door::GraphqlSse, Door::Multipart, Door::S2] {
            drop(metrics.followers.get_or_create(&FollowerLabels { door }));
        }
        let Self { registry, requests, appends, followers, connections, websockets, commits, .. } =
            &mut metrics;
        let seconds = || Unit::Seconds;
        registry.register_with_unit(
            "request_duration",
            "Time to the response head",
            seconds(),
            requests.clone(),
        );
        registry.register_with_unit("append_duration", "Time to the durable ack", seconds(), appends.clone());
        registry.register("followers", "Live followers", followers.clone());
        registry.register("connections", "Open connections", connections.clone());
        registry.register("websockets", "Open connections that are WebSockets", websockets.clone());
        registry.register_with_unit(
            "log_commit_duration",
            "Time of one group commit with its sync",
            seconds(),
            commits.clone(),
        );
        let Self {
            registry,
            append_sessions,
            cursors_ahead,
            task_faults,
            commit_records,
            commit_bytes,
            log_healthy,
            ..
        } = &mut metrics;
        registry.register(
            "append_sessions",
            "Open append sessions of direct writers",
            append_sessions.clone(),
        );
        registry.register(
            "cursors_ahead",
            "Reads over HTTP that were to go on after a record which the channel does not have",
            cursors_ahead.clone(),
        );
        registry.register("task_faults", "Panics of tasks beside the requests", task_faults.clone());
        registry.register("log_commit_records", "Records in one group commit", commit_records.clone());
        registry.register("log_bytes", "Metered bytes committed to the log", commit_bytes.clone());
        registry.register(
            "log_healthy",
            "1 while the log takes appends, 0 once poisoned",
            log_healthy.clone(),
        );
        Arc::new(metrics)
    }

    /// A response head was sent; `route` is the matched template.
    pub fn request(&self, route: &'static str, method: &str, status: u16, elapsed: Duration) {
        let method = match method {
            "GET" => Verb::Get,
            "HEAD" => Verb::Head,
            "POST" => Verb::Post,
            "PUT" => Verb::Put,
            "PATCH" => Verb::Patch,
            "DELETE" => Verb::Delete,
            "OPTIONS" => Verb::Options,
            _ => Verb::Other,
        };
        let status = match status {
            ..300 => Class::Success,
            300..400 => Class::Redirect,
            400..500 => Class::ClientError,
            500.. => Class::ServerError,
        };
        let labels = RequestLabels { route, method, status };
        self.requests.get_or_create(&labels).observe(elapsed.as_secs_f64());
    }

    /// An append was answered.
    pub fn append(&self, direction: Direction, outcome: Outcome, elapsed: Duration) {
        let direction = match direction {
            Direction::In => Io::In,
            Direction::Out => Io::Out,
        };
        let labels = AppendLabels { direction, outcome };
        self.appends.get_or_create(&labels).observe(elapsed.as_secs_f64());
    }

    /// A follower began; it ends when the guard is dropped.
    pub fn follower(&self, door: Door) -> GaugeGuard {
        GaugeGuard::new(self.followers.get_or_create_owned(&FollowerLabels { door }))
    }

    /// A connection began; it ends when the guard is dropped.
    pub fn connection(&self) -> GaugeGuard {
        GaugeGuard::new(self.connections.clone())
    }

    /// A connection became a WebSocket; it ends when the guard is dropped.
    pub fn websocket(&self) -> GaugeGuard {
        GaugeGuard::new(self.websockets.clone())
    }

    /// A direct writer's append session began; it ends when the guard is dropped.
    pub fn append_session(&self) -> GaugeGuard {
        GaugeGuard::new(self.append_sessions.clone())
    }

    /// A reader came with a cursor that lies beyond the tail, and was let go on there.
    pub fn cursor_ahead(&self) {
        self.cursors_ahead.inc();
    }

    /// A background task has failed; `task` is its name in the code.
    pub fn task_fault(&self, task: &'static str) {
        self.task_faults.get_or_create(&TaskLabels { task }).inc();
    }

    /// The log has committed a group.
    pub fn committed(&self, records: usize, bytes: usize, elapsed: Duration) {
        self.commits.observe(elapsed.as_secs_f64());
        self.commit_records.observe(records as f64);
        self.commit_bytes.inc_by(bytes as u64);
    }

    /// The log takes no appends any more.
    pub fn log_poisoned(&self) {
        self.log_healthy.set(0.0);
    }

    /// What a replicator in this process shows.
    pub fn replication(&self) -> &ReplicationMetrics {
        &self.replication
    }

    /// The exposition text.
    pub fn render(&self) -> String {
        let mut text = String::new();
        text::encode(&mut text, &self.registry).expect("writing to a string cannot fail");
        text
    }
}

/// Holds a gauge one higher until it is dropped.
pub struct GaugeGuard(Gauge);

impl GaugeGuard {
    fn new(gauge: Gauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// An error with its causes, on one line.
pub struct Chain<'a>(pub &'a (dyn std::error::Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(cause) = source {
            write!(f, ": {cause}")?;
            source = cause.source();
        }
        Ok(())
    }
}

/// Logs panics as everything else is logged, with their place. The message is left out if it was made at run time: it may hold
/// a piece of what a client has sent.
pub fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let message = panic.payload().downcast_ref::<&'static str>().copied().unwrap_or("(made at run time)");
        tracing::error!(thread = thread.name(), place, message, "a panic, which is a fault of sessiond");
    }));
}

/// Sends log lines to standard error, as the configuration says.
///
/// # Errors
/// [`Error::Invalid`] for a filter that does not parse.
pub fn start_logging(config: &TelemetryConfig) -> Result<()> {
    let filter = EnvFilter::try_new(&config.log)
        .map_err(|error| Error::invalid("telemetry.log", format!("is not a filter: {error}")))?;
    let registry = tracing_subscriber::registry().with(filter);
    let ansi = std::io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt::layer().with_ansi(ansi).with_writer(std::io::stderr);
    let started = match config.format {
        LogFormat::Text => registry.with(lines).try_init(),
        LogFormat::Json => registry.with(lines.json().flatten_event(true)).try_init(),
    };
    started.map_err(Error::internal)
}
