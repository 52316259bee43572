//! Followers of the embedded log.

use std::sync::Arc;

use futures_util::stream::BoxStream;

use super::Shared;
use crate::channel::follow::{Source, followed};
use crate::channel::live::Subscription;
use sessiond_domain::port::Followed;
use sessiond_domain::record::ReadLimit;
use sessiond_domain::{ChannelKey, ConnectionBudget, ReadStart, RecordBatch, Result, SeqNum};

/// See [`ChannelStore::follow`](sessiond_domain::ChannelStore::follow).
pub(super) async fn follow(
    shared: Arc<Shared>,
    key: ChannelKey,
    start: ReadStart,
    budget: ConnectionBudget,
) -> Result<BoxStream<'static, Result<Followed>>> {
    // The window comes first: what is committed after the look at the store below is in it.
    let subscription = shared.live.subscribe(&key);
    shared.observer.followers(1);
    let source = LogSource { shared: shared.clone(), subscription, key: key.clone() };
    let (next, bounds, closure) = shared
        .blocking(move |shared| {
            let view = shared.store.view();
            let (next, bounds) = view.resolve(&key, start)?;
            Ok((next, bounds, view.closure(&key.session)?))
        })
        .await?;
    source.subscription.window().raise(bounds.tail);
    if let Some(closure) = closure {
        source.subscription.window().seal(&closure);
    }
    Ok(followed(source, next, budget))
}

struct LogSource {
    shared: Arc<Shared>,
    subscription: Subscription,
    key: ChannelKey,
}

impl Source for LogSource {
    fn subscription(&self) -> &Subscription {
        &self.subscription
    }

    async fn read(&self, from: SeqNum, limit: ReadLimit) -> Result<Arc<RecordBatch>> {
        self.shared.read_stored(&self.key, ReadStart::SeqNum(from), limit).await.map(Arc::new)
    }
}

impl Drop for LogSource {
    fn drop(&mut self) {
        self.shared.observer.followers(-1);
    }
}
