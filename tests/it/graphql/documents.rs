//! Documents that would kill a server without a guard, over every transport. The server is a process of its own, so that
//! one that dies takes no other test along and its memory is its own.

use std::time::{Duration, Instant};

use data_encoding::HEXLOWER;
use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::graphql::code;
use crate::harness::{Graphql, Process, Socket};

/// What a refusal may take, on a machine that does other things too.
const SOON: Duration = Duration::from_secs(5);
/// What all refusals together may add to the peak of the server's memory, in KiB.
const MEMORY: usize = 64 * 1024;

const LARGE: &str = "QUERY_TOO_LARGE";
const COMPLEX: &str = "QUERY_TOO_COMPLEX";

/// Name, document, and the code of its refusal.
fn documents() -> Vec<(String, String, &'static str)> {
    let around = |open: &str, middle: &str, close: &str, depth| {
        [open.repeat(depth), middle.to_owned(), close.repeat(depth)].concat()
    };
    let many = |count, of: &dyn Fn(usize) -> String| (0..count).map(of).collect::<String>();
    let doubling = |n: usize| {
        let fragments = many(n, &|i| format!("fragment f{i} on Query{{...f{0} ...f{0}}}", i + 1));
        format!("{{...f0}}{fragments}fragment f{n} on Query{{__typename}}")
    };
    let mut documents: Vec<_> = [
        ("deep lists", format!("{{node(id:{}){{id}}}}", around("[", "1", "]", 1500)), LARGE),
        ("deeper lists", format!("{{node(id:{}){{id}}}}", around("[", "", "]", 40_000)), LARGE),
        ("open lists", format!("{{node(id:{}", "[".repeat(1500)), LARGE),
        ("deep objects", format!("{{node(id:{}){{id}}}}", around("{a:", "1", "}", 1500)), LARGE),
        ("deep types", format!("query($a:{}){{__typename}}", around("[", "Int", "]", 1500)), LARGE),
        ("deep defaults", format!("query($a:Int={}){{__typename}}", around("[", "1", "]", 1500)), LARGE),
        ("deep fields", around("{a", "{b}", "}", 1500), LARGE),
        (
            "deep fields that exist",
            format!("{{node(id:1){}}}", around("{id...on Session", "{id}", "}", 40)),
            LARGE,
        ),
        ("deep inline fragments", around("{...on Query", "{__typename}", "}", 1500), LARGE),
        (
            "a thousand aliases",
            format!("{{{}}}", many(1000, &|i| format!("a{i}:viewer{{environmentId}} "))),
            LARGE,
        ),
        ("a thousand fields", format!("{{{}}}", "viewer{environmentId}".repeat(1000)), LARGE),
        ("a thousand directives", format!("{{__typename{}}}", "@skip(if:false)".repeat(1000)), LARGE),
        ("unknown directives", format!("query{} {{__typename}}", "@a".repeat(1000)), LARGE),
        ("many tokens", format!("{{viewer{{{}}}}}", "environmentId ".repeat(7000)), LARGE),
        ("a long text", format!("{{__typename}}#{}", "x".repeat(200_000)), LARGE),
        ("a long name", format!("{{{}}}", "x".repeat(50_000)), LARGE),
        ("many operations", many(6000, &|i| format!("query q{i}{{a}}")), LARGE),
        (
            "deep introspection",
            format!("{{__schema{{types{}}}}}", around("{fields{type", "{name}", "}}", 5)),
            LARGE,
        ),
        (
            "a variable in many places",
            format!("query($a:ID!){{{}}}", many(600, &|_| "node(id:$a){id}".to_owned())),
            LARGE,
        ),
        (
            "a block string without end",
            format!("{{node(id:{}", "\"\"\"".repeat(9999)),
            "GRAPHQL_PARSE_FAILED",
        ),
        ("a string without end", format!("{{node(id:\"{}", "\\\"".repeat(20_000)), "GRAPHQL_PARSE_FAILED"),
        (
            "a fragment in itself",
            "{...a}fragment a on Query{...b}fragment b on Query{...a}".to_owned(),
            "GRAPHQL_VALIDATION_FAILED",
        ),
        (
            "pages of pages",
            "{sessions(first:100){nodes{in{records(first:100){nodes{id data}}}}}}".to_owned(),
            COMPLEX,
        ),
        (
            "a page of a billion",
            "{sessions(first:1000000000){nodes{in{records(last:1000000000){nodes{id}}}}}}".to_owned(),
            COMPLEX,
        ),
        ("a billion", "{sessions(first:1000000000){nodes{id}}}".to_owned(), "VALIDATION_FAILED"),
        (
            "more than an integer",
            "{sessions(first:100000000000){nodes{id}}}".to_owned(),
            "GRAPHQL_VALIDATION_FAILED",
        ),
    ]
    .map(|(name, document, code)| (name.to_owned(), document, code))
    .into();
    documents.extend((20..=31).map(|n| (format!("doubling fragments {n}"), doubling(n), LARGE)));
    documents
}

/// Ways to send a document: the result that comes back.
const DOORS: [&str; 8] = ["post", "get", "batch", "persisted", "sse", "sse by get", "multipart", "websocket"];

async fn through(door: &str, graphql: &Graphql, socket: &mut Socket, document: &str) -> Value {
    let body = json!({"query": document});
    match door {
        "post" => graphql.post(&body).await.json(),
        "get" => graphql.get(&[("query", document)]).await.json(),
        "batch" => {
            let answer =
                graphql.post(&json!([{"query": "{__typename}"}, body, {"query": "{__typename}"}])).await;
            let mut results = answer.json();
            assert_eq!([&results[0]["data"], &results[2]["data"]], [&json!({"__typename": "Query"}); 2]);
            results[1].take()
        }
        "persisted" => {
            let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, document.as_bytes());
            let hash = HEXLOWER.encode(hash.as_ref());
            let extensions = json!({"persistedQuery": {"version": 1, "sha256Hash": hash}});
            graphql.post(&json!({"query": document, "extensions": extensions})).await.json()
        }
        "websocket" => {
            socket.subscribe("1", document, json!({})).await;
            let mut message = socket.hear().await;
            match message["type"].as_str() {
                Some("error") => json!({"errors": message["payload"]}),
                Some("next") => {
                    socket.completed("1").await;
                    message["payload"].take()
                }
                _ => panic!("{message}"),
            }
        }
        _ => {
            let accept = if door == "multipart" {
                "multipart/mixed;subscriptionSpec=1.0, application/json"
            } else {
                "text/event-stream"
            };
            let request = match door {
                "sse by get" => graphql.request(Method::GET).query(&[("query", document)]),
                _ => graphql.request(Method::POST).json(&body),
            };
            let answer = graphql.send(request.header("accept", accept)).await;
            let event = answer.text.lines().find_map(|line| line.strip_prefix("data: "));
            serde_json::from_str(event.unwrap_or(&answer.text)).expect("JSON")
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_murderous_document_is_refused_at_once_through_every_door() {
    let data = tempfile::tempdir().expect("a folder");
    let server = Process::serve(data.path()).await;
    let graphql = server.graphql();
    let mut socket = graphql.socket().await;
    for door in DOORS {
        through(door, &graphql, &mut socket, "{ viewer { environmentId } }").await;
    }
    let before = server.forget_peak();
    let mut wrong = Vec::new();
    for (name, document, expected) in documents() {
        for door in DOORS {
            // The address of a request is shorter than what some of them need.
            if door.ends_with("get") && document.len() > 20_000 {
                continue;
            }
            let begun = Instant::now();
            let result = through(door, &graphql, &mut socket, &document).await;
            let alive = through("post", &graphql, &mut socket, "{ __typename }").await;
            assert_eq!(alive["data"]["__typename"], "Query", "{name} over {door}");
            if code(&result) != expected || begun.elapsed() > SOON {
                wrong.push(format!("{name} over {door} after {:?}: {result}", begun.elapsed()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let peak = server.memory("VmHWM");
    assert!(peak < before + MEMORY, "{before} KiB grew to {peak} KiB");
    drop(socket);
    let _ = server.terminate().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_document_is_not_kept_under_its_hash_and_nobody_needs_a_token_to_be_refused() {
    let data = tempfile::tempdir().expect("a folder");
    let server = Process::serve(data.path()).await;
    let http = reqwest::Client::new();
    let bomb = &documents()[0].1;
    let hash =
        HEXLOWER.encode(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bomb.as_bytes()).as_ref());
    let extensions = json!({"persistedQuery": {"version": 1, "sha256Hash": hash}});
    let post = async |body: Value| {
        let answer =
            http.post(format!("{}/graphql", server.url)).json(&body).send().await.expect("an answer");
        answer.json::<Value>().await.expect("JSON")
    };
    assert_eq!(code(&post(json!({"query": bomb, "extensions": extensions})).await), LARGE);
    assert_eq!(code(&post(json!({"extensions": extensions})).await), "PERSISTED_QUERY_NOT_FOUND");
    let bombs = (0..32).map(|_| post(json!({"query": bomb})));
    for answer in futures_util::future::join_all(bombs).await {
        assert_eq!(code(&answer), LARGE);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_of_variables_cannot_be_bombs_either() {
    let data = tempfile::tempdir().expect("a folder");
    let server = Process::serve(data.path()).await;
    let graphql = server.graphql();
    let post = async |body: String| {
        let request = graphql.request(Method::POST).header("content-type", "application/json");
        graphql.send(request.body(body)).await.json()
    };
    let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
    for (place, expected) in [("variables", "BAD_USER_INPUT"), ("extensions", "BAD_REQUEST")] {
        let answer = post(format!(r#"{{"query":"{{__typename}}","{place}":{{"a":{deep}}}}}"#)).await;
        assert_eq!(code(&answer), expected, "{place}");
    }
    assert_eq!(code(&post(deep).await), "BAD_REQUEST");
    let uses = "node(id:$a){id}".repeat(45);
    let long = "x".repeat(900_000);
    let mention = "... @skip(if:$b) { __typename }".repeat(60);
    let query = format!("query($a:ID!$b:Boolean!){{{uses}{mention}}}");
    let answer = post(json!({"query": query, "variables": {"a": long, "b": true}}).to_string()).await;
    assert_eq!(code(&answer), LARGE, "copied wherever it is named");
    let ids = vec!["x"; 100_000];
    let query = "query($ids: [ID!]!) { nodes(ids: $ids) { id } }";
    let answer = post(json!({"query": query, "variables": {"ids": ids}}).to_string()).await;
    assert_eq!(code(&answer), "VALIDATION_FAILED");
    assert_eq!(graphql.data("{ __typename }", json!({})).await, json!({"__typename": "Query"}));
}
