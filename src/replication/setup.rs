//! What must be in Postgres before a change can stream: replica identity, publication, slot, state row. Made when it is
//! missing; a slot that cannot be trusted is made anew under the next epoch, never silently.

use secrecy::SecretString;
use sqlx::AssertSqlSafe;
use sqlx::postgres::PgPool;

use super::postgres::{self, Lsn, Postgres, Slot, State, Status};
use super::wal::{System, WalError, identify};
use crate::clickhouse::{ClickHouse, Fault};
use crate::config::ReplicationConfig;

/// Held while setting up, so that two replicas do it one after the other. Any constant would do.
const SETUP_LOCK: i64 = 0x7365_7373_7265_706c;
const INDEX: &str = "sessions_by_creation";

/// Why replication cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// A setting of Postgres is in the way.
    #[error("{0}")]
    Postgres(&'static str),
    /// Eight bits of epochs are used up.
    #[error(
        "the replication has begun anew 255 times, and there is no 256th; choose another replication.slot and another \
         clickhouse.table, and drop the old ones"
    )]
    EpochsUsedUp,
    /// Postgres is away, or refuses.
    #[error("Postgres does not let the replication be set up")]
    Sql(#[from] sqlx::Error),
    /// The replication connection cannot be made.
    #[error("cannot open a replication connection")]
    Wal(#[from] WalError),
    /// ClickHouse is away.
    #[error("cannot ask ClickHouse how far it is")]
    ClickHouse(#[from] Fault),
}

impl SetupError {
    pub(super) fn wal_text(&self) -> Option<&WalError> {
        match self {
            Self::Wal(error) => Some(error),
            _ => None,
        }
    }
}

/// What replication begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prepared {
    /// 1 to 255.
    pub epoch: u8,
    /// [`Status::Backfilling`] or [`Status::Streaming`].
    pub status: Status,
}

/// Makes what is missing. Changes nothing when everything is in order.
///
/// # Errors
/// [`SetupError`], in words that an operator can act on.
pub(super) async fn prepare(
    postgres: &Postgres,
    url: &SecretString,
    clickhouse: &ClickHouse,
    config: &ReplicationConfig,
) -> Result<Prepared, SetupError> {
    // The lock lives as long as this transaction, which does nothing else: a slot waits for whoever has written.
    let mut lock = postgres.pool().begin().await?;
    sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(SETUP_LOCK).execute(&mut *lock).await?;
    let prepared = prepare_locked(postgres, url, clickhouse, config).await;
    lock.rollback().await?;
    prepared
}

async fn prepare_locked(
    postgres: &Postgres,
    url: &SecretString,
    clickhouse: &ClickHouse,
    config: &ReplicationConfig,
) -> Result<Prepared, SetupError> {
    let pool = postgres.pool();
    check_server(pool).await?;
    set_identity(pool).await?;
    let published = publish(pool, &config.publication).await?;
    let system = identify(url, config).await?;
    let (slot, state) = (postgres.slot(&config.slot).await?, postgres.state(&config.slot).await?);
    let fault = match (&slot, &state) {
        (None, None) => None,
        (slot, state) => distrust(slot.as_ref(), state.as_ref(), &system, published),
    };
    match (fault, state) {
        (None, Some(State { epoch, status, .. })) => return Ok(Prepared { epoch, status }),
        (None, None) => tracing::info!(slot = config.slot, "setting up replication to ClickHouse"),
        (Some(fault), _) => {
            tracing::error!(
                slot = config.slot,
                fault,
                "replication begins anew: every session is copied again"
            );
        }
    }
    if slot.is_some() {
        postgres.drop_slot(&config.slot).await?;
    }
    let last = postgres.state(&config.slot).await?.map_or(0, |state| state.epoch);
    let epoch = last.max(clickhouse.newest_epoch().await?).checked_add(1).ok_or(SetupError::EpochsUsedUp)?;
    begin_epoch(postgres, config, &system, epoch).await?;
    Ok(Prepared { epoch, status: Status::Backfilling })
}

/// Why the slot cannot be what the state row says.
fn distrust(
    slot: Option<&Slot>,
    state: Option<&State>,
    system: &System,
    published: Published,
) -> Option<&'static str> {
    let Some(state) = state else { return Some("there is a slot that nobody remembers") };
    let Some(slot) = slot else {
        return Some(match state.status {
            Status::Dropped => "the slot was dropped, because it held too much",
            _ => "the slot is gone",
        });
    };
    if !slot.ours {
        Some("the slot is of another plugin or database")
    } else if slot.is_lost() {
        Some("the WAL that the slot needs is gone (see max_slot_wal_keep_size)")
    } else if state.system_identifier != system.identifier {
        Some("this is another Postgres cluster")
    } else if state.timeline != system.timeline {
        Some("this Postgres is on another timeline: it was promoted or restored")
    } else if published == Published::Now {
        Some("the publication was missing, or published something else")
    } else if !matches!(state.status, Status::Backfilling | Status::Streaming) {
        Some("the last attempt to make the slot did not end")
    } else if slot.confirmed > state.flushed {
        Some("somebody else has read the slot, or made it anew")
    } else {
        None
    }
}

/// The new epoch is written down first, as one that cannot be trusted yet, then the slot is made.
async fn begin_epoch(
    postgres: &Postgres,
    config: &ReplicationConfig,
    system: &System,
    epoch: u8,
) -> Result<(), SetupError> {
    sqlx::query(
        "INSERT INTO replication_state (slot, epoch, system_identifier, timeline, slot_lsn, status, flushed_lsn, changed_at) \
         VALUES ($1, $2, $3, $4, 0, $5, 0, (extract(epoch FROM clock_timestamp()) * 1000)::bigint) \
         ON CONFLICT (slot) DO UPDATE SET epoch = $2, system_identifier = $3, timeline = $4, slot_lsn = 0, status = $5, \
         backfill_cursor = NULL, flushed_lsn = 0, changed_at = excluded.changed_at",
    )
    .bind(&config.slot)
    .bind(i16::from(epoch))
    .bind(&system.identifier)
    .bind(system.timeline)
    .bind(Status::Preparing.as_str())
    .execute(postgres.pool())
    .await?;
    let lsn = create_slot(postgres.pool(), &config.slot).await?;
    sqlx::query("UPDATE replication_state SET slot_lsn = $2, flushed_lsn = $2 WHERE slot = $1")
        .bind(&config.slot)
        .bind(lsn.stored())
        .execute(postgres.pool())
        .await?;
    postgres.set_status(&config.slot, epoch, Status::Backfilling).await?;
    tracing::info!(slot = config.slot, epoch, %lsn, "made the replication slot");
    Ok(())
}

async fn create_slot(pool: &PgPool, slot: &str) -> Result<Lsn, SetupError> {
    let (version,): (i32,) =
        sqlx::query_as("SELECT current_setting('server_version_num')::int").fetch_one(pool).await?;
    let create = if version >= 170_000 {
        "SELECT lsn::text FROM pg_create_logical_replication_slot($1, 'pgoutput', failover => true)"
    } else {
        "SELECT lsn::text FROM pg_create_logical_replication_slot($1, 'pgoutput')"
    };
    let created: Result<(String,), _> = sqlx::query_as(create).bind(slot).fetch_one(pool).await;
    match created {
        Ok((lsn,)) => {
            lsn.parse().map_err(|_| SetupError::Postgres("Postgres answers with a place that is none"))
        }
        Err(error) => Err(match postgres::code(&error).as_deref() {
            Some("53400") => SetupError::Postgres(
                "every replication slot is in use; raise max_replication_slots of Postgres",
            ),
            Some("42501") => SetupError::Postgres(
                "the role may not replicate; run ALTER ROLE ... REPLICATION, and let it own the table sessions",
            ),
            _ => error.into(),
        }),
    }
}

async fn check_server(pool: &PgPool) -> Result<(), SetupError> {
    let (level, standby): (String, bool) =
        sqlx::query_as("SELECT current_setting('wal_level'), pg_is_in_recovery()").fetch_one(pool).await?;
    if standby {
        return Err(SetupError::Postgres("replication.url leads to a standby; it must lead to the primary"));
    }
    if level != "logical" {
        return Err(SetupError::Postgres(
            "wal_level of Postgres must be logical; set it and restart Postgres",
        ));
    }
    Ok(())
}

/// A deleted row must be told with the columns that ClickHouse sorts by, or its tombstone would hit nothing.
async fn set_identity(pool: &PgPool) -> Result<(), SetupError> {
    let right: Option<(bool,)> = sqlx::query_as(
        "SELECT i.indisreplident AND c.relreplident = 'i' FROM pg_class c JOIN pg_index i ON i.indrelid = c.oid \
         WHERE c.oid = 'sessions'::regclass AND i.indexrelid = $1::regclass",
    )
    .bind(INDEX)
    .fetch_optional(pool)
    .await?;
    if right != Some((true,)) {
        sqlx::query(AssertSqlSafe(format!("ALTER TABLE sessions REPLICA IDENTITY USING INDEX {INDEX}")))
            .execute(pool)
            .await?;
    }
    Ok(())
}

/// Whether the publication had to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Published {
    Before,
    Now,
}

/// Postgres takes no parameters here; the configuration has made sure that the name needs no quotes.
async fn publish(pool: &PgPool, name: &str) -> Result<Published, SetupError> {
    let right: Option<(bool,)> = sqlx::query_as(
        "SELECT p.pubinsert AND p.pubupdate AND p.pubdelete AND p.pubtruncate AND NOT p.puballtables AND coalesce( \
         (SELECT array_agg(prrelid) = ARRAY['sessions'::regclass::oid] FROM pg_publication_rel WHERE prpubid = p.oid), \
         false) FROM pg_publication p WHERE p.pubname = $1",
    )
    .bind(name)
    .fetch_optional(pool)
    .await?;
    match right {
        Some((true,)) => return Ok(Published::Before),
        Some(_) => {
            sqlx::query(AssertSqlSafe(format!("DROP PUBLICATION {name}"))).execute(pool).await?;
        }
        None => {}
    }
    sqlx::query(AssertSqlSafe(format!("CREATE PUBLICATION {name} FOR TABLE sessions"))).execute(pool).await?;
    Ok(Published::Now)
}
