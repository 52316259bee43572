//! A slot of a real server, read over the replication protocol.

use std::path::Path;
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use sessiond::replication::pgwire::PgSource;
use sessiond::replication::source::{SourceError, WalEvent, WalSource};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

use super::*;

async fn open(options: &SourceOptions) -> PgSource {
    timeout(PATIENCE, PgSource::open(options)).await.expect("in time").expect("a stream").0
}

async fn refused(options: &SourceOptions) -> SourceError {
    match timeout(PATIENCE, PgSource::open(options)).await.expect("in time") {
        Ok(_) => panic!("it is opened"),
        Err(error) => error,
    }
}

/// The next event that is no sign of life.
async fn event(source: &mut PgSource) -> WalEvent {
    timeout(PATIENCE, async {
        loop {
            match source.next().await.expect("an event") {
                WalEvent::KeepAlive { .. } => {}
                event => return event,
            }
        }
    })
    .await
    .expect("an event before the test gives up")
}

#[tokio::test]
async fn a_stream_of_postgres_is_told_live_and_goes_on_where_it_was_confirmed() {
    let sql = Sql::postgres().await;
    let slot = Slot::make(&sql).await;
    let mut source = open(&slot.options(&sql)).await;
    let one = session(1_000);
    sql.create(one.clone()).await;
    let WalEvent::Begin { commit, committed_at, xid } = event(&mut source).await else {
        panic!("a beginning")
    };
    assert!(commit > Lsn(0) && committed_at > 1_700_000_000_000 && xid > 0);
    let mut decoder = Decoder::new("sessions", COLUMNS);
    let mut changes = Vec::new();
    let end = loop {
        match event(&mut source).await {
            WalEvent::Change(message) => changes.push(decoder.decode(message).expect("a message")),
            WalEvent::Commit { end } => break end,
            other => panic!("{other:?}"),
        }
    };
    let [Change::Nothing, Change::Insert(row)] = &changes[..] else { panic!("{changes:?}") };
    assert_eq!(SortKey::of(row).expect("a key"), key(&one));
    assert!(end > commit);

    slot.run("SELECT pg_logical_emit_message(true, 'sessiond.test', 'hello')").await;
    assert!(matches!(event(&mut source).await, WalEvent::Begin { .. }));
    let message =
        WalEvent::Message { prefix: "sessiond.test".to_owned(), content: Bytes::from_static(b"hello") };
    assert_eq!(event(&mut source).await, message);
    assert!(matches!(event(&mut source).await, WalEvent::Commit { .. }));

    // What is not confirmed comes again, what is confirmed does not.
    source.confirm(end);
    Box::new(source).stop().await.expect("it ends");
    slot.wait_for("NOT active").await;
    let mut source = open(&slot.options(&sql)).await;
    assert!(matches!(event(&mut source).await, WalEvent::Begin { .. }));
    assert_eq!(event(&mut source).await, message);
    assert!(matches!(event(&mut source).await, WalEvent::Commit { .. }));
    source.confirm(Lsn(u64::MAX >> 8));
    slot.wait_for("confirmed_flush_lsn >= pg_current_wal_flush_lsn()").await;
    drop(source);
    slot.wait_for("NOT active").await;
    slot.end().await;
}

#[tokio::test]
async fn of_two_readers_of_a_slot_on_postgres_the_second_is_refused_until_the_first_is_gone() {
    let sql = Sql::postgres().await;
    let slot = Slot::make(&sql).await;
    let first = open(&slot.options(&sql)).await;
    assert!(matches!(refused(&slot.options(&sql)).await, SourceError::Busy));
    Box::new(first).stop().await.expect("it ends");
    slot.wait_for("NOT active").await;
    drop(open(&slot.options(&sql)).await);
    slot.wait_for("NOT active").await;
    slot.end().await;
}

#[tokio::test]
async fn a_stream_of_postgres_says_what_is_missing() {
    let sql = Sql::postgres().await;
    let slot = Slot::make(&sql).await;
    let options = |slot: &str, publication: &str| {
        SourceOptions::new(&sql.database.url.clone().into(), slot, publication).expect("a URL")
    };
    let missing = refused(&options("slot_that_is_not_there", "ours")).await;
    assert!(
        matches!(&missing, SourceError::SlotMissing(text) if text.contains("slot_that_is_not_there")),
        "{missing}"
    );
    let mut source = open(&options(&slot.name, "theirs")).await;
    sql.create(session(1_000)).await;
    let missing = timeout(PATIENCE, async {
        loop {
            if let Err(error) = source.next().await {
                return error;
            }
        }
    });
    let missing = missing.await.expect("in time");
    assert!(
        matches!(&missing, SourceError::PublicationMissing(text) if text.contains("theirs")),
        "{missing}"
    );
    slot.wait_for("NOT active").await;
    slot.end().await;
}

#[tokio::test]
async fn a_silent_server_is_given_up() {
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("postgres://me@{}/d", silent.local_addr().expect("an address"));
    let mut options = SourceOptions::new(&url.into(), "s", "p").expect("a URL");
    options.connect_timeout = Duration::from_millis(200);
    let away = timeout(PATIENCE, PgSource::open(&options)).await.expect("in time").err().expect("refused");
    assert!(matches!(&away, SourceError::Away(text) if text.contains("200ms")), "{away}");
    drop(silent);
    let away = refused(&options).await;
    assert!(matches!(&away, SourceError::Away(text) if text.contains("refused")), "{away}");
}

/// What speaks TLS before a Postgres that does not.
struct Front {
    port: u16,
    /// The authority that its certificate is of.
    authority: tempfile::NamedTempFile,
    serving: tokio::task::JoinHandle<()>,
}

impl Front {
    /// Before the server of a URL, with a certificate for `name`.
    async fn before(url: &str, name: &str) -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut authority = CertificateParams::new(Vec::new()).expect("parameters");
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = authority.self_signed(&key).expect("a certificate");
        let issuer = Issuer::new(authority, key);
        let own = KeyPair::generate().expect("a key");
        let leaf = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        let leaf = leaf.signed_by(&own, &issuer).expect("a certificate");
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), root.pem()).expect("written");
        let own = PrivateKeyDer::try_from(own.serialize_der()).expect("a key");
        let config =
            ServerConfig::builder().with_no_client_auth().with_single_cert(vec![leaf.der().clone()], own);
        let acceptor = TlsAcceptor::from(Arc::new(config.expect("a configuration")));
        let (_, server) = url.rsplit_once('@').expect("a user");
        let server = server.split('/').next().expect("an address").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let serving = tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let (acceptor, server) = (acceptor.clone(), server.clone());
                tokio::spawn(async move {
                    let mut request = [0; 8];
                    client.read_exact(&mut request).await.expect("a request for TLS");
                    assert_eq!(request[4..], 80_877_103u32.to_be_bytes());
                    client.write_all(b"S").await.expect("answered");
                    let Ok(mut client) = acceptor.accept(client).await else { return };
                    let mut server = TcpStream::connect(server).await.expect("Postgres");
                    let _ = copy_bidirectional(&mut client, &mut server).await;
                });
            }
        });
        Self { port, authority: file, serving }
    }

    fn url(&self, url: &str, host: &str, parameters: &str) -> String {
        let (_, database) = url.rsplit_once('/').expect("a database");
        format!("postgres://postgres@{host}:{}/{database}?{parameters}", self.port)
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

fn file(path: &Path) -> String {
    path.display().to_string()
}

#[tokio::test]
async fn a_stream_of_postgres_is_encrypted_as_its_sslmode_says() {
    let sql = Sql::postgres().await;
    let slot = Slot::make(&sql).await;
    let front = Front::before(&sql.database.url, "localhost").await;
    let known = file(front.authority.path());
    let stranger = Front::before(&sql.database.url, "localhost").await;
    let unknown = file(stranger.authority.path());
    for (host, parameters, is_right) in [
        ("localhost", format!("sslmode=verify-full&sslrootcert={known}"), true),
        ("localhost", "sslmode=require".to_owned(), true),
        ("localhost", String::new(), true),
        ("127.0.0.1", format!("sslmode=verify-ca&sslrootcert={known}"), true),
        ("127.0.0.1", format!("sslmode=verify-full&sslrootcert={known}"), false),
        ("localhost", format!("sslmode=verify-full&sslrootcert={unknown}"), false),
        ("localhost", format!("sslmode=verify-ca&sslrootcert={unknown}"), false),
        ("localhost", format!("sslmode=require&sslrootcert={unknown}"), false),
        ("localhost", "sslmode=verify-full".to_owned(), false),
        ("localhost", "sslmode=verify-full&sslrootcert=/nowhere.pem".to_owned(), false),
    ] {
        let options = slot.options_at(&front.url(&sql.database.url, host, &parameters));
        let opened = timeout(PATIENCE, PgSource::open(&options)).await.expect("in time");
        assert_eq!(opened.is_ok(), is_right, "{host} {parameters}: {:?}", opened.as_ref().err());
        if let Ok((source, identity)) = opened {
            assert!(sql.database.url.ends_with(&identity.database), "{identity:?}");
            Box::new(source).stop().await.expect("it ends");
            slot.wait_for("NOT active").await;
        }
    }
    // The server itself speaks none.
    let plain = slot.options_at(&format!("{}?sslmode=require", sql.database.url));
    let refused = refused(&plain).await;
    assert!(matches!(&refused, SourceError::Away(text) if text.contains("sslmode")), "{refused}");
    slot.end().await;
}
