//! The changes that ClickHouse has refused, in the table `replication_dead_letters`.

use sea_orm::QueryResult;

use super::replication::{ReplicationStore, get};
use sessiond_domain::error::Result;

/// A change that ClickHouse does not take. It holds no row: the one in `sessions` is the truth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    /// Names it.
    pub id: String,
    /// What it was to be stored under.
    pub epoch: u8,
    /// Its place in the log; 0 for a row that is older than the slot.
    pub lsn: u64,
    /// The environment of the session.
    pub environment: String,
    /// The session.
    pub session: String,
    /// Why it was not taken, without anything of what it holds.
    pub reason: String,
    /// When that was, in milliseconds since 1970.
    pub created_at: i64,
}

/// The dead letters of a slot that have not been replayed, under its current epoch; `$1` is the slot.
const DEAD_LETTERS: &str = "FROM replication_dead_letters l JOIN replication r ON r.slot = l.slot AND r.epoch = l.epoch \
                            WHERE l.slot = $1 AND l.replayed_at IS NULL";

impl ReplicationStore {
    /// Keeps dead letters of a slot; those that are kept already are left as they are.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn keep_dead_letters(&self, slot: &str, letters: &[DeadLetter]) -> Result<()> {
        for letter in letters {
            let DeadLetter { id, epoch, lsn, environment, session, reason, created_at } = letter;
            let sql = "INSERT INTO replication_dead_letters (id, slot, epoch, lsn, environment_id, session_id, reason, created_at) \
                       VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (id) DO NOTHING RETURNING 1 AS one";
            let values = [
                id.into(),
                slot.into(),
                i16::from(*epoch).into(),
                lsn.cast_signed().into(),
                environment.into(),
                session.into(),
                reason.into(),
                (*created_at).into(),
            ];
            self.note(sql, values).await?;
        }
        Ok(())
    }

    /// Dead letters that have not been replayed, in the order of their ids; `limit` of them at most. What was not taken under an
    /// earlier epoch has been copied since, or is a dead letter of this one.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn dead_letters(&self, slot: &str, limit: Option<u32>) -> Result<Vec<DeadLetter>> {
        let sql = format!(
            "SELECT l.id, l.epoch, l.lsn, l.environment_id, l.session_id, l.reason, l.created_at {DEAD_LETTERS} \
             ORDER BY l.id LIMIT {}",
            limit.map_or("ALL".to_owned(), |limit| limit.to_string())
        );
        let rows = self.all(&sql, [slot.into()]).await?;
        let letter = |row: &QueryResult| {
            Ok(DeadLetter {
                id: get(row, "id")?,
                epoch: u8::try_from(get::<i16>(row, "epoch")?).unwrap_or_default(),
                lsn: get::<i64>(row, "lsn")?.cast_unsigned(),
                environment: get(row, "environment_id")?,
                session: get(row, "session_id")?,
                reason: get(row, "reason")?,
                created_at: get(row, "created_at")?,
            })
        };
        rows.iter().map(letter).collect()
    }

    /// How many there are of those.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn count_dead_letters(&self, slot: &str) -> Result<u64> {
        let row = self.one(&format!("SELECT count(*) AS count {DEAD_LETTERS}"), [slot.into()]).await?;
        row.map(|row| get::<i64>(&row, "count").map(i64::cast_unsigned))
            .transpose()
            .map(Option::unwrap_or_default)
    }

    /// Notes that a dead letter was replayed.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn replayed(&self, id: &str) -> Result<()> {
        let sql = "UPDATE replication_dead_letters SET replayed_at = (extract(epoch FROM clock_timestamp()) * 1000)::bigint \
                   WHERE id = $1 RETURNING 1 AS one";
        self.note(sql, [id.into()]).await.map(drop)
    }
}
