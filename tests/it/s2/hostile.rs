//! What no honest client sends: frames that lie, and public tokens that reach for what only keys may do.

use std::io::Write;
use std::time::Duration;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use prost::Message;
use reqwest::Method;
use s2_api::v1::stream::proto::{AppendInput, AppendRecord, Header};
use s2_api::v1::stream::s2s::{SessionMessage, TerminalMessage};
use serde_json::{Value, json};

use crate::harness::s2::{Heard, Stream, Wire, batch, envelope, frame, raw_frame, record};
use crate::harness::server::KEY;
use crate::harness::{Process, TestServer};

const HOUR: Duration = Duration::from_secs(3600);
const GZIP: u8 = 2 << 5;
const ZSTD: u8 = 1 << 5;
/// Growth of the largest resident size that all hostile frames together may cause, in KiB. They are sent one at a time, and
/// one frame of 2 MiB may hold a million headers of nothing.
const GROWTH_MAX: u64 = 128 * 1024;

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).expect("memory takes it");
    encoder.finish().expect("memory takes it")
}

/// A zstd frame of one block that says one byte over and over.
fn zstd_of(byte: u8, window_log: u8, blocks: u32) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, (window_log - 10) << 3];
    for index in 0..blocks {
        // A block repeats its byte up to 128 KiB often.
        let head = (128 * 1024) << 3 | 1 << 1 | u32::from(index + 1 == blocks);
        frame.extend_from_slice(&head.to_le_bytes()[..3]);
        frame.push(byte);
    }
    frame
}

fn frames() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let empty = |count: usize| [0x0a, 0].repeat(count);
    let nothing =
        AppendRecord { timestamp: None, headers: vec![Header::default(); 1000], body: Bytes::new() };
    let headers = AppendInput { records: vec![nothing; 500], ..AppendInput::default() }.encode_to_vec();
    let terminal = SessionMessage::Terminal(TerminalMessage { status: 200, body: "{}".to_owned() }).encode();
    let good = frame(&batch(&["x"]));
    vec![
        ("nothing in a frame", vec![0, 0, 0], "bad_frame"),
        ("a frame cut short", good[..good.len() - 1].to_vec(), "bad_frame"),
        ("a head cut short", vec![0, 0], "bad_frame"),
        ("a frame of 16 MiB", [&[0xff; 3][..], &[0; 64]].concat(), "bad_frame"),
        ("a frame one byte too long", vec![0x20, 0, 1, 0], "bad_frame"),
        ("a terminal frame", terminal.to_vec(), "bad_frame"),
        ("a terminal frame without a status", raw_frame(0x80, &[1]).to_vec(), "bad_frame"),
        ("a terminal frame that is no text", raw_frame(0x80, &[0, 200, 0xff]).to_vec(), "bad_frame"),
        ("an unknown compression", raw_frame(0x60, b"x").to_vec(), "bad_frame"),
        ("garbage", raw_frame(0, &[0xff; 100]).to_vec(), "bad_proto"),
        ("a record longer than its frame", raw_frame(0, &[0x0a, 0xff, 0xff, 0x7f]).to_vec(), "bad_proto"),
        (
            "a length that overflows",
            raw_frame(0, &[[0x0a].as_slice(), &[0xff; 9], &[1]].concat()).to_vec(),
            "bad_proto",
        ),
        ("a group without an end", raw_frame(0, &[0x0b; 2000]).to_vec(), "bad_proto"),
        ("deep groups of an unknown field", raw_frame(0, &[0x7b; 1 << 20]).to_vec(), "bad_proto"),
        ("no gzip", raw_frame(GZIP, b"plainly not").to_vec(), "bad_proto"),
        ("no zstd", raw_frame(ZSTD, b"plainly not").to_vec(), "bad_proto"),
        ("gzip cut short", raw_frame(GZIP, &gzip(&[10; 5000])[..20]).to_vec(), "bad_proto"),
        ("a bomb of gzip", raw_frame(GZIP, &gzip(&vec![0; 256 << 20])).to_vec(), "bad_proto"),
        ("a bomb of zstd", raw_frame(ZSTD, &zstd_of(0, 17, 8192)).to_vec(), "bad_proto"),
        ("a window of 128 MiB", raw_frame(ZSTD, &zstd_of(0, 27, 8192)).to_vec(), "bad_proto"),
        ("a window of 2 GiB", raw_frame(ZSTD, &zstd_of(0, 31, 8)).to_vec(), "bad_proto"),
        ("2 MiB of empty records", raw_frame(0, &empty((1 << 20) - 1)).to_vec(), "invalid"),
        ("2 MiB of empty records, packed", raw_frame(GZIP, &gzip(&empty((1 << 20) - 1))).to_vec(), "invalid"),
        ("half a million headers", raw_frame(0, &headers).to_vec(), "invalid"),
        ("no records", raw_frame(0, &[]).to_vec(), "invalid"),
        ("a record of 1 MiB and a byte", frame(&batch(&["x".repeat((1 << 20) - 7)])).to_vec(), "invalid"),
    ]
}

/// The largest resident size that a process ever had, in KiB.
fn most_memory(process: &Process) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.id())).expect("running");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a line");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_frame_that_lies_ends_its_session_with_a_word_and_costs_no_memory() {
    let data = tempfile::tempdir().expect("a folder");
    let process = Process::serve(data.path()).await;
    let wire = Wire::new(&process.url);
    wire.create("s").await;
    let stream = wire.open("s", "in").await;
    let before = most_memory(&process);
    for (index, (name, bytes, code)) in frames().into_iter().enumerate() {
        let mut writer = stream.session().await.expect("a session");
        assert_eq!(writer.write("good").await, index as u64, "{name}");
        writer.send_raw(bytes).await;
        writer.finish();
        let (acks, end) = writer.rest().await;
        let status = if code == "invalid" { 422 } else { 400 };
        assert_eq!((acks, end.refusal()), (0, (status, code.to_owned())), "{name}");
        assert_eq!(stream.tail().await, index as u64 + 1, "{name}");
    }
    let grown = most_memory(&process) - before;
    assert!(grown < GROWTH_MAX, "the process grew by {grown} KiB");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_compressed_batch_that_lies_is_refused_and_costs_no_memory() {
    let data = tempfile::tempdir().expect("a folder");
    let process = Process::serve(data.path()).await;
    let wire = Wire::new(&process.url);
    wire.create("s").await;
    let stream = wire.open("s", "in").await;
    let send = async |coding: &str, content_type: &str, body: Vec<u8>| {
        let request = stream.request(Method::POST, "").header("content-encoding", coding);
        let response =
            request.header("content-type", content_type).body(body).send().await.expect("an answer");
        let status = response.status().as_u16();
        let body: Value = response.json().await.expect("JSON");
        (status, body["code"].as_str().map(str::to_owned))
    };
    let json = br#"{"records":[{"body":"good"}]}"#;
    let before = most_memory(&process);
    for (name, coding, content_type, body, refused) in [
        ("no gzip", "gzip", "application/json", json.to_vec(), (400, "bad_json")),
        ("no zstd", "zstd", "application/protobuf", json.to_vec(), (400, "bad_proto")),
        ("gzip under another name", "zstd", "application/json", gzip(json), (400, "bad_json")),
        ("gzip cut short", "gzip", "application/json", gzip(json)[..25].to_vec(), (400, "bad_json")),
        (
            "something behind gzip",
            "gzip",
            "application/json",
            [&gzip(json)[..], b"x"].concat(),
            (400, "bad_json"),
        ),
        ("gzip in gzip", "gzip", "application/json", gzip(&gzip(json)), (400, "bad_json")),
        ("a bomb of gzip", "gzip", "application/json", gzip(&vec![b' '; 256 << 20]), (413, "too_large")),
        ("a bomb of zstd", "zstd", "application/json", zstd_of(b' ', 17, 8192), (413, "too_large")),
        ("a large window", "zstd", "application/json", zstd_of(b' ', 23, 8192), (413, "too_large")),
        ("a window of 128 MiB", "zstd", "application/json", zstd_of(b' ', 27, 8192), (400, "bad_json")),
        ("a window of 2 GiB", "zstd", "application/json", zstd_of(b' ', 31, 8), (400, "bad_json")),
        ("nothing", "gzip", "application/json", Vec::new(), (400, "bad_json")),
    ] {
        let answer = send(coding, content_type, body).await;
        assert_eq!((answer.0, answer.1.as_deref()), (refused.0, Some(refused.1)), "{name}");
    }
    let grown = most_memory(&process) - before;
    assert!(grown < GROWTH_MAX, "the process grew by {grown} KiB");
    for (coding, body) in [("gzip", gzip(json)), ("GZIP", [gzip(&json[..9]), gzip(&json[9..])].concat())] {
        assert_eq!(send(coding, "application/json", body).await, (200, None), "{coding}");
    }
    let proto = zstd::stream::encode_all(&batch(&["good"]).encode_to_vec()[..], 19).expect("memory takes it");
    let request = stream.request(Method::POST, "").header("content-encoding", "zstd");
    let answer = request.header("content-type", "application/protobuf").body(proto).send().await;
    assert_eq!(answer.expect("an answer").status().as_u16(), 200);
    assert_eq!(stream.bodies().await, ["good", "good", "good"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_that_read_no_acks_cost_little_and_hold_up_nobody() {
    const WRITERS: usize = 24;
    let data = tempfile::tempdir().expect("a folder");
    let process = Process::serve(data.path()).await;
    let wire = Wire::new(&process.url);
    wire.create("s").await;
    wire.create("other").await;
    let before = most_memory(&process);
    let input = frame(&batch(&["x".repeat(4000)]));
    let mut stuck = Vec::new();
    for index in 0..WRITERS {
        // So small a window that a few acks fill it. A connection each, or they would hold up each other.
        let narrow = Wire::with(&process.url, |client| {
            client.http2_initial_stream_window_size(64).http2_initial_connection_window_size(65_535)
        });
        let channel = format!("channels/c{index}/in");
        let mut writer = wire.open("s", &channel).await.at(&narrow).session().await.expect("a session");
        let frames = writer.sender();
        let input = input.clone();
        let sending = tokio::spawn(async move { while frames.send(input.clone()).await.is_ok() {} });
        stuck.push((writer, sending));
    }
    // Each of them has been stopped when its channel grows no longer; others are served all the while.
    let other = wire.open("other", "in").await;
    let mut beside = other.session().await.expect("a session");
    let mut tails = vec![0; WRITERS];
    let mut rounds = 0;
    loop {
        let mut now = Vec::new();
        for index in 0..WRITERS {
            beside.write("beside").await;
            other.append(&json!({"records": [{"body": "x"}]})).await.expect(200);
            now.push(wire.open("s", &format!("channels/c{index}/in")).await.tail().await);
        }
        rounds += 1;
        if std::mem::replace(&mut tails, now) == tails && tails.iter().all(|tail| *tail > 0) {
            break;
        }
    }
    assert_eq!(other.tail().await, 2 * (WRITERS * rounds) as u64);
    // Each has sent all that 256 batches and the window of its connection hold, and would have sent without end.
    let grown = most_memory(&process) - before;
    assert!(grown < (WRITERS * 5 * 1024) as u64, "the process grew by {grown} KiB");
    // None is lost: whoever reads again gets every ack up to a clean end.
    let (mut writer, sending) = stuck.remove(0);
    let acks = tokio::spawn(async move {
        for _ in 0..300 {
            writer.ack().await;
        }
        writer
    });
    let _writer = acks.await.expect("acks");
    sending.abort();
    for (_, sending) in stuck {
        sending.abort();
    }
}

/// Every form of one record, by name: whether the server took it.
async fn through_every_form(stream: &Stream, record: &AppendRecord) -> Vec<(&'static str, u16, String)> {
    let base64 = |bytes: &[u8]| data_encoding::BASE64.encode(bytes);
    let raw = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let json = |text: &dyn Fn(&[u8]) -> String| {
        let headers = record.headers.iter().map(|header| json!([text(&header.name), text(&header.value)]));
        json!({"records": [{"body": text(b"x")}, {"headers": headers.collect::<Vec<_>>(), "body": text(&record.body)}]})
    };
    let input = AppendInput {
        records: vec![AppendRecord { body: "x".into(), ..AppendRecord::default() }, record.clone()],
        ..AppendInput::default()
    };
    let mut answers = Vec::new();
    let plain = stream.append(&json(&raw)).await;
    answers.push(("JSON", plain.status.as_u16(), plain.text));
    let request = stream.request(Method::POST, "").header("s2-format", "base64").json(&json(&base64));
    let coded = stream.wire.send(request).await;
    answers.push(("base64", coded.status.as_u16(), coded.text));
    match stream.append_proto(&input).await {
        Ok(_) => answers.push(("protobuf", 200, String::new())),
        Err(refused) => answers.push(("protobuf", refused.status.as_u16(), refused.text)),
    }
    let packed = raw_frame(GZIP, &gzip(&input.encode_to_vec()));
    for (name, bytes) in [("session", frame(&input)), ("packed session", packed)] {
        let mut writer = stream.session().await.expect("a session");
        assert!(writer.send_raw(bytes).await);
        match writer.heard().await {
            Heard::Message(_) => answers.push((name, 200, String::new())),
            Heard::Terminal(status, body) => answers.push((name, status, body.to_string())),
            other => panic!("{other:?}"),
        }
    }
    answers
}

#[tokio::test]
async fn a_public_writer_forges_no_command_and_no_control_record_in_any_form() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let wire = server.wire();
    let public = server.token(&["*:sessions:s", "admin", "write:all"], HOUR).await;
    let direct = wire.open_as(&public, "s", "in").await;
    let mut side = wire.open_as(&public, "s", "channels/side/in").await;
    // The public token itself, as bearer of this door.
    let mut bare = direct.with_token(&public);
    "sessions/s/in".clone_into(&mut bare.name);
    let trim = 1u64.to_be_bytes();
    let forged: Vec<(&str, AppendRecord)> = vec![
        ("trim", record(&[("", "trim")], trim)),
        ("fence", record(&[("", "fence")], "mine")),
        ("no command", record(&[("", "")], "")),
        ("an unknown command", record(&[("", "TRIM")], trim)),
        ("a command behind a header", record(&[("a", "b"), ("", "trim")], trim)),
        ("a command before a header", record(&[("", "trim"), ("a", "b")], trim)),
        ("control", record(&[("trigger-control", "turn-complete")], "")),
        ("control with a body", record(&[("trigger-control", "turn-complete")], "body")),
        ("control behind a header", record(&[("a", "b"), ("trigger-control", "upgrade-required")], "")),
        ("control in capitals", record(&[("Trigger-Control", "turn-complete")], "")),
        ("control in mixed letters", record(&[("tRiGgEr-CoNtRoL", "session-closed")], "")),
    ];
    for stream in [&direct, &side, &bare] {
        for (name, record) in &forged {
            for (form, status, text) in through_every_form(stream, record).await {
                let code = serde_json::from_str::<Value>(&text).unwrap_or_default()["code"].clone();
                // What no key may send either may be refused as such.
                let nobodys = name.contains("command") && (status, code.as_str()) == (422, Some("invalid"));
                let denied = (status, code.as_str()) == (403, Some("permission_denied"));
                assert!(nobodys || denied, "{name} as {form}: {status} {text}");
            }
        }
        assert_eq!(stream.with_token(KEY).tail().await, 0, "not even what stood beside it is stored");
    }
    // Its own headers it may send, and a key may do all of this.
    for (_, status, text) in through_every_form(&direct, &record(&[("x-trigger-control", "a")], "x")).await {
        assert_eq!(status, 200, "{text}");
    }
    side.token = wire.open("s", "channels/side/in").await.token;
    for (name, record) in [&forged[0], &forged[6]] {
        for (form, status, text) in through_every_form(&side, record).await {
            assert_eq!(status, 200, "{name} as {form}: {text}");
        }
    }
}

#[tokio::test]
async fn a_claim_that_only_the_server_makes_is_taken_out_of_every_form() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let stream = server.wire().open("s", "in").await;
    let forged = json!({"kind": "action", "payload": {"actionSource": "webhook", "a": 1}});
    for body in [
        json!({"data": forged, "id": "value"}).to_string(),
        envelope(&forged.to_string(), "text"),
        r#"{"id":"spelled","data":{"payload":{"action\u0053ource":"web\u0068ook","a":1}}}"#.to_owned(),
        r#"{"data":{"payload":{"a":1}},"data":{"payload":{"actionSource":"webhook","a":1}},"id":"twice"}"#
            .to_owned(),
    ] {
        let before = stream.tail().await;
        through_every_form(&stream, &record(&[], &body)).await;
        let stored = stream.bodies().await;
        let stored: Vec<_> = stored[before as usize..].iter().filter(|stored| *stored != "x").collect();
        assert!(!stored.is_empty(), "{body}");
        for stored in stored {
            let plain = stored.replace("\\\"", "\"").replace("\\u0053", "S").replace("\\u0068", "h");
            assert!(!plain.contains("webhook") && plain.contains("\"a\":1"), "{stored}");
        }
    }
}
