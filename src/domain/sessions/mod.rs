//! The use cases, one method each. Every front end calls these and nothing below them.

mod rows;

use std::sync::Arc;

use futures_util::stream::{self, BoxStream, StreamExt, TryStreamExt};
use tracing::instrument;

use super::access::{Action, Caller, Resource, UNAUTHORIZED, Verdict};
use super::channel::{ChannelAddress, ChannelKey, Direction};
use super::clock::Clock;
use super::envelope;
use super::error::{Error, Result};
use super::follow::{Follow, Item};
use super::id::SessionRef;
use super::list::{Filter, Page, PageRequest, TagQuery};
use super::port::{ChannelStore, ListIndex, MetadataStore};
use super::record::{AppendAck, AppendInput, Bounds, ReadLimit, ReadStart, RecordBatch, SeqNum};
use super::session::{Closure, NewSession, Session, SessionPatch, SharedSession, check_reason};
use super::timer::Timers;
use rows::Rows;

/// How the use cases are set up.
#[derive(Clone, Copy, Debug)]
pub struct SessionsConfig {
    /// Rows kept in memory.
    pub cached_rows: usize,
}

impl Default for SessionsConfig {
    fn default() -> Self {
        Self { cached_rows: 20_000 }
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
}

/// Every use case of sessions and channels.
pub struct Sessions {
    store: Arc<dyn MetadataStore>,
    channels: Arc<dyn ChannelStore>,
    index: Arc<dyn ListIndex>,
    clock: Arc<dyn Clock>,
    timers: Arc<Timers>,
    rows: Rows,
}

impl Sessions {
    /// The use cases over a set of adapters. [`Timers::run`] must be running for streams to end on time.
    pub fn new(
        store: Arc<dyn MetadataStore>,
        channels: Arc<dyn ChannelStore>,
        index: Arc<dyn ListIndex>,
        clock: Arc<dyn Clock>,
        timers: Arc<Timers>,
        config: SessionsConfig,
    ) -> Arc<Self> {
        let rows = Rows::new(store.clone(), config.cached_rows);
        Arc::new(Self { store, channels, index, clock, timers, rows })
    }

    /// The clock that every rule is judged by.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// Creates a session, or finds the one with the same external id. A found one gets the new trigger config
    /// and nothing else.
    ///
    /// # Errors
    /// [`Error::Denied`] also if the session found is out of the caller's reach; [`Error::Conflict`] if it is
    /// closed or expired; [`Error::Invalid`].
    #[instrument(skip_all, name = "create")]
    pub async fn create(&self, caller: &Caller, create: CreateSession) -> Result<Created> {
        let task = create.session.task_identifier.clone();
        caller.require_any(Action::Write, &[Resource::Task(&task), Resource::Sessions])?;
        let now = self.clock.now();
        let trigger_config = create.session.trigger_config.clone();
        let session = create.session.into_session(caller.environment.clone(), now)?;
        let inserted = self.store.create_session(session, create.request_key.as_deref()).await?;
        if inserted.created {
            self.rows.changed(&[&inserted.session]);
            return Ok(Created { session: inserted.session, is_cached: false });
        }
        let found = inserted.session;
        let external = found.external_id.as_ref().map_or(found.id.as_str(), |id| id.as_str());
        caller.require_any(
            Action::Write,
            &[
                Resource::Task(&found.task_identifier),
                Resource::Sessions,
                Resource::Session(external),
                Resource::Session(found.id.as_str()),
            ],
        )?;
        found.require_active(now).map_err(|error| match error {
            Error::Closed { .. } => reuse_conflict("closed"),
            Error::Expired { .. } => reuse_conflict("expired"),
            other => other,
        })?;
        let session = match trigger_config {
            Some(config) if found.trigger_config.as_ref() != Some(&config) => {
                let patch = SessionPatch { trigger_config: Some(config), ..SessionPatch::default() };
                self.apply(&found, patch).await?
            }
            _ => found,
        };
        Ok(Created { session, is_cached: true })
    }

    /// The session at an address.
    ///
    /// # Errors
    /// [`Error::Denied`], [`Error::NotFound`].
    #[instrument(skip_all, name = "get", fields(session.id = %address))]
    pub async fn get(&self, caller: &Caller, address: &SessionRef) -> Result<SharedSession> {
        self.require(caller, Action::Read, address).await
    }

    /// Changes a session. Allowed on closed and expired ones.
    ///
    /// # Errors
    /// [`Error::Denied`], [`Error::NotFound`], [`Error::Conflict`] for an external id that is taken.
    #[instrument(skip_all, name = "update", fields(session.id = %address))]
    pub async fn update(
        &self,
        caller: &Caller,
        address: &SessionRef,
        patch: SessionPatch,
    ) -> Result<Session> {
        let session = self.require(caller, Action::Admin, address).await?;
        self.apply(&session, patch).await
    }

    /// Closes a session for ever. Of several closes the first wins, and every one answers its row.
    ///
    /// # Errors
    /// [`Error::Denied`], [`Error::NotFound`], [`Error::Invalid`] for a reason that is too long.
    #[instrument(skip_all, name = "close", fields(session.id = %address))]
    pub async fn close(
        self: &Arc<Self>,
        caller: &Caller,
        address: &SessionRef,
        reason: Option<String>,
    ) -> Result<Session> {
        check_reason(reason.as_deref())?;
        let session = self.require(caller, Action::Admin, address).await?;
        if session.closed.is_some() {
            return Ok(Session::clone(&session));
        }
        let this = self.clone();
        // A task of its own: a client that hangs up must not leave a seal without its row.
        let closing = tokio::spawn(async move {
            let closure = Closure { at: this.clock.now(), reason };
            let closure = this.channels.seal(&session.id, closure).await?;
            this.complete_close(&session, &closure).await
        });
        closing.await.map_err(Error::internal)?
    }

    /// A page of sessions.
    ///
    /// # Errors
    /// [`Error::Denied`]; [`Error::Invalid`] for a filter that is too large.
    #[instrument(skip_all, name = "list")]
    pub async fn list(&self, caller: &Caller, filter: Filter, page: &PageRequest) -> Result<Page> {
        let filter = may_list(caller, filter)?;
        self.index.list(&caller.environment, &filter, page, self.clock.now()).await
    }

    /// How many sessions match.
    ///
    /// # Errors
    /// As [`Sessions::list`].
    #[instrument(skip_all, name = "count")]
    pub async fn count(&self, caller: &Caller, filter: Filter) -> Result<u64> {
        let filter = may_list(caller, filter)?;
        self.index.count(&caller.environment, &filter, self.clock.now()).await
    }

    /// The tags in use.
    ///
    /// # Errors
    /// [`Error::Denied`].
    #[instrument(skip_all, name = "tags")]
    pub async fn tags(&self, caller: &Caller, query: &TagQuery) -> Result<Vec<String>> {
        caller.require_any(Action::Read, &[Resource::Sessions, Resource::Tasks])?;
        self.index.tags(&caller.environment, query).await
    }

    /// Appends one request body as a data record, the way the append routes do: wrapped in an envelope whose
    /// id is the part id. What clients send to `.in` is cleaned of claims that only the server may make.
    ///
    /// # Errors
    /// As [`Sessions::append`].
    pub async fn append_text(
        &self,
        caller: &Caller,
        address: &SessionRef,
        channel: &ChannelAddress,
        text: &str,
        part_id: Option<&str>,
    ) -> Result<AppendAck> {
        let record = envelope::record(channel.direction, text, part_id);
        self.append(caller, address, channel, AppendInput::one(record)?).await
    }

    /// Appends a batch as one unit; see [`ChannelStore::append`]. The ack means durable.
    ///
    /// # Errors
    /// [`Error::Denied`] also for a public caller that writes `.out`, trims, fences or forges a control
    /// record; [`Error::NotFound`], [`Error::Closed`], [`Error::Expired`], and what the log refuses.
    #[instrument(level = "debug", skip_all, name = "append", fields(session.id = %address))]
    pub async fn append(
        &self,
        caller: &Caller,
        address: &SessionRef,
        channel: &ChannelAddress,
        input: AppendInput,
    ) -> Result<AppendAck> {
        if !caller.is_private() {
            if channel.direction == Direction::Out {
                return Err(Error::Denied("Appending to the out channel requires secret key authentication"));
            }
            if input.records().iter().any(envelope::claims_control) {
                return Err(Error::Denied("Control and command records require secret key authentication"));
            }
        }
        let session = self.require(caller, Action::Write, address).await?;
        session.require_active(self.clock.now())?;
        let key = ChannelKey { session: session.id.clone(), address: channel.clone() };
        let result = self.channels.append(&key, input).await;
        if let Err(Error::Closed { at, reason }) = &result {
            let closure = Closure { at: *at, reason: reason.clone() };
            self.complete_close(&session, &closure).await?;
        }
        result
    }

    /// Where a channel begins and ends; both zero for an external id that no session has yet.
    ///
    /// # Errors
    /// [`Error::Denied`], [`Error::NotFound`] for an unknown `session_...` id.
    #[instrument(skip_all, name = "bounds", fields(session.id = %address))]
    pub async fn bounds(
        &self,
        caller: &Caller,
        address: &SessionRef,
        channel: &ChannelAddress,
    ) -> Result<Bounds> {
        match self.row_optional(caller, address).await? {
            Some(session) => {
                let key = ChannelKey { session: session.id.clone(), address: channel.clone() };
                self.channels.bounds(&key).await
            }
            None => Ok(Bounds::default()),
        }
    }

    /// Every record from `start` to the tail as it is now, in batches that are read as they are asked for.
    ///
    /// # Errors
    /// As [`Sessions::bounds`].
    #[instrument(skip_all, name = "read", fields(session.id = %address))]
    pub async fn drain(
        self: &Arc<Self>,
        caller: &Caller,
        address: &SessionRef,
        channel: &ChannelAddress,
        start: SeqNum,
    ) -> Result<BoxStream<'static, Result<Arc<RecordBatch>>>> {
        let Some(session) = self.row_optional(caller, address).await? else {
            return Ok(stream::empty().boxed());
        };
        let key = ChannelKey { session: session.id.clone(), address: channel.clone() };
        let end = self.channels.bounds(&key).await?.tail.seq_num;
        let drain = (self.clone(), caller.clone(), key, start);
        let batches = stream::try_unfold(drain, move |(this, caller, key, next)| async move {
            if next >= end {
                return Ok(None);
            }
            caller.require_current(this.clock.now())?;
            let batch = this.channels.read(&key, ReadStart::SeqNum(next), ReadLimit::BATCH).await?;
            Ok(batch.next_seq_num().map(|next| (batch, (this, caller, key, next))))
        });
        Ok(batches.boxed())
    }

    /// One bounded read.
    ///
    /// # Errors
    /// As [`Sessions::bounds`].
    #[instrument(skip_all, name = "read", fields(session.id = %address))]
    pub async fn read(
        &self,
        caller: &Caller,
        address: &SessionRef,
        channel: &ChannelAddress,
        start: ReadStart,
        limit: ReadLimit,
    ) -> Result<Arc<RecordBatch>> {
        let Some(session) = self.row_optional(caller, address).await? else {
            return Ok(Arc::new(RecordBatch::default()));
        };
        let key = ChannelKey { session: session.id.clone(), address: channel.clone() };
        self.channels.read(&key, start, limit).await
    }

    /// Stored records, then live ones. An external id that no session has yet is waited for.
    ///
    /// # Errors
    /// As [`Sessions::bounds`].
    #[instrument(skip_all, name = "follow", fields(session.id = %address))]
    pub async fn follow(
        self: &Arc<Self>,
        caller: &Caller,
        address: &SessionRef,
        channel: &ChannelAddress,
        options: FollowOptions,
    ) -> Result<Follow> {
        let session = self.row_optional(caller, address).await?;
        let settled = match &session {
            Some(session) if options.peek_settled && channel.direction == Direction::Out => {
                let key = ChannelKey { session: session.id.clone(), address: channel.clone() };
                self.is_settled(&key).await?
            }
            _ => false,
        };
        let stream = self.attach(caller, session, address, channel, options.start).await?;
        Ok(Follow::new(stream, caller, settled, self.clock.clone(), self.timers.clone()))
    }

    /// Writes the rows of seals that a crash left without one.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn recover(&self) -> Result<()> {
        for (session, closure) in self.channels.unsettled().await? {
            self.store.complete_close(&session, &closure).await?;
            self.channels.settle(&session).await?;
            tracing::info!(session.id = %session, "completed the close of a session that was sealed before a crash");
        }
        Ok(())
    }

    /// Answers if every backend can be used.
    ///
    /// # Errors
    /// The first backend's that cannot.
    pub async fn ready(&self) -> Result<()> {
        self.store.ping().await?;
        self.channels.ping().await
    }

    async fn attach(
        self: &Arc<Self>,
        caller: &Caller,
        session: Option<SharedSession>,
        address: &SessionRef,
        channel: &ChannelAddress,
        start: ReadStart,
    ) -> Result<BoxStream<'static, Result<Item>>> {
        if let Some(session) = session {
            return self.attached(session, channel.clone(), start).await;
        }
        let SessionRef::External(external) = address.clone() else {
            return Err(Error::NotFound("session"));
        };
        let (this, environment, channel) = (self.clone(), caller.environment.clone(), channel.clone());
        // Whatever is written to a session that did not exist yet comes after "now".
        let start = if start == ReadStart::TailOffset(0) { ReadStart::SeqNum(0) } else { start };
        let waiting = async move {
            let session = this.rows.wait_for(&environment, &external).await?;
            this.attached(session, channel, start).await
        };
        Ok(stream::once(waiting).try_flatten().boxed())
    }

    async fn attached(
        &self,
        session: SharedSession,
        channel: ChannelAddress,
        start: ReadStart,
    ) -> Result<BoxStream<'static, Result<Item>>> {
        let key = ChannelKey { session: session.id.clone(), address: channel };
        let followed = self.channels.follow(&key, start).await?;
        let attached = stream::once(async move { Ok(Item::Attached(session)) });
        Ok(attached.chain(followed.map_ok(Item::Followed)).boxed())
    }

    /// Whether the last record that is not a command says that the turn is complete.
    async fn is_settled(&self, key: &ChannelKey) -> Result<bool> {
        const WINDOW: usize = 16;
        let mut end = self.channels.bounds(key).await?;
        while end.tail.seq_num > end.earliest {
            let start = end.tail.seq_num.saturating_sub(WINDOW as u64).max(end.earliest);
            let limit = ReadLimit::count(usize::try_from(end.tail.seq_num - start).unwrap_or(WINDOW));
            let batch = self.channels.read(key, ReadStart::SeqNum(start), limit).await?;
            if let Some(last) = batch.records.iter().rfind(|record| !record.is_command()) {
                return Ok(envelope::is_turn_complete(last));
            }
            end.tail.seq_num = start;
        }
        Ok(false)
    }

    /// The row at an address that the caller may act on.
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
        let verdict = caller.judge(action, address);
        if verdict == Verdict::Denied {
            return Err(UNAUTHORIZED);
        }
        let session = self.rows.find(&caller.environment, address).await?;
        if verdict == Verdict::ByOtherId {
            let session = session.as_ref().ok_or(UNAUTHORIZED)?;
            let external = session.external_id.as_ref().map_or(session.id.as_str(), |id| id.as_str());
            let ids = [Resource::Session(session.id.as_str()), Resource::Session(external)];
            caller.require_any(action, &ids)?;
        }
        Ok(session)
    }

    async fn apply(&self, session: &Session, patch: SessionPatch) -> Result<Session> {
        let now = self.clock.now();
        let updated = self.store.update_session(&session.environment, &session.id, patch, now).await?;
        let updated = updated.ok_or(Error::NotFound("session"))?;
        self.rows.changed(&[session, &updated]);
        Ok(updated)
    }

    /// Brings a seal of the log to the row.
    async fn complete_close(&self, session: &Session, closure: &Closure) -> Result<Session> {
        let closed = self.store.close_session(&session.environment, &session.id, closure).await?;
        let closed = closed.ok_or(Error::NotFound("session"))?;
        self.rows.changed(&[session, &closed]);
        self.channels.settle(&session.id).await?;
        Ok(closed)
    }
}

/// What the create of a closed or expired session answers.
fn reuse_conflict(state: &str) -> Error {
    Error::Conflict(format!("Session is {state}; use a different externalId to create a new session"))
}

fn may_list(caller: &Caller, filter: Filter) -> Result<Filter> {
    let collections = [Resource::Sessions, Resource::Tasks];
    let tasks = &filter.task_identifiers;
    let by_task =
        !tasks.is_empty() && tasks.iter().all(|task| caller.may(Action::Read, Resource::Task(task)));
    if !by_task {
        caller.require_any(Action::Read, &collections)?;
    }
    filter.checked()
}
