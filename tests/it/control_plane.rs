//! Sessions over REST: create, get, update, close, list.

use std::collections::BTreeSet;
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::database::TestDatabase;
use crate::harness::{Answer, TestServer};

const SESSIONS: &str = "/api/v1/sessions";

fn at(session: &Value) -> String {
    format!("{SESSIONS}/{}", session["id"].as_str().expect("an id"))
}

fn ids(answer: &Value) -> Vec<String> {
    let data = answer["data"].as_array().expect("data");
    data.iter().map(|item| item["id"].as_str().expect("an id").to_owned()).collect()
}

#[tokio::test]
async fn a_created_session_shows_every_field_and_is_found_by_both_ids() {
    let server = TestServer::start().await;
    let body = json!({
        "type": "chat", "externalId": " chat/ü 1 ", "taskIdentifier": "agent", "tags": ["a", "b"],
        "metadata": {"n": 1}, "expiresAt": "2026-01-02T00:00:00Z",
        "triggerConfig": {"basePayload": {"x": 1}, "machine": "micro", "tags": ["t"]},
    });
    let answer = server.post(SESSIONS, &body).await;
    let session = answer.expect(201);
    assert_eq!(session["externalId"], "chat/ü 1");
    assert_eq!(session["createdAt"], "2026-01-01T00:00:00.000Z");
    assert_eq!(session["expiresAt"], "2026-01-02T00:00:00.000Z");
    assert_eq!(session["triggerConfig"]["machine"], "micro");
    assert_eq!((&session["isCached"], &session["status"]), (&json!(false), &json!("ACTIVE")));
    for field in ["closedAt", "closedReason"] {
        assert!(session[field].is_null() && session.as_object().expect("an object").contains_key(field));
    }
    assert!(session["runId"].as_str().expect("a run").starts_with("run_"));
    assert_eq!(session["runId"], session["currentRunId"]);
    for path in [at(&session), format!("{SESSIONS}/chat%2F%C3%BC%201")] {
        let found = server.get(&path).await.expect(200);
        assert_eq!(found["id"], session["id"]);
        assert_eq!(found["tags"], json!(["a", "b"]));
    }
}

#[tokio::test]
async fn a_repeated_create_finds_the_session_and_rewrites_only_its_trigger_config() {
    let server = TestServer::start().await;
    let first = server.create(json!({"externalId": "x", "tags": ["a"]})).await;
    server.clock.advance(Duration::from_secs(5));
    let again = json!({
        "type": "chat", "taskIdentifier": "agent", "externalId": "x", "tags": ["b"],
        "metadata": {"m": 1}, "triggerConfig": {"basePayload": {"v": 2}},
    });
    let second = server.post(SESSIONS, &again).await.expect(200);
    assert_eq!(second["isCached"], true);
    for field in ["id", "runId", "tags", "metadata", "createdAt"] {
        assert_eq!(second[field], first[field], "{field}");
    }
    assert_eq!(second["triggerConfig"]["basePayload"], json!({"v": 2}));
    let third = server.post(SESSIONS, &again).await.expect(200);
    assert_eq!(third["updatedAt"], second["updatedAt"], "nothing changed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_creates_at_once_exactly_one_makes_the_session() {
    let server = TestServer::start().await;
    let body = json!({"type": "chat", "taskIdentifier": "agent", "externalId": "race"});
    let creates = (0..32).map(|_| server.post(SESSIONS, &body));
    let answers: Vec<Value> =
        futures_util::future::join_all(creates).await.iter().map(Answer::json).collect();
    let made = answers.iter().filter(|answer| answer["isCached"] == false).count();
    let ids: BTreeSet<_> = answers.iter().map(|answer| answer["id"].as_str().expect("an id")).collect();
    assert_eq!((made, ids.len()), (1, 1));
}

#[tokio::test]
async fn the_request_key_makes_a_retry_find_a_session_without_external_id() {
    let server = TestServer::start().await;
    let create = async |key: &str| {
        let body = json!({"type": "chat", "taskIdentifier": "agent"});
        let request = server.request(Method::POST, SESSIONS).json(&body);
        server.send(request.header("x-trigger-request-idempotency-key", key)).await.json()
    };
    let (first, retry, other) = (create("k1").await, create("k1").await, create("k2").await);
    assert_eq!(first["id"], retry["id"]);
    assert_eq!((&first["isCached"], &retry["isCached"]), (&json!(false), &json!(true)));
    assert_ne!(first["id"], other["id"]);
}

#[tokio::test]
async fn an_update_replaces_clears_and_moves_the_external_id() {
    let server = TestServer::start().await;
    let session = server.create(json!({"externalId": "old", "tags": ["a"], "metadata": {"m": 1}})).await;
    let other = server.create(json!({"externalId": "taken"})).await;
    let patch = async |path: &str, body: Value| server.json(Method::PATCH, path, &body).await;
    let path = format!("{SESSIONS}/old");

    let updated = patch(&path, json!({"tags": ["b", "c"]})).await.expect(200);
    assert_eq!((&updated["tags"], &updated["metadata"]), (&json!(["b", "c"]), &json!({"m": 1})));
    let updated = patch(&path, json!({"metadata": null})).await.expect(200);
    assert!(updated["metadata"].is_null());
    let answer = patch(&path, json!({"externalId": "taken"})).await;
    assert_eq!(
        (answer.expect(409)["code"].as_str(), answer.header("x-should-retry")),
        (Some("conflict"), Some("false"))
    );
    patch(&path, json!({"externalId": "session_x"})).await.expect(422);

    let moved = patch(&path, json!({"externalId": "new"})).await.expect(200);
    assert_eq!(moved["id"], session["id"]);
    server.get(&path).await.expect(404);
    assert_eq!(server.get(&format!("{SESSIONS}/new")).await.expect(200)["id"], session["id"]);
    patch(&at(&other), json!({"externalId": null})).await.expect(200);
    patch(&at(&session), json!({"externalId": "taken"})).await.expect(200);
    assert_eq!(server.get(&format!("{SESSIONS}/taken")).await.expect(200)["id"], session["id"]);
}

#[tokio::test]
async fn a_reused_external_id_never_reads_the_old_sessions_log() {
    let server = TestServer::start().await;
    let old = server.create(json!({"externalId": "reused"})).await;
    server.append("reused", "in", "old words").await;
    server.json(Method::PATCH, &at(&old), &json!({"externalId": null})).await.expect(200);
    let new = server.create(json!({"externalId": "reused"})).await;
    assert_ne!(old["id"], new["id"]);
    let records = |session: &str| format!("/realtime/v1/sessions/{session}/in/records");
    assert_eq!(server.get(&records("reused")).await.expect(200)["records"], json!([]));
    assert_eq!(server.append("reused", "in", "new words").await, 0);
    let of_old = server.get(&records(old["id"].as_str().expect("an id"))).await.expect(200);
    assert_eq!(of_old["records"][0]["data"], "old words");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_close_wins_and_every_close_answers_its_row() {
    let server = TestServer::start().await;
    let session = server.create(json!({"externalId": "c"})).await;
    let path = format!("{}/close", at(&session));
    let closes = (0..16).map(|n| {
        let (server, path) = (&server, &path);
        async move { server.post(path, &json!({"reason": format!("reason {n}")})).await.expect(200) }
    });
    let answers: Vec<Value> = futures_util::future::join_all(closes).await;
    assert!(answers.iter().all(|answer| answer["closedReason"] == answers[0]["closedReason"]));
    server.clock.advance(Duration::from_secs(9));
    let late = server.post(&format!("{SESSIONS}/c/close"), &json!({"reason": "late"})).await.expect(200);
    assert_eq!(late["closedAt"], answers[0]["closedAt"]);
    let again = json!({"type": "chat", "taskIdentifier": "agent", "externalId": "c"});
    let refused = server.post(SESSIONS, &again).await;
    let error = refused.expect(409);
    assert_eq!(error["error"], "Session is closed; use a different externalId to create a new session");
    assert_eq!(refused.header("x-should-retry"), Some("false"));
}

#[tokio::test]
async fn a_session_expires_at_its_moment_and_stays_expired() {
    let server = TestServer::start().await;
    let past =
        json!({"type": "chat", "taskIdentifier": "agent", "externalId": "p", "expiresAt": "2025-01-01"});
    assert_eq!(server.post(SESSIONS, &past).await.expect(422)["details"][0]["field"], "expiresAt");
    server.get(&format!("{SESSIONS}/p")).await.expect(404);
    let unset = json!({"type": "chat", "taskIdentifier": "agent", "expiresAt": null});
    assert!(server.post(SESSIONS, &unset).await.expect(201)["expiresAt"].is_null());

    server.create(json!({"externalId": "e", "expiresAt": "2026-01-01T00:01:00Z"})).await;
    server.append("e", "in", "in time").await;
    let expired =
        async || ids(&server.get(&format!("{SESSIONS}?filter[status]=EXPIRED")).await.expect(200)).len();
    server.clock.advance(Duration::from_millis(59_999));
    assert_eq!(expired().await, 0);
    server.append("e", "in", "just in time").await;
    server.clock.advance(Duration::from_millis(1));
    assert_eq!(expired().await, 1);
    let late = server.request(Method::POST, "/realtime/v1/sessions/e/in/append").body("late");
    assert_eq!(server.send(late).await.expect(400)["error"], "Cannot append to an expired session");
    let again = json!({"type": "chat", "taskIdentifier": "agent", "externalId": "e"});
    server.post(SESSIONS, &again).await.expect(409);
    let closed = server.post(&format!("{SESSIONS}/e/close"), &json!({})).await.expect(200);
    assert!(closed["closedAt"].is_string() && closed["status"] == "CLOSED");
    assert_eq!(expired().await, 0, "closed wins over expired");
}

#[tokio::test]
async fn every_filter_selects_what_it_names() {
    let server = TestServer::start().await;
    let mut made = Vec::new();
    for (index, (kind, task, tags)) in
        [("chat", "a", vec!["x"]), ("chat", "b", vec!["y", "z,w"]), ("job", "b", vec!["x", "y"])]
            .into_iter()
            .enumerate()
    {
        server.clock.advance(Duration::from_secs(3600));
        let body =
            json!({"type": kind, "taskIdentifier": task, "tags": tags, "externalId": format!("f{index}")});
        made.push(server.create(body).await["id"].as_str().expect("an id").to_owned());
    }
    server.post(&format!("{SESSIONS}/f0/close"), &json!({})).await.expect(200);
    let now = 1_767_225_600_000_i64;
    for (query, wanted) in [
        (String::new(), vec![2, 1, 0]),
        ("filter[type]=chat".into(), vec![1, 0]),
        ("filter[type]=chat,job".into(), vec![2, 1, 0]),
        ("filter[taskIdentifier]=b".into(), vec![2, 1]),
        ("filter[tags]=x".into(), vec![2, 0]),
        ("filter[tags]=x,y".into(), vec![2, 1, 0]),
        ("filter[tags]=z,w".into(), vec![1]),
        ("filter[externalId]=f1".into(), vec![1]),
        ("filter[status]=ACTIVE,CLOSED".into(), vec![2, 1, 0]),
        ("filter[status]=CLOSED".into(), vec![0]),
        ("filter[status]=ACTIVE&filter[type]=chat".into(), vec![1]),
        ("filter[createdAt][period]=90m".into(), vec![2, 1]),
        (format!("filter[createdAt][from]={}", now + 7_200_000), vec![2, 1]),
        (format!("filter[createdAt][to]={}", now + 7_200_000), vec![1, 0]),
    ] {
        let found = ids(&server.get(&format!("{SESSIONS}?{query}")).await.expect(200));
        let wanted: Vec<_> = wanted.iter().map(|index: &usize| made[*index].clone()).collect();
        assert_eq!(found, wanted, "{query}");
    }
}

#[tokio::test]
async fn paging_goes_both_ways_without_a_skip_or_a_repeat() {
    let server = TestServer::start().await;
    let mut made = Vec::new();
    for index in 0..7 {
        made.push(
            server.create(json!({"externalId": format!("p{index}")})).await["id"]
                .as_str()
                .expect("id")
                .to_owned(),
        );
    }
    made.sort_unstable_by(|a, b| b.cmp(a));
    let page = async |query: &str| server.get(&format!("{SESSIONS}?page[size]=3{query}")).await.expect(200);
    let cursor = |page: &Value, way: &str| page["pagination"][way].as_str().map(str::to_owned);

    let first = page("").await;
    assert_eq!(cursor(&first, "previous"), None);
    let second = page(&format!("&page[after]={}", cursor(&first, "next").expect("more"))).await;
    let third = page(&format!("&page[after]={}", cursor(&second, "next").expect("more"))).await;
    assert_eq!(cursor(&third, "next"), None);
    assert_eq!([ids(&first), ids(&second), ids(&third)].concat(), made);

    let back = page(&format!("&page[before]={}", cursor(&third, "previous").expect("more"))).await;
    assert_eq!(ids(&back), ids(&second));
    let short = page(&format!("&page[before]={}", cursor(&back, "previous").expect("more"))).await;
    assert_eq!(ids(&short), ids(&first));
    let again = page(&format!(
        "&page[after]={}",
        cursor(&short, "next").expect("a backward page knows what follows")
    ))
    .await;
    assert_eq!(ids(&again), ids(&second));

    let both = |after: &Value, before: &Value| {
        let [after, before] =
            [cursor(after, "next"), cursor(before, "previous")].map(|one| one.expect("more"));
        format!("{SESSIONS}?page[size]=3&page[after]={after}&page[before]={before}")
    };
    let sdk = async |path: &str| {
        let request = server.request(Method::GET, path).header("trigger-version", "4.8.3");
        ids(&server.send(request).await.expect(200))
    };
    server.get(&both(&first, &third)).await.expect(400);
    assert_eq!(sdk(&both(&first, &third)).await, ids(&second), "the SDK sends both, and means the newer one");
    assert_eq!(sdk(&both(&back, &third)).await, ids(&third));
}

#[tokio::test]
async fn another_environments_session_is_indistinguishable_from_an_unknown_one() {
    let server = TestServer::start().await;
    let session = server.create(json!({"externalId": "mine"})).await;
    let (_, stranger) = server.environment("other").await;
    let id = session["id"].as_str().expect("an id");
    let unknown = format!("{}0", &id[..id.len() - 1]);
    for (method, suffix, body) in [
        (Method::GET, "", None),
        (Method::PATCH, "", Some(json!({"tags": []}))),
        (Method::POST, "/close", Some(json!({}))),
    ] {
        let answer = async |name: &str| {
            let mut request =
                server.request_as(&stranger, method.clone(), &format!("{SESSIONS}/{name}{suffix}"));
            if let Some(body) = &body {
                request = request.json(body);
            }
            let answer = server.send(request).await;
            (answer.status, answer.text)
        };
        assert_eq!(answer(id).await, answer(&unknown).await);
        assert_eq!(answer("mine").await, answer("nobodys").await);
        assert_eq!(answer(id).await.0.as_u16(), 404);
    }
    let theirs = server.send(server.request_as(&stranger, Method::GET, SESSIONS)).await.expect(200);
    assert_eq!(theirs["data"], json!([]));
}

#[tokio::test]
async fn what_was_written_is_there_after_a_restart() {
    let server = TestServer::start().await;
    let session = server.create(json!({"externalId": "kept", "metadata": {"a": [1, {"b": null}]}})).await;
    server.append("kept", "in", "one").await;
    server.post(&format!("{SESSIONS}/kept/close"), &json!({"reason": "done"})).await.expect(200);
    let server = server.restart().await;
    let found = server.get(&at(&session)).await.expect(200);
    assert_eq!((&found["metadata"], &found["closedReason"]), (&session["metadata"], &json!("done")));
    let late = server.request(Method::POST, "/realtime/v1/sessions/kept/in/append").body("late");
    assert_eq!(server.send(late).await.expect(409)["code"], "session_closed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_server_runs_on_postgres() {
    let database = TestDatabase::postgres().await;
    let server = TestServer::start_with(|config| {
        config.metadata.url = Some(database.url.clone().into());
        config.auth.master_key = Some("5e".repeat(32).into());
    })
    .await;
    let session = server
        .create(json!({"externalId": "p", "tags": ["a"], "metadata": {"deep": [1, {"x": null}]}}))
        .await;
    server.append("p", "in", "one").await;
    server.json(Method::PATCH, &at(&session), &json!({"tags": ["b"]})).await.expect(200);
    let listed = server.get(&format!("{SESSIONS}?filter[tags]=b&filter[status]=ACTIVE")).await.expect(200);
    assert_eq!(ids(&listed), [session["id"].as_str().expect("an id")]);
    assert_eq!(listed["data"][0]["metadata"], session["metadata"]);
    server.post(&format!("{SESSIONS}/p/close"), &json!({"reason": "done"})).await.expect(200);
    let late = server.request(Method::POST, "/realtime/v1/sessions/p/in/append").body("late");
    server.send(late).await.expect(409);
    let again = json!({"type": "chat", "taskIdentifier": "agent", "externalId": "p"});
    server.post(SESSIONS, &again).await.expect(409);
    assert!(!server.data().join("metadata.db").exists() && !server.data().join("master.key").exists());
}
