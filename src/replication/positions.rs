//! How far the replicator has come, as every replica knows it: waits of lists that carry a consistency token.
//!
//! The leader writes its position into a row and notifies; here the notifications are heard, and the row is read at every
//! connect and once a second besides. A token holds the place in the WAL behind its write. If nothing of replication
//! comes after the write, no position passes that place, so whoever waits for long writes a message into the WAL
//! itself, for which the leader publishes a position too.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use secrecy::SecretString;
use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, timeout};
use tokio_util::sync::CancellationToken;

use super::postgres::{POSITIONS, Postgres, State, Status};
use super::status::overview;
use crate::clickhouse::ClickHouse;
use crate::config::ReplicationConfig;
use crate::domain::{Clock, ConsistencyToken, Error, Freshness, Result, SystemClock};

/// The prefix of messages that a waiting list writes into the WAL.
const BARRIER: &str = "sessiond.barrier";
/// How long a list waits for the position to come by itself.
const PATIENCE: Duration = Duration::from_millis(15);
/// How often the row is read, whatever has been heard.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// After so many looks that found what no notification had told, the connection counts as dead.
const UNHEARD: u32 = 3;
/// Longest wait for an answer of Postgres.
const ANSWER: Duration = Duration::from_secs(5);
/// Longest wait for what an operator is told.
const PROBE: Duration = Duration::from_secs(2);
/// First and longest pause between two attempts to connect.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// What the leader has published last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Position {
    epoch: u8,
    /// Everything that was committed before this place is in ClickHouse, if it was committed in this epoch.
    flushed: u64,
    /// What was committed before this epoch is there too.
    streaming: bool,
}

impl Position {
    /// An epoch counts from when its slot is there: what was written before is not in its stream.
    fn of(epoch: u8, flushed: u64, status: Status) -> Option<Self> {
        match status {
            Status::Streaming => Some(Self { epoch, flushed, streaming: true }),
            Status::Backfilling => Some(Self { epoch, flushed, streaming: false }),
            Status::Preparing | Status::Dropped => None,
        }
    }

    fn is_newer_than(&self, other: &Self) -> bool {
        let order = |position: &Self| (position.epoch, position.flushed, position.streaming);
        order(self) > order(other)
    }

    /// What is known from two that may have come in any order.
    fn merged(self, other: Self) -> Self {
        match self.epoch == other.epoch {
            true => Self {
                flushed: self.flushed.max(other.flushed),
                streaming: self.streaming || other.streaming,
                ..self
            },
            false if other.is_newer_than(&self) => other,
            false => self,
        }
    }
}

/// Reads `slot:epoch:lsn:status` for this slot.
fn parse(slot: &str, payload: &str) -> Option<(u8, u64, Status)> {
    let mut fields = payload.strip_prefix(slot)?.strip_prefix(':')?.split(':');
    let (epoch, flushed, status) = (fields.next()?, fields.next()?, fields.next()?);
    Some((epoch.parse().ok()?, flushed.parse().ok()?, Status::parse(status)?))
}

/// A message that was written into the WAL.
#[derive(Clone, Copy)]
struct Barrier {
    lsn: u64,
    /// A moment before it was written.
    since: Instant,
}

/// The positions of one slot.
pub struct Positions {
    postgres: Postgres,
    clickhouse: ClickHouse,
    config: ReplicationConfig,
    known: watch::Sender<Option<Position>>,
    /// The last one that was written here; held while one is being written, so that all who wait share it.
    barrier: tokio::sync::Mutex<Option<Barrier>>,
}

impl Positions {
    /// The positions of the configured slot in the database at `url`. Connects when it is run or asked.
    ///
    /// # Errors
    /// If the URL cannot be read.
    pub fn new(
        url: &SecretString,
        config: &ReplicationConfig,
        clickhouse: ClickHouse,
    ) -> std::result::Result<Arc<Self>, sqlx::Error> {
        Ok(Arc::new(Self {
            postgres: Postgres::new(url)?,
            clickhouse,
            config: config.clone(),
            known: watch::Sender::new(None),
            barrier: tokio::sync::Mutex::default(),
        }))
    }

    /// Listens until `stop` is cancelled.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut pause = RETRY.0;
        while !stop.is_cancelled() {
            let begin = Instant::now();
            let Some(ended) = stop.run_until_cancelled(self.listen()).await else { break };
            if begin.elapsed() > RETRY.1 {
                pause = RETRY.0;
            }
            if let Err(error) = ended {
                tracing::warn!(%error, "cannot hear how far the replicator has come; trying again");
            }
            stop.run_until_cancelled(tokio::time::sleep(pause)).await;
            pause = (pause * 2).min(RETRY.1);
        }
        self.postgres.close().await;
    }

    /// Listens until the connection is lost.
    async fn listen(&self) -> std::result::Result<(), sqlx::Error> {
        let options = PgConnectOptions::clone(&self.postgres.pool().connect_options());
        let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(ANSWER).connect_lazy_with(options);
        let mut listener = PgListener::connect_with(&pool).await?;
        listener.eager_reconnect(false);
        listener.listen(POSITIONS).await?;
        let mut beat = tokio::time::interval(LOOK_EVERY);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut unheard = 0;
        loop {
            tokio::select! {
                // The first one at once.
                _ = beat.tick() => {
                    let state = timeout(ANSWER, self.postgres.state(&self.config.slot)).await;
                    let state = state.unwrap_or(Err(sqlx::Error::PoolTimedOut))?;
                    let news = state.is_some_and(|State { epoch, flushed, status, .. }| {
                        self.learn(epoch, flushed.0, status)
                    });
                    unheard = if news { unheard + 1 } else { 0 };
                    if unheard > UNHEARD {
                        tracing::warn!("positions of the replicator are not heard of; connecting again");
                        return Ok(());
                    }
                }
                notification = listener.try_recv() => match notification? {
                    Some(notification) => {
                        if let Some((epoch, flushed, status)) = parse(&self.config.slot, notification.payload()) {
                            unheard = 0;
                            self.learn(epoch, flushed, status);
                        }
                    }
                    None => return Ok(()),
                },
            }
        }
    }

    /// Whether it was news.
    fn learn(&self, epoch: u8, flushed: u64, status: Status) -> bool {
        let Some(position) = Position::of(epoch, flushed, status) else { return false };
        self.known.send_if_modified(|known| {
            let merged = known.map_or(position, |known| known.merged(position));
            let news = *known != Some(merged);
            *known = Some(merged);
            news
        })
    }

    fn current_epoch(&self) -> u8 {
        self.known.borrow().map_or(0, |position| position.epoch)
    }

    async fn wait(&self, token: ConsistencyToken) -> Result<()> {
        let mut known = self.known.subscribe();
        let begin = Instant::now();
        let mut nudged = false;
        loop {
            let position = *known.borrow_and_update();
            match position {
                Some(position) if position.epoch > token.epoch => return self.pass_barrier().await,
                Some(position) if position.epoch == token.epoch && position.flushed >= token.lsn => {
                    return Ok(());
                }
                _ => {}
            }
            tokio::select! {
                changed = known.changed() => changed.map_err(Error::internal)?,
                () = tokio::time::sleep_until(begin + PATIENCE), if !nudged => {
                    nudged = true;
                    // Without it the position may still come by itself.
                    if let Err(error) = self.barrier(begin, token.lsn).await {
                        tracing::debug!(%error, "cannot write a message into the WAL");
                    }
                }
            }
        }
    }

    /// Waits until everything is visible that is committed now, in whichever epoch that comes true.
    async fn pass_barrier(&self) -> Result<()> {
        let mut known = self.known.subscribe();
        loop {
            let epoch = self.current_epoch();
            let barrier = self.barrier(Instant::now(), u64::MAX).await?;
            let reached = known.wait_for(|known| {
                known.is_some_and(|known| {
                    known.epoch != epoch || (known.streaming && known.flushed >= barrier)
                })
            });
            if reached.await.map_err(Error::internal)?.is_some_and(|known| known.epoch == epoch) {
                return Ok(());
            }
        }
    }

    /// Writes a message into the WAL and gives its place, unless one has been written since `begin`, or behind `lsn`.
    async fn barrier(&self, begin: Instant, lsn: u64) -> Result<u64> {
        let mut last = self.barrier.lock().await;
        if let Some(last) = *last
            && (last.since >= begin || last.lsn >= lsn)
        {
            return Ok(last.lsn);
        }
        let since = Instant::now();
        let query = sqlx::query_scalar::<_, i64>(
            "SELECT (pg_logical_emit_message(true, $1, '') - '0/0'::pg_lsn)::bigint",
        );
        let written = timeout(ANSWER, query.bind(BARRIER).fetch_one(self.postgres.pool())).await;
        let lsn = written.map_err(away)?.map_err(away)?.cast_unsigned();
        *last = Some(Barrier { lsn, since });
        Ok(lsn)
    }
}

fn away(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::unavailable("replication", error)
}

#[async_trait]
impl Freshness for Positions {
    fn epoch(&self) -> Option<u8> {
        Some(self.current_epoch())
    }

    async fn mark(&self, epoch: u8) -> Result<ConsistencyToken> {
        let query = sqlx::query_scalar::<_, i64>("SELECT (pg_current_wal_lsn() - '0/0'::pg_lsn)::bigint");
        let lsn =
            timeout(ANSWER, query.fetch_one(self.postgres.pool())).await.map_err(away)?.map_err(away)?;
        Ok(ConsistencyToken { epoch, lsn: lsn.cast_unsigned() })
    }

    async fn reach(&self, token: ConsistencyToken) -> Result<()> {
        timeout(self.config.visibility_timeout, self.wait(token)).await.unwrap_or(Err(Error::NotYetVisible))
    }

    async fn trouble(&self) -> Option<String> {
        let now = SystemClock.now().millis();
        let overview = overview(&self.postgres, &self.clickhouse, &self.config, now);
        let problems = match timeout(PROBE, overview).await {
            Ok(Ok(overview)) => overview.problems,
            Ok(Err(error)) => vec![format!("cannot ask Postgres how far the replicator has come: {error}")],
            Err(_) => vec!["Postgres or ClickHouse does not answer in time".to_owned()],
        };
        (!problems.is_empty()).then(|| problems.join("; "))
    }
}

impl fmt::Debug for Positions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Positions").field("slot", &self.config.slot).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notification_counts_only_for_its_own_slot() {
        let published = (2, 1 << 40, Status::Streaming);
        assert_eq!(parse("slot", "slot:2:1099511627776:streaming"), Some(published));
        for payload in ["slot_b:2:1:streaming", "slot:2:1", "slot:x:1:streaming", "slot:2:-1:streaming", ""] {
            assert_eq!(parse("slot", payload), None, "{payload}");
        }
    }

    #[test]
    fn an_epoch_without_a_slot_does_not_count() {
        assert_eq!(Position::of(2, 5, Status::Preparing), None);
        assert!(Position::of(2, 5, Status::Backfilling).is_some_and(|position| !position.streaming));
    }

    #[test]
    fn what_is_known_never_goes_back() {
        let position = |epoch, flushed, streaming| Position { epoch, flushed, streaming };
        let [old, ahead, done] = [position(1, 9, true), position(2, 5, false), position(2, 4, true)];
        assert_eq!(old.merged(ahead), ahead);
        assert_eq!(ahead.merged(old), ahead);
        assert_eq!(ahead.merged(done), position(2, 5, true));
        assert_eq!(done.merged(ahead), position(2, 5, true));
    }
}
