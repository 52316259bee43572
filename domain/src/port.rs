//! The ports. Each is a contract; `tests/it/contract/` holds one suite per port that every adapter passes.

use std::sync::Arc;

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;

use super::channel::ChannelKey;
use super::clock::Timestamp;
use super::close::Close;
use super::error::Result;
use super::id::{EnvironmentId, KeyId, RunId, SessionId, SessionRef, WaitpointId};
use super::list::{Filter, Page, PageRequest, TagQuery};
use super::record::{AppendAck, AppendInput, Bounds, Position, ReadLimit, ReadStart, RecordBatch};
use super::run::SessionRun;
use super::send_budget::{ConnectionBudget, Delivery};
use super::session::{Closure, Session, SessionPatch};
use super::tenant::{Environment, StoredKey};
use super::waitpoint::{
    Completion, Waitpoint, WaitpointCursor, WaitpointFilter, WaitpointPage, WaitpointPageRequest,
};

/// Sessions, environments and keys. The source of truth for everything but records.
///
/// Every method that touches sessions takes the environment first and cannot see past it. Each method is one
/// atomic step. Absence is `None`; a unique clash is [`Error::Conflict`](super::Error::Conflict).
/// Once a write has returned it survives kill -9 and power loss.
#[async_trait]
pub trait MetadataStore: Send + Sync {
    /// Inserts `session`, or finds the one that has the same external id (or, for a session without one, was
    /// created under the same `request_key`) and returns that instead, unchanged.
    ///
    /// Of any number of concurrent calls with one external id exactly one inserts.
    async fn create_session(&self, session: Session, request_key: Option<&str>) -> Result<Inserted>;

    /// The session at an address.
    async fn find_session(
        &self,
        environment: &EnvironmentId,
        address: &SessionRef,
    ) -> Result<Option<Session>>;

    /// The sessions with these ids, in no order; ids without one are left out. At most a few hundred ids.
    async fn find_sessions(&self, environment: &EnvironmentId, ids: &[SessionId]) -> Result<Vec<Session>>;

    /// Applies a patch and sets `updated_at` to `now`, or to a millisecond after what it was if that is later, so
    /// that it tells the versions of a row apart. `None` when there is no such session.
    ///
    /// # Errors
    /// [`Error::Conflict`](super::Error::Conflict) if another session has the new external id.
    async fn update_session(
        &self,
        environment: &EnvironmentId,
        id: &SessionId,
        patch: SessionPatch,
        now: Timestamp,
    ) -> Result<Option<Session>>;

    /// Writes the closure unless the row has one already, and returns the row as it then stands.
    async fn close_session(
        &self,
        environment: &EnvironmentId,
        id: &SessionId,
        closure: &Closure,
    ) -> Result<Option<Session>>;

    /// Hands a session over to `run`, whose [`SessionRun::previous`] must be the session's current run, and records it.
    /// With a `request_key` that has handed this session over before, that run is answered and nothing is changed.
    ///
    /// Of any number of concurrent calls that name one previous run exactly one hands over, and never on a closed
    /// session. `updated_at` moves as in [`MetadataStore::update_session`]. `None` when there is no such session.
    async fn hand_over(&self, run: SessionRun, request_key: Option<&str>) -> Result<Option<HandedOver>>;

    /// A run of whichever session of the environment.
    async fn find_run(&self, environment: &EnvironmentId, id: &RunId) -> Result<Option<SessionRun>>;

    /// The newest runs of a session, newest first. A create records the first one.
    async fn runs(
        &self,
        environment: &EnvironmentId,
        session: &SessionId,
        limit: usize,
    ) -> Result<Vec<SessionRun>>;

    /// Sessions of every environment by ascending id, from behind `after`: for the server itself, which copies them.
    async fn scan_sessions(&self, after: Option<&SessionId>, limit: usize) -> Result<Vec<Session>>;

    /// As [`MetadataStore::close_session`], for a seal that was found in the log after a crash. Without
    /// an environment: the seal proves that its writer was allowed to close.
    async fn complete_close(&self, id: &SessionId, closure: &Closure) -> Result<()>;

    /// Adds an environment.
    ///
    /// # Errors
    /// [`Error::Conflict`](super::Error::Conflict) if the project has one with this slug.
    async fn create_environment(&self, environment: Environment) -> Result<()>;

    /// Every environment, oldest first.
    async fn environments(&self) -> Result<Vec<Environment>>;

    /// Adds a key and advances the key revision.
    ///
    /// # Errors
    /// [`Error::Conflict`](super::Error::Conflict) if the same secret is stored already.
    async fn insert_key(&self, key: StoredKey) -> Result<()>;

    /// Every key of an environment, newest first, ended ones too.
    async fn keys(&self, environment: &EnvironmentId) -> Result<Vec<StoredKey>>;

    /// The key with this lookup hash, of whichever environment.
    async fn find_key(&self, lookup: &[u8]) -> Result<Option<StoredKey>>;

    /// Notes that a key's secret was given, however the key was made. No revision: it opens what it did.
    async fn mark_key_given(&self, environment: &EnvironmentId, id: &KeyId) -> Result<()>;

    /// Ends a key at `at` unless it ends earlier already, and advances the key revision. `None` when the
    /// environment has no such key.
    async fn end_key(
        &self,
        environment: &EnvironmentId,
        id: &KeyId,
        at: Timestamp,
    ) -> Result<Option<StoredKey>>;

    /// Grows with every change of any key, by whichever process. Cheap: it is polled.
    async fn key_revision(&self) -> Result<i64>;

    /// The id of the log that belongs to this store: `candidate` is remembered if there is none yet.
    async fn claim_log(&self, candidate: &str) -> Result<String>;

    /// Answers if the store can be used.
    async fn ping(&self) -> Result<()>;
}

/// What [`MetadataStore::create_session`] found or made.
#[derive(Clone, Debug)]
pub struct Inserted {
    /// The row.
    pub session: Session,
    /// False when the row was there already.
    pub created: bool,
}

/// What [`MetadataStore::hand_over`] did.
#[derive(Clone, Debug)]
pub struct HandedOver {
    /// The row as it then stands; its current run is the one that won.
    pub session: Session,
    /// True if the run asked for is, or by the same request has become, the session's.
    pub swapped: bool,
    /// The run that took over: the one asked for, the same request's, or whichever is current.
    pub run: RunId,
}

/// Waitpoints: who waits for input. Sees nothing of records; what ends a wait is read from the log.
///
/// Methods for callers take the environment first and cannot see past it. Each method is one atomic step, and once a
/// write has returned it survives kill -9 and power loss.
#[async_trait]
pub trait Waitpoints: Send + Sync {
    /// Inserts `waitpoint`, or finds the one that was made for the same channel with the same idempotency key, if that
    /// key counts at `now`. A key that no longer counts is taken from the waitpoint that had it.
    ///
    /// Of any number of concurrent calls with one key exactly one inserts.
    async fn create_waitpoint(&self, waitpoint: Waitpoint, now: Timestamp) -> Result<Registered>;

    /// The waitpoint with this id.
    async fn find_waitpoint(
        &self,
        environment: &EnvironmentId,
        id: &WaitpointId,
    ) -> Result<Option<Waitpoint>>;

    /// Writes the completion unless the row has one already, and returns the row as it then stands.
    async fn complete_waitpoint(
        &self,
        environment: &EnvironmentId,
        id: &WaitpointId,
        completion: &Completion,
    ) -> Result<Option<Waitpoint>>;

    /// A page, newest first. No row is skipped or repeated by following cursors, whatever is inserted meanwhile.
    async fn list_waitpoints(
        &self,
        environment: &EnvironmentId,
        filter: &WaitpointFilter,
        page: &WaitpointPageRequest,
    ) -> Result<WaitpointPage>;

    /// Waitpoints that are not complete, of every environment, oldest first, from after `after`: for the server itself,
    /// which has to end them.
    async fn open_waitpoints(&self, after: Option<&WaitpointCursor>, limit: usize) -> Result<Vec<Waitpoint>>;

    /// Which of these are complete, of whichever environment; at most a few hundred ids. For the server itself.
    async fn completed_among(&self, ids: &[WaitpointId]) -> Result<Vec<WaitpointId>>;
}

/// What [`Waitpoints::create_waitpoint`] found or made.
#[derive(Clone, Debug)]
pub struct Registered {
    /// The row.
    pub waitpoint: Waitpoint,
    /// False when the row was there already.
    pub created: bool,
}

/// Lists, counts and tags of sessions. May lag behind the [`MetadataStore`] where it is another system.
#[async_trait]
pub trait ListIndex: Send + Sync {
    /// A page in list order. `now` decides derived statuses.
    ///
    /// No row is skipped or repeated by following cursors, whatever is inserted meanwhile.
    async fn list(
        &self,
        environment: &EnvironmentId,
        filter: &Filter,
        page: &PageRequest,
        now: Timestamp,
    ) -> Result<Page>;

    /// How many sessions match, exactly.
    async fn count(&self, environment: &EnvironmentId, filter: &Filter, now: Timestamp) -> Result<u64>;

    /// Distinct tags in ascending byte order.
    async fn tags(&self, environment: &EnvironmentId, query: &TagQuery) -> Result<Vec<String>>;

    /// Answers if lists can be asked, with what is wrong with them all the same, in sentences that anyone may read.
    async fn ping(&self) -> Result<Vec<String>>;
}

/// The log: one append-only sequence of records per [`ChannelKey`]. A channel exists as soon as it is named.
///
/// *Durable before visible*: neither an ack, nor a read, nor a follower shows a record that would not survive
/// kill -9 and power loss.
#[async_trait]
pub trait ChannelStore: Send + Sync {
    /// Appends a batch as one unit: every record becomes visible, or none does.
    ///
    /// The batch takes its place in line before this returns: of two appends to one channel, made one after the other,
    /// the first is stored first. Dropping the future undoes nothing. Whoever appends bounds what it has in flight.
    ///
    /// Checks, in this order and in the same commit: its chain, the session's seal, part ids, the fencing token, the
    /// expected sequence number. If every part id of the batch is known with the same content the original
    /// places are answered and nothing is written; [`PartIds`](super::record::PartIds) says for how long one is known.
    /// Timestamps never run backwards within a channel. A trim or fence command takes a place like any record and acts
    /// with the commit that stores it.
    ///
    /// # Errors
    /// [`Error::Closed`](super::Error::Closed) once the session is sealed;
    /// [`Error::Conflict`](super::Error::Conflict) behind a refused append of its chain;
    /// [`Error::IdempotencyMismatch`](super::Error::IdempotencyMismatch) for a known part id with another
    /// content; [`Error::Conflict`](super::Error::Conflict) if only some part ids of the batch are known;
    /// [`Error::Fenced`](super::Error::Fenced); [`Error::SeqNumMismatch`](super::Error::SeqNumMismatch);
    /// [`Error::Unavailable`](super::Error::Unavailable) when the log cannot promise durability, in which case
    /// the records may or may not be there after a restart.
    fn append(&self, key: &ChannelKey, input: AppendInput) -> BoxFuture<'static, Result<AppendAck>>;

    /// Where a channel begins and ends.
    async fn bounds(&self, key: &ChannelKey) -> Result<Bounds>;

    /// Reads forward from `start`, at most `limit`; empty at the tail. `tail` of the batch is set when the
    /// read reached it.
    async fn read(&self, key: &ChannelKey, start: ReadStart, limit: ReadLimit) -> Result<Arc<RecordBatch>>;

    /// Stored records from `start`, then live ones, without a gap or a repeat, until the session is sealed or
    /// the stream is dropped. After an `Err` it ends. What it yields takes room in `budget`, without which nothing is
    /// read, so memory stays bounded however slowly it is polled.
    async fn follow(
        &self,
        key: &ChannelKey,
        start: ReadStart,
        budget: &ConnectionBudget,
    ) -> Result<BoxStream<'static, Result<Followed>>>;

    /// Seals every channel of a session, those not yet written included, and returns the closure that holds:
    /// the first one ever given. Nothing is appended afterwards; followers get the rest and then
    /// [`Followed::Sealed`].
    ///
    /// The last record of the main `.in` is then [`input_record`](super::close::input_record), and of the main `.out` [`output_record`](super::close::output_record),
    /// unless the agent has told of the close there: the last record but for commands says so already, or the one who
    /// closes says so. Each stands there once, whatever fence is set. Named channels get nothing.
    async fn seal(&self, session: &SessionId, close: Close) -> Result<Closure>;

    /// Says that the seal has reached the row, so that [`ChannelStore::unsettled`] stops naming it.
    async fn settle(&self, session: &SessionId) -> Result<()>;

    /// Seals that may not have reached their rows, because the process died in between.
    async fn unsettled(&self) -> Result<Vec<(SessionId, Closure)>>;

    /// Answers if appends can be taken.
    async fn ping(&self) -> Result<()>;

    /// What keeps appends from being taken, as far as it is known without asking. Never waits.
    fn condition(&self) -> Condition {
        Condition::Sound
    }
}

/// What keeps a store from taking writes, by who can change it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Nothing of its own.
    Sound,
    /// Its disk is full. Once there is room again it takes writes by itself.
    Full,
    /// A write has failed, and what the disk now holds is known only after a restart.
    Broken,
}

/// What a follower sees.
#[derive(Clone, Debug)]
pub enum Followed {
    /// Records, in order.
    Batch(Delivery),
    /// Every stored record has been given out; from here on it is live. Comes once, again after each lag.
    CaughtUp(Position),
    /// The follower has fallen behind what is live: there are stored records again, and they come next.
    Behind,
    /// The session is sealed and every record has been given out. Nothing comes after it.
    Sealed(Closure),
}
