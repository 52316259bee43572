//! Changes of sessions, from the write-ahead log of Postgres to ClickHouse.
//!
//! [`source`] says what a stream of changes promises; [`pgwire`] reads one from Postgres, on the way that [`tunnel`] makes.
//! What it goes through then: [`pgoutput`] reads messages, [`row`] makes versions of sessions of them, [`batch`]
//! puts together what is stored at once, [`progress`] says what of the log has been stored without a gap.
//!
//! The version of a row is made of its place in the log alone ([`RowVersion`]), so whoever delivers it again, and however often,
//! stores the same.

pub mod backfill;
pub mod batch;
pub mod flush;
pub mod leader;
pub mod pgoutput;
pub mod pgwire;
pub mod progress;
#[cfg(test)]
mod recorded;
pub mod repair;
pub mod row;
pub mod slot;
pub mod source;
pub mod status;
pub mod term;
pub mod tunnel;
pub mod verify;

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::domain::{Background, Backoff, Clock};
use crate::store::index::clickhouse::ClickHouse;
use crate::store::metadata::{ReplicationStore, SqlMetadata};
use crate::telemetry::ReplicationMetrics;

/// What all parts of a replicator work with.
#[derive(Clone)]
pub struct Context {
    /// The metadata store, as the server uses it.
    pub metadata: ReplicationStore,
    /// The same database, by the way that replication takes: directly, through connections of its own.
    pub postgres: ReplicationStore,
    /// Where changes go.
    pub clickhouse: ClickHouse,
    /// Watches the tasks.
    pub background: Arc<Background>,
    /// What is shown.
    pub metrics: ReplicationMetrics,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Everything that stands before this place in the log is in ClickHouse.
    pub reached: watch::Sender<Lsn>,
    /// When each batch that is not stored yet has set out.
    flights: Arc<Mutex<BTreeMap<u64, Instant>>>,
}

/// A batch on its way, for as long as this lives.
pub(crate) struct Flight {
    number: u64,
    flights: Arc<Mutex<BTreeMap<u64, Instant>>>,
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.number);
    }
}

/// What replication is called where tasks are named.
pub const NAME: &str = "replication";
/// What anyone may read while nothing is replicated. What is in the way may name servers.
pub const HINDRANCE: &str =
    "changes do not come to ClickHouse: the log and `sessiond replicate status` say why";
/// What changes are called that ClickHouse does not take.
const DEAD_LETTERS: &str = "dead letters of replication";
/// What anyone may read while there are any.
const DEAD_LETTERS_HINDRANCE: &str =
    "lists lack changes that ClickHouse refuses: `sessiond replicate dead-letters` says which";
/// For how long a batch has been on its way when that is said.
const STALLED: Duration = Duration::from_secs(10);

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

/// The first pause before what has failed is tried again, and the longest, before jitter.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

impl Context {
    /// From the Postgres that `postgres` leads to, which is the one of `metadata`, to `clickhouse`. Asks nobody yet.
    pub fn new(
        metadata: SqlMetadata,
        postgres: SqlMetadata,
        clickhouse: ClickHouse,
        background: Arc<Background>,
        metrics: ReplicationMetrics,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let [metadata, postgres] = [metadata, postgres].map(ReplicationStore::new);
        let (reached, flights) = (watch::Sender::default(), Arc::default());
        Self { metadata, postgres, clickhouse, background, metrics, clock, reached, flights }
    }

    /// Forgets what an earlier term has reached: that may have been of another server.
    pub(crate) fn begin(&self) {
        self.reached.send_replace(Lsn(0));
    }

    /// Something sets out to be stored.
    pub(crate) fn depart(&self) -> Flight {
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        let number = flights.last_key_value().map_or(0, |(last, _)| last + 1);
        flights.insert(number, Instant::now());
        Flight { number, flights: self.flights.clone() }
    }

    /// For how long that has been on its way which is for the longest.
    pub(crate) fn longest_flight(&self) -> Option<Duration> {
        let flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        flights.values().min().map(Instant::elapsed)
    }
}

/// Tries until it succeeds, whatever is away.
async fn surely<T, E: std::error::Error + 'static, F: Future<Output = Result<T, E>>>(
    what: &'static str,
    work: impl Fn() -> F,
) -> T {
    let (first, longest) = PAUSE;
    let mut backoff = Backoff::new(first, longest);
    loop {
        match work().await {
            Ok(done) => return done,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, what, "the replicator has not succeeded, and tries again");
            }
        }
        backoff.pause().await;
    }
}

/// A place in the write-ahead log of Postgres, in bytes since its beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

/// As Postgres writes it (`pg_lsn`): two hexadecimal numbers with a slash between them.
impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & u64::from(u32::MAX))
    }
}

/// A text that is no place in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a place in the write-ahead log, which is two hexadecimal numbers with a slash between them")]
pub struct LsnError;

impl FromStr for Lsn {
    type Err = LsnError;

    fn from_str(text: &str) -> Result<Self, LsnError> {
        let (high, low) = text.split_once('/').ok_or(LsnError)?;
        let part = |text: &str| {
            let digits = (1..=8).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            digits.then(|| u64::from_str_radix(text, 16).ok()).flatten().ok_or(LsnError)
        };
        Ok(Self(part(high)? << 32 | part(low)?))
    }
}

/// Counts how often replication has begun anew, from 1: everything of a later epoch outweighs everything of an earlier one.
/// Versions of a rebuild are those of epoch 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u8);

/// `_version` of a row: the epoch in the upper 8 bits, a place in the log in the lower 56.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowVersion(pub u64);

impl RowVersion {
    /// Bits of the place. A server that writes a gigabyte a second reaches their end after two years.
    const PLACE_BITS: u32 = 56;

    /// The version of what stands at `place`.
    pub fn new(epoch: Epoch, place: Lsn) -> Self {
        Self(u64::from(epoch.0) << Self::PLACE_BITS | (place.0 & ((1 << Self::PLACE_BITS) - 1)))
    }

    /// The place in it.
    pub fn place(self) -> Lsn {
        Lsn(self.0 & ((1 << Self::PLACE_BITS) - 1))
    }

    /// The epoch in it; 0 for what a rebuild has stored.
    pub fn epoch(self) -> Epoch {
        let [epoch, ..] = self.0.to_be_bytes();
        Epoch(epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_written_and_read_as_postgres_does() {
        for (text, place) in [("0/0", 0), ("0/16B3748", 0x16B_3748), ("16/B374D848", 0x16_B374_D848)] {
            assert_eq!(Lsn(place).to_string(), text);
            assert_eq!(text.parse(), Ok(Lsn(place)));
        }
        assert_eq!("FFFFFFFF/FFFFFFFF".parse(), Ok(Lsn(u64::MAX)));
        for text in ["", "0", "/", "0/", "/0", "0/+1", "0/ 1", "1/2/3", "123456789/0", "0/0x1", "0/g"] {
            assert_eq!(text.parse::<Lsn>(), Err(LsnError), "{text}");
        }
    }

    #[test]
    fn an_epoch_outweighs_every_place() {
        assert!(RowVersion::new(Epoch(2), Lsn(0)) > RowVersion::new(Epoch(1), Lsn((1 << 56) - 1)));
        assert!(RowVersion::new(Epoch(1), Lsn(8)) > RowVersion::new(Epoch(1), Lsn(7)));
        assert_eq!(RowVersion::new(Epoch(255), Lsn(1)).0, 0xFF00_0000_0000_0001);
    }
}
