//! What queries answer: things by id, lists, pages of both kinds.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use sessiond::domain::{
    AppendInput, ChannelKey, ChannelStore, Direction, NewRecord, Scopes, SessionId, TestClock,
};
use sessiond::store::channel::log::{LogChannels, LogOptions};

use crate::harness::graphql::code;
use crate::harness::server::{KEY, START};
use crate::harness::{Graphql, TestServer};

const HOUR: Duration = Duration::from_secs(3600);

fn texts(value: &Value) -> Vec<&str> {
    value.as_array().expect("a list").iter().map(|text| text.as_str().expect("text")).collect()
}

#[tokio::test]
async fn everything_with_an_id_is_found_again_by_it() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    server.append("s", "out", "hello").await;
    let graphql = server.graphql();
    let found = graphql.data(
        r#"{ session(by: {externalId: "s"}) { id sessionId in { id } side: channel(name: "a.b", io: OUT) { id }
             out { id records { nodes { id } } } } }"#,
        json!({}),
    );
    let session = found.await["session"].take();
    let ids = [
        &session["id"],
        &session["in"]["id"],
        &session["side"]["id"],
        &session["out"]["id"],
        &session["out"]["records"]["nodes"][0]["id"],
    ];
    let fields =
        "{ __typename id ... on Session { sessionId } ... on Channel { io name session { sessionId } }
        ... on Record { seqNum text } }";
    let query = format!("query($ids: [ID!]!) {{ nodes(ids: $ids) {fields} }}");
    let nodes = graphql.data(&query, json!({"ids": ids})).await["nodes"].take();
    let id = &session["sessionId"];
    let channel = |index: usize, io: &str, name: Value| json!({"__typename": "Channel", "id": ids[index], "io": io, "name": name, "session": {"sessionId": id}});
    let expected = json!([
        {"__typename": "Session", "id": ids[0], "sessionId": id},
        channel(1, "IN", Value::Null),
        channel(2, "OUT", json!("a.b")),
        channel(3, "OUT", Value::Null),
        {"__typename": "Record", "id": ids[4], "seqNum": "0", "text": "hello"},
    ]);
    assert_eq!(nodes, expected);
    for (id, node) in ids.iter().zip(nodes.as_array().expect("nodes")) {
        let one =
            graphql.data(&format!("query($id: ID!) {{ node(id: $id) {fields} }}"), json!({"id": id})).await;
        assert_eq!(&one["node"], node);
    }
    let (_, foreign) = server.environment("other").await;
    let stranger = server.token(&["read:sessions:else"], HOUR).await;
    let everything = "query($ids: [ID!]!) { nodes(ids: $ids) { id } }";
    let writer = server.token(&["write:sessions:s"], HOUR).await;
    for bearer in [foreign, stranger, writer] {
        let hidden = server.graphql_as(Some(&bearer)).data(everything, json!({"ids": ids})).await;
        assert_eq!(hidden["nodes"], json!([null, null, null, null, null]));
    }
    let past_the_tail = data_encoding::BASE64URL_NOPAD
        .encode(format!("r:1:sessions/{}/out", id.as_str().expect("an id")).as_bytes());
    let nothing = ["", "s", "czp4", "\u{1f600}", "cjpzZXNzaW9ucw", past_the_tail.as_str()];
    assert_eq!(
        graphql.data(everything, json!({"ids": nothing})).await["nodes"],
        json!([null, null, null, null, null, null])
    );
    let many = graphql.result(everything, json!({"ids": vec!["x"; 101]})).await;
    assert_eq!(code(&many), "VALIDATION_FAILED");
}

#[tokio::test]
async fn a_session_is_found_by_each_of_its_ids_and_looks_as_it_does_over_rest() {
    let server = TestServer::start().await;
    let graphql = server.graphql();
    let rest = server
        .create(json!({"externalId": "s", "tags": ["b", "a"], "metadata": {"n": [1, 2.5, null]},
            "expiresAt": "2026-01-02T00:00:00.000Z"}))
        .await;
    let query = "query($by: SessionBy!) { session(by: $by) { id sessionId externalId type taskIdentifier tags metadata
        status createdAt updatedAt expiresAt closedAt closedReason currentRunId } }";
    let session = graphql.data(query, json!({"by": {"externalId": "s"}})).await["session"].take();
    for (field, of_rest) in [("sessionId", "id"), ("currentRunId", "runId")] {
        assert_eq!(session[field], rest[of_rest], "{field}");
    }
    for field in [
        "externalId",
        "type",
        "taskIdentifier",
        "tags",
        "metadata",
        "createdAt",
        "updatedAt",
        "expiresAt",
        "closedAt",
        "closedReason",
    ] {
        assert_eq!(session[field], rest[field], "{field}");
    }
    assert_eq!(
        (&session["status"], &session["createdAt"]),
        (&json!("ACTIVE"), &json!("2026-01-01T00:00:00.000Z"))
    );
    for by in [json!({"id": session["id"]}), json!({"sessionId": session["sessionId"]})] {
        assert_eq!(graphql.data(query, json!({"by": by})).await["session"], session);
    }
    let missing = SessionId::generate(START);
    let opaque = data_encoding::BASE64URL_NOPAD.encode(format!("s:{missing}").as_bytes());
    for by in [json!({"externalId": "S"}), json!({"sessionId": missing.as_str()}), json!({"id": opaque})] {
        assert_eq!(graphql.data(query, json!({"by": by})).await, json!({"session": null}));
    }
    server.clock.advance(24 * HOUR);
    let query = r#"{ session(by: {externalId: "s"}) { status in { sealed } } }"#;
    let expired = json!({"session": {"status": "EXPIRED", "in": {"sealed": true}}});
    assert_eq!(graphql.data(query, json!({})).await, expired);
}

#[tokio::test]
async fn an_error_in_a_nullable_field_leaves_its_neighbours_alone() {
    let server = TestServer::start().await;
    let reader = server.token(&["read:sessions:s"], HOUR).await;
    for (field, expected) in [
        (r#"session(by: {externalId: ""})"#, "VALIDATION_FAILED"),
        (r#"session(by: {externalId: "else"})"#, "UNAUTHORIZED"),
        (r#"waitpoint(id: "waitpoint_?")"#, "VALIDATION_FAILED"),
    ] {
        let query = format!("{{ a: {field} {{ id }} viewer {{ tokenKind }} }}");
        let result = server.graphql_as(Some(&reader)).result(&query, json!({})).await;
        assert_eq!((code(&result), &result["errors"][0]["path"]), (expected, &json!(["a"])), "{result}");
        assert_eq!(result["data"], json!({"a": null, "viewer": {"tokenKind": "PUBLIC_TOKEN"}}), "{result}");
    }
}

#[tokio::test]
async fn a_page_after_a_record_that_the_channel_does_not_have_is_refused() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    for text in ["a", "b"] {
        server.append("s", "out", text).await;
    }
    let page = async |io: &str, after: &str| {
        let query = format!(
            "{{ session(by: {{externalId: \"s\"}}) {{ {io} {{ records(first: 5, after: \"{after}\") {{ nodes {{ seqNum }} }} }} }} }}"
        );
        server.graphql().result(&query, json!({})).await
    };
    assert_eq!(page("out", "1").await["data"]["session"]["out"]["records"]["nodes"], json!([]));
    for (io, after, tail) in [("out", "2", "2"), ("out", "18446744073709551615", "2"), ("in", "0", "0")] {
        let result = page(io, after).await;
        assert_eq!(
            (code(&result), &result["errors"][0]["extensions"]["tail"]),
            ("CURSOR_AHEAD", &json!(tail))
        );
        assert_eq!(result["errors"][0]["path"], json!(["session", io, "records"]), "{result}");
    }
}

#[tokio::test]
async fn a_viewer_is_told_who_they_are() {
    let server = TestServer::start().await;
    let (control, environment) = (server.control().await, server.first_environment().await);
    let scopes = Some(Scopes::new(vec!["read:sessions".to_owned()]));
    let scoped = control.keys().create(&environment, "scoped", scopes, None).await.expect("a key");
    let scoped = secrecy::ExposeSecret::expose_secret(&scoped.secret).to_owned();
    let public = server.token(&["write:sessions:a", "read:tasks"], HOUR).await;
    let query = "{ viewer { environmentId tokenKind scopes expiresAt } }";
    let viewer = |kind: &str, scopes: Value, expires: Value| {
        json!({"viewer": {"environmentId": environment.id.as_str(), "tokenKind": kind, "scopes": scopes,
            "expiresAt": expires}})
    };
    for (bearer, expected) in [
        (KEY, viewer("ROOT_KEY", Value::Null, Value::Null)),
        (&scoped, viewer("SCOPED_KEY", json!(["read:sessions"]), Value::Null)),
        (
            &public,
            viewer(
                "PUBLIC_TOKEN",
                json!(["write:sessions:a", "read:tasks"]),
                json!("2026-01-01T01:00:00.000Z"),
            ),
        ),
    ] {
        assert_eq!(server.graphql_as(Some(bearer)).data(query, json!({})).await, expected);
    }
}

#[tokio::test]
async fn every_filter_narrows_the_list() {
    let server = TestServer::start().await;
    let graphql = server.graphql();
    // One a minute, so that the creation times differ.
    for (name, kind, task, tags) in [
        ("a", "chat", "agent", &["x", "y"][..]),
        ("b", "chat", "helper", &["x"]),
        ("c", "voice", "agent", &["y", "z"]),
        ("d", "voice", "helper", &[]),
    ] {
        let expires = (name == "c").then_some("2026-01-01T00:03:30Z");
        let body = json!({"externalId": name, "type": kind, "taskIdentifier": task, "tags": tags, "expiresAt": expires});
        server.create(body).await;
        server.clock.advance(Duration::from_secs(60));
    }
    server.post("/api/v1/sessions/b/close", &json!({})).await.expect(200);
    let query = "query($f: SessionFilter) { sessions(filter: $f) { nodes { externalId } totalCount } }";
    for (filter, expected) in [
        (Value::Null, "d c b a"),
        (json!({}), "d c b a"),
        (json!({"types": ["voice"]}), "d c"),
        (json!({"types": ["voice", "chat"]}), "d c b a"),
        (json!({"types": ["Voice"]}), ""),
        (json!({"types": []}), "d c b a"),
        (json!({"tags": {"any": ["x", "z"]}}), "c b a"),
        (json!({"tags": {"all": ["x", "y"]}}), "a"),
        (json!({"tags": {"any": ["z"], "all": ["x"]}}), ""),
        (json!({"taskIdentifiers": ["agent", "none"]}), "c a"),
        (json!({"externalId": "b"}), "b"),
        (json!({"externalId": "none"}), ""),
        (json!({"statuses": ["ACTIVE"]}), "d a"),
        (json!({"statuses": ["CLOSED", "EXPIRED"]}), "c b"),
        (json!({"createdAt": {"from": "2026-01-01T00:01:00.000Z"}}), "d c b"),
        (json!({"createdAt": {"to": "2026-01-01T01:01:00+01:00"}}), "b a"),
        (json!({"createdAt": {"from": "2026-01-01T00:01:00Z", "to": "2026-01-01T00:02:00Z"}}), "c b"),
        (json!({"createdAt": {"period": "2m"}}), "d c"),
        (json!({"createdAt": {"period": "60s", "from": "2025-01-01T00:00:00Z"}}), "d"),
        (json!({"types": ["chat"], "statuses": ["ACTIVE"], "tags": {"any": ["x"]}}), "a"),
    ] {
        let list = graphql.data(query, json!({"f": filter})).await["sessions"].take();
        let names: Vec<_> =
            list["nodes"].as_array().expect("nodes").iter().map(|node| &node["externalId"]).collect();
        let expected: Vec<_> = expected.split_whitespace().collect();
        assert_eq!(names, expected, "{filter}");
        assert_eq!(list["totalCount"], expected.len().to_string(), "{filter}");
    }
    for (arguments, expected) in [
        ("", &["x", "y", "z"][..]),
        ("(prefix: \"y\")", &["y"]),
        ("(contains: \"Z\")", &["z"]),
        ("(first: 2)", &["x", "y"]),
        ("(first: 2, offset: 2)", &["z"]),
        ("(prefix: \"%\")", &[]),
    ] {
        let tags = graphql.data(&format!("{{ sessionTags{arguments} }}"), json!({})).await;
        assert_eq!(texts(&tags["sessionTags"]), expected, "{arguments}");
    }
}

/// Pages of a connection from one end to the other, in list order. `first` and `after`, or `last` and `before`.
async fn walk(graphql: &Graphql, query: &str, path: &str, forward: bool, size: usize) -> Vec<Vec<Value>> {
    let mut pages: Vec<Vec<Value>> = Vec::new();
    let mut cursor = Value::Null;
    loop {
        let (count, from) = if forward { ("first", "after") } else { ("last", "before") };
        let data = graphql.data(query, json!({count: size, from: cursor})).await;
        let page = data.pointer(path).expect("a connection");
        let (nodes, edges, info) =
            (page["nodes"].as_array().expect("nodes"), &page["edges"], &page["pageInfo"]);
        for (node, edge) in nodes.iter().zip(edges.as_array().expect("edges")) {
            assert_eq!(*node, edge["node"]);
        }
        assert_eq!(info["startCursor"], edges[0]["cursor"]);
        assert_eq!(info["endCursor"], edges[nodes.len().saturating_sub(1)]["cursor"]);
        let (more, back) =
            if forward { ("hasNextPage", "hasPreviousPage") } else { ("hasPreviousPage", "hasNextPage") };
        assert_eq!(info[back], !cursor.is_null(), "{page}");
        cursor = info[if forward { "endCursor" } else { "startCursor" }].clone();
        let at = if forward { pages.len() } else { 0 };
        pages.insert(at, nodes.clone());
        if info[more] == false {
            return pages;
        }
        assert_eq!(nodes.len(), size, "only the last page is short");
    }
}

#[tokio::test]
async fn pages_of_sessions_join_both_ways_even_if_all_are_equally_old() {
    let server = TestServer::start().await;
    let graphql = server.graphql();
    for n in 0..25 {
        server.create(json!({"externalId": format!("s{n}")})).await;
    }
    let query = "query($first: Int, $after: String, $last: Int, $before: String) {
        sessions(first: $first, after: $after, last: $last, before: $before) {
            nodes { externalId } edges { cursor node { externalId } }
            pageInfo { hasNextPage hasPreviousPage startCursor endCursor } } }";
    let all = walk(&graphql, query, "/sessions", true, 100).await.concat();
    assert_eq!(all.len(), 25);
    for size in [1, 7, 24, 25, 26] {
        for forward in [true, false] {
            let pages = walk(&graphql, query, "/sessions", forward, size).await;
            assert_eq!(pages.concat(), all, "{size} {forward}");
        }
    }
    let first = graphql.data(query, json!({"first": 10})).await;
    server.clock.advance(Duration::from_secs(1));
    server.create(json!({"externalId": "newer"})).await;
    let after = &first["sessions"]["pageInfo"]["endCursor"];
    let second = graphql.data(query, json!({"first": 100, "after": after})).await;
    assert_eq!(second["sessions"]["nodes"].as_array().expect("nodes"), &all[10..]);
    let start = &first["sessions"]["pageInfo"]["startCursor"];
    let before = graphql.data(query, json!({"before": start})).await;
    assert_eq!(before["sessions"]["nodes"], json!([{"externalId": "newer"}]));
    for (arguments, named) in [
        (json!({"first": 0}), "first"),
        (json!({"first": 101}), "first"),
        (json!({"last": -1}), "last"),
        (json!({"first": 1, "last": 1}), "last"),
        (json!({"after": after, "before": start}), "last"),
    ] {
        let result = graphql.result(query, arguments.clone()).await;
        assert_eq!(code(&result), "VALIDATION_FAILED", "{arguments}");
        assert!(result["errors"][0]["message"].as_str().expect("text").starts_with(named), "{result}");
    }
}

/// Puts records into a channel while no server has the log open.
async fn write(server: &mut TestServer, session: &str, records: Vec<NewRecord>) {
    server.stop().await;
    let clock = Arc::new(TestClock::at(START));
    let log = LogChannels::open(server.data().join("log"), LogOptions::default(), clock).expect("the log");
    let key = ChannelKey::main(SessionId::from_stored(session), Direction::Out);
    log.append(&key, AppendInput::new(records).expect("a batch")).await.expect("appended");
    log.close();
}

#[tokio::test]
async fn records_of_every_kind_are_shown_and_paged_both_ways() {
    let mut server = TestServer::start().await;
    let session = server.create(json!({"externalId": "s"})).await;
    let graphql = server.graphql();
    let append = r#"mutation { appendRecords(input: {by: {externalId: "s"}, io: OUT, records: [
        {text: "plain"}, {text: "{\"a\": [1]}"}, {data: {b: [1.5, null]}, idempotencyKey: "mine"}, {data: "text"},
        {data: null}, {text: ""}]}) { userErrors { code } } }"#;
    assert_eq!(graphql.payload(append, json!({})).await["userErrors"], json!([]));
    let headers = |pairs: &[(&'static [u8], &'static [u8])]| {
        pairs.iter().map(|(name, value)| (Bytes::from_static(name), Bytes::from_static(value))).collect()
    };
    let control = headers(&[(b"trigger-control", b"turn-complete"), (b"n", b"1")]);
    let foreign = headers(&[(b"x", b"a"), (b"x", b"\xff")]);
    let records = vec![
        NewRecord { headers: control, ..NewRecord::data("") },
        NewRecord { headers: foreign, ..NewRecord::data("no envelope") },
        NewRecord::data(vec![0xff, 0xfe]),
    ];
    write(&mut server, session["id"].as_str().expect("an id"), records).await;
    let server = server.restart().await;
    let graphql = server.graphql();
    let fields = "seqNum data text control headers { name value }";
    let query = format!(
        "query($first: Int, $after: String, $last: Int, $before: String) {{ session(by: {{externalId: \"s\"}}) {{ out {{
            records(first: $first, after: $after, last: $last, before: $before) {{
                nodes {{ {fields} }} edges {{ cursor node {{ {fields} }} }}
                pageInfo {{ hasNextPage hasPreviousPage startCursor endCursor }} }} }} }} }}"
    );
    let shown = |seq: usize, data: Value, text: Value, control: Value, headers: Value| json!({"seqNum": seq.to_string(), "data": data, "text": text, "control": control, "headers": headers});
    let plain = |seq, data, text: &str| shown(seq, data, json!(text), Value::Null, json!([]));
    let turn = json!([{"name": "trigger-control", "value": "turn-complete"}, {"name": "n", "value": "1"}]);
    let foreign = json!([{"name": "x", "value": "a"}, {"name": "x", "value": "\u{fffd}"}]);
    let expected = [
        plain(0, json!("plain"), "plain"),
        plain(1, json!({"a": [1]}), "{\"a\": [1]}"),
        plain(2, json!({"b": [1.5, null]}), "{\"b\":[1.5,null]}"),
        plain(3, json!("text"), "text"),
        plain(4, Value::Null, "null"),
        plain(5, json!(""), ""),
        shown(6, Value::Null, Value::Null, json!("turn-complete"), turn),
        shown(7, Value::Null, json!("no envelope"), Value::Null, foreign),
        shown(8, Value::Null, Value::Null, Value::Null, json!([])),
    ];
    let path = "/session/out/records";
    for size in [1, 2, 4, 9, 50] {
        for forward in [true, false] {
            assert_eq!(
                walk(&graphql, &query, path, forward, size).await.concat(),
                expected,
                "{size} {forward}"
            );
        }
    }
    let trim = r#"mutation { trimChannel(input: {by: {externalId: "s"}, io: OUT, before: "3"}) {
        channel { earliest tail { seqNum } } } }"#;
    let trimmed = graphql.payload(trim, json!({})).await;
    assert_eq!(
        trimmed["channel"],
        json!({"earliest": "3", "tail": {"seqNum": "10"}}),
        "the trim takes a place, too"
    );
    for forward in [true, false] {
        assert_eq!(walk(&graphql, &query, path, forward, 2).await.concat(), expected[3..], "{forward}");
    }
    let behind = graphql.data(&query, json!({"first": 2, "after": "0"})).await;
    assert_eq!(behind.pointer("/session/out/records/nodes/0/seqNum"), Some(&json!("3")));
    let part =
        r#"{ session(by: {externalId: "s"}) { out { records { nodes { partId cursor timestamp } } } } }"#;
    let part = graphql.data(part, json!({})).await;
    let node = &part["session"]["out"]["records"]["nodes"];
    assert_eq!(
        (&node[0]["cursor"], &node[0]["timestamp"]),
        (&json!("3"), &json!("2026-01-01T00:00:00.000Z"))
    );
    assert!(node[0]["partId"].is_string() && node[3]["partId"].is_null(), "{node}");
}
