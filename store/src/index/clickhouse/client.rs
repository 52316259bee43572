//! The connection: settings that every statement is sent with, timeouts, and what a failure means.

use std::fmt;
use std::time::Duration;

use clickhouse::error::Error as ClientError;
use clickhouse::query::Query;
use clickhouse::{Client, Compression, RowOwned, RowRead};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use rustls::{ClientConfig, RootCertStore};
use secrecy::{ExposeSecret, SecretString};

use sessiond_domain::error::{Error, Result};

/// Longest a statement that changes the schema may take.
const SCHEMA_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest that a query may take which reads the whole table.
const SCAN_TIMEOUT: Duration = Duration::from_secs(600);
/// How long an idle connection is kept: less than servers do, because a connection that one has just closed costs a query.
const IDLE_TIMEOUT: Duration = Duration::from_secs(2);
/// What every query is sent with. FINAL looks at the newest version of a row; the first two keep its skip indexes usable
/// and exact (with the second off, an old version that lands late is listed), the third spares merging over months, which
/// a session never changes. Then two have a query whose client has gone stop, and change nothing. The rest is what a profile
/// of the server may have otherwise, and would make an answer partial, old or wrong.
const QUERY_SETTINGS: [(&str, &str); 10] = [
    ("use_skip_indexes_if_final", "1"),
    ("use_skip_indexes_if_final_exact_mode", "1"),
    ("do_not_merge_across_partitions_select_final", "1"),
    ("cancel_http_readonly_queries_on_client_close", "1"),
    ("readonly", "2"),
    ("optimize_move_to_prewhere_if_final", "0"),
    ("timeout_overflow_mode", "throw"),
    ("read_overflow_mode", "throw"),
    ("result_overflow_mode", "throw"),
    ("use_query_cache", "0"),
];

/// Which ClickHouse, and how it is used.
#[derive(Clone)]
pub struct ClickHouseOptions {
    /// `http://` or `https://`, host and port.
    pub url: String,
    /// Database of the tables; made if there is none.
    pub database: String,
    /// Who we are there.
    pub user: String,
    /// What proves it, if the user has one.
    pub password: Option<SecretString>,
    /// Longest a list, a count or a list of tags may take.
    pub query_timeout: Duration,
    /// Longest an insert may take.
    pub insert_timeout: Duration,
    /// Cluster that the tables are made on, as replicated ones; `None` for a single server.
    pub cluster: Option<String>,
    /// Whether `metadata` is filled beside `document`, for queries of people. It costs the server's merges dearly.
    pub metadata_column: bool,
}

impl fmt::Debug for ClickHouseOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { database, user, query_timeout, insert_timeout, cluster, metadata_column, .. } = self;
        f.debug_struct("ClickHouseOptions")
            .field("database", database)
            .field("user", user)
            .field("query_timeout", query_timeout)
            .field("insert_timeout", insert_timeout)
            .field("cluster", cluster)
            .field("metadata_column", metadata_column)
            .finish_non_exhaustive()
    }
}

/// What ClickHouse could not do.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// It cannot be reached, or hangs up in the middle.
    #[error("ClickHouse cannot be reached")]
    Away(#[source] ClientError),
    /// It has not answered in time.
    #[error("ClickHouse did not answer within {0:?}")]
    TimedOut(Duration),
    /// It answers with an error of its own.
    #[error("ClickHouse refuses (code {code})")]
    Refused {
        /// Its number for the error, such as 117; 0 where the answer is none that can be read.
        code: u32,
        /// What it said.
        #[source]
        source: ClientError,
    },
    /// A later version of this program has changed the tables.
    #[error(
        "the tables in {database} are of schema {step}, and this program knows {known}: use the later one"
    )]
    NewerSchema {
        /// The database.
        database: String,
        /// The newest step there.
        step: u32,
        /// The newest step here.
        known: u32,
    },
    /// The tables are another program's.
    #[error(
        "{database}.sessions_v1 was not made by sessiond (there is no schema_steps beside it): set clickhouse.database"
    )]
    ForeignTable {
        /// The database.
        database: String,
    },
    /// Somebody has changed the table.
    #[error(
        "the column {column} of {database}.sessions_v1 is not of type {kind}, so rows cannot be stored: ALTER TABLE {database}.sessions_v1 MODIFY COLUMN {column} {kind}"
    )]
    Altered {
        /// The database.
        database: String,
        /// The column.
        column: &'static str,
        /// What it should be.
        kind: &'static str,
    },
    /// The server lacks a setting without which lists are wrong.
    #[error("this ClickHouse does not know the setting {setting}: it must be {needed} or later")]
    TooOld {
        /// What it lacks.
        setting: &'static str,
        /// The first version that has it.
        needed: &'static str,
    },
    /// A column does not hold what it should.
    #[error("cannot read {column} of session {session}")]
    Row {
        /// The column.
        column: &'static str,
        /// The session.
        session: String,
    },
}

impl Fault {
    /// Whether the server may be away: it said nothing, so the next one asks in vain too.
    pub fn is_silence(&self) -> bool {
        matches!(self, Self::Away(_) | Self::TimedOut(_))
    }

    /// Whether it says that a table, or the whole database, is not there.
    pub fn is_of_a_missing_table(&self) -> bool {
        matches!(self, Self::Refused { code: 60 | 81, .. })
    }

    /// Whether it is about a row rather than about the server: the codes of values that a column cannot take, and of a
    /// broken constraint.
    pub fn is_of_a_row(&self) -> bool {
        const ROW_CODES: [u32; 13] = [6, 26, 27, 38, 41, 53, 69, 117, 131, 321, 349, 407, 469];
        matches!(self, Self::Refused { code, .. } if ROW_CODES.contains(code))
    }
}

impl From<ClientError> for Fault {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Network(_) | ClientError::TimedOut => Self::Away(error),
            ClientError::BadResponse(ref text) => match code(text) {
                Some(code) => Self::Refused { code, source: error },
                // A proxy in front of it.
                None => Self::Away(error),
            },
            source => Self::Refused { code: 0, source },
        }
    }
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Row { .. } => Self::internal(fault),
            fault => Self::unavailable("the list index", fault),
        }
    }
}

/// The number in `Code: 117. DB::Exception: ...`.
fn code(text: &str) -> Option<u32> {
    text.split("Code: ").nth(1)?.split('.').next()?.parse().ok()
}

/// One database of ClickHouse. Cheap to clone; nothing is sent before something is asked.
#[derive(Clone)]
pub struct ClickHouse {
    /// Names no database: for statements that make ours.
    server: Client,
    /// Names ours.
    client: Client,
    options: ClickHouseOptions,
}

impl ClickHouse {
    /// A connection, not yet made.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the URL needs TLS and this machine trusts no certificates.
    pub fn new(options: ClickHouseOptions) -> Result<Self> {
        let connector = connector(&options)?;
        let http = HttpClient::builder(TokioExecutor::new()).pool_idle_timeout(IDLE_TIMEOUT).build(connector);
        let mut server = Client::with_http_client(http)
            .with_url(options.url.trim_end_matches('/'))
            .with_user(&options.user)
            .with_compression(Compression::Lz4)
            .with_product_info("sessiond", env!("CARGO_PKG_VERSION"));
        if let Some(password) = &options.password {
            server = server.with_password(password.expose_secret());
        }
        Ok(Self { client: server.clone().with_database(&options.database), server, options })
    }

    /// How it is used.
    pub fn options(&self) -> &ClickHouseOptions {
        &self.options
    }

    /// The database.
    pub fn database(&self) -> &str {
        &self.options.database
    }

    /// What statements that write need on a cluster: a quorum that keeps them, and a view of all that was written before.
    pub(super) fn cluster_settings(&self) -> &'static [(&'static str, &'static str)] {
        match self.options.cluster {
            None => &[],
            Some(_) => &[("insert_quorum", "auto"), ("select_sequential_consistency", "1")],
        }
    }

    /// The client for inserts.
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// A query that changes nothing, with what keeps it exact and ends it in time. Values belong into its parameters.
    pub fn query(&self, text: &str) -> Query {
        let seconds = self.options.query_timeout.as_secs_f64().to_string();
        let query = self.client.query_raw(text).with_setting("max_execution_time", seconds);
        QUERY_SETTINGS.iter().fold(query, |query, (name, value)| query.with_setting(*name, *value))
    }

    /// The rows of a query, which the server is told to give up once we do.
    ///
    /// # Errors
    /// [`Fault::Away`], [`Fault::TimedOut`], [`Fault::Refused`].
    pub async fn fetch<T: RowOwned + RowRead>(&self, query: Query) -> Result<Vec<T>, Fault> {
        timely(self.options.query_timeout, query.fetch_all()).await
    }

    /// The rows of a query that reads a whole column, or more, and may take its time.
    ///
    /// # Errors
    /// As [`ClickHouse::fetch`].
    pub(super) async fn fetch_at_length<T: RowOwned + RowRead>(&self, query: Query) -> Result<Vec<T>, Fault> {
        let query = query.with_setting("max_execution_time", SCAN_TIMEOUT.as_secs().to_string());
        timely(SCAN_TIMEOUT, query.fetch_all()).await
    }

    /// Whether it answers.
    ///
    /// # Errors
    /// As [`ClickHouse::fetch`].
    pub async fn ping(&self) -> Result<(), Fault> {
        self.one::<u8>(self.ask("SELECT 1")).await.map(drop)
    }

    /// The one row of a query that has one.
    ///
    /// # Errors
    /// As [`ClickHouse::fetch`].
    pub(super) async fn one<T: RowOwned + RowRead>(&self, query: Query) -> Result<T, Fault> {
        timely(self.options.query_timeout, query.fetch_one()).await
    }

    /// A statement of the schema; it names the database itself.
    pub(super) async fn define(&self, text: &str) -> Result<(), Fault> {
        timely(SCHEMA_TIMEOUT, self.server.query_raw(text).execute()).await
    }

    /// A question that needs no database.
    pub(super) fn ask(&self, text: &str) -> Query {
        self.server.query_raw(text)
    }
}

impl fmt::Debug for ClickHouse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ClickHouse").field(&self.options).finish()
    }
}

/// Ends `work` after `limit`: the connection is dropped, at which the server stops too.
pub(super) async fn timely<T>(
    limit: Duration,
    work: impl Future<Output = clickhouse::error::Result<T>>,
) -> Result<T, Fault> {
    match tokio::time::timeout(limit, work).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(Fault::TimedOut(limit)),
    }
}

/// The crate's own connector stops the process where a machine has no certificates, and waits for ever to connect.
fn connector(options: &ClickHouseOptions) -> Result<HttpsConnector<HttpConnector>> {
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let away = |error: sessiond_domain::error::Source| Error::unavailable("TLS to ClickHouse", error);
    let builder = HttpsConnectorBuilder::new();
    let builder = if options.url.starts_with("https:") {
        builder.with_provider_and_native_roots(provider).map_err(|error| away(error.into()))?
    } else {
        let config =
            ClientConfig::builder_with_provider(provider.into()).with_safe_default_protocol_versions();
        let config = config.map_err(|error| away(error.into()))?;
        builder.with_tls_config(config.with_root_certificates(RootCertStore::empty()).with_no_client_auth())
    };
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    http.set_nodelay(true);
    http.set_keepalive(Some(Duration::from_secs(60)));
    http.set_connect_timeout(Some(options.query_timeout));
    Ok(builder.https_or_http().enable_http1().wrap_connector(http))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_an_error_is_read_from_its_text() {
        let text = "Code: 117. DB::Exception: Cannot parse JSON. (INCORRECT_DATA) (version 26.7.2.1)";
        assert_eq!(code(text), Some(117));
        let fault = Fault::from(ClientError::BadResponse(text.to_owned()));
        assert!(fault.is_of_a_row() && !fault.is_silence(), "{fault:?}");
        let fault = Fault::from(ClientError::BadResponse("502 Bad Gateway".to_owned()));
        assert!(fault.is_silence(), "{fault:?}");
    }
}
