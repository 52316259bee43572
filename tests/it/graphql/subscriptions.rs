//! What subscriptions yield, in which order, and how they end.

use std::time::Duration;

use reqwest::Method;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::harness::graphql::code;
use crate::harness::{Socket, TestServer};

const HOUR: Duration = Duration::from_secs(3600);
const EVENTS: &str = "subscription($s: String!, $after: Cursor, $from: FollowStart, $batch: Int) {
    channelRecords(by: {externalId: $s}, io: OUT, after: $after, from: $from, batch: $batch) {
        records { seqNum text } endCursor caughtUp tail { seqNum timestamp } closed { at reason status } } }";

/// A server with a session `s` that has `count` records in `.out`.
async fn filled(count: usize) -> TestServer {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    for index in 0..count {
        server.append("s", "out", &index.to_string()).await;
    }
    server
}

async fn follow(socket: &mut Socket, id: &str, arguments: Value) {
    let mut variables = json!({"s": "s"});
    variables.as_object_mut().expect("an object").extend(arguments.as_object().expect("an object").clone());
    socket.subscribe(id, EVENTS, variables).await;
}

fn numbers(event: &Value) -> Vec<&str> {
    let records = event["records"].as_array().unwrap_or_else(|| panic!("no event: {event}"));
    records.iter().map(|record| record["seqNum"].as_str().expect("digits")).collect()
}

/// Checks that the subscription ends now, with this event.
async fn ends(socket: &mut Socket, id: &str, at: &str, reason: Value, status: &str) {
    let last = socket.event(id).await;
    assert_eq!(last["closed"], json!({"at": at, "reason": reason, "status": status}), "{last}");
    assert_eq!((&last["records"], &last["caughtUp"]), (&json!([]), &json!(true)));
    socket.completed(id).await;
}

#[tokio::test]
async fn stored_records_come_in_batches_and_then_what_is_appended() {
    let server = filled(5).await;
    let mut socket = server.graphql().socket().await;
    follow(&mut socket, "1", json!({"batch": 2})).await;
    for (expected, cursor, caught_up) in
        [(&["0", "1"][..], "1", false), (&["2", "3"], "3", false), (&["4"], "4", true)]
    {
        let event = socket.event("1").await;
        assert_eq!(numbers(&event), expected);
        let summary = (&event["endCursor"], &event["caughtUp"], &event["closed"]);
        assert_eq!(summary, (&json!(cursor), &json!(caught_up), &Value::Null));
    }
    for number in ["5", "6"] {
        server.append("s", "out", number).await;
        let event = socket.event("1").await;
        assert_eq!(event["records"], json!([{"seqNum": number, "text": number}]));
        assert_eq!((&event["caughtUp"], &event["endCursor"]), (&json!(true), &json!(number)));
        assert_eq!(event["tail"]["timestamp"], "2026-01-01T00:00:00.000Z");
    }
    let large = "x".repeat(200_000);
    for _ in 0..3 {
        server.append("s", "out", &large).await;
    }
    let mut late = server.graphql().socket().await;
    follow(&mut late, "1", json!({"batch": 1000})).await;
    let mut all = Vec::new();
    while all.len() < 10 {
        let event = late.event("1").await;
        all.extend(numbers(&event).into_iter().map(str::to_owned));
        assert_eq!(event["caughtUp"], all.len() == 10, "large events are cut");
    }
    assert_eq!(all, (0..10).map(|number| number.to_string()).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_follower_begins_where_it_asks_to() {
    let server = filled(5).await;
    let mut socket = server.graphql().socket().await;
    for (arguments, expected) in [
        (json!({}), &["0", "1", "2", "3", "4"][..]),
        (json!({"from": "START"}), &["0", "1", "2", "3", "4"]),
        (json!({"from": null, "after": null, "batch": null}), &["0", "1", "2", "3", "4"]),
        (json!({"after": "2"}), &["3", "4"]),
        (json!({"after": 2, "from": "LATEST"}), &["3", "4"]),
        (json!({"after": "4"}), &[]),
        (json!({"from": "LATEST"}), &[]),
    ] {
        follow(&mut socket, "1", arguments.clone()).await;
        let event = socket.event("1").await;
        assert_eq!((numbers(&event), &event["caughtUp"]), (expected.to_vec(), &json!(true)), "{arguments}");
        assert_eq!(event["tail"]["seqNum"], "5", "{arguments}");
        socket.complete("1").await;
        socket.silent().await;
    }
    follow(&mut socket, "1", json!({"from": "LATEST"})).await;
    assert_eq!(socket.event("1").await["endCursor"], "4", "to go on from, although nothing came");
    server.append("s", "out", "5").await;
    assert_eq!(numbers(&socket.event("1").await), ["5"]);
    for (arguments, expected) in [
        (json!({"batch": 0}), "VALIDATION_FAILED"),
        (json!({"batch": 1001}), "VALIDATION_FAILED"),
        (json!({"batch": -1}), "VALIDATION_FAILED"),
        (json!({"after": "x"}), "GRAPHQL_VALIDATION_FAILED"),
        (json!({"after": "-1"}), "GRAPHQL_VALIDATION_FAILED"),
        (json!({"after": "99"}), "CURSOR_AHEAD"),
        (json!({"from": "NOW"}), "GRAPHQL_VALIDATION_FAILED"),
        (json!({"s": ""}), "VALIDATION_FAILED"),
    ] {
        follow(&mut socket, "2", arguments.clone()).await;
        assert_eq!(code(&socket.refused("2").await[0]), expected, "{arguments}");
    }
}

#[tokio::test]
async fn a_channel_without_records_is_caught_up_at_once_and_has_no_cursor() {
    let server = filled(0).await;
    let mut socket = server.graphql().socket().await;
    follow(&mut socket, "1", json!({})).await;
    let nothing = json!({"records": [], "endCursor": null, "caughtUp": true, "closed": null,
        "tail": {"seqNum": "0", "timestamp": null}});
    assert_eq!(socket.event("1").await, nothing);
    let side = "subscription { channelRecords(by: {externalId: \"s\"}, io: IN, channel: \"a\") { records { text } } }";
    socket.subscribe("2", side, json!({})).await;
    assert_eq!(socket.event("2").await["records"], json!([]));
    server.append("s", "in", "elsewhere").await;
    server.append("s", "channels/a/in", "here").await;
    assert_eq!(
        socket.event("2").await["records"],
        json!([{"text": "here"}]),
        "and nothing of other channels"
    );
}

#[tokio::test]
async fn a_close_gives_the_rest_then_the_reason_then_the_end() {
    let server = filled(3).await;
    let mut socket = server.graphql().socket().await;
    follow(&mut socket, "live", json!({})).await;
    assert_eq!(numbers(&socket.event("live").await).len(), 3);
    server.clock.advance(HOUR);
    server.append("s", "out", "last").await;
    server.post("/api/v1/sessions/s/close", &json!({"reason": "over"})).await.expect(200);
    let mut rest = Vec::new();
    while rest.len() < 2 {
        rest.extend(numbers(&socket.event("live").await).into_iter().map(str::to_owned));
    }
    assert_eq!(rest, ["3", "4"], "the last record tells of the close");
    ends(&mut socket, "live", "2026-01-01T01:00:00.000Z", json!("over"), "CLOSED").await;
    for (arguments, rest) in [
        (json!({"batch": 5}), vec!["0", "1", "2", "3", "4"]),
        (json!({"after": "1"}), vec!["2", "3", "4"]),
        (json!({"after": "4"}), vec![]),
        (json!({"from": "LATEST"}), vec![]),
    ] {
        follow(&mut socket, "late", arguments.clone()).await;
        let mut seen = Vec::new();
        let last = loop {
            let event = socket.event("late").await;
            if !event["closed"].is_null() {
                break event;
            }
            seen.extend(numbers(&event).into_iter().map(str::to_owned));
        };
        assert_eq!(
            (seen, &last["closed"]["reason"]),
            (rest.iter().map(|n| (*n).to_owned()).collect(), &json!("over")),
            "{arguments}"
        );
        assert_eq!(last["endCursor"], "4", "{arguments}");
        socket.completed("late").await;
    }
    socket.silent().await;
}

#[tokio::test]
async fn an_expiry_ends_like_a_close_and_says_so() {
    let server = TestServer::start().await;
    let expires = "2026-01-01T00:30:00.000Z";
    server.create(json!({"externalId": "s", "expiresAt": expires})).await;
    server.append("s", "out", "0").await;
    let mut socket = server.graphql().socket().await;
    follow(&mut socket, "1", json!({})).await;
    assert_eq!(numbers(&socket.event("1").await), ["0"]);
    let row = "subscription { sessionChanged(by: {externalId: \"s\"}) { status } }";
    let mut watching = server.graphql().socket().await;
    watching.subscribe("1", row, json!({})).await;
    assert_eq!(watching.event("1").await["status"], "ACTIVE");
    server.clock.advance(HOUR);
    ends(&mut socket, "1", expires, Value::Null, "EXPIRED").await;
    assert_eq!(watching.event("1").await["status"], "EXPIRED");
    watching.completed("1").await;
    follow(&mut socket, "late", json!({})).await;
    assert_eq!(numbers(&socket.event("late").await), ["0"]);
    ends(&mut socket, "late", expires, Value::Null, "EXPIRED").await;
}

#[tokio::test]
async fn an_external_id_that_nobody_has_yet_is_waited_for() {
    let server = TestServer::start().await;
    let mut socket = server.graphql().socket().await;
    let row = "subscription($s: String!) { sessionChanged(by: {externalId: $s}) { externalId tags } }";
    follow(&mut socket, "records", json!({"from": "LATEST"})).await;
    socket.silent().await;
    let id = server.create(json!({"externalId": "other"})).await["id"].take();
    let path = format!("/api/v1/sessions/{}", id.as_str().expect("an id"));
    server.json(Method::PATCH, &path, &json!({"externalId": "s"})).await.expect(200);
    assert_eq!(socket.event("records").await["caughtUp"], true, "a rename makes it exist as well");
    server.append("s", "out", "first").await;
    assert_eq!(numbers(&socket.event("records").await), ["0"]);
    socket.subscribe("row", row, json!({"s": "later"})).await;
    socket.silent().await;
    server.create(json!({"externalId": "later", "tags": ["new"]})).await;
    assert_eq!(socket.event("row").await, json!({"externalId": "later", "tags": ["new"]}));
}

#[tokio::test]
async fn who_resumes_behind_a_trim_is_told_where_the_channel_begins_now() {
    let server = filled(6).await;
    let graphql = server.graphql();
    let trim = "mutation { trimChannel(input: {by: {externalId: \"s\"}, io: OUT, before: \"4\"}) { channel { earliest } } }";
    assert_eq!(graphql.payload(trim, json!({})).await["channel"]["earliest"], "4");
    let mut socket = graphql.socket().await;
    for after in ["0", "2"] {
        follow(&mut socket, "1", json!({"after": after})).await;
        let errors = socket.refused("1").await;
        assert_eq!((code(&errors[0]), &errors[0]["extensions"]["earliest"]), ("CURSOR_EXPIRED", &json!("4")));
    }
    for arguments in [json!({"after": "3"}), json!({"from": "START"})] {
        follow(&mut socket, "1", arguments).await;
        assert_eq!(numbers(&socket.event("1").await), ["4", "5"]);
        socket.complete("1").await;
    }
    socket.silent().await;
}

#[tokio::test]
async fn who_resumes_beyond_the_tail_is_told_where_the_channel_ends() {
    let server = filled(2).await;
    let mut socket = server.graphql().socket().await;
    let refused = |errors: Value| (code(&errors[0]).to_owned(), errors[0]["extensions"]["tail"].clone());
    for after in ["2", "999", "18446744073709551615"] {
        follow(&mut socket, "1", json!({"after": after})).await;
        assert_eq!(refused(socket.refused("1").await), ("CURSOR_AHEAD".to_owned(), json!("2")), "{after}");
    }
    follow(&mut socket, "1", json!({"after": "1"})).await;
    assert_eq!(socket.event("1").await["endCursor"], "1", "the last record is where a follower may be");
    server.append("s", "out", "2").await;
    assert_eq!(numbers(&socket.event("1").await), ["2"]);
    socket.complete("1").await;
    // Who has waited for a session learns it when there is one.
    follow(&mut socket, "later", json!({"s": "later", "after": "0"})).await;
    socket.silent().await;
    server.create(json!({"externalId": "later"})).await;
    assert_eq!(refused(socket.refused("later").await), ("CURSOR_AHEAD".to_owned(), json!("0")));
    server.post("/api/v1/sessions/s/close", &json!({})).await.expect(200);
    follow(&mut socket, "closed", json!({"after": "9"})).await;
    let closed = refused(socket.refused("closed").await);
    assert_eq!(closed.0, "CURSOR_AHEAD", "a closed session has lost records all the same");
}

#[tokio::test]
async fn a_session_is_shown_as_it_is_then_after_every_change_until_it_is_closed() {
    let server = TestServer::start().await;
    let id = server.create(json!({"externalId": "s"})).await["id"].take();
    let mut socket = server.graphql().socket().await;
    let row = "subscription($by: SessionBy!) { sessionChanged(by: $by) { externalId tags metadata status closedReason out { tail { seqNum } } } }";
    socket.subscribe("1", row, json!({"by": {"sessionId": id}})).await;
    let active = |external: Value, tags: Value, metadata: Value| {
        json!({"externalId": external, "tags": tags, "metadata": metadata, "status": "ACTIVE",
            "closedReason": null, "out": {"tail": {"seqNum": "0"}}})
    };
    assert_eq!(socket.event("1").await, active(json!("s"), json!([]), Value::Null));
    let path = format!("/api/v1/sessions/{}", id.as_str().expect("an id"));
    server.create(json!({"externalId": "another"})).await;
    for (change, expected) in [
        (json!({"tags": ["a"]}), active(json!("s"), json!(["a"]), Value::Null)),
        (json!({"metadata": {"n": 1}}), active(json!("s"), json!(["a"]), json!({"n": 1}))),
        (json!({"externalId": "t"}), active(json!("t"), json!(["a"]), json!({"n": 1}))),
        (json!({"externalId": null}), active(Value::Null, json!(["a"]), json!({"n": 1}))),
    ] {
        server.json(Method::PATCH, &path, &change).await.expect(200);
        assert_eq!(socket.event("1").await, expected, "{change}");
    }
    server.post(&format!("{path}/close"), &json!({"reason": "done"})).await.expect(200);
    let mut closed = active(Value::Null, json!(["a"]), json!({"n": 1}));
    closed["status"] = json!("CLOSED");
    closed["closedReason"] = json!("done");
    closed["out"] = json!({"tail": {"seqNum": "1"}});
    assert_eq!(socket.event("1").await, closed);
    socket.completed("1").await;
    socket.subscribe("late", row, json!({"by": {"sessionId": id}})).await;
    assert_eq!(socket.event("late").await, closed);
    socket.completed("late").await;
}

#[tokio::test]
async fn a_field_that_fails_in_an_event_does_not_end_the_subscription() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let changes = "subscription { sessionChanged(by: {externalId: \"s\"}) { tags out { records(after: \"no cursor\") { nodes { text } } } } }";
    let fails = |result: &Value| {
        assert_eq!(result["errors"][0]["path"], json!(["sessionChanged", "out", "records"]), "{result}");
        assert_eq!(result["data"], Value::Null, "{result}");
    };
    let mut socket = server.graphql().socket().await;
    socket.subscribe("1", changes, json!({})).await;
    fails(&socket.result("1").await);
    server.json(Method::PATCH, "/api/v1/sessions/s", &json!({"tags": ["a"]})).await.expect(200);
    fails(&socket.result("1").await);
    server.post("/api/v1/sessions/s/close", &json!({})).await.expect(200);
    fails(&socket.result("1").await);
    socket.completed("1").await;
}

#[tokio::test]
async fn a_live_list_shows_what_matches_after_the_change_and_nothing_of_other_environments() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "before", "tags": ["x"]})).await;
    let (_, foreign) = server.environment("other").await;
    let mut socket = server.graphql().socket().await;
    let list = "subscription($f: SessionFilter) { sessionsChanged(filter: $f) { externalId status } }";
    socket.subscribe("x", list, json!({"f": {"tags": {"any": ["x"]}, "statuses": ["ACTIVE"]}})).await;
    socket.subscribe("all", list, json!({})).await;
    // An operation is begun in the order of its message, and this one answers later.
    socket.subscribe("begun", "{ sessions { totalCount } }", json!({})).await;
    assert_eq!(socket.event("begun").await["totalCount"], "1", "and no row at first");
    socket.completed("begun").await;
    let body = json!({"type": "t", "taskIdentifier": "a", "externalId": "hidden", "tags": ["x"]});
    let hidden = server.request_as(&foreign, Method::POST, "/api/v1/sessions").json(&body);
    server.send(hidden).await.expect(201);
    let mut both = async |name: &str, status: &str, matches: bool| {
        let mut heard = Vec::new();
        for _ in 0..=usize::from(matches) {
            let message = socket.hear().await;
            let expected = json!({"externalId": name, "status": status});
            assert_eq!(message["payload"]["data"]["sessionsChanged"], expected, "{message}");
            heard.push(message["id"].as_str().expect("an id").to_owned());
        }
        heard.sort();
        assert_eq!(heard, if matches { vec!["all", "x"] } else { vec!["all"] }, "{name}");
    };
    server.create(json!({"externalId": "yes", "tags": ["x", "y"]})).await;
    both("yes", "ACTIVE", true).await;
    server.create(json!({"externalId": "no", "tags": ["y"]})).await;
    both("no", "ACTIVE", false).await;
    server.json(Method::PATCH, "/api/v1/sessions/no", &json!({"tags": ["x"]})).await.expect(200);
    both("no", "ACTIVE", true).await;
    server.post("/api/v1/sessions/no/close", &json!({})).await.expect(200);
    both("no", "CLOSED", false).await;
}

#[tokio::test]
async fn what_is_selected_is_shown_however_it_is_spelled() {
    let server = filled(1).await;
    server.post("/api/v1/sessions/s/close", &json!({})).await.expect(200);
    let mut socket = server.graphql().socket().await;
    let query = "subscription Named($yes: Boolean!) { e: channelRecords(by: {externalId: \"s\"}, io: OUT) {
            __typename ...Tail ...Tail also: endCursor
            records { n: seqNum n: seqNum text @skip(if: $yes) ... @include(if: $yes) { t: __typename } }
            records { headers { name } }
            ... on ChannelEvent @skip(if: $yes) { caughtUp }
            closed { status } closed { reason @include(if: $yes) } } }
        fragment Tail on ChannelEvent { tail { at: seqNum } endCursor }";
    socket.subscribe("1", query, json!({"yes": true})).await;
    let event = |records: Value, closed: Value| {
        json!({"__typename": "ChannelEvent", "tail": {"at": "2"}, "endCursor": "1", "also": "1",
            "records": records, "closed": closed})
    };
    let result = socket.result("1").await;
    let close = json!({"n": "1", "t": "Record", "headers": [{"name": "trigger-control"}]});
    let records = json!([{"n": "0", "t": "Record", "headers": []}, close]);
    assert_eq!(result["data"]["e"], event(records, Value::Null));
    let last = event(json!([]), json!({"status": "CLOSED", "reason": null}));
    assert_eq!(socket.event("1").await, last);
    socket.completed("1").await;
}

/// As it stands in the answer, to the byte.
#[derive(serde::Deserialize)]
struct Shown {
    text: Option<String>,
    data: Box<RawValue>,
}

#[tokio::test]
async fn a_record_looks_the_same_in_a_subscription_and_in_a_query() {
    let server = filled(0).await;
    // What JSON readers disagree about (numbers beyond 64 bits, half a surrogate pair, a name twice, hundreds of nested
    // lists) is the same in "text" everywhere; "data" of a query is what the executor's values can hold.
    let texts = [
        "plain",
        "",
        "7",
        "\"quoted\"",
        "null",
        "line\nend\r\n\t\u{0}\u{1f600}\u{2028}\u{7f}",
        "{\"b\":1,\"a\":[true,null]}",
    ];
    for text in texts {
        server.append("s", "out", text).await;
    }
    server.post("/api/v1/sessions/s/close", &json!({})).await.expect(200);
    let graphql = server.graphql();
    let records = "{ session(by: {externalId: \"s\"}) { out { records { nodes { text data } } } } }";
    let queried = graphql.post(&json!({"query": records})).await.text;
    let follow =
        "subscription { channelRecords(by: {externalId: \"s\"}, io: OUT) { records { text data } } }";
    let request = graphql.request(Method::POST).header("accept", "text/event-stream");
    let followed = graphql.send(request.json(&json!({"query": follow}))).await.text;
    let shown = |answer: &str| -> Vec<Shown> {
        let start = answer.find("[{\"text\"").expect("records");
        let mut values = serde_json::Deserializer::from_str(&answer[start..]).into_iter();
        values.next().expect("a list").expect("JSON")
    };
    let (queried, followed) = (shown(&queried), shown(&followed));
    // The last one tells of the close.
    assert_eq!((queried.len(), followed.len()), (texts.len() + 1, texts.len() + 1));
    let mut wrong = Vec::new();
    for ((text, query), follow) in texts.iter().zip(queried).zip(followed) {
        assert_eq!((query.text.as_deref(), follow.text.as_deref()), (Some(*text), Some(*text)));
        if query.data.get() != follow.data.get() {
            wrong.push(format!("{text}: {} and {}", query.data, follow.data));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
