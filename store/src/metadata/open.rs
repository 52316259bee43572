//! Connecting and migrating. The only place that knows connection options of either database.

use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use migration::{Migrator, MigratorTrait};
use sea_orm::sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sea_orm::sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use sea_orm::sqlx::{self, ConnectOptions, Connection};
use sea_orm::{
    ConnectionTrait, DatabaseConnection, DatabaseTransaction, DbBackend, DbErr, SqliteTransactionMode,
    SqlxPostgresConnector, SqlxSqliteConnector, TransactionOptions, TransactionTrait,
};

use super::SqlMetadata;

/// Held on Postgres while migrating, so that two starts do it one after the other. Any constant would do.
const MIGRATION_LOCK: i64 = 0x7365_7373_696f_6e64;
/// Longest that a connection may take to show that it lives.
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to keep asking SQLite for the switch to WAL while another process makes it.
const WAL_PATIENCE: Duration = Duration::from_secs(10);

/// How to connect.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Connections to Postgres, or reading connections to SQLite (which has one more for writes).
    pub connections: u32,
    /// How long a statement waits for a free connection.
    pub acquire_timeout: Duration,
    /// How long SQLite waits for a lock that another process holds.
    pub busy_timeout: Duration,
    /// Whether a store is made where there is none.
    pub create: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            connections: 8,
            acquire_timeout: Duration::from_secs(10),
            busy_timeout: Duration::from_secs(10),
            create: true,
        }
    }
}

/// Why a metadata store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The URL names no database that we know.
    #[error("the database URL must be sqlite:PATH or postgres://..., and {0}")]
    Url(&'static str),
    /// There is no store, and none was to be made.
    #[error("there is no metadata store in {0}")]
    Missing(String),
    /// A newer binary has migrated this database.
    #[error("the database was migrated by a newer sessiond (unknown steps: {}); start that version", .unknown.join(", "))]
    NewerSchema {
        /// The steps that this binary does not know.
        unknown: Vec<String>,
    },
    /// The file cannot be made or looked at.
    #[error("cannot use {}", .path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The database refused or is away.
    #[error("cannot open the metadata store")]
    Database(#[from] DbErr),
    /// No connection could be made.
    #[error("cannot connect to the metadata store")]
    Connect(#[from] sqlx::Error),
}

/// What [`migrate`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migrated {
    /// Steps that this call applied, oldest first.
    pub applied: Vec<String>,
    /// Steps that were there before.
    pub already: usize,
}

/// Brings the database at `url` to the schema of this binary, making it first if it is a SQLite file.
///
/// # Errors
/// [`OpenError::NewerSchema`] if it is ahead already, in which case nothing is changed.
pub async fn migrate(url: &str) -> Result<Migrated, OpenError> {
    let store = connect(url, OpenOptions::default()).await?;
    let migrated = run_migrations(&store.writer, true).await;
    store.close().await;
    migrated
}

impl SqlMetadata {
    /// Files or sockets that a store has open at most: of SQLite the file, its write-ahead log and a temporary file by
    /// connection, the writer's included, and the log's index once.
    pub fn files(url: &str, options: OpenOptions) -> u64 {
        let connections = u64::from(options.connections);
        if url.starts_with("sqlite:") { 3 * (connections + 1) + 1 } else { connections }
    }

    /// A Postgres that is connected to when it is first asked, and not migrated.
    ///
    /// # Errors
    /// [`OpenError::Url`], [`OpenError::Connect`] if the URL cannot be used.
    pub fn postgres_when_asked(url: &str, options: OpenOptions) -> Result<Self, OpenError> {
        if !is_postgres(url) {
            return Err(OpenError::Url("this one is of no Postgres"));
        }
        let (pool, connect) = postgres(url, options)?;
        // A question that was given up leaves its connection to a ping, which waits for ever where the host is gone.
        let pool = pool.after_release(|connection, _| {
            Box::pin(async move {
                let alive = tokio::time::timeout(PING_TIMEOUT, connection.ping()).await;
                Ok(alive.is_ok_and(|answer| answer.is_ok()))
            })
        });
        Ok(Self::of_postgres(pool.connect_lazy_with(connect)))
    }

    fn of_postgres(pool: PgPool) -> Self {
        let connection = SqlxPostgresConnector::from_sqlx_postgres_pool(pool);
        Self { reader: connection.clone(), writer: connection }
    }

    /// Connects to `sqlite:PATH` (made readable by its owner only, if missing) or `postgres://...` and migrates. Without
    /// [`OpenOptions::create`] only what is there already: neither a file nor a schema is made.
    ///
    /// # Errors
    /// [`OpenError`], which names what to do about it.
    pub async fn open(url: &str, options: OpenOptions) -> Result<Self, OpenError> {
        let store = connect(url, options).await?;
        let migrated = run_migrations(&store.writer, options.create).await?;
        if !migrated.applied.is_empty() {
            tracing::info!(steps = ?migrated.applied, "migrated the metadata store");
        }
        Ok(store)
    }
}

async fn connect(url: &str, options: OpenOptions) -> Result<SqlMetadata, OpenError> {
    if let Some(path) = url.strip_prefix("sqlite:") {
        let path = path.strip_prefix("//").unwrap_or(path);
        if path.is_empty() || path == ":memory:" || path.contains('?') {
            return Err(OpenError::Url("the path names a file, without options"));
        }
        open_sqlite(Path::new(path), options).await
    } else if is_postgres(url) {
        open_postgres(url, options).await
    } else {
        Err(OpenError::Url("this one has another scheme"))
    }
}

fn is_postgres(url: &str) -> bool {
    url.starts_with("postgres:") || url.starts_with("postgresql:")
}

fn postgres(url: &str, options: OpenOptions) -> Result<(PgPoolOptions, PgConnectOptions), sqlx::Error> {
    let connect = PgConnectOptions::from_str(url)?.application_name("sessiond").disable_statement_logging();
    let pool =
        PgPoolOptions::new().max_connections(options.connections).acquire_timeout(options.acquire_timeout);
    Ok((pool, connect))
}

async fn open_postgres(url: &str, options: OpenOptions) -> Result<SqlMetadata, OpenError> {
    let (pool, connect) = postgres(url, options)?;
    Ok(SqlMetadata::of_postgres(pool.connect_with(connect).await?))
}

async fn open_sqlite(path: &Path, options: OpenOptions) -> Result<SqlMetadata, OpenError> {
    let fault = |source| OpenError::File { path: path.to_owned(), source };
    if options.create {
        create_private(path).map_err(fault)?;
    } else if !path.try_exists().map_err(fault)? {
        return Err(OpenError::Missing(path.display().to_string()));
    }
    // FULL syncs the write-ahead log at every commit; NORMAL would lose acknowledged writes with the power.
    let connect = SqliteConnectOptions::new()
        .filename(path)
        .busy_timeout(options.busy_timeout)
        .foreign_keys(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .pragma("cache_size", "-16384")
        .disable_statement_logging();
    let writer = open_writer(connect.clone(), options).await?;
    let reader = SqlitePoolOptions::new()
        .max_connections(options.connections)
        .acquire_timeout(options.acquire_timeout)
        .connect_with(connect.pragma("query_only", "ON"))
        .await?;
    let from_pool = SqlxSqliteConnector::from_sqlx_sqlite_pool;
    Ok(SqlMetadata { reader: from_pool(reader), writer: from_pool(writer) })
}

/// SQLite does not wait for the lock that the switch to WAL needs, so we ask again.
async fn open_writer(connect: SqliteConnectOptions, options: OpenOptions) -> Result<SqlitePool, sqlx::Error> {
    let started = Instant::now();
    loop {
        let pool = SqlitePoolOptions::new()
            .max_connections(1)
            .acquire_timeout(options.acquire_timeout)
            .connect_with(connect.clone())
            .await;
        match pool {
            Err(error) if is_busy(&error) && started.elapsed() < WAL_PATIENCE => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            other => return other,
        }
    }
}

/// SQLITE_BUSY, 5, with or without an extended code in the upper bytes.
fn is_busy(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    code.and_then(|code| code.parse::<u32>().ok()).is_some_and(|code| code & 0xff == 5)
}

/// The write-ahead log and its index take the mode of the file, so it is set before SQLite sees it.
fn create_private(path: &Path) -> io::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    match options.open(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other.map(drop),
    }
}

/// One transaction for everything: a start that fails or dies half way leaves the schema as it was.
async fn run_migrations(writer: &DatabaseConnection, create: bool) -> Result<Migrated, OpenError> {
    let options = TransactionOptions {
        sqlite_transaction_mode: Some(SqliteTransactionMode::Immediate),
        ..TransactionOptions::default()
    };
    let transaction = writer.begin_with_options(options).await?;
    if transaction.get_database_backend() == DbBackend::Postgres {
        let lock = format!("SELECT pg_advisory_xact_lock({MIGRATION_LOCK})");
        transaction.execute_unprepared(&lock).await?;
    }
    let migrated = apply(&transaction, create).await?;
    transaction.commit().await?;
    Ok(migrated)
}

async fn apply(transaction: &DatabaseTransaction, create: bool) -> Result<Migrated, OpenError> {
    let known = Migrator::names();
    let before = Migrator::get_migration_models(transaction).await?;
    let before: Vec<String> = before.into_iter().map(|step| step.version).collect();
    let unknown: Vec<String> = before.iter().filter(|step| !known.contains(step)).cloned().collect();
    if before.is_empty() && !create {
        return Err(OpenError::Missing("the database of metadata.url".to_owned()));
    }
    if !unknown.is_empty() {
        return Err(OpenError::NewerSchema { unknown });
    }
    Migrator::up(transaction, None).await?;
    let applied = known.into_iter().filter(|step| !before.contains(step)).collect();
    Ok(Migrated { applied, already: before.len() })
}
