//! What a server shares with others on the same Postgres: news of changes, and lists from ClickHouse.

use std::sync::Arc;

use anyhow::Context;
use secrecy::ExposeSecret;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::replica_name;
use crate::clickhouse::ClickHouse;
use crate::config::Config;
use crate::domain::{AlwaysFresh, ChangeFeed, Freshness, ListIndex, NoReplicas};
use crate::replication::{Positions, Replicator, ReplicatorOptions};
use crate::store::index::clickhouse::ClickHouseIndex;
use crate::store::index::fallback::FallbackIndex;
use crate::store::index::sql::SqlIndex;
use crate::store::metadata::{PgChanges, SqlMetadata};
use crate::telemetry::Metrics;

/// Nothing of it on SQLite.
#[derive(Default)]
pub(super) struct Replicas {
    changes: Option<Arc<PgChanges>>,
    clickhouse: Option<ClickHouse>,
    positions: Option<Arc<Positions>>,
    replicator: Option<Replicator>,
}

/// The tasks of [`Replicas`].
pub(super) struct RunningReplicas {
    leading: CancellationToken,
    listening: CancellationToken,
    replicator: Option<JoinHandle<()>>,
    others: Vec<JoinHandle<()>>,
}

impl Replicas {
    /// Asks nobody yet.
    pub(super) fn open(config: &Config, metrics: &Metrics) -> anyhow::Result<Self> {
        let Some(url) = config.direct_postgres_url() else { return Ok(Self::default()) };
        let changes = PgChanges::new(url.expose_secret()).context("cannot tell other replicas of changes")?;
        let mut replicas = Self { changes: Some(changes), ..Self::default() };
        if config.clickhouse.url.is_none() {
            return Ok(replicas);
        }
        let clickhouse = ClickHouse::new(&config.clickhouse);
        let positions = Positions::new(&url, &config.replication, clickhouse.clone());
        replicas.positions = Some(positions.context("cannot follow the replicator")?);
        if config.replication.enabled {
            let options = ReplicatorOptions {
                url,
                config: config.replication.clone(),
                clickhouse: clickhouse.clone(),
                name: replica_name(),
                metrics: metrics.replication().clone(),
            };
            replicas.replicator = Some(Replicator::new(options).context("cannot replicate")?);
        }
        replicas.clickhouse = Some(clickhouse);
        Ok(replicas)
    }

    /// How changes are told and heard.
    pub(super) fn feed(&self) -> Arc<dyn ChangeFeed> {
        match &self.changes {
            Some(changes) => changes.clone(),
            None => Arc::new(NoReplicas),
        }
    }

    /// How far lists are behind.
    pub(super) fn freshness(&self) -> Arc<dyn Freshness> {
        match &self.positions {
            Some(positions) => positions.clone(),
            None => Arc::new(AlwaysFresh),
        }
    }

    /// Where lists come from.
    pub(super) fn index(&self, config: &Config, store: &Arc<SqlMetadata>) -> Arc<dyn ListIndex> {
        let sql = || Arc::new(SqlIndex::new(SqlMetadata::clone(store)));
        let Some(clickhouse) = &self.clickhouse else { return sql() };
        let timeout = config.clickhouse.query_timeout;
        let index = Arc::new(ClickHouseIndex::new(clickhouse.clone(), store.clone(), timeout));
        if config.clickhouse.fallback { Arc::new(FallbackIndex::new(index, sql())) } else { index }
    }

    /// Begins to work.
    pub(super) fn run(self) -> RunningReplicas {
        let (leading, listening) = (CancellationToken::new(), CancellationToken::new());
        let mut others = Vec::new();
        others.extend(self.changes.map(|changes| tokio::spawn(changes.run(listening.clone()))));
        others.extend(self.positions.map(|positions| tokio::spawn(positions.run(listening.clone()))));
        let replicator = self.replicator.map(|replicator| tokio::spawn(replicator.run(leading.clone())));
        RunningReplicas { leading, listening, replicator, others }
    }
}

impl RunningReplicas {
    /// Lets another replica lead.
    pub(super) fn step_down(&self) {
        self.leading.cancel();
    }

    /// Waits until what is under way has been flushed, and says good-bye.
    pub(super) async fn end(self) -> anyhow::Result<()> {
        self.leading.cancel();
        self.listening.cancel();
        for task in self.replicator.into_iter().chain(self.others) {
            task.await?;
        }
        Ok(())
    }
}
