//! The same through GraphQL.

use std::time::Duration;

use futures_util::join;
use reqwest::Response;
use serde_json::{Value, json};

use super::{path, session, wait};
use crate::harness::TestServer;
use crate::harness::server::KEY;

async fn ask(server: &TestServer, query: &str, variables: Value) -> Value {
    let answer = server.post("/graphql", &json!({"query": query, "variables": variables})).await.expect(200);
    assert!(answer["errors"].is_null(), "{answer}");
    answer["data"].clone()
}

async fn subscribe(server: &TestServer, id: &str) -> Response {
    let query =
        "subscription($id: ID!) { waitpointCompleted(id: $id) { status outcome record { payload: text } } }";
    let body = json!({"query": query, "variables": {"id": id}});
    let request = server.http.post(format!("{}/graphql", server.url)).bearer_auth(KEY);
    request.header("accept", "text/event-stream").json(&body).send().await.expect("an answer")
}

/// Every result of a subscription that completes by itself.
async fn results(answer: Response) -> Vec<Value> {
    let text = answer.text().await.expect("a body");
    assert!(text.contains("event: complete"), "{text}");
    let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
    data.filter(|data| !data.is_empty()).map(|data| serde_json::from_str(data).expect("JSON")).collect()
}

#[tokio::test]
async fn a_wait_is_made_seen_awaited_and_answered() {
    let server = TestServer::start().await;
    let run = session(&server, json!({})).await;
    let create = r#"mutation { createWaitpoint(input: {by: {externalId: "s"}, io: IN, timeout: "1h", tags: ["a"],
        idempotencyKey: "k", clientMutationId: "m"}) {
            created clientMutationId userErrors { code }
            waitpoint { id waitpointId status outcome runId io lastSeqNum tags timeoutAt completedAt session { externalId } } } }"#;
    let made = ask(&server, create, json!({})).await["createWaitpoint"].clone();
    let node = &made["waitpoint"];
    assert_eq!((&made["created"], &made["clientMutationId"]), (&json!(true), &json!("m")), "{made}");
    assert_eq!(
        (&node["status"], &node["outcome"], &node["runId"]),
        (&json!("WAITING"), &Value::Null, &json!(run))
    );
    assert_eq!(node["session"]["externalId"], "s");
    assert_eq!(node["timeoutAt"], "2026-01-01T01:00:00.000Z");
    let again = ask(&server, create, json!({})).await["createWaitpoint"].clone();
    assert_eq!((&again["created"], &again["waitpoint"]["id"]), (&json!(false), &node["id"]));

    let (id, short) = (node["id"].as_str().expect("an id"), node["waitpointId"].as_str().expect("an id"));
    let seen = "query($id: ID!, $short: ID!) { waitpoint(id: $short) { id status } node(id: $id) { id ... on Waitpoint { waitpointId } } }";
    let seen = ask(&server, seen, json!({"id": id, "short": short})).await;
    assert_eq!((&seen["waitpoint"]["id"], &seen["node"]["waitpointId"]), (&json!(id), &json!(short)));

    let complete = "mutation($id: ID!) { completeWaitpoint(input: {id: $id, data: {ok: true}}) {
        waitpoint { status outcome record { text } } userErrors { code path } } }";
    let (told, done) = join!(
        async { results(subscribe(&server, id).await).await },
        ask(&server, complete, json!({"id": short})),
    );
    let done = &done["completeWaitpoint"];
    assert_eq!(
        (&done["waitpoint"]["status"], &done["userErrors"]),
        (&json!("COMPLETED"), &json!([])),
        "{done}"
    );
    assert_eq!(done["waitpoint"]["record"]["text"], r#"{"ok":true}"#, "{done}");
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(told[0]["data"]["waitpointCompleted"]["outcome"], "RECORD", "{told:?}");
    // Once more, when it is complete already.
    assert_eq!(results(subscribe(&server, short).await).await, told);
    assert_eq!(server.get(&path(short)).await.expect(200)["output"], r#"{"ok":true}"#);
}

#[tokio::test]
async fn what_can_be_mended_comes_back_in_user_errors() {
    let server = TestServer::start().await;
    let run = session(&server, json!({})).await;
    let id = wait(&server, &run, json!({})).await;
    server.append("s", "in", "first").await;
    for (call, code, field) in [
        (format!(r#"completeWaitpoint(input: {{id: "{id}", data: 1}})"#), "CONFLICT", json!(["input"])),
        (
            r#"completeWaitpoint(input: {id: "waitpoint_nothing"})"#.into(),
            "NOT_FOUND",
            json!(["input", "id"]),
        ),
        (r#"completeWaitpoint(input: {id: "nothing"})"#.into(), "VALIDATION_FAILED", json!(["input", "id"])),
        (
            r#"createWaitpoint(input: {by: {externalId: "no"}, io: IN})"#.into(),
            "NOT_FOUND",
            json!(["input", "by"]),
        ),
        (
            r#"createWaitpoint(input: {by: {externalId: "s"}, io: IN, runId: "run_no"})"#.into(),
            "NOT_FOUND",
            json!(["input", "runId"]),
        ),
        (
            r#"createWaitpoint(input: {by: {externalId: "s"}, io: IN, timeout: "soon"})"#.into(),
            "VALIDATION_FAILED",
            json!(["input", "timeout"]),
        ),
        (
            r#"endAndContinueSession(input: {by: {externalId: "s"}, runId: "run_no"})"#.into(),
            "NOT_FOUND",
            json!(["input", "runId"]),
        ),
    ] {
        let data = ask(
            &server,
            &format!("mutation {{ result: {call} {{ userErrors {{ code path }} }} }}"),
            json!({}),
        )
        .await;
        let error = &data["result"]["userErrors"][0];
        assert_eq!((&error["code"], &error["path"]), (&json!(code), &field), "{call}: {data}");
    }
}

#[tokio::test]
async fn the_list_filters_and_pages_both_ways() {
    let server = TestServer::start().await;
    let run = session(&server, json!({})).await;
    let mut all = Vec::new();
    for tag in ["a", "b", "a"] {
        all.insert(0, wait(&server, &run, json!({"tags": [tag]})).await);
        server.clock.advance(Duration::from_secs(60));
    }
    let list = async |arguments: &str| {
        let query = format!(
            "{{ waitpoints({arguments}) {{ nodes {{ waitpointId }} edges {{ cursor }} pageInfo {{ hasNextPage hasPreviousPage endCursor startCursor }} }} }}"
        );
        let page = ask(&server, &query, json!({})).await["waitpoints"].clone();
        let ids: Vec<String> = page["nodes"]
            .as_array()
            .expect("nodes")
            .iter()
            .map(|node| node["waitpointId"].as_str().expect("an id").to_owned())
            .collect();
        (ids, page)
    };
    let (first, page) = list("first: 2").await;
    assert_eq!((&first[..], &page["pageInfo"]["hasNextPage"]), (&all[..2], &json!(true)));
    let end = page["pageInfo"]["endCursor"].as_str().expect("a cursor");
    assert_eq!(list(&format!(r#"first: 2, after: "{end}""#)).await.0, all[2..]);
    let (last, page) = list("last: 1").await;
    assert_eq!(last, all[2..]);
    let start = page["pageInfo"]["startCursor"].as_str().expect("a cursor");
    assert_eq!(list(&format!(r#"last: 2, before: "{start}""#)).await.0, all[..2]);
    let tagged =
        list(r#"first: 9, filter: {tags: ["a"], statuses: [WAITING], session: {externalId: "s"}}"#).await.0;
    assert_eq!(tagged, [all[0].clone(), all[2].clone()]);
    let run_filter = format!(r#"first: 9, filter: {{runId: "{run}", createdAt: {{period: "2m"}}}}"#);
    assert_eq!(list(&run_filter).await.0, all[..2]);
    assert_eq!(list(r#"first: 9, filter: {statuses: [COMPLETED, TIMED_OUT]}"#).await.0, Vec::<String>::new());
}

#[tokio::test]
async fn a_handover_and_the_runs_of_a_session_are_seen() {
    let server = TestServer::start().await;
    let first = session(&server, json!({})).await;
    let hand_over = r#"mutation($run: String!) { endAndContinueSession(input: {by: {externalId: "s"}, runId: $run,
        reason: "upgrade", idempotencyKey: "k"}) { swapped runId session { currentRunId } userErrors { code } } }"#;
    let done = ask(&server, hand_over, json!({"run": first})).await["endAndContinueSession"].clone();
    assert_eq!(
        (&done["swapped"], &done["session"]["currentRunId"]),
        (&json!(true), &done["runId"]),
        "{done}"
    );
    let again = ask(&server, hand_over, json!({"run": first})).await["endAndContinueSession"].clone();
    assert_eq!(again, done);
    let runs = r#"{ session(by: {externalId: "s"}) { runs { runId reason previousRunId } newest: runs(first: 1) { runId } } }"#;
    let runs = ask(&server, runs, json!({})).await["session"].clone();
    // Both were recorded in the same millisecond, so their ids order them.
    let mut expected = [
        json!({"runId": done["runId"], "reason": "UPGRADE", "previousRunId": first}),
        json!({"runId": first, "reason": "INITIAL", "previousRunId": null}),
    ];
    expected.sort_by(|one, other| other["runId"].as_str().cmp(&one["runId"].as_str()));
    assert_eq!(runs["runs"], json!(expected));
    assert_eq!(runs["newest"].as_array().map(Vec::len), Some(1));
}
