//! What can be read.

use async_graphql::{Context, Enum, ID, Object, Result, SimpleObject};

use super::Node;
use super::channel::ChannelNode;
use super::global_id::GlobalId;
use super::input::{SessionBy, SessionFilter};
use super::page::{self, PageArgs, PageInfo, Way};
use super::record::RecordNode;
use super::scalar::DateTime;
use super::session::{SessionConnection, SessionNode};
use super::waitpoint::{self, WaitpointConnection, WaitpointFilterInput, WaitpointNode};
use super::{app, caller, load_session, token};
use crate::domain::list::Anchor;
use crate::domain::record::ReadLimit;
use crate::domain::{
    CallerKind, ChannelKey, Cursor, Error, PageRequest, ReadStart, SeqNum, SessionRef, TagQuery,
};

/// Most ids that one `nodes` takes.
const NODES_MAX: usize = 100;
/// Tags that one `sessionTags` answers, unless asked otherwise.
const TAGS: i32 = 100;
/// Most tags that one `sessionTags` answers.
const TAGS_MAX: i32 = 1000;

/// What kind of credentials a caller has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
pub enum TokenKind {
    /// A secret key that may do everything in its environment.
    RootKey,
    /// A secret key with scopes.
    ScopedKey,
    /// A public token, such as a browser holds.
    PublicToken,
}

/// Who asks.
#[derive(Clone, Debug, SimpleObject)]
pub struct Viewer {
    /// The only environment that the caller can see.
    environment_id: ID,
    /// What was shown.
    token_kind: TokenKind,
    /// What the caller may do, as `action:type:id`; null for a root key, which may do everything.
    scopes: Option<Vec<String>>,
    /// When the credentials end, and every subscription with them.
    expires_at: Option<DateTime>,
}

/// The root of all queries.
pub struct Query;

/// The root of all queries.
#[Object]
impl Query {
    /// Anything by its opaque id; null when there is no such thing that the caller may see.
    async fn node(
        &self,
        ctx: &Context<'_>,
        #[graphql(desc = "As `Node.id` gave it.")] id: ID,
    ) -> Option<Result<Node>> {
        // Not the other way round, or a refusal would take its neighbours along.
        load(ctx, &id).await.transpose()
    }

    /// Several things by their ids, in the same order; null where there is none. At most 100.
    #[graphql(complexity = "child_complexity * ids.len().clamp(1, NODES_MAX) + 1")]
    async fn nodes(
        &self,
        ctx: &Context<'_>,
        #[graphql(desc = "As `Node.id` gave them; at most 100.")] ids: Vec<ID>,
    ) -> Result<Vec<Option<Node>>> {
        if ids.len() > NODES_MAX {
            return Err(Error::invalid("ids", format!("must hold at most {NODES_MAX} ids")).into());
        }
        futures_util::future::try_join_all(ids.iter().map(|id| load(ctx, id))).await
    }

    /// One session; null when there is none.
    async fn session(
        &self,
        ctx: &Context<'_>,
        #[graphql(desc = "By exactly one of its ids.")] by: SessionBy,
    ) -> Option<Result<SessionNode>> {
        find(ctx, &by).await.transpose()
    }

    /// Sessions, newest first. A page holds 1 to 100, 50 by default.
    #[graphql(complexity = "page::cost(first, last, child_complexity)")]
    async fn sessions(
        &self,
        ctx: &Context<'_>,
        #[graphql(desc = "Which ones; all without it.")] filter: Option<SessionFilter>,
        #[graphql(desc = "The next so many, 1 to 100.")] first: Option<i32>,
        #[graphql(desc = "Begin after this cursor: older ones.")] after: Option<String>,
        #[graphql(desc = "The last so many, 1 to 100.")] last: Option<i32>,
        #[graphql(desc = "End before this cursor: newer ones.")] before: Option<String>,
    ) -> Result<SessionConnection> {
        let filter = filter.unwrap_or_default().read(app(ctx).clock.now())?;
        let PageArgs { size, way } = PageArgs::new((first, after), (last, before), Cursor::decode)?;
        let anchor = match way {
            Way::Forward(cursor) => Anchor::After(cursor),
            Way::Backward(cursor) => Anchor::Before(cursor),
        };
        let request = PageRequest::new(size, anchor)?;
        let page = app(ctx).sessions.list(caller(ctx)?, filter.clone(), &request, token(ctx)).await?;
        let cursor = |session| Cursor::of(session).encode();
        let page_info = PageInfo {
            has_next_page: page.has_next,
            has_previous_page: page.has_previous,
            start_cursor: page.sessions.first().map(cursor),
            end_cursor: page.sessions.last().map(cursor),
        };
        let sessions = page.sessions.into_iter().map(Into::into).collect();
        Ok(SessionConnection { sessions, filter, page_info })
    }

    /// Tags in use, each once, in ascending order.
    async fn session_tags(
        &self,
        ctx: &Context<'_>,
        #[graphql(desc = "Only those that start with this.")] prefix: Option<String>,
        #[graphql(desc = "Only those that contain this, whatever the case of its ASCII letters.")]
        contains: Option<String>,
        #[graphql(desc = "At most so many, 1 to 1000.", default_with = "Some(TAGS)")] first: Option<i32>,
        #[graphql(desc = "Skip so many.", default_with = "Some(0)")] offset: Option<i32>,
    ) -> Result<Vec<String>> {
        let (first, offset) = (first.unwrap_or(TAGS), offset.unwrap_or_default());
        if !(1..=TAGS_MAX).contains(&first) {
            return Err(Error::invalid("first", format!("must be 1 to {TAGS_MAX}")).into());
        }
        let number =
            |field, value| usize::try_from(value).map_err(|_| Error::invalid(field, "must not be negative"));
        let (limit, offset) = (number("first", first)?, number("offset", offset)?);
        let query = TagQuery { prefix, contains, offset, limit };
        Ok(app(ctx).sessions.tags(caller(ctx)?, &query, token(ctx)).await?)
    }

    /// One waitpoint; null when there is none.
    async fn waitpoint(
        &self,
        ctx: &Context<'_>,
        #[graphql(desc = "The id of its node, or `waitpoint_...`.")] id: ID,
    ) -> Option<Result<WaitpointNode>> {
        waitpoint::find(ctx, &id).await.transpose()
    }

    /// Waitpoints, newest first: those that wait are what is to be answered. A page holds 1 to 100, 50 by default.
    #[graphql(complexity = "page::cost(first, last, child_complexity)")]
    async fn waitpoints(
        &self,
        ctx: &Context<'_>,
        #[graphql(desc = "Which ones; all without it.")] filter: Option<WaitpointFilterInput>,
        #[graphql(desc = "The next so many, 1 to 100.")] first: Option<i32>,
        #[graphql(desc = "Begin after this cursor: older ones.")] after: Option<String>,
        #[graphql(desc = "The last so many, 1 to 100.")] last: Option<i32>,
        #[graphql(desc = "End before this cursor: newer ones.")] before: Option<String>,
    ) -> Result<WaitpointConnection> {
        waitpoint::list(ctx, filter, (first, after), (last, before)).await
    }

    /// Who asks, and what they may do.
    async fn viewer(&self, ctx: &Context<'_>) -> Result<Viewer> {
        let caller = caller(ctx)?;
        Ok(Viewer {
            environment_id: caller.environment.as_str().into(),
            token_kind: match caller.kind {
                CallerKind::Root => TokenKind::RootKey,
                CallerKind::ScopedKey(_) => TokenKind::ScopedKey,
                CallerKind::Public(_) => TokenKind::PublicToken,
            },
            scopes: caller.scopes().map(|scopes| scopes.as_slice().to_vec()),
            expires_at: caller.expires_at.map(DateTime),
        })
    }
}

async fn find(ctx: &Context<'_>, by: &SessionBy) -> Result<Option<SessionNode>> {
    let found = app(ctx).sessions.find(caller(ctx)?, &by.address()?).await?;
    Ok(found.map(SessionNode))
}

async fn load(ctx: &Context<'_>, id: &ID) -> Result<Option<Node>> {
    Ok(match GlobalId::decode(id) {
        None => None,
        Some(GlobalId::Session(id)) => {
            load_session(ctx, id).await?.map(|row| Node::Session(SessionNode(row)))
        }
        Some(GlobalId::Channel(ChannelKey { session, address })) => {
            load_session(ctx, session).await?.map(|row| Node::Channel(ChannelNode::new(row, address)))
        }
        Some(GlobalId::Waitpoint(id)) => waitpoint::load(ctx, &id).await?.map(Node::Waitpoint),
        Some(GlobalId::Record(key, seq_num)) => record(ctx, key, seq_num).await?.map(Node::Record),
    })
}

async fn record(ctx: &Context<'_>, key: ChannelKey, seq_num: SeqNum) -> Result<Option<RecordNode>> {
    if load_session(ctx, key.session.clone()).await?.is_none() {
        return Ok(None);
    }
    let (session, start) = (SessionRef::Id(key.session.clone()), ReadStart::SeqNum(seq_num));
    let batch =
        app(ctx).sessions.read(caller(ctx)?, &session, &key.address, start, ReadLimit::count(1)).await?;
    let found =
        batch.records.first().filter(|record| record.position.seq_num == seq_num && !record.is_command());
    Ok(found.map(|record| RecordNode { channel: key.into(), record: record.clone() }))
}
