//! One commit in the making: requests of any channels, each checked against the state that those before it
//! leave behind. Nothing is answered or shown to a follower before [`Group::commit`].

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use fjall::{OwnedWriteBatch, PersistMode};
use tokio::sync::oneshot;

use super::codec::{self, Part};
use super::queue::{Append, Prepared, Request, Sweep, gone};
use super::state::{Channel, Memory};
use super::store::{self, Store};
use super::{CommitStats, Shared};
use sessiond_domain::close;
use sessiond_domain::record::{
    BATCH_RECORDS_MAX, Command, METERED_MAX, PartIds, RESEND_WINDOW, metered_size,
};
use sessiond_domain::{
    AppendAck, ChannelKey, Close, Closure, Direction, Error, Position, Record, RecordBatch, Result, SeqNum,
    SessionId, Timestamp,
};

/// How long a part id is remembered at least.
pub(super) const PART_KEPT: Duration = Duration::from_secs(24 * 60 * 60);

/// Commands at the end of `.out`, such as the trim that follows a turn, behind which a `session-closed` is looked for.
const CLOSING_RECORDS: u64 = 16;

/// See the module.
pub(super) struct Group<'a> {
    shared: &'a Shared,
    memory: &'a mut Memory,
    now: Timestamp,
    batch: OwnedWriteBatch,
    touched: Vec<ChannelKey>,
    /// Part ids stored by this group, which the store does not show yet.
    parts: HashMap<Vec<u8>, Part>,
    sealed: Vec<(SessionId, Closure)>,
    /// Whether a session is left unsettled: two changes of one key may not meet in a batch.
    unsettled: HashMap<SessionId, bool>,
    answers: Vec<Answer>,
    trimmed: bool,
    records: usize,
    bytes: usize,
}

/// An answer that waits for the commit.
enum Answer {
    Append(oneshot::Sender<Result<AppendAck>>, Result<AppendAck>),
    Seal(oneshot::Sender<Result<Closure>>, Result<Closure>),
    Done(oneshot::Sender<Result<()>>, Result<()>),
}

impl Answer {
    fn send(self) {
        // Whoever does not wait any more does not want the answer.
        match self {
            Self::Append(to, answer) => drop(to.send(answer)),
            Self::Seal(to, answer) => drop(to.send(answer)),
            Self::Done(to, answer) => drop(to.send(answer)),
        }
    }
}

/// Answers a request that is not even tried.
pub(super) fn refuse(request: Request) {
    match request {
        Request::Append { reply, .. } => Answer::Append(reply, Err(gone())),
        Request::Seal { reply, .. } => Answer::Seal(reply, Err(gone())),
        Request::Settle { reply, .. } | Request::Sweep { reply, .. } => Answer::Done(reply, Err(gone())),
    }
    .send();
}

impl<'a> Group<'a> {
    pub(super) fn new(shared: &'a Shared, memory: &'a mut Memory) -> Self {
        Self {
            now: shared.clock.now(),
            batch: shared.store.db.batch().durability(Some(PersistMode::SyncData)),
            shared,
            memory,
            touched: Vec::new(),
            parts: HashMap::new(),
            sealed: Vec::new(),
            unsettled: HashMap::new(),
            answers: Vec::new(),
            trimmed: false,
            records: 0,
            bytes: 0,
        }
    }

    /// Requests that wait for it.
    pub(super) fn requests(&self) -> usize {
        self.answers.len()
    }

    /// Metered bytes to be written.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Checks a request and adds what it writes.
    pub(super) fn add(&mut self, request: Request) {
        let answer = match request {
            Request::Append { key, append, reply } => Answer::Append(reply, self.chained(&key, append)),
            Request::Seal { session, close, reply } => Answer::Seal(reply, self.seal(session, close)),
            Request::Settle { session, reply } => {
                self.unsettled.insert(session, false);
                Answer::Done(reply, Ok(()))
            }
            Request::Sweep { sweep, reply } => Answer::Done(reply, self.sweep(sweep)),
        };
        self.answers.push(answer);
    }

    fn chained(&mut self, key: &ChannelKey, append: Append) -> Result<AppendAck> {
        let Some(chain) = append.chain.clone() else { return self.append(key, append) };
        if chain.is_broken() {
            return Err(Error::Conflict("an append before this one was refused".to_owned()));
        }
        self.append(key, append).inspect_err(|_| chain.break_off())
    }

    fn append(&mut self, key: &ChannelKey, append: Append) -> Result<AppendAck> {
        let store = &self.shared.store;
        if let Some(closure) = self.memory.closure(store, &key.session)? {
            return Err(Error::Closed { at: closure.at, reason: closure.reason.clone() });
        }
        let channel = self.memory.channel(store, key)?;
        if let Some(places) = known_parts(store, &self.parts, channel, &append)? {
            return Ok(repeated(&places, channel.tail.next));
        }
        check_writer(channel, &append)?;
        self.place_all(key, append.records)
    }

    /// Gives records the next places of a channel, whatever its fence.
    fn place_all(&mut self, key: &ChannelKey, records: Vec<Prepared>) -> Result<AppendAck> {
        let store = &self.shared.store;
        let fresh = self.memory.next_number;
        let channel = self.memory.channel(store, key)?;
        let unnamed = channel.number.is_none();
        let number = *channel.number.get_or_insert(fresh);
        if unnamed {
            self.batch.insert(&store.channels, codec::channel_key(key), codec::encode_number(number));
        }
        if !channel.touched {
            channel.touched = true;
            channel.live = self.shared.live.window(key).map(|_| Vec::new());
            self.touched.push(key.clone());
        }
        self.records += records.len();
        let mut seq_nums = Vec::with_capacity(records.len());
        let mut start = None;
        for prepared in records {
            self.bytes += prepared.metered;
            let position = place(channel, &prepared, self.now);
            start.get_or_insert(position);
            seq_nums.push(position.seq_num);
            self.trimmed |= matches!(prepared.command, Some(Command::Trim(_)));
            if let (Some(hash), Some(id)) = (prepared.hash, &prepared.record.part_id) {
                let part = Part { hash, position, stored_at: self.now };
                let part_key = codec::part_key(number, id);
                self.batch.insert(&store.parts, part_key.as_slice(), part.encode());
                self.parts.insert(part_key, part);
            }
            write(&mut self.batch, store, number, channel, prepared, position);
        }
        let end = channel.tail.next;
        self.memory.next_number += u64::from(unnamed);
        Ok(AppendAck { start: start.unwrap_or(end), end, tail: end, seq_nums, repeated: false })
    }

    fn seal(&mut self, session: SessionId, Close { closure, told }: Close) -> Result<Closure> {
        let store = &self.shared.store;
        if let Some(first) = self.memory.closure(store, &session)? {
            return Ok(first.clone());
        }
        let [input, output] =
            [Direction::In, Direction::Out].map(|direction| ChannelKey::main(session.clone(), direction));
        // Both are looked up before either gets a record: what fails leaves nothing of it in the group.
        self.memory.channel(store, &input)?;
        let told = told || says_closed(store, self.memory.channel(store, &output)?)?;
        self.place_all(&input, vec![Prepared::new(close::input_record(&session))?])?;
        if !told {
            self.place_all(&output, vec![Prepared::new(close::output_record(&closure))?])?;
        }
        *self.memory.closure(store, &session)? = Some(closure.clone());
        self.batch.insert(&store.seals, session.as_str(), codec::encode_closure(&closure));
        self.unsettled.insert(session.clone(), true);
        self.sealed.push((session, closure.clone()));
        Ok(closure)
    }

    fn sweep(&mut self, sweep: Sweep) -> Result<()> {
        let store = &self.shared.store;
        match sweep {
            Sweep::Trim { key, below } => {
                let channel = self.memory.channel(store, &key)?;
                trim(channel, below);
                self.trimmed = true;
                touch(channel, &key, &mut self.touched);
            }
            Sweep::Remove { key, from, to, parts } => {
                let channel = self.memory.channel(store, &key)?;
                let Some(number) = channel.number else { return Ok(()) };
                if channel.tail.removed != from || to > channel.tail.earliest {
                    return Ok(());
                }
                for seq_num in from..to {
                    self.batch.remove(&store.records, codec::record_key(number, seq_num));
                }
                channel.tail.removed = to;
                touch(channel, &key, &mut self.touched);
                for (part_key, stored_at) in parts {
                    let forget_at = stored_at.plus(PART_KEPT);
                    if forget_at <= self.now {
                        self.batch.remove(&store.parts, part_key);
                    } else {
                        self.batch.insert(&store.expiries, codec::expiry_key(forget_at, &part_key), []);
                    }
                }
            }
            Sweep::Forget { expiries } => {
                for expiry in expiries {
                    self.batch.remove(&store.parts, expiry.slice(8..));
                    self.batch.remove(&store.expiries, expiry);
                }
            }
        }
        Ok(())
    }

    /// Writes the group, waits for the disk, shows it to followers, answers. On an error nobody gets a promise.
    pub(super) fn commit(mut self) -> Result<(), fjall::Error> {
        self.write_rows();
        let started = Instant::now();
        let wrote = !self.batch.is_empty();
        if let Err(error) = self.batch.commit() {
            for answer in self.answers {
                match answer {
                    Answer::Append(to, _) => Answer::Append(to, Err(gone())),
                    Answer::Seal(to, _) => Answer::Seal(to, Err(gone())),
                    Answer::Done(to, _) => Answer::Done(to, Err(gone())),
                }
                .send();
            }
            return Err(error);
        }
        let sync_duration = started.elapsed();
        for key in &self.touched {
            if let Some(channel) = self.memory.touched(key) {
                publish(self.shared, key, channel);
            }
        }
        for (session, closure) in &self.sealed {
            self.shared.live.seal(session, closure);
        }
        if self.trimmed {
            self.shared.wake_sweeper();
        }
        if wrote {
            let requests = self.answers.len();
            let stats = CommitStats { records: self.records, bytes: self.bytes, requests, sync_duration };
            self.shared.observer.committed(stats);
        }
        self.answers.into_iter().for_each(Answer::send);
        Ok(())
    }

    /// Adds the rows that are written once for a group.
    fn write_rows(&mut self) {
        let store = &self.shared.store;
        for key in &self.touched {
            let Some(channel) = self.memory.touched(key) else { continue };
            let Some(number) = channel.number.map(u64::to_be_bytes) else { continue };
            self.batch.insert(&store.tails, number, channel.tail.encode());
            let removing = channel.tail.earliest > channel.tail.removed;
            if removing != channel.removing {
                channel.removing = removing;
                match removing {
                    true => self.batch.insert(&store.removals, number, codec::channel_key(key)),
                    false => self.batch.remove(&store.removals, number),
                }
            }
        }
        for (session, unsettled) in self.unsettled.drain() {
            match unsettled {
                true => self.batch.insert(&store.unsettled, session.as_str(), []),
                false => self.batch.remove(&store.unsettled, session.as_str()),
            }
        }
    }
}

fn touch(channel: &mut Channel, key: &ChannelKey, touched: &mut Vec<ChannelKey>) {
    if !channel.touched {
        channel.touched = true;
        touched.push(key.clone());
    }
}

/// The original places if every record is known; `None` if none is.
fn known_parts(
    store: &Store,
    fresh: &HashMap<Vec<u8>, Part>,
    channel: &Channel,
    append: &Append,
) -> Result<Option<Vec<Position>>> {
    let Some(number) = channel.number else { return Ok(None) };
    let recent = append.part_ids == PartIds::Recent;
    let window = channel.tail.next.seq_num.saturating_sub(RESEND_WINDOW);
    let mut places = Vec::new();
    for prepared in &append.records {
        let (Some(hash), Some(id)) = (prepared.hash, &prepared.record.part_id) else { continue };
        let key = codec::part_key(number, id);
        let part = match fresh.get(&key) {
            Some(part) => Some(*part),
            None => store.part(&key)?,
        };
        match part {
            Some(part) if recent && part.position.seq_num < window => {}
            Some(part) if part.hash == hash => places.push(part.position),
            Some(_) if recent => {}
            Some(_) => return Err(Error::IdempotencyMismatch { part_id: id.to_string() }),
            None => {}
        }
    }
    match places.len() {
        0 => Ok(None),
        known if known == append.records.len() => Ok(Some(places)),
        _ if recent => Ok(None),
        _ => Err(Error::Conflict("only some records of the batch were appended before".to_owned())),
    }
}

fn repeated(places: &[Position], tail: Position) -> AppendAck {
    let start = places.first().copied().unwrap_or(tail);
    let last = places.last().copied().unwrap_or(tail);
    AppendAck {
        start,
        end: Position { seq_num: last.seq_num + 1, timestamp: last.timestamp },
        tail,
        seq_nums: places.iter().map(|place| place.seq_num).collect(),
        repeated: true,
    }
}

fn check_writer(channel: &Channel, append: &Append) -> Result<()> {
    if append.fencing_token.as_ref().is_some_and(|token| *token != channel.tail.fence) {
        return Err(Error::Fenced { expected: channel.tail.fence.clone() });
    }
    let tail = channel.tail.next.seq_num;
    if append.match_seq_num.is_some_and(|expected| expected != tail) {
        return Err(Error::SeqNumMismatch { tail });
    }
    Ok(())
}

/// Whether the last record of a channel that is no command says that its session is closed.
fn says_closed(store: &Store, channel: &Channel) -> Result<bool> {
    if let Some(says) = channel.says_closed {
        return Ok(says);
    }
    let (Some(number), tail) = (channel.number, &channel.tail) else { return Ok(false) };
    let oldest = tail.next.seq_num.saturating_sub(CLOSING_RECORDS).max(tail.earliest);
    for seq_num in (oldest..tail.next.seq_num).rev() {
        for item in store.view().range(number, seq_num, seq_num + 1) {
            let (record, _) = item?;
            if !record.is_command() {
                return Ok(close::says_closed(&record.headers));
            }
        }
    }
    Ok(false)
}

/// Gives a record its place and lets a command act.
fn place(channel: &mut Channel, prepared: &Prepared, now: Timestamp) -> Position {
    let tail = &mut channel.tail;
    let wanted = prepared.record.timestamp.map_or(now, |timestamp| timestamp.min(now));
    let position = Position { seq_num: tail.next.seq_num, timestamp: wanted.max(tail.next.timestamp) };
    tail.next = Position { seq_num: position.seq_num + 1, timestamp: position.timestamp };
    tail.metered_end += prepared.metered as u64;
    match &prepared.command {
        Some(Command::Trim(below)) => trim(channel, *below),
        Some(Command::Fence(token)) => tail.fence.clone_from(token),
        None => channel.says_closed = Some(close::says_closed(&prepared.record.headers)),
    }
    position
}

fn trim(channel: &mut Channel, below: SeqNum) {
    let tail = &mut channel.tail;
    tail.earliest = tail.earliest.max(below.min(tail.next.seq_num));
}

fn write(
    batch: &mut OwnedWriteBatch,
    store: &Store,
    number: u64,
    channel: &mut Channel,
    mut prepared: Prepared,
    position: Position,
) {
    let metered_end = channel.tail.metered_end;
    codec::place_record(&mut prepared.value, position.timestamp, metered_end);
    batch.insert(&store.records, codec::record_key(number, position.seq_num), Bytes::from(prepared.value));
    if let Some(live) = &mut channel.live {
        let (headers, body) = (prepared.record.headers, prepared.record.body);
        live.push(Record { position, headers, body, metered_end });
    }
}

/// Shows what has become durable of a channel.
fn publish(shared: &Shared, key: &ChannelKey, channel: &mut Channel) {
    channel.touched = false;
    let tail = channel.tail.next;
    shared.tails.insert(key.clone(), store::bounds(&channel.tail));
    let records = channel.live.take().unwrap_or_default();
    if let Some(window) = shared.live.window(key) {
        window.publish(split(records, tail), tail);
    }
}

/// Cuts a group's records of one channel into batches of the size that one append may have.
fn split(records: Vec<Record>, tail: Position) -> Vec<Arc<RecordBatch>> {
    let mut batches = Vec::new();
    let (mut batch, mut bytes) = (Vec::new(), 0);
    for record in records {
        let size = metered_size(&record.headers, &record.body);
        if !batch.is_empty() && (batch.len() >= BATCH_RECORDS_MAX || bytes + size > METERED_MAX) {
            batches.push(Arc::new(RecordBatch::new(std::mem::take(&mut batch), None)));
            bytes = 0;
        }
        bytes += size;
        batch.push(record);
    }
    if !batch.is_empty() {
        batches.push(Arc::new(RecordBatch::new(batch, Some(tail))));
    }
    batches
}
