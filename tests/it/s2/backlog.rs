//! A close overtakes what waits for its turn: batches that were let in while the session was open, and that the log gets to
//! only when it is not, are refused. On a fast disk nothing waits for long enough to tell; this one is slow to sync.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use reqwest::Client;
use serde_json::Value;
use tokio::sync::Notify;

use crate::harness::Process;
use crate::harness::s2::{Heard, Stream, Wire, batch};
use crate::harness::server::KEY;

/// Writers, each with a batch of nearly 1 MiB: several times what may be on its way to the log at once.
const WRITERS: usize = 120;
/// What strace does to every sync of the log, in microseconds.
const SLOW: &str = "fdatasync:delay_enter=100000";

/// Writes one large batch through the door of its number; whether it was taken.
async fn write(stream: &Stream, url: &str, door: usize, body: String) -> bool {
    match door % 3 {
        0 => {
            let append = Client::new().post(format!("{url}/realtime/v1/sessions/s/in/append"));
            let answer = append.bearer_auth(KEY).body(body).send().await.expect("an answer");
            assert!(matches!(answer.status().as_u16(), 200 | 409), "{answer:?}");
            answer.status().is_success()
        }
        1 => match stream.append_proto(&batch(&[body])).await {
            Ok(_) => true,
            Err(refused) => {
                assert_eq!(refused.expect(409)["code"], "session_closed");
                false
            }
        },
        _ => {
            let Ok(mut writer) = stream.at(&stream.wire.again()).session().await else { return false };
            writer.send(&batch(&[body])).await;
            match writer.heard().await {
                Heard::Message(_) => true,
                refused => {
                    assert_eq!(refused.refusal(), (409, "session_closed".to_owned()));
                    false
                }
            }
        }
    }
}

/// The name at the beginning of a body, however it is wrapped.
fn name(record: &Value) -> String {
    let body = record["body"].as_str().expect("a body");
    let text = serde_json::from_str::<Value>(body).ok().and_then(|it| it["data"].as_str().map(str::to_owned));
    text.as_deref().unwrap_or(body).split(' ').next().expect("a name").to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_its_turn_while_a_session_closes_is_not_stored_afterwards() {
    let data = tempfile::tempdir().expect("a folder");
    let process = Process::serve(data.path()).await;
    let wire = Wire::new(&process.url);
    wire.create("s").await;
    let stream = wire.open("s", "in").await;
    let slow = process.inject(SLOW).await;
    let (acks, enough) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    let writers = (0..WRITERS).map(|index| {
        let (stream, url) = (stream.clone(), process.url.clone());
        let (acks, enough) = (acks.clone(), enough.clone());
        tokio::spawn(async move {
            let name = format!("w{index}");
            let body = format!("{name} {}", "x".repeat(1_000_000));
            let taken = write(&stream, &url, index, body).await;
            if taken && acks.fetch_add(1, Ordering::Relaxed) == WRITERS / 12 {
                enough.notify_one();
            }
            (name, taken)
        })
    });
    let writers: Vec<_> = writers.collect();
    enough.notified().await;
    wire.close("s").await;
    let tail = stream.tail().await;
    let (mut taken, mut refused) = (Vec::new(), 0);
    for writer in writers {
        match writer.await.expect("a writer") {
            (name, true) => taken.push(name),
            (_, false) => refused += 1,
        }
    }
    drop(slow);
    assert_eq!(stream.tail().await, tail, "stored after the close had returned");
    let mut stored: Vec<_> = stream.stored().await.iter().map(name).collect();
    stored.sort_unstable();
    taken.sort_unstable();
    assert_eq!(stored, taken);
    assert!(refused > 0, "the close came too late to overtake anything");
}
