//! [`Replicator`]: leads whenever nobody else does.
//!
//! The slot is the lock: whoever reads it leads, and the server lets one read. A leader that dies loses it with its connection,
//! one that is frozen when the server has waited for it long enough.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::backfill;
use super::flush::Flusher;
use super::pgwire::{PgSource, SourceOptions};
use super::slot::{self, SlotError};
use super::source::SourceError;
use super::term::{Term, TermEnd, TermOptions};
use super::{Context, Epoch, HINDRANCE, Lsn, NAME};
use crate::domain::Backoff;
use crate::store::index::clickhouse::{Fault, migrate};
use crate::store::metadata::{Beat, Phase, ReplicationState};

/// A term that has lasted so long was well: what ends it is a first failure.
const WELL: Duration = Duration::from_secs(60);

/// How a replicator works.
#[derive(Clone)]
pub struct ReplicatorOptions {
    /// The slot, and the server that it is in.
    pub source: SourceOptions,
    /// How it is read.
    pub term: TermOptions,
    /// How often it is looked whether the slot is free, before jitter of up to as much again. What fails is tried again after a
    /// pause that doubles from here.
    pub poll: Duration,
    /// The longest such pause, before jitter.
    pub longest_pause: Duration,
}

/// What a replicator is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// It has come to nothing yet.
    Starting,
    /// Another one leads.
    Following,
    /// It leads.
    Leading,
    /// It cannot do its work; why, in words.
    Failing(String),
}

/// Brings changes of sessions to ClickHouse, whenever no other process does.
pub struct Replicator {
    options: ReplicatorOptions,
    context: Context,
    flusher: Flusher,
    health: watch::Sender<Health>,
}

/// Why nothing is led.
#[derive(Debug, thiserror::Error)]
enum Hindrance {
    #[error(transparent)]
    Slot(#[from] SlotError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("ClickHouse cannot be used")]
    ClickHouse(#[from] Fault),
    #[error(transparent)]
    Postgres(#[from] crate::domain::Error),
}

impl Replicator {
    /// A replicator that works with `context`. Asks nobody yet.
    pub fn new(options: ReplicatorOptions, context: Context) -> Self {
        let flusher = Flusher::new(context.clone(), &options.source.slot);
        Self { options, context, flusher, health: watch::Sender::new(Health::Starting) }
    }

    /// Everything that stands before this place in the log of Postgres is in ClickHouse, as far as this replicator knows.
    pub fn reached(&self) -> watch::Receiver<Lsn> {
        self.context.reached.subscribe()
    }

    /// What it is doing, as it changes.
    pub fn health(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
    }

    /// Runs it in a task of its own, which is watched. What is returned completes when it has stopped.
    pub fn start(self, stop: CancellationToken) -> JoinHandle<()> {
        let (background, this) = (self.context.background.clone(), Arc::new(self));
        background.keep(NAME, move || {
            let (this, stop) = (this.clone(), stop.clone());
            async move { this.run(stop).await }
        })
    }

    /// Leads whenever the slot is free, until `stop` is cancelled. Whatever goes wrong is told and tried again.
    pub async fn run(&self, stop: CancellationToken) {
        // Whatever ended an earlier run.
        self.context.metrics.leading(false);
        let mut backoff = Backoff::new(self.options.poll, self.options.longest_pause);
        while let Some(term) = stop.run_until_cancelled(Box::pin(self.begin())).await {
            match term {
                Ok(Some((term, backfilling))) => {
                    tracing::info!(
                        slot = self.options.source.slot,
                        "this process leads the replication to ClickHouse"
                    );
                    self.tell(&Health::Leading);
                    self.context.metrics.leading(true);
                    let begun = Instant::now();
                    let epoch = term.epoch();
                    let end = Box::pin(term.run(&stop)).await;
                    drop(backfilling);
                    self.context.metrics.leading(false);
                    if begun.elapsed() >= WELL {
                        backoff.reset();
                    }
                    if matches!(end, TermEnd::Stopped) {
                        return;
                    }
                    if matches!(end, TermEnd::Source(SourceError::PublicationMissing(_))) {
                        self.discard(epoch).await;
                    }
                    let error = &end as &dyn std::error::Error;
                    tracing::warn!(error, "this process leads the replication to ClickHouse no longer");
                    self.tell(&Health::Failing(end.to_string()));
                }
                Ok(None) => {
                    backoff.reset();
                    self.tell(&Health::Following);
                }
                Err(hindrance) => {
                    let failing = Health::Failing(hindrance.to_string());
                    // Once, and not as often as it is tried.
                    if *self.health.borrow() != failing {
                        let error = &hindrance as &dyn std::error::Error;
                        tracing::error!(error, "cannot replicate to ClickHouse; it is tried again");
                    }
                    self.tell(&failing);
                }
            }
            if stop.run_until_cancelled(backoff.pause()).await.is_none() {
                return;
            }
        }
    }

    /// A term, with what copies older rows beside it; `None` while another process leads.
    async fn begin(&self) -> Result<Option<(Term, AbortOnDropHandle<()>)>, Hindrance> {
        let Self { options: ReplicatorOptions { source, term, .. }, context, flusher, .. } = self;
        let postgres = &context.postgres;
        // Most of the time another one leads, and then there is nothing to be made.
        if postgres.slot(&source.slot).await?.is_some_and(|slot| slot.is_ours && slot.is_active) {
            return Ok(None);
        }
        slot::release(context, &source.slot, term.max_wal).await?;
        migrate(&context.clickhouse).await?;
        let epoch = slot::ensure(source, context).await?;
        let (stream, identity) = match PgSource::open(source).await {
            Err(SourceError::Busy) => return Ok(None),
            opened => opened?,
        };
        // Another process may have made the slot anew between the look at it and this moment, from which on nobody can; and this
        // connection may be to another server than the one that was looked at.
        let state = postgres.state(&source.slot).await?;
        let state = state.filter(|state| {
            state.epoch == epoch.0
                && state.system_identifier == identity.system_identifier
                && state.timeline == identity.timeline
                && matches!(state.phase, Phase::Backfilling | Phase::Streaming)
        });
        let Some(state) = state else { return Ok(None) };
        let Some(epoch) = self.claim(&state).await? else { return Ok(None) };
        let (older, name, background) = (flusher.clone(), source.slot.clone(), context.background.clone());
        let backfilling = async move {
            let copy = || backfill::run(&older, &name, epoch);
            background.survived("copy of older sessions", copy).await;
        };
        let backfilling = AbortOnDropHandle::new(tokio::spawn(backfilling));
        let term = Term::new(Box::new(stream), flusher.clone(), epoch, term.clone());
        Ok(Some((term, backfilling)))
    }

    /// Leaves the mark of this replication in ClickHouse before anything is stored there, and returns the epoch that it is under;
    /// `None` if that is over already. Where either side was put back to an older state, everything is copied anew.
    async fn claim(&self, state: &ReplicationState) -> Result<Option<Epoch>, Hindrance> {
        let Self { options: ReplicatorOptions { source, term, .. }, context, .. } = self;
        let (slot, postgres) = (source.slot.as_str(), &context.postgres);
        let (marker, newest) =
            (slot::newest_marker(context, slot).await?, slot::newest_version(context).await?);
        let mut epoch = Epoch(state.epoch);
        let Some(now) = postgres.state(slot).await?.filter(|now| now.epoch == epoch.0) else {
            return Ok(None);
        };
        let flushed = Lsn(postgres.position().await?);
        if let Some(loss) = slot::judge(state.marked, (marker.as_ref(), newest), (&now, flushed)) {
            epoch = slot::next_epoch(context, epoch).await?;
            if !postgres.copy_anew(slot, now.epoch, now.beats, epoch.0).await? {
                return Ok(None);
            }
            context.metrics.epoch_begun();
            tracing::warn!(slot, epoch = epoch.0, %loss, "everything is copied anew");
        }
        // Counted before it is left there, so that it can never be ahead of what Postgres knows.
        let beat =
            Beat { slot, epoch: epoch.0, leader: &term.name, flushed: state.flushed, is_storing: true };
        let Some(beat) = postgres.beat(beat).await? else { return Ok(None) };
        let is_current = slot::leave_mark(context, term, epoch, (beat, Lsn(state.flushed))).await?;
        // Another one may have come first.
        slot::newest_marker(context, slot).await?;
        Ok(is_current.then_some(epoch))
    }

    /// Drops a slot that cannot be decoded any more, once the server has let go of it: the next look finds it gone.
    async fn discard(&self, epoch: Epoch) {
        let slot = &self.options.source.slot;
        if let Err(error) = self.context.postgres.discard_slot(slot, epoch.0).await {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, slot, "a slot whose publication is gone is not dropped yet");
        }
    }

    fn tell(&self, health: &Health) {
        let fails = matches!(health, Health::Failing(_));
        self.context.background.hindered(NAME, fails.then_some(HINDRANCE));
        self.health.send_if_modified(|told| std::mem::replace(told, health.clone()) != *health);
    }
}
