//! Queries on environments, keys and the installation row.

use entity::{environments, installation, keys};
use sea_orm::sea_query::{Expr, ExprTrait, Order, Query, SelectStatement};
use sea_orm::{ActiveValue::Set, ConnectionTrait, EntityTrait, QueryTrait};

use super::{SqlMetadata, fault, rows};
use sessiond_domain::error::{Error, Result};
use sessiond_domain::tenant::{Environment, StoredKey};
use sessiond_domain::{EnvironmentId, KeyId, Timestamp};

/// Adds an environment.
pub(super) async fn insert_environment(db: &impl ConnectionTrait, environment: Environment) -> Result<()> {
    let row = environments::ActiveModel {
        id: Set(environment.id.to_string()),
        organization: Set(environment.organization),
        project: Set(environment.project),
        slug: Set(environment.slug),
        kind: Set(environment.kind.as_str().to_owned()),
        created_at: Set(environment.created_at.millis()),
    };
    db.execute(&environments::Entity::insert(row).into_query()).await.map_err(fault)?;
    Ok(())
}

/// Every environment, oldest first.
pub(super) async fn environments(db: &impl ConnectionTrait) -> Result<Vec<Environment>> {
    let mut select = environments::Entity::find().into_query();
    select
        .order_by(environments::Column::CreatedAt, Order::Asc)
        .order_by(environments::Column::Id, Order::Asc);
    db.query_all(&select).await.map_err(fault)?.iter().map(rows::environment).collect()
}

/// Keys of one environment: where every query on keys begins, but for the look-up by hash.
fn scoped(environment: &EnvironmentId) -> SelectStatement {
    let mut select = keys::Entity::find().into_query();
    select.and_where(Expr::col(keys::Column::EnvironmentId).eq(environment.as_str()));
    select
}

/// Every key of an environment, newest first.
pub(super) async fn keys(db: &impl ConnectionTrait, environment: &EnvironmentId) -> Result<Vec<StoredKey>> {
    let mut select = scoped(environment);
    select.order_by(keys::Column::CreatedAt, Order::Desc).order_by(keys::Column::Id, Order::Desc);
    db.query_all(&select).await.map_err(fault)?.iter().map(rows::key).collect()
}

/// The key with this hash.
pub(super) async fn find_key(db: &impl ConnectionTrait, lookup: &[u8]) -> Result<Option<StoredKey>> {
    let mut select = keys::Entity::find().into_query();
    select.and_where(Expr::col(keys::Column::Lookup).eq(lookup));
    db.query_one(&select).await.map_err(fault)?.as_ref().map(rows::key).transpose()
}

/// The one row about the store itself.
pub(super) async fn installation(db: &impl ConnectionTrait) -> Result<installation::Model> {
    let row = installation::Entity::find_by_id(1_i16).one(db).await.map_err(fault)?;
    row.ok_or_else(|| Error::internal("the installation row is missing"))
}

async fn advance_revision(db: &impl ConnectionTrait) -> Result<()> {
    let mut update = Query::update();
    update
        .table(installation::Entity)
        .value(installation::Column::KeyRevision, Expr::col(installation::Column::KeyRevision).add(1));
    db.execute(&update).await.map_err(fault)?;
    Ok(())
}

impl SqlMetadata {
    /// Live keys to try a master key on, of whichever environments: at most `limit` of the oldest and as many of the newest,
    /// because the master key may have been another one in between.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn sample_keys(&self, now: Timestamp, limit: u64) -> Result<Vec<StoredKey>> {
        let ends_at = || Expr::col(keys::Column::EndsAt);
        let mut found: Vec<StoredKey> = Vec::new();
        for order in [Order::Asc, Order::Desc] {
            let mut select = keys::Entity::find().into_query();
            select
                .and_where(ends_at().is_null().or(ends_at().gt(now.millis())))
                .order_by(keys::Column::CreatedAt, order.clone())
                .order_by(keys::Column::Id, order)
                .limit(limit);
            for row in self.reader.query_all(&select).await.map_err(fault)? {
                let key = rows::key(&row)?;
                if !found.iter().any(|known| known.id == key.id) {
                    found.push(key);
                }
            }
        }
        Ok(found)
    }

    pub(super) async fn store_key(&self, key: StoredKey) -> Result<()> {
        let row = keys::ActiveModel {
            id: Set(key.id.to_string()),
            environment_id: Set(key.environment.to_string()),
            label: Set(key.label),
            lookup: Set(key.lookup),
            sealed_secret: Set(key.sealed_secret),
            hint: Set(key.hint),
            scopes: Set(key.scopes.map(|scopes| scopes.as_slice().iter().map(String::as_str).collect())),
            created_at: Set(key.created_at.millis()),
            ends_at: Set(key.ends_at.map(Timestamp::millis)),
            given: Set(key.given),
        };
        let transaction = self.begin().await?;
        transaction.execute(&keys::Entity::insert(row).into_query()).await.map_err(fault)?;
        advance_revision(&transaction).await?;
        transaction.commit().await.map_err(fault)
    }

    pub(super) async fn set_given(&self, environment: &EnvironmentId, id: &KeyId) -> Result<()> {
        let mut update = Query::update();
        update
            .table(keys::Entity)
            .value(keys::Column::Given, true)
            .and_where(Expr::col(keys::Column::EnvironmentId).eq(environment.as_str()))
            .and_where(Expr::col(keys::Column::Id).eq(id.as_str()));
        self.writer.execute(&update).await.map(drop).map_err(fault)
    }

    pub(super) async fn shorten_key(
        &self,
        environment: &EnvironmentId,
        id: &KeyId,
        at: Timestamp,
    ) -> Result<Option<StoredKey>> {
        let at = at.millis();
        let ends_at = || Expr::col(keys::Column::EndsAt);
        let mut update = Query::update();
        update
            .table(keys::Entity)
            .value(keys::Column::EndsAt, at)
            .and_where(Expr::col(keys::Column::EnvironmentId).eq(environment.as_str()))
            .and_where(Expr::col(keys::Column::Id).eq(id.as_str()))
            .and_where(ends_at().is_null().or(ends_at().gt(at)));
        let mut select = scoped(environment);
        select.and_where(Expr::col(keys::Column::Id).eq(id.as_str()));

        let transaction = self.begin().await?;
        if transaction.execute(&update).await.map_err(fault)?.rows_affected() > 0 {
            advance_revision(&transaction).await?;
        }
        let row = transaction.query_one(&select).await.map_err(fault)?;
        transaction.commit().await.map_err(fault)?;
        row.as_ref().map(rows::key).transpose()
    }

    pub(super) async fn remember_log(&self, candidate: &str) -> Result<String> {
        let mut update = Query::update();
        update
            .table(installation::Entity)
            .value(installation::Column::LogId, candidate)
            .and_where(Expr::col(installation::Column::LogId).is_null());
        self.writer.execute(&update).await.map_err(fault)?;
        let log_id = installation(&self.writer).await?.log_id;
        log_id.ok_or_else(|| Error::internal("the log id was not remembered"))
    }
}
