//! Append sessions: acks in order, ends that say why, and nothing stored after them.

use std::time::Duration;

use reqwest::Method;
use s2_api::v1::stream::proto::AppendInput;
use s2_api::v1::stream::s2s::CompressionAlgorithm;
use serde_json::json;

use crate::harness::TestServer;
use crate::harness::s2::{Heard, Stream, Writer, batch, compressed, envelope, frame, record};
use crate::harness::server::KEY;

async fn stream(server: &TestServer) -> Stream {
    server.create(json!({"externalId": "s"})).await;
    server.wire().open("s", "in").await
}

#[tokio::test]
async fn a_thousand_pipelined_batches_are_acknowledged_in_order_and_the_end_is_clean() {
    let server = TestServer::start().await;
    let stream = stream(&server).await;
    let mut writer = stream.session().await.expect("a session");
    let frames = writer.sender();
    let sending = tokio::spawn(async move {
        for index in 0..1000 {
            let bodies: Vec<_> = (0..=index % 3).map(|part| format!("{index}.{part}")).collect();
            frames.send(frame(&batch(&bodies))).await.expect("taken");
        }
    });
    let mut next = 0;
    for index in 0..1000 {
        let ack = writer.heard().await.message();
        let [start, end, tail] = [ack.start, ack.end, ack.tail].map(|place| place.expect("a place").seq_num);
        assert_eq!((start, end), (next, next + index % 3 + 1));
        assert!(tail >= end);
        next = end;
    }
    sending.await.expect("sent");
    assert_eq!(writer.heard().await, Heard::End);
    let expected: Vec<_> =
        (0..1000).flat_map(|index| (0..=index % 3).map(move |part| format!("{index}.{part}"))).collect();
    assert_eq!(stream.bodies().await, expected);
}

#[tokio::test]
async fn a_writer_that_has_finished_still_gets_every_ack() {
    let server = TestServer::start().await;
    let stream = stream(&server).await;
    let mut writer = stream.session().await.expect("a session");
    // All frames in one piece, cut at odd places, and the end at once behind them.
    let all: Vec<u8> = (0..100).flat_map(|index| frame(&batch(&[index.to_string()]))).collect();
    for piece in all.chunks(7) {
        assert!(writer.send_raw(piece.to_vec()).await);
    }
    writer.finish();
    assert_eq!(writer.rest().await, (100, Heard::End));
    assert_eq!(stream.tail().await, 100);
    let mut idle = stream.session().await.expect("a session");
    idle.finish();
    assert_eq!(idle.rest().await, (0, Heard::End));
}

#[tokio::test]
async fn frames_may_be_compressed_both_ways() {
    let server = TestServer::start().await;
    let stream = stream(&server).await;
    let body = "many words ".repeat(400);
    for (algorithm, name, bits) in
        [(CompressionAlgorithm::Zstd, "zstd", 1 << 5), (CompressionAlgorithm::Gzip, "gzip;q=0.5", 2 << 5)]
    {
        let mut writer = stream.session_with(name).await.expect("a session");
        let frame = compressed(algorithm, &batch(&[&body]));
        assert_eq!(frame[3], bits, "the frame is compressed");
        assert!(writer.send_raw(frame).await);
        let seq_num = writer.ack().await;
        let mut reader = stream.frames(&format!("?seq_num={seq_num}&count=1"), name).await.expect("a read");
        let records = reader.batch().await.message().records;
        assert_eq!(records[0].body, body.as_bytes());
        assert_eq!(reader.flags, [bits], "a large frame comes back compressed");
        let mut plain = stream.frames(&format!("?seq_num={seq_num}&count=1"), "br").await.expect("a read");
        assert_eq!(plain.batch().await.message().records[0].body, body.as_bytes());
        assert_eq!(plain.flags, [0]);
    }
}

/// What ends a session from outside.
struct Ending {
    server: TestServer,
    stream: Stream,
    busy: Writer,
    idle: Writer,
}

impl Ending {
    async fn prepare(extra: serde_json::Value, bearer: Option<String>, server: TestServer) -> Self {
        let mut fields = json!({"externalId": "s"});
        for (name, value) in extra.as_object().expect("an object") {
            fields[name] = value.clone();
        }
        server.create(fields).await;
        let wire = server.wire();
        let stream = wire.open_as(bearer.as_deref().unwrap_or(KEY), "s", "in").await;
        let mut busy = stream.session().await.expect("a session");
        let idle = stream.session().await.expect("a session");
        assert_eq!(busy.write("before").await, 0);
        Self { server, stream, busy, idle }
    }

    /// Both sessions end with this, at once, and what they send then is not stored.
    async fn check(mut self, status: u16, code: &str) {
        for writer in [&mut self.idle, &mut self.busy] {
            let (acks, end) = writer.rest().await;
            assert_eq!(acks, 0);
            assert_eq!(end.refusal(), (status, code.to_owned()));
            // The request may be gone already; what counts is that nothing comes of it.
            writer.send(&batch(&["after"])).await;
            assert!(matches!(writer.heard().await, Heard::End | Heard::Broken));
        }
        let key = self.stream.with_token(KEY);
        assert_eq!(key.bodies().await, ["before"]);
    }
}

#[tokio::test]
async fn a_close_ends_every_session_at_once_idle_or_not() {
    let server = TestServer::start().await;
    let ending = Ending::prepare(json!({}), None, server).await;
    ending.stream.wire.close("s").await;
    let refused = ending.stream.session().await.err().expect("refused");
    assert_eq!(refused.expect(409)["code"], "session_closed");
    ending.check(409, "session_closed").await;
}

#[tokio::test]
async fn expiry_ends_every_session_at_once_idle_or_not() {
    let server = TestServer::start().await;
    let expires = json!({"expiresAt": "2026-01-01T00:00:10Z"});
    let ending = Ending::prepare(expires, None, server).await;
    ending.server.clock.advance(Duration::from_secs(11));
    ending.check(409, "session_expired").await;
}

#[tokio::test]
async fn a_token_that_ends_ends_its_sessions() {
    let server = TestServer::start().await;
    let public = server.token(&["write:sessions:s"], Duration::from_secs(60)).await;
    let ending = Ending::prepare(json!({}), Some(public), server).await;
    ending.server.clock.advance(Duration::from_secs(61));
    ending.check(401, "authn").await;
}

#[tokio::test]
async fn a_revoked_key_ends_the_sessions_of_every_token_that_it_asked_for() {
    let server = TestServer::start().await;
    let environment = server.first_environment().await;
    let control = server.control().await;
    let extra = control.keys().create(&environment, "a second one", None, None).await.expect("a key");
    let secret = secrecy::ExposeSecret::expose_secret(&extra.secret).to_owned();
    let ending = Ending::prepare(json!({}), Some(secret), server).await;
    control.keys().revoke(&environment.id, &extra.key.id).await.expect("revoked");
    ending.check(401, "authn").await;
}

#[tokio::test]
async fn a_server_that_stops_says_so_and_keeps_what_it_has_acknowledged() {
    let server = TestServer::start().await;
    let Ending { mut server, stream, mut busy, mut idle } = Ending::prepare(json!({}), None, server).await;
    let ((), (acks, end), (_, idle_end)) = tokio::join!(server.stop(), busy.rest(), idle.rest());
    assert_eq!(acks, 0);
    assert_eq!(end.refusal(), (503, "server_draining".to_owned()));
    assert_eq!(idle_end.refusal(), (503, "server_draining".to_owned()));
    let server = server.restart().await;
    assert_eq!(stream.with_token(KEY).at(&server.wire()).bodies().await, ["before"]);
    let token_of_before = stream.at(&server.wire());
    token_of_before.append(&json!({"records": [{"body": "again"}]})).await.expect(200);
}

#[tokio::test]
async fn a_batch_that_its_channel_refuses_ends_the_session_and_nothing_behind_it_is_stored() {
    refused(vec![
        ("a condition", AppendInput { match_seq_num: Some(99), ..batch(&["no"]) }, 412, ""),
        ("another fence", AppendInput { fencing_token: Some("t".into()), ..batch(&["no"]) }, 412, ""),
    ])
    .await;
}

#[tokio::test]
async fn a_batch_that_is_none_ends_the_session_and_nothing_behind_it_is_stored() {
    refused(vec![
        ("no records", batch::<&str>(&[]), 422, "invalid"),
        ("too many records", batch(&vec!["no"; 1001]), 422, "invalid"),
        ("too large", batch(&["x".repeat(1 << 20)]), 422, "invalid"),
    ])
    .await;
}

async fn refused(cases: Vec<(&str, AppendInput, u16, &str)>) {
    let server = TestServer::start().await;
    let stream = stream(&server).await;
    for (name, refused, status, code) in cases {
        let before = stream.tail().await;
        let mut writer = stream.session().await.expect("a session");
        let all = [batch(&["yes"]), refused, batch(&["behind"]), batch(&["further behind"])];
        let all: Vec<u8> = all.iter().flat_map(frame).collect();
        writer.send_raw(all).await;
        let (acks, end) = writer.rest().await;
        assert_eq!(acks, 1, "{name}");
        assert_eq!(end.refusal(), (status, code.to_owned()), "{name}");
        drop(writer);
        assert_eq!(stream.bodies().await[before as usize..], ["yes"], "{name}");
    }
}

#[tokio::test]
async fn a_batch_that_comes_again_after_a_broken_connection_is_stored_once() {
    let server = TestServer::start().await;
    let stream = stream(&server).await;
    let batches: Vec<_> = (0..40)
        .map(|index| {
            let bodies: Vec<_> = (0..5)
                .map(|part| envelope(&format!("{index}.{part}"), &format!("id{index:03}{part}")))
                .collect();
            batch(&bodies)
        })
        .collect();
    let mut first = stream.session().await.expect("a session");
    for input in &batches {
        assert!(first.send(input).await);
    }
    // While the first connection still runs, the same again on another; and then on a third.
    let again = Stream { wire: stream.wire.again(), ..stream.clone() };
    let mut second = again.session().await.expect("a session");
    for input in &batches {
        assert!(second.send(input).await);
    }
    second.finish();
    let places = async |writer: &mut Writer| {
        let mut places = Vec::new();
        for _ in &batches {
            places.push(writer.ack().await);
        }
        places
    };
    let (one, two) = tokio::join!(places(&mut first), places(&mut second));
    assert_eq!(one, two, "a repeat is told the original places");
    drop(first);
    let server = server.restart().await;
    let mut third = stream.at(&server.wire()).session().await.expect("a session");
    for input in &batches {
        assert!(third.send(input).await);
    }
    assert_eq!(places(&mut third).await, one);
    let stored = stream.at(&server.wire()).bodies().await;
    let sent: Vec<_> = batches.iter().flat_map(|input| &input.records).collect();
    assert!(stored.iter().map(String::as_bytes).eq(sent.iter().map(|record| &record.body[..])));

    // Only the same is a repeat: an id with another body is another record.
    let changed = batch(&[envelope("changed", "id0390")]);
    assert!(third.send(&changed).await);
    assert_eq!(third.ack().await, 200);
    // And so is what has no id.
    for _ in 0..2 {
        let plain = AppendInput { records: vec![record(&[("k", "v")], "plain")], ..AppendInput::default() };
        assert!(third.send(&plain).await);
        third.ack().await;
    }
    assert_eq!(stream.at(&server.wire()).tail().await, 203);
}

#[tokio::test]
async fn sessions_are_for_writers_and_a_public_one_writes_in_alone() {
    let server = TestServer::start().await;
    let stream = stream(&server).await;
    let hour = Duration::from_secs(3600);
    let reads = server.token(&["read:sessions:s"], hour).await;
    let refused = stream.with_token(&reads).session().await.err().expect("refused");
    assert_eq!(refused.expect(403)["code"], "permission_denied");
    let writes = server.token(&["write:sessions:s"], hour).await;
    let mut out = stream.with_token(&writes);
    out.name = "sessions/s/out".to_owned();
    assert_eq!(out.session().await.err().expect("refused").expect(403)["code"], "permission_denied");
    let request = out.request(Method::POST, "").json(&json!({"records": [{"body": "x"}]}));
    assert_eq!(server.send(request).await.expect(403)["code"], "permission_denied");
    let mut input = out.clone();
    input.name = "sessions/s/in".to_owned();
    assert_eq!(input.session().await.expect("a session").write("x").await, 0);
}
