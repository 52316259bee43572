//! What the replicator asks of Postgres on ordinary connections: its state row, the slot, positions.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};

/// The channel on which positions are published, as `slot:epoch:lsn:status`.
pub(super) const POSITIONS: &str = "sessiond_replication";
/// Connections of a replicator beside the replication connection.
const CONNECTIONS: u32 = 4;
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// A place in the write-ahead log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    /// For a column of type `BIGINT`; no log is longer.
    pub(super) fn stored(self) -> i64 {
        i64::try_from(self.0).unwrap_or(i64::MAX)
    }

    pub(super) fn from_stored(lsn: i64) -> Self {
        Self(u64::try_from(lsn).unwrap_or_default())
    }
}

/// As Postgres writes it: `16/B374D848`.
impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xffff_ffff)
    }
}

impl FromStr for Lsn {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = |digits| u64::from_str_radix(digits, 16).ok().filter(|half| *half <= 0xffff_ffff);
        let halves = text.split_once('/').and_then(|(high, low)| Some((parse(high)?, parse(low)?)));
        halves.map(|(high, low)| Self(high << 32 | low)).ok_or("is not a place in the write-ahead log")
    }
}

/// How far an epoch of the replication has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// The slot is being made; a crash here leaves nothing to trust.
    Preparing,
    /// Changes stream, and rows older than the slot are being copied.
    Backfilling,
    /// Every row is there.
    Streaming,
    /// The slot has been dropped on purpose, because it held too much.
    Dropped,
}

impl Status {
    const ALL: [Self; 4] = [Self::Preparing, Self::Backfilling, Self::Streaming, Self::Dropped];

    /// The word in the state row.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Backfilling => "backfilling",
            Self::Streaming => "streaming",
            Self::Dropped => "dropped",
        }
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == text)
    }
}

/// The state row of a slot.
#[derive(Clone, Debug)]
pub struct State {
    /// 1 to 255.
    pub epoch: u8,
    /// Of the cluster that the slot is in.
    pub system_identifier: String,
    /// Of the server when the slot was made.
    pub timeline: i64,
    /// How far this epoch has come.
    pub status: Status,
    /// The last session id that the backfill has copied.
    pub backfill_cursor: Option<String>,
    /// Everything committed up to here is in ClickHouse.
    pub flushed: Lsn,
    /// Who has published that.
    pub leader: Option<String>,
    /// When, in Unix milliseconds.
    pub leader_seen_at: Option<i64>,
}

/// The slot as Postgres shows it.
#[derive(Clone, Debug)]
pub struct Slot {
    /// The process that reads it.
    pub active_pid: Option<i32>,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: String,
    /// WAL that is kept for it, in bytes.
    pub retained: u64,
    /// What its reader has confirmed.
    pub confirmed: Lsn,
    /// False for a slot of another plugin, or of another database.
    pub ours: bool,
}

impl Slot {
    /// Whether the WAL that it needs is gone.
    pub fn is_lost(&self) -> bool {
        self.wal_status == "lost"
    }
}

/// A few connections to the primary.
#[derive(Clone, Debug)]
pub struct Postgres {
    pool: PgPool,
}

impl Postgres {
    /// Connections are made when they are needed.
    ///
    /// # Errors
    /// If the URL cannot be read.
    pub fn new(url: &SecretString) -> Result<Self, sqlx::Error> {
        let options =
            PgConnectOptions::from_str(url.expose_secret())?.application_name("sessiond-replication");
        let pool = PgPoolOptions::new()
            .max_connections(CONNECTIONS)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .connect_lazy_with(options);
        Ok(Self { pool })
    }

    pub(super) fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// Ends every connection.
    pub async fn close(&self) {
        self.pool.close().await;
    }

    /// The state row of `slot`.
    ///
    /// # Errors
    /// If Postgres is away or the row cannot be read.
    pub async fn state(&self, slot: &str) -> Result<Option<State>, sqlx::Error> {
        type Row = (i16, String, i64, String, Option<String>, i64, Option<String>, Option<i64>);
        let row: Option<Row> = sqlx::query_as(
            "SELECT epoch, system_identifier, timeline, status, backfill_cursor, flushed_lsn, leader, leader_seen_at \
             FROM replication_state WHERE slot = $1",
        )
        .bind(slot)
        .fetch_optional(&self.pool)
        .await?;
        let Some((
            epoch,
            system_identifier,
            timeline,
            status,
            backfill_cursor,
            flushed,
            leader,
            leader_seen_at,
        )) = row
        else {
            return Ok(None);
        };
        Ok(Some(State {
            epoch: u8::try_from(epoch).map_err(|error| sqlx::Error::Decode(error.into()))?,
            system_identifier,
            timeline,
            status: Status::parse(&status).ok_or_else(|| sqlx::Error::Decode("unknown status".into()))?,
            backfill_cursor,
            flushed: Lsn::from_stored(flushed),
            leader,
            leader_seen_at,
        }))
    }

    /// The slot, if there is one of that name.
    ///
    /// # Errors
    /// If Postgres is away.
    pub async fn slot(&self, slot: &str) -> Result<Option<Slot>, sqlx::Error> {
        type Row = (Option<i32>, Option<String>, Option<i64>, Option<String>, bool);
        let row: Option<Row> = sqlx::query_as(
            "SELECT active_pid, wal_status, pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::bigint, \
             confirmed_flush_lsn::text, coalesce(plugin = 'pgoutput' AND database = current_database(), false) \
             FROM pg_replication_slots WHERE slot_name = $1",
        )
        .bind(slot)
        .fetch_optional(&self.pool)
        .await?;
        Ok(row.map(|(active_pid, wal_status, retained, confirmed, ours)| Slot {
            active_pid,
            wal_status: wal_status.unwrap_or_else(|| "lost".to_owned()),
            retained: retained.and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or_default(),
            confirmed: confirmed.and_then(|lsn| lsn.parse().ok()).unwrap_or_default(),
            ours,
        }))
    }

    /// Tells every replica that what was committed up to `flushed` is in ClickHouse. Never goes back inside an epoch; says
    /// nothing of an epoch that is over. The row may lag behind after a crash of Postgres, which is safe.
    pub(super) async fn publish(
        &self,
        slot: &str,
        epoch: u8,
        flushed: Lsn,
        leader: &str,
    ) -> Result<(), sqlx::Error> {
        let mut transaction = self.pool.begin().await?;
        sqlx::query("SET LOCAL synchronous_commit = off").execute(&mut *transaction).await?;
        sqlx::query(
            "WITH published AS ( \
                UPDATE replication_state SET flushed_lsn = greatest(flushed_lsn, $3), leader = $4, \
                leader_seen_at = (extract(epoch FROM clock_timestamp()) * 1000)::bigint \
                WHERE slot = $1 AND epoch = $2 RETURNING flushed_lsn, status) \
             SELECT pg_notify($5, $1 || ':' || $2 || ':' || flushed_lsn || ':' || status) FROM published",
        )
        .bind(slot)
        .bind(i16::from(epoch))
        .bind(flushed.stored())
        .bind(leader)
        .bind(POSITIONS)
        .execute(&mut *transaction)
        .await?;
        transaction.commit().await
    }

    /// Puts a message of ours into the WAL, in a commit of its own, and returns where. Whoever reads the slot hears of it in
    /// order, so once everything up to there is flushed, so is everything that was committed before this call.
    pub(super) async fn emit(&self, prefix: &str) -> Result<Lsn, sqlx::Error> {
        let (): () = sqlx::query_as::<_, (String,)>("SELECT pg_logical_emit_message(true, $1, '')::text")
            .bind(prefix)
            .fetch_one(&self.pool)
            .await
            .map(drop)?;
        self.wal_position().await
    }

    /// The end of the WAL: at or behind every commit that has returned.
    pub(super) async fn wal_position(&self) -> Result<Lsn, sqlx::Error> {
        let (lsn,): (String,) =
            sqlx::query_as("SELECT pg_current_wal_lsn()::text").fetch_one(&self.pool).await?;
        lsn.parse().map_err(|error: &str| sqlx::Error::Decode(error.into()))
    }

    /// Changes the status of an epoch that is still the newest, and tells every replica.
    pub(super) async fn set_status(&self, slot: &str, epoch: u8, status: Status) -> Result<(), sqlx::Error> {
        sqlx::query(
            "WITH changed AS ( \
                UPDATE replication_state SET status = $3, changed_at = (extract(epoch FROM clock_timestamp()) * 1000)::bigint \
                WHERE slot = $1 AND epoch = $2 RETURNING flushed_lsn) \
             SELECT pg_notify($4, $1 || ':' || $2 || ':' || flushed_lsn || ':' || $3) FROM changed",
        )
        .bind(slot)
        .bind(i16::from(epoch))
        .bind(status.as_str())
        .bind(POSITIONS)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Drops the slot, ending whoever reads it. Fine if there is none.
    ///
    /// # Errors
    /// If Postgres is away, or refuses.
    pub async fn drop_slot(&self, slot: &str) -> Result<(), sqlx::Error> {
        // A reader that has been told to end holds the slot for a moment longer.
        for attempt in 0..50 {
            sqlx::query("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1 AND active")
                .bind(slot)
                .execute(&self.pool)
                .await?;
            let dropped = sqlx::query(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = $1",
            )
            .bind(slot)
            .execute(&self.pool)
            .await;
            match dropped {
                Err(error) if is_busy(&error) && attempt < 49 => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                other => return other.map(drop),
            }
        }
        Ok(())
    }
}

/// 55006, object in use.
pub(super) fn is_busy(error: &sqlx::Error) -> bool {
    code(error).as_deref() == Some("55006")
}

/// The SQLSTATE of an answer.
pub(super) fn code(error: &sqlx::Error) -> Option<String> {
    error.as_database_error().and_then(|error| error.code()).map(|code| code.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_written_as_postgres_writes_them() {
        assert_eq!(Lsn(0x16_B374_D848).to_string(), "16/B374D848");
        assert_eq!("16/B374D848".parse(), Ok(Lsn(0x16_B374_D848)));
        for text in ["", "16", "16/", "x/1", "1/100000000"] {
            assert!(text.parse::<Lsn>().is_err(), "{text}");
        }
    }
}
