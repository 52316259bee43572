//! GraphQL over HTTP: methods, media types, bodies, batches, persisted queries.

use std::time::Duration;

use data_encoding::HEXLOWER;
use reqwest::Method;
use sea_orm::ConnectionTrait;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::graphql::code;
use crate::harness::{Answer, Graphql, TestServer};

const CREATE: &str = r#"mutation { createSession(input: {type: "t", taskIdentifier: "a"}) { created } }"#;
const COUNT: &str = "{ sessions { totalCount } }";

/// POST of a body of any type.
async fn post(graphql: &Graphql, content_type: &str, body: impl Into<reqwest::Body>) -> Answer {
    graphql.send(graphql.request(Method::POST).header("content-type", content_type).body(body)).await
}

#[tokio::test]
async fn reading_goes_by_get_and_post_and_writing_by_post_only() {
    let server = TestServer::start().await;
    let graphql = server.graphql();
    assert_eq!(graphql.get(&[("query", "{ __typename }")]).await.expect(200)["data"]["__typename"], "Query");
    for (name, kind) in [("A", "ROOT_KEY"), ("B", "Query")] {
        let query = "query A($yes: Boolean!) { a: viewer { tokenKind @include(if: $yes) } } query B { a: __typename }";
        let parameters = [("query", query), ("operationName", name), ("variables", r#"{"yes":true}"#)];
        let body = json!({"query": query, "operationName": name, "variables": {"yes": true}});
        for answer in [graphql.get(&parameters).await, graphql.post(&body).await] {
            let data = answer.expect(200)["data"]["a"].clone();
            assert_eq!(data.get("tokenKind").unwrap_or(&data), kind);
        }
    }
    let named = format!("query Read {COUNT} {}", CREATE.replacen("mutation", "mutation Write", 1));
    for parameters in [vec![("query", CREATE)], vec![("query", &named), ("operationName", "Write")]] {
        for accept in ["application/json", "application/graphql-response+json", "text/event-stream"] {
            let request = graphql.request(Method::GET).query(&parameters).header("accept", accept);
            let answer = graphql.send(request).await;
            assert_eq!(code(&answer.expect(405)), "METHOD_NOT_ALLOWED", "{accept}");
            assert_eq!(answer.header("allow"), Some("POST"), "{accept}");
        }
    }
    assert_eq!(
        graphql.get(&[("query", &named), ("operationName", "Read")]).await.expect(200)["data"]["sessions"],
        json!({"totalCount": "0"}),
        "nothing was made"
    );
    for method in [Method::PUT, Method::DELETE, Method::PATCH, Method::HEAD] {
        let answer = graphql.send(graphql.request(method.clone()).json(&json!({"query": CREATE}))).await;
        assert_eq!((answer.status.as_u16(), answer.header("allow")), (405, Some("GET, POST")), "{method}");
    }
    assert_eq!(graphql.data(COUNT, json!({})).await["sessions"]["totalCount"], "0");
}

#[tokio::test]
async fn only_json_is_a_body_so_that_no_foreign_page_can_send_one() {
    let server = TestServer::start().await;
    let graphql = server.graphql();
    let body = json!({"query": CREATE}).to_string();
    for content_type in [
        "text/plain",
        "text/plain; application/json",
        "application/graphql",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/json; charset=utf-16",
    ] {
        let answer = post(&graphql, content_type, body.clone()).await;
        assert_eq!(code(&answer.expect(415)), "UNSUPPORTED_MEDIA_TYPE", "{content_type}");
    }
    graphql.send(graphql.request(Method::POST).body(body.clone())).await.expect(415);
    assert_eq!(graphql.data(COUNT, json!({})).await["sessions"]["totalCount"], "0", "nothing was made");
    post(&graphql, "application/json;charset=UTF-8", body).await.expect(200);
}

#[tokio::test]
async fn a_body_that_cannot_be_read_is_refused_in_words_of_ours() {
    let server = TestServer::start().await;
    let graphql = server.graphql();
    for (body, status) in [
        ("", 400),
        ("{", 400),
        ("null", 400),
        ("\"{ __typename }\"", 400),
        ("{}", 400),
        (r#"{"query":null}"#, 400),
        (r#"{"query":""}"#, 400),
        (r#"{"query":1}"#, 400),
        (r#"{"query":"{__typename}","variables":[1]}"#, 400),
        (r#"{"query":"{__typename}","variables":"{}"}"#, 400),
        (r#"{"query":"{__typename}","operationName":1}"#, 400),
        (r#"{"query":"{__typename}","extensions":[]}"#, 400),
        (r#"{"query":"{__typename}","extensions":{"persistedQuery":1}}"#, 400),
        (r#"{"query":"{__typename}"} x"#, 400),
        (r#"{"query":"{__typename}","variables":null,"operationName":null,"extensions":null,"id":7}"#, 200),
    ] {
        let answer = post(&graphql, "application/json", body).await;
        let result = answer.expect(status);
        if status == 400 {
            assert_eq!(code(&result), "BAD_REQUEST", "{body}");
            no_internals(&result);
        }
    }
    post(&graphql, "application/json", vec![b'"', 0xff, b'"']).await.expect(400);
    for (name, value) in [("variables", "1"), ("variables", "{"), ("extensions", "[]")] {
        let answer = graphql.get(&[("query", "{ __typename }"), (name, value)]).await;
        assert_eq!(code(&answer.expect(400)), "BAD_REQUEST", "{name}={value}");
    }
    let large = |size: usize| json!({"query": "{__typename}", "x": "x".repeat(size)}).to_string();
    let frame = large(0).len();
    post(&graphql, "application/json", large(1_048_576 - frame)).await.expect(200);
    let answer = post(&graphql, "application/json", large(1_048_577 - frame)).await;
    assert_eq!(code(&answer.expect(413)), "TOO_LARGE");
    let chunks = (0..300).map(|_| Ok::<_, std::io::Error>(vec![b' '; 4096]));
    let endless = reqwest::Body::wrap_stream(futures_util::stream::iter(chunks));
    assert_eq!(code(&post(&graphql, "application/json", endless).await.expect(413)), "TOO_LARGE");
}

#[tokio::test]
async fn a_batch_holds_one_to_ten_operations_and_answers_them_in_order() {
    let server = TestServer::start().await;
    let graphql = server.graphql();
    let batch = |count: usize| {
        json!((0..count).map(|n| json!({"query": format!("{{ a{n}: __typename }}")})).collect::<Vec<_>>())
    };
    let results = graphql.post(&batch(10)).await.expect(200);
    for (n, result) in results.as_array().expect("results").iter().enumerate() {
        assert_eq!(result["data"], json!({format!("a{n}"): "Query"}));
    }
    for count in [0, 11, 1000] {
        assert_eq!(code(&graphql.post(&batch(count)).await.expect(400)), "BAD_REQUEST", "{count}");
    }
    graphql.post(&json!([[{"query": "{ __typename }"}]])).await.expect(400);
    let mixed = json!([
        {"query": CREATE},
        {"query": "{ nothing }"},
        {"query": "subscription { sessionsChanged { id } }"},
        {"query": COUNT},
    ]);
    let results = graphql.post(&mixed).await.expect(200);
    assert_eq!(results[0]["data"]["createSession"]["created"], true);
    assert_eq!(code(&results[1]), "GRAPHQL_VALIDATION_FAILED");
    assert_eq!(code(&results[2]), "BAD_REQUEST");
    assert_eq!(results[3]["data"]["sessions"]["totalCount"], "1", "one after the other");
}

#[tokio::test]
async fn a_subscription_without_a_stream_is_told_how_to_get_one() {
    let server = TestServer::start().await;
    let graphql = server.graphql();
    let body = json!({"query": "subscription { sessionsChanged { id } }"});
    for accept in ["application/json", "application/graphql-response+json", "*/*", "multipart/mixed"] {
        let answer = graphql.send(graphql.request(Method::POST).header("accept", accept).json(&body)).await;
        let result = answer.expect(406);
        assert_eq!(code(&result), "NOT_ACCEPTABLE", "{accept}");
        let message = result["errors"][0]["message"].as_str().expect("text");
        assert!(
            message.contains("text/event-stream") && message.contains("graphql-transport-ws"),
            "{message}"
        );
    }
    let query = json!({"query": "{ __typename }"});
    let answer = graphql.send(graphql.request(Method::POST).header("accept", "text/html").json(&query)).await;
    assert_eq!(code(&answer.expect(406)), "NOT_ACCEPTABLE");
}

#[tokio::test]
async fn a_document_is_known_by_its_hash_once_it_was_sent_with_it() {
    let server = TestServer::start().await;
    let graphql = server.graphql();
    let persisted = |document: &str| {
        let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, document.as_bytes());
        json!({"persistedQuery": {"version": 1, "sha256Hash": HEXLOWER.encode(hash.as_ref())}})
    };
    let query = "query Q($yes: Boolean!) { viewer { tokenKind @include(if: $yes) } }";
    let by_hash = json!({"extensions": persisted(query), "variables": {"yes": true}});
    let extensions = persisted(query).to_string();
    let by_get = [("extensions", extensions.as_str()), ("variables", r#"{"yes":true}"#)];
    for miss in [graphql.post(&by_hash).await, graphql.get(&by_get).await] {
        let result = miss.expect(400);
        assert_eq!(code(&result), "PERSISTED_QUERY_NOT_FOUND");
        assert_eq!(result["errors"][0]["message"], "PersistedQueryNotFound", "clients compare it");
    }
    let mut registering = by_hash.clone();
    registering["query"] = json!(query);
    for answer in [
        graphql.post(&registering).await,
        graphql.post(&by_hash).await,
        graphql.get(&by_get).await,
        server.graphql().post(&by_hash).await,
    ] {
        assert_eq!(answer.expect(200)["data"]["viewer"]["tokenKind"], "ROOT_KEY");
    }
    let anonymous = server.graphql_as(None).post(&by_hash).await;
    assert_eq!(code(&anonymous.expect(401)), "UNAUTHENTICATED");
    let mut socket = graphql.socket().await;
    socket.say(json!({"type": "subscribe", "id": "1", "payload": by_hash})).await;
    assert_eq!(socket.event("1").await["tokenKind"], "ROOT_KEY");

    let wrong = json!({"query": "{ __typename }", "extensions": persisted(query)});
    assert_eq!(code(&graphql.post(&wrong).await.expect(400)), "BAD_REQUEST");
    let mut version = by_hash;
    version["extensions"]["persistedQuery"]["version"] = json!(2);
    assert_eq!(code(&graphql.post(&version).await.expect(400)), "BAD_REQUEST");

    let create = json!({"query": CREATE, "extensions": persisted(CREATE)});
    assert_eq!(graphql.post(&create).await.expect(200)["data"]["createSession"]["created"], true);
    let by_get = graphql.get(&[("extensions", persisted(CREATE).to_string().as_str())]).await;
    assert_eq!(code(&by_get.expect(405)), "METHOD_NOT_ALLOWED");
    assert_eq!(graphql.data(COUNT, json!({})).await["sessions"]["totalCount"], "1");
}

#[tokio::test]
async fn what_is_wrong_with_a_request_has_a_code_a_place_and_no_internals() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let graphql = server.graphql();
    let invalid = "GRAPHQL_VALIDATION_FAILED";
    let session = "query($by: SessionBy!) { session(by: $by) { id } }";
    let list = "query($f: SessionFilter) { sessions(filter: $f) { nodes { id } } }";
    let trim = "mutation($n: UInt64!) { trimChannel(input: {by: {externalId: \"s\"}, io: IN, before: $n}) { userErrors { code } } }";
    let follow = "query($c: String) { session(by: {externalId: \"s\"}) { in { records(after: $c) { nodes { id } } } } }";
    let mut wrong = Vec::new();
    for (query, variables, expected, status) in [
        ("{ viewer {", json!({}), "GRAPHQL_PARSE_FAILED", 400),
        ("{ viewer { environmentId } } }", json!({}), "GRAPHQL_PARSE_FAILED", 400),
        ("{ vewer { environmentId } }", json!({}), invalid, 400),
        ("{ viewer }", json!({}), invalid, 400),
        ("{ viewer { environmentId { x } } }", json!({}), invalid, 400),
        ("query A { __typename } query B { __typename }", json!({}), invalid, 400),
        ("query($a: Nothing) { __typename }", json!({}), invalid, 400),
        ("{ node(id: $a) { id } }", json!({}), invalid, 400),
        (session, json!({}), invalid, 400),
        (session, json!({"by": null}), invalid, 400),
        (session, json!({"by": 1}), invalid, 400),
        (session, json!({"by": "s"}), invalid, 400),
        (session, json!({"by": [{"externalId": "s"}]}), invalid, 400),
        ("{ session(by: 1) { id } }", json!({}), invalid, 400),
        ("query($by: SessionBy = 1) { session(by: $by) { id } }", json!({}), invalid, 400),
        (list, json!({"f": 1}), invalid, 400),
        (list, json!({"f": {"tags": 1}}), invalid, 400),
        (list, json!({"f": {"tags": {"any": [null]}}}), invalid, 400),
        (list, json!({"f": null}), "", 200),
        (list, json!({}), "", 200),
        (list, json!({"f": {"tags": {"any": "one is a list of one"}}}), "", 200),
        (session, json!({"by": {}}), invalid, 400),
        (session, json!({"by": {"externalId": "a", "sessionId": "b"}}), invalid, 400),
        (session, json!({"by": {"externalId": null}}), invalid, 400),
        (session, json!({"by": {"externalId": 1}}), invalid, 400),
        (session, json!({"by": {"nothing": "a"}}), invalid, 400),
        (session, json!({"by": {"sessionId": "x"}}), "VALIDATION_FAILED", 200),
        (session, json!({"by": {"id": "x"}}), "VALIDATION_FAILED", 200),
        (list, json!({"f": {"statuses": ["GONE"]}}), invalid, 400),
        (list, json!({"f": {"createdAt": {"from": "yesterday"}}}), invalid, 400),
        (list, json!({"f": {"createdAt": {"period": "7 days"}}}), "VALIDATION_FAILED", 200),
        (list, json!({"f": {"types": vec!["t"; 101]}}), "VALIDATION_FAILED", 200),
        (trim, json!({"n": "-1"}), invalid, 400),
        (trim, json!({"n": "18446744073709551616"}), invalid, 400),
        (trim, json!({"n": 1.5}), invalid, 400),
        (follow, json!({"c": "x"}), "VALIDATION_FAILED", 200),
        ("{ sessions(after: \"x\") { nodes { id } } }", json!({}), "BAD_REQUEST", 200),
        ("{ sessions(first: 1, last: 1) { nodes { id } } }", json!({}), "VALIDATION_FAILED", 200),
        ("{ sessions(first: 0) { nodes { id } } }", json!({}), "VALIDATION_FAILED", 200),
        ("{ sessionTags(first: 1001) }", json!({}), "VALIDATION_FAILED", 200),
        ("{ sessionTags(offset: -1) }", json!({}), "VALIDATION_FAILED", 200),
    ] {
        let answer = graphql.post(&json!({"query": query, "variables": variables})).await;
        let result = answer.json();
        if expected.is_empty() && result.get("errors").is_none() {
            continue;
        }
        if (answer.status.as_u16(), code(&result)) != (status, expected) {
            wrong.push(format!("{query} {variables}: {} {result}", answer.status));
            continue;
        }
        assert_eq!(result.get("data").is_none(), status == 400, "{query}: {result}");
        no_internals(&result);
        assert_eq!(answer.header("content-type"), Some("application/graphql-response+json; charset=utf-8"));
        let plain =
            post(&graphql, "application/json", json!({"query": query, "variables": variables}).to_string());
        assert_eq!(code(&plain.await.expect(200)), expected, "{query}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test]
async fn a_fault_of_ours_names_the_request_and_a_result_tells_its_cost() {
    let server = TestServer::start_with(|config| {
        config.graphql.request_timeout = Duration::from_millis(50);
    });
    let server = server.await;
    let graphql = server.graphql();
    // Whoever holds SQLite's only write lock keeps every create waiting.
    let file = format!("sqlite:{}", server.data().join("metadata.db").display());
    let database = sea_orm::Database::connect(file).await.expect("the database");
    database.execute_unprepared("PRAGMA busy_timeout = 10000; BEGIN IMMEDIATE").await.expect("the lock");
    let request =
        graphql.request(Method::POST).header("x-request-id", "mine-1").json(&json!({"query": CREATE}));
    let answer = graphql.send(request).await;
    let result = answer.expect(503);
    assert_eq!(code(&result), "REQUEST_TIMEOUT");
    assert_eq!(result["errors"][0]["extensions"]["requestId"], "mine-1");
    assert_eq!(answer.header("x-request-id"), Some("mine-1"));
    let mut socket = graphql.socket().await;
    socket.subscribe("1", CREATE, json!({})).await;
    let errors = socket.refused("1").await;
    assert!(errors[0]["extensions"]["requestId"].as_str().is_some_and(|id| id.len() >= 16), "{errors}");

    let server = TestServer::start().await;
    let cost = async |query: &str| {
        let result = server.graphql().result(query, json!({})).await;
        assert_eq!(result["extensions"]["cost"]["limit"], 5000);
        result["extensions"]["cost"]["requested"].as_u64().expect("a number")
    };
    let (one, ten) = (
        cost("{ sessions(first: 1) { nodes { id type } } }").await,
        cost("{ sessions(first: 10) { nodes { id type } } }").await,
    );
    assert!(one > 1 && ten > 9 * (one - 1), "{one} and {ten}");
}

#[tokio::test]
async fn introspection_is_open_to_all_until_it_is_switched_off() {
    let schema = "{ __schema { queryType { name } } }";
    let types = "{ __type(name: \"Session\") { name } }";
    let server = TestServer::start().await;
    let anonymous = server.graphql_as(None);
    for query in [schema, types, "{ __typename }", "mutation { __typename }"] {
        let result = anonymous.result(query, json!({})).await;
        assert!(result.get("errors").is_none(), "{result}");
    }
    for query in [
        "{ viewer { tokenKind } }",
        "{ __typename viewer { tokenKind } }",
        "{ ...q } fragment q on Query { viewer { tokenKind } }",
        CREATE,
    ] {
        let answer = anonymous.post(&json!({"query": query})).await;
        assert_eq!(code(&answer.expect(401)), "UNAUTHENTICATED", "{query}");
    }
    let server = TestServer::start_with(|config| config.graphql.introspection = false).await;
    for graphql in [server.graphql(), server.graphql_as(None)] {
        for query in [schema, types] {
            let result = graphql.result(query, json!({})).await;
            assert!(result["errors"].is_array() && !result.to_string().contains("\"Query\""), "{result}");
        }
        assert_eq!(graphql.data("{ __typename }", json!({})).await["__typename"], "Query");
    }
    let result = server.graphql().result("{ vewer { tokenKind } }", json!({})).await;
    assert!(!result.to_string().contains("viewer"), "no name is suggested: {result}");
}

#[tokio::test]
async fn a_token_that_ends_while_its_body_is_sent_is_refused_even_what_is_known_already() {
    const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";
    let known = "{ __schema { queryType { name } } }";
    let server = TestServer::start().await;
    server.graphql().data(known, json!({})).await;
    let ttl = Duration::from_secs(30);
    let token = server.token(&["read:sessions"], ttl).await;
    let mut under_way = Vec::new();
    for query in ["{ viewer { tokenKind } }", known] {
        let body = json!({"query": query}).to_string();
        let head = format!(
            "POST /graphql HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\nExpect: 100-continue\r\n\r\n",
            body.len()
        );
        let mut socket =
            TcpStream::connect(server.url.trim_start_matches("http://")).await.expect("connected");
        socket.write_all(head.as_bytes()).await.expect("sent");
        // The token is accepted: the body is asked for.
        let mut interim = [0; CONTINUE.len()];
        socket.read_exact(&mut interim).await.expect("an answer");
        assert_eq!(interim, CONTINUE);
        under_way.push((socket, body));
    }
    server.clock.advance(ttl);
    for (mut socket, body) in under_way {
        socket.write_all(body.as_bytes()).await.expect("sent");
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 401") && answer.contains("UNAUTHENTICATED"), "{body}: {answer}");
    }
}

#[tokio::test]
async fn pages_of_allowed_origins_may_read_answers_and_refusals() {
    let server = TestServer::start_with(|config| {
        config.http.cors_origins = vec!["https://app.example".to_owned()];
    });
    let server = server.await;
    let graphql = server.graphql();
    for (origin, allowed) in
        [("https://app.example", Some("https://app.example")), ("https://evil.example", None)]
    {
        for query in ["{ __typename }", "{ nothing }", "{"] {
            let request =
                graphql.request(Method::POST).header("origin", origin).json(&json!({"query": query}));
            let answer = graphql.send(request).await;
            assert_eq!(answer.header("access-control-allow-origin"), allowed, "{origin} {query}");
            assert!(answer.headers.get_all("vary").iter().any(|vary| vary == "Origin"), "{answer:?}");
        }
        let preflight = graphql
            .request(Method::OPTIONS)
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "content-type,authorization");
        let answer = graphql.send(preflight).await;
        assert_eq!((answer.status.as_u16(), answer.header("access-control-allow-origin")), (200, allowed));
    }
}

#[tokio::test]
async fn an_offer_of_another_protocol_is_no_handshake() {
    let server = TestServer::start().await;
    let graphql = server.graphql();
    // What curl and Java's client send where they would like to go on with HTTP/2.
    let offer = |method: Method| {
        let request =
            graphql.request(method).header("upgrade", "h2c").header("http2-settings", "AAMAAABkAAQAAP__");
        request.header("connection", "Upgrade, HTTP2-Settings")
    };
    let get = offer(Method::GET).query(&[("query", "{ __typename }")]);
    let post = offer(Method::POST).json(&json!({"query": "{ __typename }"}));
    for request in [post, get] {
        assert_eq!(graphql.send(request).await.expect(200)["data"]["__typename"], "Query");
    }
}

/// Nothing of how the server is made shows in a message.
fn no_internals(result: &Value) {
    for error in result["errors"].as_array().expect("errors") {
        let message = error["message"].as_str().expect("text");
        assert!(!message.is_empty() && !message.contains('\n'), "{message}");
        for word in [
            "at line",
            "column",
            "serde",
            "async_graphql",
            "sqlx",
            "digit found",
            "invalid type",
            "unwrap",
            "src/",
            "::",
        ] {
            assert!(!message.contains(word), "{word}: {message}");
        }
    }
}
