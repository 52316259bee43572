//! Followers of every engine: stored records, then the live window, and the store again after a lag.

use std::future::Future;
use std::sync::Arc;

use futures_util::stream::{self, BoxStream, StreamExt};

use super::live::{Subscription, Taken};
use sessiond_domain::port::Followed;
use sessiond_domain::record::ReadLimit;
use sessiond_domain::send_budget::cost;
use sessiond_domain::{ConnectionBudget, Delivery, Error, RecordBatch, Result, SeqNum};

/// Where a follower gets its records. Dropped with it.
pub(crate) trait Source: Send + 'static {
    /// The window of the channel.
    fn subscription(&self) -> &Subscription;

    /// Stored records from a number on, or from the first that remains; empty only at the tail, which is then told.
    fn read(&self, from: SeqNum, limit: ReadLimit) -> impl Future<Output = Result<Arc<RecordBatch>>> + Send;
}

/// Every record from `next` on, as [`ChannelStore::follow`](sessiond_domain::ChannelStore::follow) promises.
pub(crate) fn followed<S: Source + Sync>(
    source: S,
    next: SeqNum,
    budget: ConnectionBudget,
) -> BoxStream<'static, Result<Followed>> {
    let follower = Follower { source, next, caught_up: false, budget };
    stream::unfold(Some(follower), |follower| async {
        let mut follower = follower?;
        match follower.step().await {
            Ok(followed @ Followed::Sealed(_)) => Some((Ok(followed), None)),
            Ok(followed) => Some((Ok(followed), Some(follower))),
            Err(error) => Some((Err(error), None)),
        }
    })
    .boxed()
}

struct Follower<S> {
    source: S,
    next: SeqNum,
    /// The end of the stored records was reported, and nothing was read from the store since.
    caught_up: bool,
    budget: ConnectionBudget,
}

impl<S: Source + Sync> Follower<S> {
    async fn step(&mut self) -> Result<Followed> {
        loop {
            match self.source.subscription().next(self.next, self.caught_up).await {
                Taken::Batch(batch) => {
                    let Some(room) = self.budget.try_reserve(cost(&batch.records)) else {
                        // Not kept while it waits for room: what has no room is read again once there is some.
                        if std::mem::take(&mut self.caught_up) {
                            return Ok(Followed::Behind);
                        }
                        drop(batch);
                        if let Some(delivery) = self.read().await? {
                            return Ok(Followed::Batch(delivery));
                        }
                        continue;
                    };
                    self.next = batch.next_seq_num().unwrap_or(self.next);
                    return Ok(Followed::Batch(Delivery::new(batch, room)));
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
                    if let Some(delivery) = self.read().await? {
                        return Ok(Followed::Batch(delivery));
                    }
                }
            }
        }
    }

    /// Stored records; `None` if everything up to the tail was trimmed meanwhile. Boxed, because most followers wait and
    /// few read.
    async fn read(&mut self) -> Result<Option<Delivery>> {
        let from = self.next;
        let batch = Box::pin(self.budget.read(|limit| self.source.read(from, limit))).await?;
        match (batch.next_seq_num(), batch.tail) {
            (Some(next), _) => {
                self.next = next;
                Ok(Some(batch))
            }
            (None, Some(tail)) if tail.seq_num > self.next => {
                self.next = tail.seq_num;
                Ok(None)
            }
            _ => Err(Error::internal("a live window is ahead of its store")),
        }
    }
}
