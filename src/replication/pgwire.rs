//! [`PgSource`]: a slot of a Postgres, read over the replication protocol.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use percent_encoding::percent_decode_str;
use pgwire_replication::{
    FeedbackObserver, Lsn as WireLsn, PgWireError, ReplicationClient, ReplicationConfig, ReplicationEvent,
    TlsConfig,
};
use secrecy::{ExposeSecret, SecretString};
use tokio::time::{sleep, timeout};
use url::Url;

use super::Lsn;
use super::source::{SourceError, WalEvent, WalSource};
use super::tunnel::{Tls, Tunnel, TunnelTarget};
use crate::telemetry::Chain;

/// Events between the connection and us, each at most one row. The connection goes on telling the server that we live while
/// they wait.
const BUFFERED: usize = 512;
/// How often the server is told what is confirmed, and that we live.
const STATUS_INTERVAL: Duration = Duration::from_millis(200);
/// How often it is looked whether the last confirmation has gone out.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// The largest message that is read; one is at most a row.
const MESSAGE_MAX: usize = 256 << 20;
/// Longest that the end of a stream may take.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// Milliseconds from 1970 to 2000, where Postgres begins to count.
const POSTGRES_EPOCH_MS: i64 = 946_684_800_000;

/// Which slot of which Postgres, and how it is read.
#[derive(Clone)]
pub struct SourceOptions {
    target: TunnelTarget,
    user: String,
    password: SecretString,
    database: String,
    /// The slot.
    pub slot: String,
    /// What of the database is published.
    pub publication: String,
    /// How long the server waits for a sign of life before it lets another process read.
    pub wal_sender_timeout: Duration,
    /// Longest that a connection may take, from the first packet to the first change.
    pub connect_timeout: Duration,
}

/// A URL of Postgres that cannot be used for replication. Shows nothing of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the URL {0}")]
pub struct UrlError(&'static str);

/// Which server, and which database of it, a connection has met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Made with the cluster, and copied with it.
    pub system_identifier: String,
    /// Changes when a standby is promoted, or a cluster recovered to a point in time.
    pub timeline: u32,
    /// The database.
    pub database: String,
}

/// A replication connection, which holds its slot as long as it lives.
pub struct PgSource {
    client: ReplicationClient,
    /// The way there.
    _tunnel: Tunnel,
}

impl SourceOptions {
    /// Reads `postgres://USER:PASSWORD@HOST:PORT/DATABASE`, with `sslmode` and `sslrootcert` as libpq has them.
    ///
    /// # Errors
    /// [`UrlError`] saying what is wrong with it.
    pub fn new(url: &SecretString, slot: &str, publication: &str) -> Result<Self, UrlError> {
        let url: Url = url.expose_secret().parse().map_err(|_| UrlError("is none"))?;
        if !matches!(url.scheme(), "postgres" | "postgresql") {
            return Err(UrlError("is not one of Postgres"));
        }
        let decoded = |text: &str| {
            percent_decode_str(text).decode_utf8().map(String::from).map_err(|_| UrlError("is not UTF-8"))
        };
        let query = |names: &[&str]| {
            url.query_pairs().find(|(name, _)| names.contains(&&**name)).map(|(_, value)| value.into_owned())
        };
        let host = url.host_str().filter(|host| !host.is_empty()).ok_or(UrlError("names no host"))?;
        let host = decoded(host)?.trim_start_matches('[').trim_end_matches(']').to_owned();
        let user = Some(decoded(url.username())?).filter(|user| !user.is_empty());
        let user = user.unwrap_or_else(|| "postgres".to_owned());
        let database = decoded(url.path().trim_start_matches('/'))?;
        let tls = match query(&["sslmode", "ssl-mode"]).as_deref() {
            None | Some("prefer" | "allow") => Tls::Prefer,
            Some("disable") => Tls::Disable,
            Some("require") => Tls::Require,
            Some("verify-ca") => Tls::VerifyCa,
            Some("verify-full") => Tls::VerifyFull,
            Some(_) => return Err(UrlError("has an sslmode that there is none of")),
        };
        let root_certificate = query(&["sslrootcert", "ssl-root-cert", "ssl-ca"]).map(PathBuf::from);
        Ok(Self {
            target: TunnelTarget { host, port: url.port().unwrap_or(5432), tls, root_certificate },
            password: decoded(url.password().unwrap_or_default())?.into(),
            database: if database.is_empty() { user.clone() } else { database },
            user,
            slot: slot.to_owned(),
            publication: publication.to_owned(),
            wal_sender_timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
        })
    }
}

impl fmt::Debug for SourceOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { target, database, slot, publication, wal_sender_timeout, connect_timeout, .. } = self;
        f.debug_struct("SourceOptions")
            .field("target", target)
            .field("database", database)
            .field("slot", slot)
            .field("publication", publication)
            .field("wal_sender_timeout", wal_sender_timeout)
            .field("connect_timeout", connect_timeout)
            .finish_non_exhaustive()
    }
}

/// Which server and database the options lead to. Reads nothing.
///
/// # Errors
/// As [`PgSource::open`], but for what concerns the slot.
pub async fn identify(options: &SourceOptions) -> Result<Identity, SourceError> {
    in_time(options, async { Ok(session(options).await?.2) }).await
}

async fn in_time<T>(
    options: &SourceOptions,
    work: impl Future<Output = Result<T, SourceError>>,
) -> Result<T, SourceError> {
    let limit = options.connect_timeout;
    timeout(limit, work)
        .await
        .unwrap_or_else(|_| Err(SourceError::Away(format!("no answer within {limit:?}"))))
}

/// A session that does not read yet.
async fn session(options: &SourceOptions) -> Result<(ReplicationClient, Tunnel, Identity), SourceError> {
    let tunnel =
        Tunnel::open(&options.target).await.map_err(|error| SourceError::Away(Chain(&error).to_string()))?;
    let mut config = ReplicationConfig::unix(
        tunnel.folder().to_string_lossy(),
        Tunnel::PORT,
        &options.user,
        options.password.expose_secret(),
        &options.database,
        &options.slot,
        // The server reads a list of identifiers here, and folds what is not quoted.
        format!("\"{}\"", options.publication.replace('"', "\"\"")).as_str(),
    );
    config.tls = TlsConfig::disabled();
    config.status_interval = STATUS_INTERVAL;
    config.idle_wakeup_interval = STATUS_INTERVAL;
    config.buffer_events = BUFFERED;
    // So that it is known what has gone out.
    config.feedback_observer = Some(FeedbackObserver::new(|_| {}));
    config.max_message_size = MESSAGE_MAX;
    config.application_name = Some("sessiond-replication".to_owned());
    config.options = Some(format!("-c wal_sender_timeout={}", options.wal_sender_timeout.as_millis()));
    let mut client = ReplicationClient::connect_gated(config).await.map_err(at_start)?;
    let system = client.identify_system().await.map_err(at_start)?;
    let identity = Identity {
        system_identifier: system.system_id,
        timeline: system.timeline,
        database: system.dbname.unwrap_or_default(),
    };
    Ok((client, tunnel, identity))
}

impl PgSource {
    /// Begins to read the slot where it was confirmed. Whoever has it when this returns is its only reader.
    ///
    /// # Errors
    /// [`SourceError::Busy`] if another process reads it; every other one.
    pub async fn open(options: &SourceOptions) -> Result<(Self, Identity), SourceError> {
        in_time(options, async {
            let (mut client, tunnel, identity) = session(options).await?;
            client.start().await.map_err(at_start)?;
            client.wait_started().await.map_err(at_start)?;
            Ok((Self { client, _tunnel: tunnel }, identity))
        })
        .await
    }
}

#[async_trait]
impl WalSource for PgSource {
    async fn next(&mut self) -> Result<WalEvent, SourceError> {
        let event = self.client.recv().await.map_err(in_stream)?;
        let event = event.ok_or_else(|| SourceError::Away("the server has ended the stream".to_owned()))?;
        Ok(match event {
            ReplicationEvent::Begin { final_lsn, xid, commit_time_micros } => WalEvent::Begin {
                commit: Lsn(final_lsn.as_u64()),
                committed_at: commit_time_micros.div_euclid(1000) + POSTGRES_EPOCH_MS,
                xid,
            },
            ReplicationEvent::XLogData { data, .. } => WalEvent::Change(data),
            ReplicationEvent::Commit { end_lsn, .. } => WalEvent::Commit { end: Lsn(end_lsn.as_u64()) },
            ReplicationEvent::Message { prefix, content, .. } => WalEvent::Message { prefix, content },
            ReplicationEvent::KeepAlive { wal_end, .. } => {
                WalEvent::KeepAlive { wal_end: Lsn(wal_end.as_u64()) }
            }
            ReplicationEvent::StoppedAt { .. } => {
                return Err(SourceError::Protocol("it has stopped at a place that nobody named".to_owned()));
            }
        })
    }

    fn confirm(&self, place: Lsn) {
        self.client.update_applied_lsn(WireLsn::from_u64(place.0));
    }

    async fn stop(mut self: Box<Self>) -> Result<(), SourceError> {
        // A stop overtakes a confirmation that is due, and then the next reader is told of more than it need be.
        let ending = async {
            while self.client.feedback_pending_since().is_some() && self.client.is_running() {
                sleep(LOOK_EVERY).await;
            }
            self.client.shutdown().await
        };
        match timeout(STOP_TIMEOUT, ending).await {
            Ok(ended) => ended.map_err(in_stream),
            Err(_) => Err(SourceError::Away(format!("the stream did not end within {STOP_TIMEOUT:?}"))),
        }
    }
}

/// What an error means before the first change.
fn at_start(error: PgWireError) -> SourceError {
    match sqlstate(&error) {
        Some("55006") => SourceError::Busy,
        Some("42704") => SourceError::SlotMissing(error.to_string()),
        Some("55000" | "58P01" | "XX000") => SourceError::SlotLost(error.to_string()),
        _ => other(error),
    }
}

/// What an error means behind it: publications are looked up when a change is decoded.
fn in_stream(error: PgWireError) -> SourceError {
    match sqlstate(&error) {
        Some("42704") => SourceError::PublicationMissing(error.to_string()),
        Some("55000" | "58P01") => SourceError::SlotLost(error.to_string()),
        _ => other(error),
    }
}

fn other(error: PgWireError) -> SourceError {
    match error {
        // 57P01 and its like: the server ends the connection, and is back soon.
        PgWireError::Server(ref text) if text.contains("(SQLSTATE 57P") => {
            SourceError::Away(error.to_string())
        }
        PgWireError::Server(_) | PgWireError::Auth(_) => SourceError::Refused(error.to_string()),
        PgWireError::Protocol(_) | PgWireError::MessageTooLarge { .. } => {
            SourceError::Protocol(error.to_string())
        }
        error => SourceError::Away(error.to_string()),
    }
}

/// The code that the crate has put into the text of a server's error.
fn sqlstate(error: &PgWireError) -> Option<&str> {
    let PgWireError::Server(text) = error else { return None };
    text.split("(SQLSTATE ").nth(1)?.split(')').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(url: &str) -> Result<SourceOptions, UrlError> {
        SourceOptions::new(&url.to_owned().into(), "s", "p")
    }

    #[test]
    fn a_url_is_read_as_others_read_it() {
        let options =
            read("postgres://us%40er:p%3Ass@db.example:6432/da%20ta?sslmode=verify-full&sslrootcert=/ca.pem");
        let options = options.expect("a URL");
        assert_eq!((options.user.as_str(), options.database.as_str()), ("us@er", "da ta"));
        assert_eq!(options.password.expose_secret(), "p:ss");
        let TunnelTarget { host, port, tls, root_certificate } = options.target.clone();
        assert_eq!((host.as_str(), port, tls), ("db.example", 6432, Tls::VerifyFull));
        assert_eq!(root_certificate, Some(PathBuf::from("/ca.pem")));
        assert!(!format!("{options:?}").contains("p:ss"));
        let plain = read("postgresql://me@[::1]").expect("a URL");
        assert_eq!(
            (plain.target.host.as_str(), plain.target.port, plain.target.tls),
            ("::1", 5432, Tls::Prefer)
        );
        assert_eq!(plain.database, "me");
    }

    #[test]
    fn a_url_that_cannot_be_used_is_refused_and_not_shown() {
        for url in
            ["", "host", "mysql://secret@h/d", "postgres:///secret", "postgres://secret@h/d?sslmode=maybe"]
        {
            let refused = read(url).expect_err(url).to_string();
            assert!(!refused.contains("secret"), "{refused}");
        }
    }

    #[test]
    fn the_code_of_an_error_decides_what_it_means() {
        let server =
            |code: &str| PgWireError::Server(format!("replication slot \"s\" is active (SQLSTATE {code})"));
        assert!(matches!(at_start(server("55006")), SourceError::Busy));
        assert!(matches!(at_start(server("42704")), SourceError::SlotMissing(_)));
        assert!(matches!(in_stream(server("42704")), SourceError::PublicationMissing(_)));
        assert!(matches!(in_stream(server("57P01")), SourceError::Away(_)));
        assert!(matches!(at_start(server("28P01")), SourceError::Refused(_)));
    }
}
