//! Rows to values. A row that cannot be read is our fault, and the error says which one it is.

use sea_orm::{QueryResult, TryGetable};
use serde_json::{Map, Value};

use sessiond_domain::access::Scopes;
use sessiond_domain::error::{Error, Result, Source};
use sessiond_domain::session::{Closure, Session};
use sessiond_domain::tenant::{Environment, EnvironmentKind, StoredKey};
use sessiond_domain::{
    Completion, Direction, EnvironmentId, ExternalId, KeyId, Outcome, RunId, RunReason, SeqNum, SessionId,
    SessionRun, Timestamp, Waitpoint, WaitpointId,
};

/// A column that does not hold what it should.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {table}.{column} of row {id}")]
struct RowFault {
    table: &'static str,
    column: &'static str,
    id: String,
    #[source]
    source: Source,
}

struct Row<'a> {
    result: &'a QueryResult,
    table: &'static str,
    id: String,
}

impl<'a> Row<'a> {
    fn new(result: &'a QueryResult, table: &'static str) -> Result<Self> {
        let mut row = Self { result, table, id: "(unknown)".to_owned() };
        row.id = row.get("id")?;
        Ok(row)
    }

    fn fault(&self, column: &'static str, source: impl Into<Source>) -> Error {
        let fault = RowFault { table: self.table, column, id: self.id.clone(), source: source.into() };
        Error::internal(fault)
    }

    fn get<T: TryGetable>(&self, column: &'static str) -> Result<T> {
        self.result.try_get("", column).map_err(|error| self.fault(column, error))
    }

    fn time(&self, column: &'static str) -> Result<Option<Timestamp>> {
        Ok(self.get::<Option<i64>>(column)?.map(Timestamp::from_millis))
    }

    fn seq_num(&self, column: &'static str) -> Result<Option<SeqNum>> {
        let number = self.get::<Option<i64>>(column)?.map(SeqNum::try_from).transpose();
        number.map_err(|error| self.fault(column, error))
    }

    fn object(&self, column: &'static str) -> Result<Option<Map<String, Value>>> {
        match self.get::<Option<Value>>(column)? {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(object)),
            Some(_) => Err(self.fault(column, "not a JSON object")),
        }
    }

    fn words(&self, column: &'static str) -> Result<Option<Vec<String>>> {
        let words = self.get::<Option<Value>>(column)?.map(serde_json::from_value).transpose();
        words.map_err(|error| self.fault(column, error))
    }
}

/// A row of `sessions`.
pub(crate) fn session(result: &QueryResult) -> Result<Session> {
    let row = Row::new(result, "sessions")?;
    let closed_reason = row.get("closed_reason")?;
    Ok(Session {
        id: SessionId::from_stored(&row.id),
        environment: EnvironmentId::from_stored(&row.get::<String>("environment_id")?),
        external_id: external_id(&row)?,
        kind: row.get("kind")?,
        task_identifier: row.get("task_identifier")?,
        tags: row.words("tags")?.unwrap_or_default(),
        metadata: row.object("metadata")?,
        trigger_config: row.object("trigger_config")?,
        current_run_id: RunId::from_stored(&row.get::<String>("current_run_id")?),
        created_at: Timestamp::from_millis(row.get("created_at")?),
        updated_at: Timestamp::from_millis(row.get("updated_at")?),
        expires_at: row.time("expires_at")?,
        closed: row.time("closed_at")?.map(|at| Closure { at, reason: closed_reason }),
    })
}

fn external_id(row: &Row<'_>) -> Result<Option<ExternalId>> {
    Ok(row.get::<Option<String>>("external_id")?.map(|id| ExternalId::from_stored(&id)))
}

/// A row of `session_runs`.
pub(super) fn run(result: &QueryResult) -> Result<SessionRun> {
    let row = Row::new(result, "session_runs")?;
    let reason: String = row.get("reason")?;
    Ok(SessionRun {
        id: RunId::from_stored(&row.id),
        environment: EnvironmentId::from_stored(&row.get::<String>("environment_id")?),
        session: SessionId::from_stored(&row.get::<String>("session_id")?),
        reason: RunReason::parse(&reason).ok_or_else(|| row.fault("reason", "unknown reason"))?,
        previous: row.get::<Option<String>>("previous_run_id")?.map(|id| RunId::from_stored(&id)),
        triggered_at: Timestamp::from_millis(row.get("triggered_at")?),
    })
}

/// A row of `waitpoints`.
pub(super) fn waitpoint(result: &QueryResult) -> Result<Waitpoint> {
    let row = Row::new(result, "waitpoints")?;
    let io: String = row.get("io")?;
    Ok(Waitpoint {
        id: WaitpointId::from_stored(&row.id),
        environment: EnvironmentId::from_stored(&row.get::<String>("environment_id")?),
        session: SessionId::from_stored(&row.get::<String>("session_id")?),
        direction: Direction::parse(&io).map_err(|error| row.fault("io", error))?,
        run: RunId::from_stored(&row.get::<String>("run_id")?),
        after: row.seq_num("after_seq_num")?,
        timeout_at: row.time("timeout_at")?,
        expires_at: row.time("expires_at")?,
        tags: row.words("tags")?.unwrap_or_default(),
        idempotency_key: row.get("idempotency_key")?,
        key_expires_at: row.time("key_expires_at")?,
        created_at: Timestamp::from_millis(row.get("created_at")?),
        completion: completion(&row)?,
    })
}

fn completion(row: &Row<'_>) -> Result<Option<Completion>> {
    let Some(at) = row.time("completed_at")? else { return Ok(None) };
    let word: String = row.get("outcome")?;
    let outcome = Outcome::parse(&word, row.seq_num("seq_num")?);
    Ok(Some(Completion { at, outcome: outcome.ok_or_else(|| row.fault("outcome", "unknown outcome"))? }))
}

/// A row of `environments`.
pub(super) fn environment(result: &QueryResult) -> Result<Environment> {
    let row = Row::new(result, "environments")?;
    let kind: String = row.get("kind")?;
    Ok(Environment {
        id: EnvironmentId::from_stored(&row.id),
        organization: row.get("organization")?,
        project: row.get("project")?,
        slug: row.get("slug")?,
        kind: EnvironmentKind::parse(&kind).ok_or_else(|| row.fault("kind", "unknown kind"))?,
        created_at: Timestamp::from_millis(row.get("created_at")?),
    })
}

/// A row of `keys`.
pub(super) fn key(result: &QueryResult) -> Result<StoredKey> {
    let row = Row::new(result, "keys")?;
    Ok(StoredKey {
        id: KeyId::from_stored(&row.id),
        environment: EnvironmentId::from_stored(&row.get::<String>("environment_id")?),
        label: row.get("label")?,
        lookup: row.get("lookup")?,
        sealed_secret: row.get("sealed_secret")?,
        hint: row.get("hint")?,
        scopes: row.words("scopes")?.map(Scopes::new),
        created_at: Timestamp::from_millis(row.get("created_at")?),
        ends_at: row.time("ends_at")?,
        given: row.get("given")?,
    })
}
