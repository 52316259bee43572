//! What whoever shows no credentials may take: of the processor, of memory, and of other people's patience.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::{StreamExt, stream};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};

use crate::harness::graphql::code;
use crate::harness::server::KEY;
use crate::harness::{Answer, Graphql, Process, Socket, TestServer};

/// Longest wait for what must come.
const PATIENCE: Duration = Duration::from_secs(30);
/// What code generators ask for, or enough of it.
const SCHEMA: &str = "query Introspection($deprecated: Boolean = true) { __schema { types { kind name description \
    fields(includeDeprecated: $deprecated) { name description args { name type { name kind } } type { name kind } } \
    inputFields { name type { name kind } } enumValues { name } } } }";

async fn ask(graphql: &Graphql, query: &str) -> Answer {
    graphql.post(&json!({"query": query})).await
}

/// Asks until it is answered with this status.
async fn until(graphql: &Graphql, status: u16) -> Answer {
    let asking = async {
        loop {
            let answer = ask(graphql, "{ __typename }").await;
            if answer.status.as_u16() == status {
                return answer;
            }
        }
    };
    tokio::time::timeout(PATIENCE, asking).await.unwrap_or_else(|_| panic!("never {status}"))
}

/// A connection that has sent the head of a request for the door, and `sent` of its body of `length` bytes.
async fn begun(url: &str, length: usize, sent: &[u8]) -> TcpStream {
    let address: SocketAddr = url.trim_start_matches("http://").parse().expect("an address");
    let mut socket = TcpStream::connect(address).await.expect("connected");
    let head = format!(
        "POST /graphql HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    );
    socket.write_all(&[head.as_bytes(), sent].concat()).await.expect("sent");
    socket
}

#[tokio::test]
async fn a_stranger_has_one_operation_at_a_time() {
    let server = TestServer::start().await;
    let operation = json!({"query": "{ __typename }"});
    for batch in [json!([operation]), json!([operation, operation]), json!([])] {
        let refused = server.graphql_as(None).post(&batch).await.expect(401);
        assert_eq!(code(&refused), "UNAUTHENTICATED");
        assert!(refused.to_string().contains("a batch of operations needs an API key"), "{refused}");
    }
    assert_eq!(server.graphql_as(None).post(&operation).await.expect(200)["data"]["__typename"], "Query");
    let results = server.graphql().post(&json!([operation, operation])).await.expect(200);
    assert_eq!(results.as_array().map(Vec::len), Some(2));
}

#[tokio::test]
async fn a_strangers_body_and_document_are_small() {
    let server = TestServer::start().await;
    let stranger = server.graphql_as(None);
    let padded = |size: usize| json!({"query": "{ __typename }", "x": "x".repeat(size)});
    let frame = padded(0).to_string().len();
    stranger.post(&padded(65_536 - frame)).await.expect(200);
    let body = padded(65_537 - frame).to_string();
    let announced =
        stranger.request(Method::POST).header("content-type", "application/json").body(body.clone());
    let pieces = stream::iter([Ok::<_, std::io::Error>(body)]);
    let unannounced = stranger.request(Method::POST).header("content-type", "application/json");
    for request in [announced, unannounced.body(reqwest::Body::wrap_stream(pieces))] {
        let refused = stranger.send(request).await.expect(413);
        assert_eq!(code(&refused), "TOO_LARGE");
        assert!(refused.to_string().contains("65536 bytes"), "{refused}");
    }
    let commented = format!("{{ __typename }} #{}", "x".repeat(20_000));
    let refused = ask(&stranger, &commented).await.expect(400);
    assert_eq!(code(&refused), "QUERY_TOO_LARGE");
    assert!(refused.to_string().contains("16384"), "{refused}");
    ask(&server.graphql(), &commented).await.expect(200);
    server.graphql().post(&padded(500_000)).await.expect(200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_share_a_budget_of_bytes_that_is_nobody_elses() {
    let server = TestServer::start().await;
    let (stranger, known) = (server.graphql_as(None), server.graphql());
    // 128 of them fit; whoever asks meanwhile takes room, too.
    let stuck = join_all((0..160).map(|_| begun(&server.url, 65_536, b"{"))).await;
    let refused = until(&stranger, 503).await;
    assert_eq!(code(&refused.json()), "UNAVAILABLE");
    assert_eq!(refused.header("retry-after"), Some("1"));
    ask(&known, "{ viewer { tokenKind } }").await.expect(200);
    assert_eq!(stranger.get(&[("query", "{ __typename }")]).await.status.as_u16(), 200, "has no body");
    drop(stuck);
    until(&stranger, 200).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_of_strangers_on_one_connection_cost_almost_no_memory() {
    /// What may be added to the server's memory, in KiB, where 200 MiB are offered.
    const MEMORY: usize = 64 * 1024;
    let data = tempfile::tempdir().expect("a folder");
    let process = Process::serve(data.path()).await;
    let http = reqwest::Client::builder().http2_prior_knowledge().build().expect("a client");
    let piece = Bytes::from(vec![b' '; 400 * 1024]);
    let before = process.forget_peak();
    let send = async || {
        let body = stream::iter([Ok::<_, std::io::Error>(piece.clone())]).chain(stream::pending());
        let request =
            http.post(format!("{}/graphql", process.url)).header("content-type", "application/json");
        // Refused at once, of which the client may see no more than that its stream was reset.
        match request.body(reqwest::Body::wrap_stream(body)).send().await {
            Ok(answer) => assert!(matches!(answer.status().as_u16(), 413 | 429 | 503), "{answer:?}"),
            Err(error) => assert!(!error.is_timeout(), "{error:?}"),
        }
    };
    let sent = join_all((0..500).map(|_| send()));
    tokio::time::timeout(PATIENCE, sent).await.expect("all of them are refused");
    let peak = process.memory("VmHWM");
    assert!(peak < before + MEMORY, "{before} KiB grew to {peak} KiB");
    assert_eq!(ask(&process.graphql(), "{ __typename }").await.expect(200)["data"]["__typename"], "Query");
}

#[tokio::test]
async fn an_address_without_credentials_is_limited_before_its_body_is_read() {
    let server = TestServer::start_with(|config| config.http.rate_limit.anonymous = 3).await;
    let stranger = server.graphql_as(None);
    ask(&stranger, "{ __typename }").await.expect(200);
    let forged = server.request_as("tr_dev_nobody", Method::GET, "/api/v1/sessions");
    assert_eq!(server.send(forged).await.expect(401)["code"], "unauthenticated");
    let mut refused = ask(&server.graphql_as(Some("a.b.c")), "{ __typename }").await;
    assert_eq!(code(&refused.expect(401)), "UNAUTHENTICATED");
    for (door, request) in [
        ("post", stranger.request(Method::POST).json(&json!({"query": "{ __typename }"}))),
        ("get", stranger.request(Method::GET).query(&[("query", "{ __typename }")])),
        ("with a token", server.graphql_as(Some("a.b.c")).request(Method::POST).json(&json!({}))),
        ("rest", server.request_as("tr_dev_nobody", Method::GET, "/api/v1/sessions")),
        ("rest without", server.http.get(format!("{}/api/v1/sessions", server.url))),
        ("realtime", server.request_as("x", Method::GET, "/realtime/v1/sessions/s/in/records")),
        ("s2", server.request_as("x", Method::GET, "/v1/streams/sessions%2Fs%2Fin/records")),
        ("a url", server.http.get(format!("{}/blobs/v1/x.y.z", server.url))),
        ("elsewhere", stranger.request(Method::POST).header("x-forwarded-for", "192.0.2.7").json(&json!({}))),
    ] {
        refused = stranger.send(request).await;
        assert_eq!(refused.status.as_u16(), 429, "{door}: {refused:?}");
        let number = |name: &str| refused.header(name).and_then(|text| text.parse::<u64>().ok());
        assert!(
            number("retry-after").is_some_and(|seconds| (1..=10).contains(&seconds)),
            "{door}: {refused:?}"
        );
        assert_eq!(
            (number("x-ratelimit-limit"), number("x-ratelimit-remaining")),
            (Some(3), Some(0)),
            "{door}"
        );
        assert!(refused.text.to_ascii_lowercase().contains("rate_limited"), "{door}: {}", refused.text);
    }
    assert_eq!(Socket::open(&stranger.url, &[]).await.err(), Some(429), "a handshake, too");
    // Nothing of the body is sent, and the answer is there.
    let mut socket = begun(&server.url, 10, b"").await;
    let mut head = [0; 12];
    tokio::time::timeout(PATIENCE, socket.read_exact(&mut head)).await.expect("in time").expect("a head");
    assert_eq!(&head, b"HTTP/1.1 429");
    for _ in 0..20 {
        ask(&server.graphql(), "{ viewer { tokenKind } }").await.expect(200);
        server.get("/api/v1/sessions").await.expect(200);
    }
    for path in ["/healthz", "/readyz", "/metrics", "/openapi.json"] {
        let answer = server.http.get(format!("{}{path}", server.url)).send().await.expect("an answer");
        assert_eq!(answer.status().as_u16(), 200, "{path}");
    }
}

#[tokio::test]
async fn who_comes_through_a_trusted_proxy_is_counted_alone() {
    let server = TestServer::start_with(|config| {
        config.http.rate_limit.anonymous = 1;
        config.http.trusted_proxies = vec!["127.0.0.0/8".to_owned(), "10.0.0.1".to_owned()];
    })
    .await;
    let stranger = server.graphql_as(None);
    for (forwarded, status) in [
        ("192.0.2.1", 200),
        ("192.0.2.1", 429),
        ("192.0.2.2", 200),
        ("192.0.2.9, 192.0.2.2, 10.0.0.1", 429),
        ("192.0.2.1, 192.0.2.3", 200),
        ("2001:db8::1", 200),
        ("2001:db8::2", 429),
    ] {
        let request = stranger.request(Method::POST).header("x-forwarded-for", forwarded);
        let answer = stranger.send(request.json(&json!({"query": "{ __typename }"}))).await;
        assert_eq!(answer.status.as_u16(), status, "{forwarded}");
    }
}

#[tokio::test]
async fn operations_on_a_socket_are_counted_until_a_token_is_shown() {
    let server = TestServer::start_with(|config| config.http.rate_limit.anonymous = 3).await;
    let mut socket = server.graphql_as(None).socket().await;
    for id in ["1", "2"] {
        socket.subscribe(id, "{ __typename }", json!({})).await;
        assert_eq!(socket.result(id).await["data"]["__typename"], "Query");
        socket.completed(id).await;
    }
    socket.subscribe("3", "{ __typename }", json!({})).await;
    let refused = &socket.refused("3").await[0]["extensions"];
    assert_eq!((&refused["code"], &refused["limit"]), (&json!("RATE_LIMITED"), &json!(3)));
    assert!(refused["retryAfterMs"].as_u64().is_some_and(|wait| wait > 0), "{refused}");
    let mut known = Socket::open(&server.graphql().url, &[("authorization", &format!("Bearer {KEY}"))])
        .await
        .expect("a socket");
    known.init(None).await;
    for _ in 0..5 {
        known.subscribe("1", "{ viewer { tokenKind } }", json!({})).await;
        assert_eq!(known.result("1").await["data"]["viewer"]["tokenKind"], "ROOT_KEY");
        known.completed("1").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_socket_without_a_token_may_send_small_messages_only() {
    /// What may be added to the server's memory, in KiB, where 150 MiB are offered.
    const MEMORY: usize = 64 * 1024;
    let data = tempfile::tempdir().expect("a folder");
    let process = Process::serve(data.path()).await;
    let url = format!("{}/graphql", process.url);
    let before = process.forget_peak();
    let begun = async |n: u32| {
        let mut socket = Socket::open(&url, &[]).await.expect("a socket");
        if n.is_multiple_of(2) {
            socket.init(None).await;
        }
        // A message whose end never comes, in one part or in many with something between them.
        let parts = if n < 75 { 1 } else { 50 };
        for part in 0..parts {
            let kind = OpCode::Data(if part == 0 { Data::Text } else { Data::Continue });
            socket.send(Message::Frame(Frame::message(vec![b' '; 1_000_000 / parts], kind, false))).await;
            socket.send(Message::Ping(Default::default())).await;
        }
        socket
    };
    let sockets = join_all((0..150).map(begun)).await;
    let ended = sockets.into_iter().map(async |mut socket| while socket.frame().await.is_some() {});
    tokio::time::timeout(PATIENCE, join_all(ended)).await.expect("all of them are cut");
    let peak = process.memory("VmHWM");
    assert!(peak < before + MEMORY, "{before} KiB grew to {peak} KiB");
    // Message by message there is no end, and with a token no small limit.
    let mut socket = Socket::open(&url, &[]).await.expect("a socket");
    socket.init(None).await;
    for _ in 0..5 {
        let padded = format!("{{ __typename }} #{}", "x".repeat(15_000));
        socket.subscribe("1", &padded, json!({})).await;
        assert_eq!(socket.result("1").await["data"]["__typename"], "Query");
        socket.completed("1").await;
    }
    let mut socket = process.graphql().socket().await;
    let query = "query($x: [ID!]!) { nodes(ids: $x) { id } }";
    socket.subscribe("1", query, json!({"x": ["x".repeat(500_000)]})).await;
    assert!(matches!(socket.hear().await["type"].as_str(), Some("next" | "error")));
}

/// What a process has had of the processor, in ticks.
fn ticks(process: &Process) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.id())).expect("a running process");
    // The name, in brackets, may hold spaces; user and system time are the 12th and 13th field behind it.
    let fields: Vec<_> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
    fields[11..13].iter().map(|field| field.parse::<u64>().expect("a number")).sum()
}

#[tokio::test]
async fn the_schema_is_worked_out_once_however_often_it_is_asked_for() {
    const TIMES: usize = 60;
    let data = tempfile::tempdir().expect("a folder");
    let process = Process::serve(data.path()).await;
    let http = reqwest::Client::new();
    let post = async |query: String| {
        let request = http.post(format!("{}/graphql", process.url)).json(&json!({"query": query}));
        let answer = request.send().await.expect("an answer");
        assert_eq!(answer.status().as_u16(), 200);
        answer.text().await.expect("a whole body")
    };
    let first = post(SCHEMA.to_owned()).await;
    assert!(first.len() > 10_000 && !first.contains("\"errors\""), "{}", &first[..200]);
    let begin = ticks(&process);
    for n in 0..TIMES {
        // Another document, the same question.
        assert_eq!(post(format!("{SCHEMA} # {n}")).await, first);
    }
    let worked_out = ticks(&process) - begin;
    for _ in 0..TIMES {
        assert_eq!(post(SCHEMA.to_owned()).await, first);
    }
    let remembered = ticks(&process) - begin - worked_out;
    assert!(remembered * 3 < worked_out, "{remembered} ticks for the same, {worked_out} for others");
}

#[tokio::test]
async fn what_is_remembered_of_the_schema_is_for_the_same_question_only() {
    let server = TestServer::start().await;
    let query = "query Wide($all: Boolean!) { __type(name: \"Session\") { name kind @include(if: $all) } } \
                 query Narrow { __type(name: \"Query\") { name } }";
    let all = json!({"__type": {"name": "Session", "kind": "OBJECT"}});
    for graphql in [server.graphql_as(None), server.graphql(), server.graphql_as(None)] {
        for (name, variables, expected) in [
            ("Wide", json!({"all": true}), all.clone()),
            ("Wide", json!({"all": false}), json!({"__type": {"name": "Session"}})),
            ("Narrow", json!({}), json!({"__type": {"name": "Query"}})),
            ("Wide", json!({"all": true}), all.clone()),
        ] {
            let body = json!({"query": query, "operationName": name, "variables": variables});
            let result = graphql.post(&body).await.expect(200);
            assert_eq!(result["data"], expected, "{name} {variables}");
        }
        let body = json!({"query": query, "operationName": "Wide", "variables": {}});
        assert_eq!(code(&graphql.post(&body).await.expect(400)), "GRAPHQL_VALIDATION_FAILED");
        // What is refused or asks for more is not remembered.
        let mixed = "{ __schema { queryType { name } } viewer { tokenKind } }";
        let answer = ask(&graphql, mixed).await;
        assert!(matches!(answer.status.as_u16(), 200 | 401));
    }
    let mixed =
        ask(&server.graphql_as(None), "{ __schema { queryType { name } } viewer { tokenKind } }").await;
    assert_eq!(code(&mixed.expect(401)), "UNAUTHENTICATED");
    let over_socket = async || {
        let mut socket = server.graphql_as(None).socket().await;
        socket.subscribe("1", "{ __type(name: \"Query\") { name } }", json!({})).await;
        let result: Value = socket.result("1").await;
        socket.completed("1").await;
        result
    };
    assert_eq!(over_socket().await, over_socket().await);
}
