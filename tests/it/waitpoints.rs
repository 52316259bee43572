//! Waiting for input through the wire: what ends a wait, once; who may see and answer it; how it is found.

mod graphql;
mod list;
mod long_poll;

use std::time::Duration;

use futures_util::future::join_all;
use reqwest::Method;
use sea_orm::{ConnectionTrait, Database};
use serde_json::{Value, json};

use crate::harness::TestServer;
use crate::harness::process::Process;
use crate::harness::server::{Answer, KEY};

/// A session `s` and the id of its run.
async fn session(server: &TestServer, extra: Value) -> String {
    let mut body = json!({"externalId": "s"});
    body.as_object_mut().expect("an object").extend(extra.as_object().cloned().expect("an object"));
    server.create(body).await["runId"].as_str().expect("a run").to_owned()
}

async fn try_wait(server: &TestServer, run: &str, extra: Value) -> Answer {
    let mut body = json!({"session": "s", "io": "in"});
    body.as_object_mut().expect("an object").extend(extra.as_object().cloned().expect("an object"));
    server.post(&format!("/api/v1/runs/{run}/session-streams/wait"), &body).await
}

async fn wait(server: &TestServer, run: &str, extra: Value) -> String {
    let answer = try_wait(server, run, extra).await.expect(200);
    assert_eq!(answer["isCached"], false, "{answer}");
    answer["waitpointId"].as_str().expect("an id").to_owned()
}

fn path(id: &str) -> String {
    format!("/api/v1/waitpoints/tokens/{id}")
}

/// As it is once it has ended, or as it still is after the time that a test has.
async fn ended(server: &TestServer, id: &str) -> Value {
    server.get(&format!("{}?wait=300", path(id))).await.expect(200)
}

async fn answer(server: &TestServer, bearer: &str, id: &str, data: &Value) -> Answer {
    let request = server.request_as(bearer, Method::POST, &format!("{}/complete", path(id)));
    server.send(request.json(&json!({"data": data}))).await
}

#[tokio::test]
async fn the_first_record_after_the_last_seen_one_ends_a_wait() {
    let server = TestServer::start().await;
    let run = session(&server, json!({})).await;
    server.append("s", "in", "seen").await;
    let id = wait(&server, &run, json!({"lastSeqNum": 0})).await;
    let block = format!("/engine/v1/runs/{run}/waitpoints/tokens/{id}/wait");
    assert_eq!(server.post(&block, &json!({})).await.expect(200), json!({"success": true}));
    assert_eq!(server.get(&path(&id)).await.expect(200)["status"], "WAITING");
    server.append("s", "out", "another channel").await;
    server.append("s/channels/a", "in", "another channel too").await;
    assert_eq!(server.get(&path(&id)).await.expect(200)["status"], "WAITING");
    server.append("s", "in", r#"{"n":1}"#).await;
    server.append("s", "in", r#"{"n":2}"#).await;
    let ended = ended(&server, &id).await;
    assert_eq!(ended["status"], "COMPLETED", "{ended}");
    assert_eq!((&ended["seqNum"], &ended["output"]), (&json!(1), &json!(r#"{"n":1}"#)), "{ended}");
    assert_eq!((&ended["outputType"], &ended["outputIsError"]), (&json!("application/json"), &json!(false)));
    assert_eq!((&ended["runId"], &ended["io"]), (&json!(run), &json!("in")));
}

#[tokio::test]
async fn a_record_that_was_there_before_ends_a_wait_at_once() {
    let server = TestServer::start().await;
    let run = session(&server, json!({})).await;
    for text in ["a", "b", "c"] {
        server.append("s", "in", text).await;
    }
    for (last, seq_num) in [(json!({}), 0), (json!({"lastSeqNum": 0}), 1), (json!({"lastSeqNum": 1}), 2)] {
        let id = wait(&server, &run, last).await;
        let found = server.get(&path(&id)).await.expect(200);
        assert_eq!((&found["status"], &found["seqNum"]), (&json!("COMPLETED"), &json!(seq_num)), "{found}");
    }
    let id = wait(&server, &run, json!({"lastSeqNum": 2})).await;
    assert_eq!(server.get(&path(&id)).await.expect(200)["status"], "WAITING");
    let ahead = try_wait(&server, &run, json!({"lastSeqNum": 3})).await.expect(422);
    assert_eq!(ahead["details"][0]["field"], "lastSeqNum", "{ahead}");
}

#[tokio::test]
async fn of_many_concurrent_appends_and_looks_one_ends_the_wait_for_everybody() {
    let server = TestServer::start().await;
    let run = session(&server, json!({})).await;
    let ids = join_all((0..8).map(|_| wait(&server, &run, json!({})))).await;
    let looks = join_all(ids.iter().map(|id| ended(&server, id)));
    let appends = join_all((0..50).map(|n| {
        let server = &server;
        async move { server.append("s", "in", &n.to_string()).await }
    }));
    let (looks, _) = futures_util::join!(looks, appends);
    for (id, look) in ids.iter().zip(looks) {
        assert_eq!((&look["status"], &look["seqNum"]), (&json!("COMPLETED"), &json!(0)), "{look}");
        assert_eq!(server.get(&path(id)).await.expect(200), look);
    }
}

#[tokio::test]
async fn a_wait_times_out_and_stays_so() {
    let server = TestServer::start().await;
    let run = session(&server, json!({})).await;
    let id = wait(&server, &run, json!({"timeout": "10s"})).await;
    server.clock.advance(Duration::from_millis(9_900));
    assert_eq!(server.get(&path(&id)).await.expect(200)["status"], "WAITING");
    server.clock.advance(Duration::from_secs(1));
    let ended = ended(&server, &id).await;
    assert_eq!((&ended["status"], &ended["outcome"]), (&json!("TIMED_OUT"), &json!("timeout")), "{ended}");
    assert_eq!(ended["completedAt"], ended["timeoutAt"]);
    let output: Value = serde_json::from_str(ended["output"].as_str().expect("text")).expect("JSON");
    assert_eq!(
        (&ended["outputIsError"], &output["code"]),
        (&json!(true), &json!("TRIGGER_WAITPOINT_TIMEOUT"))
    );
    server.append("s", "in", "late").await;
    assert_eq!(server.get(&path(&id)).await.expect(200), ended);
}

#[tokio::test]
async fn a_record_and_the_timeout_race_and_everybody_sees_the_same_winner() {
    let server = TestServer::start().await;
    let run = session(&server, json!({})).await;
    for _ in 0..20 {
        let tail = server.append("s", "in", "before").await;
        let id = wait(&server, &run, json!({"timeout": "10s", "lastSeqNum": tail})).await;
        let append = server.append("s", "in", "maybe in time");
        let advance = async { server.clock.advance(Duration::from_secs(11)) };
        let (seq_num, (), look) = futures_util::join!(append, advance, ended(&server, &id));
        match look["status"].as_str() {
            Some("COMPLETED") => assert_eq!(look["seqNum"], seq_num, "{look}"),
            Some("TIMED_OUT") => assert_eq!(look["outcome"], "timeout", "{look}"),
            _ => panic!("{look}"),
        }
        assert_eq!(server.get(&path(&id)).await.expect(200), look);
    }
}

#[tokio::test]
async fn a_closed_session_ends_its_waits_at_once_but_not_those_that_a_record_has_ended() {
    let server = TestServer::start().await;
    let run = session(&server, json!({})).await;
    let waits = wait(&server, &run, json!({})).await;
    let out = wait(&server, &run, json!({"io": "out"})).await;
    let looks = async { futures_util::join!(ended(&server, &waits), ended(&server, &out)) };
    let act = async {
        server.append("s", "out", "said").await;
        server.post("/api/v1/sessions/s/close", &json!({"reason": "done"})).await.expect(200);
    };
    let ((closed, said), ()) = futures_util::join!(looks, act);
    assert_eq!((&closed["status"], &closed["outcome"]), (&json!("TIMED_OUT"), &json!("closed")), "{closed}");
    assert_eq!((&said["status"], &said["seqNum"]), (&json!("COMPLETED"), &json!(0)), "{said}");
    // A wait that comes too late is told so at once, and still gets what had come before.
    let late = wait(&server, &run, json!({})).await;
    assert_eq!(server.get(&path(&late)).await.expect(200)["outcome"], "closed");
    let late = wait(&server, &run, json!({"io": "out"})).await;
    assert_eq!(server.get(&path(&late)).await.expect(200)["outcome"], "record");
}

#[tokio::test]
async fn an_expired_session_ends_its_waits() {
    let server = TestServer::start().await;
    let run = session(&server, json!({"expiresAt": "2026-01-01T00:01:00Z"})).await;
    let id = wait(&server, &run, json!({"timeout": "1h"})).await;
    server.clock.advance(Duration::from_secs(61));
    assert_eq!(ended(&server, &id).await["outcome"], "expired");
}

#[tokio::test]
async fn commands_and_control_records_end_no_wait() {
    let server = TestServer::start().await;
    let run = session(&server, json!({})).await;
    server.append("s", "in", "seen").await;
    let id = wait(&server, &run, json!({"lastSeqNum": 0})).await;
    let trim = r#"mutation { trimChannel(input: {by: {externalId: "s"}, io: IN, before: "1"}) { userErrors { code } } }"#;
    let trimmed = server.post("/graphql", &json!({"query": trim})).await.expect(200);
    assert_eq!(trimmed["data"]["trimChannel"]["userErrors"], json!([]), "{trimmed}");
    assert_eq!(server.get(&path(&id)).await.expect(200)["status"], "WAITING");
    let seq_num = server.append("s", "in", "data").await;
    assert_eq!(ended(&server, &id).await["seqNum"], seq_num);
    assert!(seq_num > 1, "the trim has taken a place");
}

#[tokio::test]
async fn a_key_finds_the_same_wait_until_it_ends_and_only_on_its_channel() {
    let server = TestServer::start().await;
    let run = session(&server, json!({})).await;
    let keyed = json!({"idempotencyKey": "k", "idempotencyKeyTTL": "1h", "tags": ["a"]});
    let made = join_all((0..10).map(|_| try_wait(&server, &run, keyed.clone()))).await;
    let made: Vec<_> = made.iter().map(|answer| answer.expect(200)).collect();
    assert_eq!(made.iter().filter(|answer| answer["isCached"] == false).count(), 1, "{made:?}");
    assert!(made.iter().all(|answer| answer["waitpointId"] == made[0]["waitpointId"]), "{made:?}");
    let other = try_wait(&server, &run, json!({"idempotencyKey": "k", "io": "out"})).await.expect(200);
    assert_ne!(other["waitpointId"], made[0]["waitpointId"]);
    server.append("s", "in", "x").await;
    let again = try_wait(&server, &run, keyed.clone()).await.expect(200);
    assert_eq!((&again["waitpointId"], &again["isCached"]), (&made[0]["waitpointId"], &json!(true)));
    server.clock.advance(Duration::from_secs(3600));
    let fresh = try_wait(&server, &run, keyed).await.expect(200);
    assert_eq!(fresh["isCached"], false);
    assert_ne!(fresh["waitpointId"], made[0]["waitpointId"]);
}

#[tokio::test]
async fn an_answer_becomes_the_record_that_ends_the_wait_and_there_is_one_answer() {
    let server = TestServer::start().await;
    let run = session(&server, json!({})).await;
    server.append("s", "in", "seen").await;
    let id = wait(&server, &run, json!({"lastSeqNum": 0})).await;
    let yes = json!({"approved": true});
    let answers = join_all((0..10).map(|n| {
        let data = if n % 2 == 0 { yes.clone() } else { json!({"approved": n}) };
        let (server, id) = (&server, id.clone());
        async move { (data.clone(), answer(server, KEY, &id, &data).await) }
    }))
    .await;
    let ended = ended(&server, &id).await;
    let told: Value = serde_json::from_str(ended["output"].as_str().expect("text")).expect("JSON");
    for (data, answer) in &answers {
        assert_eq!(answer.status.as_u16(), if *data == told { 200 } else { 409 }, "{data} {answer:?}");
        if answer.status == 409 {
            assert_eq!(answer.header("x-should-retry"), Some("false"));
        }
    }
    let records = server.get("/realtime/v1/sessions/s/in/records").await.expect(200);
    assert_eq!(records["records"].as_array().expect("records").len(), 2, "{records}");
    assert_eq!(records["records"][1]["data"], ended["output"]);
    answer(&server, KEY, &id, &told).await.expect(200);
}

#[tokio::test]
async fn an_answer_that_comes_too_late_is_refused_and_not_stored() {
    let server = TestServer::start().await;
    let run = session(&server, json!({})).await;
    let by_record = wait(&server, &run, json!({})).await;
    server.append("s", "in", "first").await;
    let by_timeout = wait(&server, &run, json!({"timeout": "1s", "lastSeqNum": 0})).await;
    server.clock.advance(Duration::from_secs(2));
    for (id, error) in
        [(by_record, "The waitpoint is completed already"), (by_timeout, "The waitpoint has timed out")]
    {
        assert_eq!(answer(&server, KEY, &id, &json!("x")).await.expect(409)["error"], error);
    }
    let records = server.get("/realtime/v1/sessions/s/in/records").await.expect(200);
    assert_eq!(records["records"].as_array().expect("records").len(), 1);
}

#[tokio::test]
async fn waits_survive_kill_9_and_end_by_what_came_while_nobody_looked() {
    let data = tempfile::tempdir().expect("a folder");
    let process = Process::serve(data.path()).await;
    let http = reqwest::Client::new();
    let post = async |process: &Process, path: &str, body: Value| -> Value {
        let request = http.post(format!("{}{path}", process.url)).bearer_auth(KEY).json(&body);
        let answer = request.send().await.expect("an answer");
        let (status, text) = (answer.status(), answer.text().await.expect("a body"));
        assert!(status.is_success(), "{status} {text}");
        serde_json::from_str(&text).expect("JSON")
    };
    let get = async |process: &Process, id: &str, wait: u32| -> Value {
        let url = format!("{}{}?wait={wait}", process.url, path(id));
        let answer = http.get(url).bearer_auth(KEY).send().await.expect("an answer");
        answer.json().await.expect("JSON")
    };
    let mut sessions = Vec::new();
    for n in 0..5 {
        let body = json!({"type": "chat", "taskIdentifier": "agent", "externalId": format!("s{n}")});
        let run = post(&process, "/api/v1/sessions", body).await["runId"].clone();
        let wait = format!("/api/v1/runs/{}/session-streams/wait", run.as_str().expect("a run"));
        let body = json!({"session": format!("s{n}"), "io": "in"});
        let id = post(&process, &wait, body).await["waitpointId"].as_str().expect("an id").to_owned();
        sessions.push((format!("s{n}"), id));
    }
    let (last, rest) = sessions.split_last().expect("some");
    for (session, _) in rest {
        post(&process, &format!("/realtime/v1/sessions/{session}/in/append"), json!({"for": session})).await;
    }
    process.kill().await;
    // As if it had died between the append and the row, which no test can time.
    let database = Database::connect(format!("sqlite:{}", data.path().join("metadata.db").display()));
    let database = database.await.expect("the database");
    let undone = "UPDATE waitpoints SET completed_at = NULL, outcome = NULL, seq_num = NULL";
    database.execute_unprepared(undone).await.expect("undone");
    database.close().await.expect("closed");
    let process = Process::serve(data.path()).await;
    for (session, id) in rest {
        let found = get(&process, id, 0).await;
        assert_eq!((&found["status"], &found["seqNum"]), (&json!("COMPLETED"), &json!(0)), "{found}");
        assert!(found["output"].as_str().is_some_and(|text| text.contains(session.as_str())), "{found}");
    }
    let (session, id) = last;
    assert_eq!(get(&process, id, 0).await["status"], "WAITING");
    let append = format!("/realtime/v1/sessions/{session}/in/append");
    let (found, _) = futures_util::join!(get(&process, id, 300), post(&process, &append, json!(1)));
    assert_eq!(found["status"], "COMPLETED", "{found}");
}

#[tokio::test]
async fn every_refusal_says_what_clients_expect_and_nothing_more() {
    let server = TestServer::start().await;
    let run = session(&server, json!({})).await;
    server.create(json!({"externalId": "other"})).await;
    let id = wait(&server, &run, json!({"session": "other"})).await;
    for (run, extra, status, error) in [
        ("run_nothing", json!({}), 404, "Run not found"),
        ("nothing", json!({}), 404, "Run not found"),
        (&run, json!({"session": "nothing"}), 404, "Session not found"),
        (
            &run,
            json!({"idempotencyKey": "x".repeat(2049)}),
            422,
            "idempotencyKey must be 1 to 2048 characters, none of them NUL",
        ),
        (&run, json!({"tags": vec!["t"; 11]}), 422, "tags must hold at most 10 tags"),
        (&run, json!({"junk": "x".repeat(10_300)}), 413, "Request body too large"),
    ] {
        let refused = try_wait(&server, run, extra).await;
        assert_eq!(
            (refused.status.as_u16(), &refused.json()["error"]),
            (status, &json!(error)),
            "{refused:?}"
        );
    }
    let hour = Duration::from_secs(3600);
    let reader = server.token(&["read:sessions:s"], hour).await;
    let writer = server.token(&["write:sessions:s"], hour).await;
    let missing = "waitpoint_nothing";
    // A stranger cannot tell a waitpoint of another session from none.
    let get =
        async |bearer: &str, id: &str| server.send(server.request_as(bearer, Method::GET, &path(id))).await;
    assert_eq!(get(&reader, &id).await.expect(403), get(&reader, missing).await.expect(403));
    let refusals =
        [answer(&server, &writer, &id, &json!(1)).await, answer(&server, &writer, missing, &json!(1)).await];
    assert_eq!(refusals[0].expect(403), refusals[1].expect(403));
    assert_eq!(server.get(&path(missing)).await.expect(404)["error"], "Waitpoint not found");
    let (_, foreign) = server.environment("other").await;
    assert_eq!(get(&foreign, &id).await.expect(404), get(&foreign, missing).await.expect(404));
    // Nobody but a key waits, whatever its scopes.
    let admin = server.token(&["admin"], hour).await;
    let request =
        server.request_as(&admin, Method::POST, &format!("/api/v1/runs/{run}/session-streams/wait"));
    server.send(request.json(&json!({"session": "s", "io": "in"}))).await.expect(403);
    // A browser of the session reads and answers `.in`, and only `.in`.
    let mine = wait(&server, &run, json!({})).await;
    assert_eq!(get(&reader, &mine).await.expect(200)["status"], "WAITING");
    answer(&server, &reader, &mine, &json!(1)).await.expect(403);
    answer(&server, &writer, &mine, &json!(1)).await.expect(200);
    let out = wait(&server, &run, json!({"io": "out"})).await;
    answer(&server, &writer, &out, &json!(1)).await.expect(403);
    answer(&server, KEY, &out, &json!(1)).await.expect(200);
}
