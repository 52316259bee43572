//! `graphql-transport-ws`, message by message and close code by close code:
//! <https://github.com/enisdenjo/graphql-ws/blob/master/PROTOCOL.md>.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Bytes, Message};

use crate::harness::graphql::code;
use crate::harness::server::KEY;
use crate::harness::websocket::PROTOCOL;
use crate::harness::{Socket, TestServer};

const MIB: usize = 1_048_576;
const FOLLOW: &str =
    "subscription($s: String) { channelRecords(by: {externalId: $s}, io: OUT) { records { text } } }";
/// Says nothing until a session is created.
const QUIET: &str = "subscription { sessionsChanged { externalId } }";

fn init() -> Value {
    json!({"type": "connection_init", "payload": {"authorization": format!("Bearer {KEY}")}})
}

fn typename(id: &str) -> Value {
    json!({"type": "subscribe", "id": id, "payload": {"query": "{ __typename }"}})
}

#[tokio::test]
async fn the_subprotocol_is_spoken_or_the_page_is_told_why_not() {
    let server = TestServer::start().await;
    let url = server.graphql().url;
    for (offer, chosen, spoken) in [
        (Some(PROTOCOL), Some(PROTOCOL), true),
        (Some("graphql-ws, graphql-transport-ws"), Some(PROTOCOL), true),
        (Some("graphql-ws"), Some("graphql-ws"), false),
        (Some("soap, graphql-ws"), Some("soap"), false),
        (None, None, false),
    ] {
        let mut socket = Socket::offering(&url, offer, &[]).await.expect("accepted");
        assert_eq!(socket.protocol.as_deref(), chosen, "{offer:?}");
        if spoken {
            socket.init(None).await;
        } else {
            assert_eq!(socket.closed().await.0, 4406, "{offer:?}");
        }
    }
    let plain = server.http.get(&url).header("connection", "upgrade").header("upgrade", "websocket");
    assert_eq!(plain.send().await.expect("an answer").status().as_u16(), 400, "half a handshake");
}

/// Names of headers have no case, but a client of Python's looks for exactly this one.
#[tokio::test]
async fn the_subprotocol_is_named_in_the_spelling_of_the_standard() {
    let server = TestServer::start().await;
    let address = server.url.trim_start_matches("http://");
    let expected = "\r\nSec-WebSocket-Protocol: graphql-transport-ws\r\n";
    let mut first = TcpStream::connect(address).await.expect("connects");
    let answer = shake_hands(&mut first, "").await;
    assert!(answer.starts_with("HTTP/1.1 101 ") && answer.contains(expected), "{answer}");

    let earlier = format!("GET /healthz HTTP/1.1\r\nHost: {address}\r\n\r\n");
    let mut later = TcpStream::connect(address).await.expect("connects");
    later.write_all(earlier.as_bytes()).await.expect("sent");
    let answer = shake_hands(&mut later, &earlier).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let mut rest = String::new();
    while !rest.ends_with(expected) {
        rest.push(char::from(later.read_u8().await.expect("the head behind two answers")));
    }

    // What WebSocket carries is nobody's head: a ping comes back as it was sent.
    let told = b"HTTP/1.1 101 \r\nsec-websocket-protocol: x\r\n\r\n";
    while !rest.ends_with("\r\n\r\n") {
        rest.push(char::from(later.read_u8().await.expect("the end of the head")));
    }
    let len = u8::try_from(told.len()).expect("short");
    let ping = [&[0x89, 0x80 | len, 0, 0, 0, 0], told.as_slice()].concat();
    later.write_all(&ping).await.expect("sent");
    let mut pong = vec![0; 2 + told.len()];
    later.read_exact(&mut pong).await.expect("a pong");
    assert_eq!(pong, [&[0x8a, len], told.as_slice()].concat());
}

#[tokio::test]
async fn who_does_not_say_connection_init_in_time_is_closed() {
    let server = TestServer::start_with(|config| {
        config.graphql.init_timeout = Duration::from_millis(200);
        config.graphql.ping_interval = Duration::from_secs(600);
    });
    let server = server.await;
    let mut prompt = server.graphql().socket().await;
    let mut silent = Socket::open(&server.graphql().url, &[]).await.expect("a socket");
    silent.say(json!({"type": "ping"})).await;
    assert_eq!(silent.hear().await, json!({"type": "pong"}), "a ping needs no acknowledgement, and is none");
    assert_eq!(silent.closed().await.0, 4408);
    prompt.silent().await;
}

#[tokio::test]
async fn every_breach_of_the_protocol_closes_with_its_code() {
    let server = TestServer::start().await;
    let url = server.graphql().url;
    let text = |value: Value| vec![Message::text(value.to_string())];
    let after_init = |value: Value| [text(init()), text(value)].concat();
    let subscribe = |payload: Value| json!({"type": "subscribe", "id": "1", "payload": payload});
    let token = |value: Value| json!({"type": "connection_init", "payload": {"authorization": value}});
    let quiet = subscribe(json!({"query": QUIET}));
    for (breach, said, expected) in [
        ("a second init", after_init(init()), 4429),
        ("subscribe before the ack", text(typename("1")), 4401),
        ("a bad key", text(token(json!("Bearer tr_dev_nobody_has_this_key"))), 4403),
        ("a bad key that is very long", text(token(json!(format!("Bearer {}", "ä".repeat(5000))))), 4403),
        ("a forged token", text(token(json!("Bearer a.b.c"))), 4403),
        ("another scheme", text(token(json!("Basic dTpw"))), 4403),
        ("a key that is no text", text(token(json!(1))), 4403),
        ("no JSON", vec![Message::text("connection_init")], 4400),
        ("nothing", vec![Message::text("")], 4400),
        ("JSON that goes on", vec![Message::text(r#"{"type":"ping"}{"type":"ping"}"#)], 4400),
        ("deep JSON", vec![Message::text("[".repeat(100_000))], 4400),
        ("a binary frame", vec![Message::binary(init().to_string())], 4400),
        ("a list", text(json!([init()])), 4400),
        ("no type", text(json!({"payload": {}})), 4400),
        ("a type that is no text", text(json!({"type": 1})), 4400),
        ("an unknown type", text(json!({"type": "x".repeat(1000)})), 4400),
        ("a message of the server's", after_init(json!({"type": "connection_ack"})), 4400),
        ("the old protocol's start", after_init(json!({"type": "start", "id": "1", "payload": {}})), 4400),
        ("an init with a text", text(json!({"type": "connection_init", "payload": "x"})), 4400),
        ("a ping with a number", text(json!({"type": "ping", "payload": 1})), 4400),
        ("subscribe without id", after_init(json!({"type": "subscribe", "payload": {"query": QUIET}})), 4400),
        ("an empty id", after_init(typename("")), 4400),
        ("an id that is no text", after_init(json!({"type": "complete", "id": 1})), 4400),
        ("complete without id", after_init(json!({"type": "complete"})), 4400),
        ("no payload", after_init(json!({"type": "subscribe", "id": "1"})), 4400),
        ("a payload that is no object", after_init(subscribe(json!(QUIET))), 4400),
        ("no query", after_init(subscribe(json!({"variables": {}}))), 4400),
        ("a query that is no text", after_init(subscribe(json!({"query": 1}))), 4400),
        ("variables in a list", after_init(subscribe(json!({"query": QUIET, "variables": []}))), 4400),
        ("an id twice", [text(init()), text(quiet.clone()), text(quiet)].concat(), 4409),
    ] {
        let mut socket = Socket::open(&url, &[]).await.expect("a socket");
        for message in said {
            socket.send(message).await;
        }
        let (code, reason) = socket.closed().await;
        assert_eq!(code, expected, "{breach}: {reason}");
        assert!((1..=123).contains(&reason.len()), "{breach}: {reason}");
    }
}

#[tokio::test]
async fn half_an_emoji_in_a_variable_is_a_fault_of_its_operation_at_every_door() {
    let server = TestServer::start().await;
    let graphql = server.graphql();
    let operation = r#"{"query":"query($by: SessionBy!) { session(by: $by) { id } }","variables":{"by":{"externalId":"\ud83d"}}}"#;
    let message = "variables.by must not contain half of a surrogate pair";
    let told = |error: &Value| {
        assert_eq!(error["message"], message);
        assert_eq!(error["extensions"]["code"], "BAD_USER_INPUT");
    };
    let mut socket = graphql.socket().await;
    socket.subscribe("lives", QUIET, json!({})).await;
    let text = format!(r#"{{"type":"subscribe","id":"1","payload":{operation}}}"#);
    socket.send(Message::text(text)).await;
    told(&socket.refused("1").await[0]);
    socket.silent().await;
    let other = r#"{"query":"{ __typename }"}"#;
    for body in [
        operation.to_owned(),
        format!("[{other},{operation}]"),
        format!("[{other},{other},{operation},{other}]"),
    ] {
        let request = graphql.request(Method::POST).header("content-type", "application/json");
        told(&graphql.send(request.body(body)).await.json()["errors"][0]);
    }
    let query = "query($by: SessionBy!) { session(by: $by) { id } }";
    let variables = r#"{"by":{"externalId":"\ud83d"}}"#;
    told(&graphql.get(&[("query", query), ("variables", variables)]).await.json()["errors"][0]);
    let twice = format!(r#"{{"type":"subscribe","id":"lives","payload":{operation}}}"#);
    socket.send(Message::text(twice)).await;
    assert_eq!(socket.closed().await.0, 4409, "an id in use is not refused for what it says");
}

#[tokio::test]
async fn an_id_can_be_used_again_once_its_operation_has_ended() {
    let server = TestServer::start().await;
    let mut socket = server.graphql().socket().await;
    for _ in 0..3 {
        socket.subscribe("1", "{ __typename }", json!({})).await;
        assert_eq!(socket.event("1").await, "Query");
        socket.completed("1").await;
        socket.subscribe("1", "{ nothing }", json!({})).await;
        socket.refused("1").await;
        socket.subscribe("1", QUIET, json!({})).await;
        socket.complete("1").await;
    }
    socket.complete("never heard of").await;
    socket.silent().await;
}

#[tokio::test]
async fn pings_come_back_with_their_payload_and_pongs_do_not() {
    let server = TestServer::start().await;
    let mut socket = server.graphql().socket().await;
    let payload = json!({"n": 1, "nested": {"ä": [null, 1.5]}});
    socket.say(json!({"type": "ping", "payload": payload})).await;
    assert_eq!(socket.hear().await, json!({"type": "pong", "payload": payload}));
    socket.say(json!({"type": "pong"})).await;
    socket.say(json!({"type": "pong", "payload": payload})).await;
    socket.say(json!({"type": "ping", "payload": null})).await;
    assert_eq!(socket.hear().await, json!({"type": "pong"}));
    socket.send(Message::Ping(Bytes::from_static(b"transport"))).await;
    let answer = socket.frame().await;
    assert_eq!(answer, Some(Message::Pong(Bytes::from_static(b"transport"))));
}

#[tokio::test]
async fn a_client_that_completes_hears_no_more_of_it_and_others_go_on() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let mut socket = server.graphql().socket().await;
    for id in ["stopped", "kept"] {
        socket.subscribe(id, FOLLOW, json!({"s": "s"})).await;
        assert_eq!(socket.event(id).await["records"], json!([]));
    }
    socket.complete("stopped").await;
    socket.silent().await;
    for text in ["one", "two"] {
        server.append("s", "out", text).await;
        assert_eq!(socket.event("kept").await["records"], json!([{"text": text}]));
    }
    socket.silent().await;
}

#[tokio::test]
async fn what_is_refused_before_it_runs_is_an_error_and_nothing_else() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let reader = server.token(&["read:sessions:s"], Duration::from_secs(60)).await;
    let (root, public, nobody) = (0, 1, 2);
    let mut sockets = Vec::new();
    for bearer in [Some(KEY), Some(reader.as_str()), None] {
        sockets.push(server.graphql_as(bearer).socket().await);
    }
    let missing =
        r#"subscription { sessionChanged(by: {sessionId: "session_00000000000000000000000000"}) { id } }"#;
    let two = "subscription { a: sessionsChanged { id } b: sessionsChanged { id } }";
    let variable = "subscription($by: SessionBy!) { sessionChanged(by: $by) { id } }";
    let both = "subscription($by: SessionBy = {externalId: \"a\", sessionId: \"b\"}) { sessionChanged(by: $by) { id } }";
    for (who, query, expected) in [
        (root, "{ viewer", "GRAPHQL_PARSE_FAILED"),
        (root, "", "BAD_REQUEST"),
        (root, "{ nothing }", "GRAPHQL_VALIDATION_FAILED"),
        (root, "subscription { nothing }", "GRAPHQL_VALIDATION_FAILED"),
        (root, "query A { __typename } query B { __typename }", "GRAPHQL_VALIDATION_FAILED"),
        (root, two, "GRAPHQL_VALIDATION_FAILED"),
        (root, variable, "GRAPHQL_VALIDATION_FAILED"),
        (root, both, "GRAPHQL_VALIDATION_FAILED"),
        (root, missing, "NOT_FOUND"),
        (public, missing, "UNAUTHORIZED"),
        (public, QUIET, "UNAUTHORIZED"),
        (nobody, QUIET, "UNAUTHENTICATED"),
        (nobody, "{ viewer { environmentId } }", "UNAUTHENTICATED"),
    ] {
        let socket = &mut sockets[who];
        socket.subscribe("1", query, json!({})).await;
        let errors = socket.refused("1").await;
        assert_eq!(code(&errors[0]), expected, "{query}: {errors}");
        socket.silent().await;
    }
    sockets[nobody].subscribe("1", "{ __typename __schema { queryType { name } } }", json!({})).await;
    assert_eq!(sockets[nobody].result("1").await["data"]["__schema"]["queryType"]["name"], "Query");
}

#[tokio::test]
async fn queries_and_mutations_are_one_result_and_a_complete() {
    let server = TestServer::start().await;
    let mut socket = server.graphql().socket().await;
    let create =
        r#"mutation { createSession(input: {type: "t", taskIdentifier: "a", externalId: "s"}) { created } }"#;
    socket.subscribe("m", create, json!({})).await;
    assert_eq!(socket.event("m").await, json!({"created": true}));
    socket.completed("m").await;
    let query = r#"query Q($s: String!) { session(by: {externalId: $s}) { type channel(name: "a b", io: IN) { io } } }"#;
    let payload = json!({"query": query, "operationName": "Q", "variables": {"s": "s"}});
    socket.say(json!({"type": "subscribe", "id": "q", "payload": payload})).await;
    let result = socket.result("q").await;
    assert_eq!(code(&result), "BAD_REQUEST", "a field that fails is part of the result: {result}");
    assert_eq!(result["errors"][0]["path"], json!(["session", "channel"]));
    assert_eq!(result["data"], json!({"session": null}));
    socket.completed("q").await;
}

#[tokio::test]
async fn a_connection_has_a_hundred_operations_and_the_next_one_must_wait() {
    let server = TestServer::start().await;
    let mut socket = server.graphql().socket().await;
    for id in 0..100 {
        socket.subscribe(&id.to_string(), QUIET, json!({})).await;
    }
    socket.subscribe("over", QUIET, json!({})).await;
    assert_eq!(code(&socket.refused("over").await[0]), "LIMIT_EXCEEDED");
    socket.complete("7").await;
    socket.subscribe("fits", "{ __typename }", json!({})).await;
    assert_eq!(socket.event("fits").await, "Query");
    socket.completed("fits").await;
    server.create(json!({"externalId": "new"})).await;
    let mut heard: Vec<usize> = Vec::new();
    for _ in 0..99 {
        let message = socket.hear().await;
        assert_eq!(message["payload"]["data"]["sessionsChanged"]["externalId"], "new", "{message}");
        heard.push(message["id"].as_str().expect("an id").parse().expect("a number"));
    }
    heard.sort_unstable();
    assert_eq!(heard, (0..100).filter(|id| *id != 7).collect::<Vec<_>>());
    socket.silent().await;
}

#[tokio::test]
async fn a_message_holds_a_mebibyte_and_not_a_byte_more() {
    let server = TestServer::start().await;
    let ping = |size: usize| {
        let frame = json!({"type": "ping", "payload": {"x": ""}}).to_string().len();
        json!({"type": "ping", "payload": {"x": "x".repeat(size - frame)}})
    };
    let mut socket = server.graphql().socket().await;
    socket.say(ping(MIB)).await;
    assert_eq!(socket.hear().await["type"], "pong");
    socket.say(ping(MIB + 1)).await;
    assert_eq!(socket.closed().await.0, 1009);
    let mut socket = server.graphql().socket().await;
    socket.say(ping(16 * MIB)).await;
    while socket.frame().await.is_some() {}
}

#[tokio::test]
async fn the_header_of_the_upgrade_is_as_good_as_the_payload_which_wins() {
    let server = TestServer::start().await;
    let url = server.graphql().url;
    let reader = server.token(&["read:sessions:s"], Duration::from_secs(60)).await;
    let header = format!("Bearer {KEY}");
    for (payload, kind) in [(None, "ROOT_KEY"), (Some(reader.as_str()), "PUBLIC_TOKEN")] {
        let mut socket = Socket::open(&url, &[("authorization", &header)]).await.expect("a socket");
        socket.init(payload).await;
        socket.subscribe("1", "{ viewer { tokenKind } }", json!({})).await;
        assert_eq!(socket.event("1").await["tokenKind"], kind);
    }
    for bad in ["Bearer tr_dev_nobody_has_this_key", "Bearer", "Basic dTpw"] {
        let refused = Socket::open(&url, &[("authorization", bad)]).await;
        assert_eq!(refused.expect_err("refused"), 401, "{bad}");
    }
}

#[tokio::test]
async fn a_connection_ends_with_its_token_even_when_nothing_runs_on_it() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let token = server.token(&["read:sessions:s"], Duration::from_secs(30)).await;
    let header = format!("Bearer {token}");
    let mut idle = server.graphql_as(Some(&token)).socket().await;
    let mut unsaid =
        Socket::open(&server.graphql().url, &[("authorization", &header)]).await.expect("a socket");
    let mut busy = server.graphql_as(Some(&token)).socket().await;
    busy.subscribe("1", FOLLOW, json!({"s": "s"})).await;
    busy.event("1").await;
    let mut root = server.graphql().socket().await;
    server.clock.advance(Duration::from_secs(29));
    for socket in [&mut idle, &mut busy] {
        socket.silent().await;
    }
    // The timers that wake it are a quarter of a second coarse.
    server.clock.advance(Duration::from_secs(2));
    for socket in [&mut idle, &mut unsaid, &mut busy] {
        assert_eq!(socket.closed().await.0, 4403);
    }
    root.silent().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_key_takes_its_connections_and_those_of_its_tokens_along() {
    let server = TestServer::start().await;
    let (control, environment) = (server.control().await, server.first_environment().await);
    let key = control.keys().create(&environment, "second root", None, None).await.expect("a key");
    let secret = secrecy::ExposeSecret::expose_secret(&key.secret).to_owned();
    let mint = r#"mutation { createPublicToken(input: {scopes: ["read:sessions"]}) { token } }"#;
    let token = server.graphql_as(Some(&secret)).payload(mint, json!({})).await;
    let token = token["token"].as_str().expect("a token").to_owned();
    let mut by_key = server.graphql_as(Some(&secret)).socket().await;
    by_key.subscribe("1", QUIET, json!({})).await;
    let mut by_token = server.graphql_as(Some(&token)).socket().await;
    let mut other = server.graphql().socket().await;
    control.keys().revoke(&environment.id, &key.key.id).await.expect("revoked");
    let begun = std::time::Instant::now();
    for socket in [&mut by_key, &mut by_token] {
        assert_eq!(socket.closed().await.0, 4403);
    }
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    other.silent().await;
}

#[tokio::test]
async fn a_server_that_stops_says_that_it_goes_away() {
    let mut server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let mut idle = server.graphql().socket().await;
    let mut unsaid = Socket::open(&server.graphql().url, &[]).await.expect("a socket");
    let mut busy = server.graphql().socket().await;
    busy.subscribe("1", FOLLOW, json!({"s": "s"})).await;
    busy.event("1").await;
    let ((), idle, unsaid, busy) = tokio::join!(server.stop(), idle.closed(), unsaid.closed(), busy.closed());
    for (code, _) in [idle, unsaid, busy] {
        assert_eq!(code, 1001);
    }
}

#[tokio::test]
async fn only_pages_of_allowed_origins_may_connect() {
    let server = TestServer::start_with(|config| {
        config.http.cors_origins = vec!["https://app.example".to_owned()];
    });
    let server = server.await;
    let open = async |origin: &str| Socket::open(&server.graphql().url, &[("origin", origin)]).await;
    for origin in ["https://app.example.evil", "http://app.example", "null", "https://evil.example"] {
        assert_eq!(open(origin).await.expect_err("refused"), 403, "{origin}");
    }
    open("https://app.example").await.expect("allowed").init(None).await;
    Socket::open(&server.graphql().url, &[]).await.expect("no page").init(None).await;
}

#[tokio::test]
async fn the_server_looks_for_life_and_leaves_the_dead() {
    let server = TestServer::start_with(|config| {
        config.graphql.ping_interval = Duration::from_millis(200);
    });
    let server = server.await;
    let mut alive = server.graphql().socket().await;
    let mut dead = handshake(&server).await;
    dead.write_all(&masked(1, init().to_string().as_bytes())).await.expect("sent");
    let (mut heard, mut pings) = (Vec::new(), 0);
    {
        let mut reading = std::pin::pin!(dead.read_to_end(&mut heard));
        loop {
            tokio::select! {
                end = &mut reading => break assert!(end.is_ok(), "{end:?}"),
                frame = alive.frame() => pings += usize::from(matches!(frame, Some(Message::Ping(_)))),
            }
        }
    }
    assert!(pings >= 2, "{pings}");
    let ack = br#"{"type":"connection_ack"}"#;
    let rest = &heard[heard.windows(ack.len()).position(|part| part == ack).expect("an ack") + ack.len()..];
    assert_eq!(rest[..2], [0x89, 0], "a ping that gets no answer");
    assert_eq!((rest[2], &rest[4..6]), (0x88, &4499_u16.to_be_bytes()[..]), "and a close");
    alive.silent().await;
}

#[tokio::test]
async fn frames_that_are_none_end_the_connection_and_a_close_is_answered() {
    let server = TestServer::start().await;
    let text = init().to_string();
    for (breach, frame) in [
        ("unmasked", [&[0x81, text.len() as u8], text.as_bytes()].concat()),
        ("an unknown opcode", masked(3, b"x")),
        ("a continuation of nothing", masked(0, b"x")),
        ("a reserved bit", [&[0xf1], &masked(1, b"x")[1..]].concat()),
        ("a long ping", masked(9, &[b'x'; 200])),
        ("text that is no UTF-8", masked(1, &[0xff, 0xfe])),
    ] {
        let mut stream = handshake(&server).await;
        stream.write_all(&frame).await.expect("sent");
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).await.expect("the end");
        let code = heard.get(2..4).map(|code| u16::from_be_bytes([code[0], code[1]]));
        assert!(heard[0] == 0x88 && matches!(code, Some(1002 | 1007)), "{breach}: {heard:?}");
    }
    let mut socket = server.graphql().socket().await;
    let done = CloseFrame { code: CloseCode::Normal, reason: "done".into() };
    socket.send(Message::Close(Some(done))).await;
    assert_eq!(socket.closed().await.0, 1000);
}

#[tokio::test]
async fn a_connection_that_breaks_leaves_nothing_behind() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let mut socket = server.graphql().socket().await;
    for id in ["a", "b", "c"] {
        socket.subscribe(id, FOLLOW, json!({"s": "s"})).await;
        socket.event(id).await;
    }
    let gauges = async |followers: u8, sockets: u8| {
        let metrics = server.http.get(format!("{}/metrics", server.url)).send().await.expect("an answer");
        let metrics = metrics.text().await.expect("text");
        metrics.contains(&format!("sessiond_followers{{door=\"Websocket\"}} {followers}\n"))
            && metrics.contains(&format!("sessiond_websockets {sockets}\n"))
    };
    assert!(gauges(3, 1).await);
    socket.complete("a").await;
    socket.silent().await;
    assert!(gauges(2, 1).await);
    drop(socket);
    let begun = std::time::Instant::now();
    while !gauges(0, 0).await {
        assert!(begun.elapsed() < Duration::from_secs(10), "something is still held");
    }
}

/// A connection whose client knows nothing of WebSockets but the handshake.
async fn handshake(server: &TestServer) -> TcpStream {
    let mut stream = TcpStream::connect(server.url.trim_start_matches("http://")).await.expect("connects");
    let answer = shake_hands(&mut stream, "").await;
    assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
    stream
}

/// The head of the answer to a handshake that is sent in one piece with what comes `before` it.
async fn shake_hands(stream: &mut TcpStream, before: &str) -> String {
    let address = stream.peer_addr().expect("connected");
    let head = format!(
        "{before}\
         GET /graphql HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Protocol: {PROTOCOL}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.expect("sent");
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(stream.read_u8().await.expect("a head"));
    }
    String::from_utf8(answer).expect("text")
}

/// A final frame of this opcode, masked with zeros.
fn masked(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let length = match u8::try_from(payload.len()) {
        Ok(length @ ..126) => vec![0x80 | length],
        _ => [&[0x80 | 126], &(payload.len() as u16).to_be_bytes()[..]].concat(),
    };
    [&[0x80 | opcode], &length[..], &[0; 4], payload].concat()
}
