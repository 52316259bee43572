//! What waits for the writer, in the order in which it was asked.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::oneshot;

use super::codec::{self, Unreadable};
use crate::channel::part::content_hash;
use sessiond_domain::record::{Chain, Command, NewRecord, PartIds};
use sessiond_domain::{
    AppendAck, AppendInput, ChannelKey, Close, Closure, Error, Result, SeqNum, SessionId, Timestamp,
};

/// Something for the writer to do, and where its answer goes.
pub(super) enum Request {
    Append { key: ChannelKey, append: Append, reply: oneshot::Sender<Result<AppendAck>> },
    Seal { session: SessionId, close: Close, reply: oneshot::Sender<Result<Closure>> },
    Settle { session: SessionId, reply: oneshot::Sender<Result<()>> },
    Sweep { sweep: Sweep, reply: oneshot::Sender<Result<()>> },
}

/// An append, prepared as far as it can be without knowing the channel.
pub(super) struct Append {
    pub records: Vec<Prepared>,
    pub match_seq_num: Option<SeqNum>,
    pub fencing_token: Option<String>,
    pub part_ids: PartIds,
    pub chain: Option<Chain>,
}

/// A record, encoded but for its place.
pub(super) struct Prepared {
    pub record: NewRecord,
    pub value: Vec<u8>,
    pub metered: usize,
    /// Of headers and body, if it has a part id.
    pub hash: Option<[u8; 16]>,
    pub command: Option<Command>,
}

/// A slice of background work, found by the sweeper.
pub(super) enum Sweep {
    /// Forget records below a number, as a trim command would.
    Trim { key: ChannelKey, below: SeqNum },
    /// Delete the records of `from..to`, all trimmed, and what is remembered of their part ids.
    Remove { key: ChannelKey, from: SeqNum, to: SeqNum, parts: Vec<(Bytes, Timestamp)> },
    /// Delete part ids whose time has come: keys of `expiries`.
    Forget { expiries: Vec<Bytes> },
}

impl Append {
    pub(super) fn prepare(input: AppendInput) -> Result<Self> {
        let (match_seq_num, part_ids) = (input.match_seq_num, input.part_ids);
        let (fencing_token, chain) = (input.fencing_token.clone(), input.chain.clone());
        let records = input.into_records();
        let records: Vec<_> = records.into_iter().map(Prepared::new).collect::<Result<_>>()?;
        Ok(Self { records, match_seq_num, fencing_token, part_ids, chain })
    }
}

impl Prepared {
    pub(super) fn new(record: NewRecord) -> Result<Self> {
        let command = Command::parse(&record.headers, &record.body)?;
        let metered = record.metered_size();
        let hash = record.part_id.is_some().then(|| content_hash(&record.headers, &record.body));
        Ok(Self { value: codec::encode_record(&record, metered), metered, hash, command, record })
    }
}

/// The queue between callers and the writer.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Request>,
    /// The writer sleeps: only then is waking it worth a system call.
    idle: bool,
    closed: bool,
}

impl Queue {
    /// Queues a request.
    pub(super) fn push(&self, request: Request) -> Result<()> {
        let mut state = self.lock();
        if state.closed {
            return Err(gone());
        }
        state.waiting.push_back(request);
        let wake = std::mem::take(&mut state.idle);
        drop(state);
        if wake {
            self.arrived.notify_one();
        }
        Ok(())
    }

    /// Waits for requests and takes all of them; false when the queue is closed and empty.
    pub(super) fn take(&self, into: &mut VecDeque<Request>) -> bool {
        let mut state = self.lock();
        while state.waiting.is_empty() {
            if state.closed {
                return false;
            }
            state.idle = true;
            state = self.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        into.append(&mut state.waiting);
        true
    }

    /// Takes what has come meanwhile, without waiting.
    pub(super) fn take_more(&self, into: &mut VecDeque<Request>) {
        into.append(&mut self.lock().waiting);
    }

    /// Refuses every later request; those that wait are still taken.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.arrived.notify_one();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The answer to whoever asks a log that does not write any more.
pub(super) fn gone() -> Error {
    Error::Unavailable { what: "log", source: None }
}

impl From<Unreadable> for Error {
    fn from(error: Unreadable) -> Self {
        Self::internal(error)
    }
}
