//! Random operations, restarts among them, against a log that is a vector.

use std::collections::HashMap;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use sessiond::domain::clock::Clock;
use sessiond::domain::close;
use sessiond::domain::{AppendAck, Position, Result};

use super::*;

#[derive(Clone, Debug)]
enum Kind {
    Data(u8),
    Trim(u64),
    Fence(u8),
}

#[derive(Clone, Debug)]
struct Item {
    kind: Kind,
    part: Option<u8>,
    /// Milliseconds from now.
    timestamp: Option<i64>,
}

#[derive(Clone, Debug)]
enum Step {
    Append { channel: u8, items: Vec<Item>, expect: Option<i64>, token: Option<u8> },
    Read { channel: u8, start: ReadStart, count: usize, bytes: usize },
    ReadTime { channel: u8, ago: i64, count: usize },
    Seal { session: u8 },
    Settle { session: u8 },
    Advance(u16),
    Sweep,
    Restart,
}

fn items() -> impl Strategy<Value = Vec<Item>> {
    let kind = prop_oneof![
        8 => (0..4_u8).prop_map(Kind::Data),
        1 => (0..30_u64).prop_map(Kind::Trim),
        1 => (0..3_u8).prop_map(Kind::Fence),
    ];
    let item = (kind, option::weighted(0.4, 0..8_u8), option::weighted(0.2, -50..50_i64))
        .prop_map(|(kind, part, timestamp)| Item { kind, part, timestamp });
    vec(item, 1..4)
}

fn step() -> impl Strategy<Value = Step> {
    let start =
        prop_oneof![(0..40_u64).prop_map(ReadStart::SeqNum), (0..40_u64).prop_map(ReadStart::TailOffset)];
    prop_oneof![
        20 => (0..4_u8, items(), option::weighted(0.2, -1..2_i64), option::weighted(0.2, 0..3_u8))
            .prop_map(|(channel, items, expect, token)| Step::Append { channel, items, expect, token }),
        6 => (0..4_u8, start, 1..6_usize, 0..60_usize)
            .prop_map(|(channel, start, count, bytes)| Step::Read { channel, start, count, bytes }),
        4 => (0..4_u8, -10..200_i64, 1..6_usize)
            .prop_map(|(channel, ago, count)| Step::ReadTime { channel, ago, count }),
        1 => (0..2_u8).prop_map(|session| Step::Seal { session }),
        1 => (0..2_u8).prop_map(|session| Step::Settle { session }),
        4 => (0..100_u16).prop_map(Step::Advance),
        1 => Just(Step::Sweep),
        2 => Just(Step::Restart),
    ]
}

#[derive(Default)]
struct Model {
    channels: HashMap<u8, Channel>,
    seals: HashMap<u8, (Closure, bool)>,
}

#[derive(Default)]
struct Channel {
    records: Vec<(NewRecord, Timestamp, u64)>,
    earliest: u64,
    fence: String,
    parts: HashMap<String, (NewRecord, Position)>,
}

impl Channel {
    fn tail(&self) -> Position {
        let timestamp = self.records.last().map_or(Timestamp::default(), |(_, timestamp, _)| *timestamp);
        Position { seq_num: self.records.len() as u64, timestamp }
    }

    fn append(&mut self, input: AppendInput, now: Timestamp) -> Result<AppendAck> {
        let same = |one: &NewRecord, two: &NewRecord| (&one.headers, &one.body) == (&two.headers, &two.body);
        let mut known = Vec::new();
        for record in input.records() {
            let Some(id) = record.part_id.as_deref() else { continue };
            match self.parts.get(id) {
                Some((first, place)) if same(first, record) => known.push(*place),
                Some(_) => return Err(Error::IdempotencyMismatch { part_id: id.to_owned() }),
                None => {}
            }
        }
        let seq_nums = known.iter().map(|place| place.seq_num).collect();
        if known.len() == input.records().len() {
            let last = known[known.len() - 1];
            let end = Position { seq_num: last.seq_num + 1, ..last };
            return Ok(AppendAck { start: known[0], end, tail: self.tail(), seq_nums, repeated: true });
        }
        if !known.is_empty() {
            return Err(Error::Conflict(String::new()));
        }
        if input.fencing_token.as_ref().is_some_and(|token| *token != self.fence) {
            return Err(Error::Fenced { expected: self.fence.clone() });
        }
        if input.match_seq_num.is_some_and(|expected| expected != self.tail().seq_num) {
            return Err(Error::SeqNumMismatch { tail: self.tail().seq_num });
        }
        let places = self.place(input.into_records(), now);
        let seq_nums = places.iter().map(|place| place.seq_num).collect();
        let tail = self.tail();
        Ok(AppendAck { start: places[0], end: tail, tail, seq_nums, repeated: false })
    }

    fn place(&mut self, records: Vec<NewRecord>, now: Timestamp) -> Vec<Position> {
        let mut places = Vec::new();
        for record in records {
            let timestamp = record.timestamp.unwrap_or(now).min(now).max(self.tail().timestamp);
            let place = Position { seq_num: self.tail().seq_num, timestamp };
            let metered = self.records.last().map_or(0, |last| last.2) + record.metered_size() as u64;
            places.push(place);
            if let Some(id) = &record.part_id {
                self.parts.insert(id.to_string(), (record.clone(), place));
            }
            let command = Command::parse(&record.headers, &record.body).expect("well-formed");
            self.records.push((record, timestamp, metered));
            match command {
                Some(Command::Trim(below)) => {
                    self.earliest = self.earliest.max(below.min(self.tail().seq_num));
                }
                Some(Command::Fence(token)) => self.fence = token,
                None => {}
            }
        }
        places
    }

    fn read(&self, start: ReadStart, limit: ReadLimit) -> Vec<(u64, Timestamp, u64, NewRecord)> {
        let tail = self.tail().seq_num;
        let from = match start {
            ReadStart::SeqNum(seq_num) => seq_num,
            ReadStart::TailOffset(offset) => tail.saturating_sub(offset),
            ReadStart::Timestamp(at) => self
                .records
                .iter()
                .position(|(_, timestamp, _)| *timestamp >= at)
                .map_or(tail, |at| at as u64),
        };
        let (mut read, mut bytes) = (Vec::new(), 0);
        for seq_num in from.max(self.earliest)..tail {
            let (record, timestamp, metered) = &self.records[seq_num as usize];
            bytes += record.metered_size();
            if !read.is_empty() && (read.len() >= limit.count || bytes > limit.bytes) {
                break;
            }
            let bare = NewRecord { part_id: None, timestamp: None, ..record.clone() };
            read.push((seq_num, *timestamp, *metered, bare));
        }
        read
    }
}

/// What can be told of an outcome: everything but the words of a conflict.
fn outcome(result: &Result<AppendAck>) -> String {
    match result {
        Ok(ack) => format!("{ack:?}"),
        Err(Error::Conflict(_)) => "conflict".to_owned(),
        Err(error) => format!("{error:?}"),
    }
}

fn channel_key(channel: u8) -> ChannelKey {
    let session = SessionId::from_stored(&format!("session_{}", channel / 2));
    ChannelKey::main(session, if channel.is_multiple_of(2) { Direction::In } else { Direction::Out })
}

fn token(token: u8) -> String {
    ["", "one", "two"][usize::from(token)].to_owned()
}

fn input(items: Vec<Item>, now: Timestamp) -> Option<AppendInput> {
    let records = items.into_iter().map(|item| {
        let record = match item.kind {
            Kind::Data(body) => NewRecord::data(vec![body; usize::from(body)]),
            Kind::Trim(below) => Command::Trim(below).into_record(),
            Kind::Fence(of) => Command::Fence(token(of)).into_record(),
        };
        let timestamp = item.timestamp.map(|by| Timestamp::from_millis(now.millis() + by));
        NewRecord { part_id: item.part.map(|id| id.to_string().into()), timestamp, ..record }
    });
    AppendInput::new(records.collect()).ok()
}

async fn check_read(log: &LogChannels, model: &Model, channel: u8, start: ReadStart, limit: ReadLimit) {
    let empty = Channel::default();
    let expected = model.channels.get(&channel).unwrap_or(&empty);
    let batch = log.read(&channel_key(channel), start, limit).await.expect("reads");
    let read = batch.records.iter().map(|record| {
        let bare =
            NewRecord { headers: record.headers.clone(), body: record.body.clone(), ..NewRecord::default() };
        (record.position.seq_num, record.position.timestamp, record.metered_end, bare)
    });
    let read: Vec<_> = read.collect();
    assert_eq!(read, expected.read(start, limit), "{start:?} {limit:?}");
    let bounds = log.bounds(&channel_key(channel)).await.expect("bounds");
    assert_eq!((bounds.earliest, bounds.tail), (expected.earliest, expected.tail()));
}

async fn run(steps: Vec<Step>) {
    let (folder, clock) = (tempfile::tempdir().expect("a folder"), clock());
    let mut log = Some(open(folder.path(), &clock));
    let mut model = Model::default();
    for step in steps {
        let open_log = log.as_ref().expect("open between steps");
        match step {
            Step::Append { channel, items, expect, token: sent } => {
                let Some(mut input) = input(items, clock.now()) else { continue };
                let expected = model.channels.entry(channel).or_default();
                let tail = expected.tail().seq_num;
                input.match_seq_num = expect.map(|by| tail.saturating_add_signed(by));
                input.fencing_token = sent.map(token);
                let expected = match model.seals.get(&(channel / 2)) {
                    Some((closure, _)) => {
                        Err(Error::Closed { at: closure.at, reason: closure.reason.clone() })
                    }
                    None => expected.append(input.clone(), clock.now()),
                };
                let answer = open_log.append(&channel_key(channel), input).await;
                assert_eq!(outcome(&answer), outcome(&expected));
            }
            Step::Read { channel, start, count, bytes } => {
                check_read(open_log, &model, channel, start, ReadLimit { count, bytes }).await;
            }
            Step::ReadTime { channel, ago, count } => {
                let at = Timestamp::from_millis(clock.now().millis() - ago);
                let start = ReadStart::Timestamp(at);
                check_read(open_log, &model, channel, start, ReadLimit::count(count)).await;
            }
            Step::Seal { session } => {
                let closure = Closure { at: clock.now(), reason: None };
                let id = channel_key(session * 2).session;
                if !model.seals.contains_key(&session) {
                    let ends = [close::input_record(&id), close::output_record(&closure)];
                    for (channel, record) in (session * 2..).zip(ends) {
                        model.channels.entry(channel).or_default().place(vec![record], clock.now());
                    }
                }
                let held = model.seals.entry(session).or_insert((closure.clone(), true));
                assert_eq!(open_log.seal(&id, closure.into()).await.expect("seals"), held.0);
            }
            Step::Settle { session } => {
                if let Some((_, unsettled)) = model.seals.get_mut(&session) {
                    *unsettled = false;
                }
                open_log.settle(&channel_key(session * 2).session).await.expect("settles");
            }
            Step::Advance(millis) => clock.advance(Duration::from_millis(millis.into())),
            Step::Sweep => open_log.sweep().await.expect("sweeps"),
            Step::Restart => {
                drop(log.take());
                log = Some(open(folder.path(), &clock));
            }
        }
    }
    let log = log.expect("open after the last step");
    for channel in 0..4 {
        check_read(&log, &model, channel, ReadStart::SeqNum(0), ReadLimit::BATCH).await;
    }
    let unsettled = model.seals.values().filter(|(_, unsettled)| *unsettled).count();
    assert_eq!(log.unsettled().await.expect("lists").len(), unsettled);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_log_does_what_a_vector_would(steps in vec(step(), 1..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(run(steps));
    }
}
