//! Queries on sessions. Every one starts from [`scoped`], so none can see past its environment.

use std::time::Duration;

use entity::{session_tags, sessions};
use sea_orm::sea_query::{
    Expr, ExprTrait, LockType, OnConflict, Order, Query, SelectStatement, UpdateStatement,
};
use sea_orm::{ActiveValue::Set, ConnectionTrait, EntityTrait, QueryTrait};
use serde_json::Value;
use tracing::instrument;

use super::{SqlMetadata, fault, rows};
use sessiond_domain::error::{Error, Result};
use sessiond_domain::port::Inserted;
use sessiond_domain::session::{Closure, Session, SessionPatch};
use sessiond_domain::{EnvironmentId, SessionId, SessionRef, Timestamp};

/// How often a create looks again when the row it lost against has given up the id in between.
const CREATE_ATTEMPTS: usize = 8;
/// Rows that one step of a sweep marks, so that it never holds SQLite's write lock for long.
const SWEEP_BATCH: u64 = 200;

/// Sessions of one environment: where every query begins.
pub(super) fn scoped(environment: &EnvironmentId) -> SelectStatement {
    let mut select = sessions::Entity::find().into_query();
    select.and_where(Expr::col(sessions::Column::EnvironmentId).eq(environment.as_str()));
    select
}

/// As [`scoped`], for a change.
fn scoped_update(environment: &EnvironmentId) -> UpdateStatement {
    let mut update = Query::update();
    update
        .table(sessions::Entity)
        .and_where(Expr::col(sessions::Column::EnvironmentId).eq(environment.as_str()));
    update
}

#[instrument(level = "debug", skip_all, name = "query")]
pub(super) async fn one(db: &impl ConnectionTrait, select: &SelectStatement) -> Result<Option<Session>> {
    db.query_one(select).await.map_err(fault)?.as_ref().map(rows::session).transpose()
}

/// The session at an address.
pub(super) async fn find(
    db: &impl ConnectionTrait,
    environment: &EnvironmentId,
    address: &SessionRef,
) -> Result<Option<Session>> {
    let mut select = scoped(environment);
    match address {
        SessionRef::Id(id) => select.and_where(Expr::col(sessions::Column::Id).eq(id.as_str())),
        SessionRef::External(id) => select.and_where(Expr::col(sessions::Column::ExternalId).eq(id.as_str())),
    };
    one(db, &select).await
}

/// The sessions with these ids.
#[instrument(level = "debug", skip_all, name = "query")]
pub(super) async fn find_many(
    db: &impl ConnectionTrait,
    environment: &EnvironmentId,
    ids: &[SessionId],
) -> Result<Vec<Session>> {
    let mut select = scoped(environment);
    select.and_where(Expr::col(sessions::Column::Id).is_in(ids.iter().map(|id| id.as_str())));
    db.query_all(&select).await.map_err(fault)?.iter().map(rows::session).collect()
}

/// Sessions of every environment by ascending id.
#[instrument(level = "debug", skip_all, name = "query")]
pub(super) async fn scan(
    db: &impl ConnectionTrait,
    after: Option<&SessionId>,
    limit: usize,
) -> Result<Vec<Session>> {
    let mut select = sessions::Entity::find().into_query();
    if let Some(after) = after {
        select.and_where(Expr::col(sessions::Column::Id).gt(after.as_str()));
    }
    select.order_by(sessions::Column::Id, Order::Asc).limit(limit as u64);
    db.query_all(&select).await.map_err(fault)?.iter().map(rows::session).collect()
}

/// Writes a closure where there is none; without an environment only for a seal found in the log.
pub(super) async fn write_closure(
    db: &impl ConnectionTrait,
    environment: Option<&EnvironmentId>,
    id: &SessionId,
    closure: &Closure,
) -> Result<()> {
    let at = closure.at.millis();
    let mut update = match environment {
        Some(environment) => scoped_update(environment),
        None => Query::update().table(sessions::Entity).to_owned(),
    };
    let updated_at = Expr::col(sessions::Column::UpdatedAt);
    update
        .value(sessions::Column::ClosedAt, at)
        .value(sessions::Column::ClosedReason, closure.reason.clone())
        .value(sessions::Column::UpdatedAt, Expr::case(updated_at.clone().lt(at), at).finally(updated_at))
        .and_where(Expr::col(sessions::Column::Id).eq(id.as_str()))
        .and_where(Expr::col(sessions::Column::ClosedAt).is_null());
    db.execute(&update).await.map_err(fault)?;
    Ok(())
}

impl SqlMetadata {
    /// Looks before it writes, so that a repeated create takes no write lock; the unique index decides races.
    pub(super) async fn insert_or_find(
        &self,
        session: Session,
        request_key: Option<&str>,
    ) -> Result<Inserted> {
        let request_key = request_key.filter(|_| session.external_id.is_none());
        check_text(&session, request_key)?;
        for _ in 0..CREATE_ATTEMPTS {
            if let Some(session) = self.find_twin(&session, request_key).await? {
                return Ok(Inserted { session, created: false });
            }
            if self.try_insert(&session, request_key).await? {
                return Ok(Inserted { session, created: true });
            }
        }
        Err(Error::Conflict("the session id is already used".to_owned()))
    }

    /// The session that a create of `session` must answer with, if it is there.
    async fn find_twin(&self, session: &Session, request_key: Option<&str>) -> Result<Option<Session>> {
        match (&session.external_id, request_key) {
            (Some(id), _) => {
                find(&self.reader, &session.environment, &SessionRef::External(id.clone())).await
            }
            (None, Some(key)) => {
                let mut select = scoped(&session.environment);
                select.and_where(Expr::col(sessions::Column::RequestKey).eq(key));
                one(&self.reader, &select).await
            }
            (None, None) => Ok(None),
        }
    }

    async fn try_insert(&self, session: &Session, request_key: Option<&str>) -> Result<bool> {
        let insert = sessions::Entity::insert(active_model(session, request_key))
            .on_conflict(OnConflict::new().do_nothing().to_owned())
            .into_query();
        let transaction = self.begin().await?;
        let inserted = transaction.execute(&insert).await.map_err(fault)?.rows_affected() == 1;
        if inserted {
            super::runs::insert_first(&transaction, session).await?;
            insert_tags(&transaction, session).await?;
        }
        transaction.commit().await.map_err(fault)?;
        Ok(inserted)
    }

    pub(super) async fn patch(
        &self,
        environment: &EnvironmentId,
        id: &SessionId,
        patch: SessionPatch,
        now: Timestamp,
    ) -> Result<Option<Session>> {
        let transaction = self.begin().await?;
        let mut select = scoped(environment);
        select.and_where(Expr::col(sessions::Column::Id).eq(id.as_str())).lock(LockType::Update);
        let Some(before) = one(&transaction, &select).await? else {
            return Ok(None);
        };
        let retagged = patch.tags.is_some();
        let after = apply(before.clone(), patch, now);
        check_text(&after, None)?;
        let update = changed_columns(&after);
        transaction.execute(&update).await.map_err(fault)?;
        if retagged {
            delete_tags(&transaction, &before).await?;
            insert_tags(&transaction, &after).await?;
        }
        transaction.commit().await.map_err(fault)?;
        Ok(Some(after))
    }

    /// Marks sessions whose `expires_at` has passed, so that lists by status stay fast, and returns how many
    /// there were. Lists are exact without it; run it every few seconds.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub async fn sweep_expired(&self, now: Timestamp) -> Result<u64> {
        let mut marked = 0;
        for environment in super::tenants::environments(&self.reader).await? {
            loop {
                let update = mark_lapsed(&environment.id, now);
                let step = self.writer.execute(&update).await.map_err(fault)?.rows_affected();
                marked += step;
                if step < SWEEP_BATCH {
                    break;
                }
            }
        }
        Ok(marked)
    }
}

fn mark_lapsed(environment: &EnvironmentId, now: Timestamp) -> UpdateStatement {
    let mut due = scoped(environment);
    due.clear_selects()
        .column(sessions::Column::Id)
        .and_where(Expr::col(sessions::Column::ClosedAt).is_null())
        .and_where(Expr::cust("lapsed = 0"))
        .and_where(Expr::col(sessions::Column::ExpiresAt).lte(now.millis()))
        .limit(SWEEP_BATCH);
    // Only by id: naming the environment again would tempt SQLite to walk all of it.
    let mut update = Query::update();
    update
        .table(sessions::Entity)
        .value(sessions::Column::Lapsed, 1)
        .and_where(Expr::col(sessions::Column::Id).in_subquery(due));
    update
}

fn apply(mut session: Session, patch: SessionPatch, now: Timestamp) -> Session {
    if let Some(tags) = patch.tags {
        session.tags = tags;
    }
    if let Some(metadata) = patch.metadata {
        session.metadata = metadata;
    }
    if let Some(external_id) = patch.external_id {
        session.external_id = external_id;
    }
    if let Some(trigger_config) = patch.trigger_config {
        session.trigger_config = Some(trigger_config);
    }
    session.updated_at = now.max(session.updated_at.plus(Duration::from_millis(1)));
    session
}

fn changed_columns(session: &Session) -> UpdateStatement {
    let mut update = scoped_update(&session.environment);
    update
        .value(sessions::Column::ExternalId, session.external_id.as_ref().map(ToString::to_string))
        .value(sessions::Column::Tags, words(&session.tags))
        .value(sessions::Column::Metadata, session.metadata.clone().map(Value::Object))
        .value(sessions::Column::TriggerConfig, session.trigger_config.clone().map(Value::Object))
        .value(sessions::Column::UpdatedAt, session.updated_at.millis())
        .and_where(Expr::col(sessions::Column::Id).eq(session.id.as_str()));
    update
}

fn active_model(session: &Session, request_key: Option<&str>) -> sessions::ActiveModel {
    sessions::ActiveModel {
        id: Set(session.id.to_string()),
        environment_id: Set(session.environment.to_string()),
        external_id: Set(session.external_id.as_ref().map(ToString::to_string)),
        request_key: Set(request_key.map(str::to_owned)),
        kind: Set(session.kind.clone()),
        task_identifier: Set(session.task_identifier.clone()),
        tags: Set(words(&session.tags)),
        metadata: Set(session.metadata.clone().map(Value::Object)),
        trigger_config: Set(session.trigger_config.clone().map(Value::Object)),
        current_run_id: Set(session.current_run_id.to_string()),
        created_at: Set(session.created_at.millis()),
        updated_at: Set(session.updated_at.millis()),
        expires_at: Set(session.expires_at.map(Timestamp::millis)),
        closed_at: Set(session.closed.as_ref().map(|closure| closure.at.millis())),
        closed_reason: Set(session.closed.as_ref().and_then(|closure| closure.reason.clone())),
        lapsed: Set(0),
    }
}

fn words(words: &[String]) -> Value {
    words.iter().map(String::as_str).collect()
}

async fn insert_tags(db: &impl ConnectionTrait, session: &Session) -> Result<()> {
    if session.tags.is_empty() {
        return Ok(());
    }
    let rows = session.tags.iter().map(|tag| session_tags::ActiveModel {
        environment_id: Set(session.environment.to_string()),
        tag: Set(tag.clone()),
        created_at: Set(session.created_at.millis()),
        session_id: Set(session.id.to_string()),
    });
    let insert = session_tags::Entity::insert_many(rows)
        .on_conflict(OnConflict::new().do_nothing().to_owned())
        .into_query();
    db.execute(&insert).await.map_err(fault)?;
    Ok(())
}

async fn delete_tags(db: &impl ConnectionTrait, session: &Session) -> Result<()> {
    let mut delete = Query::delete();
    delete
        .from_table(session_tags::Entity)
        .and_where(Expr::col(session_tags::Column::EnvironmentId).eq(session.environment.as_str()))
        .and_where(Expr::col(session_tags::Column::Tag).is_in(session.tags.iter().map(String::as_str)))
        .and_where(Expr::col(session_tags::Column::CreatedAt).eq(session.created_at.millis()))
        .and_where(Expr::col(session_tags::Column::SessionId).eq(session.id.as_str()));
    db.execute(&delete).await.map_err(fault)?;
    Ok(())
}

/// Postgres takes no NUL in text. The core has refused it already, except in a request key.
fn check_text(session: &Session, request_key: Option<&str>) -> Result<()> {
    let fields = [
        ("externalId", session.external_id.as_ref().map(|id| id.as_str())),
        ("type", Some(session.kind.as_str())),
        ("taskIdentifier", Some(session.task_identifier.as_str())),
        ("x-trigger-request-idempotency-key", request_key),
    ];
    let tags = session.tags.iter().map(|tag| ("tags", Some(tag.as_str())));
    match fields.into_iter().chain(tags).find(|(_, text)| text.is_some_and(|text| text.contains('\0'))) {
        Some((field, _)) => Err(Error::invalid(field, "must not contain a NUL character")),
        None => Ok(()),
    }
}
