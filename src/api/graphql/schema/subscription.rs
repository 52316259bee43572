//! What can be followed.

use std::sync::Arc;

use async_graphql::{Context, ID, Result, Subscription as SubscriptionRoot};
use futures_util::stream::{self, BoxStream, Stream, StreamExt};

use super::channel::ChannelEvent;
use super::input::{FollowStart, SessionBy, SessionFilter, channel};
use super::record::ChannelIo;
use super::scalar::Cursor;
use super::session::SessionNode;
use super::waitpoint::{self, WaitpointNode};
use super::{Stopping, app, caller};
use crate::api::graphql::events::{ChannelEvents, ChannelFeed, Handover};
use crate::api::graphql::selection::Selection;
use crate::domain::record::BATCH_RECORDS_MAX;
use crate::domain::{Error, FollowOptions, ReadStart, Watch, WatchEvent};
use crate::telemetry::Door;

/// Most records in one event, unless asked otherwise.
const BATCH: i32 = 100;

/// The root of all subscriptions.
pub struct Subscription;

/// The root of all subscriptions.
#[SubscriptionRoot]
impl Subscription {
    /// The records of a channel: stored ones first, then live ones, in order, without gaps or repeats. An `externalId`
    /// that no session has yet is waited for. After an event with `closed` the subscription completes. Subscribe
    /// again with `after: endCursor` to go on where you were; if records after it have been trimmed meanwhile the
    /// code is `CURSOR_EXPIRED`, and `CURSOR_AHEAD` if the channel has no such record.
    #[expect(clippy::too_many_arguments, reason = "each is an argument of the schema")]
    async fn channel_records<'ctx>(
        &self,
        ctx: &Context<'ctx>,
        #[graphql(desc = "The session, by exactly one of its ids.")] by: SessionBy,
        #[graphql(desc = "Which direction.")] io: ChannelIo,
        #[graphql(desc = "Name of a side channel; the main channel without it.")] channel: Option<String>,
        #[graphql(desc = "Begin with the record after this one.")] after: Option<Cursor>,
        #[graphql(desc = "Where to begin without `after`.", default_with = "Some(FollowStart::Start)")]
        from: Option<FollowStart>,
        #[graphql(desc = "Most records in one event, 1 to 1000.", default_with = "Some(BATCH)")]
        batch: Option<i32>,
    ) -> Result<BoxStream<'static, Result<ChannelEvent>>> {
        let start = match (after, from) {
            (Some(Cursor(seq_num)), _) => ReadStart::SeqNum(seq_num.saturating_add(1)),
            (None, None | Some(FollowStart::Start)) => ReadStart::SeqNum(0),
            (None, Some(FollowStart::Latest)) => ReadStart::TailOffset(0),
        };
        let size = usize::try_from(batch.unwrap_or(BATCH))
            .ok()
            .filter(|size| (1..=BATCH_RECORDS_MAX).contains(size));
        let size =
            size.ok_or_else(|| Error::invalid("batch", format!("must be 1 to {BATCH_RECORDS_MAX}")))?;
        let address = self::channel(io, channel.as_deref())?;
        let app = app(ctx);
        // Only who names a place can be told that it is gone; whoever wants the start takes what is left.
        let options = FollowOptions { start, peek_settled: false, require_complete: after.is_some() };
        let follow = app
            .sessions
            .follow(caller(ctx)?, &by.address()?, &address, options, ctx.data_unchecked())
            .await?;
        begun(ctx);
        let follower = app.metrics.follower(*ctx.data_unchecked::<Door>());
        let events = ChannelEvents::new(follow, address, size, after, follower);
        if let (Some(handover), Some(selection)) =
            (ctx.data_opt::<Arc<Handover>>(), Selection::of(&ctx.field()))
        {
            handover.put(ChannelFeed::new(events, selection));
            return Ok(stream::empty().boxed());
        }
        Ok(stream::unfold(events, |mut events| async move {
            let event = match events.next().await? {
                Ok(Some(event)) => Ok(event.into_object()),
                Ok(None) => Err(Stopping.into()),
                Err(error) => Err(error.into()),
            };
            Some((event, events))
        })
        .boxed())
    }

    /// A session: as it is now, then after every change. Completes once it is closed or expired. An `externalId` that
    /// no session has yet is waited for. Changes that follow each other closely may come as one.
    async fn session_changed(
        &self,
        ctx: &Context<'_>,
        #[graphql(desc = "The session, by exactly one of its ids.")] by: SessionBy,
    ) -> Result<impl Stream<Item = Result<SessionNode>> + use<>> {
        let watch = app(ctx).sessions.watch(caller(ctx)?, &by.address()?).await?;
        begun(ctx);
        Ok(nodes(watch))
    }

    /// Every session that is created or changed from now on and matches, for live lists. Changes that follow each
    /// other closely may come as one.
    async fn sessions_changed(
        &self,
        ctx: &Context<'_>,
        #[graphql(desc = "Which ones, judged after the change; all without it.")] filter: Option<
            SessionFilter,
        >,
    ) -> Result<impl Stream<Item = Result<SessionNode>> + use<>> {
        begun(ctx);
        let filter = filter.unwrap_or_default().read(app(ctx).clock.now())?;
        Ok(nodes(app(ctx).sessions.watch_list(caller(ctx)?, filter)?))
    }

    /// A waitpoint, once it is complete, be it already; then it completes.
    async fn waitpoint_completed(
        &self,
        ctx: &Context<'_>,
        #[graphql(desc = "The id of its node, or `waitpoint_...`.")] id: ID,
    ) -> Result<impl Stream<Item = Result<WaitpointNode>> + use<>> {
        let completed = waitpoint::completed(ctx, &id).await;
        begun(ctx);
        completed
    }
}

/// Every subscription says so, or the client's next one waits for its first event.
fn begun(ctx: &Context<'_>) {
    if let Some(handover) = ctx.data_opt::<Arc<Handover>>() {
        handover.begun();
    }
}

fn nodes(watch: Watch) -> impl Stream<Item = Result<SessionNode>> + 'static {
    stream::unfold(watch, |mut watch| async move {
        let node = match watch.next().await {
            Ok(WatchEvent::Session(session)) => Ok(SessionNode(session)),
            Ok(WatchEvent::Ended) => return None,
            Ok(WatchEvent::Stopping) => Err(Stopping.into()),
            Err(error) => Err(error.into()),
        };
        Some((node, watch))
    })
}
