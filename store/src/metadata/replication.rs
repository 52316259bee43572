//! What replication to ClickHouse asks of Postgres beside the stream itself.
//!
//! A stream tells of a transaction before a query sees it, mostly by a moment, behind a synchronous standby by as long as that
//! takes. So a query that is made because of a change is answered only once that transaction is visible to it.

use sea_orm::{ConnectionTrait, DbBackend, QueryResult, Statement, Value};

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
    /// Everything before this place of the log is in ClickHouse.
    pub flushed: u64,
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
    /// An operator has dropped it.
    Dropped,
    /// It held too much of the log, and was dropped for it.
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

    /// What is known of a slot; `None` if nobody has made it.
    ///
    /// # Errors
    /// [`Error::Unavailable`]; [`Error::Internal`] for a row that this program does not understand.
    pub async fn state(&self, slot: &str) -> Result<Option<ReplicationState>> {
        let sql =
            "SELECT epoch, system_identifier, timeline, phase, flushed_lsn FROM replication WHERE slot = $1";
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
            flushed: flushed.cast_unsigned(),
        }))
    }

    /// Says that the leader of `epoch` lives and that everything before `flushed` is in ClickHouse, and puts a message of its own
    /// into the log: a stream that is well brings it. False if the epoch is over.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn beat(
        &self,
        slot: &str,
        epoch: u8,
        leader: &str,
        flushed: u64,
        prefix: &str,
    ) -> Result<bool> {
        let sql = "WITH beat AS (UPDATE replication SET beats = beats + 1, leader = $3, \
                   flushed_lsn = greatest(flushed_lsn, $4), flushed_at = (extract(epoch FROM clock_timestamp()) * 1000)::bigint, \
                   leader_seen_at = (extract(epoch FROM clock_timestamp()) * 1000)::bigint \
                   WHERE slot = $1 AND epoch = $2 RETURNING 1) \
                   SELECT pg_logical_emit_message(true, $5, '')::text AS place FROM beat";
        let values = [
            slot.into(),
            i16::from(epoch).into(),
            leader.into(),
            flushed.cast_signed().into(),
            prefix.into(),
        ];
        Ok(self.one(sql, values).await?.is_some())
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

    async fn one<const N: usize>(&self, sql: &str, values: [Value; N]) -> Result<Option<QueryResult>> {
        Ok(self.all(sql, values).await?.into_iter().next())
    }

    async fn all<const N: usize>(&self, sql: &str, values: [Value; N]) -> Result<Vec<QueryResult>> {
        let statement = Statement::from_sql_and_values(DbBackend::Postgres, sql, values);
        self.store.reader().query_all_raw(statement).await.map_err(fault)
    }
}

fn get<T: sea_orm::TryGetable>(row: &QueryResult, column: &str) -> Result<T> {
    row.try_get("", column).map_err(fault)
}
