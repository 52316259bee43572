//! Part ids: a repeat is answered, never stored.

use super::*;

fn one(id: &str, body: &str) -> AppendInput {
    AppendInput::one(part(id, body)).expect("fits")
}

pub(super) async fn a_repeat_answers_the_original_place(channels: Channels) {
    let key = channel();
    channels.append(&key, data(&["before"])).await;
    let first = channels.append(&key, one("p", "a")).await;
    channels.append(&key, data(&["after"])).await;
    let again = channels.append(&key, one("p", "a")).await;
    assert!(again.repeated && !first.repeated);
    assert_eq!((again.start, again.end, again.seq_nums), (first.start, first.end, first.seq_nums));
    assert_eq!(again.tail.seq_num, 3);
    assert_eq!(channels.tail(&key).await, 3);
}

pub(super) async fn a_known_part_id_with_another_content_is_refused(channels: Channels) {
    let key = channel();
    channels.append(&key, one("p", "a")).await;
    match channels.refused(&key, one("p", "b")).await {
        Error::IdempotencyMismatch { part_id } => assert_eq!(part_id, "p"),
        other => panic!("{other:?}"),
    }
    assert_eq!(channels.all(&key).await, ["a"]);
}

pub(super) async fn headers_are_part_of_the_content(channels: Channels) {
    let key = channel();
    let with = |name: &'static str, value: &'static str| {
        let record = NewRecord { headers: vec![(name.into(), value.into())], ..part("p", "a") };
        AppendInput::one(record).expect("fits")
    };
    channels.append(&key, with("ab", "c")).await;
    assert!(channels.append(&key, with("ab", "c")).await.repeated);
    for other in [with("a", "bc"), with("ab", "d"), one("p", "a")] {
        assert!(matches!(channels.refused(&key, other).await, Error::IdempotencyMismatch { .. }));
    }
}

pub(super) async fn part_ids_belong_to_one_channel(channels: Channels) {
    let key = channel();
    channels.append(&key, one("p", "a")).await;
    let other = side(&key, Direction::In, None);
    assert!(!channels.append(&other, one("p", "b")).await.repeated);
}

pub(super) async fn a_known_batch_is_repeated_and_a_partly_known_one_refused(channels: Channels) {
    let key = channel();
    let batch = |ids: &[&str]| {
        AppendInput::new(ids.iter().map(|id| part(id, &format!("body of {id}"))).collect()).expect("fits")
    };
    channels.append(&key, batch(&["a", "b"])).await;
    channels.append(&key, batch(&["c"])).await;
    let again = channels.append(&key, batch(&["a", "b"])).await;
    assert_eq!((again.repeated, again.seq_nums, again.end.seq_num), (true, vec![0, 1], 2));
    let across = channels.append(&key, batch(&["c", "a"])).await;
    assert_eq!((across.repeated, across.seq_nums), (true, vec![2, 0]));
    assert!(matches!(channels.refused(&key, batch(&["b", "d"])).await, Error::Conflict(_)));
    let unnamed = AppendInput::new(vec![part("a", "body of a"), NewRecord::data("x")]).expect("fits");
    assert!(matches!(channels.refused(&key, unnamed).await, Error::Conflict(_)));
    let mismatch = AppendInput::new(vec![part("d", "new"), part("a", "other")]).expect("fits");
    assert!(matches!(channels.refused(&key, mismatch).await, Error::IdempotencyMismatch { .. }));
    assert_eq!(channels.tail(&key).await, 3);
    assert!(!channels.append(&key, batch(&["d"])).await.repeated);
}

pub(super) async fn concurrent_repeats_store_one_record(channels: Channels) {
    let key = channel();
    let writers = (0..32).map(|_| {
        let (store, key) = (channels.store.clone(), key.clone());
        tokio::spawn(async move { store.append(&key, one("p", "a")).await.expect("appends") })
    });
    let mut stored = 0;
    for writer in writers.collect::<Vec<_>>() {
        let ack = writer.await.expect("writes");
        assert_eq!(ack.seq_nums, [0]);
        stored += usize::from(!ack.repeated);
    }
    assert_eq!((stored, channels.all(&key).await.len()), (1, 1));
}

pub(super) async fn a_repeat_passes_a_fence_and_a_moved_tail(channels: Channels) {
    let key = channel();
    let input = || expecting(0, fenced("", one("p", "a")));
    channels.append(&key, input()).await;
    channels.append(&key, command(Command::Fence("mine".into()))).await;
    assert!(channels.append(&key, input()).await.repeated);
}

pub(super) async fn a_refused_append_does_not_use_its_part_id_up(channels: Channels) {
    let key = channel();
    let refused = channels.refused(&key, expecting(7, one("p", "a"))).await;
    assert!(matches!(refused, Error::SeqNumMismatch { tail: 0 }), "{refused:?}");
    assert!(!channels.append(&key, one("p", "b")).await.repeated);
}

fn resent(ids: &[&str]) -> AppendInput {
    let records = ids.iter().map(|id| part(id, &format!("{{\"data\":1,\"id\":\"{id}\"}}")));
    let mut input = AppendInput::new(records.collect()).expect("fits");
    input.part_ids = PartIds::Recent;
    input
}

pub(super) async fn a_recent_batch_sent_again_is_stored_once(channels: Channels) {
    let key = channel();
    channels.append(&key, resent(&["a", "b"])).await;
    channels.append(&key, resent(&["c"])).await;
    let again = channels.append(&key, resent(&["a", "b"])).await;
    assert_eq!((again.repeated, again.start.seq_num, again.end.seq_num, again.tail.seq_num), (true, 0, 2, 3));
    assert!(channels.append(&key, resent(&["c"])).await.repeated);
    let mixed = channels.append(&key, resent(&["c", "d"])).await;
    assert_eq!((mixed.repeated, mixed.start.seq_num), (false, 3), "it is not the batch that was sent before");
}

pub(super) async fn a_recent_part_id_that_comes_again_by_chance_is_stored(channels: Channels) {
    let key = channel();
    channels.append(&key, resent(&["a"])).await;
    let mut other = one("a", "{\"data\":2,\"id\":\"a\"}");
    other.part_ids = PartIds::Recent;
    assert_eq!(channels.append(&key, other.clone()).await.start.seq_num, 1, "another body");
    assert!(channels.append(&key, other.clone()).await.repeated);
    let filler = || AppendInput::new(vec![NewRecord::data("x"); 1000]).expect("fits");
    for _ in 0..RESEND_WINDOW.div_ceil(1000) {
        channels.append(&key, filler()).await;
    }
    let tail = channels.tail(&key).await;
    let late = channels.append(&key, other.clone()).await;
    assert_eq!((late.repeated, late.start.seq_num), (false, tail), "long ago");
    assert!(channels.append(&key, other).await.repeated);
}
