//! The Rust SDK of S2 itself, unchanged, against our endpoint.

use std::time::Duration;

use futures_util::StreamExt;
use s2_sdk::append_session::AppendSessionConfig;
use s2_sdk::producer::ProducerConfig;
use s2_sdk::types::{
    AppendInput, AppendRecord, AppendRecordBatch, CommandRecord, Compression, Header, ReadFrom, ReadInput,
    ReadLimits, ReadSessionConfig, ReadStart, ReadStop, S2Config, S2Endpoints,
};
use s2_sdk::{S2, S2Stream};
use serde_json::json;

use crate::harness::TestServer;
use crate::harness::s2::Stream;

/// The channel as the SDK opens it with what initialize has answered.
fn sdk(server: &TestServer, stream: &Stream, compression: Compression) -> S2Stream {
    let endpoints = S2Endpoints::for_endpoint(&server.url).expect("an endpoint");
    let config = S2Config::new(stream.token.as_str()).with_endpoints(endpoints).with_compression(compression);
    let basin = S2::new(config).expect("a client").basin("sessiond".parse().expect("a basin"));
    basin.stream(stream.name.parse().expect("a name"))
}

fn input<S: AsRef<str>>(bodies: &[S]) -> AppendInput {
    let records = bodies.iter().map(|body| AppendRecord::new(body.as_ref().to_owned()).expect("fits"));
    AppendInput::new(AppendRecordBatch::try_from_iter(records).expect("a batch"))
}

fn from(seq_num: u64) -> ReadInput {
    ReadInput::new().with_start(ReadStart::new().with_from(ReadFrom::SeqNum(seq_num)))
}

#[tokio::test]
async fn appends_reads_and_tails() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "a b/c"})).await;
    let opened = server.wire().open("a%20b%2Fc", "out").await;
    let stream = sdk(&server, &opened, Compression::None);
    assert_eq!(stream.check_tail().await.expect("a tail").seq_num, 0);
    let record = AppendRecord::new(vec![0u8, 255]).expect("fits");
    let record = record.with_headers([Header::new("k", vec![0xffu8])]).expect("fits");
    let batch = AppendRecordBatch::try_from_iter([record]).expect("a batch");
    let ack = stream.append(AppendInput::new(batch)).await.expect("an ack");
    assert_eq!((ack.start.seq_num, ack.end.seq_num, ack.tail.seq_num), (0, 1, 1));
    let read = stream.read(from(0)).await.expect("a batch");
    assert_eq!(read.records[0].body, vec![0, 255]);
    assert_eq!(read.records[0].headers, [Header::new("k", vec![0xffu8])]);
    let mismatch = stream.append(input(&["x"]).with_match_seq_num(7)).await.expect_err("refused");
    assert!(matches!(mismatch, s2_sdk::error::AppendError::ConditionFailed(_)), "{mismatch:?}");
    let trim: AppendRecord = CommandRecord::trim(1).into();
    stream
        .append(AppendInput::new(AppendRecordBatch::try_from_iter([trim]).expect("a batch")))
        .await
        .expect("an ack");
    let left = stream.read(from(0)).await.expect("a batch");
    assert!(left.records[0].is_command_record() && left.records[0].seq_num == 1);
}

#[tokio::test]
async fn single_batches_may_be_compressed() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let opened = server.wire().open("s", "in").await;
    let body = "all the same ".repeat(50_000);
    for (index, compression) in [Compression::Gzip, Compression::Zstd].into_iter().enumerate() {
        let stream = sdk(&server, &opened, compression);
        let ack = stream.append(input(&[&body])).await.expect("an ack");
        assert_eq!(ack.end.seq_num, index as u64 + 1);
        let read = stream.read(from(index as u64)).await.expect("a batch");
        assert!(read.records[0].body == body.as_bytes(), "{compression:?}");
    }
}

#[tokio::test]
async fn append_sessions_and_producers_pipeline_and_read_sessions_follow() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let opened = server.wire().open("s", "in").await;
    for (round, compression) in
        [Compression::None, Compression::Gzip, Compression::Zstd].into_iter().enumerate()
    {
        let stream = sdk(&server, &opened, compression);
        let before = stream.check_tail().await.expect("a tail").seq_num;
        let mut follower =
            stream.read_session(from(before), ReadSessionConfig::default()).await.expect("a read");
        let session = stream.append_session(AppendSessionConfig::new());
        let mut tickets = Vec::new();
        for index in 0..300 {
            let bodies = [format!("{round}.{index} {}", "x".repeat(2000)), "second".to_owned()];
            tickets.push(session.submit(input(&bodies)).await.expect("taken"));
        }
        for (index, ticket) in tickets.into_iter().enumerate() {
            let ack = ticket.await.expect("an ack");
            assert_eq!(ack.start.seq_num, before + 2 * index as u64);
        }
        session.close().await.expect("a clean end");
        let producer = stream.producer(ProducerConfig::new());
        let mut tickets = Vec::new();
        for index in 0..100 {
            let record = AppendRecord::new(format!("produced {index}")).expect("fits");
            tickets.push(producer.submit(record).await.expect("taken"));
        }
        for (index, ticket) in tickets.into_iter().enumerate() {
            assert_eq!(ticket.await.expect("an ack").seq_num, before + 600 + index as u64);
        }
        producer.close().await.expect("a clean end");
        let mut next = before;
        while next < before + 700 {
            let batch = follower.next().await.expect("more").expect("a batch");
            for record in batch.records {
                assert_eq!(record.seq_num, next);
                next += 1;
            }
        }
    }
    let stop = ReadStop::new().with_limits(ReadLimits::new().with_count(1500));
    let stream = sdk(&server, &opened, Compression::None);
    let bounded =
        stream.read_session(from(0).with_stop(stop), ReadSessionConfig::default()).await.expect("a read");
    let counts = bounded.map(|batch| batch.expect("a batch").records.len()).collect::<Vec<_>>().await;
    assert_eq!(counts.iter().sum::<usize>(), 1500);
}

#[tokio::test]
async fn a_close_reaches_the_sdk_as_an_error_that_it_does_not_retry() {
    let server = TestServer::start().await;
    server.create(json!({"externalId": "s"})).await;
    let opened = server.wire().open("s", "in").await;
    let stream = sdk(&server, &opened, Compression::None);
    let session = stream.append_session(AppendSessionConfig::new());
    session.submit(input(&["before"])).await.expect("taken").await.expect("an ack");
    opened.wire.close("s").await;
    let refused = async {
        session.submit(input(&["after"])).await?.await?;
        Ok::<_, s2_sdk::error::AppendSessionError>(())
    };
    let refused = tokio::time::timeout(Duration::from_secs(20), refused).await.expect("at once");
    let refused = refused.expect_err("refused");
    assert!(!refused.is_retryable() && format!("{refused:?}").contains("session_closed"), "{refused:?}");
    let refused = stream.append(input(&["after"])).await.expect_err("refused");
    assert!(!refused.is_retryable() && format!("{refused:?}").contains("session_closed"), "{refused:?}");
    assert_eq!(opened.bodies().await, ["before"]);
}
