//! The runs of sessions: which are recorded, and how one hands over to the next.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::TestServer;
use crate::harness::server::{Answer, KEY};

const PATH: &str = "/api/v1/sessions/s/end-and-continue";

async fn hand_over(server: &TestServer, calling: &str, reason: &str, request_key: Option<&str>) -> Answer {
    let mut request = server.request_as(KEY, Method::POST, PATH);
    if let Some(key) = request_key {
        request = request.header("x-trigger-request-idempotency-key", key);
    }
    server.send(request.json(&json!({"callingRunId": calling, "reason": reason}))).await
}

async fn started(server: &TestServer, extra: Value) -> String {
    let mut body = json!({"externalId": "s"});
    body.as_object_mut().expect("an object").extend(extra.as_object().cloned().expect("an object"));
    server.create(body).await["runId"].as_str().expect("a run").to_owned()
}

fn run(answer: &Value) -> String {
    answer["runId"].as_str().expect("a run").to_owned()
}

#[tokio::test]
async fn a_run_hands_over_once_and_whoever_comes_later_is_told_who_runs() {
    let server = TestServer::start().await;
    let first = started(&server, json!({})).await;
    let answer = hand_over(&server, &first, "upgrade", None).await.expect(200);
    assert_eq!(answer["swapped"], true, "{answer}");
    let second = run(&answer);
    assert_ne!(second, first);
    assert_eq!(server.get("/api/v1/sessions/s").await.expect(200)["currentRunId"], second);
    let late = hand_over(&server, &first, "upgrade", None).await.expect(200);
    assert_eq!((&late["swapped"], &run(&late)), (&json!(false), &second));
    let third = hand_over(&server, &second, "whatever", None).await.expect(200);
    assert_eq!(third["swapped"], true);
    let again = server.create(json!({"externalId": "s"})).await;
    assert_eq!((&again["runId"], &again["isCached"]), (&third["runId"], &json!(true)));
}

#[tokio::test]
async fn of_twenty_concurrent_handovers_one_swaps() {
    let server = TestServer::start().await;
    let first = started(&server, json!({})).await;
    let answers = join_all((0..20).map(|_| hand_over(&server, &first, "continuation", None))).await;
    let answers: Vec<_> = answers.iter().map(|answer| answer.expect(200)).collect();
    assert_eq!(answers.iter().filter(|answer| answer["swapped"] == true).count(), 1, "{answers:?}");
    assert_eq!(answers.iter().map(run).collect::<BTreeSet<_>>().len(), 1, "{answers:?}");
}

#[tokio::test]
async fn a_retry_of_the_same_request_is_answered_as_the_first_attempt() {
    let server = TestServer::start().await;
    let first = started(&server, json!({})).await;
    let answers = join_all((0..5).map(|_| hand_over(&server, &first, "upgrade", Some("r1")))).await;
    let answers: Vec<_> = answers.iter().map(|answer| answer.expect(200)).collect();
    assert!(answers.iter().all(|answer| *answer == answers[0] && answer["swapped"] == true), "{answers:?}");
    let second = run(&answers[0]);
    hand_over(&server, &second, "upgrade", Some("r2")).await.expect(200);
    // However late it comes.
    assert_eq!(hand_over(&server, &first, "upgrade", Some("r1")).await.expect(200), answers[0]);
}

#[tokio::test]
async fn every_refusal_of_a_handover_is_the_one_that_clients_know() {
    let server = TestServer::start().await;
    let first = started(&server, json!({"expiresAt": "2026-01-01T00:01:00Z"})).await;
    let (_, foreign) = server.environment("other").await;
    for calling in ["run_nothing", "nothing", "session_a"] {
        let refused = hand_over(&server, calling, "upgrade", None).await.expect(404);
        assert_eq!(refused["error"], "callingRunId not found in this environment");
    }
    let body = json!({"callingRunId": first, "reason": "upgrade"});
    let missing = server.post("/api/v1/sessions/nothing/end-and-continue", &body).await.expect(404);
    assert_eq!(missing["error"], "Resource not found");
    let elsewhere =
        server.send(server.request_as(&foreign, Method::POST, PATH).json(&body)).await.expect(404);
    assert_eq!(elsewhere["error"], "Resource not found");
    hand_over(&server, &first, &"x".repeat(65), None).await.expect(422);
    server.post(PATH, &json!({"reason": "upgrade"})).await.expect(400);
    let reader = server.token(&["read:sessions:s"], Duration::from_secs(3600)).await;
    server.send(server.request_as(&reader, Method::POST, PATH).json(&body)).await.expect(403);
    server.clock.advance(Duration::from_secs(61));
    let expired = hand_over(&server, &first, "upgrade", None).await.expect(400);
    assert_eq!(expired["error"], "Cannot end-and-continue an expired session");
    server.post("/api/v1/sessions/s/close", &json!({})).await.expect(200);
    let closed = hand_over(&server, &first, "upgrade", None).await.expect(400);
    assert_eq!(closed["error"], "Cannot end-and-continue a closed session");
}

/// The records of both main channels, as any reader gets them.
async fn records(server: &TestServer) -> [Value; 2] {
    let path = |io: &str| format!("/realtime/v1/sessions/s/{io}/records");
    [
        server.get(&path("in")).await.expect(200)["records"].take(),
        server.get(&path("out")).await.expect(200)["records"].take(),
    ]
}

#[tokio::test]
async fn a_close_is_told_to_the_agent_and_its_clients_unless_the_agent_has_done_so() {
    let closed = json!([["trigger-control", "session-closed"], ["session-closed-reason", "done"]]);
    let server = TestServer::start().await;
    let run = started(&server, json!({})).await;
    let named = json!({"reason": "done", "callingRunId": format!("{run}x")});
    server.post("/api/v1/sessions/s/close", &named).await.expect(200);
    server.post("/api/v1/sessions/s/close", &json!({"reason": "again"})).await.expect(200);
    let [input, output] = records(&server).await;
    assert_eq!(output, json!([{"data": "", "id": "", "seqNum": 0, "headers": closed}]));
    let message = json!({"kind": "message", "payload": {"trigger": "close"}});
    let [told] = input.as_array().expect("records").as_slice() else { panic!("one record: {input}") };
    let text = told["data"].as_str().expect("a text, as the append route stores it");
    assert_eq!(serde_json::from_str::<Value>(text).expect("JSON"), message);
    let query = json!({"query": "{ session(by: {externalId: \"s\"}) { out { records(first: 9) { nodes { control headers { name value } } } } } }"});
    let shown = server.post("/graphql", &query).await.expect(200);
    assert_eq!(
        shown["data"]["session"]["out"]["records"]["nodes"][0],
        json!({"control": "session-closed", "headers": [
            {"name": "trigger-control", "value": "session-closed"},
            {"name": "session-closed-reason", "value": "done"},
        ]}),
        "{shown}"
    );

    let server = TestServer::start().await;
    let run = started(&server, json!({})).await;
    let own = json!({"reason": "done", "callingRunId": run});
    server.post("/api/v1/sessions/s/close", &own).await.expect(200);
    let [input, output] = records(&server).await;
    assert_eq!((input.as_array().map(Vec::len), output), (Some(1), json!([])));
}
