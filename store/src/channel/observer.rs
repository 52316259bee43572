//! What an engine tells the metrics.

use std::time::Duration;

/// One durable group of appends.
#[derive(Clone, Copy, Debug)]
pub struct CommitStats {
    /// Records written.
    pub records: usize,
    /// Their metered bytes.
    pub bytes: usize,
    /// Requests answered, refused ones counted.
    pub requests: usize,
    /// How long writing and syncing took.
    pub sync_duration: Duration,
}

/// Hears what an engine does, for metrics. Called by its writers: must not block.
pub trait LogObserver: Send + Sync {
    /// A group has become durable.
    fn committed(&self, stats: CommitStats);
    /// Followers came (positive) or went.
    fn followers(&self, delta: i64);
    /// The log takes no appends any more.
    fn poisoned(&self);
}

/// Hears nothing.
impl LogObserver for () {
    fn committed(&self, _: CommitStats) {}
    fn followers(&self, _: i64) {}
    fn poisoned(&self) {}
}
