//! Reads: where they start and where they end.

use super::*;

async fn ten(channels: &Channels) -> ChannelKey {
    let key = channel();
    for body in 0..10 {
        channels.append(&key, data(&[&body.to_string()])).await;
    }
    key
}

async fn first_of(channels: &Channels, key: &ChannelKey, start: ReadStart) -> Option<u64> {
    let batch = channels.read(key, start, ReadLimit::BATCH).await;
    batch.records.first().map(|record| record.position.seq_num)
}

pub(super) async fn reads_start_at_a_number(channels: Channels) {
    let key = ten(&channels).await;
    for seq_num in 0..10 {
        assert_eq!(first_of(&channels, &key, ReadStart::SeqNum(seq_num)).await, Some(seq_num));
    }
    let batch = channels.read(&key, ReadStart::SeqNum(3), ReadLimit::BATCH).await;
    let places: Vec<_> = batch.records.iter().map(|record| record.position.seq_num).collect();
    assert_eq!(places, (3..10).collect::<Vec<_>>());
}

pub(super) async fn reads_below_the_trim_point_start_at_the_first_survivor(channels: Channels) {
    let key = ten(&channels).await;
    channels.append(&key, command(Command::Trim(4))).await;
    for start in [
        ReadStart::SeqNum(0),
        ReadStart::SeqNum(4),
        ReadStart::TailOffset(100),
        ReadStart::Timestamp(Timestamp::from_millis(0)),
    ] {
        assert_eq!(first_of(&channels, &key, start).await, Some(4), "{start:?}");
    }
}

pub(super) async fn reads_past_the_tail_are_empty_and_tell_it(channels: Channels) {
    let key = ten(&channels).await;
    for start in [ReadStart::SeqNum(10), ReadStart::SeqNum(u64::MAX), ReadStart::TailOffset(0)] {
        let batch = channels.read(&key, start, ReadLimit::BATCH).await;
        assert!(batch.records.is_empty());
        assert_eq!(batch.tail.map(|tail| tail.seq_num), Some(10));
    }
}

pub(super) async fn reads_start_at_an_offset_from_the_tail(channels: Channels) {
    let key = ten(&channels).await;
    for (offset, first) in [(1, 9), (10, 0), (11, 0), (u64::MAX, 0)] {
        assert_eq!(first_of(&channels, &key, ReadStart::TailOffset(offset)).await, Some(first));
    }
}

pub(super) async fn reads_start_at_a_time(channels: Channels) {
    let key = channel();
    for millis in [100, 200, 200, 300] {
        let timestamp = Some(Timestamp::from_millis(millis));
        let record = NewRecord { timestamp, ..NewRecord::data("a") };
        channels.append(&key, AppendInput::one(record).expect("fits")).await;
    }
    for (millis, first) in
        [(0, Some(0)), (100, Some(0)), (101, Some(1)), (200, Some(1)), (201, Some(3)), (301, None)]
    {
        let start = ReadStart::Timestamp(Timestamp::from_millis(millis));
        assert_eq!(first_of(&channels, &key, start).await, first, "{millis}");
    }
}

pub(super) async fn reads_end_at_a_count(channels: Channels) {
    let key = ten(&channels).await;
    for count in [1, 3, 10] {
        let batch = channels.read(&key, ReadStart::SeqNum(0), ReadLimit::count(count)).await;
        assert_eq!(batch.records.len(), count);
    }
}

pub(super) async fn reads_end_at_a_size_but_bring_at_least_one_record(channels: Channels) {
    let key = ten(&channels).await;
    for (bytes, records) in [(0, 1), (9, 1), (17, 1), (18, 2), (90, 10), (1000, 10)] {
        let limit = ReadLimit { count: 1000, bytes };
        let batch = channels.read(&key, ReadStart::SeqNum(0), limit).await;
        assert_eq!(batch.records.len(), records, "{bytes} bytes");
    }
}

pub(super) async fn only_a_read_that_reached_the_tail_tells_it(channels: Channels) {
    let key = ten(&channels).await;
    let short = channels.read(&key, ReadStart::SeqNum(0), ReadLimit::count(9)).await;
    assert_eq!(short.tail, None);
    let whole = channels.read(&key, ReadStart::SeqNum(0), ReadLimit::count(10)).await;
    assert_eq!(whole.tail, Some(channels.store.bounds(&key).await.expect("bounds").tail));
}
