//! Followers: stored records, then the live window, and the store again after a lag.

use std::sync::Arc;

use futures_util::stream::{self, BoxStream, StreamExt};

use super::Shared;
use crate::domain::port::Followed;
use crate::domain::record::ReadLimit;
use crate::domain::{ChannelKey, Error, ReadStart, Result, SeqNum};
use crate::store::channel::live::{Subscription, Taken};

/// See [`ChannelStore::follow`](crate::domain::ChannelStore::follow).
pub(super) async fn follow(
    shared: Arc<Shared>,
    key: ChannelKey,
    start: ReadStart,
) -> Result<BoxStream<'static, Result<Followed>>> {
    // The window comes first: what is committed after the look at the store below is in it.
    let subscription = shared.live.subscribe(&key);
    shared.observer.followers(1);
    let mut follower =
        Follower { shared: shared.clone(), subscription, key: key.clone(), next: 0, caught_up: false };
    let (next, bounds, closure) = shared
        .blocking(move |shared| {
            let view = shared.store.view();
            let (next, bounds) = view.resolve(&key, start)?;
            Ok((next, bounds, view.closure(&key.session)?))
        })
        .await?;
    follower.next = next;
    follower.subscription.window().raise(bounds.tail);
    if let Some(closure) = closure {
        follower.subscription.window().seal(&closure);
    }
    Ok(stream::unfold(Some(follower), |follower| async {
        let mut follower = follower?;
        match follower.step().await {
            Ok(followed @ Followed::Sealed(_)) => Some((Ok(followed), None)),
            Ok(followed) => Some((Ok(followed), Some(follower))),
            Err(error) => Some((Err(error), None)),
        }
    })
    .boxed())
}

struct Follower {
    shared: Arc<Shared>,
    subscription: Subscription,
    key: ChannelKey,
    next: SeqNum,
    /// The end of the stored records was reported, and nothing was read from the store since.
    caught_up: bool,
}

impl Follower {
    async fn step(&mut self) -> Result<Followed> {
        loop {
            match self.subscription.next(self.next, self.caught_up).await {
                Taken::Batch(batch) => {
                    self.next = batch.next_seq_num().unwrap_or(self.next);
                    return Ok(Followed::Batch(batch));
                }
                Taken::AtTail(tail) => {
                    self.caught_up = true;
                    return Ok(Followed::CaughtUp(tail));
                }
                Taken::Sealed(tail, _) if !self.caught_up => {
                    self.caught_up = true;
                    return Ok(Followed::CaughtUp(tail));
                }
                Taken::Sealed(_, closure) => return Ok(Followed::Sealed(closure)),
                Taken::Behind if self.caught_up => {
                    self.caught_up = false;
                    return Ok(Followed::Behind);
                }
                Taken::Behind => {
                    let start = ReadStart::SeqNum(self.next);
                    // On the heap, because most followers wait and few read.
                    let batch = Box::pin(self.shared.read_stored(&self.key, start, ReadLimit::BATCH)).await?;
                    match (batch.next_seq_num(), batch.tail) {
                        (Some(next), _) => {
                            self.next = next;
                            return Ok(Followed::Batch(Arc::new(batch)));
                        }
                        // Everything up to the tail was trimmed meanwhile.
                        (None, Some(tail)) if tail.seq_num > self.next => self.next = tail.seq_num,
                        _ => return Err(Error::internal("a live window is ahead of its store")),
                    }
                }
            }
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.shared.observer.followers(-1);
    }
}
