//! What replication to ClickHouse asks of Postgres beside the stream itself.
//!
//! A stream tells of a transaction before a query sees it, mostly by a moment, behind a synchronous standby by as long as that
//! takes. So a query that is made because of a change is answered only once that transaction is visible to it.

use std::time::Duration;

use sea_orm::{ConnectionTrait, DatabaseTransaction, DbBackend, QueryResult, Statement, Value};

use super::{SqlMetadata, fault};
use sessiond_domain::error::{Error, Result};

/// The row of the table `replication` that belongs to a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicationState {
    /// 1 to 255.
    pub epoch: u8,
    /// Which cluster the slot is in.
    pub system_identifier: String,
    /// The timeline of the server when the slot was made.
    pub timeline: u32,
    /// What is being done.
    pub phase: Phase,
    /// The id of the last session that was copied, while older rows are being copied.
    pub backfilled_to: Option<String>,
    /// How many heartbeats there have been.
    pub beats: u64,
    /// Everything before this place of the log is in ClickHouse, as of the last heartbeat.
    pub flushed: u64,
    /// Who leads, or led last, and how long ago it was last heard of, in milliseconds.
    pub leader: Option<(String, i64)>,
    /// How long it had stored nothing when it was last heard of, though there was something, in milliseconds.
    pub stalled: i64,
    /// The last heartbeat of this epoch that ClickHouse is known to have stored; 0 for none.
    pub marked: u64,
}

/// A sign of life of a leader.
#[derive(Clone, Copy, Debug)]
pub struct Beat<'a> {
    /// The slot.
    pub slot: &'a str,
    /// What it is read under.
    pub epoch: u8,
    /// Who leads.
    pub leader: &'a str,
    /// Everything before this place of the log is in ClickHouse.
    pub flushed: u64,
    /// False while nothing can be stored, though there is something.
    pub is_storing: bool,
}

/// What is being done with a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It is being made. Whoever finds it so makes it anew: what there is may be of an attempt that has died.
    Creating,
    /// Its changes stream, and the rows that are older are being copied.
    Backfilling,
    /// Every row is there.
    Streaming,
    /// An operator has dropped it, and nobody makes it anew before an operator says so.
    Dropped,
    /// It keeps more of the log than it may. It is dropped for it, and made anew once ClickHouse answers.
    Overrun,
}

impl Phase {
    const ALL: [Self; 5] = [Self::Creating, Self::Backfilling, Self::Streaming, Self::Dropped, Self::Overrun];

    /// The word in the table.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Backfilling => "backfilling",
            Self::Streaming => "streaming",
            Self::Dropped => "dropped",
            Self::Overrun => "overrun",
        }
    }
}

/// A replication slot, as the server shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotStatus {
    /// Whether it decodes this database by `pgoutput`, and outlives its connection. Any other one is somebody else's.
    pub is_ours: bool,
    /// Whether somebody reads it.
    pub is_active: bool,
    /// Whether the log that it needs is gone.
    pub is_lost: bool,
    /// Bytes of the log that are kept for it.
    pub retained: u64,
    /// Bytes of the log behind what its reader has confirmed.
    pub behind: u64,
    /// Everything before this place has been confirmed.
    pub confirmed: u64,
}

/// Which database of which cluster a connection leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Made with the cluster, and copied with it.
    pub system_identifier: String,
    /// The database.
    pub database: String,
}

/// What a publication publishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Published {
    /// There is none of this name.
    Nothing,
    /// All changes of sessions, and nothing else.
    Sessions,
    /// Something else.
    Otherwise,
}

/// Held while a slot is made.
#[derive(Debug)]
pub struct SetupLock {
    transaction: DatabaseTransaction,
}

impl SetupLock {
    /// Gives it back.
    pub async fn release(self) {
        // It wrote nothing: however it ends, what was done is done.
        let _ = in_time(async { self.transaction.rollback().await.map_err(fault) }).await;
    }
}

/// Held while a slot is made, so that of several processes one makes it. Any number would do.
const SETUP_LOCK: i64 = 0x5E55_1043;

/// Whose heartbeats in the log are.
const HEARTBEAT: &str = "sessiond.heartbeat";

/// Longest that an answer may take. A host that is gone says nothing, and the connection to it may live for long.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// The questions, of one Postgres.
#[derive(Clone, Debug)]
pub struct ReplicationStore {
    store: SqlMetadata,
}

impl ReplicationStore {
    /// Asks through the connections of `store`, which must be to a Postgres.
    pub fn new(store: SqlMetadata) -> Self {
        Self { store }
    }

    /// The metadata store that the same connections are of.
    pub fn metadata(&self) -> &SqlMetadata {
        &self.store
    }

    /// What is known of a slot; `None` if nobody has made it.
    ///
    /// # Errors
    /// [`Error::Unavailable`]; [`Error::Internal`] for a row that this program does not understand.
    pub async fn state(&self, slot: &str) -> Result<Option<ReplicationState>> {
        let sql = "SELECT epoch, system_identifier, timeline, phase, backfilled_to, beats, marked, flushed_lsn, leader, \
                   coalesce(leader_seen_at - flushed_at, 0) AS stalled, coalesce((extract(epoch FROM clock_timestamp()) * 1000)::bigint - leader_seen_at, 0) AS unheard \
                   FROM replication WHERE slot = $1";
        let Some(row) = self.one(sql, [slot.into()]).await? else { return Ok(None) };
        let (epoch, timeline): (i16, i64) = (get(&row, "epoch")?, get(&row, "timeline")?);
        let (phase, flushed): (String, i64) = (get(&row, "phase")?, get(&row, "flushed_lsn")?);
        let unknown = |what: &str| Error::internal(format!("the table replication holds an unknown {what}"));
        Ok(Some(ReplicationState {
            epoch: u8::try_from(epoch).map_err(|_| unknown("epoch"))?,
            system_identifier: get(&row, "system_identifier")?,
            timeline: u32::try_from(timeline).map_err(|_| unknown("timeline"))?,
            phase: Phase::ALL
                .into_iter()
                .find(|one| one.as_str() == phase)
                .ok_or_else(|| unknown("phase"))?,
            backfilled_to: get(&row, "backfilled_to")?,
            beats: get::<i64>(&row, "beats")?.cast_unsigned(),
            flushed: flushed.cast_unsigned(),
            leader: get::<Option<String>>(&row, "leader")?.zip(get(&row, "unheard")?),
            stalled: get(&row, "stalled")?,
            marked: get::<i64>(&row, "marked")?.cast_unsigned(),
        }))
    }

    /// Says that a leader lives, and puts a message of its own into the log: a stream that is well brings it. What is returned
    /// counts these signs; `None` if nobody is to lead under this epoch any more.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn beat(&self, beat: Beat<'_>) -> Result<Option<u64>> {
        let Beat { slot, epoch, leader, flushed, is_storing } = beat;
        let sql = "WITH beat AS (UPDATE replication SET beats = beats + 1, leader = $3, \
                   flushed_lsn = greatest(flushed_lsn, $4), flushed_at = CASE WHEN $6 THEN \
                   (extract(epoch FROM clock_timestamp()) * 1000)::bigint ELSE flushed_at END, leader_seen_at = (extract(epoch FROM clock_timestamp()) * 1000)::bigint \
                   WHERE slot = $1 AND epoch = $2 AND phase IN ('backfilling', 'streaming') RETURNING beats) \
                   SELECT beats, pg_logical_emit_message(true, $5, '')::text AS place FROM beat";
        let values = [
            slot.into(),
            i16::from(epoch).into(),
            leader.into(),
            flushed.cast_signed().into(),
            HEARTBEAT.into(),
            is_storing.into(),
        ];
        let beat = self.noted(sql, values).await?;
        beat.map(|row| get::<i64>(&row, "beats").map(i64::cast_unsigned)).transpose()
    }

    /// Notes that ClickHouse has stored this heartbeat. False if the epoch is over.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn marked(&self, slot: &str, epoch: u8, beat: u64) -> Result<bool> {
        let sql = "UPDATE replication SET marked = greatest(marked, $3) WHERE slot = $1 AND epoch = $2 RETURNING 1 AS one";
        self.note(sql, [slot.into(), i16::from(epoch).into(), beat.cast_signed().into()]).await
    }

    /// Begins the copy of older rows anew, under a `new` epoch in the place of `old`: whoever still copies under that one stores
    /// and notes nothing that counts. False if it is over already, or if there has been another heartbeat since `beats`.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn copy_anew(&self, slot: &str, old: u8, beats: u64, new: u8) -> Result<bool> {
        let sql = "UPDATE replication SET epoch = $3, phase = 'backfilling', backfilled_to = NULL, swept_at = NULL, \
                   truncated_lsn = 0, marked = 0 WHERE slot = $1 AND epoch = $2 AND beats = $4 \
                   AND phase IN ('backfilling', 'streaming') RETURNING 1 AS one";
        let values = [slot.into(), i16::from(old).into(), i16::from(new).into(), beats.cast_signed().into()];
        self.note(sql, values).await
    }

    /// Says that a slot keeps more of the log than it may: nobody is to read it any more. False if nobody is anyway.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn overrun(&self, slot: &str, epoch: u8) -> Result<bool> {
        let sql = "UPDATE replication SET phase = 'overrun' WHERE slot = $1 AND epoch = $2 AND \
                   phase IN ('backfilling', 'streaming') RETURNING 1 AS one";
        self.note(sql, [slot.into(), i16::from(epoch).into()]).await
    }

    /// Says that nobody is to read or make a slot before [`ReplicationStore::allow`]. False if nobody has ever made it.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn forbid(&self, slot: &str) -> Result<bool> {
        let sql = "UPDATE replication SET phase = 'dropped' WHERE slot = $1 RETURNING 1 AS one";
        self.note(sql, [slot.into()]).await
    }

    /// Has a slot made anew that an operator has dropped. False if none has.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn allow(&self, slot: &str) -> Result<bool> {
        // What comes late of the epoch that was dropped must not outweigh the copy.
        let sql = "UPDATE replication SET phase = 'creating', epoch = least(epoch + 1, 255) \
                   WHERE slot = $1 AND phase = 'dropped' RETURNING 1 AS one";
        self.note(sql, [slot.into()]).await
    }

    /// Drops a slot that nobody is to read any more, if nobody does. Whether it is gone.
    ///
    /// # Errors
    /// [`Error::Unavailable`], also if somebody has begun to read it meanwhile.
    pub async fn drop_slot(&self, slot: &str) -> Result<bool> {
        self.drop_slot_where("r.phase IN ('dropped', 'overrun')", [slot.into()]).await
    }

    /// Drops a slot that cannot be read under `epoch`, if nobody has made it anew. Whether it is gone.
    ///
    /// # Errors
    /// As [`ReplicationStore::drop_slot`].
    pub async fn discard_slot(&self, slot: &str, epoch: u8) -> Result<bool> {
        self.drop_slot_where("r.epoch = $2", [slot.into(), i16::from(epoch).into()]).await
    }

    async fn drop_slot_where<const N: usize>(&self, condition: &str, values: [Value; N]) -> Result<bool> {
        let slot = values[0].clone();
        let sql = format!(
            "SELECT pg_drop_replication_slot(s.slot_name)::text AS dropped FROM pg_replication_slots s \
             JOIN replication r ON r.slot = s.slot_name WHERE s.slot_name = $1 AND NOT s.active AND {condition}"
        );
        self.all(&sql, values).await?;
        let left = self.one("SELECT 1 AS one FROM pg_replication_slots WHERE slot_name = $1", [slot]).await?;
        Ok(left.is_none())
    }

    /// Ends the connection that reads a slot.
    ///
    /// # Errors
    /// [`Error::Unavailable`], also if we may not.
    pub async fn disconnect(&self, slot: &str) -> Result<()> {
        let sql = "SELECT pg_terminate_backend(active_pid) AS ended FROM pg_replication_slots WHERE slot_name = $1 AND active";
        self.one(sql, [slot.into()]).await.map(drop)
    }

    /// Which server and database answers here.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn place(&self) -> Result<Place> {
        let sql = "SELECT system_identifier::text AS system, current_database()::text AS database FROM pg_control_system()";
        let row = self.one(sql, []).await?.ok_or_else(|| Error::internal("a question without an answer"))?;
        Ok(Place { system_identifier: get(&row, "system")?, database: get(&row, "database")? })
    }

    /// Up to where the server has read the log for the reader of a slot; `None` if nobody reads it.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn sent(&self, slot: &str) -> Result<Option<u64>> {
        let sql = "SELECT (r.sent_lsn - '0/0'::pg_lsn)::bigint AS sent FROM pg_replication_slots s \
                   JOIN pg_stat_replication r ON r.pid = s.active_pid WHERE s.slot_name = $1";
        let Some(row) = self.one(sql, [slot.into()]).await? else { return Ok(None) };
        Ok(get::<Option<i64>>(&row, "sent")?.map(i64::cast_unsigned))
    }

    /// How long the oldest transaction has been open that may have written, in milliseconds, and whose it is, in words. Slots
    /// are made, and older rows copied, when it is over.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn oldest_writer(&self) -> Result<Option<(i64, String)>> {
        let sql = "SELECT (extract(epoch FROM clock_timestamp() - begun) * 1000)::bigint AS open, whose FROM (\
                   SELECT xact_start AS begun, 'process ' || pid AS whose FROM pg_stat_activity \
                   WHERE backend_xid IS NOT NULL AND xact_start IS NOT NULL UNION ALL \
                   SELECT prepared, 'the prepared transaction ' || gid FROM pg_prepared_xacts) AS writers ORDER BY begun LIMIT 1";
        let Some(row) = self.one(sql, []).await? else { return Ok(None) };
        Ok(Some((get(&row, "open")?, get(&row, "whose")?)))
    }

    /// Columns of the sessions with these ids, as text, in no order; `None` as long as not all of the transactions are visible
    /// whose ids have these as their lower 32 bits. Column names are the caller's own.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn sessions(
        &self,
        columns: &[&str],
        ids: &[&str],
        xids: &[u32],
    ) -> Result<Option<Vec<Vec<Option<String>>>>> {
        let selected: Vec<_> = columns.iter().map(|column| format!("s.{column}::text AS {column}")).collect();
        // An id of a transaction is 64 bits long and comes as the lower 32: it is the one that is nearest to the newest.
        let sql = format!(
            "WITH seen AS (SELECT pg_current_snapshot() AS snapshot, \
                pg_snapshot_xmax(pg_current_snapshot())::text::bigint AS newest), \
             visible AS (SELECT coalesce(bool_and(pg_visible_in_snapshot((newest + \
                (((xid::bigint - (newest & 4294967295) + 2147483648) & 4294967295) - 2147483648))::text::xid8, snapshot)), \
                true) AS all FROM seen, jsonb_array_elements_text($1::jsonb) AS xid) \
             SELECT visible.all AS visible, {} FROM visible LEFT JOIN sessions s \
                ON visible.all AND s.id IN (SELECT jsonb_array_elements_text($2::jsonb))",
            selected.join(", ")
        );
        let json = |value: serde_json::Result<String>| value.map_err(Error::internal);
        let values = [json(serde_json::to_string(xids))?.into(), json(serde_json::to_string(ids))?.into()];
        let rows = self.all(&sql, values).await?;
        let mut found = Vec::new();
        for row in &rows {
            if !get::<bool>(row, "visible")? {
                return Ok(None);
            }
            let columns = columns.iter().map(|column| get::<Option<String>>(row, column));
            let columns = columns.collect::<Result<Vec<_>>>()?;
            // Of no session at all the join makes a row of nothing.
            if columns.iter().any(Option::is_some) {
                found.push(columns);
            }
        }
        Ok(Some(found))
    }

    /// What keeps this server from being replicated, in words for its operator; `None` if nothing does.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn obstacle(&self) -> Result<Option<&'static str>> {
        let sql = "SELECT pg_is_in_recovery() AS standby, current_setting('wal_level') = 'logical' AS logical, \
                   current_setting('synchronous_commit') <> 'off' AS durable, coalesce((SELECT i.indisreplident AND \
                   c.relreplident = 'i' FROM pg_class c JOIN pg_index i ON i.indrelid = c.oid WHERE c.oid = \
                   'sessions'::regclass AND i.indexrelid = to_regclass('sessions_by_creation')), false) AS identity";
        let row = self.one(sql, []).await?.ok_or_else(|| Error::internal("a question without an answer"))?;
        Ok(if get(&row, "standby")? {
            Some("this Postgres is a standby; replication.url must lead to the primary")
        } else if !get::<bool>(&row, "logical")? {
            Some("wal_level of this Postgres must be logical: set it and restart Postgres")
        } else if !get::<bool>(&row, "durable")? {
            Some(
                "synchronous_commit is off: ALTER ROLE ... SET synchronous_commit = on for the role that we connect as",
            )
        } else if !get::<bool>(&row, "identity")? {
            Some(
                "the replica identity of sessions is gone: CREATE UNIQUE INDEX sessions_by_creation ON sessions \
                 (environment_id, created_at, id), then ALTER TABLE sessions REPLICA IDENTITY USING INDEX sessions_by_creation",
            )
        } else {
            None
        })
    }

    /// What a publication publishes.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn published(&self, publication: &str) -> Result<Published> {
        // Row filters and column lists are of Postgres 15; before, the columns are not there to be asked for.
        let sql = "SELECT p.pubinsert AND p.pubupdate AND p.pubdelete AND p.pubtruncate AND NOT p.puballtables AND \
                   coalesce((SELECT bool_and(r.prrelid = 'sessions'::regclass AND to_jsonb(r) ->> 'prqual' IS NULL AND \
                   to_jsonb(r) ->> 'prattrs' IS NULL) FROM pg_publication_rel r WHERE r.prpubid = p.oid), false) AS fits \
                   FROM pg_publication p WHERE p.pubname = $1";
        let Some(row) = self.one(sql, [publication.into()]).await? else { return Ok(Published::Nothing) };
        Ok(if get(&row, "fits")? { Published::Sessions } else { Published::Otherwise })
    }

    /// Makes a publication of all changes of sessions.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn publish(&self, publication: &str) -> Result<()> {
        let name = publication.replace('"', "\"\"");
        let make = format!("CREATE PUBLICATION \"{name}\" FOR TABLE sessions");
        self.store.reader().execute_unprepared(&make).await.map_err(fault)?;
        Ok(())
    }

    /// The slot of this name.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn slot(&self, slot: &str) -> Result<Option<SlotStatus>> {
        let sql = "SELECT coalesce(database = current_database() AND plugin = 'pgoutput' AND NOT temporary, false) AS ours, \
                   active, coalesce(wal_status, 'lost') = 'lost' AS lost, \
                   coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn), 0)::bigint AS retained, \
                   coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn), 0)::bigint AS behind, \
                   coalesce(confirmed_flush_lsn - '0/0'::pg_lsn, 0)::bigint AS confirmed \
                   FROM pg_replication_slots WHERE slot_name = $1";
        let Some(row) = self.one(sql, [slot.into()]).await? else { return Ok(None) };
        Ok(Some(SlotStatus {
            is_ours: get(&row, "ours")?,
            is_active: get(&row, "active")?,
            is_lost: get(&row, "lost")?,
            retained: u64::try_from(get::<i64>(&row, "retained")?).unwrap_or_default(),
            behind: u64::try_from(get::<i64>(&row, "behind")?).unwrap_or_default(),
            confirmed: get::<i64>(&row, "confirmed")?.cast_unsigned(),
        }))
    }

    /// Waits until no other process makes a slot, and keeps others from it. Takes a connection of its own, whose transaction writes
    /// nothing: a slot is made once every transaction that has written is over, and would wait for its own maker.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn lock(&self) -> Result<SetupLock> {
        let transaction = self.store.begin().await?;
        // Of a process that is frozen the server takes it.
        let take = format!(
            "SET LOCAL idle_in_transaction_session_timeout = '60s'; SELECT pg_advisory_xact_lock({SETUP_LOCK})"
        );
        transaction.execute_unprepared(&take).await.map_err(fault)?;
        Ok(SetupLock { transaction })
    }

    /// Makes a slot under `epoch`, in three steps that a crash may fall between: it is first written down as being made, and
    /// a slot that is there under this name is dropped. False if an operator has [forbidden](ReplicationStore::forbid) it meanwhile,
    /// or another process has made it. Whoever has lost the lock drops nothing.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn make_slot(
        &self,
        lock: &SetupLock,
        slot: &str,
        epoch: u8,
        system_identifier: &str,
        timeline: u32,
    ) -> Result<bool> {
        let begin = "INSERT INTO replication (slot, epoch, system_identifier, timeline, slot_lsn, phase) \
                     VALUES ($1, $2, $3, $4, 0, 'creating') ON CONFLICT (slot) DO UPDATE SET epoch = $2, system_identifier = $3, \
                     timeline = $4, slot_lsn = 0, phase = 'creating', backfilled_to = NULL, swept_at = NULL, flushed_lsn = 0, \
                     leader = NULL, leader_seen_at = NULL, flushed_at = NULL, truncated_lsn = 0, marked = 0 \
                     WHERE replication.phase <> 'dropped' AND (replication.epoch < $2 OR \
                     replication.epoch = $2 AND replication.phase = 'creating') RETURNING 1 AS one";
        let epoch = i16::from(epoch);
        let values = [slot.into(), epoch.into(), system_identifier.into(), i64::from(timeline).into()];
        if !self.note(begin, values).await? {
            return Ok(false);
        }
        let statement = |sql: &str| Statement::from_sql_and_values(DbBackend::Postgres, sql, [slot.into()]);
        let drop_it = "SELECT pg_drop_replication_slot(slot_name)::text AS dropped FROM pg_replication_slots WHERE slot_name = $1";
        lock.transaction.query_all_raw(statement(drop_it)).await.map_err(fault)?;
        let make = "SELECT (lsn - '0/0'::pg_lsn)::bigint AS place FROM pg_create_logical_replication_slot($1, 'pgoutput')";
        // For as long as the oldest transaction takes that has written.
        let made = lock.transaction.query_one_raw(statement(make)).await.map_err(fault)?;
        let made = made.ok_or_else(|| Error::internal("a question without an answer"))?;
        let place: i64 = get(&made, "place")?;
        let end = "UPDATE replication SET slot_lsn = $3, flushed_lsn = $3, phase = 'backfilling' WHERE slot = $1 AND epoch = $2 \
                   AND phase = 'creating' RETURNING 1 AS one";
        self.note(end, [slot.into(), epoch.into(), place.into()]).await
    }

    /// A place among transactions: whoever has begun before it, and may not be visible yet, is named by a lower number.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn barrier(&self) -> Result<String> {
        let row = self.one("SELECT pg_current_xact_id()::text AS barrier", []).await?;
        row.map(|row| get(&row, "barrier"))
            .transpose()?
            .ok_or_else(|| Error::internal("a question without an answer"))
    }

    /// Whether every transaction that had begun before a barrier is over, and visible if it was committed.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn is_past(&self, barrier: &str) -> Result<bool> {
        let sql = "SELECT pg_snapshot_xmin(pg_current_snapshot()) > $1::text::xid8 AS past";
        let row = self.one(sql, [barrier.into()]).await?;
        row.map(|row| get(&row, "past")).transpose().map(Option::unwrap_or_default)
    }

    /// Columns of the next sessions behind an id, in the order of their ids, as text: so many at most, and of those no more
    /// than take so many bytes together, but one. Column names are the caller's own.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn page(
        &self,
        columns: &[&str],
        after: &str,
        limit: u32,
        bytes: u32,
    ) -> Result<Vec<Vec<Option<String>>>> {
        self.rows_behind(columns, ("id > $1", "id"), [after.into()], (limit, bytes)).await
    }

    /// As [`ReplicationStore::page`], of one environment and in the order of creation, behind a session that was created then.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn page_of(
        &self,
        columns: &[&str],
        environment: &str,
        (created_at, id): (i64, &str),
        limits: (u32, u32),
    ) -> Result<Vec<Vec<Option<String>>>> {
        let behind = "environment_id = $1 AND (created_at, id) > ($2, $3)";
        let values = [environment.into(), created_at.into(), id.into()];
        self.rows_behind(columns, (behind, "created_at, id"), values, limits).await
    }

    async fn rows_behind<const N: usize>(
        &self,
        columns: &[&str],
        (behind, order): (&str, &str),
        values: [Value; N],
        (limit, bytes): (u32, u32),
    ) -> Result<Vec<Vec<Option<String>>>> {
        let selected: Vec<_> = columns.iter().map(|column| format!("s.{column}::text AS {column}")).collect();
        let in_order = order.split(", ").map(|column| format!("s.{column}")).collect::<Vec<_>>().join(", ");
        let sql = format!(
            "WITH sizes AS (SELECT id, created_at, coalesce(octet_length(metadata::text), 0) + \
                coalesce(octet_length(trigger_config::text), 0) AS size \
                FROM sessions WHERE {behind} ORDER BY {order} LIMIT {limit}), \
             page AS (SELECT id, size, sum(size) OVER (ORDER BY {order}) AS until FROM sizes) \
             SELECT {} FROM page p JOIN sessions s ON s.id = p.id \
                WHERE until <= {bytes} OR until = size ORDER BY {in_order}",
            selected.join(", ")
        );
        let rows = self.all(&sql, values).await?;
        rows.iter().map(|row| columns.iter().map(|column| get(row, column)).collect()).collect()
    }

    /// Up to where the log is on disk: every commit that a query sees by now stands before.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn position(&self) -> Result<u64> {
        let sql = "SELECT (pg_current_wal_flush_lsn() - '0/0'::pg_lsn)::bigint AS place";
        let row = self.one(sql, []).await?.ok_or_else(|| Error::internal("a question without an answer"))?;
        Ok(get::<i64>(&row, "place")?.cast_unsigned())
    }

    /// Notes how far older rows have been copied under `epoch`; `None` once all are, and what no epoch has stored is cleared
    /// away. False if the epoch is over.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn backfilled(&self, slot: &str, epoch: u8, to: Option<&str>) -> Result<bool> {
        let sql = "UPDATE replication SET backfilled_to = $3, phase = CASE WHEN $3 IS NULL THEN 'streaming' ELSE phase END, \
                   built = CASE WHEN $3 IS NULL THEN 1 ELSE built END, swept_at = CASE WHEN $3 IS NULL THEN \
                   (extract(epoch FROM clock_timestamp()) * 1000)::bigint ELSE swept_at END \
                   WHERE slot = $1 AND epoch = $2 AND phase = 'backfilling' RETURNING 1 AS one";
        self.note(sql, [slot.into(), i16::from(epoch).into(), to.map(str::to_owned).into()]).await
    }

    /// Milliseconds since tombstones were written for the rows older than a place of the log, and that place; `None` if no second
    /// sweep is due under this epoch.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn pending_sweep(&self, slot: &str, epoch: u8) -> Result<Option<(i64, u64)>> {
        let sql = "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint - swept_at AS since, truncated_lsn FROM replication \
                   WHERE slot = $1 AND epoch = $2 AND phase = 'streaming' AND swept_at IS NOT NULL";
        let Some(row) = self.one(sql, [slot.into(), i16::from(epoch).into()]).await? else { return Ok(None) };
        Ok(Some((get(&row, "since")?, get::<i64>(&row, "truncated_lsn")?.cast_unsigned())))
    }

    /// Notes that tombstones were written for every row older than `place`, so that a second sweep is due. False if the epoch is over.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn note_truncate(&self, slot: &str, epoch: u8, place: u64) -> Result<bool> {
        let sql = "UPDATE replication SET truncated_lsn = greatest(truncated_lsn, $3), \
                   swept_at = (extract(epoch FROM clock_timestamp()) * 1000)::bigint WHERE slot = $1 AND epoch = $2 RETURNING 1 AS one";
        self.note(sql, [slot.into(), i16::from(epoch).into(), place.cast_signed().into()]).await
    }

    /// Notes that the second sweep of the rows older than `place` is done, unless another TRUNCATE came since.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn note_swept(&self, slot: &str, epoch: u8, place: u64) -> Result<()> {
        let sql = "UPDATE replication SET swept_at = NULL WHERE slot = $1 AND epoch = $2 AND truncated_lsn = $3 RETURNING 1 AS one";
        self.note(sql, [slot.into(), i16::from(epoch).into(), place.cast_signed().into()]).await.map(drop)
    }

    /// Changes a row of `replication`; whether there was one. A synchronous standby that is away must keep no leader from
    /// showing that it lives, or from going on: what a lost standby does not know is found out by its timeline.
    pub(super) async fn note<const N: usize>(&self, sql: &str, values: [Value; N]) -> Result<bool> {
        Ok(self.noted(sql, values).await?.is_some())
    }

    async fn noted<const N: usize>(&self, sql: &str, values: [Value; N]) -> Result<Option<QueryResult>> {
        in_time(self.noted_at_length(sql, values)).await
    }

    async fn noted_at_length<const N: usize>(
        &self,
        sql: &str,
        values: [Value; N],
    ) -> Result<Option<QueryResult>> {
        let transaction = self.store.begin().await?;
        // A process that is frozen or cut off in here has locked the row, and slots are made when its transaction is over: the
        // server does not wait for it for long.
        let settings =
            "SET LOCAL synchronous_commit = local; SET LOCAL idle_in_transaction_session_timeout = '2s'";
        transaction.execute_unprepared(settings).await.map_err(fault)?;
        let statement = Statement::from_sql_and_values(DbBackend::Postgres, sql, values);
        let noted = transaction.query_one_raw(statement).await.map_err(fault)?;
        transaction.commit().await.map_err(fault)?;
        Ok(noted)
    }

    pub(super) async fn one<const N: usize>(
        &self,
        sql: &str,
        values: [Value; N],
    ) -> Result<Option<QueryResult>> {
        Ok(self.all(sql, values).await?.into_iter().next())
    }

    pub(super) async fn all<const N: usize>(
        &self,
        sql: &str,
        values: [Value; N],
    ) -> Result<Vec<QueryResult>> {
        in_time(self.all_at_length(sql, values)).await
    }

    async fn all_at_length<const N: usize>(&self, sql: &str, values: [Value; N]) -> Result<Vec<QueryResult>> {
        let statement = Statement::from_sql_and_values(DbBackend::Postgres, sql, values);
        self.store.reader().query_all_raw(statement).await.map_err(fault)
    }
}

pub(super) fn get<T: sea_orm::TryGetable>(row: &QueryResult, column: &str) -> Result<T> {
    row.try_get("", column).map_err(fault)
}

async fn in_time<T>(asking: impl Future<Output = Result<T>>) -> Result<T> {
    match tokio::time::timeout(ANSWER_TIMEOUT, asking).await {
        Ok(answer) => answer,
        Err(late) => Err(Error::unavailable("metadata", late)),
    }
}
