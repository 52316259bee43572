//! Clients that ask for much and do not read it, or send much that never ends: they cost what they were lent, and hold up
//! nobody.

use std::time::Duration;

use bytes::Bytes;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::process::Command;
use tokio::task::JoinSet;
use tokio_tungstenite::tungstenite::Message;

use crate::harness::s2::Wire;
use crate::harness::server::KEY;
use crate::harness::{Process, Socket};

/// Size of the records of a session that is larger than what sockets take by themselves.
const BODY: usize = 60_000;
/// Longest wait for something that a test expects; a failure, not a pace.
const PATIENCE: Duration = Duration::from_secs(60);
const RECORDS: &str = "subscription($s: String!) { channelRecords(by: {externalId: $s}, io: OUT, batch: 1000) \
                       { records { text } } }";

const PAGE: &str = "query($s: String!) { session(by: {externalId: $s}) { out { records(last: 60) \
                    { nodes { text } } } } }";

/// A server of its own, so that its memory can be looked at.
struct Server {
    process: Process,
    http: reqwest::Client,
    _data: tempfile::TempDir,
}

impl Server {
    async fn start(settings: &[(&str, &str)]) -> Self {
        let data = tempfile::tempdir().expect("a folder");
        let mut command = Command::new(Process::binary());
        command.envs(settings.iter().map(|(name, value)| (format!("SESSIOND_HTTP__{name}"), *value)));
        let process = Process::start(&mut command, data.path()).await;
        Self { process, http: reqwest::Client::new(), _data: data }
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.process.url)
    }

    fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method, self.url(path)).bearer_auth(KEY)
    }

    /// A session with so many records of 60,000 bytes.
    async fn session(&self, name: &str, records: usize) {
        Wire::new(&self.process.url).create(name).await;
        for _ in 0..records {
            let path = format!("/realtime/v1/sessions/{name}/out/append");
            let sent = self.request(Method::POST, &path).body("x".repeat(BODY)).send().await;
            assert_eq!(sent.expect("an answer").status().as_u16(), 200);
        }
    }

    async fn gauge(&self, line: &str) -> u64 {
        let text = self.http.get(self.url("/metrics")).send().await.expect("an answer").text().await;
        let text = text.expect("text");
        let value = text.lines().find_map(|found| found.strip_prefix(line)).expect("the gauge");
        value.trim().parse().expect("a number")
    }

    async fn until(&self, line: &str, wanted: u64) {
        let reached = async { while self.gauge(line).await != wanted {} };
        tokio::time::timeout(PATIENCE, reached).await.unwrap_or_else(|_| panic!("{line} never was {wanted}"));
    }

    /// The largest resident size that it ever had, in MiB.
    fn most_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).expect("running");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a line");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") / 1024
    }

    /// A request over HTTP/1.1 whose answer nobody reads.
    async fn stuck(&self, request: &str) -> TcpStream {
        let address = self.process.url.trim_start_matches("http://");
        let mut socket = TcpStream::connect(address).await.expect("connected");
        socket.write_all(request.as_bytes()).await.expect("sent");
        socket
    }

    /// A WebSocket with so many subscriptions that nobody reads, and whose kernel takes little.
    async fn stuck_websocket(&self, session: &str, subscriptions: usize) -> Socket {
        let small = TcpSocket::new_v4().expect("a socket");
        small.set_recv_buffer_size(4096).expect("a size");
        let address = self.process.url.trim_start_matches("http://").parse().expect("an address");
        let stream = small.connect(address).await.expect("connected");
        let mut socket = Socket::over(stream, &self.url("/graphql")).await;
        socket.init(Some(KEY)).await;
        for index in 0..subscriptions {
            socket.subscribe(&index.to_string(), RECORDS, json!({"s": session})).await;
        }
        socket
    }

    /// Every record of a session, as one that reads gets them.
    async fn read_all(&self, session: &str) -> usize {
        let path = format!("/realtime/v1/sessions/{session}/out/records");
        let answer = tokio::time::timeout(PATIENCE, self.request(Method::GET, &path).send()).await;
        let body = answer.expect("an answer in time").expect("an answer").json::<Value>();
        let body = tokio::time::timeout(PATIENCE, body).await.expect("a body in time").expect("a whole body");
        body["records"].as_array().expect("records").len()
    }
}

fn get(path: &str, headers: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n{headers}\r\n")
}

fn graphql(accept: &str, query: &str) -> String {
    let body = json!({"query": query, "variables": {"s": "s"}}).to_string();
    format!(
        "POST /graphql HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n\
         Accept: {accept}\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_websocket_that_is_never_read_ends_at_the_first_write_that_fails() {
    let server = Server::start(&[("WRITE_TIMEOUT", "500ms")]).await;
    server.session("s", 200).await;
    let before = server.most_memory();
    let socket = server.stuck_websocket("s", 50).await;
    server.until("sessiond_websockets ", 1).await;
    // Long before an unanswered ping would end it.
    let mut most = 0;
    let ended = async {
        while server.gauge("sessiond_websockets ").await > 0 {
            most = most.max(server.gauge("sessiond_followers{door=\"Websocket\"} ").await);
        }
    };
    tokio::time::timeout(PATIENCE, ended).await.expect("it ends");
    assert!((1..25).contains(&most), "{most} of 50 subscriptions began");
    server.until("sessiond_followers{door=\"Websocket\"} ", 0).await;
    let grown = server.most_memory() - before;
    // Fifty times the session is 600 MB.
    assert!(grown < 100, "the process grew by {grown} MiB");
    drop(socket);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn websockets_that_are_never_read_keep_no_turn_that_others_wait_for() {
    // Nothing is cut within the time of this test: there is room for all, and patience.
    let server = Server::start(&[("WRITE_TIMEOUT", "1h")]).await;
    server.session("s", 80).await;
    let mut open = Vec::new();
    for _ in 0..100 {
        let mut socket = Socket::open(&server.url("/graphql"), &[]).await.expect("a socket");
        socket.init(Some(KEY)).await;
        open.push(socket);
    }
    let mut sockets = JoinSet::new();
    for mut socket in open {
        sockets.spawn(async move {
            for index in 0..20 {
                socket.subscribe(&index.to_string(), RECORDS, json!({"s": "s"})).await;
            }
            std::future::pending::<()>().await;
        });
    }
    for _ in 0..10 {
        assert_eq!(server.read_all("s").await, 80);
        let list = server.request(Method::GET, "/api/v1/sessions").send();
        let list = tokio::time::timeout(PATIENCE, list).await.expect("an answer in time").expect("an answer");
        assert_eq!(list.status().as_u16(), 200);
    }
    drop(sockets);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_of_every_door_that_do_not_read_share_one_budget_and_those_that_read_go_on() {
    const EACH: usize = 10;
    // Room for a few of them only.
    let server = Server::start(&[("SEND_BUFFER", "6291456")]).await;
    server.session("s", 80).await;
    let stream = Wire::new(&server.process.url).open("s", "out").await;
    let name = percent_encoding::utf8_percent_encode(&stream.name, percent_encoding::NON_ALPHANUMERIC);
    let s2 = |query: &str, headers: &str| {
        format!(
            "GET /v1/streams/{name}/records{query} HTTP/1.1\r\nHost: x\r\ns2-basin: sessiond\r\nAuthorization: Bearer \
             {}\r\n{headers}\r\n",
            stream.token
        )
    };
    let doors = [
        get("/realtime/v1/sessions/s/out", ""),
        get("/realtime/v1/sessions/s/out/records", ""),
        get("/realtime/v1/sessions/s/out/records?limit=1000", ""),
        graphql("text/event-stream", RECORDS),
        graphql("multipart/mixed;subscriptionSpec=1.0", RECORDS),
        graphql("application/json", PAGE),
        graphql("text/event-stream", PAGE),
        s2("?seq_num=0", "Accept: text/event-stream\r\n"),
        s2("?seq_num=0", "Content-Type: s2s/proto\r\n"),
        s2("?seq_num=0", ""),
    ];
    server.read_all("s").await;
    let before = server.most_memory();
    let (mut sockets, mut websockets) = (Vec::new(), Vec::new());
    for _ in 0..EACH {
        for door in &doors {
            sockets.push(server.stuck(door).await);
        }
        websockets.push(server.stuck_websocket("s", 10).await);
        assert_eq!(server.read_all("s").await, 80);
    }
    let grown = server.most_memory() - before;
    // Without a budget each holds a batch of 1 MiB twice, and a WebSocket ten of them.
    assert!(grown < 150, "the process grew by {grown} MiB");
    drop((sockets, websockets));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_without_a_window_holds_one_piece_and_is_reset_while_an_idle_one_lives() {
    const STREAMS: usize = 100;
    let server = Server::start(&[("WRITE_TIMEOUT", "3s")]).await;
    server.session("s", 40).await;
    Wire::new(&server.process.url).create("idle").await;
    let idle = server.request(Method::GET, "/realtime/v1/sessions/idle/out").send().await.expect("an answer");
    server.read_all("s").await;
    let before = server.most_memory();
    let socket =
        TcpStream::connect(server.process.url.trim_start_matches("http://")).await.expect("connected");
    let mut client = h2::client::Builder::new();
    client.initial_window_size(0);
    let (mut requests, connection) = client.handshake::<_, Bytes>(socket).await.expect("a connection");
    // Answers pings all the while.
    let connection = tokio::spawn(connection);
    let mut answers = Vec::new();
    for index in 0..STREAMS {
        let path = if index % 2 == 0 {
            "/realtime/v1/sessions/s/out"
        } else {
            "/realtime/v1/sessions/s/out/records"
        };
        let request = http::Request::get(server.url(path)).header("authorization", format!("Bearer {KEY}"));
        requests = requests.ready().await.expect("room for a stream");
        let (answer, _) = requests.send_request(request.body(()).expect("a request"), true).expect("sent");
        answers.push(answer);
    }
    let mut heads = 0;
    for answer in answers {
        // What is read before it is answered waits for room, until it is reset likewise.
        let error = match tokio::time::timeout(PATIENCE, answer).await.expect("a head or an end in time") {
            Err(error) => error,
            Ok(answer) => {
                assert_eq!(answer.status().as_u16(), 200);
                heads += 1;
                let end = tokio::time::timeout(PATIENCE, answer.into_body().data()).await;
                let end = end.expect("an end in time").expect("no clean end");
                end.expect_err("no data without a window")
            }
        };
        assert!(error.is_reset() && error.is_remote(), "{error}");
    }
    assert!(heads >= STREAMS / 2, "{heads} have begun");
    let grown = server.most_memory() - before;
    // Each session has 2.4 MB.
    assert!(grown < 60, "the process grew by {grown} MiB");
    assert!(!connection.is_finished(), "the connection lives");
    server.until("sessiond_followers{door=\"Sse\"} ", 1).await;
    drop(idle);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_that_never_end_share_the_budget_and_those_that_end_go_on() {
    const EACH: usize = 40;
    const LENGTH: usize = 1_000_000;
    let server = Server::start(&[("SEND_BUFFER", "33554432")]).await;
    server.session("s", 1).await;
    let stream = Wire::new(&server.process.url).open("s", "out").await;
    let name = percent_encoding::utf8_percent_encode(&stream.name, percent_encoding::NON_ALPHANUMERIC);
    let heads = [
        format!("/realtime/v1/sessions/s/in/append HTTP/1.1\r\nAuthorization: Bearer {KEY}"),
        format!("/graphql HTTP/1.1\r\nContent-Type: application/json\r\nAuthorization: Bearer {KEY}"),
        format!(
            "/v1/streams/{name}/records HTTP/1.1\r\ns2-basin: sessiond\r\nAuthorization: Bearer {}",
            stream.token
        ),
    ];
    let append = async |length: usize| {
        let path = "/realtime/v1/sessions/s/in/append";
        let sent = server.request(Method::POST, path).body("x".repeat(length)).send();
        let sent = tokio::time::timeout(PATIENCE, sent).await.expect("an answer in time");
        // Who is refused in the middle of a body may see no more than the end of the connection.
        sent.map_or(503, |answer| answer.status().as_u16())
    };
    assert_eq!(append(LENGTH).await, 200);
    let before = server.most_memory();
    let mut sockets = JoinSet::new();
    for _ in 0..EACH {
        for head in &heads {
            let head = format!("POST {head}\r\nHost: x\r\nContent-Length: {LENGTH}\r\n\r\n");
            let mut socket = server.stuck(&head).await;
            // As far as it is taken.
            sockets.spawn(async move {
                let _ = socket.write_all(&[b' '; LENGTH - 1]).await;
                std::future::pending::<()>().await;
            });
        }
    }
    // Nobody who sends little waits behind those who want to send much.
    for _ in 0..3 {
        assert_eq!(append(BODY).await, 200);
    }
    // Who sends much is told to come again until those that do not go on are cut.
    let large = async {
        while append(LENGTH).await != 200 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, large).await.expect("room in time");
    let grown = server.most_memory() - before;
    // All of them are 120 MB.
    assert!(grown < 60, "the process grew by {grown} MiB");
    drop(sockets);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn websocket_messages_that_never_end_share_the_budget_and_those_that_end_go_on() {
    const SOCKETS: usize = 120;
    const LENGTH: usize = 1_000_000;
    const QUERY: &str = "query($s: String!) { session(by: {externalId: $s}) { id } }";
    let server = Server::start(&[("SEND_BUFFER", "16777216")]).await;
    let before = server.most_memory();
    let url = server.url("/graphql");
    let mut open = Vec::new();
    for _ in 0..SOCKETS {
        let mut socket = Socket::open(&url, &[]).await.expect("a socket");
        socket.init(Some(KEY)).await;
        // The head of a frame, masked with zeros, and all of it but the end.
        let mut frame = vec![0x81, 0x80 | 127];
        frame.extend_from_slice(&(LENGTH as u64).to_be_bytes());
        frame.extend_from_slice(&[0; 4]);
        frame.resize(LENGTH, b' ');
        socket.send_raw(&frame).await;
        open.push(socket);
    }
    let large = async {
        loop {
            let mut socket = Socket::open(&url, &[]).await.expect("a socket");
            socket.init(Some(KEY)).await;
            socket.subscribe("1", QUERY, json!({"s": "x".repeat(LENGTH / 2)})).await;
            match socket.frame().await {
                Some(Message::Text(text)) => return text,
                Some(Message::Close(Some(close))) => assert_eq!(u16::from(close.code), 1013, "{close:?}"),
                // Closed while it was still sending.
                None => {}
                other => panic!("{other:?}"),
            }
        }
    };
    let answer = tokio::time::timeout(PATIENCE, large).await.expect("room in time");
    assert!(answer.contains("externalId") && answer.contains(r#""type":"next""#), "{answer}");
    let grown = server.most_memory() - before;
    // All of them are 120 MB.
    assert!(grown < 60, "the process grew by {grown} MiB");
    drop(open);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_gets_every_record_in_order() {
    let server = Server::start(&[("WRITE_TIMEOUT", "5s"), ("SEND_BUFFER", "4194304")]).await;
    server.session("s", 40).await;
    let mut socket = server.stuck(&get("/realtime/v1/sessions/s/out/records", "Connection: close\r\n")).await;
    let mut answer = Vec::new();
    let mut piece = vec![0; 32 * 1024];
    loop {
        let read =
            tokio::time::timeout(PATIENCE, socket.read(&mut piece)).await.expect("in time").expect("bytes");
        if read == 0 {
            break;
        }
        answer.extend_from_slice(&piece[..read]);
        tokio::task::yield_now().await;
    }
    let text = String::from_utf8_lossy(&answer);
    let places: Vec<u64> = text
        .split("\"seqNum\":")
        .skip(1)
        .map(|rest| rest.split(['}', ',']).next().expect("a number").parse().expect("a number"))
        .collect();
    assert_eq!(places, (0..40).collect::<Vec<_>>());
}
