//! One task for each channel that is written: puts appends into one pipeline to S2, in the order in which they came, and
//! answers them as S2 does.
//!
//! Every append carries the fencing token that is set, as far as this replica knows; so the seal, which is a token that
//! nobody has, refuses them all, whichever replica they come from. A token that another writer has set is learned from
//! the refusal and the append sent again: nothing was stored. An append whose outcome is not known is sent again only if
//! its part ids can be looked for in the log; see `plan`.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt};
use s2_sdk::append_session::{AppendSession, BatchSubmitTicket};
use s2_sdk::error::AppendSessionError;
use tokio::sync::mpsc;

use super::append::{Request, away_too};
use super::codec::{self, SEAL};
use super::index::lock;
use super::plan::{NOWHERE, Plan};
use super::remote::{Fault, Guard, away, session_fault};
use super::{FIRST_PAUSE, Shared};
use crate::channel::observer::CommitStats;
use crate::channel::part::Digest;
use sessiond_domain::record::Chain;
use sessiond_domain::{
    AppendAck, AppendInput, Backoff, ChannelKey, Closure, Error, Position, Result, SeqNum,
};

/// Batches of one channel that are on their way.
const IN_FLIGHT: usize = 512;
/// A channel without appends for this long gives its task and its pipeline back.
const IDLE: Duration = Duration::from_secs(20);
/// Times that an append is tried that S2 should take.
const TRIES: u32 = 5;
/// For how long an append is tried while other writers get in its way. Each time one of them has stored something.
const CONTENDED_FOR: Duration = Duration::from_secs(20);
/// Times that an append is tried whose outcome was not known.
const LOST_TRIES: u32 = 3;

/// The channels that are being written.
#[derive(Default)]
pub(super) struct Writers(Mutex<HashMap<ChannelKey, mpsc::UnboundedSender<Request>>>);

impl Writers {
    /// Puts an append in line; the future waits for its answer.
    pub(super) fn append(
        shared: &Arc<Shared>,
        key: &ChannelKey,
        input: AppendInput,
    ) -> BoxFuture<'static, Result<AppendAck>> {
        let chain = input.chain.clone();
        let prepared = Request::prepare(input).inspect_err(|_| chain.iter().for_each(Chain::break_off)).map(
            |(request, answer)| {
                let mut writers = lock(&shared.writers.0);
                let unsent = match writers.get(key) {
                    Some(queue) => queue.send(request).err().map(|unsent| unsent.0),
                    None => Some(request),
                };
                if let Some(request) = unsent {
                    writers.insert(key.clone(), Writer::start(shared.clone(), key.clone(), request));
                }
                answer
            },
        );
        async move { prepared?.await.unwrap_or_else(|_| Err(away("the writer of a channel has ended"))) }
            .boxed()
    }
}

/// An append that S2 has not answered.
struct Flight {
    request: Request,
    ticket: BatchSubmitTicket,
    /// The token that it carries.
    token: String,
    /// Where it is expected to land.
    first: Option<SeqNum>,
    /// It must land exactly behind the records that were searched; if it does not, another writer was faster.
    pinned: bool,
}

/// The task of one channel.
pub(super) struct Writer {
    pub shared: Arc<Shared>,
    pub key: ChannelKey,
    pub stream: String,
    queue: mpsc::UnboundedReceiver<Request>,
    waiting: VecDeque<Request>,
    flight: VecDeque<Flight>,
    /// Part ids in flight.
    pub flying: HashSet<Digest>,
    session: Option<AppendSession>,
    /// The token that is set once everything in flight is stored.
    pub token: String,
    /// Where the next append lands if nobody else writes; `None` if somebody did.
    pub next: Option<SeqNum>,
    /// The tail when the log was last searched.
    pub searched: Position,
    pub closed: Option<Closure>,
}

impl Writer {
    fn start(shared: Arc<Shared>, key: ChannelKey, first: Request) -> mpsc::UnboundedSender<Request> {
        let (sender, queue) = mpsc::unbounded_channel();
        let stream = codec::channel_stream(&key);
        let writer = Self {
            shared,
            key,
            stream,
            queue,
            waiting: VecDeque::from([first]),
            flight: VecDeque::new(),
            flying: HashSet::new(),
            session: None,
            token: String::new(),
            next: None,
            searched: Position::default(),
            closed: None,
        };
        writer.shared.background.clone().once("writer of a channel on S2", writer.run());
        sender
    }

    async fn run(mut self) {
        loop {
            self.send_waiting().await;
            let idle = self.flight.is_empty() && self.waiting.is_empty();
            let room = self.flight.len() + self.waiting.len() < IN_FLIGHT;
            tokio::select! {
                biased;
                answer = ticket(self.flight.front_mut()) => self.landed(answer).await,
                request = self.queue.recv(), if room => match request {
                    Some(request) => self.waiting.push_back(request),
                    None => return,
                },
                () = tokio::time::sleep(IDLE), if idle => if self.retire() { return },
            }
        }
    }

    /// Gives the place in the map back, unless something has just come.
    fn retire(&mut self) -> bool {
        let mut writers = lock(&self.shared.writers.0);
        match self.queue.try_recv() {
            Ok(request) => {
                self.waiting.push_back(request);
                false
            }
            Err(_) => {
                writers.remove(&self.key);
                true
            }
        }
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.flight.is_empty()
    }

    /// Sends what may be sent now.
    async fn send_waiting(&mut self) {
        while self.flight.len() < IN_FLIGHT {
            while self.waiting.len() < IN_FLIGHT
                && let Ok(request) = self.queue.try_recv()
            {
                self.waiting.push_back(request);
            }
            let Some(request) = self.waiting.pop_front() else { return };
            match self.plan(&request).await {
                Plan::Send { pin } => {
                    if !self.send(request, pin).await {
                        return;
                    }
                }
                Plan::Answer(answer) => request.answer(answer),
                Plan::Wait => return self.waiting.push_front(request),
            }
        }
    }

    /// False when the pipeline has ended under what is in flight, which must land first.
    async fn send(&mut self, request: Request, pin: Option<SeqNum>) -> bool {
        let token = request.fencing_token.clone().unwrap_or_else(|| self.token.clone());
        let guard = Guard { token: Some(&token), tail: pin.or(request.match_seq_num) };
        let ticket = match self.submit(&request, guard).await {
            Ok(ticket) => ticket,
            // What is in flight knows better why the pipeline has ended.
            Err(_) if !self.flight.is_empty() => {
                self.waiting.push_front(request);
                return false;
            }
            Err(error) => {
                self.session = None;
                self.again(request, &error, TRIES);
                return true;
            }
        };
        self.flying.extend(request.part_keys());
        let first = self.next;
        self.next = first.map(|next| next + request.records.len() as u64);
        if let Some(token) = request.token_after() {
            token.clone_into(&mut self.token);
        }
        let pinned = pin.is_some_and(|place| place != NOWHERE);
        self.flight.push_back(Flight { request, ticket, token, first, pinned });
        true
    }

    async fn submit(&mut self, request: &Request, guard: Guard<'_>) -> Result<BatchSubmitTicket> {
        let input = guard.input(request.records.clone())?;
        if self.session.is_none() {
            self.session = Some(self.shared.remote.session(&self.stream)?);
        }
        let session = self.session.as_ref().expect("just made");
        session.submit(input).await.map_err(away)
    }

    /// The oldest append in flight was answered.
    async fn landed(&mut self, answer: Result<s2_sdk::types::AppendAck, AppendSessionError>) {
        let Some(flight) = self.flight.pop_front() else { return };
        for key in flight.request.part_keys() {
            self.flying.remove(key);
        }
        match answer {
            Ok(ack) => self.stored(flight, &ack),
            Err(error) => {
                // The pipeline has ended with this one: nothing behind it is stored unless the answer itself was lost.
                self.session = None;
                self.next = None;
                self.flying.clear();
                self.token.clone_from(&flight.token);
                let behind =
                    std::mem::take(&mut self.flight).into_iter().map(|flight| flight.request).collect();
                self.failed(flight, behind, session_fault(error)).await;
            }
        }
    }

    fn stored(&mut self, flight: Flight, ack: &s2_sdk::types::AppendAck) {
        let (start, end) = (codec::position(ack.start), codec::position(ack.end));
        let request = flight.request;
        if flight.first.is_some_and(|first| first != start.seq_num) {
            self.next = None;
        }
        let placed = request.placed(start, end);
        if let Some(index) = self.shared.indexes.get(&self.key) {
            let follows = placed.is_some_and(|parts| {
                lock(&index).stored(start.seq_num, request.records.len(), parts.into_iter())
            });
            if follows {
                self.shared.indexes.keep(&self.key, &index);
            } else {
                self.next = None;
            }
        }
        let seq_nums: Vec<_> = (start.seq_num..end.seq_num).collect();
        self.shared.memory.slot(&self.key).update(|known| {
            for (index, seq_num) in seq_nums.iter().enumerate() {
                let command =
                    request.commands.iter().find(|(at, _)| *at == index).map(|(_, command)| command);
                known.saw(*seq_num, end.timestamp, command);
            }
        });
        self.shared.observer.committed(CommitStats {
            records: seq_nums.len(),
            bytes: request.metered,
            requests: 1,
            sync_duration: request.since.elapsed(),
        });
        request.answer(Ok(AppendAck { start, end, tail: end, seq_nums, repeated: false }));
    }

    async fn failed(&mut self, flight: Flight, mut behind: Vec<Request>, fault: Fault) {
        let request = flight.request;
        match fault {
            Fault::NoStream => match self.shared.registry.create(&self.key).await {
                Ok(()) => {
                    self.requeue(behind);
                    self.again(request, &away("a stream that was just made is missing"), TRIES);
                }
                Err(Error::Closed { at, reason }) => {
                    self.closed = Some(Closure { at, reason });
                    behind.insert(0, request);
                    self.requeue(behind);
                }
                Err(error) => self.refuse_all(request, behind, &error),
            },
            Fault::Fenced(token) if token == SEAL => {
                match self.shared.registry.closure(&self.key.session).await {
                    Ok(closure) => {
                        self.closed = Some(closure);
                        behind.insert(0, request);
                        self.requeue(behind);
                    }
                    Err(error) => self.refuse_all(request, behind, &error),
                }
            }
            Fault::Fenced(expected) => {
                self.token.clone_from(&expected);
                if request.fencing_token.is_some() {
                    request.answer(Err(Error::Fenced { expected }));
                    return self.requeue(behind);
                }
                self.contended(request, behind).await;
            }
            Fault::Moved(_) if flight.pinned => self.contended(request, behind).await,
            Fault::Moved(tail) => {
                request.answer(Err(Error::SeqNumMismatch { tail }));
                self.requeue(behind);
            }
            Fault::Away(error) => self.refuse_all(request, behind, &error),
            Fault::Unknown(error) => {
                behind.insert(0, request);
                for request in behind.into_iter().rev() {
                    if request.is_named() {
                        self.again(request, &error, LOST_TRIES);
                    } else {
                        request.answer(Err(away_too(&error)));
                    }
                }
            }
        }
    }

    /// Another writer was faster: once more, soon.
    async fn contended(&mut self, mut request: Request, behind: Vec<Request>) {
        self.requeue(behind);
        request.tries += 1;
        if request.since.elapsed() > CONTENDED_FOR {
            return request.answer(Err(away("other writers keep getting in the way")));
        }
        let pause = Backoff::after(FIRST_PAUSE, self.shared.longest_pause, request.tries).next_pause() / 16;
        self.waiting.push_front(request);
        tokio::time::sleep(pause).await;
    }

    /// Puts an append back at the head of the line, unless it was tried too often.
    fn again(&mut self, mut request: Request, error: &Error, most: u32) {
        request.tries += 1;
        if request.tries < most {
            self.waiting.push_front(request);
        } else {
            request.answer(Err(away_too(error)));
        }
    }

    /// Puts appends that S2 has not looked at back at the head of the line.
    fn requeue(&mut self, requests: Vec<Request>) {
        requests.into_iter().rev().for_each(|request| self.waiting.push_front(request));
    }

    /// S2 is away: nothing in line was stored, and nothing would be.
    fn refuse_all(&mut self, first: Request, behind: Vec<Request>, error: &Error) {
        self.requeue(behind);
        self.waiting.push_front(first);
        while let Ok(request) = self.queue.try_recv() {
            self.waiting.push_back(request);
        }
        self.waiting.drain(..).for_each(|request| request.answer(Err(away_too(error))));
    }
}

/// The answer to an append in flight; never, if there is none.
async fn ticket(flight: Option<&mut Flight>) -> Result<s2_sdk::types::AppendAck, AppendSessionError> {
    match flight {
        Some(flight) => (&mut flight.ticket).await,
        None => std::future::pending().await,
    }
}
