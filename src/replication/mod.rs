//! The replicator: changes of sessions from the WAL of Postgres to ClickHouse.
//!
//! The slot is the lock: whoever reads it leads, and every other replica waits for it to be free ([`Replicator::run`]).
//! A leader's term ([`stream`]) goes from the WAL ([`wal`], [`decode`]) over batches of whole transactions ([`batch`])
//! to flushes ([`flush`]); what is stored without a gap ([`confirm`]) is published to every replica, and only then
//! confirmed to Postgres. Rows older than the slot are copied beside it ([`backfill`]).

mod backfill;
mod batch;
mod confirm;
mod convert;
mod decode;
mod environments;
mod flush;
mod positions;
mod postgres;
mod setup;
mod status;
mod stream;
mod verify;
mod wal;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use secrecy::SecretString;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::clickhouse::{ClickHouse, Fault};
use crate::config::ReplicationConfig;
use crate::telemetry::ReplicationMetrics;
pub use convert::ConvertError;
use environments::Environments;
use flush::{Flusher, Pace};
pub use positions::Positions;
pub use postgres::{Lsn, Postgres, Slot, State, Status};
pub use setup::{Prepared, SetupError};
pub use status::{Overview, overview};
use stream::{Term, TermEnd};
pub use verify::{DeadLetter, Difference, Report, Verifier, VerifyError, dead_letters, replay};
use wal::PgWal;
pub use wal::WalError;

/// What a replica's replicator is doing, for people and probes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// It has not come to anything yet.
    Starting,
    /// Another replica leads.
    Following,
    /// It reads the slot.
    Leading {
        /// Which epoch.
        epoch: u8,
    },
    /// It cannot do its work, in words.
    Failing(String),
}

/// What a replicator works with.
#[derive(Clone)]
pub struct ReplicatorOptions {
    /// Its settings.
    pub config: ReplicationConfig,
    /// A direct URL of the primary.
    pub url: SecretString,
    /// Where rows go.
    pub clickhouse: ClickHouse,
    /// What the state row calls this replica while it leads.
    pub name: String,
    /// What it shows.
    pub metrics: ReplicationMetrics,
}

/// A replica's replicator.
pub struct Replicator {
    options: ReplicatorOptions,
    postgres: Postgres,
    pace: Arc<Pace>,
    health: watch::Sender<Health>,
}

impl Replicator {
    /// Asks nobody yet.
    ///
    /// # Errors
    /// If the URL cannot be read.
    pub fn new(options: ReplicatorOptions) -> Result<Self, sqlx::Error> {
        let postgres = Postgres::new(&options.url)?;
        let pace = Pace::new(options.config.linger);
        Ok(Self { options, postgres, pace, health: watch::Sender::new(Health::Starting) })
    }

    /// What it is doing, as it changes.
    pub fn health(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
    }

    /// Leads whenever the slot is free, until `stop` is cancelled. What goes wrong is told and tried again.
    pub async fn run(self, stop: CancellationToken) {
        while let Some(attempt) = stop.run_until_cancelled(self.attempt()).await {
            match attempt {
                Ok(Some(term)) => self.lead(term, &stop).await,
                Ok(None) => self.tell(Health::Following),
                Err(error) => self.failed(&error),
            }
            let wait = self.options.config.retry_interval.mul_f64(0.5 + flush::jitter());
            if stop.run_until_cancelled(tokio::time::sleep(wait)).await.is_none() {
                break;
            }
        }
        self.postgres.close().await;
    }

    /// A term, if the slot is free.
    async fn attempt(&self) -> Result<Option<Term>, SetupError> {
        let ReplicatorOptions { config, url, clickhouse, name, metrics } = &self.options;
        if self.postgres.slot(&config.slot).await?.is_some_and(|slot| slot.active_pid.is_some()) {
            return Ok(None);
        }
        self.reach_clickhouse().await?;
        let before = self.postgres.state(&config.slot).await.ok().flatten().map(|state| state.epoch);
        let prepared = setup::prepare(&self.postgres, url, clickhouse, config).await?;
        if before != Some(prepared.epoch) {
            metrics.epoch();
        }
        let source = match PgWal::start(url, config).await {
            Err(WalError::Busy) => return Ok(None),
            other => other?,
        };
        let flusher = Flusher {
            clickhouse: clickhouse.clone(),
            postgres: self.postgres.clone(),
            environments: Environments::new(self.postgres.clone()),
            slot: config.slot.clone(),
            pace: self.pace.clone(),
            // One may be there from before; the first flush finds out.
            letters: Arc::new(AtomicU64::new(1)),
            metrics: metrics.clone(),
        };
        let term = Term {
            source: Box::new(source),
            flusher,
            config: config.clone(),
            epoch: prepared.epoch,
            name: name.clone(),
        };
        Ok(Some(term))
    }

    /// Without ClickHouse no slot is made, and one that is there may hold only so much.
    async fn reach_clickhouse(&self) -> Result<(), SetupError> {
        let config = &self.options.config;
        let Err(fault) = self.options.clickhouse.migrate().await else { return Ok(()) };
        if !matches!(fault, Fault::NewerSchema { .. })
            && let Some(slot) = self.postgres.slot(&config.slot).await?
            && slot.retained > config.max_wal
        {
            self.drop_slot(slot.retained).await?;
        }
        Err(fault.into())
    }

    /// Whatever ends a term, the state row and the slot tell the next one where to begin.
    async fn lead(&self, term: Term, stop: &CancellationToken) {
        let epoch = term.epoch;
        tracing::info!(epoch, slot = self.options.config.slot, "leading the replication to ClickHouse");
        self.tell(Health::Leading { epoch });
        self.options.metrics.leading(true);
        let backfill = tokio::spawn(backfill::run(term.flusher.clone(), epoch));
        let end = term.run(stop).await;
        backfill.abort();
        self.options.metrics.leading(false);
        let handled = match &end {
            TermEnd::Stopped => return,
            TermEnd::TooMuchWal(retained) => self.drop_slot(*retained).await,
            TermEnd::Truncated => self.begin_anew(epoch).await,
            _ => Ok(()),
        };
        if let Err(error) = handled {
            tracing::error!(error = &error as &dyn std::error::Error, "cannot drop the slot");
        }
        tracing::warn!(
            error = &end as &dyn std::error::Error,
            "no longer leading the replication to ClickHouse"
        );
        self.tell(Health::Failing(end.to_string()));
    }

    /// What no row tells is told by an epoch that begins anew.
    async fn begin_anew(&self, epoch: u8) -> Result<(), sqlx::Error> {
        self.postgres.set_status(&self.options.config.slot, epoch, Status::Preparing).await
    }

    async fn drop_slot(&self, retained: u64) -> Result<(), sqlx::Error> {
        let slot = &self.options.config.slot;
        tracing::error!(
            slot,
            retained,
            "dropping the slot, which holds more WAL than replication.max_wal; every session is copied again once \
             ClickHouse is back"
        );
        if let Some(state) = self.postgres.state(slot).await? {
            self.postgres.set_status(slot, state.epoch, Status::Dropped).await?;
        }
        self.postgres.drop_slot(slot).await
    }

    fn failed(&self, error: &SetupError) {
        let words = match error {
            SetupError::ClickHouse(fault) => fault.summary(),
            other => match other.wal_text() {
                Some(wal) => format!("{other}: {wal}"),
                None => other.to_string(),
            },
        };
        let told = Health::Failing(words);
        if *self.health.borrow() != told {
            tracing::error!(
                error = error as &dyn std::error::Error,
                "cannot replicate to ClickHouse, trying again"
            );
        }
        self.tell(told);
    }

    fn tell(&self, health: Health) {
        self.health.send_if_modified(|told| {
            let changed = *told != health;
            *told = health;
            changed
        });
    }
}
