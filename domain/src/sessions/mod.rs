//! The use cases, one method each. Every front end calls these and nothing below them.

mod appender;
mod control;
mod data;
mod direct;
mod replicas;
mod room;
mod rows;
mod runs;
mod snapshot;
mod waiters;
mod waiting;
mod waitpoints;

use std::future::Future;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use super::access::{Action, Caller, Resource, UNAUTHORIZED, Verdict};
use super::background::Background;
use super::blob::Blobs;
use super::channel::ChannelKey;
use super::clock::Clock;
use super::error::{Error, Result};
use super::id::SessionRef;
use super::lifeline::Bounds;
use super::port::{ChannelStore, Condition, ListIndex, MetadataStore, Waitpoints};
use super::record::{AppendAck, ReadStart};
use super::session::{Closure, NewSession, Session, SharedSession};
use super::timer::Timers;
pub use appender::{Appender, WriterEnd, WriterEvent};
pub use direct::DirectBatch;
use room::Room;
use rows::Rows;
pub use runs::EndAndContinue;
use snapshot::Parses;
use waiting::Waiting;
pub use waitpoints::Awaited;

/// How the use cases are set up.
#[derive(Clone, Copy, Debug)]
pub struct SessionsConfig {
    /// Rows kept in memory.
    pub cached_rows: usize,
    /// Other processes change the same rows, so what is in memory may have changed.
    pub replicated: bool,
}

impl Default for SessionsConfig {
    fn default() -> Self {
        Self { cached_rows: 20_000, replicated: false }
    }
}

/// A create as a front end hands it over.
#[derive(Clone, Debug, Default)]
pub struct CreateSession {
    /// The session wanted.
    pub session: NewSession,
    /// Makes a retry of the same request find the first one's session when there is no external id.
    pub request_key: Option<String>,
}

/// The answer to a create.
#[derive(Clone, Debug)]
pub struct Created {
    /// The new or found session.
    pub session: Session,
    /// True if it existed before.
    pub is_cached: bool,
}

/// How to follow a channel.
#[derive(Clone, Copy, Debug)]
pub struct FollowOptions {
    /// Where to begin.
    pub start: ReadStart,
    /// Look at the end of the channel first, and if the last turn is complete end after the stored records.
    pub peek_settled: bool,
    /// Fail with [`Error::Trimmed`] rather than begin, or go on, behind records that have been trimmed, and with
    /// [`Error::CursorAhead`] rather than begin at the tail where `start` lies beyond it.
    pub require_complete: bool,
}

/// What an append has done.
#[derive(Clone, Debug)]
pub struct Appended {
    /// The places of its records.
    pub ack: AppendAck,
    /// The session, as it was before.
    pub session: SharedSession,
    /// The channel.
    pub(super) key: ChannelKey,
}

/// Runs a write and what must follow it in a task of its own: a client that hangs up in between must not leave one
/// without the other.
async fn detached<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    tokio::spawn(work.in_current_span()).await.map_err(|cut| Error::interrupted(&cut))?
}

/// Runs what takes a turn, or a place in a pool, in a task of its own: whoever polls it may stop for as long as a client likes
/// not to read, and must not keep that from others meanwhile. It ends when it is dropped.
async fn in_own_task<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    AbortOnDropHandle::new(tokio::spawn(work.in_current_span()))
        .await
        .map_err(|cut| Error::interrupted(&cut))?
}

/// What the use cases stand on.
pub struct Backends {
    /// Sessions, environments, keys.
    pub store: Arc<dyn MetadataStore>,
    /// Who waits for input.
    pub waitpoints: Arc<dyn Waitpoints>,
    /// The log.
    pub channels: Arc<dyn ChannelStore>,
    /// Lists.
    pub index: Arc<dyn ListIndex>,
    /// Snapshots.
    pub blobs: Arc<dyn Blobs>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Wakes streams.
    pub timers: Arc<Timers>,
    /// Watches what runs beside the requests.
    pub background: Arc<Background>,
    /// Cancelled when the server begins to stop; [`Timers::wake_all`] must follow.
    pub stopping: CancellationToken,
}

/// Every use case of sessions and channels.
pub struct Sessions {
    store: Arc<dyn MetadataStore>,
    waitpoints: Arc<dyn Waitpoints>,
    channels: Arc<dyn ChannelStore>,
    index: Arc<dyn ListIndex>,
    blobs: Arc<dyn Blobs>,
    clock: Arc<dyn Clock>,
    bounds: Bounds,
    rows: Rows,
    room: Room,
    parses: Parses,
    waiting: Arc<Waiting>,
    background: Arc<Background>,
}

impl Sessions {
    /// The use cases over a set of adapters. [`Timers::run`] must be running for streams to end on time.
    pub fn new(backends: Backends, config: SessionsConfig) -> Arc<Self> {
        let Backends { store, waitpoints, channels, index, blobs, clock, timers, background, stopping } =
            backends;
        let rows = Rows::new(store.clone(), config);
        let waiting = Waiting::new(
            store.clone(),
            waitpoints.clone(),
            channels.clone(),
            clock.clone(),
            timers.clone(),
            background.clone(),
        );
        let bounds = Bounds { clock: clock.clone(), timers, stopping };
        Arc::new(Self {
            store,
            waitpoints,
            channels,
            index,
            blobs,
            clock,
            bounds,
            rows,
            room: Room::default(),
            parses: Parses::default(),
            waiting,
            background,
        })
    }

    /// The clock that every rule is judged by.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// Writes the rows of seals that a crash left without one, and ends the waits that something has come for.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn recover(&self) -> Result<()> {
        for (session, closure) in self.channels.unsettled().await? {
            self.store.complete_close(&session, &closure).await?;
            self.channels.settle(&session).await?;
            tracing::info!(session.id = %session, "completed the close of a session that was sealed before a crash");
        }
        self.waiting.recover().await
    }

    /// Answers if every backend can be used that appends and reads need; what is wrong beside that, in sentences that anyone
    /// may read.
    ///
    /// # Errors
    /// The first backend's that cannot.
    pub async fn ready(&self) -> Result<Vec<String>> {
        self.store.ping().await?;
        self.channels.ping().await?;
        let mut degraded = self.index.ping().await.unwrap_or_else(|error| vec![error.to_string()]);
        degraded.extend(self.background.troubles());
        Ok(degraded)
    }

    /// What keeps the log from taking appends, as far as it is known without asking. Never waits.
    pub fn condition(&self) -> Condition {
        self.channels.condition()
    }

    /// The row at an address that the caller may act on. What of it may change may have changed in another process; what
    /// the log decides, the log decides.
    async fn require(&self, caller: &Caller, action: Action, address: &SessionRef) -> Result<SharedSession> {
        self.visible(caller, action, address).await?.ok_or(Error::NotFound("session"))
    }

    /// As [`Sessions::require`], but an external id without a row is no error.
    async fn row_optional(&self, caller: &Caller, address: &SessionRef) -> Result<Option<SharedSession>> {
        match (self.visible(caller, Action::Read, address).await?, address) {
            (None, SessionRef::Id(_)) => Err(Error::NotFound("session")),
            (session, _) => Ok(session),
        }
    }

    async fn visible(
        &self,
        caller: &Caller,
        action: Action,
        address: &SessionRef,
    ) -> Result<Option<SharedSession>> {
        let session = match caller.judge(action, address) {
            Verdict::Denied => return Err(UNAUTHORIZED),
            Verdict::Granted => self.rows.find(&caller.environment, address).await?,
            // Judged by an id that may have become another session's.
            Verdict::ByOtherId => self.rows.current(&caller.environment, address).await?,
        };
        Self::judged(caller, action, address, session.as_ref())?;
        Ok(session)
    }

    /// As [`Sessions::visible`], and as the row stands.
    async fn present(
        &self,
        caller: &Caller,
        action: Action,
        address: &SessionRef,
    ) -> Result<Option<SharedSession>> {
        if caller.judge(action, address) == Verdict::Denied {
            return Err(UNAUTHORIZED);
        }
        let session = self.rows.current(&caller.environment, address).await?;
        Self::judged(caller, action, address, session.as_ref())?;
        Ok(session)
    }

    /// The whole judgement, of an address and of what stands there.
    fn judged(
        caller: &Caller,
        action: Action,
        address: &SessionRef,
        session: Option<&SharedSession>,
    ) -> Result<()> {
        match caller.judge(action, address) {
            Verdict::Granted => Ok(()),
            Verdict::Denied => Err(UNAUTHORIZED),
            Verdict::ByOtherId => {
                let session = session.ok_or(UNAUTHORIZED)?;
                let external = session.external_id.as_ref().map_or(session.id.as_str(), |id| id.as_str());
                caller.require_any(
                    action,
                    &[Resource::Session(session.id.as_str()), Resource::Session(external)],
                )
            }
        }
    }

    /// Brings a seal of the log to the row.
    async fn complete_close(&self, session: &Session, closure: &Closure) -> Result<Session> {
        let closed = self.store.close_session(&session.environment, &session.id, closure).await?;
        let closed = closed.ok_or(Error::NotFound("session"))?;
        self.rows.changed(&[session, &closed]);
        self.waiting.closed(&session.id);
        self.channels.settle(&session.id).await?;
        Ok(closed)
    }
}
