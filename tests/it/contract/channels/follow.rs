//! Followers: stored, then live, without a gap or a repeat, to the seal.

use super::*;

fn places(records: &[Record]) -> Vec<u64> {
    records.iter().map(|record| record.position.seq_num).collect()
}

pub(super) async fn followers_get_stored_records_then_live_ones(channels: Channels) {
    let key = channel();
    channels.append(&key, data(&["a", "b"])).await;
    let mut follower = channels.follow(&key, ReadStart::SeqNum(0)).await;
    assert_eq!(bodies(&follower.batch().await.records), ["a", "b"]);
    assert_eq!(follower.caught_up().await, 2);
    channels.append(&key, data(&["c", "d"])).await;
    let live = follower.batch().await;
    assert_eq!(bodies(&live.records), ["c", "d"]);
    let stored = channels.read(&key, ReadStart::SeqNum(2), ReadLimit::BATCH).await;
    assert_eq!((&live.records, live.tail), (&stored.records, stored.tail));
}

pub(super) async fn followers_start_in_the_middle_at_the_tail_and_past_it(channels: Channels) {
    let key = channel();
    channels.append(&key, data(&["a", "b", "c"])).await;
    let mut middle = channels.follow(&key, ReadStart::TailOffset(1)).await;
    assert_eq!(bodies(&middle.batch().await.records), ["c"]);
    assert_eq!(middle.caught_up().await, 3);
    for start in [ReadStart::SeqNum(3), ReadStart::TailOffset(0), ReadStart::SeqNum(1000)] {
        let mut follower = channels.follow(&key, start).await;
        let tail = follower.caught_up().await;
        channels.append(&key, data(&["d"])).await;
        assert_eq!(places(&follower.batch().await.records), [tail], "{start:?}");
    }
}

pub(super) async fn followers_below_the_trim_point_start_at_the_first_survivor(channels: Channels) {
    let key = channel();
    channels.append(&key, data(&["a", "b", "c"])).await;
    channels.append(&key, command(Command::Trim(2))).await;
    let mut follower = channels.follow(&key, ReadStart::SeqNum(0)).await;
    assert_eq!(places(&follower.batch().await.records), [2, 3]);
}

pub(super) async fn followers_of_an_unwritten_channel_get_its_first_record(channels: Channels) {
    let key = channel();
    let mut follower = channels.follow(&key, ReadStart::SeqNum(0)).await;
    assert_eq!(follower.caught_up().await, 0);
    channels.append(&key, data(&["a"])).await;
    assert_eq!(places(&follower.batch().await.records), [0]);
}

pub(super) async fn followers_share_a_live_batch(channels: Channels) {
    let key = channel();
    let mut one = channels.follow(&key, ReadStart::SeqNum(0)).await;
    let mut two = channels.follow(&key, ReadStart::SeqNum(0)).await;
    one.caught_up().await;
    two.caught_up().await;
    channels.append(&key, data(&["a"])).await;
    assert!(Arc::ptr_eq(&one.batch().await, &two.batch().await));
}

pub(super) async fn followers_of_a_sealed_session_get_the_rest_and_the_end(channels: Channels) {
    let key = channel();
    channels.append(&key, data(&["a"])).await;
    channels.store.seal(&key.session, closure("done").into()).await.expect("seals");
    let mut follower = channels.follow(&key, ReadStart::SeqNum(0)).await;
    assert_eq!(bodies(&follower.batch().await.records), ["a", ""]);
    follower.caught_up().await;
    assert_eq!(follower.sealed().await, closure("done"));
    assert!(follower.next().await.is_none());
}

pub(super) async fn waiting_followers_of_every_channel_see_the_seal(channels: Channels) {
    let key = channel();
    let keys =
        [key.clone(), side(&key, Direction::In, None), side(&key, Direction::Out, Some("never-written"))];
    let mut followers = Vec::new();
    for key in &keys {
        let mut follower = channels.follow(key, ReadStart::SeqNum(0)).await;
        follower.caught_up().await;
        // From here on it waits, and looks again only if it is woken.
        assert!(follower.0.next().now_or_never().is_none());
        followers.push(follower);
    }
    channels.append(&key, data(&["last"])).await;
    channels.store.seal(&key.session, closure("done").into()).await.expect("seals");
    for (follower, last) in followers.iter_mut().zip([2, 1, 0]) {
        follower.records(last).await;
        assert_eq!(follower.sealed().await, closure("done"));
        assert!(follower.next().await.is_none());
    }
}

pub(super) async fn a_slow_follower_skips_and_repeats_nothing(channels: Channels) {
    let key = channel();
    let mut follower = channels.follow(&key, ReadStart::SeqNum(0)).await;
    follower.caught_up().await;
    let bodies: Vec<_> = (0..50).map(|_| "x".repeat(100)).collect();
    let bodies: Vec<_> = bodies.iter().map(String::as_str).collect();
    for _ in 0..100 {
        channels.append(&key, data(&bodies)).await;
    }
    assert_eq!(places(&follower.records(5000).await), (0..5000).collect::<Vec<_>>());
    assert_eq!(follower.caught_up().await, 5000);
    channels.append(&key, data(&["live"])).await;
    assert_eq!(places(&follower.batch().await.records), [5000]);
}

pub(super) async fn followers_among_concurrent_writers_see_every_record_once(channels: Channels) {
    let key = channel();
    let writers = (0..8).map(|_| {
        let (store, key) = (channels.store.clone(), key.clone());
        tokio::spawn(async move {
            for _ in 0..100 {
                store.append(&key, data(&["a", "b"])).await.expect("appends");
            }
        })
    });
    let writers: Vec<_> = writers.collect();
    let mut followers = Vec::new();
    for start in [0, 0, 1, 7] {
        let mut follower = channels.follow(&key, ReadStart::SeqNum(0)).await;
        followers.push(tokio::spawn(async move {
            let mut records = follower.records(1 + start).await;
            tokio::task::yield_now().await;
            records.extend(follower.records(1600 - records.len()).await);
            assert_eq!(places(&records), (0..1600).collect::<Vec<_>>());
        }));
    }
    for task in writers.into_iter().chain(followers) {
        task.await.expect("no fault");
    }
}

pub(super) async fn a_dropped_follower_holds_nothing_up(channels: Channels) {
    let key = channel();
    let mut stays = channels.follow(&key, ReadStart::SeqNum(0)).await;
    drop(channels.follow(&key, ReadStart::SeqNum(0)).await);
    stays.caught_up().await;
    channels.append(&key, data(&["a"])).await;
    assert_eq!(bodies(&stays.batch().await.records), ["a"]);
    drop(stays);
    channels.append(&key, data(&["b"])).await;
    assert_eq!(channels.all(&key).await, ["a", "b"]);
}
