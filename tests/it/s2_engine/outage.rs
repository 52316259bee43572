//! S2 goes away and comes back: nothing acknowledged is lost, doubled or reordered, and followers keep their streams.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use sessiond::domain::Error;
use tokio::sync::watch;

use super::*;
use crate::harness::s2_lite::{LONGEST_PAUSE, S2Lite};

const ROUNDS: usize = 3;
/// Acks of one round after which S2 is killed.
const ACKS: usize = 300;
/// Appends that must have been refused before S2 comes back.
const REFUSED: usize = 16;
/// How long S2 stays away once: long enough for followers to have come to their longest pause, and to stay there.
const AWAY: Duration = LONGEST_PAUSE.saturating_mul(6);

/// What all writers have heard.
#[derive(Default)]
struct Heard {
    acked: AtomicUsize,
    refused: AtomicUsize,
    stop: AtomicBool,
    changed: watch::Sender<()>,
}

impl Heard {
    fn one_more(&self, count: &AtomicUsize) {
        count.fetch_add(1, Ordering::SeqCst);
        self.changed.send_replace(());
    }

    async fn more(&self, count: &AtomicUsize, by: usize) {
        let (before, mut changed) = (count.load(Ordering::SeqCst), self.changed.subscribe());
        let enough = async {
            while count.load(Ordering::SeqCst) < before + by {
                changed.changed().await.expect("writers");
            }
        };
        tokio::time::timeout(Duration::from_secs(120), enough).await.expect("writers go on");
    }
}

/// What one writer was told: bodies by place, and those whose append was answered with "unavailable".
type Told = (BTreeMap<u64, String>, Vec<String>);

/// Appends one record after another. With part ids it sends again what was not taken; without, it never does.
async fn write(
    replica: Arc<S2Channels>,
    key: ChannelKey,
    name: String,
    named: bool,
    heard: Arc<Heard>,
) -> Told {
    let (mut acked, mut lost) = (BTreeMap::new(), Vec::new());
    let mut last = None;
    for number in 0.. {
        let body = format!("{name} {number}");
        loop {
            let input = if named { part(&body, &body) } else { data(&body) };
            match replica.append(&key, input).await {
                Ok(ack) => {
                    let place = ack.start.seq_num;
                    assert!(last < Some(place), "{body} stands before what was acknowledged before it");
                    last = Some(place);
                    acked.insert(place, body);
                    heard.one_more(&heard.acked);
                    break;
                }
                Err(Error::Unavailable { .. }) => heard.one_more(&heard.refused),
                Err(other) => panic!("{other:?}"),
            }
            if heard.stop.load(Ordering::SeqCst) || !named {
                lost.push(body);
                break;
            }
        }
        if heard.stop.load(Ordering::SeqCst) {
            return (acked, lost);
        }
    }
    unreachable!("counts for ever")
}

fn start(
    replicas: &[Arc<S2Channels>],
    key: &ChannelKey,
    heard: &Arc<Heard>,
) -> Vec<tokio::task::JoinHandle<Told>> {
    let writers = (0..8).map(|number| {
        let (replica, named) = (replicas[number % replicas.len()].clone(), number % 4 < 2);
        tokio::spawn(write(replica, key.clone(), format!("writer {number}"), named, heard.clone()))
    });
    writers.collect()
}

/// Compares what is stored with what was told.
async fn check(records: &[Record], told: Vec<Told>) {
    assert_eq!(places(records), (0..records.len() as u64).collect::<Vec<_>>());
    let stored = bodies(records);
    let mut count: HashMap<&str, usize> = HashMap::new();
    stored.iter().for_each(|body| *count.entry(body).or_default() += 1);
    assert!(
        count.values().all(|times| *times == 1),
        "doubled: {:?}",
        count.iter().find(|(_, times)| **times > 1)
    );
    let mut allowed: HashMap<String, bool> = HashMap::new();
    for (acked, lost) in told {
        for (place, body) in acked {
            assert_eq!(stored.get(place as usize), Some(&body), "acknowledged at {place}");
            allowed.insert(body, true);
        }
        allowed.extend(lost.into_iter().map(|body| (body, false)));
    }
    assert!(stored.iter().all(|body| allowed.contains_key(body)), "nobody has sent this");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_or_doubled_when_s2_is_killed_under_load() {
    let mut s2 = S2Lite::start().await;
    let (basin, key) = (fresh_basin(), main_out("outage"));
    let replicas = [open(&s2.url(), &basin).await, open(&s2.url(), &basin).await];
    let mut followers = [Follower::of(&replicas[0], &key).await, Follower::of(&replicas[1], &key).await];
    let heard = Arc::new(Heard::default());
    let writers = start(&replicas, &key, &heard);
    for _ in 0..ROUNDS {
        heard.more(&heard.acked, ACKS).await;
        s2.kill().await;
        heard.more(&heard.refused, REFUSED).await;
        assert!(matches!(replicas[0].ping().await, Err(Error::Unavailable { .. })));
        s2.restart().await;
    }
    heard.more(&heard.acked, ACKS).await;
    heard.stop.store(true, Ordering::SeqCst);
    let mut told = Vec::new();
    for writer in writers {
        told.push(writer.await.expect("writes"));
    }
    let fresh = open(&s2.url(), &basin).await;
    let records = all(&fresh, &key).await;
    for follower in &mut followers {
        assert_eq!(follower.records(records.len()).await, records, "a follower sees every record once");
    }
    check(&records, told).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_goes_on_after_s2_was_away_for_long() {
    let mut s2 = S2Lite::start().await;
    let (basin, keys) = (fresh_basin(), [main_out("away"), named("away", "side"), main_out("other")]);
    let replica = open(&s2.url(), &basin).await;
    let mut followers = Vec::new();
    for key in &keys {
        replica.append(key, part("before", "before")).await.expect("appends");
        followers.push(Follower::of(&replica, key).await);
    }
    for follower in &mut followers {
        follower.records(1).await;
    }
    s2.kill().await;
    let away = tokio::time::sleep(AWAY);
    let unavailable =
        |error: Option<Error>| assert!(matches!(error, Some(Error::Unavailable { .. })), "{error:?}");
    unavailable(replica.append(&keys[0], data("lost")).await.err());
    unavailable(replica.append(&keys[0], part("part", "after")).await.err());
    unavailable(replica.bounds(&keys[0]).await.err());
    unavailable(replica.read(&keys[0], ReadStart::SeqNum(0), ReadLimit::BATCH).await.err());
    unavailable(replica.follow(&main_out("new"), ReadStart::SeqNum(0), &ample_budget()).await.err());
    unavailable(replica.seal(&session("away"), closure("early").into()).await.err());
    unavailable(replica.ping().await.err());
    away.await;
    s2.restart().await;
    for (key, follower) in keys.iter().zip(&mut followers) {
        assert!(!replica.append(key, part("part", "after")).await.expect("appends").repeated);
        assert_eq!(bodies(&follower.records(1).await), ["after"]);
        assert_eq!(bodies(&all(&replica, key).await), ["before", "after"]);
    }
    let sealed = replica.seal(&session("away"), closure("done").into()).await.expect("seals");
    for (key, follower) in keys.iter().zip(&mut followers).take(2) {
        let (rest, closure) = follower.drain().await;
        // A main channel tells of the close.
        assert_eq!((rest.len(), closure), (usize::from(key.address.name.is_none()), sealed.clone()));
    }
}
