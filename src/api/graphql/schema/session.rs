//! Sessions as the schema shows them.

use async_graphql::{ComplexObject, Context, Enum, ID, Object, Result, SimpleObject, Value};

use super::channel::ChannelNode;
use super::global_id::GlobalId;
use super::page::{self, PageInfo};
use super::record::ChannelIo;
use super::run::{self, RunNode};
use super::scalar::{DateTime, Json, UInt64};
use super::{app, caller, token};
use crate::domain::session::SharedSession;
use crate::domain::{ChannelAddress, ChannelName, Cursor, Direction, Filter, Status};

/// Whether a session still takes records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
pub enum SessionStatus {
    /// Neither closed nor expired.
    Active,
    /// Closed, for ever.
    Closed,
    /// `expiresAt` has passed.
    Expired,
}

impl From<Status> for SessionStatus {
    fn from(status: Status) -> Self {
        match status {
            Status::Active => Self::Active,
            Status::Closed => Self::Closed,
            Status::Expired => Self::Expired,
        }
    }
}

impl From<SessionStatus> for Status {
    fn from(status: SessionStatus) -> Self {
        match status {
            SessionStatus::Active => Self::Active,
            SessionStatus::Closed => Self::Closed,
            SessionStatus::Expired => Self::Expired,
        }
    }
}

/// A durable two-way conversation between an agent and its users.
#[derive(Clone, Debug)]
pub struct SessionNode(pub(super) SharedSession);

/// A durable two-way conversation between an agent and its users.
#[Object(name = "Session")]
impl SessionNode {
    /// Opaque; for `node` and `nodes`.
    pub async fn id(&self) -> ID {
        GlobalId::Session(self.0.id.clone()).encode()
    }

    /// `session_...`: the id that REST routes and scopes use. Never changes.
    async fn session_id(&self) -> &str {
        self.0.id.as_str()
    }

    /// The caller's own id, 1 to 256 characters, unique in the environment while it is set.
    async fn external_id(&self) -> Option<&str> {
        self.0.external_id.as_ref().map(|id| id.as_str())
    }

    /// What kind of session, in the creator's words; 1 to 64 characters.
    async fn r#type(&self) -> &str {
        &self.0.kind
    }

    /// Which task (agent) serves it; 1 to 128 characters.
    async fn task_identifier(&self) -> &str {
        &self.0.task_identifier
    }

    /// Labels to filter by: at most 10, of 1 to 128 characters.
    async fn tags(&self) -> &[String] {
        &self.0.tags
    }

    /// Free-form: an object, or null.
    async fn metadata(&self) -> Option<Json> {
        let object = self.0.metadata.clone()?;
        Value::from_json(object.into()).ok().map(Json)
    }

    /// Derived from `closedAt` and `expiresAt` at the moment of the answer.
    async fn status(&self, ctx: &Context<'_>) -> SessionStatus {
        self.0.status(app(ctx).clock.now()).into()
    }

    /// When it was created.
    async fn created_at(&self) -> DateTime {
        DateTime(self.0.created_at)
    }

    /// When it was last created, updated or closed; records do not count.
    async fn updated_at(&self) -> DateTime {
        DateTime(self.0.updated_at)
    }

    /// From when on it takes no more records; never changes once set.
    async fn expires_at(&self) -> Option<DateTime> {
        self.0.expires_at.map(DateTime)
    }

    /// When it was closed; never changes once set.
    async fn closed_at(&self) -> Option<DateTime> {
        self.0.closed.as_ref().map(|closure| DateTime(closure.at))
    }

    /// Why it was closed; at most 256 characters.
    async fn closed_reason(&self) -> Option<&str> {
        self.0.closed.as_ref()?.reason.as_deref()
    }

    /// `run_...`: recorded with the session. There is no run engine behind it.
    async fn current_run_id(&self) -> &str {
        self.0.current_run_id.as_str()
    }

    /// Its runs, newest first.
    #[graphql(complexity = "page::cost(first, None, child_complexity)")]
    async fn runs(
        &self,
        ctx: &Context<'_>,
        #[graphql(desc = "At most so many, 1 to 100.", default_with = "Some(run::RUNS)")] first: Option<i32>,
    ) -> Result<Vec<RunNode>> {
        run::newest(ctx, &self.0, first).await
    }

    /// What clients send to the agent.
    async fn r#in(&self) -> ChannelNode {
        ChannelNode::new(self.0.clone(), ChannelAddress::main(Direction::In))
    }

    /// What the agent sends to clients.
    async fn out(&self) -> ChannelNode {
        ChannelNode::new(self.0.clone(), ChannelAddress::main(Direction::Out))
    }

    /// A side channel. It exists as soon as it is named.
    async fn channel(
        &self,
        #[graphql(desc = "1 to 128 of A-Z, a-z, 0-9, `.`, `_` and `-`.")] name: String,
        #[graphql(desc = "Its direction.")] io: ChannelIo,
    ) -> Result<ChannelNode> {
        let name = Some(ChannelName::parse(&name)?);
        Ok(ChannelNode::new(self.0.clone(), ChannelAddress { direction: io.into(), name }))
    }
}

/// A page of sessions, newest first.
#[derive(Clone, Debug, SimpleObject)]
#[graphql(complex)]
pub struct SessionConnection {
    #[graphql(skip)]
    pub(super) sessions: Vec<SharedSession>,
    #[graphql(skip)]
    pub(super) filter: Filter,
    /// Where the neighbouring pages are.
    pub(super) page_info: PageInfo,
}

#[ComplexObject]
impl SessionConnection {
    /// The sessions with their cursors.
    async fn edges(&self) -> Vec<SessionEdge> {
        let edge = |session: &SharedSession| SessionEdge {
            cursor: Cursor::of(session).encode(),
            node: SessionNode(session.clone()),
        };
        self.sessions.iter().map(edge).collect()
    }

    /// The sessions.
    async fn nodes(&self) -> Vec<SessionNode> {
        self.sessions.iter().cloned().map(SessionNode).collect()
    }

    /// How many sessions match on all pages, exactly. Counted only when asked for.
    async fn total_count(&self, ctx: &Context<'_>) -> Result<UInt64> {
        Ok(UInt64(app(ctx).sessions.count(caller(ctx)?, self.filter.clone(), token(ctx)).await?))
    }
}

/// A session of a page.
#[derive(Clone, Debug, SimpleObject)]
pub struct SessionEdge {
    /// For `after` and `before`; opaque.
    cursor: String,
    /// The session.
    node: SessionNode,
}
