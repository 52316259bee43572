//! Reads: once, as events, as frames; within bounds, waiting, and to their ends.

use std::time::Duration;

use reqwest::Method;
use s2_api::v1::stream::proto::ReadBatch;
use serde_json::{Value, json};

use crate::harness::TestServer;
use crate::harness::s2::{Heard, Stream};
use crate::harness::server::{KEY, START};
use crate::harness::sse::End;

/// Ten records, 13 metered bytes each, a second apart from the start on.
async fn ten(server: &TestServer) -> Stream {
    server.create(json!({"externalId": "s"})).await;
    let stream = server.wire().open("s", "out").await;
    for index in 0..10 {
        stream.append(&json!({"records": [{"body": format!("body{index}")}]})).await.expect(200);
        server.clock.advance(Duration::from_secs(1));
    }
    stream
}

fn numbers(batch: &Value) -> Vec<u64> {
    let records = batch["records"].as_array().expect("records");
    records.iter().map(|record| record["seq_num"].as_u64().expect("a number")).collect()
}

#[tokio::test]
async fn one_read_begins_and_ends_where_it_is_told() {
    let server = TestServer::start().await;
    let stream = ten(&server).await;
    let at = |second: i64| START.millis() + second * 1000;
    let metered = 8 + 5;
    for (query, from, to) in [
        ("?seq_num=0".to_owned(), 0, 10),
        ("?seq_num=7".to_owned(), 7, 10),
        ("?seq_num=2&count=3".to_owned(), 2, 5),
        ("?seq_num=0&count=0".to_owned(), 0, 0),
        ("?seq_num=99&count=0".to_owned(), 0, 0),
        ("?seq_num=0&bytes=0".to_owned(), 0, 0),
        (format!("?seq_num=1&bytes={}", 3 * metered), 1, 4),
        (format!("?seq_num=1&bytes={}", 3 * metered - 1), 1, 3),
        (format!("?seq_num=1&bytes={}", metered - 1), 0, 0),
        (format!("?seq_num=1&bytes={}&count=1", 3 * metered), 1, 2),
        (format!("?seq_num=1&until={}", at(4)), 1, 4),
        (format!("?seq_num=4&until={}", at(4)), 0, 0),
        (format!("?timestamp={}", at(6)), 6, 10),
        (format!("?timestamp={}", at(6) - 1), 6, 10),
        (format!("?timestamp={}&until={}", at(6), at(8)), 6, 8),
        ("?timestamp=0&count=1".to_owned(), 0, 1),
        ("?tail_offset=3".to_owned(), 7, 10),
        ("?tail_offset=99".to_owned(), 0, 10),
        ("?seq_num=5&count=5000".to_owned(), 5, 10),
    ] {
        let batch = stream.read(&query).await.expect(200);
        assert_eq!(numbers(&batch), (from..to).collect::<Vec<_>>(), "{query}");
        // The tail is told when the records are known to end at it.
        let tail = json!({"seq_num": 10, "timestamp": at(9)});
        assert_eq!(batch["tail"], if to == 10 { tail } else { Value::Null }, "{query}");
        let request = stream.request(Method::GET, &query).header("accept", "application/protobuf");
        let bytes = request.send().await.expect("an answer").bytes().await.expect("a body");
        let proto: ReadBatch = prost::Message::decode(bytes).expect("a batch");
        let same: Vec<_> = proto.records.iter().map(|record| record.seq_num).collect();
        assert_eq!(same, numbers(&batch), "{query}");
    }
}

#[tokio::test]
async fn a_read_of_what_is_not_written_names_the_tail() {
    let server = TestServer::start().await;
    let stream = ten(&server).await;
    let last = START.millis() + 9000;
    for query in [
        "?seq_num=10".to_owned(),
        "?seq_num=11".to_owned(),
        "?seq_num=11&wait=5".to_owned(),
        "?seq_num=10&clamp=true".to_owned(),
        "?seq_num=99&clamp=true".to_owned(),
        "?tail_offset=0".to_owned(),
        String::new(),
        format!("?timestamp={}", last + 1),
    ] {
        let answer = stream.read(&query).await;
        assert_eq!(answer.expect(416), json!({"tail": {"seq_num": 10, "timestamp": last}}), "{query}");
    }
    for (query, status, code) in [
        ("?seq_num=x", 400, "bad_query"),
        ("?seq_num=-1", 400, "bad_query"),
        ("?count=x", 400, "bad_query"),
        ("?seq_num=0&timestamp=0", 422, "invalid"),
        ("?seq_num=0&tail_offset=0", 422, "invalid"),
        ("?timestamp=0&tail_offset=0", 422, "invalid"),
        ("?timestamp=5&until=5", 422, "invalid"),
    ] {
        assert_eq!(stream.read(query).await.expect(status)["code"], code, "{query}");
    }
    server.create(json!({"externalId": "empty"})).await;
    let empty = server.wire().open("empty", "in").await;
    assert_eq!(empty.read("?timestamp=0").await.expect(416)["tail"]["seq_num"], 0);
    assert_eq!(empty.read("/tail").await.expect(200), json!({"tail": {"seq_num": 0, "timestamp": 0}}));
}

#[tokio::test]
async fn a_read_may_wait_for_the_first_record() {
    let server = TestServer::start().await;
    let stream = ten(&server).await;
    // At the tail, past it where that is allowed, and before it: then nothing is waited for.
    for query in ["?seq_num=10&wait=30", "?seq_num=99&clamp=true&wait=30", "?wait=30"] {
        let before = stream.tail().await;
        let waiting = tokio::spawn({
            let (stream, query) = (stream.clone(), query.replace("=10", &format!("={before}")));
            async move { stream.read(&query).await.expect(200) }
        });
        waits(&server).await;
        stream.append(&json!({"records": [{"body": "new"}, {"body": "newer"}]})).await.expect(200);
        assert_eq!(numbers(&waiting.await.expect("an answer")), [before, before + 1], "{query}");
    }
    let stored = stream.read("?seq_num=14&wait=30").await.expect(200);
    assert_eq!(numbers(&stored), [14, 15]);
    // Nothing comes: the wait ends with nothing.
    let waiting = tokio::spawn({
        let stream = stream.clone();
        async move { stream.read("?wait=30").await.expect(200) }
    });
    waits(&server).await;
    server.clock.advance(Duration::from_secs(31));
    assert_eq!(numbers(&waiting.await.expect("an answer")), Vec::<u64>::new());
    // A session that is closed has nothing more to wait for.
    let waiting = tokio::spawn({
        let stream = stream.clone();
        async move { stream.with_token(KEY).read("?wait=30").await.expect(200) }
    });
    waits(&server).await;
    let tail = stream.tail().await;
    stream.wire.close("s").await;
    assert_eq!(numbers(&waiting.await.expect("an answer")), [tail], "what tells of the close");
    let late = stream.with_token(KEY).read("?wait=30&clamp=true&seq_num=99").await.expect(200);
    assert_eq!(numbers(&late), Vec::<u64>::new());
}

/// Waits until the server follows a channel for a reader of this wire.
async fn waits(server: &TestServer) {
    let follows = async {
        loop {
            let metrics = server.http.get(format!("{}/metrics", server.url)).send().await.expect("an answer");
            let text = metrics.text().await.expect("a body");
            let line = text
                .lines()
                .find(|line| line.contains("followers{") && line.to_lowercase().contains("\"s2\""));
            if line.is_some_and(|line| !line.ends_with(" 0")) {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), follows).await.expect("a follower");
}

#[tokio::test]
async fn events_carry_what_was_delivered_and_resume_within_what_is_left() {
    let server = TestServer::start().await;
    let stream = ten(&server).await;
    let mut whole = stream.events("?seq_num=0&count=7", &[]).await.ok();
    assert_eq!(whole.response.headers()["content-type"], "text/event-stream");
    let event = whole.event().await.expect("a batch");
    assert_eq!((event.name.as_str(), event.id.as_deref()), ("batch", Some("6,7,91")));
    assert_eq!(event.records().len(), 7);
    assert_eq!(whole.next().await.expect("the end").data, "[DONE]");
    assert_eq!(whole.next().await, Err(End::Clean));

    for (query, last, numbers, id) in [
        ("?seq_num=0&count=7", "3,4,52", 4..7, Some("6,7,91")),
        ("?seq_num=0&count=7", "6,7,91", 0..0, None),
        ("?seq_num=0&count=7", "6,99,91", 0..0, None),
        ("?seq_num=0&bytes=65", "3,4,52", 4..5, Some("4,5,65")),
        ("?seq_num=0&bytes=64", "3,4,52", 0..0, None),
        ("?seq_num=5&count=2", "0,0,0", 1..3, Some("2,2,26")),
    ] {
        let mut resumed = stream.events(query, &[("last-event-id", last)]).await.ok();
        if id.is_some() {
            let event = resumed.event().await.expect("a batch");
            assert_eq!(event.id.as_deref(), id, "{query} after {last}");
            let got: Vec<_> = event.records().into_iter().map(|(number, _)| number).collect();
            assert_eq!(got, numbers.collect::<Vec<_>>(), "{query} after {last}");
        }
        assert_eq!(resumed.next().await.expect("the end").data, "[DONE]", "{query} after {last}");
    }
    for last in ["x", "1", "1,2", "1,2,3,4", "-1,0,0"] {
        let refused = stream.events("?seq_num=0", &[("last-event-id", last)]).await;
        assert_eq!(refused.response.status().as_u16(), 400, "{last}");
        assert!(refused.response.text().await.expect("a body").contains("bad_header"), "{last}");
    }
    let refused = stream.events("?seq_num=11", &[]).await;
    assert_eq!(refused.response.status().as_u16(), 416);
}

#[tokio::test]
async fn events_follow_with_pings_until_the_session_is_closed() {
    let server = TestServer::start().await;
    let stream = ten(&server).await;
    let mut events = stream.events("?seq_num=8", &[("s2-format", "base64")]).await.ok();
    assert_eq!(events.records(2).await[1].1["body"], data_encoding::BASE64.encode(b"body9"));
    let tail = json!({"seq_num": 10, "timestamp": START.millis() + 9000});
    for _ in 0..2 {
        let ping = events.next().await.expect("a ping");
        assert_eq!((ping.name.as_str(), &ping.json()["tail"]), ("ping", &tail));
        assert!(ping.json()["timestamp"].as_i64().is_some_and(|now| now >= START.millis() + 10_000));
        server.clock.advance(Duration::from_secs(16));
    }
    stream.append(&json!({"records": [{"body": "live"}]})).await.expect(200);
    let live = events.event().await.expect("a batch");
    assert_eq!((live.id.as_deref(), live.json()["tail"]["seq_num"].as_u64()), (Some("10,3,38"), Some(11)));
    stream.wire.close("s").await;
    assert_eq!(events.event().await.expect("what tells of the close").json()["records"][0]["seq_num"], 11);
    assert_eq!(events.event().await.expect("the end").data, "[DONE]");
    assert_eq!(events.next().await, Err(End::Clean));
}

#[tokio::test]
async fn frames_follow_with_heartbeats_and_end_with_a_word() {
    let mut server = TestServer::start().await;
    let stream = ten(&server).await;
    let mut bounded = stream.frames("?seq_num=4&count=3", "").await.expect("a read");
    let batch = bounded.batch().await.message();
    assert_eq!(batch.records.iter().map(|record| record.seq_num).collect::<Vec<_>>(), [4, 5, 6]);
    assert_eq!(bounded.batch().await, Heard::End);

    let mut frames = stream.frames("?tail_offset=1", "").await.expect("a read");
    assert_eq!(frames.batch().await.message().records[0].body, "body9");
    for _ in 0..2 {
        let beat = frames.batch().await.message();
        assert_eq!((beat.records.len(), beat.tail.map(|tail| tail.seq_num)), (0, Some(10)));
        server.clock.advance(Duration::from_secs(16));
    }
    stream.append(&json!({"records": [{"body": "live"}]})).await.expect(200);
    loop {
        let batch = frames.batch().await.message();
        if let [record] = &batch.records[..] {
            assert_eq!((record.seq_num, &record.body[..]), (10, &b"live"[..]));
            break;
        }
    }
    let refused = stream.frames("?seq_num=12", "").await.err().expect("refused");
    assert_eq!(refused.expect(416)["tail"]["seq_num"], 11);

    // A public reader's frames end with its token, a stop says that it is one.
    let token = server.token(&["read:sessions:s", "write:sessions:s"], Duration::from_secs(60)).await;
    let mut short = stream.wire.open_as(&token, "s", "in").await.frames("", "").await.expect("a read");
    assert_eq!(short.batch().await.message().records.len(), 0);
    server.clock.advance(Duration::from_secs(61));
    assert_eq!(short.batch().await.refusal(), (401, "authn".to_owned()));
    let ((), end) = tokio::join!(server.stop(), async {
        loop {
            match frames.batch().await {
                Heard::Message(beat) => assert!(beat.records.is_empty()),
                end => return end,
            }
        }
    });
    assert_eq!(end.refusal(), (503, "server_draining".to_owned()));
}

#[tokio::test]
async fn a_large_channel_comes_in_reads_of_a_batch_each_and_nothing_is_cut() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let stream = server.wire().open("s", "out").await;
    let body = "x".repeat(300_000);
    for index in 0..10 {
        let records = json!([{"body": format!("{index}{body}")}, {"body": "small"}]);
        stream.append(&json!({"records": records})).await.expect(200);
    }
    let first = stream.read("?seq_num=0").await.expect(200);
    assert_eq!(numbers(&first), (0..6).collect::<Vec<_>>(), "1 MiB metered at most");
    assert_eq!(stream.stored().await.len(), 20);
    let mut frames = stream.frames("?seq_num=0&count=20", "").await.expect("a read");
    let mut next = 0;
    while let Heard::Message(batch) = frames.batch().await {
        let metered: usize = batch.records.iter().map(|record| 8 + record.body.len()).sum();
        assert!(!batch.records.is_empty() && metered <= 1 << 20);
        for record in batch.records {
            assert_eq!(record.seq_num, next);
            next += 1;
        }
    }
    assert_eq!(next, 20);
}
