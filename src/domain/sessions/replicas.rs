//! What other processes on the same stores do, as far as something here waits for it.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::Sessions;
use crate::domain::changes::{ChangeFeed, Heard};
use crate::domain::error::Result;

/// How often the rows that somebody waits for are looked at, whatever has been heard.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// How soon something is tried again that has failed.
const RETRY: Duration = Duration::from_millis(250);
/// How far the clocks of replicas may differ, and how long a change may take from its time to its announcement.
const SKEW: Duration = Duration::from_secs(10);

impl Sessions {
    /// Takes in what other replicas do, until `stop` is cancelled: tells those who watch, ends open writers of sessions
    /// that are closed elsewhere, wakes who waits for an external id or for input.
    pub async fn watch_replicas(self: Arc<Self>, feed: Arc<dyn ChangeFeed>, stop: CancellationToken) {
        let mut heard = feed.subscribe();
        let mut beat = tokio::time::interval(LOOK_EVERY);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Since when something may have been missed that could not be made up for yet.
        let mut missed: Option<Instant> = None;
        loop {
            let retry = async {
                match missed {
                    Some(_) => tokio::time::sleep(RETRY).await,
                    None => std::future::pending().await,
                }
            };
            let done = tokio::select! {
                () = stop.cancelled() => return,
                news = heard.next() => match news {
                    Some(Heard::Sessions(changes)) => {
                        let closed = changes.iter().filter(|change| change.closed);
                        closed.for_each(|change| self.waiting.closed(&change.id));
                        let now = Instant::now();
                        self.rows.heard(&changes).await.inspect_err(|_| {
                            missed.get_or_insert(now);
                        })
                    }
                    Some(Heard::Missed(within)) => {
                        let since = Instant::now().checked_sub(within).unwrap_or_else(Instant::now);
                        missed = missed.min(Some(since)).or(Some(since));
                        self.catch_up(&mut missed).await
                    }
                    Some(Heard::Keys) => Ok(()),
                    None => return,
                },
                _ = beat.tick() => self.rows.look_again().await,
                () = retry => self.catch_up(&mut missed).await,
            };
            if let Err(error) = done {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "cannot look at what other replicas have changed");
            }
        }
    }

    async fn catch_up(&self, missed: &mut Option<Instant>) -> Result<()> {
        if let Some(since) = *missed {
            self.rows.catch_up(self.clock.now().minus(since.elapsed() + SKEW)).await?;
            *missed = None;
        }
        Ok(())
    }
}
