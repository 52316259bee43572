//! A writer of one channel that does not wait for an answer before it sends the next batch.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use tokio::sync::futures::OwnedNotified;
use tokio::task::JoinHandle;

use super::waiters::Waiter;
use super::{DirectBatch, Sessions};
use crate::access::{Action, Caller};
use crate::channel::{ChannelAddress, ChannelKey, Direction};
use crate::clock::Timestamp;
use crate::envelope::claims_control;
use crate::error::{Error, Result};
use crate::id::{EnvironmentId, SessionId, SessionRef};
use crate::lifeline::{Cut, Lifeline};
use crate::record::{AppendAck, Chain, NewRecord};
use crate::session::SharedSession;

/// Batches that one writer may have on their way.
const BATCHES_MAX: usize = 256;
/// Bytes that one writer may have on their way, unless one batch alone has more.
const BYTES_MAX: usize = 4 << 20;

/// Why a writer must end.
#[derive(Debug)]
pub enum WriterEnd {
    /// The session takes no more records, or the caller's credentials have ended.
    Refused(Error),
    /// The server stops.
    Stopping,
}

/// What a writer hears.
#[derive(Debug)]
pub enum WriterEvent {
    /// The answer to the oldest batch that has none yet.
    Answer(Result<AppendAck>),
    /// Nothing more may be sent; the answers that are to come still do. Comes once.
    Ended(WriterEnd),
}

/// One caller's pipelined writes to one channel. Batches are stored in the order in which they were sent, and answered
/// in that order; behind one that was refused, none is stored. What was sent is stored, or refused, whether or not its
/// answer is waited for.
pub struct Appender {
    caller: Caller,
    key: ChannelKey,
    ending: Ending,
    ended: bool,
    chain: Chain,
    waiting: FuturesOrdered<JoinHandle<Answer>>,
    bytes: usize,
}

/// Everything that ends a writer.
struct Ending {
    sessions: Arc<Sessions>,
    session: SharedSession,
    lifeline: Lifeline,
    closed: Pin<Box<OwnedNotified>>,
    _waiter: Waiter<(EnvironmentId, SessionId)>,
}

/// What came of a batch, and how large it was.
type Answer = (Result<AppendAck>, usize);

impl Sessions {
    /// Begins to write to a channel.
    ///
    /// # Errors
    /// As [`Sessions::append`].
    pub async fn appender(
        self: &Arc<Self>,
        caller: &Caller,
        address: &SessionRef,
        channel: &ChannelAddress,
    ) -> Result<Appender> {
        may_write(caller, channel, &[])?;
        let id = self.require(caller, Action::Write, address).await?.id.clone();
        // First, so that no close falls between the look at the row and the wait.
        let waiter = self.rows.until_closed(&caller.environment, &id);
        let closed = Box::pin(waiter.woken());
        let session = self.rows.current(&caller.environment, &SessionRef::Id(id.clone())).await?;
        let session = session.ok_or(Error::NotFound("session"))?;
        session.require_active(self.clock.now())?;
        let lifeline = Lifeline::new(Some(caller), self.bounds.clone());
        let key = ChannelKey { session: id, address: channel.clone() };
        let ending = Ending { sessions: self.clone(), session, lifeline, closed, _waiter: waiter };
        Ok(Appender {
            caller: caller.clone(),
            key,
            ending,
            ended: false,
            chain: Chain::default(),
            waiting: FuturesOrdered::new(),
            bytes: 0,
        })
    }
}

impl Appender {
    /// Whether another batch may be sent before an answer is taken.
    pub fn has_room(&self) -> bool {
        self.waiting.len() < BATCHES_MAX && self.bytes < BYTES_MAX
    }

    /// How many answers are to come.
    pub fn in_flight(&self) -> usize {
        self.waiting.len()
    }

    /// Sends a batch: it has its place when this returns.
    ///
    /// # Errors
    /// As [`Sessions::append`], where that is known before the log is asked.
    pub async fn send(&mut self, batch: DirectBatch) -> Result<()> {
        may_write(&self.caller, &self.key.address, &batch.records)?;
        let mut input = batch.into_input(self.key.address.direction)?;
        input.chain = Some(self.chain.clone());
        let (sessions, session) = (self.ending.sessions.clone(), self.ending.session.clone());
        let size = input.cost();
        let room = sessions.room.reserve(&input).await;
        let now = sessions.clock.now();
        self.caller.require_current(now)?;
        session.require_active(now)?;
        let append = sessions.channels.append(&self.key, input);
        let key = self.key.clone();
        self.bytes += size;
        // A task, so that what must follow an append does so even if the writer is gone or reads no answers.
        self.waiting.push_back(tokio::spawn(async move {
            let result = append.await;
            drop(room);
            (sessions.after_append(&session, &key, result).await, size)
        }));
        Ok(())
    }

    /// What comes next. Cancel safe.
    pub async fn next(&mut self) -> WriterEvent {
        let Self { ending, ended, waiting, bytes, .. } = self;
        tokio::select! {
            biased;
            Some(answer) = waiting.next() => WriterEvent::Answer(match answer {
                Ok((result, size)) => {
                    *bytes -= size;
                    result
                }
                Err(cut) => Err(Error::interrupted(&cut)),
            }),
            end = ending.reached(), if !*ended => {
                *ended = true;
                WriterEvent::Ended(end)
            }
            else => std::future::pending().await,
        }
    }
}

impl Ending {
    /// Completes when nothing more may be sent. Cancel safe.
    async fn reached(&mut self) -> WriterEnd {
        loop {
            let now = self.lifeline.now();
            if let Err(error) = self.session.require_active(now) {
                return WriterEnd::Refused(error);
            }
            let wake = self.session.expires_at.unwrap_or(Timestamp::from_millis(i64::MAX));
            match self.lifeline.check(now, wake) {
                Some(Cut::Credentials(error)) => return WriterEnd::Refused(error),
                Some(Cut::Stopping) => return WriterEnd::Stopping,
                None => {}
            }
            tokio::select! {
                biased;
                () = self.closed.as_mut() => {
                    return WriterEnd::Refused(refusal(&self.sessions, &self.session).await);
                }
                () = self.lifeline.ring() => {}
            }
        }
    }
}

/// Why a session that has been closed takes nothing more.
async fn refusal(sessions: &Sessions, session: &SharedSession) -> Error {
    let address = SessionRef::Id(session.id.clone());
    match sessions.rows.current(&session.environment, &address).await {
        Ok(Some(row)) => row.require_active(sessions.clock.now()).err(),
        Ok(None) => None,
        Err(error) => Some(error),
    }
    .unwrap_or(Error::NotFound("session"))
}

/// Refuses what a caller may not write to a channel, whatever its scopes.
pub(super) fn may_write(caller: &Caller, channel: &ChannelAddress, records: &[NewRecord]) -> Result<()> {
    if caller.is_private() {
        return Ok(());
    }
    if channel.direction == Direction::Out {
        return Err(Error::Denied("Appending to the out channel requires secret key authentication"));
    }
    if records.iter().any(claims_control) {
        return Err(Error::Denied("Control and command records require secret key authentication"));
    }
    Ok(())
}

impl fmt::Debug for Appender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Appender").field("key", &self.key).field("in_flight", &self.in_flight()).finish()
    }
}
