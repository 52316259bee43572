//! Followers: one connection to S2 for each followed channel, however many follow it here.
//!
//! The connection puts what it brings into the channel's live window, which followers share. It lasts as long as it has
//! followers, and is made again from the next record on when it breaks; so a follower sees neither a gap nor a repeat, and
//! keeps its stream while S2 is away.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use futures_util::stream::{BoxStream, StreamExt};
use tokio_util::task::AbortOnDropHandle;

use super::read::delivered;
use super::registry::Arrival;
use super::remote::{Keep, away};
use super::{FIRST_PAUSE, Shared, codec};
use crate::channel::follow::{Source, followed};
use crate::channel::live::{Subscription, Window};
use sessiond_domain::port::Followed;
use sessiond_domain::record::ReadLimit;
use sessiond_domain::{
    Backoff, ChannelKey, Closure, ConnectionBudget, Error, ReadStart, RecordBatch, Result, SeqNum,
};

/// The followed channels of this replica.
#[derive(Default)]
pub(super) struct Feeds(Mutex<HashMap<ChannelKey, Weak<Feed>>>);

/// Keeps a channel's window filled for as long as anybody holds it.
struct Feed {
    subscription: Subscription,
    key: ChannelKey,
    shared: Arc<Shared>,
    /// None for a sealed channel, which brings nothing any more.
    _task: Option<AbortOnDropHandle<()>>,
}

impl Feed {
    /// The feed of a channel, begun at `from` if there is none yet.
    fn of(shared: &Arc<Shared>, key: &ChannelKey, from: SeqNum, sealed: bool) -> Arc<Self> {
        let mut feeds = shared.feeds.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(feed) = feeds.get(key).and_then(Weak::upgrade) {
            return feed;
        }
        let subscription = shared.live.subscribe(key);
        let task = (!sealed).then(|| {
            let feeder = Feeder {
                shared: shared.clone(),
                key: key.clone(),
                window: subscription.shared(),
                next: Arc::new(AtomicU64::new(from)),
            };
            let background = shared.background.clone();
            let feeding = async move {
                background.survived("follower of a channel on S2", || feeder.clone().run()).await;
            };
            AbortOnDropHandle::new(tokio::spawn(feeding))
        });
        let feed = Arc::new(Self { subscription, key: key.clone(), shared: shared.clone(), _task: task });
        feeds.insert(key.clone(), Arc::downgrade(&feed));
        feed
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        let mut feeds = self.shared.feeds.0.lock().unwrap_or_else(PoisonError::into_inner);
        // By now another may have taken the place.
        if feeds.get(&self.key).is_some_and(|feed| feed.strong_count() == 0) {
            feeds.remove(&self.key);
        }
    }
}

/// See [`ChannelStore::follow`](sessiond_domain::ChannelStore::follow).
pub(super) async fn follow(
    shared: Arc<Shared>,
    key: ChannelKey,
    start: ReadStart,
    budget: ConnectionBudget,
) -> Result<BoxStream<'static, Result<Followed>>> {
    let (next, known) = shared.resolve(&key, start).await?;
    let known = known.unwrap_or_default();
    let closure = match known.sealed {
        true => Some(shared.registry.closure(&key.session).await?),
        false => None,
    };
    let feed = Feed::of(&shared, &key, known.tail.seq_num, closure.is_some());
    feed.subscription.window().raise(known.tail);
    if let Some(closure) = &closure {
        feed.subscription.window().seal(closure);
    }
    shared.observer.followers(1);
    Ok(followed(S2Source { feed }, next, budget))
}

struct S2Source {
    feed: Arc<Feed>,
}

impl Source for S2Source {
    fn subscription(&self) -> &Subscription {
        &self.feed.subscription
    }

    /// Waits for S2 to come back.
    async fn read(&self, from: SeqNum, limit: ReadLimit) -> Result<Arc<RecordBatch>> {
        let Feed { shared, key, .. } = &*self.feed;
        let mut backoff = Backoff::new(FIRST_PAUSE, shared.longest_pause);
        loop {
            match shared.read(key, ReadStart::SeqNum(from), limit).await {
                Err(Error::Unavailable { .. }) => backoff.pause().await,
                read => return read.map(Arc::new),
            }
        }
    }
}

impl Drop for S2Source {
    fn drop(&mut self) {
        self.feed.shared.observer.followers(-1);
    }
}

/// The task that fills a window.
#[derive(Clone)]
struct Feeder {
    shared: Arc<Shared>,
    key: ChannelKey,
    window: Arc<Window>,
    /// The next record that is not in the window: where a connection begins.
    next: Arc<AtomicU64>,
}

/// Why a connection ended.
enum Ended {
    Sealed(Closure),
    NoStream,
    Interrupted,
}

impl Feeder {
    async fn run(self) {
        let mut backoff = Backoff::new(FIRST_PAUSE, self.shared.longest_pause);
        loop {
            let before = self.next();
            let ended = match self.connection().await {
                Ok(Ended::NoStream) => self.wait_for_stream().await,
                ended => ended,
            };
            match ended {
                Ok(Ended::Sealed(closure)) => return self.window.seal(&closure),
                Ok(Ended::NoStream) => continue,
                Ok(Ended::Interrupted) => {}
                Err(error) if backoff.tries() == 0 => {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(channel = %self.key, error, "a followed channel lost S2 and is connected again");
                }
                Err(_) => {}
            }
            if self.next() > before {
                backoff.reset();
            }
            backoff.pause().await;
        }
    }

    /// Brings records for as long as it lasts.
    async fn connection(&self) -> Result<Ended> {
        let stream = codec::channel_stream(&self.key);
        let Some(mut session) = self.shared.remote.follow(&stream, self.next()).await? else {
            return Ok(Ended::NoStream);
        };
        let slot = self.shared.memory.slot(&self.key);
        while let Some(batch) = session.next().await {
            let records = batch.map_err(away)?.records;
            slot.update(|known| known.see(&records));
            let (batch, sealed) = delivered(records);
            if let Some(batch) = batch
                && let (Some(next), Some(tail)) = (batch.next_seq_num(), batch.tail)
            {
                // In this order: what comes again the window passes over.
                self.window.publish(vec![batch], tail);
                self.next.store(next, Ordering::Relaxed);
            }
            if sealed {
                return self.shared.registry.closure(&self.key.session).await.map(Ended::Sealed);
            }
        }
        Ok(Ended::Interrupted)
    }

    fn next(&self) -> SeqNum {
        self.next.load(Ordering::Relaxed)
    }

    /// Makes a main channel; waits for a named one, which only a writer may make.
    async fn wait_for_stream(&self) -> Result<Ended> {
        if self.key.address.name.is_some() {
            match self.shared.registry.wait_for(&self.key).await? {
                Arrival::Registered => {}
                Arrival::Sealed(closure) => return Ok(Ended::Sealed(closure)),
                Arrival::Interrupted => return Ok(Ended::Interrupted),
            }
        }
        // Also for one that was just registered: its writer may not have come so far.
        self.shared.remote.ensure(&codec::channel_stream(&self.key), Keep::AsConfigured).await?;
        Ok(Ended::NoStream)
    }
}
