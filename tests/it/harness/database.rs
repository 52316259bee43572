//! A fresh database of either kind for one test, and sessions to put into it.

use std::sync::Arc;

use sea_orm::{ConnectionTrait, Database, DatabaseConnection};
use sessiond::domain::port::Inserted;
use sessiond::domain::tenant::{Environment, EnvironmentKind};
use sessiond::domain::{
    EnvironmentId, ExternalId, ListIndex, MetadataStore, RunId, Session, SessionId, Timestamp,
};
use sessiond::store::index::clickhouse::ClickHouseIndex;
use sessiond::store::index::fallback::FallbackIndex;
use sessiond::store::index::sql::SqlIndex;
use sessiond::store::metadata::{OpenOptions, SqlMetadata};
use tempfile::TempDir;

use super::clickhouse;
use super::replication::CaughtUp;

/// The environment that cases work in.
pub const HERE: &str = "env_here";
/// Another one, which must never be seen from the first.
pub const ELSEWHERE: &str = "env_elsewhere";

/// An empty database.
pub struct TestDatabase {
    /// What [`SqlMetadata::open`] takes.
    pub url: String,
    _folder: Option<Arc<TempDir>>,
}

impl TestDatabase {
    /// A SQLite file that does not exist yet.
    pub fn sqlite() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let url = format!("sqlite:{}", folder.path().join("metadata.sqlite").display());
        Self { url, _folder: Some(Arc::new(folder)) }
    }

    /// A database of its own on the test server.
    pub async fn postgres() -> Self {
        Self::on("SESSIOND_TEST_POSTGRES").await
    }

    async fn on(server: &str) -> Self {
        let admin = std::env::var(server).unwrap_or_else(|_| {
            panic!("{server} is not set: `cargo xtask test` starts a Postgres and sets it, so run the tests through it")
        });
        Self::at(&admin).await
    }

    /// A database of its own on the server at `admin`, the URL of another database of it.
    pub async fn at(admin: &str) -> Self {
        let name = format!("test_{}", uuid::Uuid::new_v4().simple());
        let connection = Database::connect(admin).await.expect("the test server answers");
        connection.execute_unprepared(&format!("CREATE DATABASE {name}")).await.expect("a new database");
        connection.close().await.expect("closes");
        let (server, _) = admin.rsplit_once('/').expect("the URL names a database");
        Self { url: format!("{server}/{name}"), _folder: None }
    }

    /// A connection that knows nothing of the adapters.
    pub async fn connect(&self) -> DatabaseConnection {
        Database::connect(&self.url).await.expect("connects")
    }
}

/// The SQL adapters on a fresh database with two environments.
pub struct Sql {
    /// Where they keep their rows.
    pub database: TestDatabase,
    /// The metadata port.
    pub store: SqlMetadata,
    /// The list port.
    pub index: Arc<dyn ListIndex>,
    /// [`HERE`].
    pub here: EnvironmentId,
    /// [`ELSEWHERE`].
    pub elsewhere: EnvironmentId,
}

impl Sql {
    pub async fn sqlite() -> Self {
        Self::on(TestDatabase::sqlite()).await
    }

    pub async fn postgres() -> Self {
        Self::on(TestDatabase::postgres().await).await
    }

    /// On the server whose synchronous standby never comes: commits of a connection that sets `synchronous_commit` to `on` wait.
    pub async fn synchronous() -> Self {
        Self::on(TestDatabase::on("SESSIOND_TEST_POSTGRES_SYNCHRONOUS").await).await
    }

    /// On the server at `admin`, the URL of another database of it.
    pub async fn at(admin: &str) -> Self {
        Self::on(TestDatabase::at(admin).await).await
    }

    /// Sessions in Postgres, lists from a ClickHouse that a replicator keeps up to date.
    pub async fn clickhouse() -> Self {
        Self::with_engine(&clickhouse::url()).await
    }

    /// Sessions in SQLite, and lists from there because there is no ClickHouse.
    pub async fn fallback() -> Self {
        let mut sql = Self::sqlite().await;
        let nowhere = clickhouse::connect(clickhouse::options("http://127.0.0.1:1"));
        let first = Arc::new(ClickHouseIndex::new(nowhere, Arc::new(sql.store.clone()), Arc::default()));
        sql.index = Arc::new(FallbackIndex::new(first, sql.index));
        sql
    }

    /// As [`Sql::clickhouse`], on the engine at `url`.
    pub async fn with_engine(url: &str) -> Self {
        let mut sql = Self::postgres().await;
        sql.index = Arc::new(CaughtUp::over(&sql.database.url, &sql.store, url).await);
        sql
    }

    async fn on(database: TestDatabase) -> Self {
        let store = open(&database.url).await;
        for id in [HERE, ELSEWHERE] {
            store.create_environment(environment(id, "main", id)).await.expect("a new environment");
        }
        let [here, elsewhere] = [HERE, ELSEWHERE].map(EnvironmentId::from_stored);
        Self { database, index: Arc::new(SqlIndex::new(store.clone())), store, here, elsewhere }
    }

    /// The same database through connections of its own, as another process would have it.
    pub async fn again(&self) -> SqlMetadata {
        open(&self.database.url).await
    }

    pub async fn create(&self, session: Session) -> Inserted {
        self.store.create_session(session, None).await.expect("created")
    }
}

async fn open(url: &str) -> SqlMetadata {
    SqlMetadata::open(url, OpenOptions { connections: 4, ..OpenOptions::default() }).await.expect("opens")
}

pub fn at(millis: i64) -> Timestamp {
    Timestamp::from_millis(millis)
}

pub fn external(text: &str) -> ExternalId {
    ExternalId::parse(text).expect("an external id")
}

pub fn environment(id: &str, project: &str, slug: &str) -> Environment {
    Environment {
        id: EnvironmentId::from_stored(id),
        organization: "acme".to_owned(),
        project: project.to_owned(),
        slug: slug.to_owned(),
        kind: EnvironmentKind::Production,
        created_at: at(1),
    }
}

/// A plain session of [`HERE`].
pub fn session(created_at: i64) -> Session {
    Session {
        id: SessionId::generate(at(created_at)),
        environment: EnvironmentId::from_stored(HERE),
        external_id: None,
        kind: "chat".to_owned(),
        task_identifier: "agent".to_owned(),
        tags: Vec::new(),
        metadata: None,
        trigger_config: None,
        current_run_id: RunId::generate(at(created_at)),
        created_at: at(created_at),
        updated_at: at(created_at),
        expires_at: None,
        closed: None,
    }
}

/// A plain session with an external id.
pub fn named(name: &str) -> Session {
    Session { external_id: Some(external(name)), ..session(1000) }
}

/// The words as owned strings.
pub fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}
