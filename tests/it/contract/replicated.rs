//! The list port on ClickHouse, fed from Postgres by the replicator: the way that it is used.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sessiond::domain::{EnvironmentId, Filter, ListIndex, Page, PageRequest, Result, TagQuery, Timestamp};
use sessiond::store::index::clickhouse::ClickHouseIndex;

use crate::harness::database::Sql;
use crate::replication::world::{Running, World};

/// An index that is asked only once everything written before has arrived.
struct CaughtUp {
    index: ClickHouseIndex,
    world: World,
    _running: Running,
}

/// Empty adapters, with a replicator at work.
pub async fn open() -> Sql {
    let world = World::new().await;
    world.clickhouse.migrate().await.expect("migrates");
    let sql = world.sql.clone();
    let index =
        ClickHouseIndex::new(world.clickhouse.clone(), Arc::new(sql.store.clone()), Duration::from_secs(10));
    let running = world.replicate("one");
    let index = CaughtUp { index, world, _running: running };
    Sql { index: Arc::new(index), ..sql }
}

#[async_trait]
impl ListIndex for CaughtUp {
    async fn list(
        &self,
        environment: &EnvironmentId,
        filter: &Filter,
        page: &PageRequest,
        now: Timestamp,
    ) -> Result<Page> {
        self.world.catch_up().await;
        self.index.list(environment, filter, page, now).await
    }

    async fn count(&self, environment: &EnvironmentId, filter: &Filter, now: Timestamp) -> Result<u64> {
        self.world.catch_up().await;
        self.index.count(environment, filter, now).await
    }

    async fn tags(&self, environment: &EnvironmentId, query: &TagQuery) -> Result<Vec<String>> {
        self.world.catch_up().await;
        self.index.tags(environment, query).await
    }
}
