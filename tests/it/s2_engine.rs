//! What only the engine in S2 promises: several replicas on one basin, seals that were not finished, an S2 that goes away.

mod outage;
mod processes;
mod replicas;
mod scan;

use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use sessiond::domain::port::Followed;
use sessiond::domain::record::{PartIds, ReadLimit};
use sessiond::domain::{
    AppendInput, ChannelAddress, ChannelKey, ChannelName, ChannelStore, Closure, Direction, NewRecord,
    ReadStart, Record, Result, SessionId, Timestamp,
};
use sessiond::store::channel::s2::S2Channels;

use crate::harness::ample_budget;
use crate::harness::s2_lite::{endpoint, fresh_basin, open};

/// Two replicas on a fresh basin.
async fn two() -> [Arc<S2Channels>; 2] {
    let (endpoint, basin) = (endpoint(), fresh_basin());
    [open(&endpoint, &basin).await, open(&endpoint, &basin).await]
}

fn session(name: &str) -> SessionId {
    SessionId::from_stored(&format!("session_{name}"))
}

fn main_out(name: &str) -> ChannelKey {
    ChannelKey::main(session(name), Direction::Out)
}

fn named(session: &str, name: &str) -> ChannelKey {
    let name = ChannelName::parse(name).expect("valid");
    ChannelKey {
        session: self::session(session),
        address: ChannelAddress { direction: Direction::Out, name: Some(name) },
    }
}

fn data(body: &str) -> AppendInput {
    AppendInput::one(NewRecord::data(body.to_owned())).expect("fits")
}

/// A record with a part id that is not in its body.
fn part(id: &str, body: &str) -> AppendInput {
    AppendInput::one(NewRecord { part_id: Some(id.into()), ..NewRecord::data(body.to_owned()) })
        .expect("fits")
}

/// A direct writer's envelope.
fn direct(id: &str, value: &str) -> AppendInput {
    let mut input = part(id, &format!(r#"{{"data":"{value}","id":"{id}"}}"#));
    input.part_ids = PartIds::Recent;
    input
}

fn closure(reason: &str) -> Closure {
    Closure { at: Timestamp::from_millis(1_700_000_000_000), reason: Some(reason.to_owned()) }
}

fn bodies(records: &[Record]) -> Vec<String> {
    records.iter().map(|record| String::from_utf8_lossy(&record.body).into_owned()).collect()
}

/// Every record of a channel.
async fn all(channels: &S2Channels, key: &ChannelKey) -> Vec<Record> {
    let mut records = Vec::new();
    loop {
        let start = ReadStart::SeqNum(records.last().map_or(0, |last: &Record| last.position.seq_num + 1));
        let batch = channels.read(key, start, ReadLimit::BATCH).await.expect("reads");
        records.extend(batch.records.iter().cloned());
        if batch.tail.is_some() {
            return records;
        }
    }
}

struct Follower(BoxStream<'static, Result<Followed>>);

impl Follower {
    async fn of(channels: &S2Channels, key: &ChannelKey) -> Self {
        Self(channels.follow(key, ReadStart::SeqNum(0), &ample_budget()).await.expect("follows"))
    }

    async fn next(&mut self) -> Followed {
        let next = tokio::time::timeout(std::time::Duration::from_secs(60), self.0.next());
        next.await.expect("an event before the test gives up").expect("not the end").expect("no fault")
    }

    /// Records until `count` of them have come.
    async fn records(&mut self, count: usize) -> Vec<Record> {
        let mut records = Vec::new();
        while records.len() < count {
            match self.next().await {
                Followed::Batch(batch) => records.extend(batch.records.iter().cloned()),
                Followed::CaughtUp(_) | Followed::Behind => {}
                Followed::Sealed(_) => panic!("sealed after {} records", records.len()),
            }
        }
        records
    }

    /// Everything up to the end, and the end.
    async fn drain(&mut self) -> (Vec<Record>, Closure) {
        let mut records = Vec::new();
        loop {
            match self.next().await {
                Followed::Batch(batch) => records.extend(batch.records.iter().cloned()),
                Followed::CaughtUp(_) | Followed::Behind => {}
                Followed::Sealed(closure) => return (records, closure),
            }
        }
    }
}

fn places(records: &[Record]) -> Vec<u64> {
    records.iter().map(|record| record.position.seq_num).collect()
}
