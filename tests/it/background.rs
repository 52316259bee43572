//! Faults of ours: what panics ends alone, and what nothing can go on without ends the server.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::routing::get;
use futures_util::{StreamExt, stream};
use reqwest::Client;
use serde_json::{Value, json};
use sessiond::api;
use sessiond::domain::{Clock, TestClock, Timestamp};
use sessiond::listener::Listener;
use sessiond::shutdown::Shutdown;
use sessiond::telemetry::Metrics;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout;

use crate::harness::server::{KEY, START, config, start};
use crate::harness::{SseReader, TestServer};

const PATIENCE: Duration = Duration::from_secs(20);

/// A server with routes that fail, which the binary has none of.
struct Failing {
    url: String,
    /// Lets `/waits` answer.
    go: Arc<Notify>,
    /// The tasks that have failed.
    faults: mpsc::UnboundedReceiver<&'static str>,
    shutdown: Shutdown,
    _data: tempfile::TempDir,
}

impl Failing {
    async fn start() -> Self {
        let data = tempfile::tempdir().expect("a folder");
        let server = start(data.path(), Arc::new(TestClock::at(START)), |_| {}).await;
        let go = Arc::new(Notify::new());
        let waits = go.clone();
        let fails = || async {
            let path = std::env::current_exe().expect("a path");
            assert!(!path.exists(), "on purpose");
        };
        let breaks = || async {
            let pieces = stream::iter(0..2).map(|piece| {
                assert!(piece == 0, "on purpose");
                Ok::<_, std::io::Error>("the first piece")
            });
            Body::from_stream(pieces)
        };
        let more = Router::new()
            .route("/fails", get(fails))
            .route("/breaks", get(breaks))
            .route("/waits", get(|| async move { waits.notified().await }));
        let state = server.api_state();
        let metrics = state.metrics.clone();
        let router = api::router_with(state, more);
        let config = config(data.path(), |_| {});
        let listener = Listener::bind(config.http, 1, Metrics::new()).await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let (fault, faults) = mpsc::unbounded_channel();
        let shutdown = Shutdown::new(move |task| {
            metrics.task_fault(task);
            fault.send(task).unwrap_or_default();
        });
        tokio::spawn(listener.serve(router, shutdown.clone()));
        Self { url, go, faults, shutdown, _data: data }
    }
}

/// The head and the body of an answer on a connection that stays open.
async fn answer(socket: &mut TcpStream) -> (String, Vec<u8>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(socket.read_u8().await.expect("the connection lives"));
    }
    let head = String::from_utf8(head).expect("text").to_ascii_lowercase();
    let length =
        head.split("content-length: ").nth(1).and_then(|rest| rest.lines().next()).expect("a length");
    let mut body = vec![0; length.parse().expect("a number")];
    socket.read_exact(&mut body).await.expect("the connection lives");
    (head, body)
}

#[tokio::test]
async fn a_panic_in_a_handler_is_answered_with_a_request_id_and_its_connection_lives() {
    let server = Failing::start().await;
    let mut socket = TcpStream::connect(server.url.trim_start_matches("http://")).await.expect("connected");
    for _ in 0..2 {
        let request = "GET /fails HTTP/1.1\r\nHost: here\r\nX-Request-Id: of-the-test\r\n\r\n";
        socket.write_all(request.as_bytes()).await.expect("sent");
        let (head, body) = timeout(PATIENCE, answer(&mut socket)).await.expect("an answer");
        assert!(head.starts_with("http/1.1 500 "), "{head}");
        assert!(head.contains("x-request-id: of-the-test"), "{head}");
        let body: Value = serde_json::from_slice(&body).expect("json");
        assert_eq!(body["requestId"], "of-the-test", "{body}");
        assert!(!body.to_string().contains("on purpose"), "{body}");
    }
    socket.write_all(b"GET /healthz HTTP/1.1\r\nHost: here\r\n\r\n").await.expect("sent");
    let (head, _) = timeout(PATIENCE, answer(&mut socket)).await.expect("an answer");
    assert!(head.starts_with("http/1.1 200 "), "{head}");
    server.shutdown.begin();
}

#[tokio::test]
async fn a_panic_in_one_stream_of_a_connection_leaves_the_others_alone() {
    let mut server = Failing::start().await;
    let http = Client::builder().http2_prior_knowledge().build().expect("a client");
    let ask = |path: &str| http.get(format!("{}{path}", server.url)).send();
    let waiting = tokio::spawn(ask("/waits"));
    let failed = timeout(PATIENCE, ask("/fails")).await.expect("in time").expect("an answer");
    assert_eq!(failed.status(), 500);
    let broken = timeout(PATIENCE, ask("/breaks")).await.expect("in time").expect("a head");
    assert_eq!(broken.status(), 200);
    timeout(PATIENCE, broken.bytes()).await.expect("in time").expect_err("the body breaks off");
    assert_eq!(
        timeout(PATIENCE, server.faults.recv()).await.expect("in time"),
        Some("stream of a connection")
    );
    let metrics = ask("/metrics").await.expect("an answer").text().await.expect("a body");
    assert!(metrics.contains(r#"sessiond_task_faults_total{task="stream of a connection"} 1"#), "{metrics}");
    server.go.notify_one();
    let answer = timeout(PATIENCE, waiting).await.expect("in time").expect("no panic");
    assert_eq!(answer.expect("the connection lives").status(), 200);
    server.shutdown.begin();
}

/// A clock that panics once it is told to.
#[derive(Debug)]
struct FaultyClock {
    clock: TestClock,
    armed: AtomicBool,
}

impl Clock for FaultyClock {
    fn now(&self) -> Timestamp {
        assert!(!self.armed.swap(false, Ordering::SeqCst), "a fault of ours");
        self.clock.now()
    }
}

#[tokio::test]
async fn a_task_that_nothing_can_go_on_without_ends_the_server_and_its_streams_when_it_panics() {
    let data = tempfile::tempdir().expect("a folder");
    let clock = Arc::new(FaultyClock { clock: TestClock::at(START), armed: AtomicBool::new(false) });
    let server = start(data.path(), clock.clone(), |_| {}).await;
    let url = server.base_url().expect("an address");
    let running = tokio::spawn(server.run(std::future::pending(), std::future::pending()));
    let http = Client::new();
    let session = json!({"type": "chat", "taskIdentifier": "agent", "externalId": "s"});
    let created = http.post(format!("{url}/api/v1/sessions")).bearer_auth(KEY).json(&session);
    assert!(created.send().await.expect("an answer").status().is_success());
    let follow = http.get(format!("{url}/realtime/v1/sessions/s/out")).bearer_auth(KEY);
    let follow = follow.header("Accept", "text/event-stream").send().await.expect("a head");
    let mut follow = SseReader::new(follow).ok();

    // Whoever asks for the time next: the timers do so four times a second, and most others never without a request.
    let mut running = std::pin::pin!(running);
    let ended = timeout(PATIENCE, async {
        loop {
            clock.armed.store(true, Ordering::SeqCst);
            tokio::select! {
                ended = &mut running => return ended,
                () = async { while clock.armed.load(Ordering::SeqCst) { tokio::task::yield_now().await } } => {}
            }
            tokio::task::yield_now().await;
        }
    });
    let ended = ended.await.expect("the server ends before the test gives up").expect("no panic of its own");
    let error = ended.expect_err("it says why").to_string();
    assert!(error.contains("timers") || error.contains("watch over keys"), "{error}");
    timeout(PATIENCE, follow.rest()).await.expect("the stream has ended");
}

#[tokio::test]
async fn a_server_whose_tasks_run_names_none() {
    let server = TestServer::start().await;
    assert_eq!(server.get("/readyz").await.expect(200), json!({"status": "ok"}));
    let metrics = server.get("/metrics").await.text;
    assert!(!metrics.contains("sessiond_task_faults"), "{metrics}");
}
