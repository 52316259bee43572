//! Bad input: each gets a typed JSON error that names the field or the limit, and loses nothing.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::server::KEY;
use crate::harness::{Answer, TestServer};

const SESSIONS: &str = "/api/v1/sessions";

fn valid() -> Value {
    json!({"type": "chat", "taskIdentifier": "agent"})
}

fn with(field: &str, value: Value) -> Value {
    let mut body = valid();
    body[field] = value;
    body
}

async fn raw(server: &TestServer, method: Method, path: &str, body: impl Into<reqwest::Body>) -> Answer {
    server.send(server.request(method, path).header("content-type", "application/json").body(body)).await
}

#[tokio::test]
async fn every_limit_of_a_create_holds_at_its_edge() {
    let server = TestServer::start().await;
    let tags = |count: usize, length: usize| {
        json!(
            vec!["x".repeat(length); count]
                .iter()
                .enumerate()
                .map(|(i, t)| format!("{}{i}", &t[i.to_string().len()..]))
                .collect::<Vec<_>>()
        )
    };
    let trigger = |field: &str, value: Value| {
        let mut config = json!({"basePayload": {}});
        config[field] = value;
        config
    };
    for (field, fits, over) in [
        ("type", json!("x".repeat(64)), json!("x".repeat(65))),
        ("type", json!("x"), json!("")),
        ("taskIdentifier", json!("x".repeat(128)), json!("x".repeat(129))),
        ("externalId", json!("x".repeat(256)), json!("x".repeat(257))),
        ("externalId", json!("\u{1f600}".repeat(128)), json!("\u{1f600}".repeat(129))),
        ("externalId", json!("Session_x"), json!("session_x")),
        ("externalId", json!("a b"), json!("a\0b")),
        ("tags", tags(10, 128), tags(11, 8)),
        ("tags", tags(1, 128), tags(1, 129)),
        ("tags", json!([]), json!(vec!["t"; 2000])),
        ("expiresAt", json!("2026-01-01T00:00:01Z"), json!("2026-01-01T00:00:00Z")),
        ("triggerConfig", trigger("queue", json!("x".repeat(128))), trigger("queue", json!("x".repeat(129)))),
        ("triggerConfig", trigger("maxAttempts", json!(10)), trigger("maxAttempts", json!(11))),
        (
            "triggerConfig",
            trigger("idleTimeoutInSeconds", json!(3600)),
            trigger("idleTimeoutInSeconds", json!(3601)),
        ),
    ] {
        let answer = server.post(SESSIONS, &with(field, fits.clone())).await;
        assert!(answer.status.is_success(), "{field} {fits}: {answer:?}");
        let answer = server.post(SESSIONS, &with(field, over)).await;
        let error = answer.expect(422);
        assert_eq!(error["code"], "validation_failed");
        let named = error["details"][0]["field"].as_str().expect("a field");
        assert!(named.starts_with(field), "{field}: {error}");
    }
}

#[tokio::test]
async fn malformed_bodies_answer_400_and_say_what_is_wrong() {
    let server = TestServer::start().await;
    for (body, message) in [
        ("", "Request body is empty"),
        ("{", "Invalid JSON"),
        ("null", "Invalid JSON"),
        ("{\"type\":1,\"taskIdentifier\":\"a\"}", "Validation error"),
        ("{\"type\":\"chat\"}", "Validation error"),
        ("[]", "Validation error"),
        ("{\"type\":\"chat\",\"taskIdentifier\":\"a\",\"tags\":\"x\"}", "Validation error"),
        ("{\"type\":\"chat\",\"taskIdentifier\":\"a\",\"metadata\":[1]}", "Validation error"),
        ("{\"type\":\"chat\",\"taskIdentifier\":\"a\",\"expiresAt\":\"soon\"}", "Validation error"),
        ("{\"type\":\"chat\",\"taskIdentifier\":\"a\",\"triggerConfig\":{}}", "Validation error"),
    ] {
        let answer = raw(&server, Method::POST, SESSIONS, body).await;
        let error = answer.expect(400);
        assert!(error["error"].as_str().expect("text").starts_with(message), "{body}: {error}");
    }
    let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
    raw(&server, Method::POST, SESSIONS, format!("{{\"metadata\":{deep}}}")).await.expect(400);
    raw(&server, Method::POST, SESSIONS, vec![b'{', b'"', 0xff, b'"', b'}']).await.expect(400);
    assert_eq!(server.get(SESSIONS).await.expect(200)["data"], json!([]), "nothing was made");
}

#[tokio::test]
async fn oversized_bodies_answer_413_with_and_without_a_length() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let chunked = |size: usize| {
        let chunks = (0..size.div_ceil(4096))
            .map(move |index| Ok::<_, std::io::Error>(vec![b'x'; 4096.min(size - index * 4096)]));
        reqwest::Body::wrap_stream(futures_util::stream::iter(chunks))
    };
    let append = "/realtime/v1/sessions/s/in/append";
    for (method, path, limit) in [
        (Method::POST, SESSIONS, 32_768),
        (Method::PATCH, "/api/v1/sessions/s", 32_768),
        (Method::POST, "/api/v1/sessions/s/close", 1024),
        (Method::POST, append, 1_048_576),
    ] {
        for body in [reqwest::Body::from(vec![b'x'; limit + 1]), chunked(limit + 1)] {
            let answer = raw(&server, method.clone(), path, body).await;
            assert_eq!(answer.expect(413)["code"], "too_large", "{path}");
        }
        let answer = raw(&server, method.clone(), path, vec![b'x'; limit - 100]).await;
        assert_ne!(answer.status.as_u16(), 413, "{path}");
    }
    let envelope = r#"{"data":"","id":"0123456789"}"#.len();
    let fits = 1_048_576 - 8 - envelope;
    let send = async |size: usize| {
        let request = server.request(Method::POST, append).header("X-Part-Id", "0123456789");
        server.send(request.body("x".repeat(size))).await
    };
    let answer = send(fits + 1).await.expect(413);
    let message = "Record metered size 1048577 bytes exceeds the S2 per-record limit of 1048576 bytes";
    assert!(answer["error"].as_str().expect("text").starts_with(message), "{answer}");
    send(fits).await.expect(200);
    assert_eq!(
        server.get("/realtime/v1/sessions/s/in/records").await.expect(200)["records"]
            .as_array()
            .expect("records")
            .len(),
        2
    );
}

#[tokio::test]
async fn ten_thousand_tags_are_refused_whichever_limit_they_meet() {
    let server = TestServer::start().await;
    for (count, status) in [(10_000, 413), (5000, 422), (11, 422)] {
        let answer = server.post(SESSIONS, &with("tags", json!(vec!["t"; count]))).await;
        assert_eq!(answer.status.as_u16(), status, "{count}");
    }
}

#[tokio::test]
async fn a_connection_over_the_cap_waits_for_its_turn() {
    let server = TestServer::start_with(|config| config.http.max_connections = 1).await;
    let address: SocketAddr = server.url.trim_start_matches("http://").parse().expect("an address");
    let ask = async |socket: &mut TcpStream| {
        socket.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("sent");
        let mut answer = [0; 15];
        socket.read_exact(&mut answer).await.expect("an answer");
        assert_eq!(&answer, b"HTTP/1.1 200 OK");
    };
    let mut first = TcpStream::connect(address).await.expect("connected");
    ask(&mut first).await;
    let mut second = TcpStream::connect(address).await.expect("queued");
    let early = tokio::time::timeout(Duration::from_millis(300), ask(&mut second)).await;
    assert!(early.is_err(), "one at a time");
    drop(first);
    let mut answer = [0; 15];
    second.read_exact(&mut answer).await.expect("its turn has come");
    assert_eq!(&answer, b"HTTP/1.1 200 OK");
}

#[tokio::test]
async fn bad_lists_answer_400() {
    let server = TestServer::start().await;
    for query in [
        "page[size]=0",
        "page[size]=101",
        "page[size]=x",
        "page[after]=nonsense",
        "page[before]=AQ",
        "filter[status]=OPEN",
        "filter[status]=ACTIVE,OPEN",
        "filter[createdAt][period]=7",
        "filter[createdAt][period]=week",
        "filter[createdAt][from]=yesterday",
    ] {
        let answer = server.get(&format!("{SESSIONS}?{query}")).await;
        assert_eq!(answer.status.as_u16(), 400, "{query}: {answer:?}");
    }
    let foreign = server.get(&format!("{SESSIONS}?filter[externalId]=session_x")).await;
    assert!(matches!(foreign.status.as_u16(), 200 | 400 | 422));
}

#[tokio::test]
async fn strange_addresses_are_either_a_session_or_a_clear_refusal() {
    let server = TestServer::start().await;
    for (name, path) in
        [("a/b", "a%2Fb"), ("ü \u{1f600}", "%C3%BC%20%F0%9F%98%80"), ("a:b?c#d", "a%3Ab%3Fc%23d")]
    {
        server.create(json!({"externalId": name})).await;
        assert_eq!(server.get(&format!("{SESSIONS}/{path}")).await.expect(200)["externalId"], name);
        server.append(path, "in", "x").await;
    }
    let long = "x".repeat(257);
    for (path, status) in [
        ("a%00b", 400),
        ("%FF", 400),
        (&*long, 400),
        ("session_%00", 404),
        ("session_%C3%BC-.", 404),
        (&*format!("session_{long}"), 404),
        ("session_nobody", 404),
        ("nobody", 404),
    ] {
        for suffix in ["", "/close"] {
            let method = if suffix.is_empty() { Method::GET } else { Method::POST };
            let request = server.request(method, &format!("{SESSIONS}/{path}{suffix}"));
            let request = if suffix.is_empty() { request } else { request.json(&json!({})) };
            let answer = server.send(request).await;
            assert_eq!(answer.status.as_u16(), status, "{path}{suffix}: {answer:?}");
            assert!(answer.json()["error"].is_string());
        }
    }
}

#[tokio::test]
async fn unknown_routes_and_methods_answer_json() {
    let server = TestServer::start().await;
    for path in ["/nothing", "/api/v1/nothing", "/realtime/v1/sessions/s", "/api/v2/sessions"] {
        assert!(server.get(path).await.expect(404)["error"].is_string(), "{path}");
    }
    for path in ["/api/v1/runs/run_1", "/api/v3/batches", "/engine/v1/runs/run_1/x", "/realtime/v1/streams/a"]
    {
        assert_eq!(server.get(path).await.expect(404)["code"], "no_run_engine", "{path}");
    }
    for (method, path, allowed) in [
        (Method::DELETE, SESSIONS, "POST"),
        (Method::PUT, "/api/v1/sessions/s", "PATCH"),
        (Method::GET, "/api/v1/sessions/s/close", "POST"),
        (Method::GET, "/realtime/v1/sessions/s/in/append", "POST"),
    ] {
        let answer = server.send(server.request(method, path)).await;
        assert_eq!(answer.expect(405)["error"], "Method not allowed");
        assert!(answer.header("allow").expect("Allow").contains(allowed), "{answer:?}");
    }
}

#[tokio::test]
async fn a_preflight_and_every_answer_let_a_page_in() {
    let server = TestServer::start().await;
    let origin = "https://app.example";
    let preflight = server
        .http
        .request(Method::OPTIONS, format!("{}{SESSIONS}", server.url))
        .header("Origin", origin)
        .header("Access-Control-Request-Method", "PATCH")
        .header("Access-Control-Request-Headers", "authorization,x-trigger-anything");
    let answer = server.send(preflight).await;
    assert_eq!(answer.status.as_u16(), 200);
    assert_eq!(answer.header("access-control-allow-origin"), Some(origin));
    assert!(answer.header("access-control-allow-methods").expect("methods").contains("PATCH"));
    let headers = answer.header("access-control-allow-headers").expect("headers").to_ascii_lowercase();
    assert!(headers.contains("x-trigger-anything") && headers.contains("authorization"));
    assert_eq!(answer.header("access-control-allow-credentials"), None);
    for (path, key) in
        [(SESSIONS, KEY), (SESSIONS, "wrong"), ("/api/v1/sessions/nobody", KEY), ("/nothing", KEY)]
    {
        let answer = server.send(server.request_as(key, Method::GET, path).header("Origin", origin)).await;
        assert_eq!(answer.header("access-control-allow-origin"), Some(origin), "{path}");
        let exposed = answer.header("access-control-expose-headers").expect("exposed").to_ascii_lowercase();
        assert!(exposed == "*" || exposed.contains("x-trigger-jwt-claims"), "{exposed}");
    }
    let closed = TestServer::start_with(|config| config.http.cors_origins = vec![origin.to_owned()]).await;
    for (from, allowed) in [(origin, Some(origin)), ("https://evil.example", None)] {
        let answer = closed.send(closed.request(Method::GET, SESSIONS).header("Origin", from)).await;
        assert_eq!(answer.header("access-control-allow-origin"), allowed);
    }
}

#[tokio::test]
async fn rate_limits_answer_429_and_spare_realtime() {
    let server = TestServer::start_with(|config| {
        config.http.rate_limit.key_per_10s = 10;
        config.http.rate_limit.key_burst = 5;
        config.http.rate_limit.token_per_minute = 2;
    })
    .await;
    let (_, other) = server.environment("other").await;
    let token = server.token(&["read:sessions"], Duration::from_secs(60)).await;
    for (bearer, allowed) in [(KEY, 5), (other.as_str(), 5), (token.as_str(), 2)] {
        for _ in 0..allowed {
            let answer = server.send(server.request_as(bearer, Method::GET, SESSIONS)).await;
            assert_eq!(answer.status.as_u16(), 200);
        }
        let answer = server.send(server.request_as(bearer, Method::GET, SESSIONS)).await;
        assert_eq!(answer.expect(429)["code"], "rate_limited");
        assert_eq!(answer.header("x-ratelimit-limit"), Some(allowed.to_string().as_str()));
        assert_eq!(answer.header("x-ratelimit-remaining"), Some("0"));
        let seconds: u64 = answer.header("retry-after").expect("retry-after").parse().expect("seconds");
        assert!((1..=60).contains(&seconds), "{seconds}");
        let reset: i64 = answer.header("x-ratelimit-reset").expect("reset").parse().expect("milliseconds");
        assert!(reset > crate::harness::server::START.millis());
    }
    for _ in 0..20 {
        let records = server.request(Method::GET, "/realtime/v1/sessions/x/in/records");
        server.send(records).await.expect(200);
    }
}

/// A connection that sends `sent` and then nothing: what it gets before the server hangs up.
async fn trickle(server: &TestServer, sent: &str) -> String {
    let address: SocketAddr = server.url.trim_start_matches("http://").parse().expect("an address");
    let mut socket = TcpStream::connect(address).await.expect("connected");
    socket.write_all(sent.as_bytes()).await.expect("sent");
    let mut answer = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(20), socket.read_to_end(&mut answer)).await;
    // A reset is a hang-up, too.
    let _ = read.expect("the server hangs up");
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_heads_and_bodies_are_given_up() {
    let server = TestServer::start_with(|config| {
        config.http.header_timeout = Duration::from_millis(300);
        config.http.body_timeout = Duration::from_millis(600);
        config.http.body_pause_timeout = Duration::from_millis(300);
    })
    .await;
    for head in ["", "P", "PRI * HT", "GET / HTTP/1.1\r\n", "GET / HTTP/1.1\r\nHost: x\r\nX: "] {
        let answer = trickle(&server, head).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 408"), "{head:?}: {answer}");
    }
    let body = format!(
        "POST {SESSIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 100\r\n\r\n{{"
    );
    let answer = trickle(&server, &body).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    server.get(SESSIONS).await.expect(200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_never_reads_is_cut() {
    let server =
        TestServer::start_with(|config| config.http.write_timeout = Duration::from_millis(500)).await;
    server.create(json!({"externalId": "s"})).await;
    let big = "x".repeat(500_000);
    for _ in 0..40 {
        server.append("s", "out", &big).await;
    }
    let address: SocketAddr = server.url.trim_start_matches("http://").parse().expect("an address");
    let mut socket = TcpStream::connect(address).await.expect("connected");
    let head =
        format!("GET /realtime/v1/sessions/s/out HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n");
    socket.write_all(head.as_bytes()).await.expect("sent");
    for followers in [1, 0] {
        let reached = async {
            while metrics(&server).await.get("sessiond_followers{door=\"Sse\"}")
                != Some(&f64::from(followers))
            {}
        };
        let reached = tokio::time::timeout(Duration::from_secs(20), reached).await;
        reached.unwrap_or_else(|_| panic!("there never were {followers} followers"));
    }
    drop(socket);
}

/// Every sample of `/metrics` by its name and labels.
async fn metrics(server: &TestServer) -> BTreeMap<String, f64> {
    let answer = server.http.get(format!("{}/metrics", server.url)).send().await.expect("an answer");
    let text = answer.error_for_status().expect("200").text().await.expect("text");
    let sample = |line: &str| {
        let (name, value) = line.rsplit_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    };
    text.lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect()
}

#[tokio::test]
async fn the_operators_routes_answer() {
    let server = TestServer::start().await;
    server
        .http
        .get(format!("{}/healthz", server.url))
        .send()
        .await
        .expect("up")
        .error_for_status()
        .expect("200");
    server
        .http
        .get(format!("{}/readyz", server.url))
        .send()
        .await
        .expect("up")
        .error_for_status()
        .expect("200");
    server.create(json!({"externalId": "s"})).await;
    server.append("s", "in", "x").await;
    server.get(&format!("{SESSIONS}/nobody")).await.expect(404);
    let found = metrics(&server).await;
    for (sample, at_least) in [
        (
            "sessiond_request_duration_seconds_count{route=\"/api/v1/sessions\",method=\"Post\",status=\"Success\"}",
            1.0,
        ),
        (
            "sessiond_request_duration_seconds_count{route=\"/api/v1/sessions/{session}\",method=\"Get\",status=\"ClientError\"}",
            1.0,
        ),
        ("sessiond_append_duration_seconds_count{direction=\"In\",outcome=\"Stored\"}", 1.0),
        ("sessiond_log_commit_duration_seconds_count", 1.0),
        ("sessiond_log_commit_records_count", 1.0),
        ("sessiond_log_bytes_total", 8.0),
        ("sessiond_log_healthy", 1.0),
        ("sessiond_connections", 1.0),
    ] {
        let value = found.get(sample);
        assert!(value.is_some_and(|value| *value >= at_least), "{sample} is {value:?} in {found:#?}");
    }
    for sample in found.keys() {
        assert!(!sample.contains("session_") && !sample.contains("externalId"), "no id is a label: {sample}");
    }
    let traced = server
        .request(Method::GET, SESSIONS)
        .header("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
    let answer = server.send(traced.header("x-request-id", "req-1")).await;
    assert_eq!(answer.header("x-request-id"), Some("req-1"));
    let parent = answer.header("traceparent").expect("a traceparent");
    assert!(
        parent.starts_with("00-4bf92f3577b34da6a3ce929d0e0e4736-") && !parent.contains("00f067aa0ba902b7"),
        "{parent}"
    );
}

#[tokio::test]
async fn http2_with_prior_knowledge_is_served_on_the_same_port() {
    let server = TestServer::start().await;
    let client = reqwest::Client::builder().http2_prior_knowledge().build().expect("a client");
    let response =
        client.get(format!("{}{SESSIONS}", server.url)).bearer_auth(KEY).send().await.expect("an answer");
    assert_eq!((response.status().as_u16(), response.version()), (200, reqwest::Version::HTTP_2));
}

#[tokio::test]
async fn tls_is_served_when_it_is_configured() {
    let files = tempfile::tempdir().expect("a folder");
    let own = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
    let (certificate, key) = (files.path().join("cert.pem"), files.path().join("key.pem"));
    std::fs::write(&certificate, own.cert.pem()).expect("written");
    std::fs::write(&key, own.signing_key.serialize_pem()).expect("written");
    let server = TestServer::start_with(|config| {
        config.http.tls.certificate = Some(certificate);
        config.http.tls.private_key = Some(key);
    })
    .await;
    assert!(server.url.starts_with("https://"));
    let client = reqwest::Client::builder().danger_accept_invalid_certs(true).build().expect("a client");
    let response = client.get(format!("{}/healthz", server.url)).send().await.expect("an answer");
    assert_eq!((response.status().as_u16(), response.version()), (200, reqwest::Version::HTTP_2));
}
