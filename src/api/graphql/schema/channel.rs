//! Channels and what a subscription to one yields.

use std::sync::Arc;

use async_graphql::{Context, ID, Object, Result, SimpleObject};

use super::global_id::GlobalId;
use super::page::{self, PageArgs, PageInfo, Way};
use super::record::{self, ChannelIo, PositionNode, RecordConnection, RecordNode};
use super::scalar::{Cursor, DateTime, UInt64};
use super::session::{SessionNode, SessionStatus};
use super::{app, caller, load_session};
use crate::domain::record::{Bounds, RecordAnchor, RecordPageRequest};
use crate::domain::session::SharedSession;
use crate::domain::{ChannelAddress, ChannelKey, Error, SessionRef};

/// One append-only log of a session.
#[derive(Clone, Debug)]
pub struct ChannelNode {
    pub(in crate::api::graphql) session: SharedSession,
    pub(in crate::api::graphql) key: Arc<ChannelKey>,
}

impl ChannelNode {
    pub(super) fn new(session: SharedSession, address: ChannelAddress) -> Self {
        let key = Arc::new(ChannelKey { session: session.id.clone(), address });
        Self { session, key }
    }

    async fn bounds(&self, ctx: &Context<'_>) -> Result<Bounds> {
        self.load(ctx).await?;
        Ok(app(ctx).sessions.bounds(caller(ctx)?, &self.address(), &self.key.address).await?)
    }

    /// The row as it is now. Asked for by all channels of an answer at once, it is in memory when they come to it.
    async fn load(&self, ctx: &Context<'_>) -> Result<Option<SharedSession>> {
        load_session(ctx, self.key.session.clone()).await
    }

    fn address(&self) -> SessionRef {
        SessionRef::Id(self.key.session.clone())
    }
}

/// One append-only log of a session.
#[Object(name = "Channel")]
impl ChannelNode {
    /// Opaque; for `node` and `nodes`.
    pub async fn id(&self) -> ID {
        GlobalId::Channel(ChannelKey::clone(&self.key)).encode()
    }

    /// Who writes it.
    async fn io(&self) -> ChannelIo {
        self.key.address.direction.into()
    }

    /// Name of a side channel; null for the session's main channel.
    async fn name(&self) -> Option<&str> {
        self.key.address.name.as_ref().map(|name| name.as_str())
    }

    /// The session.
    async fn session(&self) -> SessionNode {
        SessionNode(self.session.clone())
    }

    /// The place that the next record will get.
    async fn tail(&self, ctx: &Context<'_>) -> Result<PositionNode> {
        Ok(self.bounds(ctx).await?.tail.into())
    }

    /// Sequence number of the first record that can still be read; equals the tail's when there is none.
    async fn earliest(&self, ctx: &Context<'_>) -> Result<UInt64> {
        Ok(UInt64(self.bounds(ctx).await?.earliest))
    }

    /// True once nothing can be appended any more, because the session is closed or expired.
    async fn sealed(&self, ctx: &Context<'_>) -> Result<bool> {
        // The row that this request began with may be older than a close.
        let session = self.load(ctx).await?;
        let session = session.as_ref().unwrap_or(&self.session);
        Ok(session.require_active(app(ctx).clock.now()).is_err())
    }

    /// Stored records, oldest first; commands of the log (trim, fence) are left out. A page holds 1 to 100 records,
    /// 50 by default, and is cut short at about 4 MiB. Cursors are record cursors; the code is `CURSOR_AHEAD` if the
    /// channel has no record at `after`.
    #[graphql(complexity = "page::cost(first, last, child_complexity)")]
    async fn records(
        &self,
        ctx: &Context<'_>,
        #[graphql(desc = "The next so many, 1 to 100.")] first: Option<i32>,
        #[graphql(desc = "Begin after this cursor; without it at the first record that remains.")]
        after: Option<String>,
        #[graphql(desc = "The last so many, 1 to 100.")] last: Option<i32>,
        #[graphql(desc = "End before this cursor; without it at the tail.")] before: Option<String>,
    ) -> Result<RecordConnection> {
        let read = |field: &'static str, text: &str| match text.parse() {
            Ok(Cursor(seq_num)) => Ok(seq_num),
            Err(()) => Err(Error::invalid(field, "is not a cursor of a record")),
        };
        let PageArgs { size, way } = PageArgs::new((first, after), (last, before), read)?;
        let anchor = match way {
            Way::Forward(cursor) => RecordAnchor::After(cursor),
            Way::Backward(cursor) => RecordAnchor::Before(cursor),
        };
        let request = RecordPageRequest::new(size, anchor)?;
        self.load(ctx).await?;
        let page = app(ctx).sessions.page(caller(ctx)?, &self.address(), &self.key.address, request).await?;
        let node = |record| RecordNode { channel: self.key.clone(), record };
        let nodes: Vec<_> = page.records.into_iter().map(node).collect();
        let page_info = PageInfo {
            has_next_page: page.has_next,
            has_previous_page: page.has_previous,
            start_cursor: nodes.first().map(record::cursor),
            end_cursor: nodes.last().map(record::cursor),
        };
        Ok(RecordConnection { nodes_: nodes, page_info })
    }
}

/// What a subscription to a channel yields.
#[derive(Clone, Debug, SimpleObject)]
pub struct ChannelEvent {
    /// The next records, in order and without gaps; commands of the log (trim, fence) are left out. May be empty.
    pub records: Vec<RecordNode>,
    /// Subscribe again with `after` set to this to go on exactly here. Null while the channel has no record.
    pub end_cursor: Option<Cursor>,
    /// True when everything that was stored, as of this event, has been given out.
    pub caught_up: bool,
    /// The channel's tail as far as this event knows it.
    pub tail: PositionNode,
    /// Set in the last event, when the session is closed or expired and every record has been given out.
    pub closed: Option<ChannelClosed>,
}

/// Why a channel has ended.
#[derive(Clone, Debug, SimpleObject)]
pub struct ChannelClosed {
    /// When the session was closed, or expired.
    pub at: DateTime,
    /// Why it was closed, in the words of whoever closed it.
    pub reason: Option<String>,
    /// `CLOSED` or `EXPIRED`.
    pub status: SessionStatus,
}
