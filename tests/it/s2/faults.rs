//! What was acknowledged is stored once and in order, whatever breaks: the server, the network, both at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use s2_api::v1::stream::proto::AppendInput;
use tokio::sync::Notify;

use crate::harness::Process;
use crate::harness::proxy::FlakyProxy;
use crate::harness::s2::{Heard, Stream, Wire, batch, envelope, frame};

/// Batches that a writer has on their way.
const WINDOW: usize = 64;

/// Longest wait for acks; a failure, not a pace.
const PATIENCE: Duration = Duration::from_secs(60);

/// Counts acks, and says when there are enough.
#[derive(Default)]
struct Acks {
    count: AtomicUsize,
    enough: AtomicUsize,
    reached: Notify,
}

impl Acks {
    fn one_more(&self) {
        if self.count.fetch_add(1, Ordering::SeqCst) + 1 >= self.enough.load(Ordering::SeqCst) {
            self.reached.notify_one();
        }
    }

    /// Returns once there have been `enough` of them from the beginning.
    async fn reach(&self, enough: usize) {
        self.enough.store(enough, Ordering::SeqCst);
        let reached = async {
            while self.count.load(Ordering::SeqCst) < enough {
                self.reached.notified().await;
            }
        };
        tokio::time::timeout(PATIENCE, reached).await.expect("acks");
    }
}

/// Writes batches in order as the SDK does: pipelined, and after a broken connection again from the first that has no ack.
struct Persistent {
    stream: Stream,
    batches: Vec<AppendInput>,
    /// Where each acknowledged batch stands, by its number.
    places: Vec<u64>,
    acks: Arc<Acks>,
}

impl Persistent {
    fn new(stream: Stream, name: &str, count: usize, acks: Arc<Acks>) -> Self {
        let batches = (0..count).map(|index| {
            let part = |part| envelope(&format!("{name} {index}.{part}"), &format!("{index:06x}{part}"));
            batch(&(0..=index % 3).map(part).collect::<Vec<_>>())
        });
        Self { stream, batches: batches.collect(), places: Vec::new(), acks }
    }

    fn done(&self) -> bool {
        self.places.len() == self.batches.len()
    }

    /// One connection's worth; returns when it breaks, or when everything is acknowledged.
    async fn go_on(&mut self, wire: &Wire) {
        let Ok(Ok(mut writer)) = self.stream.at(wire).attempt("").await else { return };
        let first = self.places.len();
        let mut sent = first;
        while !self.done() {
            while sent < self.batches.len() && sent - self.places.len() < WINDOW {
                if !writer.send(&self.batches[sent]).await {
                    break;
                }
                sent += 1;
            }
            match writer.heard().await {
                Heard::Message(ack) => {
                    self.places.push(ack.start.expect("a start").seq_num);
                    self.acks.one_more();
                }
                Heard::Broken => return,
                other => panic!("neither an ack nor a break: {other:?}"),
            }
        }
    }

    /// Everything is stored once and in order, and where it was said to be.
    async fn check(&self, wire: &Wire) {
        assert!(self.done());
        let stored = self.stream.at(wire).bodies().await;
        let sent: Vec<_> = self.batches.iter().flat_map(|input| &input.records).collect();
        assert_eq!(stored.len(), sent.len(), "lost or doubled");
        for (stored, sent) in stored.iter().zip(&sent) {
            assert_eq!(stored.as_bytes(), &sent.body[..]);
        }
        let mut next = 0;
        for (place, input) in self.places.iter().zip(&self.batches) {
            assert_eq!(*place, next);
            next += input.records.len() as u64;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_under_append_sessions_loses_and_doubles_nothing_that_is_sent_again() {
    const SESSIONS: usize = 6;
    const ROUNDS: usize = 4;
    const BATCHES: usize = 1_500;
    /// Acks from one kill to the next: what is left in the end is more than all that is on its way when it comes.
    const EACH_ROUND: usize = SESSIONS * BATCHES / (ROUNDS + 2);
    let data = tempfile::tempdir().expect("a folder");
    let acks = Arc::new(Acks::default());
    let mut writers = Vec::new();
    let mut broken = 0;
    for round in 0..ROUNDS {
        let process = Process::serve(data.path()).await;
        let wire = Wire::new(&process.url);
        if round == 0 {
            for index in 0..SESSIONS {
                let name = format!("s{index}");
                wire.create(&name).await;
                let stream = wire.open(&name, "in").await;
                writers.push(Persistent::new(stream, &name, BATCHES, acks.clone()));
            }
        }
        let running: Vec<_> = writers
            .drain(..)
            .map(|mut writer| {
                let wire = wire.again();
                tokio::spawn(async move {
                    writer.go_on(&wire).await;
                    writer
                })
            })
            .collect();
        acks.reach((round + 1) * EACH_ROUND).await;
        process.kill().await;
        for running in running {
            let writer = running.await.expect("a writer");
            broken += usize::from(!writer.done());
            writers.push(writer);
        }
    }
    assert!(broken >= ROUNDS, "nobody was writing when it was killed");
    let process = Process::serve(data.path()).await;
    let wire = Wire::new(&process.url);
    for writer in &mut writers {
        writer.go_on(&wire.again()).await;
        writer.check(&wire).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_that_cuts_at_random_loses_and_doubles_nothing() {
    let data = tempfile::tempdir().expect("a folder");
    let process = Process::serve(data.path()).await;
    let wire = Wire::new(&process.url);
    let seed = u64::from(uuid::Uuid::new_v4().as_fields().0);
    let writing = (0..3).map(|index| {
        let (wire, url) = (wire.clone(), process.url.clone());
        tokio::spawn(async move {
            let name = format!("s{index}");
            wire.create(&name).await;
            let stream = wire.open(&name, "in").await;
            let proxy = FlakyProxy::before(&url, seed + index, 2_000..20_000).await;
            let mut writer = Persistent::new(stream, &name, 600, Arc::default());
            while !writer.done() {
                writer.go_on(&Wire::new(&proxy.url)).await;
            }
            assert!(proxy.cuts() > 5, "seed {seed}: the network was too good");
            writer.check(&wire).await;
        })
    });
    for writing in writing.collect::<Vec<_>>() {
        writing.await.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn single_batches_that_are_sent_until_they_are_acknowledged_are_stored_once() {
    let data = tempfile::tempdir().expect("a folder");
    let process = Process::serve(data.path()).await;
    let wire = Wire::new(&process.url);
    wire.create("s").await;
    let stream = wire.open("s", "in").await;
    let seed = u64::from(uuid::Uuid::new_v4().as_fields().0);
    let proxy = FlakyProxy::before(&process.url, seed, 700..6_000).await;
    let mut writer = Persistent::new(stream, "s", 200, Arc::default());
    let (mut client, mut again) = (Wire::new(&proxy.url), 0);
    while let Some(input) = writer.batches.get(writer.places.len()) {
        match writer.stream.at(&client).try_append_proto(input).await {
            Ok(ack) => writer.places.push(ack.start.expect("a start").seq_num),
            Err(_) => {
                client = Wire::new(&proxy.url);
                again += 1;
            }
        }
    }
    assert!(again > 5, "seed {seed}: the network was too good");
    writer.check(&wire).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_append_sessions_at_once_each_get_their_acks_in_order() {
    const CONNECTIONS: usize = 10;
    const EACH: usize = 100;
    const BATCHES: usize = 6;
    let data = tempfile::tempdir().expect("a folder");
    let process = Process::serve(data.path()).await;
    let wire = Wire::new(&process.url);
    wire.create("s").await;
    let everybody = Arc::new(tokio::sync::Barrier::new(CONNECTIONS * EACH));
    let writers = (0..CONNECTIONS).flat_map(|connection| {
        let (wire, everybody) = (wire.again(), everybody.clone());
        (0..EACH).map(move |index| {
            let (wire, everybody) = (wire.clone(), everybody.clone());
            tokio::spawn(async move {
                // Ten writers to each channel, so that they also meet.
                let channel = format!("channels/c{}/in", connection * EACH / 10 + index / 10);
                let stream = wire.open("s", &channel).await;
                let mut writer = stream.session().await.expect("a session");
                everybody.wait().await;
                let frames = writer.sender();
                let sending = tokio::spawn(async move {
                    for number in 0..BATCHES {
                        let bodies = [format!("{connection}-{index}-{number}"), "second".to_owned()];
                        frames.send(frame(&batch(&bodies))).await.expect("taken");
                    }
                });
                let mut places = Vec::new();
                for number in 0..BATCHES {
                    places.push((writer.ack().await, format!("{connection}-{index}-{number}")));
                }
                sending.await.expect("sent");
                assert_eq!(writer.heard().await, Heard::End);
                assert!(places.is_sorted(), "{places:?}");
                (channel, places)
            })
        })
    });
    let writers: Vec<_> = writers.collect();
    let mut channels = std::collections::BTreeMap::<_, std::collections::BTreeMap<_, _>>::new();
    for writer in writers {
        let (channel, places) = writer.await.expect("a writer");
        channels.entry(channel).or_default().extend(places);
    }
    assert_eq!(channels.len(), CONNECTIONS * EACH / 10);
    for (channel, places) in channels {
        let stored = wire.open("s", &channel).await.bodies().await;
        assert_eq!(stored.len(), 10 * 2 * BATCHES, "{channel}");
        assert_eq!(places.len(), 10 * BATCHES, "{channel}: two acks for one place");
        for (place, body) in places {
            let place = usize::try_from(place).expect("a place");
            assert_eq!((stored[place].as_str(), stored[place + 1].as_str()), (body.as_str(), "second"));
        }
    }
}
