//! Networks that break: a TCP proxy that cuts its connections at random bytes, one that leads nowhere for a while, one that falls
//! silent, and one before a ClickHouse whose inserts fail.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::request::Parts;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep;

/// Cuts every connection after some bytes, both ways counted. Every other time the server does not hear of it: its side
/// stays open, so that what it has received still goes on.
pub struct FlakyProxy {
    /// Base URL for clients.
    pub url: String,
    cuts: Arc<AtomicUsize>,
    accepting: JoinHandle<()>,
}

impl FlakyProxy {
    /// In front of the server at a base URL. The same seed cuts at the same bytes.
    pub async fn before(url: &str, seed: u64, bytes: Range<u64>) -> Self {
        let server = address_of(url);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let own = format!("http://{}", listener.local_addr().expect("an address"));
        let cuts = Arc::new(AtomicUsize::new(0));
        let counted = cuts.clone();
        let accepting = tokio::spawn(async move {
            let kept = Arc::new(Mutex::new(Vec::new()));
            let mut random = seed | 1;
            while let Ok((client, _)) = listener.accept().await {
                // Xorshift: no more is needed, and it is the same everywhere.
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let budget = bytes.start + random % (bytes.end - bytes.start);
                let (server, kept, cuts) = (server.clone(), kept.clone(), counted.clone());
                let lingers = random & (1 << 40) != 0;
                tokio::spawn(async move {
                    let Ok(upstream) = TcpStream::connect(server).await else { return };
                    let upstream = forward(client, upstream, budget).await;
                    cuts.fetch_add(1, Ordering::Relaxed);
                    if lingers {
                        kept.lock().expect("no panic while held").push(upstream);
                    }
                });
            }
        });
        Self { url: own, cuts, accepting }
    }

    /// Connections that are over.
    pub fn cuts(&self) -> usize {
        self.cuts.load(Ordering::Relaxed)
    }
}

impl Drop for FlakyProxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// A way to a server that may move, listened in to.
pub struct Relay {
    /// Base URL for clients.
    pub url: String,
    /// Where it leads; nowhere while the server is gone.
    server: Arc<Mutex<String>>,
    /// What servers have said and clients were sent.
    said: watch::Receiver<String>,
    accepting: JoinHandle<()>,
}

impl Relay {
    /// To the server at a base URL.
    pub async fn to(url: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let own = format!("http://{}", listener.local_addr().expect("an address"));
        let server = Arc::new(Mutex::new(address_of(url)));
        let (saying, said) = watch::channel(String::new());
        let way = server.clone();
        let accepting = tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let (server, saying) = (way.lock().expect("no panic while held").clone(), saying.clone());
                tokio::spawn(async move {
                    let Ok(mut upstream) = TcpStream::connect(server).await else { return };
                    let (mut up, mut down) = ([0; 4096], [0; 4096]);
                    loop {
                        let (read, to, buffer) = tokio::select! {
                            read = client.read(&mut up) => (read, &mut upstream, None),
                            read = upstream.read(&mut down) => (read, &mut client, Some(&down)),
                        };
                        let length = read.unwrap_or(0);
                        let bytes = &buffer.unwrap_or(&up)[..length];
                        if length == 0 || to.write_all(bytes).await.is_err() {
                            break;
                        }
                        if buffer.is_some() {
                            saying.send_modify(|text| text.push_str(&String::from_utf8_lossy(bytes)));
                        }
                    }
                });
            }
        });
        Self { url: own, server, said, accepting }
    }

    /// Leads to another server from now on.
    pub fn lead_to(&self, url: &str) {
        *self.server.lock().expect("no panic while held") = address_of(url);
    }

    /// Waits until a client was sent these words.
    pub async fn said(&mut self, words: &str) {
        self.said.wait_for(|text| text.contains(words)).await.expect("the relay runs");
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

fn address_of(url: &str) -> String {
    url.strip_prefix("http://").expect("a plain URL").to_owned()
}

/// Copies both ways until the budget is spent or a side ends; gives the server's side back.
async fn forward(mut client: TcpStream, mut upstream: TcpStream, mut budget: u64) -> TcpStream {
    let (mut up, mut down) = ([0; 4096], [0; 4096]);
    while budget > 0 {
        let (read, to, buffer) = tokio::select! {
            read = client.read(&mut up) => (read, &mut upstream, &up),
            read = upstream.read(&mut down) => (read, &mut client, &down),
        };
        let length = read.unwrap_or(0);
        let length = length.min(usize::try_from(budget).unwrap_or(length));
        if length == 0 || to.write_all(&buffer[..length]).await.is_err() {
            break;
        }
        budget -= length as u64;
    }
    upstream
}

/// A way to a TCP server that can fall silent: what is on its way then never arrives, and neither side is told.
pub struct SilentProxy {
    /// Its port on the loopback interface.
    pub port: u16,
    cuts: watch::Sender<usize>,
    /// The ports that the server sees the clients of open connections at.
    seen_at: Arc<Mutex<HashSet<u16>>>,
    accepting: JoinHandle<()>,
}

impl SilentProxy {
    /// In front of the server at a port of the loopback interface.
    pub async fn before(server: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let (cuts, seen_at) = (watch::Sender::new(0), Arc::<Mutex<HashSet<u16>>>::default());
        let (cutting, seeing) = (cuts.clone(), seen_at.clone());
        let accepting = tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let (mut cut, seeing) = (cutting.subscribe(), seeing.clone());
                tokio::spawn(async move {
                    let Ok(mut upstream) = TcpStream::connect(("127.0.0.1", server)).await else { return };
                    let port = upstream.local_addr().expect("an address").port();
                    seeing.lock().expect("no panic while held").insert(port);
                    let is_cut = tokio::select! {
                        _ = copy_bidirectional(&mut client, &mut upstream) => false,
                        cut = cut.changed() => cut.is_ok(),
                    };
                    seeing.lock().expect("no panic while held").remove(&port);
                    if is_cut {
                        // Both sides stay open.
                        std::future::pending::<()>().await;
                    }
                });
            }
        });
        Self { port, cuts, seen_at, accepting }
    }

    /// The connections that there are carry nothing from now on, and do not end. New ones are not concerned.
    pub fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Whether a client that the server sees at a port is connected through this.
    pub fn is_seen_at(&self, port: u16) -> bool {
        self.seen_at.lock().expect("no panic while held").contains(&port)
    }
}

impl Drop for SilentProxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// How long an insert takes that is slow.
const SLOW: Duration = Duration::from_millis(250);

/// Before a ClickHouse: of the inserts every fourth fails, and of these every other one after it was stored. It hands on whole
/// requests only: the engine of the tests ends when a connection is cut in the middle of an insert.
pub struct FaultyInserts {
    /// Base URL for clients.
    pub url: String,
    /// Inserts that are with the engine, or have failed and are not answered yet.
    open: watch::Receiver<usize>,
    shared: Arc<Inserting>,
    serving: JoinHandle<()>,
}

/// What the requests of a [`FaultyInserts`] share.
struct Inserting {
    engine: String,
    http: reqwest::Client,
    open: watch::Sender<usize>,
    /// Whether inserts are slow or repeated, too.
    all: bool,
    /// Whether no insert meets a fault any more.
    mended: AtomicBool,
    count: AtomicUsize,
    failed: AtomicUsize,
    slow: AtomicUsize,
    repeated: AtomicUsize,
}

impl FaultyInserts {
    /// In front of the engine at a base URL.
    pub async fn before(url: &str) -> Self {
        Self::with(url, false).await
    }

    /// The same, and every fifth insert is slow, every seventh arrives twice.
    pub async fn of_all_kinds(url: &str) -> Self {
        Self::with(url, true).await
    }

    async fn with(url: &str, all: bool) -> Self {
        let (open, opened) = watch::channel(0);
        let shared = Arc::new(Inserting {
            engine: url.to_owned(),
            http: reqwest::Client::new(),
            open,
            all,
            mended: AtomicBool::default(),
            count: AtomicUsize::default(),
            failed: AtomicUsize::default(),
            slow: AtomicUsize::default(),
            repeated: AtomicUsize::default(),
        });
        let sharing = shared.clone();
        let app = axum::Router::new().fallback(move |request| hand_on(sharing.clone(), request));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let serving = tokio::spawn(async move { axum::serve(listener, app).await.expect("served") });
        Self { url, open: opened, shared, serving }
    }

    /// How many inserts are under way, as it changes.
    pub fn watched(&self) -> watch::Receiver<usize> {
        self.open.clone()
    }

    /// From now on every insert arrives, once and at once.
    pub fn stop_failing(&self) {
        self.shared.mended.store(true, Ordering::Relaxed);
    }

    /// How many inserts have failed, were slow, and arrived twice.
    pub fn counts(&self) -> [(&'static str, usize); 3] {
        let Inserting { failed, slow, repeated, .. } = &*self.shared;
        [("failed inserts", failed), ("slow inserts", slow), ("repeated inserts", repeated)]
            .map(|(name, count)| (name, count.load(Ordering::Relaxed)))
    }
}

impl Drop for FaultyInserts {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Inserting {
    /// What the engine answers.
    async fn ask(&self, head: &Parts, body: Bytes) -> reqwest::Result<axum::response::Response> {
        let url = format!("{}{}", self.engine, head.uri);
        let mut asked = self.http.request(head.method.clone(), url).body(body);
        for (name, value) in &head.headers {
            if !matches!(name.as_str(), "host" | "transfer-encoding" | "content-length" | "connection") {
                asked = asked.header(name, value);
            }
        }
        let answer = asked.send().await?;
        let (status, headers) = (answer.status(), answer.headers().clone());
        let mut answer = axum::response::Response::new(axum::body::Body::from(answer.bytes().await?));
        *answer.status_mut() = status;
        for (name, value) in &headers {
            if !matches!(name.as_str(), "transfer-encoding" | "content-length" | "connection") {
                answer.headers_mut().insert(name, value.clone());
            }
        }
        Ok(answer)
    }

    /// What the engine answers to an insert; `None` of one that fails.
    async fn insert(&self, head: &Parts, body: Bytes) -> Option<axum::response::Response> {
        if self.mended.load(Ordering::Relaxed) {
            return self.ask(head, body).await.ok();
        }
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let (fails, is_stored) = (number % 4 == 3, number % 8 == 7);
        let (is_slow, is_repeated) = (self.all && number % 5 == 1, self.all && number % 7 == 2);
        for (count, is_one) in [(&self.failed, fails), (&self.slow, is_slow), (&self.repeated, is_repeated)] {
            count.fetch_add(usize::from(is_one), Ordering::Relaxed);
        }
        if is_slow {
            sleep(SLOW).await;
        }
        if fails && !is_stored {
            return None;
        }
        if is_repeated {
            let _ = self.ask(head, body.clone()).await;
        }
        self.ask(head, body).await.ok().filter(|_| !fails)
    }
}

async fn hand_on(shared: Arc<Inserting>, request: axum::extract::Request) -> axum::response::Response {
    let (head, body) = request.into_parts();
    // Of a client that is killed in the middle of it nothing is handed on.
    let Ok(body) = axum::body::to_bytes(body, usize::MAX).await else { return failed() };
    let is_insert = head.uri.query().is_some_and(|query| query.contains("INSERT"));
    shared.open.send_modify(|open| *open += usize::from(is_insert));
    // In a task of its own: when the client is gone, the engine still gets all of it.
    let asking = tokio::spawn(async move {
        let answer =
            if is_insert { shared.insert(&head, body).await } else { shared.ask(&head, body).await.ok() };
        shared.open.send_modify(|open| *open -= usize::from(is_insert));
        answer
    });
    asking.await.expect("handed on").unwrap_or_else(failed)
}

fn failed() -> axum::response::Response {
    let mut failed =
        axum::response::Response::new("the proxy fails on purpose, or the engine is away".into());
    *failed.status_mut() = http::StatusCode::BAD_GATEWAY;
    failed
}
