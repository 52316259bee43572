//! Records over REST and SSE: append, read, follow, resume.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::sse::End;
use crate::harness::{SseReader, TestServer};

const HOUR: Duration = Duration::from_secs(3600);

fn path(session: &str, io: &str) -> String {
    format!("/realtime/v1/sessions/{session}/{io}")
}

/// The text that an append stored, out of a record of a batch.
fn text(record: &Value) -> String {
    let envelope: Value =
        serde_json::from_str(record["body"].as_str().expect("a body")).expect("an envelope");
    envelope["data"].as_str().expect("text").to_owned()
}

#[tokio::test]
async fn what_is_appended_is_read_back_with_its_part_id_and_number() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    for body in ["{\"a\":1}", "", "zwei \u{1f600}\n\"quoted\""] {
        server.append("s", "in", body).await;
    }
    let with_part = server.request(Method::POST, &format!("{}/append", path("s", "in")));
    let answer = server.send(with_part.header("X-Part-Id", "mine").body("four")).await.expect(200);
    assert_eq!(answer, json!({"ok": true, "seq": 3}));
    let records = server.get(&format!("{}/records", path("s", "in"))).await.expect(200);
    let records = records["records"].as_array().expect("records");
    let data: Vec<_> = records.iter().map(|record| record["data"].as_str().expect("text")).collect();
    assert_eq!(data, ["{\"a\":1}", "", "zwei \u{1f600}\n\"quoted\"", "four"]);
    assert_eq!(records[3]["id"], "mine");
    let numbers: Vec<_> = records.iter().map(|record| record["seqNum"].as_u64().expect("a number")).collect();
    assert_eq!(numbers, [0, 1, 2, 3]);
    assert_eq!(server.get(&format!("{}/records", path("s", "out"))).await.expect(200)["records"], json!([]));
}

#[tokio::test]
async fn a_repeated_part_id_answers_the_first_number_and_another_body_is_refused() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let append = async |server: &TestServer, part: &str, body: &str| {
        let request = server.request(Method::POST, &format!("{}/append", path("s", "in")));
        server.send(request.header("X-Part-Id", part).body(body.to_owned())).await
    };
    assert_eq!(append(&server, "p", "one").await.expect(200)["seq"], 0);
    server.append("s", "in", "between").await;
    assert_eq!(append(&server, "p", "one").await.expect(200)["seq"], 0);
    assert_eq!(append(&server, "p", "two").await.expect(422)["code"], "idempotency_mismatch");
    let server = server.restart().await;
    assert_eq!(append(&server, "p", "one").await.expect(200)["seq"], 0);
    assert_eq!(append(&server, "q", "three").await.expect(200)["seq"], 2);
    assert_eq!(append(&server, &"x".repeat(256), "fits").await.expect(200)["seq"], 3);
    append(&server, &"x".repeat(257), "over").await.expect(422);
    // A reader drops a record whose id it has seen: this one would hide the close.
    append(&server, "session-closed:session_x", "hides").await.expect(422);
}

#[tokio::test]
async fn a_forged_webhook_source_is_removed_on_the_way_in_only() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let forged = r#"{"kind":"message","payload":{"actionSource":"webhook","a":1}}"#;
    for (io, stored) in [("in", r#"{"kind":"message","payload":{"a":1}}"#), ("out", forged)] {
        server.append("s", io, forged).await;
        let records = server.get(&format!("{}/records", path("s", io))).await.expect(200);
        assert_eq!(records["records"][0]["data"], stored);
    }
}

#[tokio::test]
async fn records_are_read_after_a_cursor_and_paged_only_when_asked() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    for index in 0..25 {
        server.append("s", "in", &index.to_string()).await;
    }
    let read = async |query: &str| server.get(&format!("{}/records{query}", path("s", "in"))).await;
    let count = |answer: &Value| answer["records"].as_array().expect("records").len();
    assert_eq!(count(&read("").await.expect(200)), 25);
    let after = read("?afterEventId=9").await.expect(200);
    assert_eq!((count(&after), &after["records"][0]["seqNum"]), (15, &json!(10)));
    assert_eq!(count(&read("?afterEventId=24").await.expect(200)), 0);
    assert_eq!(count(&read("?afterEventId=999").await.expect(200)), 0);
    let page = read("?limit=10").await.expect(200);
    assert_eq!((count(&page), &page["next"]), (10, &json!("9")));
    let last = read("?afterEventId=19&limit=10").await.expect(200);
    assert_eq!((count(&last), last.get("next")), (5, None));
    for query in ["?afterEventId=x", "?afterEventId=-1", "?limit=0", "?limit=1001", "?limit=x"] {
        assert_eq!(read(query).await.expect(400)["error"], "Query Error", "{query}");
    }
}

#[tokio::test]
async fn a_stream_has_the_head_and_the_frames_that_clients_need() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    server.append("s", "out", "one").await;
    let mut follower = server.follow("s", "out", &[]).await.ok();
    let header = |name: &str| follower.response.headers()[name].to_str().expect("text").to_owned();
    assert_eq!(header("content-type"), "text/event-stream");
    assert_eq!(header("cache-control"), "no-cache, no-transform");
    assert_eq!(header("x-accel-buffering"), "no");
    assert_eq!(header("x-stream-version"), "v2");
    let batch = follower.next().await.expect("a batch");
    assert_eq!(batch.name, "batch");
    let (seq, record) = batch.records().remove(0);
    assert_eq!((seq, text(&record)), (0, "one".to_owned()));
    assert!(record.get("headers").is_none(), "empty headers are left out");
    let id: Vec<u64> =
        batch.id.expect("an id").split(',').map(|part| part.parse().expect("a number")).collect();
    let metered = 8 + record["body"].as_str().expect("a body").len() as u64;
    assert_eq!(id, [0, 1, metered]);
    let ping = follower.next().await.expect("a ping");
    assert_eq!((ping.name.as_str(), &ping.json()["tail"]["seq_num"]), ("ping", &json!(1)));
    server.append("s", "out", "two").await;
    let live = follower.next().await.expect("a batch");
    assert_eq!(live.json()["tail"]["seq_num"], 2);
    assert_eq!(live.records()[0].0, 1);
}

#[tokio::test]
async fn every_form_of_the_last_event_id_resumes_after_it() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    for index in 0..10 {
        server.append("s", "out", &index.to_string()).await;
    }
    for (id, first) in [("0", 1), ("4", 5), ("4-1", 5), ("4-", 5), ("4,5,300", 5), ("8", 9)] {
        let mut follower = server.follow("s", "out", &[("Last-Event-ID", id)]).await.ok();
        assert_eq!(follower.records(10 - first).await[0].0, first as u64, "{id}");
    }
    for id in ["9", "10", "123456"] {
        let mut follower = server.follow("s", "out", &[("Last-Event-ID", id)]).await.ok();
        assert_eq!(follower.next().await.expect("a ping").name, "ping", "{id}");
        let seq = server.append("s", "out", "more").await;
        assert_eq!(follower.records(1).await[0].0, seq, "{id}");
    }
    for id in ["-1", "x", "1.5", "4,5", "4,5,x"] {
        let refused = server.follow("s", "out", &[("Last-Event-ID", id)]).await;
        assert_eq!(refused.response.status().as_u16(), 400, "{id:?}");
    }
    let mut latest = server.follow("s", "out", &[("X-Trigger-Stream-Start", "latest")]).await.ok();
    assert_eq!(latest.next().await.expect("a ping").name, "ping");
    let seq = server.append("s", "out", "newest").await;
    assert_eq!(latest.records(1).await[0].0, seq);
}

#[tokio::test]
async fn a_cursor_beyond_the_tail_goes_on_at_the_tail_and_the_answer_says_it() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    server.append("s", "out", "only").await;
    let origin = ("Origin", "https://app.example");
    for (session, io, id, tail) in [
        ("s", "out", "0", None),
        ("s", "out", "1", Some("1")),
        ("s", "out", "7,8,900", Some("1")),
        ("s", "out", "18446744073709551615", Some("1")),
        ("s", "in", "0", Some("0")),
        ("s", "channels/side/in", "0", Some("0")),
        ("nobody-yet", "out", "5", None),
    ] {
        let mut follower = server.follow(session, io, &[("Last-Event-ID", id), origin]).await.ok();
        let header = follower.response.headers().get("x-cursor-ahead").cloned();
        assert_eq!(header.as_ref().map(|value| value.to_str().expect("digits")), tail, "{session} {io} {id}");
        if session == "s" && io == "out" {
            assert_eq!(follower.next().await.expect("a ping").json()["tail"]["seq_num"], 1, "{id}");
        }
        let after = id.split(',').next().expect("a number");
        let read =
            server.request(Method::GET, &format!("{}/records?afterEventId={after}", path(session, io)));
        let read = server.send(read.header(origin.0, origin.1)).await;
        assert_eq!(read.header("x-cursor-ahead"), tail, "{session} {io} {id}");
        assert!(read.header("access-control-expose-headers").expect("exposed").contains("X-Cursor-Ahead"));
        assert_eq!(read.expect(200), json!({"records": []}));
    }
    let unasked = server.follow("s", "out", &[]).await.ok();
    assert_eq!(unasked.response.headers().get("x-cursor-ahead"), None);
    let metrics = server.http.get(format!("{}/metrics", server.url)).send().await.expect("an answer");
    let metrics = metrics.text().await.expect("text");
    assert!(metrics.contains("\nsessiond_cursors_ahead_total 10\n"), "{metrics}");
}

#[tokio::test]
async fn a_follower_waits_for_a_session_that_does_not_exist_yet() {
    let server = TestServer::start().await;
    let mut early = server.follow("later", "in", &[]).await.ok();
    let mut renamed = server.follow("renamed", "in", &[("X-Trigger-Stream-Start", "latest")]).await.ok();
    server.create(json!({"externalId": "later"})).await;
    server.append("later", "in", "first").await;
    assert_eq!(text(&early.records(1).await[0].1), "first");
    let other = server.create(json!({"externalId": "other"})).await;
    let id = other["id"].as_str().expect("an id");
    let rename = json!({"externalId": "renamed"});
    server.json(Method::PATCH, &format!("/api/v1/sessions/{id}"), &rename).await.expect(200);
    server.append("renamed", "in", "second").await;
    assert_eq!(text(&renamed.records(1).await[0].1), "second");
    let unknown = server.follow("session_00000000000000000000000000", "in", &[]).await;
    assert_eq!(unknown.response.status().as_u16(), 404);
}

async fn ends_clean(follower: &mut SseReader, reason: &str) {
    let (events, end) = follower.rest().await;
    let [.., why, last] = events.as_slice() else { panic!("{events:?}") };
    assert_eq!((why.name.as_str(), why.json()), ("end", json!({"reason": reason})));
    assert_eq!((last.data.as_str(), end), ("[DONE]", End::Clean));
}

#[tokio::test]
async fn a_close_gives_followers_the_rest_and_then_a_clean_end() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    server.append("s", "out", "one").await;
    let mut live = server.follow("s", "out", &[]).await.ok();
    let mut unwritten = server.follow("s", "in", &[]).await.ok();
    live.records(1).await;
    server.append("s", "out", "two").await;
    server.post("/api/v1/sessions/s/close", &json!({"reason": "over"})).await.expect(200);
    live.records(1).await;
    ends_clean(&mut live, "closed").await;
    ends_clean(&mut unwritten, "closed").await;
    let mut late = server.follow("s", "out", &[]).await.ok();
    assert_eq!(late.response.headers()["x-session-settled"], "true");
    late.records(2).await;
    ends_clean(&mut late, "closed").await;
    for (io, status) in [("in", 409), ("out", 400)] {
        let answer =
            server.send(server.request(Method::POST, &format!("{}/append", path("s", io))).body("x")).await;
        let error = answer.expect(status);
        assert_eq!(error["ok"], false);
        assert_eq!(error["error"], "Cannot append to a closed session");
        assert_eq!((&error["code"], &error["closedReason"]), (&json!("session_closed"), &json!("over")));
        assert_eq!(answer.header("x-should-retry"), Some("false"));
    }
}

#[tokio::test]
async fn an_expiry_ends_followers_cleanly() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s", "expiresAt": "2026-01-01T00:00:30Z"})).await;
    let mut follower = server.follow("s", "out", &[("Timeout-Seconds", "600")]).await.ok();
    server.append("s", "out", "one").await;
    follower.records(1).await;
    assert!(!follower.response.headers().contains_key("x-session-settled"));
    server.clock.advance(Duration::from_secs(30));
    ends_clean(&mut follower, "expired").await;
    let mut late = server.follow("s", "out", &[]).await.ok();
    assert_eq!(late.response.headers()["x-session-settled"], "true");
    late.records(1).await;
    ends_clean(&mut late, "expired").await;
}

#[tokio::test]
async fn the_timeout_bounds_the_gap_between_records_and_pings_do_not_count() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let mut follower = server.follow("s", "out", &[("Timeout-Seconds", "60")]).await.ok();
    assert_eq!(follower.next().await.expect("a ping").name, "ping");
    for _ in 0..3 {
        server.clock.advance(Duration::from_secs(40));
        assert_eq!(follower.next().await.expect("a ping").name, "ping");
        server.append("s", "out", "again").await;
        follower.records(1).await;
    }
    server.clock.advance(Duration::from_secs(61));
    ends_clean(&mut follower, "idle").await;
    for value in ["0", "601", "abc", "-1", "1.5", ""] {
        let refused = server.follow("s", "out", &[("Timeout-Seconds", value)]).await;
        assert_eq!(refused.response.status().as_u16(), 400, "{value:?}");
    }
    server.follow("s", "out", &[("Timeout-Seconds", "600")]).await.ok();
}

#[tokio::test]
async fn a_thousand_records_reach_a_resuming_follower_once_each_across_restarts() {
    let mut server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let (mut next, mut written) = (0_u64, 0_u64);
    for round in 0..5 {
        let last = next.checked_sub(1).map(|last| last.to_string());
        let headers: Vec<_> = last.iter().map(|last| ("Last-Event-ID", last.as_str())).collect();
        let mut follower = server.follow("s", "out", &headers).await.ok();
        let appends = async {
            for index in 0..200 {
                server.append("s", "out", &format!("{round}/{index}")).await;
            }
        };
        let reads = async { follower.records(120).await };
        let ((), records) = tokio::join!(appends, reads);
        written += 200;
        assert_eq!(records[0].0, next);
        next = records.last().expect("records").0 + 1;
        drop(follower);
        server = server.restart().await;
    }
    let last = (next - 1).to_string();
    let mut follower = server.follow("s", "out", &[("Last-Event-ID", &last)]).await.ok();
    let rest = follower.records(usize::try_from(written - next).expect("fits")).await;
    assert_eq!(rest.last().expect("records").0, written - 1);
}

#[tokio::test]
async fn side_channels_are_logs_of_their_own() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let side = |name: &str, io: &str| format!("/realtime/v1/sessions/s/channels/{name}/{io}");
    let name = "a.B-9_".to_owned() + &"x".repeat(122);
    for (index, channel) in ["tools", &name].into_iter().enumerate() {
        let request =
            server.request(Method::POST, &format!("{}/append", side(channel, "out"))).body(index.to_string());
        assert_eq!(server.send(request).await.expect(200)["seq"], 0);
        let records = server.get(&format!("{}/records", side(channel, "out"))).await.expect(200);
        assert_eq!(records["records"][0]["data"], index.to_string());
    }
    assert_eq!(server.get(&format!("{}/records", path("s", "out"))).await.expect(200)["records"], json!([]));
    for bad in ["x".repeat(129), "a%2Fb".to_owned(), "%C3%BC".to_owned(), "a%00".to_owned()] {
        server.get(&format!("{}/records", side(&bad, "out"))).await.expect(400);
    }
    server.get("/realtime/v1/sessions/s/sideways/records").await.expect(400);
    server.post("/api/v1/sessions/s/close", &json!({})).await.expect(200);
    let late = server.request(Method::POST, &format!("{}/append", side("tools", "in"))).body("late");
    server.send(late).await.expect(409);
    let token = server.token(&["write:sessions:s"], HOUR).await;
    let denied =
        server.request_as(&token, Method::POST, &format!("{}/append", side("tools", "out"))).body("x");
    server.send(denied).await.expect(403);
}

#[tokio::test]
async fn the_head_names_the_last_record() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let head = async || {
        let answer = server.send(server.request(Method::HEAD, &path("s", "out"))).await;
        answer.header("x-last-chunk-index").expect("an index").to_owned()
    };
    assert_eq!(head().await, "0");
    for body in ["a", "b", "c"] {
        server.append("s", "out", body).await;
    }
    assert_eq!(head().await, "2");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_followers_and_writers_see_one_order() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let mut followers = Vec::new();
    for _ in 0..10 {
        followers.push(server.follow("s", "in", &[]).await.ok());
    }
    let writers = (0..8).map(|writer| {
        let server = &server;
        async move {
            for index in 0..50 {
                server.append("s", "in", &format!("{writer}/{index}")).await;
            }
        }
    });
    let reads = followers.iter_mut().map(|follower| follower.records(400));
    let (_, seen) =
        tokio::join!(futures_util::future::join_all(writers), futures_util::future::join_all(reads));
    let bodies =
        |records: &Vec<(u64, Value)>| records.iter().map(|(_, record)| text(record)).collect::<Vec<_>>();
    let first = bodies(&seen[0]);
    assert!(seen.iter().all(|records| bodies(records) == first));
    for writer in 0..8 {
        let own: Vec<_> = first.iter().filter(|body| body.starts_with(&format!("{writer}/"))).collect();
        assert!(
            (0..50).all(|index| own[index] == &format!("{writer}/{index}")),
            "a writer's own order holds"
        );
    }
}
