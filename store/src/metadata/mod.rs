//! [`SqlMetadata`]: the metadata store on SQLite or Postgres, chosen by URL.
//!
//! `open` connects and migrates, `sessions`, `runs`, `waitpoints` and `tenants` hold the queries, `rows` turns rows into values.
//! Knows nothing of lists; [`SqlIndex`](super::index::sql::SqlIndex) borrows the connections.

mod dead_letters;
mod open;
mod replication;
pub(crate) mod rows;
mod runs;
mod sessions;
mod tenants;
mod waitpoints;

use async_trait::async_trait;
use sea_orm::{
    ConnectionTrait, DatabaseConnection, DatabaseTransaction, DbErr, SqlErr, SqliteTransactionMode,
    TransactionOptions, TransactionTrait,
};

pub use dead_letters::DeadLetter;
pub use open::{Migrated, OpenError, OpenOptions, migrate};
pub use replication::{
    Beat, Phase, Place, Published, ReplicationState, ReplicationStore, SetupLock, SlotStatus,
};

use sessiond_domain::error::{Error, Result};
use sessiond_domain::port::{HandedOver, Inserted, MetadataStore};
use sessiond_domain::run::SessionRun;
use sessiond_domain::session::{Closure, Session, SessionPatch};
use sessiond_domain::tenant::{Environment, StoredKey};
use sessiond_domain::{EnvironmentId, KeyId, RunId, SessionId, SessionRef, Timestamp};

/// Sessions, environments and keys in one SQL database.
///
/// On SQLite every write goes through one connection, so writers of this process queue instead of colliding;
/// other processes may use the same file. On Postgres both handles are the same pool.
#[derive(Clone, Debug)]
pub struct SqlMetadata {
    reader: DatabaseConnection,
    writer: DatabaseConnection,
}

impl SqlMetadata {
    /// Where reads run; each sees everything that was committed before it began.
    pub(crate) fn reader(&self) -> &DatabaseConnection {
        &self.reader
    }

    /// Begins a write. SQLite takes its write lock now, so that a read inside cannot go stale before the write.
    async fn begin(&self) -> Result<DatabaseTransaction> {
        let options = TransactionOptions {
            sqlite_transaction_mode: Some(SqliteTransactionMode::Immediate),
            ..TransactionOptions::default()
        };
        self.writer.begin_with_options(options).await.map_err(fault)
    }

    /// Closes every connection; SQLite folds its write-ahead log into the file.
    pub async fn close(&self) {
        for connection in [&self.reader, &self.writer] {
            if let Err(error) = connection.close_by_ref().await {
                tracing::warn!(%error, "could not close the metadata store");
            }
        }
    }
}

/// A database fault as the core sees it; what it means is decided here, once.
pub(crate) fn fault(error: DbErr) -> Error {
    match error.sql_err() {
        Some(SqlErr::UniqueConstraintViolation(constraint)) => Error::Conflict(taken(&constraint).to_owned()),
        _ => Error::unavailable("metadata", error),
    }
}

/// The sentence for a clash. SQLite names the columns and Postgres the index, and both names tell them apart.
fn taken(constraint: &str) -> &'static str {
    if constraint.contains("external_id") {
        "externalId is already used by another session"
    } else if constraint.contains("slug") {
        "the project already has an environment with this slug"
    } else if constraint.contains("lookup") {
        "the key is stored already"
    } else {
        "the id is already used"
    }
}

#[async_trait]
impl MetadataStore for SqlMetadata {
    async fn create_session(&self, session: Session, request_key: Option<&str>) -> Result<Inserted> {
        self.insert_or_find(session, request_key).await
    }

    async fn find_session(
        &self,
        environment: &EnvironmentId,
        address: &SessionRef,
    ) -> Result<Option<Session>> {
        sessions::find(&self.reader, environment, address).await
    }

    async fn find_sessions(&self, environment: &EnvironmentId, ids: &[SessionId]) -> Result<Vec<Session>> {
        sessions::find_many(&self.reader, environment, ids).await
    }

    async fn update_session(
        &self,
        environment: &EnvironmentId,
        id: &SessionId,
        patch: SessionPatch,
        now: Timestamp,
    ) -> Result<Option<Session>> {
        self.patch(environment, id, patch, now).await
    }

    async fn close_session(
        &self,
        environment: &EnvironmentId,
        id: &SessionId,
        closure: &Closure,
    ) -> Result<Option<Session>> {
        sessions::write_closure(&self.writer, Some(environment), id, closure).await?;
        sessions::find(&self.reader, environment, &id.clone().into()).await
    }

    async fn hand_over(&self, run: SessionRun, request_key: Option<&str>) -> Result<Option<HandedOver>> {
        self.swap_run(run, request_key).await
    }

    async fn find_run(&self, environment: &EnvironmentId, id: &RunId) -> Result<Option<SessionRun>> {
        runs::find(&self.reader, environment, id).await
    }

    async fn runs(
        &self,
        environment: &EnvironmentId,
        session: &SessionId,
        limit: usize,
    ) -> Result<Vec<SessionRun>> {
        runs::newest(&self.reader, environment, session, limit).await
    }

    async fn scan_sessions(&self, after: Option<&SessionId>, limit: usize) -> Result<Vec<Session>> {
        sessions::scan(&self.reader, after, limit).await
    }

    async fn complete_close(&self, id: &SessionId, closure: &Closure) -> Result<()> {
        sessions::write_closure(&self.writer, None, id, closure).await
    }

    async fn create_environment(&self, environment: Environment) -> Result<()> {
        tenants::insert_environment(&self.writer, environment).await
    }

    async fn environments(&self) -> Result<Vec<Environment>> {
        tenants::environments(&self.reader).await
    }

    async fn insert_key(&self, key: StoredKey) -> Result<()> {
        self.store_key(key).await
    }

    async fn keys(&self, environment: &EnvironmentId) -> Result<Vec<StoredKey>> {
        tenants::keys(&self.reader, environment).await
    }

    async fn find_key(&self, lookup: &[u8]) -> Result<Option<StoredKey>> {
        tenants::find_key(&self.reader, lookup).await
    }

    async fn mark_key_given(&self, environment: &EnvironmentId, id: &KeyId) -> Result<()> {
        self.set_given(environment, id).await
    }

    async fn end_key(
        &self,
        environment: &EnvironmentId,
        id: &KeyId,
        at: Timestamp,
    ) -> Result<Option<StoredKey>> {
        self.shorten_key(environment, id, at).await
    }

    async fn key_revision(&self) -> Result<i64> {
        Ok(tenants::installation(&self.reader).await?.key_revision)
    }

    async fn claim_log(&self, candidate: &str) -> Result<String> {
        self.remember_log(candidate).await
    }

    async fn ping(&self) -> Result<()> {
        self.reader.execute_unprepared("SELECT 1").await.map_err(fault)?;
        self.writer.execute_unprepared("SELECT 1").await.map_err(fault)?;
        Ok(())
    }
}
