//! Where channels begin and end, and reads of what they hold.

use std::sync::Arc;

use s2_sdk::types::{ReadFrom, ReadLimits, SequencedRecord};

use super::known::Known;
use super::{Shared, codec};
use sessiond_domain::record::{Bounds, Position, ReadLimit, ReadStart, Record, RecordBatch, metered_size};
use sessiond_domain::{ChannelKey, Result, SeqNum};

/// New records that are read to learn what they change; behind more, the ends are looked at anew.
const CATCH_UP: u64 = 1000;
/// Records at the end of a channel that are read when nothing is known of it.
const LAST: u64 = 128;

impl Shared {
    /// What a channel is at this moment; `None` if it does not exist.
    pub(super) async fn look(&self, key: &ChannelKey) -> Result<Option<Known>> {
        let slot = self.memory.slot(key);
        let known = slot.get();
        if let Some(known) = known.as_ref().filter(|known| known.sealed) {
            return Ok(Some(known.clone()));
        }
        let stream = codec::channel_stream(key);
        let Some(tail) = self.remote.tail(&stream).await? else { return Ok(None) };
        let found = match known {
            Some(known) if known.tail.seq_num >= tail.seq_num => known,
            Some(known) if tail.seq_num - known.tail.seq_num <= CATCH_UP => {
                let Some(found) = self.catch_up(&stream, known).await? else { return Ok(None) };
                found
            }
            _ => {
                let Some(found) = self.look_anew(key, &stream, tail).await? else { return Ok(None) };
                found
            }
        };
        Ok(Some(slot.keep(&found)))
    }

    /// Reads what is new.
    async fn catch_up(&self, stream: &str, mut known: Known) -> Result<Option<Known>> {
        let from = known.tail.seq_num;
        let see = |records: Vec<SequencedRecord>| {
            known.see_remaining(&records);
            Ok(())
        };
        let Some(tail) = self.remote.scan(stream, from, see).await? else { return Ok(None) };
        if !known.sealed && known.tail.seq_num < tail.seq_num {
            // The last records are gone already.
            known.tail = tail;
            known.earliest = known.earliest.max(self.first(stream, tail).await?);
        }
        Ok(Some(known))
    }

    /// Looks at the first record and the last ones, among which are the trims that S2 may not have acted on.
    async fn look_anew(&self, key: &ChannelKey, stream: &str, tail: Position) -> Result<Option<Known>> {
        if tail.seq_num == 0 {
            return Ok(Some(Known::default()));
        }
        let from = tail.seq_num.saturating_sub(LAST);
        let last = Known { tail: Position { seq_num: from, ..Position::default() }, ..Known::default() };
        let (first, last) = futures_util::try_join!(self.first(stream, tail), self.catch_up(stream, last))?;
        let Some(mut known) = last else { return Ok(None) };
        known.earliest = known.earliest.max(first).min(known.tail.seq_num);
        if known.earliest == known.tail.seq_num && !known.sealed {
            // Retention may have removed the seal as well, but not from the registry.
            known.sealed = self.registry.completed(&key.session).await?.is_some();
        }
        Ok(Some(known))
    }

    /// The number of the first record that is still there.
    async fn first(&self, stream: &str, tail: Position) -> Result<SeqNum> {
        let read = self.remote.read(stream, ReadFrom::SeqNum(0), ReadLimits::new().with_count(1)).await?;
        Ok(read.unwrap_or_default().records.first().map_or(tail.seq_num, |record| record.seq_num))
    }

    /// See [`ChannelStore::bounds`](sessiond_domain::ChannelStore::bounds).
    pub(super) async fn bounds(&self, key: &ChannelKey) -> Result<Bounds> {
        Ok(self.look(key).await?.map_or_else(Bounds::default, |known| known.bounds()))
    }

    /// The number that `start` means, and what the channel is; `None` if it does not exist.
    pub(super) async fn resolve(
        &self,
        key: &ChannelKey,
        start: ReadStart,
    ) -> Result<(SeqNum, Option<Known>)> {
        let Some(known) = self.look(key).await? else { return Ok((0, None)) };
        let Bounds { earliest, tail } = known.bounds();
        let next = match start {
            ReadStart::SeqNum(seq_num) => seq_num.clamp(earliest, tail.seq_num),
            ReadStart::TailOffset(offset) => tail.seq_num.saturating_sub(offset).max(earliest),
            ReadStart::Timestamp(at) => {
                let from = ReadFrom::Timestamp(u64::try_from(at.millis()).unwrap_or(0));
                let stream = codec::channel_stream(key);
                let read = self.remote.read(&stream, from, ReadLimits::new().with_count(1)).await?;
                let first = read.unwrap_or_default().records.first().map(|record| record.seq_num);
                first.map_or(tail.seq_num, |first| first.clamp(earliest, tail.seq_num))
            }
        };
        Ok((next, Some(known)))
    }

    /// See [`ChannelStore::read`](sessiond_domain::ChannelStore::read).
    pub(super) async fn read(
        &self,
        key: &ChannelKey,
        start: ReadStart,
        limit: ReadLimit,
    ) -> Result<RecordBatch> {
        let slot = self.memory.slot(key);
        // A place that lies behind the beginning, for all that is known, needs no look at the ends first.
        let next = match (start, slot.get()) {
            (ReadStart::SeqNum(seq_num), Some(known)) if !known.sealed && seq_num <= known.tail.seq_num => {
                seq_num.max(known.earliest)
            }
            _ => {
                let (next, known) = self.resolve(key, start).await?;
                let Some(known) = known else {
                    return Ok(RecordBatch::new(Vec::new(), Some(Position::default())));
                };
                if next >= known.tail.seq_num {
                    return Ok(RecordBatch::new(Vec::new(), Some(known.tail)));
                }
                next
            }
        };
        self.read_from(key, next, limit).await
    }

    async fn read_from(&self, key: &ChannelKey, mut next: SeqNum, limit: ReadLimit) -> Result<RecordBatch> {
        let (slot, stream) = (self.memory.slot(key), codec::channel_stream(key));
        let mut limits = ReadLimits::new().with_count(limit.count).with_bytes(limit.bytes);
        loop {
            let read = self.remote.read(&stream, ReadFrom::SeqNum(next), limits.clone());
            let (stored, tail) = futures_util::try_join!(read, self.remote.tail(&stream))?;
            let (Some(stored), Some(tail)) = (stored, tail) else {
                return Ok(RecordBatch::new(Vec::new(), Some(Position::default())));
            };
            if stored.records.is_empty() && next < tail.seq_num && limits.bytes.is_some() {
                // S2 brings none at all where the first is larger.
                limits = ReadLimits::new().with_count(1);
                continue;
            }
            slot.update(|known| known.see(&stored.records));
            let mut known = slot.get().unwrap_or_default();
            let (mut records, mut sealed) = up_to_seal(stored.records);
            records.retain(|record| record.position.seq_num >= known.earliest);
            if records.is_empty() && !sealed && known.earliest > next && known.earliest < tail.seq_num {
                // Trimmed while it was read.
                next = known.earliest;
                continue;
            }
            let fit = fitting(&records, limit);
            sealed &= fit == records.len();
            records.truncate(fit);
            if sealed && !known.sealed {
                known = self.look(key).await?.unwrap_or_default();
            }
            let end = records.last().map(after);
            let tail = if known.sealed {
                known.tail
            } else {
                later(tail, later(stored.at_tail.unwrap_or_default(), end.unwrap_or_default()))
            };
            let reached = sealed || end.is_none_or(|end| end.seq_num >= tail.seq_num);
            return Ok(RecordBatch::new(records, reached.then_some(tail)));
        }
    }
}

/// How many of the records fit; one at least.
fn fitting(records: &[Record], limit: ReadLimit) -> usize {
    let mut bytes = 0;
    let fits = records.iter().take(limit.count).take_while(|record| {
        bytes += metered_size(&record.headers, &record.body);
        bytes <= limit.bytes
    });
    fits.count().max(1).min(records.len())
}

/// The place behind a record.
fn after(record: &Record) -> Position {
    Position { seq_num: record.position.seq_num + 1, ..record.position }
}

fn later(one: Position, other: Position) -> Position {
    if other.seq_num > one.seq_num { other } else { one }
}

/// The records of the channel, and whether its seal follows.
fn up_to_seal(mut stored: Vec<SequencedRecord>) -> (Vec<Record>, bool) {
    let seal = stored.iter().position(codec::is_seal);
    stored.truncate(seal.unwrap_or(stored.len()));
    (stored.into_iter().map(codec::shown).collect(), seal.is_some())
}

/// Records as S2 delivers them to a follower, and whether the channel's seal follows.
pub(super) fn delivered(stored: Vec<SequencedRecord>) -> (Option<Arc<RecordBatch>>, bool) {
    let (records, sealed) = up_to_seal(stored);
    let end = records.last().map(after);
    (end.map(|end| Arc::new(RecordBatch::new(records, Some(end)))), sealed)
}
