//! The end: what a stop waits for, and what it does not; signals.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use reqwest::Method;
use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::harness::server::KEY;
use crate::harness::{Process, SseReader, TestServer};

/// Far longer than any test may take: whoever waits for it fails.
const DEADLINE: Duration = Duration::from_secs(3600);
/// What a stop may take on a machine that runs every test at once.
const STOPPED_WITHIN: Duration = Duration::from_secs(30);

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Settings without a setting.
const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];
/// The head of a request that is to be continued: HEADERS without END_HEADERS on stream 1, one byte of `:method: GET`.
const HALF_A_HEAD: &[u8] = &[0, 0, 1, 1, 1, 0, 0, 0, 1, 0x82];
/// A whole one: `GET http://x/healthz` by the static table and two literals, END_HEADERS and END_STREAM.
const GET_HEALTHZ: &[u8] = &[
    0, 0, 15, 1, 5, 0, 0, 0, 1, 0x82, 0x86, 0x41, 1, b'x', 0x04, 8, b'/', b'h', b'e', b'a', b'l', b't', b'h',
    b'z',
];

async fn start(change: impl FnOnce(&mut sessiond::config::Config)) -> TestServer {
    TestServer::start_with(|config| {
        config.http.shutdown_deadline = DEADLINE;
        config.http.header_timeout = DEADLINE;
        change(config);
    })
    .await
}

fn address(server: &TestServer) -> SocketAddr {
    let (_, address) = server.url.split_once("://").expect("a URL");
    address.parse().expect("an address")
}

/// Waits until the server has accepted this many connections, that of the question included.
async fn connected(server: &TestServer, http: &reqwest::Client, count: usize) {
    let line = format!("sessiond_connections {count}");
    loop {
        let metrics = http.get(format!("{}/metrics", server.url)).send().await.expect("an answer");
        if metrics.text().await.expect("text").lines().any(|found| found == line) {
            return;
        }
        tokio::task::yield_now().await;
    }
}

async fn stops_at_once(mut server: TestServer, what: &str) {
    let stopped = tokio::time::timeout(STOPPED_WITHIN, server.stop()).await;
    assert!(stopped.is_ok(), "{what}: the stop waits for it");
}

async fn read_until<S: AsyncRead + Unpin>(socket: &mut S, end: &[u8]) -> Vec<u8> {
    let mut read = Vec::new();
    while !read.windows(end.len()).any(|window| window == end) {
        assert!(socket.read_buf(&mut read).await.expect("readable") > 0, "ended after {read:?}");
    }
    read
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_waits_for_no_connection_that_has_not_asked_for_anything() {
    let headers = [PREFACE, SETTINGS, HALF_A_HEAD].concat();
    let cases: [(&str, &[u8]); 7] = [
        ("a silent connection", b""),
        ("one byte", b"P"),
        ("part of a preface", &PREFACE[..10]),
        ("part of a head", b"GET / HTTP/1.1\r\nHost: x\r\nX-"),
        ("a preface alone", PREFACE),
        ("a preface and settings", &headers[..PREFACE.len() + SETTINGS.len()]),
        ("part of a head over HTTP/2", &headers),
    ];
    let stops = cases.map(|(what, sent)| async move {
        let server = start(|_| {}).await;
        let mut socket = TcpStream::connect(address(&server)).await.expect("connected");
        socket.write_all(sent).await.expect("sent");
        connected(&server, &server.http, 2).await;
        stops_at_once(server, what).await;
    });
    futures_util::future::join_all(stops).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_waits_for_no_connection_whose_answers_have_all_gone_out() {
    let http1 = async {
        let server = start(|_| {}).await;
        let mut socket = TcpStream::connect(address(&server)).await.expect("connected");
        socket.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("sent");
        read_until(&mut socket, br#""ok"}"#).await;
        socket.write_all(b"GET /healthz HTTP/1.1\r\nHo").await.expect("sent");
        stops_at_once(server, "part of a second head").await;
    };
    let http2 = async {
        let server = start(|_| {}).await;
        let mut socket = TcpStream::connect(address(&server)).await.expect("connected");
        socket.write_all(&[PREFACE, SETTINGS, GET_HEALTHZ].concat()).await.expect("sent");
        read_until(&mut socket, br#""ok"}"#).await;
        // From here on it answers nothing, not even that it has heard the server's goodbye.
        stops_at_once(server, "a client of HTTP/2 that has gone silent").await;
    };
    tokio::join!(http1, http2);
}

/// A server with a certificate of its own, and a client that trusts it.
async fn start_tls(files: &Path) -> (TestServer, reqwest::Client, Arc<RootCertStore>) {
    let own = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
    let (certificate, key) = (files.join("cert.pem"), files.join("key.pem"));
    std::fs::write(&certificate, own.cert.pem()).expect("written");
    std::fs::write(&key, own.signing_key.serialize_pem()).expect("written");
    let server = start(|config| {
        config.http.tls.certificate = Some(certificate);
        config.http.tls.private_key = Some(key);
    })
    .await;
    let client = reqwest::Client::builder().danger_accept_invalid_certs(true).build().expect("a client");
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(own.cert.der().to_vec())).expect("a certificate");
    (server, client, Arc::new(roots))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_waits_for_no_handshake_of_tls_and_for_nobody_who_is_silent_after_it() {
    let unfinished: [(&str, &[u8]); 2] =
        [("no handshake", b""), ("part of a handshake", &[22, 3, 1, 2, 0, 1, 0, 1])];
    for (what, sent) in unfinished {
        let files = tempfile::tempdir().expect("a folder");
        let (server, http, _) = start_tls(files.path()).await;
        let mut socket = TcpStream::connect(address(&server)).await.expect("connected");
        socket.write_all(sent).await.expect("sent");
        connected(&server, &http, 2).await;
        stops_at_once(server, what).await;
    }
    for protocol in ["h2", "http/1.1"] {
        let files = tempfile::tempdir().expect("a folder");
        let (server, http, roots) = start_tls(files.path()).await;
        let mut config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
        let socket = TcpStream::connect(address(&server)).await.expect("connected");
        let name = "localhost".try_into().expect("a name");
        let _silent = TlsConnector::from(Arc::new(config)).connect(name, socket).await.expect("a handshake");
        connected(&server, &http, 2).await;
        stops_at_once(server, protocol).await;
    }
}

/// Returns once the server takes no connections, which is when it has begun to drain.
async fn refuses_connections(address: SocketAddr) {
    while TcpStream::connect(address).await.is_ok() {
        tokio::task::yield_now().await;
    }
}

async fn send_the_rest_while_it_stops<S: AsyncRead + AsyncWrite + Unpin>(
    mut server: TestServer,
    socket: &mut S,
    rest: &[u8],
) -> String {
    let address = address(&server);
    let finish = async {
        refuses_connections(address).await;
        socket.write_all(rest).await.expect("sent");
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).await.expect("a whole answer");
        String::from_utf8_lossy(&answer).into_owned()
    };
    let ((), answer) = tokio::time::timeout(STOPPED_WITHIN, async { tokio::join!(server.stop(), finish) })
        .await
        .expect("stops when the answer is out");
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_is_under_way_is_still_answered() {
    let server = start(|_| {}).await;
    server.create(json!({"externalId": "s"})).await;
    let mut socket = TcpStream::connect(address(&server)).await.expect("connected");
    let head = format!(
        "POST /realtime/v1/sessions/s/in/append HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\
         Content-Length: 4\r\nExpect: 100-continue\r\n\r\n"
    );
    socket.write_all(head.as_bytes()).await.expect("sent");
    // The handler asks for the body.
    read_until(&mut socket, b"100 Continue\r\n\r\n").await;
    let answer = send_the_rest_while_it_stops(server, &mut socket, b"rest").await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with(r#"{"ok":true,"seq":0}"#), "{answer}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_of_http2_that_is_under_way_is_still_answered() {
    let server = start(|_| {}).await;
    server.create(json!({"externalId": "s"})).await;
    let client = reqwest::Client::builder().http2_prior_knowledge().build().expect("a client");
    // From here on the connection is known as one of HTTP/2 that asks for something.
    let known = client.get(format!("{}/healthz", server.url)).send().await.expect("an answer");
    known.bytes().await.expect("a body");
    let (send, pieces) = tokio::sync::mpsc::channel::<std::io::Result<&'static str>>(1);
    let pieces = futures_util::stream::unfold(pieces, async |mut pieces| {
        let piece = pieces.recv().await?;
        Some((piece, pieces))
    });
    let request = client
        .post(format!("{}/realtime/v1/sessions/s/in/append", server.url))
        .bearer_auth(KEY)
        .body(reqwest::Body::wrap_stream(pieces));
    send.send(Ok("half ")).await.expect("taken");
    let answer = tokio::spawn(request.send());
    connected(&server, &server.http, 2).await;
    let (address, mut server) = (address(&server), server);
    let rest = async {
        refuses_connections(address).await;
        // The first one has left when there is room for another.
        send.send(Ok("and the ")).await.expect("taken");
        send.send(Ok("rest")).await.expect("taken");
        drop(send);
        answer.await.expect("a task").expect("an answer").status()
    };
    let ((), status) = tokio::time::timeout(STOPPED_WITHIN, async { tokio::join!(server.stop(), rest) })
        .await
        .expect("stops");
    assert_eq!(status, 200);
}

async fn status(url: &str, path: &str) -> u16 {
    // A connection of its own each time.
    reqwest::Client::new().get(format!("{url}{path}")).send().await.expect("an answer").status().as_u16()
}

async fn not_ready(url: &str) {
    while status(url, "/readyz").await != 503 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_a_delay_everything_is_served_but_readiness_until_a_second_signal() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = Command::new(Process::binary());
    command.env("SESSIOND_HTTP__SHUTDOWN_DELAY", "1h");
    let mut process = Process::start(&mut command, folder.path()).await;
    let http = reqwest::Client::new();
    let request =
        |method: Method, path: &str| http.request(method, format!("{}{path}", process.url)).bearer_auth(KEY);
    let body = json!({"type": "chat", "taskIdentifier": "agent", "externalId": "s"});
    let created = request(Method::POST, "/api/v1/sessions").json(&body).send().await.expect("an answer");
    assert!(created.status().is_success());
    let follow = request(Method::GET, "/realtime/v1/sessions/s/in").send().await.expect("an answer");
    let mut follower = SseReader::new(follow).ok();
    assert_eq!(status(&process.url, "/readyz").await, 200);

    process.signal(libc::SIGTERM);
    not_ready(&process.url).await;
    assert_eq!(status(&process.url, "/healthz").await, 200);
    let append = request(Method::POST, "/realtime/v1/sessions/s/in/append").body("late");
    assert_eq!(append.send().await.expect("an answer").status(), 200);
    follower.records(1).await;
    let follow = request(Method::GET, "/realtime/v1/sessions/s/in").send().await.expect("an answer");
    SseReader::new(follow).ok().records(1).await;

    process.signal(libc::SIGTERM);
    assert!(process.wait().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delay_ends_of_itself() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = Command::new(Process::binary());
    command.env("SESSIOND_HTTP__SHUTDOWN_DELAY", "300ms");
    let process = Process::start(&mut command, folder.path()).await;
    assert!(process.terminate().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hang_up_is_logged_and_ends_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    // Process has its standard output; the log goes to standard error.
    let mut command = Command::new(Process::binary());
    command
        .args(["serve", "--listen", "127.0.0.1:0", "--data"])
        .arg(folder.path())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().expect("the binary starts");
    let mut lines = BufReader::new(child.stderr.take().expect("a pipe")).lines();
    let mut line_with = async |text: &str| {
        let said = async {
            while let Some(line) = lines.next_line().await.expect("UTF-8") {
                if line.contains(text) {
                    return;
                }
            }
            panic!("it ended without saying {text:?}");
        };
        tokio::time::timeout(STOPPED_WITHIN, said)
            .await
            .unwrap_or_else(|_| panic!("it does not say {text:?}"));
    };
    line_with("listening").await;
    for _ in 0..2 {
        crate::harness::process::send(child.id().expect("running"), libc::SIGHUP);
        line_with("SIGHUP does nothing").await;
    }
    crate::harness::process::send(child.id().expect("running"), libc::SIGTERM);
    line_with("stopped").await;
    assert!(child.wait().await.expect("a status").success());
}
