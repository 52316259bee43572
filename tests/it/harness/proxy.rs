//! Networks that break: a TCP proxy that cuts its connections at random bytes, and one that leads nowhere for a while.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

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

/// Before a ClickHouse: of the inserts every fourth fails, and of these every other one after it was stored. It hands on whole
/// requests only: the engine of the tests ends when a connection is cut in the middle of an insert.
pub struct FaultyInserts {
    /// Base URL for clients.
    pub url: String,
    /// Inserts that are with the engine, or have failed and are not answered yet.
    open: watch::Receiver<usize>,
    serving: JoinHandle<()>,
}

/// What the requests of a [`FaultyInserts`] share.
struct Inserting {
    engine: String,
    http: reqwest::Client,
    open: watch::Sender<usize>,
    count: AtomicUsize,
}

impl FaultyInserts {
    /// In front of the engine at a base URL.
    pub async fn before(url: &str) -> Self {
        let (open, opened) = watch::channel(0);
        let (http, count) = (reqwest::Client::new(), AtomicUsize::new(0));
        let shared = Arc::new(Inserting { engine: url.to_owned(), http, open, count });
        let app = axum::Router::new().fallback(move |request| hand_on(shared.clone(), request));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let serving = tokio::spawn(async move { axum::serve(listener, app).await.expect("served") });
        Self { url, open: opened, serving }
    }

    /// How many inserts are under way, as it changes.
    pub fn watched(&self) -> watch::Receiver<usize> {
        self.open.clone()
    }
}

impl Drop for FaultyInserts {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn hand_on(shared: Arc<Inserting>, request: axum::extract::Request) -> axum::response::Response {
    let (head, body) = request.into_parts();
    // A client that is killed in the middle of it leaves an error here, and nothing is handed on.
    let body = axum::body::to_bytes(body, usize::MAX).await.expect("a whole request");
    let is_insert = head.uri.query().is_some_and(|query| query.contains("INSERT"));
    let number = if is_insert { shared.count.fetch_add(1, Ordering::Relaxed) } else { 0 };
    let (fails, is_stored) = (is_insert && number % 4 == 3, number % 8 == 7);
    shared.open.send_modify(|open| *open += usize::from(is_insert));
    // In a task of its own: when the client is gone, the engine still gets all of it.
    let asking = tokio::spawn(async move {
        let answer = if !fails || is_stored {
            let url = format!("{}{}", shared.engine, head.uri);
            let mut asked = shared.http.request(head.method, url).body(body);
            for (name, value) in &head.headers {
                if !matches!(name.as_str(), "host" | "transfer-encoding" | "content-length" | "connection") {
                    asked = asked.header(name, value);
                }
            }
            let answer = asked.send().await.expect("the engine answers");
            let (status, headers) = (answer.status(), answer.headers().clone());
            let body = answer.bytes().await.expect("a whole answer");
            let mut answer = axum::response::Response::new(axum::body::Body::from(body));
            *answer.status_mut() = status;
            for (name, value) in &headers {
                if !matches!(name.as_str(), "transfer-encoding" | "content-length" | "connection") {
                    answer.headers_mut().insert(name, value.clone());
                }
            }
            Some(answer)
        } else {
            None
        };
        shared.open.send_modify(|open| *open -= usize::from(is_insert));
        answer
    });
    let answer = asking.await.expect("handed on").filter(|_| !fails);
    answer.unwrap_or_else(|| {
        let mut failed = axum::response::Response::new("the proxy fails on purpose".into());
        *failed.status_mut() = http::StatusCode::BAD_GATEWAY;
        failed
    })
}
