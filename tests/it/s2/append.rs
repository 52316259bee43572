//! One batch a request, in JSON and protobuf.

use data_encoding::BASE64;
use reqwest::Method;
use s2_api::v1::stream::proto::AppendInput;
use serde_json::{Value, json};

use crate::harness::TestServer;
use crate::harness::s2::{Stream, batch, record};
use crate::harness::server::START;

/// Largest metered size of a record and of a batch.
const METERED_MAX: usize = 1 << 20;

/// What a request is called, its headers and body, and status and code of its refusal.
type Refusal = (&'static str, Vec<(&'static str, &'static str)>, String, u16, &'static str);

async fn stream(server: &TestServer) -> Stream {
    server.create(json!({"externalId": "s"})).await;
    server.wire().open("s", "out").await
}

#[tokio::test]
async fn an_ack_names_the_places_in_json_and_in_protobuf() {
    let server = TestServer::start().await;
    let stream = stream(&server).await;
    let two = json!({"records": [{"body": "a", "headers": [["k", "v"], ["k", "w"]]}, {}]});
    let position = |seq_num: u64| json!({"seq_num": seq_num, "timestamp": START.millis()});
    assert_eq!(
        stream.append(&two).await.expect(200),
        json!({"start": position(0), "end": position(2), "tail": position(2)})
    );
    let ack = stream.append_proto(&batch(&["b"])).await.expect("an ack");
    assert_eq!(ack.start.map(|place| (place.seq_num, place.timestamp)), Some((2, START.millis() as u64)));
    assert_eq!([ack.end, ack.tail].map(|place| place.expect("a place").seq_num), [3, 3]);
    let stored = stream.stored().await;
    let timestamp = START.millis();
    assert_eq!(
        stored,
        [
            json!({"seq_num": 0, "timestamp": timestamp, "headers": [["k", "v"], ["k", "w"]], "body": "a"}),
            json!({"seq_num": 1, "timestamp": timestamp}),
            json!({"seq_num": 2, "timestamp": timestamp, "body": "b"}),
        ]
    );
}

#[tokio::test]
async fn every_refusal_has_its_status_and_code() {
    let server = TestServer::start().await;
    let stream = stream(&server).await;
    stream.append(&json!({"records": [{"body": "first"}]})).await.expect(200);
    let record = json!([{"body": "x"}]);
    for (given, status, body) in [
        (json!({"records": record, "match_seq_num": 7}), 412, json!({"seq_num_mismatch": 1})),
        (json!({"records": record, "fencing_token": "t"}), 412, json!({"fencing_token_mismatch": ""})),
    ] {
        assert_eq!(stream.append(&given).await.expect(status), body);
    }
    let base64 = |text: &str| json!({"records": [{"body": text}]}).to_string();
    let cases: Vec<Refusal> = vec![
        ("no JSON", vec![], "{".into(), 400, "bad_json"),
        ("nothing", vec![], String::new(), 400, "bad_json"),
        ("wrong types", vec![], json!({"records": 1}).to_string(), 400, "bad_json"),
        ("a header of one", vec![], r#"{"records":[{"headers":[["a"]]}]}"#.into(), 400, "bad_json"),
        ("no text", vec![], r#"{"records":[{"body":"\ud800"}]}"#.into(), 400, "bad_json"),
        ("no records", vec![], json!({"records": []}).to_string(), 422, "invalid"),
        ("no protobuf", vec![("content-type", "application/protobuf")], "\u{1f}x".into(), 400, "bad_proto"),
        ("an empty message", vec![("content-type", "application/protobuf")], String::new(), 422, "invalid"),
        ("an unknown format", vec![("s2-format", "hex")], base64("00"), 400, "bad_header"),
        ("no base64", vec![("s2-format", "base64")], base64("*"), 422, "invalid"),
        ("base64 cut short", vec![("s2-format", "base64")], base64("YQ"), 422, "invalid"),
        ("an unknown command", vec![], r#"{"records":[{"headers":[["","rm"]]}]}"#.into(), 422, "invalid"),
        (
            "a short trim",
            vec![],
            r#"{"records":[{"headers":[["","trim"]],"body":"1"}]}"#.into(),
            422,
            "invalid",
        ),
        ("another basin", vec![("s2-basin", "other-basin")], base64("x"), 404, "basin_not_found"),
        ("a body over 2 MiB", vec![], " ".repeat((2 << 20) + 1), 413, "too_large"),
    ];
    for (name, headers, body, status, code) in cases {
        let mut request = stream.request(Method::POST, "");
        if !headers.iter().any(|(name, _)| *name == "content-type") {
            request = request.header("content-type", "application/json");
        }
        let mut request = request.build().expect("a request");
        for (name, value) in headers {
            request.headers_mut().insert(name, value.parse().expect("a value"));
        }
        *request.body_mut() = Some(body.into());
        let answer = server.http.execute(request).await.expect("an answer");
        let (got, text) = (answer.status().as_u16(), answer.text().await.expect("a body"));
        let json: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{name}: {text}"));
        assert_eq!((got, json["code"].as_str()), (status, Some(code)), "{name}: {text}");
        assert!(json["message"].as_str().is_some_and(|message| !message.is_empty()), "{name}: {text}");
    }
    server.post("/api/v1/sessions/s/close", &json!({"reason": "done"})).await.expect(200);
    let answer = stream.append(&json!({"records": record})).await;
    assert_eq!(answer.expect(409)["code"], "session_closed");
    assert_eq!(answer.header("x-should-retry"), Some("false"), "no retry mends it");
    assert_eq!(stream.tail().await, 2, "nothing of all this is stored but what tells of the close");
}

#[tokio::test]
async fn an_expired_session_takes_nothing() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s", "expiresAt": "2026-01-01T00:00:10Z"})).await;
    let stream = server.wire().open("s", "in").await;
    stream.append(&json!({"records": [{"body": "x"}]})).await.expect(200);
    server.clock.advance(std::time::Duration::from_secs(10));
    let answer = stream.append(&json!({"records": [{"body": "x"}]})).await;
    assert_eq!(answer.expect(409)["code"], "session_expired");
    assert_eq!(stream.tail().await, 1);
}

#[tokio::test]
async fn a_record_and_a_batch_are_metered_to_the_byte() {
    let server = TestServer::start().await;
    let stream = stream(&server).await;
    // 8 for the record, 2 for the header and 3 for its bytes.
    for (headers, room) in [(&[][..], METERED_MAX - 8), (&[("ab", "c")], METERED_MAX - 13)] {
        for (size, fits) in [(room, true), (room + 1, false)] {
            let records = vec![record(headers, "x".repeat(size))];
            let input = AppendInput { records, match_seq_num: None, fencing_token: None };
            check(&stream, &input, fits).await;
        }
    }
    for (count, fits) in [(1000, true), (1001, false), (5000, false)] {
        check(&stream, &batch(&vec![""; count]), fits).await;
        let body = json!({"records": vec![json!({}); count]});
        let status = stream.append(&body).await.status.as_u16();
        assert_eq!(status, if fits { 200 } else { 422 }, "{count}");
    }
    let half = METERED_MAX / 2 - 8;
    check(&stream, &batch(&["x".repeat(half), "x".repeat(half)]), true).await;
    check(&stream, &batch(&["x".repeat(half), "x".repeat(half + 1)]), false).await;
    // What JSON needs to spell is not metered: every one of these takes six bytes there.
    let control = "\u{1}".repeat(METERED_MAX / 4);
    stream.append(&json!({"records": [{"body": control}]})).await.expect(200);
}

async fn check(stream: &Stream, input: &AppendInput, fits: bool) {
    let before = stream.tail().await;
    match stream.append_proto(input).await {
        Ok(ack) => {
            assert!(fits, "too much was taken");
            let [start, end] = [ack.start, ack.end].map(|place| place.expect("a place").seq_num);
            assert_eq!((start, end), (before, before + input.records.len() as u64));
        }
        Err(refused) => {
            assert_eq!(refused.expect(422)["code"], "invalid");
            assert!(!fits, "refused: {refused:?}");
        }
    }
}

#[tokio::test]
async fn base64_carries_any_bytes_both_ways() {
    let server = TestServer::start().await;
    let stream = stream(&server).await;
    let bytes = [0, 255, 254, b'"', b'\\', 0xc3, 0x28];
    let [name, value, body] = [&bytes[1..3], &bytes[..], &bytes[2..]].map(|part| BASE64.encode(part));
    let given = json!({"records": [{"headers": [[name, value]], "body": body}]});
    let request = stream.request(Method::POST, "").header("s2-format", "base64").json(&given);
    server.send(request).await.expect(200);
    let read = stream.request(Method::GET, "?seq_num=0").header("s2-format", "base64");
    let read = server.send(read).await.expect(200);
    assert_eq!(read["records"][0]["headers"], given["records"][0]["headers"]);
    assert_eq!(read["records"][0]["body"], given["records"][0]["body"]);
    // As text what is no UTF-8 is replaced, and the answer is JSON all the same.
    let raw = &stream.stored().await[0];
    assert_eq!(raw["headers"][0][0], "\u{fffd}\u{fffd}");
    assert_eq!(raw["body"], &*String::from_utf8_lossy(&bytes[2..]));
}

#[tokio::test]
async fn time_neither_runs_backwards_nor_ahead_of_the_clock() {
    let server = TestServer::start().await;
    let stream = stream(&server).await;
    let now = START.millis();
    let times =
        [json!(now - 5000), json!(now - 9000), Value::Null, json!(5), json!(now + 60_000), json!(u64::MAX)];
    let records: Vec<_> = times.iter().map(|time| json!({"timestamp": time})).collect();
    let ack = stream.append(&json!({"records": records})).await.expect(200);
    assert_eq!(ack["end"]["timestamp"], now);
    let stored: Vec<_> = stream.stored().await.iter().map(|record| record["timestamp"].clone()).collect();
    assert_eq!(stored, [now - 5000, now - 5000, now, now, now, now].map(Value::from));
}

#[tokio::test]
async fn a_fence_keeps_out_whoever_carries_another_token_and_a_trim_forgets() {
    let server = TestServer::start().await;
    let stream = stream(&server).await;
    let fence = |token: &str| json!({"records": [{"headers": [["", "fence"]], "body": token}]});
    stream.append(&json!({"records": [{"body": "0"}, {"body": "1"}]})).await.expect(200);
    stream.append(&fence("mine")).await.expect(200);
    let write = |token: Option<&str>| json!({"records": [{"body": "x"}], "fencing_token": token});
    assert_eq!(
        stream.append(&write(Some("theirs"))).await.expect(412),
        json!({"fencing_token_mismatch": "mine"})
    );
    stream.append(&write(Some("mine"))).await.expect(200);
    stream.append(&write(None)).await.expect(200);
    let long = fence(&"x".repeat(37));
    assert_eq!(stream.append(&long).await.expect(422)["code"], "invalid");

    let trim = AppendInput {
        records: vec![record(&[("", "trim")], 2u64.to_be_bytes())],
        match_seq_num: None,
        fencing_token: None,
    };
    assert_eq!(stream.append_proto(&trim).await.expect("an ack").tail.expect("a tail").seq_num, 6);
    let read = stream.read("?seq_num=0").await.expect(200);
    assert_eq!(read["records"][0]["seq_num"], 2, "below the trim the first that is left comes first");
}
