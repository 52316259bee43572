//! Appends: numbers, atomicity, compare-and-set, fences, trims, times.

use super::*;
use sessiond::domain::record::METERED_MAX;

pub(super) async fn a_channel_exists_as_soon_as_it_is_named(channels: Channels) {
    let key = channel();
    let bounds = channels.store.bounds(&key).await.expect("bounds");
    assert_eq!((bounds.earliest, bounds.tail.seq_num), (0, 0));
    assert!(channels.all(&key).await.is_empty());
}

pub(super) async fn sequence_numbers_start_at_zero_and_an_ack_names_every_place(channels: Channels) {
    let key = channel();
    let ack = channels.append(&key, data(&["a"])).await;
    assert_eq!((ack.start.seq_num, ack.end.seq_num, ack.tail.seq_num), (0, 1, 1));
    let ack = channels.append(&key, data(&["b", "c"])).await;
    assert_eq!((ack.start.seq_num, ack.end.seq_num, ack.tail.seq_num), (1, 3, 3));
    assert_eq!((ack.seq_nums, ack.repeated), (vec![1, 2], false));
    assert_eq!(ack.end, channels.store.bounds(&key).await.expect("bounds").tail);
    assert_eq!(channels.all(&key).await, ["a", "b", "c"]);
}

pub(super) async fn concurrent_appends_get_gapless_numbers(channels: Channels) {
    let key = channel();
    let writers = (0..64).map(|writer| {
        let (store, key) = (channels.store.clone(), key.clone());
        tokio::spawn(async move {
            let mut given = Vec::new();
            for turn in 0..10 {
                let body = format!("{writer}-{turn}");
                let ack = store.append(&key, data(&[&body])).await.expect("appends");
                given.push((ack.start.seq_num, body));
            }
            given
        })
    });
    let mut given = Vec::new();
    for writer in writers.collect::<Vec<_>>() {
        given.extend(writer.await.expect("writes"));
    }
    given.sort();
    assert_eq!(given.iter().map(|(seq_num, _)| *seq_num).collect::<Vec<_>>(), (0..640).collect::<Vec<_>>());
    assert_eq!(channels.all(&key).await, given.into_iter().map(|(_, body)| body).collect::<Vec<_>>());
}

pub(super) async fn appends_are_stored_in_the_order_in_which_they_were_made(channels: Channels) {
    let key = channel();
    let made = (0..300u64).map(|number| (number, channels.store.append(&key, data(&[&number.to_string()]))));
    // The last one is waited for first.
    for (number, append) in made.collect::<Vec<_>>().into_iter().rev() {
        assert_eq!(append.await.expect("appends").start.seq_num, number);
    }
    assert_eq!(channels.all(&key).await, (0..300).map(|number| number.to_string()).collect::<Vec<_>>());
}

pub(super) async fn an_append_that_nobody_waits_for_is_stored(channels: Channels) {
    let key = channel();
    drop(channels.store.append(&key, data(&["a"])));
    assert_eq!(channels.append(&key, data(&["b"])).await.start.seq_num, 1);
    assert_eq!(channels.all(&key).await, ["a", "b"]);
}

pub(super) async fn behind_a_refused_append_of_a_chain_nothing_is_stored(channels: Channels) {
    let key = channel();
    let chain = Chain::default();
    let chained = |mut input: AppendInput| {
        input.chain = Some(chain.clone());
        input
    };
    let inputs = [data(&["a"]), expecting(99, data(&["b"])), data(&["c"]), expecting(1, data(&["d"]))];
    let made = inputs.map(|input| channels.store.append(&key, chained(input)));
    let other = channels.store.append(&key, data(&["of another writer"]));
    let mut refused = Vec::new();
    for append in made {
        refused.extend(append.await.err());
    }
    assert!(
        matches!(refused[..], [Error::SeqNumMismatch { tail: 1 }, Error::Conflict(_), Error::Conflict(_)]),
        "{refused:?}"
    );
    other.await.expect("appends");
    assert!(matches!(channels.refused(&key, chained(data(&["later"]))).await, Error::Conflict(_)));
    assert_eq!(channels.all(&key).await, ["a", "of another writer"]);
}

pub(super) async fn concurrent_batches_are_never_interleaved(channels: Channels) {
    let key = channel();
    let writers = (0..16).map(|writer| {
        let (store, key) = (channels.store.clone(), key.clone());
        let body = writer.to_string();
        tokio::spawn(async move { store.append(&key, data(&[&body, &body, &body])).await.expect("appends") })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.expect("writes");
    }
    let all = channels.all(&key).await;
    assert_eq!(all.len(), 48);
    assert!(all.chunks(3).all(|batch| batch.iter().all(|body| *body == batch[0])), "{all:?}");
}

pub(super) async fn a_refused_batch_leaves_nothing_behind(channels: Channels) {
    let key = channel();
    let mut input = AppendInput::new(vec![
        NewRecord::data("x"),
        Command::Fence("f".into()).into_record(),
        Command::Trim(9).into_record(),
    ])
    .expect("fits");
    input.match_seq_num = Some(5);
    channels.refused(&key, input).await;
    let mut unfenced = data(&["a"]);
    unfenced.fencing_token = Some(String::new());
    assert_eq!(channels.append(&key, unfenced).await.start.seq_num, 0);
    assert_eq!(channels.all(&key).await, ["a"]);
}

pub(super) async fn the_expected_sequence_number_is_compared_and_set(channels: Channels) {
    let key = channel();
    for expected in [0, 1] {
        let input = expecting(expected, data(&["a"]));
        assert_eq!(channels.append(&key, input).await.start.seq_num, expected);
    }
    for wrong in [0, 1, 3, u64::MAX] {
        let input = expecting(wrong, data(&["x"]));
        assert!(matches!(channels.refused(&key, input).await, Error::SeqNumMismatch { tail: 2 }));
    }
}

pub(super) async fn of_many_writers_that_expect_the_same_tail_one_wins(channels: Channels) {
    let key = channel();
    let writers = (0..16).map(|_| {
        let (store, key) = (channels.store.clone(), key.clone());
        tokio::spawn(async move { store.append(&key, expecting(0, data(&["a"]))).await })
    });
    let mut won = 0;
    for writer in writers.collect::<Vec<_>>() {
        match writer.await.expect("writes") {
            Ok(_) => won += 1,
            Err(error) => assert!(matches!(error, Error::SeqNumMismatch { tail: 1 }), "{error:?}"),
        }
    }
    assert_eq!((won, channels.tail(&key).await), (1, 1));
}

fn with_token(token: &str) -> AppendInput {
    fenced(token, data(&["a"]))
}

pub(super) async fn a_fence_refuses_other_tokens_and_tells_the_right_one(channels: Channels) {
    let key = channel();
    channels.append(&key, command(Command::Fence("mine".into()))).await;
    match channels.refused(&key, with_token("yours")).await {
        Error::Fenced { expected } => assert_eq!(expected, "mine"),
        other => panic!("{other:?}"),
    }
    assert_eq!(channels.append(&key, with_token("mine")).await.start.seq_num, 1);
}

pub(super) async fn an_append_without_a_token_passes_a_fence(channels: Channels) {
    let key = channel();
    channels.append(&key, command(Command::Fence("mine".into()))).await;
    channels.append(&key, data(&["a"])).await;
    assert_eq!(channels.tail(&key).await, 2);
}

pub(super) async fn an_empty_fence_lifts_it(channels: Channels) {
    let key = channel();
    channels.append(&key, command(Command::Fence("mine".into()))).await;
    channels.append(&key, command(Command::Fence(String::new()))).await;
    channels.append(&key, with_token("")).await;
    assert!(matches!(channels.refused(&key, with_token("mine")).await, Error::Fenced { .. }));
}

pub(super) async fn the_fence_is_checked_before_the_sequence_number(channels: Channels) {
    let key = channel();
    channels.append(&key, command(Command::Fence("mine".into()))).await;
    let input = expecting(9, with_token("yours"));
    assert!(matches!(channels.refused(&key, input).await, Error::Fenced { .. }));
}

pub(super) async fn commands_of_one_batch_act_in_order(channels: Channels) {
    let key = channel();
    let fence = |token: &str| Command::Fence(token.to_owned()).into_record();
    let records = vec![NewRecord::data("a"), fence("one"), Command::Trim(1).into_record(), fence("two")];
    channels.append(&key, AppendInput::new(records).expect("fits")).await;
    assert_eq!(channels.store.bounds(&key).await.expect("bounds").earliest, 1);
    match channels.refused(&key, with_token("one")).await {
        Error::Fenced { expected } => assert_eq!(expected, "two"),
        other => panic!("{other:?}"),
    }
}

pub(super) async fn a_trim_is_visible_at_once_and_takes_a_number(channels: Channels) {
    let key = channel();
    channels.append(&key, data(&["a", "b", "c"])).await;
    assert_eq!(channels.append(&key, command(Command::Trim(2))).await.start.seq_num, 3);
    let bounds = channels.store.bounds(&key).await.expect("bounds");
    assert_eq!((bounds.earliest, bounds.tail.seq_num), (2, 4));
    assert_eq!(channels.all(&key).await[0], "c");
}

pub(super) async fn a_trim_backwards_changes_nothing_but_takes_a_number(channels: Channels) {
    let key = channel();
    channels.append(&key, data(&["a", "b", "c"])).await;
    channels.append(&key, command(Command::Trim(2))).await;
    assert_eq!(channels.append(&key, command(Command::Trim(1))).await.start.seq_num, 4);
    assert_eq!(channels.store.bounds(&key).await.expect("bounds").earliest, 2);
}

pub(super) async fn a_trim_past_the_tail_trims_everything(channels: Channels) {
    let key = channel();
    channels.append(&key, data(&["a", "b"])).await;
    channels.append(&key, command(Command::Trim(u64::MAX))).await;
    let bounds = channels.store.bounds(&key).await.expect("bounds");
    assert_eq!((bounds.earliest, bounds.tail.seq_num), (3, 3));
    assert!(channels.all(&key).await.is_empty());
    assert_eq!(channels.append(&key, data(&["c"])).await.start.seq_num, 3);
    assert_eq!(channels.all(&key).await, ["c"]);
}

pub(super) async fn control_and_command_records_come_back_as_they_were(channels: Channels) {
    let key = channel();
    let control = NewRecord {
        headers: vec![
            ("trigger-control".into(), "turn-complete".into()),
            ("n\0\u{ff}".into(), vec![0, 255, 128].into()),
            ("empty".into(), "".into()),
        ],
        ..NewRecord::default()
    };
    let binary = NewRecord::data((0..=255).collect::<Vec<u8>>());
    let sent =
        vec![control, binary, Command::Fence("f".into()).into_record(), Command::Trim(0).into_record()];
    channels.append(&key, AppendInput::new(sent.clone()).expect("fits")).await;
    let batch = channels.read(&key, ReadStart::SeqNum(0), ReadLimit::BATCH).await;
    for (sent, stored) in sent.iter().zip(&batch.records) {
        assert_eq!((&sent.headers, &sent.body), (&stored.headers, &stored.body));
    }
    assert_eq!(batch.records.iter().map(Record::is_command).collect::<Vec<_>>(), [false, false, true, true]);
}

pub(super) async fn times_never_run_backwards_or_ahead(channels: Channels) {
    let key = channel();
    let at = |millis| {
        let timestamp = Some(Timestamp::from_millis(millis));
        AppendInput::one(NewRecord { timestamp, ..NewRecord::data("a") }).expect("fits")
    };
    assert_eq!(channels.append(&key, at(1_000)).await.start.timestamp.millis(), 1_000);
    assert_eq!(channels.append(&key, at(500)).await.start.timestamp.millis(), 1_000);
    assert_eq!(channels.append(&key, at(2_000)).await.start.timestamp.millis(), 2_000);
    let future = channels.append(&key, at(i64::MAX)).await.start.timestamp;
    let now = channels.append(&key, data(&["a"])).await.start.timestamp;
    assert!(future.millis() > 2_000 && future <= now && now.millis() < 100_000_000_000_000);
    let ack = channels.append(&key, at(3_000)).await;
    assert_eq!(ack.start.timestamp.max(now), ack.start.timestamp);
}

pub(super) async fn metered_ends_grow_by_no_less_than_each_record(channels: Channels) {
    let key = channel();
    channels.append(&key, data(&["12", "1234"])).await;
    channels.append(&key, command(Command::Trim(1))).await;
    let header = NewRecord { headers: vec![("a".into(), "bc".into())], ..NewRecord::data("d") };
    channels.append(&key, AppendInput::one(header).expect("fits")).await;
    let batch = channels.read(&key, ReadStart::SeqNum(0), ReadLimit::BATCH).await;
    let ends: Vec<_> = batch.records.iter().map(|record| record.metered_end).collect();
    assert!(ends[0] >= 10 + 12 && ends[1] >= ends[0] + 22 && ends[2] >= ends[1] + 14, "{ends:?}");
    let alone = channels.read(&key, ReadStart::SeqNum(3), ReadLimit::BATCH).await;
    assert_eq!(alone.records[0].metered_end, ends[2]);
}

pub(super) async fn the_largest_record_comes_back_whole(channels: Channels) {
    let key = channel();
    let body: Vec<u8> = (0..METERED_MAX - 8).map(|index| (index * 31 % 251) as u8).collect();
    channels.append(&key, AppendInput::one(NewRecord::data(body.clone())).expect("fits")).await;
    let batch = channels.read(&key, ReadStart::SeqNum(0), ReadLimit::BATCH).await;
    assert!(batch.records[0].body == body);
}

pub(super) async fn sessions_directions_and_side_channels_are_separate_logs(channels: Channels) {
    let key = channel();
    let keys = [
        key.clone(),
        side(&key, Direction::In, None),
        side(&key, Direction::Out, Some("notes")),
        side(&key, Direction::In, Some("notes")),
        side(&key, Direction::Out, Some("note")),
        channel(),
    ];
    for (index, key) in keys.iter().enumerate() {
        assert_eq!(channels.append(key, data(&[&index.to_string()])).await.start.seq_num, 0);
    }
    for (index, key) in keys.iter().enumerate() {
        assert_eq!(channels.all(key).await, [index.to_string()]);
    }
}

pub(super) async fn the_log_says_that_it_is_well(channels: Channels) {
    channels.store.ping().await.expect("well");
}
