//! Documents that abort or stall an unguarded executor, through every transport of the real binary: each is refused,
//! the next request is answered, and memory stays flat.

use std::time::Duration;

use aws_lc_rs::digest;
use data_encoding::HEXLOWER;
use futures_util::{SinkExt, StreamExt};
use sea_orm::TransactionTrait;
use serde_json::{Value, json};
use sessiond::config::Config;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use crate::harness::server::KEY;
use crate::harness::{Process, TestServer};

/// Growth of the largest resident size that all attacks together may cause, in KiB. One doubling document of 19 lines
/// takes 450 MiB of an unguarded executor.
const GROWTH_MAX: u64 = 64 * 1024;

fn nested(open: &str, inner: &str, close: &str, depth: usize) -> String {
    format!("{}{inner}{}", open.repeat(depth), close.repeat(depth))
}

fn doubling(levels: usize) -> String {
    let fragment = |n: usize| format!(" fragment f{n} on Query{{...f{0} ...f{0}}}", n + 1);
    let fragments: String = (0..levels).map(fragment).collect();
    format!("{{...f0}}{fragments} fragment f{levels} on Query{{__typename}}")
}

fn documents() -> Vec<(&'static str, String)> {
    vec![
        ("deep lists", format!("{{node(id:{}){{id}}}}", nested("[", "", "]", 1500))),
        ("deep objects", format!("{{node(id:{}){{id}}}}", nested("{a:", "1", "}", 1500))),
        ("deep types", format!("query($a:{}){{a}}", nested("[", "Int", "]", 1500))),
        ("deep types without an end", format!("query($a:{}", "[".repeat(1500))),
        ("deep selections", nested("{a", "", "}", 1500)),
        ("doubling fragments", doubling(20)),
        ("more doubling fragments", doubling(31)),
        ("far too many doubling fragments", doubling(200)),
        ("a cycle", "{...a} fragment a on Query{...b} fragment b on Query{...a}".to_owned()),
        ("aliases", format!("{{{}}}", (0..500).map(|n| format!("a{n}:__typename ")).collect::<String>())),
        ("directives", format!("{{__typename {}}}", "@skip(if:false) ".repeat(100))),
        ("quotes without an end", format!("{{a(x:[\"\"\"{}", r#"\""""#.repeat(1600))),
        ("a page of a thousand million", "{sessions(first:1000000000){nodes{id}}}".to_owned()),
        (
            "pages in pages",
            "{sessions(first:100){nodes{in{records(first:100){nodes{id data text}}}}}}".to_owned(),
        ),
    ]
}

struct Target {
    process: Process,
    http: reqwest::Client,
}

impl Target {
    fn post(&self, accept: &str, body: &Value) -> reqwest::RequestBuilder {
        let request = self.http.post(format!("{}/graphql", self.process.url)).bearer_auth(KEY);
        request.header("accept", accept).json(body)
    }

    async fn result(&self, request: reqwest::RequestBuilder) -> Value {
        let text = request.send().await.expect("an answer").text().await.expect("a body");
        let line = text.lines().find_map(|line| line.strip_prefix("data: ")).unwrap_or(&text);
        serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// The errors that every transport answers with, by transport.
    async fn attack(&self, document: &str) -> Vec<(&'static str, Value)> {
        const JSON: &str = "application/json";
        const MULTIPART: &str = "multipart/mixed;subscriptionSpec=1.0, application/json";
        let body = json!({"query": document});
        let hash = HEXLOWER.encode(digest::digest(&digest::SHA256, document.as_bytes()).as_ref());
        let persisted =
            json!({"query": document, "extensions": {"persistedQuery": {"version": 1, "sha256Hash": hash}}});
        let get = self.http.get(format!("{}/graphql", self.process.url)).bearer_auth(KEY);
        let get = get.query(&[("query", document)]).header("accept", JSON);
        let anonymous = self.http.post(format!("{}/graphql", self.process.url)).json(&body);
        vec![
            ("POST", self.result(self.post(JSON, &body)).await),
            ("POST by nobody", self.result(anonymous).await),
            ("GET", self.result(get).await),
            ("batch", self.result(self.post(JSON, &json!([body, body]))).await[1].take()),
            ("persisted", self.result(self.post(JSON, &persisted)).await),
            ("SSE", self.result(self.post("text/event-stream", &body)).await),
            ("multipart", self.result(self.post(MULTIPART, &body)).await),
            ("WebSocket", self.over_websocket(&body).await),
        ]
    }

    async fn over_websocket(&self, payload: &Value) -> Value {
        let url = format!("{}/graphql", self.process.url.replace("http", "ws"));
        let mut request = url.into_client_request().expect("a request");
        request
            .headers_mut()
            .insert("sec-websocket-protocol", "graphql-transport-ws".parse().expect("a header"));
        let (mut socket, _) = tokio_tungstenite::connect_async(request).await.expect("a socket");
        for message in [
            json!({"type": "connection_init", "payload": {"authorization": format!("Bearer {KEY}")}}),
            json!({"type": "subscribe", "id": "1", "payload": payload}),
        ] {
            socket.send(Message::text(message.to_string())).await.expect("sent");
        }
        loop {
            let Some(Ok(Message::Text(text))) = socket.next().await else { panic!("the socket ended") };
            let mut message: Value = serde_json::from_str(&text).expect("JSON");
            match message["type"].as_str() {
                Some("error") => return json!({"errors": message["payload"].take()}),
                Some("next") => return message["payload"].take(),
                _ => {}
            }
        }
    }

    /// The largest resident size that the process ever had, in KiB.
    fn most_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).expect("running");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a line");
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_document_aborts_or_stalls_the_server_through_any_transport() {
    const REFUSALS: [&str; 6] = [
        "QUERY_TOO_LARGE",
        "QUERY_TOO_COMPLEX",
        "GRAPHQL_PARSE_FAILED",
        "GRAPHQL_VALIDATION_FAILED",
        "VALIDATION_FAILED",
        // Nobody is asked who they are before the document has been found harmless.
        "UNAUTHENTICATED",
    ];
    let data = tempfile::tempdir().expect("a folder");
    let target = Target { process: Process::serve(data.path()).await, http: reqwest::Client::new() };
    let health = json!({"query": "{__typename}"});
    target.result(target.post("application/json", &health)).await;
    let before = target.most_memory();
    for (name, document) in documents() {
        for (transport, answer) in target.attack(&document).await {
            let code = answer["errors"][0]["extensions"]["code"].as_str();
            assert!(code.is_some_and(|code| REFUSALS.contains(&code)), "{name} over {transport}: {answer}");
            if code == Some("UNAUTHENTICATED") {
                assert_eq!(transport, "POST by nobody", "{name}");
            }
        }
        let next = target.result(target.post("application/json", &health)).await;
        assert_eq!(next["data"]["__typename"], "Query", "after {name}");
    }
    let grown = target.most_memory() - before;
    assert!(grown < GROWTH_MAX, "the process grew by {grown} KiB");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operation_that_takes_too_long_is_given_up() {
    let short = |config: &mut Config| config.graphql.request_timeout = Duration::from_millis(50);
    let server = TestServer::start_with(short).await;
    // Whoever holds SQLite's only write lock keeps every create waiting.
    let file = format!("sqlite:{}", server.data().join("metadata.db").display());
    let database = sea_orm::Database::connect(file).await.expect("the database");
    let mode = Some(sea_orm::SqliteTransactionMode::Immediate);
    let options = sea_orm::TransactionOptions { sqlite_transaction_mode: mode, ..Default::default() };
    let lock = database.begin_with_options(options).await.expect("the lock");
    let create = r#"mutation { createSession(input: {type: "t", taskIdentifier: "a"}) { created } }"#;
    let request = server.http.post(format!("{}/graphql", server.url)).bearer_auth(KEY);
    let answer = request.json(&json!({"query": create})).send().await.expect("an answer");
    assert_eq!(answer.status().as_u16(), 503);
    let answer: Value = answer.json().await.expect("JSON");
    assert_eq!(answer["errors"][0]["extensions"]["code"], "REQUEST_TIMEOUT");
    lock.rollback().await.expect("released");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn introspection_can_be_switched_off() {
    let server = TestServer::start_with(|config| config.graphql.introspection = false).await;
    for (query, code) in [
        ("{ __typename }", Value::Null),
        ("{ __schema { types { name } } }", json!("GRAPHQL_VALIDATION_FAILED")),
        ("{ __type(name: \"Query\") { name } }", json!("GRAPHQL_VALIDATION_FAILED")),
        ("{ sesions { totalCount } }", json!("GRAPHQL_VALIDATION_FAILED")),
    ] {
        let request = server.http.post(format!("{}/graphql", server.url)).bearer_auth(KEY);
        let answer = request.json(&json!({"query": query})).send().await.expect("an answer");
        let answer: Value = answer.json().await.expect("JSON");
        assert_eq!(answer["errors"][0]["extensions"]["code"], code, "{answer}");
        assert!(!answer.to_string().contains("Did you mean"), "{answer}");
    }
}
