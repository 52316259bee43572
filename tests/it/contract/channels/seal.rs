//! Seals: once per session, for every channel, for ever.

use super::*;

pub(super) async fn the_first_seal_holds(channels: Channels) {
    let session = channel().session;
    assert_eq!(channels.store.seal(&session, closure("one")).await.expect("seals"), closure("one"));
    let later = Closure { at: Timestamp::from_millis(1_800_000_000_000), reason: None };
    assert_eq!(channels.store.seal(&session, later).await.expect("seals"), closure("one"));
}

pub(super) async fn of_many_seals_one_holds(channels: Channels) {
    let session = channel().session;
    let seals = (0..16).map(|index: u32| {
        let (store, session) = (channels.store.clone(), session.clone());
        tokio::spawn(async move { store.seal(&session, closure(&index.to_string())).await.expect("seals") })
    });
    let mut held = Vec::new();
    for seal in seals.collect::<Vec<_>>() {
        held.push(seal.await.expect("seals"));
    }
    assert!(held.iter().all(|closure| *closure == held[0]), "{held:?}");
}

pub(super) async fn a_sealed_session_takes_no_append_not_even_a_repeat(channels: Channels) {
    let key = channel();
    let input = || AppendInput::one(part("p", "a")).expect("fits");
    channels.append(&key, input()).await;
    channels.store.seal(&key.session, closure("done")).await.expect("seals");
    for input in [data(&["x"]), input(), command(Command::Trim(1))] {
        match channels.refused(&key, input).await {
            Error::Closed { at, reason } => assert_eq!(Closure { at, reason }, closure("done")),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(channels.all(&key).await, ["a"]);
}

pub(super) async fn a_seal_covers_channels_that_were_never_written(channels: Channels) {
    let key = channel();
    channels.store.seal(&key.session, closure("done")).await.expect("seals");
    for key in [side(&key, Direction::In, None), side(&key, Direction::Out, Some("late"))] {
        assert!(matches!(channels.refused(&key, data(&["x"])).await, Error::Closed { .. }));
    }
}

pub(super) async fn a_seal_leaves_other_sessions_alone(channels: Channels) {
    channels.store.seal(&channel().session, closure("done")).await.expect("seals");
    channels.append(&channel(), data(&["a"])).await;
}

pub(super) async fn no_append_is_acknowledged_behind_a_seal(channels: Channels) {
    let key = channel();
    let mut follower = channels.follow(&key, ReadStart::SeqNum(0)).await;
    let writers = (0..16).map(|_| {
        let (store, key) = (channels.store.clone(), key.clone());
        tokio::spawn(async move {
            let mut acked = 0_u64;
            while store.append(&key, data(&["a"])).await.is_ok() {
                acked += 1;
            }
            acked
        })
    });
    let writers: Vec<_> = writers.collect();
    follower.records(50).await;
    channels.store.seal(&key.session, closure("done")).await.expect("seals");
    let tail = channels.tail(&key).await;
    let mut acked = 0;
    for writer in writers {
        acked += writer.await.expect("writes");
    }
    assert_eq!((acked, channels.tail(&key).await), (tail, tail));
}

pub(super) async fn seals_are_unsettled_until_they_are_settled(channels: Channels) {
    let (one, two) = (channel().session, channel().session);
    for session in [&one, &two] {
        channels.store.seal(session, closure("done")).await.expect("seals");
    }
    channels.store.settle(&one).await.expect("settles");
    channels.store.settle(&one).await.expect("settles twice");
    let unsettled = channels.store.unsettled().await.expect("lists");
    assert_eq!(unsettled, [(two.clone(), closure("done"))]);
    channels.store.seal(&one, closure("again")).await.expect("stays settled");
    channels.store.settle(&two).await.expect("settles");
    assert!(channels.store.unsettled().await.expect("lists").is_empty());
}
