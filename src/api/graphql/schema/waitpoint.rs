//! Waitpoints: who waits for input, and how a wait is answered.

use std::sync::Arc;

use async_graphql::{Context, Enum, ID, InputObject, Object, Result, SimpleObject};
use futures_util::stream::{self, Stream};
use serde_json::value::to_raw_value;

use super::global_id::GlobalId;
use super::input::{SessionBy, TimeFilter};
use super::page::{PageArgs, PageInfo, Way};
use super::record::{ChannelIo, RecordNode};
use super::scalar::{Cursor, DateTime, Json, UInt64};
use super::session::SessionNode;
use super::user_error::{UserError, outcome};
use super::{Stopping, app, caller, load_session};
use crate::api::period::periods;
use crate::domain::run::named_run;
use crate::domain::waitpoint::{WaitpointAnchor, WaitpointCursor, WaitpointPageRequest};
use crate::domain::{
    Awaited, Code, Error, NewWaitpoint, Outcome, Timestamp, WaitStatus, Waitpoint, WaitpointFilter,
    WaitpointId,
};

/// How a wait stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
pub enum WaitpointStatus {
    /// Nothing has come yet.
    Waiting,
    /// A record has come.
    Completed,
    /// It has ended without a record, for whichever reason.
    TimedOut,
}

impl From<WaitStatus> for WaitpointStatus {
    fn from(status: WaitStatus) -> Self {
        match status {
            WaitStatus::Waiting => Self::Waiting,
            WaitStatus::Completed => Self::Completed,
            WaitStatus::TimedOut => Self::TimedOut,
        }
    }
}

impl From<WaitpointStatus> for WaitStatus {
    fn from(status: WaitpointStatus) -> Self {
        match status {
            WaitpointStatus::Waiting => Self::Waiting,
            WaitpointStatus::Completed => Self::Completed,
            WaitpointStatus::TimedOut => Self::TimedOut,
        }
    }
}

/// What has ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
pub enum WaitpointOutcome {
    /// The first data record after `lastSeqNum`.
    Record,
    /// `timeoutAt` was reached.
    Timeout,
    /// The session was closed.
    Closed,
    /// The session expired.
    Expired,
}

/// A run that waits for the next data record of a session's main channel.
#[derive(Clone, Debug)]
pub struct WaitpointNode(pub(super) Waitpoint);

/// A run that waits for the next data record of a session's main channel.
#[Object(name = "Waitpoint")]
impl WaitpointNode {
    /// Opaque; for `node` and `nodes`.
    pub async fn id(&self) -> ID {
        GlobalId::Waitpoint(self.0.id.clone()).encode()
    }

    /// `waitpoint_...`: the id that REST routes use.
    async fn waitpoint_id(&self) -> &str {
        self.0.id.as_str()
    }

    /// How it stands. Once it is not `WAITING`, nothing of it changes any more.
    async fn status(&self) -> WaitpointStatus {
        self.0.status().into()
    }

    /// What has ended it; null while it waits.
    async fn outcome(&self) -> Option<WaitpointOutcome> {
        Some(match self.0.completion.as_ref()?.outcome {
            Outcome::Record(_) => WaitpointOutcome::Record,
            Outcome::TimedOut => WaitpointOutcome::Timeout,
            Outcome::Closed => WaitpointOutcome::Closed,
            Outcome::Expired => WaitpointOutcome::Expired,
        })
    }

    /// The session whose channel it waits on; null for who may not read it.
    async fn session(&self, ctx: &Context<'_>) -> Option<Result<SessionNode>> {
        let row = load_session(ctx, self.0.session.clone()).await.transpose()?;
        Some(row.map(SessionNode))
    }

    /// Which of the session's main channels.
    async fn io(&self) -> ChannelIo {
        self.0.direction.into()
    }

    /// `run_...`: who waits.
    async fn run_id(&self) -> &str {
        self.0.run.as_str()
    }

    /// The last record that the waiter had seen; null if every record counts.
    async fn last_seq_num(&self) -> Option<UInt64> {
        self.0.after.map(UInt64)
    }

    /// The record that has ended it; null if none has, or once it is trimmed.
    async fn record(&self, ctx: &Context<'_>) -> Option<Result<RecordNode>> {
        let record = app(ctx).sessions.completing_record(&self.0).await.transpose()?;
        let node = |record| RecordNode { channel: Arc::new(self.0.channel()), record };
        Some(record.map(node).map_err(Into::into))
    }

    /// Labels to filter by: at most 10, of 1 to 128 characters.
    async fn tags(&self) -> &[String] {
        &self.0.tags
    }

    /// The key it was created with.
    async fn idempotency_key(&self) -> Option<&str> {
        self.0.idempotency_key.as_deref()
    }

    /// Until when the key finds it.
    async fn idempotency_key_expires_at(&self) -> Option<DateTime> {
        self.0.key_expires_at.filter(|_| self.0.idempotency_key.is_some()).map(DateTime)
    }

    /// When it was created.
    async fn created_at(&self) -> DateTime {
        DateTime(self.0.created_at)
    }

    /// When it ends without a record; null if it has no end of its own.
    async fn timeout_at(&self) -> Option<DateTime> {
        self.0.timeout_at.map(DateTime)
    }

    /// When it ended.
    async fn completed_at(&self) -> Option<DateTime> {
        self.0.completion.as_ref().map(|completion| DateTime(completion.at))
    }
}

/// A page of waitpoints, newest first.
#[derive(Clone, Debug, SimpleObject)]
pub struct WaitpointConnection {
    /// The waitpoints with their cursors.
    edges: Vec<WaitpointEdge>,
    /// The waitpoints.
    nodes: Vec<WaitpointNode>,
    /// Where the neighbouring pages are.
    page_info: PageInfo,
}

/// A waitpoint of a page.
#[derive(Clone, Debug, SimpleObject)]
pub struct WaitpointEdge {
    /// For `after` and `before`; opaque.
    cursor: String,
    /// The waitpoint.
    node: WaitpointNode,
}

/// Which waitpoints: every given field must match.
#[derive(Clone, Debug, Default, InputObject)]
#[graphql(name = "WaitpointFilter")]
pub struct WaitpointFilterInput {
    /// The status is one of these; `WAITING` is what is to be answered.
    statuses: Option<Vec<WaitpointStatus>>,
    /// Of this session. Who may read one session only has to name it.
    session: Option<SessionBy>,
    /// Made by this run.
    run_id: Option<String>,
    /// At least one of these tags is set; at most 100.
    tags: Option<Vec<String>>,
    /// Created with this key, which still counts.
    idempotency_key: Option<String>,
    /// By time of creation.
    created_at: Option<TimeFilter>,
}

/// A wait. Only for secret keys.
#[derive(Debug, InputObject)]
pub struct CreateWaitpointInput {
    /// The session whose channel to wait on.
    by: SessionBy,
    /// Which of its main channels.
    io: ChannelIo,
    /// Who waits, as recorded on a session; this session's current run without it.
    run_id: Option<String>,
    /// The last record that the waiter has seen; without it every record that remains counts.
    after: Option<Cursor>,
    /// For how long at most, such as `30s` or `1d12h`; without it and `timeoutAt` there is no end.
    timeout: Option<String>,
    /// Until when at most.
    timeout_at: Option<DateTime>,
    /// Labels to filter by: at most 10, of 1 to 128 characters.
    tags: Option<Vec<String>>,
    /// Finds the wait that was made before with this key on the same channel; 1 to 2048 characters.
    idempotency_key: Option<String>,
    /// Until when the key counts; for ever without it.
    idempotency_key_expires_at: Option<DateTime>,
    /// Given back in the payload.
    client_mutation_id: Option<String>,
}

/// What `createWaitpoint` answers.
#[derive(Debug, Default, SimpleObject)]
pub struct CreateWaitpointPayload {
    /// The wait, which may be over already.
    waitpoint: Option<WaitpointNode>,
    /// False if the idempotency key has found it.
    created: bool,
    /// What has to be mended; empty on success.
    user_errors: Vec<UserError>,
    /// As given.
    client_mutation_id: Option<String>,
}

/// An answer.
#[derive(Debug, InputObject)]
pub struct CompleteWaitpointInput {
    /// Which waitpoint.
    id: ID,
    /// What the waiter gets: any JSON. It is stored as JSON text, as the SDK's `in.send` does.
    data: Option<Json>,
    /// Given back in the payload.
    client_mutation_id: Option<String>,
}

/// What `completeWaitpoint` answers. The record is durable.
#[derive(Debug, Default, SimpleObject)]
pub struct CompleteWaitpointPayload {
    /// The waitpoint, completed by this answer.
    waitpoint: Option<WaitpointNode>,
    /// What has to be mended; empty on success. `CONFLICT` if something else has ended the wait.
    user_errors: Vec<UserError>,
    /// As given.
    client_mutation_id: Option<String>,
}

/// The waitpoint that an argument names: by the id of its node, or by `waitpoint_...`.
fn named(id: &ID) -> Result<WaitpointId, Error> {
    match GlobalId::decode(id) {
        Some(GlobalId::Waitpoint(id)) => Ok(id),
        _ => WaitpointId::parse(id).map_err(|_| Error::invalid("id", "is not the id of a waitpoint")),
    }
}

/// One waitpoint; `None` when there is none.
pub(super) async fn find(ctx: &Context<'_>, id: &ID) -> Result<Option<WaitpointNode>> {
    match app(ctx).sessions.waitpoint(caller(ctx)?, &named(id)?).await {
        Ok(waitpoint) => Ok(Some(WaitpointNode(waitpoint))),
        Err(Error::NotFound(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// As [`find`], for `node`: what the caller may not see is not there.
pub(super) async fn load(ctx: &Context<'_>, id: &WaitpointId) -> Result<Option<WaitpointNode>> {
    match app(ctx).sessions.waitpoint(caller(ctx)?, id).await {
        Ok(waitpoint) => Ok(Some(WaitpointNode(waitpoint))),
        Err(error) if matches!(error.code(), Code::NotFound | Code::Unauthorized) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A page of waitpoints.
pub(super) async fn list(
    ctx: &Context<'_>,
    filter: Option<WaitpointFilterInput>,
    forward: (Option<i32>, Option<String>),
    backward: (Option<i32>, Option<String>),
) -> Result<WaitpointConnection> {
    let filter = filter.unwrap_or_default();
    let session = filter.session.as_ref().map(SessionBy::address).transpose()?;
    let (created_from, created_to) = filter.created_at.unwrap_or_default().span(app(ctx).clock.now())?;
    let wanted = WaitpointFilter {
        statuses: filter.statuses.unwrap_or_default().into_iter().map(Into::into).collect(),
        tags_any: filter.tags.unwrap_or_default(),
        session: None,
        run: filter.run_id.as_deref().map(named_run),
        idempotency_key: filter.idempotency_key,
        created_from,
        created_to,
    };
    let PageArgs { size, way } = PageArgs::new(forward, backward, WaitpointCursor::decode)?;
    let anchor = match way {
        Way::Forward(cursor) => WaitpointAnchor::After(cursor),
        Way::Backward(cursor) => WaitpointAnchor::Before(cursor),
    };
    let request = WaitpointPageRequest::new(size, anchor)?;
    let page = app(ctx).sessions.waitpoints(caller(ctx)?, session.as_ref(), wanted, &request).await?;
    let cursor = |waitpoint: &Waitpoint| WaitpointCursor::of(waitpoint).encode();
    let edge = |waitpoint: &Waitpoint| WaitpointEdge {
        cursor: cursor(waitpoint),
        node: WaitpointNode(waitpoint.clone()),
    };
    Ok(WaitpointConnection {
        edges: page.waitpoints.iter().map(edge).collect(),
        page_info: PageInfo {
            has_next_page: page.has_next,
            has_previous_page: page.has_previous,
            start_cursor: page.waitpoints.first().map(cursor),
            end_cursor: page.waitpoints.last().map(cursor),
        },
        nodes: page.waitpoints.into_iter().map(WaitpointNode).collect(),
    })
}

/// Registers a wait.
pub(super) async fn create(ctx: &Context<'_>, input: CreateWaitpointInput) -> Result<CreateWaitpointPayload> {
    let client_mutation_id = input.client_mutation_id.clone();
    let create = async {
        let new = input.read(app(ctx).clock.now())?;
        app(ctx).sessions.create_waitpoint(caller(ctx)?, new).await
    };
    Ok(match outcome(create.await)? {
        Ok(registered) => CreateWaitpointPayload {
            waitpoint: Some(WaitpointNode(registered.waitpoint)),
            created: registered.created,
            user_errors: Vec::new(),
            client_mutation_id,
        },
        Err(user_errors) => CreateWaitpointPayload { user_errors, client_mutation_id, ..Default::default() },
    })
}

/// Answers a wait.
pub(super) async fn complete(
    ctx: &Context<'_>,
    input: CompleteWaitpointInput,
) -> Result<CompleteWaitpointPayload> {
    let CompleteWaitpointInput { id, data, client_mutation_id } = input;
    let complete = async {
        let data = data.map_or(async_graphql::Value::Null, |Json(value)| value);
        let data = to_raw_value(&data).map_err(Error::internal)?;
        app(ctx).sessions.complete_waitpoint(caller(ctx)?, &named(&id)?, &data).await
    };
    Ok(match outcome(complete.await)? {
        Ok(waitpoint) => CompleteWaitpointPayload {
            waitpoint: Some(WaitpointNode(waitpoint)),
            user_errors: Vec::new(),
            client_mutation_id,
        },
        Err(user_errors) => CompleteWaitpointPayload { waitpoint: None, user_errors, client_mutation_id },
    })
}

/// The waitpoint, once it is complete.
pub(super) async fn completed(
    ctx: &Context<'_>,
    id: &ID,
) -> Result<impl Stream<Item = Result<WaitpointNode>> + use<>> {
    let (app, caller, id) = (app(ctx).clone(), caller(ctx)?.clone(), named(id)?);
    // Refused here, an operation fails instead of a stream.
    app.sessions.waitpoint(&caller, &id).await?;
    Ok(stream::once(async move {
        let until = Timestamp::from_millis(i64::MAX);
        match app.sessions.await_waitpoint(&caller, &id, until).await? {
            Awaited::Completed(waitpoint) => Ok(WaitpointNode(waitpoint)),
            Awaited::Waiting(_) | Awaited::Stopping(_) => Err(Stopping.into()),
        }
    }))
}

impl CreateWaitpointInput {
    fn read(self, now: Timestamp) -> Result<NewWaitpoint, Error> {
        let timeout_at = match (self.timeout, self.timeout_at) {
            (None, at) => at.map(|at| at.0),
            (Some(text), None) => match periods(&text) {
                Some(period) => Some(now.plus(period)),
                None => return Err(Error::invalid("timeout", "must be a period such as 30s or 1d12h")),
            },
            (Some(_), Some(_)) => {
                return Err(Error::invalid("timeoutAt", "cannot be combined with timeout"));
            }
        };
        Ok(NewWaitpoint {
            run: self.run_id.as_deref().map(named_run),
            session: self.by.address()?,
            direction: self.io.into(),
            after: self.after.map(|after| after.0),
            timeout_at,
            tags: self.tags.unwrap_or_default(),
            idempotency_key: self.idempotency_key,
            key_expires_at: self.idempotency_key_expires_at.map(|at| at.0),
        })
    }
}
