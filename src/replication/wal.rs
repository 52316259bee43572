//! The stream of changes as the replicator sees it, and where it comes from.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use percent_encoding::percent_decode_str;
use pgwire_replication::{
    Lsn as WireLsn, PgWireError, ReplicationClient, ReplicationConfig as WireConfig, ReplicationEvent,
    SslMode, TlsConfig,
};
use secrecy::{ExposeSecret, SecretString};
use url::Url;

use super::postgres::Lsn;
use crate::config::ReplicationConfig;

/// Events between the connection and us; each holds at most one row.
const BUFFERED: usize = 256;
/// Longest a connection may take to be made and to hold the slot.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// How often Postgres is told what is confirmed, and that we live.
const STATUS_INTERVAL: Duration = Duration::from_millis(500);
/// A message of Postgres is at most a row; ours are far smaller.
const MESSAGE_MAX: usize = 256 << 20;

/// What the stream tells, in the order of commits.
#[derive(Debug)]
pub(super) enum WalEvent {
    /// A transaction begins whose commit lies at this place.
    Begin(Lsn),
    /// A message of `pgoutput`.
    Change(Bytes),
    /// It ends; every commit before this place has been told. The time is Postgres' own, in Unix milliseconds.
    Commit(Lsn, i64),
    /// No change of ours lies before this place that has not been told.
    Idle(Lsn),
}

/// Why the stream has ended.
#[derive(Debug, thiserror::Error)]
pub enum WalError {
    /// Another process reads the slot.
    #[error("another replica holds the slot")]
    Busy,
    /// The slot or the publication is gone, or the WAL that it needs.
    #[error("the slot or the publication is lost")]
    Lost(#[source] PgWireError),
    /// It did not start in time.
    #[error("Postgres did not start to stream within {START_TIMEOUT:?}")]
    TimedOut,
    /// The URL cannot be used.
    #[error("replication.url {0}")]
    Url(&'static str),
    /// Anything else: connect again.
    #[error("the replication connection broke")]
    Broken(#[source] PgWireError),
    /// The server has ended it.
    #[error("the replication connection was closed")]
    Closed,
}

impl From<PgWireError> for WalError {
    fn from(error: PgWireError) -> Self {
        let has = |code: &str| matches!(&error, PgWireError::Server(text) if text.contains(code));
        if has("55006") {
            Self::Busy
        } else if has("42704") || has("55000") {
            Self::Lost(error)
        } else {
            Self::Broken(error)
        }
    }
}

/// A slot that is being read.
#[async_trait]
pub(super) trait WalSource: Send + Sync {
    /// The next event; dropping the future loses none.
    async fn next(&mut self) -> Result<WalEvent, WalError>;

    /// Lets Postgres forget everything before `lsn`.
    fn confirm(&self, lsn: Lsn);

    /// Tells Postgres the last confirmation and releases the slot.
    async fn stop(self: Box<Self>);
}

/// A replication connection to Postgres, which holds the slot as long as it lives.
pub(super) struct PgWal {
    client: ReplicationClient,
}

/// The cluster and timeline that a connection is to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct System {
    pub(super) identifier: String,
    pub(super) timeline: i64,
}

/// Which cluster the URL leads to.
pub(super) async fn identify(url: &SecretString, config: &ReplicationConfig) -> Result<System, WalError> {
    let identify = async {
        let mut client = ReplicationClient::connect_gated(wire_config(url, config)?).await?;
        let system = client.identify_system().await?;
        Ok(System { identifier: system.system_id, timeline: i64::from(system.timeline) })
    };
    tokio::time::timeout(START_TIMEOUT, identify).await.map_err(|_| WalError::TimedOut)?
}

impl PgWal {
    /// Begins to read the slot where it has been confirmed.
    ///
    /// # Errors
    /// [`WalError::Busy`] if another process reads it.
    pub(super) async fn start(url: &SecretString, config: &ReplicationConfig) -> Result<Self, WalError> {
        let start = async {
            let mut client = ReplicationClient::connect(wire_config(url, config)?).await?;
            client.wait_started().await?;
            Ok(Self { client })
        };
        tokio::time::timeout(START_TIMEOUT, start).await.map_err(|_| WalError::TimedOut)?
    }
}

#[async_trait]
impl WalSource for PgWal {
    async fn next(&mut self) -> Result<WalEvent, WalError> {
        loop {
            return Ok(match self.client.recv().await?.ok_or(WalError::Closed)? {
                ReplicationEvent::Begin { final_lsn, .. } => WalEvent::Begin(Lsn(final_lsn.as_u64())),
                ReplicationEvent::XLogData { data, .. } => WalEvent::Change(data),
                ReplicationEvent::Commit { end_lsn, commit_time_micros, .. } => {
                    WalEvent::Commit(Lsn(end_lsn.as_u64()), unix_millis(commit_time_micros))
                }
                ReplicationEvent::KeepAlive { wal_end, .. } => WalEvent::Idle(Lsn(wal_end.as_u64())),
                // What counts is the commit that a message of ours lies in.
                ReplicationEvent::Message { .. } | ReplicationEvent::StoppedAt { .. } => continue,
            });
        }
    }

    fn confirm(&self, lsn: Lsn) {
        self.client.update_applied_lsn(WireLsn::from_u64(lsn.0));
    }

    async fn stop(mut self: Box<Self>) {
        if let Err(error) = tokio::time::timeout(STATUS_INTERVAL * 4, self.client.shutdown()).await {
            tracing::debug!(%error, "the replication connection did not end in time");
        }
    }
}

/// Of microseconds since 2000.
fn unix_millis(micros: i64) -> i64 {
    micros / 1000 + 946_684_800_000
}

fn wire_config(url: &SecretString, config: &ReplicationConfig) -> Result<WireConfig, WalError> {
    let url: Url = url.expose_secret().parse().map_err(|_| WalError::Url("is not a URL"))?;
    let decoded = |text: &str| {
        percent_decode_str(text).decode_utf8().map(String::from).map_err(|_| WalError::Url("is not UTF-8"))
    };
    let host = url.host_str().ok_or(WalError::Url("must name a host"))?;
    let user = decoded(url.username())?;
    let database = decoded(url.path().trim_start_matches('/'))?;
    let mut wire = WireConfig::new(
        host.trim_start_matches('[').trim_end_matches(']'),
        if user.is_empty() { "postgres" } else { &user },
        decoded(url.password().unwrap_or_default())?,
        if database.is_empty() { &user } else { &database },
        &config.slot,
        config.publication.as_str(),
    );
    wire.port = url.port().unwrap_or(5432);
    wire.tls = tls(&url)?;
    wire.status_interval = STATUS_INTERVAL;
    wire.idle_wakeup_interval = STATUS_INTERVAL;
    wire.buffer_events = BUFFERED;
    wire.max_message_size = MESSAGE_MAX;
    wire.application_name = Some("sessiond-replicator".to_owned());
    // The server's patience with us is the time after which another replica may lead.
    wire.options = Some(format!("-c wal_sender_timeout={}", config.leader_timeout.as_millis()));
    Ok(wire)
}

/// What `sslmode` and `sslrootcert` of the URL mean, as for the other connections.
fn tls(url: &Url) -> Result<TlsConfig, WalError> {
    let query =
        |name: &str| url.query_pairs().find(|(key, _)| key == name).map(|(_, value)| value.into_owned());
    let mode = match query("sslmode").or_else(|| query("ssl-mode")).as_deref() {
        None | Some("prefer" | "allow") => SslMode::Prefer,
        Some("disable") => SslMode::Disable,
        Some("require") => SslMode::Require,
        Some("verify-ca") => SslMode::VerifyCa,
        Some("verify-full") => SslMode::VerifyFull,
        Some(_) => return Err(WalError::Url("has an unknown sslmode")),
    };
    Ok(TlsConfig { mode, ca_pem_path: query("sslrootcert").map(Into::into), ..TlsConfig::disabled() })
}
