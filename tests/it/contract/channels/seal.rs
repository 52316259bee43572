//! Seals: once per session, for every channel, for ever.

use super::*;

pub(super) async fn the_first_seal_holds(channels: Channels) {
    let session = channel().session;
    assert_eq!(channels.store.seal(&session, closure("one").into()).await.expect("seals"), closure("one"));
    let later = Closure { at: Timestamp::from_millis(1_800_000_000_000), reason: None };
    assert_eq!(channels.store.seal(&session, later.into()).await.expect("seals"), closure("one"));
}

pub(super) async fn of_many_seals_one_holds(channels: Channels) {
    let session = channel().session;
    let seals = (0..16).map(|index: u32| {
        let (store, session) = (channels.store.clone(), session.clone());
        tokio::spawn(
            async move { store.seal(&session, closure(&index.to_string()).into()).await.expect("seals") },
        )
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
    channels.store.seal(&key.session, closure("done").into()).await.expect("seals");
    for input in [data(&["x"]), input(), command(Command::Trim(1))] {
        match channels.refused(&key, input).await {
            Error::Closed { at, reason } => assert_eq!(Closure { at, reason }, closure("done")),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(channels.all(&key).await, ["a", ""], "what was there, and what tells of the close");
}

fn told(reason: &str) -> NewRecord {
    close::output_record(&closure(reason))
}

fn control(name: &'static str) -> AppendInput {
    let headers = vec![("trigger-control".into(), name.into())];
    AppendInput::one(NewRecord { headers, ..NewRecord::default() }).expect("fits")
}

/// The headers and bodies of a channel's records, commands left out.
async fn shown(channels: &Channels, key: &ChannelKey) -> Vec<NewRecord> {
    let read = channels.read(key, ReadStart::SeqNum(0), ReadLimit::BATCH).await;
    let shown = read.records.iter().filter(|record| !record.is_command());
    shown
        .map(|record| NewRecord { headers: record.headers.clone(), ..NewRecord::data(record.body.clone()) })
        .collect()
}

pub(super) async fn the_main_channels_end_with_what_tells_of_the_close(channels: Channels) {
    let output = channel();
    let [input, named] = [side(&output, Direction::In, None), side(&output, Direction::Out, Some("named"))];
    for key in [&output, &named] {
        channels.append(key, data(&["a"])).await;
        channels.append(key, command(Command::Fence("mine".into()))).await;
    }
    let mut follower = channels.follow(&output, ReadStart::SeqNum(0)).await;
    let held = channels.store.seal(&output.session, closure("done").into()).await.expect("seals");
    for again in ["done", "later"] {
        assert_eq!(
            channels.store.seal(&output.session, closure(again).into()).await.expect("is sealed"),
            held
        );
    }
    assert_eq!(shown(&channels, &output).await, [NewRecord::data("a"), told("done")]);
    assert_eq!(shown(&channels, &input).await, [close::input_record(&output.session)]);
    assert_eq!(shown(&channels, &named).await, [NewRecord::data("a")]);
    let followed = follower.records(3).await;
    assert_eq!(followed[2].headers, told("done").headers);
    while !matches!(follower.next().await, Some(Followed::Sealed(_))) {}
}

pub(super) async fn a_close_that_was_told_is_not_told_again(channels: Channels) {
    let said = |name| control(name).into_records().remove(0);
    for (ends, expected) in [
        // Behind a trim, as the agent of the SDK leaves it.
        (vec![data(&["a"]), control("session-closed"), command(Command::Trim(0))], vec![]),
        (vec![control("session-closed"), data(&["a"])], vec![told("done")]),
        (vec![control("turn-complete")], vec![told("done")]),
    ] {
        let key = channel();
        let mut records = Vec::new();
        for append in ends {
            let is_shown =
                |record: &&NewRecord| record.headers.first().is_none_or(|(name, _)| !name.is_empty());
            records.extend(append.records().iter().filter(is_shown).cloned());
            channels.append(&key, append).await;
        }
        channels.store.seal(&key.session, closure("done").into()).await.expect("seals");
        assert_eq!(shown(&channels, &key).await, [records, expected].concat());
    }
    let key = channel();
    channels.append(&key, control("turn-complete")).await;
    let close = Close { closure: closure("done"), told: true };
    channels.store.seal(&key.session, close).await.expect("seals");
    assert_eq!(shown(&channels, &key).await, [said("turn-complete")]);
    assert_eq!(shown(&channels, &side(&key, Direction::In, None)).await, [close::input_record(&key.session)]);
}

pub(super) async fn of_two_hundred_closes_one_is_told(channels: Channels) {
    let key = channel();
    let closes = (0..200).map(|index: u32| {
        let (store, session) = (channels.store.clone(), key.session.clone());
        async move { store.seal(&session, closure(&index.to_string()).into()).await.expect("seals") }
    });
    let held = futures_util::future::join_all(closes).await;
    let reason = held[0].reason.as_deref().expect("a reason");
    assert_eq!(shown(&channels, &key).await, [told(reason)]);
    let input = side(&key, Direction::In, None);
    assert_eq!(shown(&channels, &input).await.len(), 1);
    assert_eq!((channels.tail(&key).await, channels.tail(&input).await), (1, 1));
}

pub(super) async fn a_seal_covers_channels_that_were_never_written(channels: Channels) {
    let key = channel();
    channels.store.seal(&key.session, closure("done").into()).await.expect("seals");
    for key in [side(&key, Direction::In, None), side(&key, Direction::Out, Some("late"))] {
        assert!(matches!(channels.refused(&key, data(&["x"])).await, Error::Closed { .. }));
    }
}

pub(super) async fn a_seal_leaves_other_sessions_alone(channels: Channels) {
    channels.store.seal(&channel().session, closure("done").into()).await.expect("seals");
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
    channels.store.seal(&key.session, closure("done").into()).await.expect("seals");
    let tail = channels.tail(&key).await;
    let mut acked = 0;
    for writer in writers {
        acked += writer.await.expect("writes");
    }
    // The last one tells of the close.
    assert_eq!((acked + 1, channels.tail(&key).await), (tail, tail));
}

pub(super) async fn seals_are_unsettled_until_they_are_settled(channels: Channels) {
    let (one, two) = (channel().session, channel().session);
    for session in [&one, &two] {
        channels.store.seal(session, closure("done").into()).await.expect("seals");
    }
    channels.store.settle(&one).await.expect("settles");
    channels.store.settle(&one).await.expect("settles twice");
    let unsettled = channels.store.unsettled().await.expect("lists");
    assert_eq!(unsettled, [(two.clone(), closure("done"))]);
    channels.store.seal(&one, closure("again").into()).await.expect("stays settled");
    channels.store.settle(&two).await.expect("settles");
    assert!(channels.store.unsettled().await.expect("lists").is_empty());
}
