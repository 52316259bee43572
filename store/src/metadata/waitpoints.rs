//! [`Waitpoints`] on the same database as the sessions.

use async_trait::async_trait;
use entity::{waitpoint_tags, waitpoints};
use sea_orm::sea_query::{
    Condition, Expr, ExprTrait, LockType, OnConflict, Order, Query, SelectStatement, SimpleExpr,
};
use sea_orm::{ActiveValue::Set, ConnectionTrait, EntityTrait, QueryTrait};
use tracing::instrument;

use super::{SqlMetadata, fault, rows};
use sessiond_domain::error::{Error, Result};
use sessiond_domain::port::{Registered, Waitpoints};
use sessiond_domain::waitpoint::{
    Completion, Outcome, WaitStatus, Waitpoint, WaitpointAnchor, WaitpointCursor, WaitpointFilter,
    WaitpointPage, WaitpointPageRequest,
};
use sessiond_domain::{EnvironmentId, Timestamp, WaitpointId};

/// How often a create looks again when the row that it lost against has given up the key in between.
const CREATE_ATTEMPTS: usize = 8;

/// Waitpoints of one environment: where every query of a caller begins.
fn scoped(environment: &EnvironmentId) -> SelectStatement {
    let mut select = waitpoints::Entity::find().into_query();
    select.and_where(col(waitpoints::Column::EnvironmentId).eq(environment.as_str()));
    select
}

fn col(column: waitpoints::Column) -> SimpleExpr {
    Expr::col((waitpoints::Entity, column))
}

#[instrument(level = "debug", skip_all, name = "query")]
async fn all(db: &impl ConnectionTrait, select: &SelectStatement) -> Result<Vec<Waitpoint>> {
    db.query_all(select).await.map_err(fault)?.iter().map(rows::waitpoint).collect()
}

async fn find(
    db: &impl ConnectionTrait,
    environment: &EnvironmentId,
    id: &WaitpointId,
) -> Result<Option<Waitpoint>> {
    let mut select = scoped(environment);
    select.and_where(col(waitpoints::Column::Id).eq(id.as_str()));
    Ok(all(db, &select).await?.pop())
}

/// A number as both databases hold it; nothing that a log gives out is larger.
fn number(seq_num: u64) -> Result<i64> {
    i64::try_from(seq_num).map_err(|_| Error::invalid("lastSeqNum", "is not a sequence number"))
}

fn active_model(waitpoint: &Waitpoint) -> Result<waitpoints::ActiveModel> {
    let completion = waitpoint.completion.as_ref();
    let seq_num = completion.and_then(|completion| match completion.outcome {
        Outcome::Record(seq_num) => Some(seq_num),
        _ => None,
    });
    Ok(waitpoints::ActiveModel {
        id: Set(waitpoint.id.to_string()),
        environment_id: Set(waitpoint.environment.to_string()),
        session_id: Set(waitpoint.session.to_string()),
        io: Set(waitpoint.direction.as_str().to_owned()),
        run_id: Set(waitpoint.run.to_string()),
        after_seq_num: Set(waitpoint.after.map(number).transpose()?),
        timeout_at: Set(waitpoint.timeout_at.map(Timestamp::millis)),
        expires_at: Set(waitpoint.expires_at.map(Timestamp::millis)),
        tags: Set(waitpoint.tags.iter().map(String::as_str).collect()),
        idempotency_key: Set(waitpoint.idempotency_key.clone()),
        key_expires_at: Set(waitpoint.key_expires_at.map(Timestamp::millis)),
        created_at: Set(waitpoint.created_at.millis()),
        completed_at: Set(completion.map(|completion| completion.at.millis())),
        outcome: Set(completion.map(|completion| completion.outcome.as_str().to_owned())),
        seq_num: Set(seq_num.map(number).transpose()?),
    })
}

async fn insert_tags(db: &impl ConnectionTrait, waitpoint: &Waitpoint) -> Result<()> {
    if waitpoint.tags.is_empty() {
        return Ok(());
    }
    let rows = waitpoint.tags.iter().map(|tag| waitpoint_tags::ActiveModel {
        environment_id: Set(waitpoint.environment.to_string()),
        tag: Set(tag.clone()),
        waitpoint_id: Set(waitpoint.id.to_string()),
    });
    db.execute(&waitpoint_tags::Entity::insert_many(rows).into_query()).await.map_err(fault)?;
    Ok(())
}

impl SqlMetadata {
    /// One attempt: the row that has the key is found, or loses a key that counts no longer, or the insert decides.
    async fn try_register(&self, waitpoint: &Waitpoint, now: Timestamp) -> Result<Option<Registered>> {
        let transaction = self.begin().await?;
        if let Some(key) = &waitpoint.idempotency_key {
            let mut select = scoped(&waitpoint.environment);
            select
                .and_where(col(waitpoints::Column::SessionId).eq(waitpoint.session.as_str()))
                .and_where(col(waitpoints::Column::Io).eq(waitpoint.direction.as_str()))
                .and_where(col(waitpoints::Column::IdempotencyKey).eq(key.as_str()))
                .lock(LockType::Update);
            if let Some(known) = all(&transaction, &select).await?.pop() {
                if known.key_expires_at.is_none_or(|at| at > now) {
                    return Ok(Some(Registered { waitpoint: known, created: false }));
                }
                let mut update = Query::update();
                update
                    .table(waitpoints::Entity)
                    .value(waitpoints::Column::IdempotencyKey, None::<String>)
                    .and_where(Expr::col(waitpoints::Column::Id).eq(known.id.as_str()));
                transaction.execute(&update).await.map_err(fault)?;
            }
        }
        let insert = waitpoints::Entity::insert(active_model(waitpoint)?)
            .on_conflict(OnConflict::new().do_nothing().to_owned())
            .into_query();
        if transaction.execute(&insert).await.map_err(fault)?.rows_affected() == 0 {
            return Ok(None);
        }
        insert_tags(&transaction, waitpoint).await?;
        transaction.commit().await.map_err(fault)?;
        Ok(Some(Registered { waitpoint: waitpoint.clone(), created: true }))
    }
}

#[async_trait]
impl Waitpoints for SqlMetadata {
    async fn create_waitpoint(&self, waitpoint: Waitpoint, now: Timestamp) -> Result<Registered> {
        for _ in 0..CREATE_ATTEMPTS {
            if let Some(registered) = self.try_register(&waitpoint, now).await? {
                return Ok(registered);
            }
        }
        Err(Error::Conflict("the idempotency key is being used by others".to_owned()))
    }

    async fn find_waitpoint(
        &self,
        environment: &EnvironmentId,
        id: &WaitpointId,
    ) -> Result<Option<Waitpoint>> {
        find(&self.reader, environment, id).await
    }

    async fn complete_waitpoint(
        &self,
        environment: &EnvironmentId,
        id: &WaitpointId,
        completion: &Completion,
    ) -> Result<Option<Waitpoint>> {
        let seq_num = match completion.outcome {
            Outcome::Record(seq_num) => Some(number(seq_num)?),
            _ => None,
        };
        let mut update = Query::update();
        update
            .table(waitpoints::Entity)
            .value(waitpoints::Column::CompletedAt, completion.at.millis())
            .value(waitpoints::Column::Outcome, completion.outcome.as_str())
            .value(waitpoints::Column::SeqNum, seq_num)
            .and_where(Expr::col(waitpoints::Column::EnvironmentId).eq(environment.as_str()))
            .and_where(Expr::col(waitpoints::Column::Id).eq(id.as_str()))
            .and_where(Expr::col(waitpoints::Column::CompletedAt).is_null());
        self.writer.execute(&update).await.map_err(fault)?;
        find(&self.reader, environment, id).await
    }

    async fn list_waitpoints(
        &self,
        environment: &EnvironmentId,
        filter: &WaitpointFilter,
        page: &WaitpointPageRequest,
    ) -> Result<WaitpointPage> {
        // Postgres refuses text with a NUL, and nothing stored has one.
        let strange = |word: &String| word.contains('\0');
        let no_tag = !filter.tags_any.is_empty() && filter.tags_any.iter().all(strange);
        if no_tag || filter.idempotency_key.as_ref().is_some_and(strange) {
            return Ok(WaitpointPage::from_rows(page, Vec::new()));
        }
        let mut select = scoped(environment);
        narrow(&mut select, environment, filter);
        window(&mut select, page);
        Ok(WaitpointPage::from_rows(page, all(&self.reader, &select).await?))
    }

    async fn open_waitpoints(&self, after: Option<&WaitpointCursor>, limit: usize) -> Result<Vec<Waitpoint>> {
        let mut select = waitpoints::Entity::find().into_query();
        select.and_where(col(waitpoints::Column::CompletedAt).is_null());
        if let Some(cursor) = after {
            select.cond_where(beyond(cursor, true));
        }
        select
            .order_by((waitpoints::Entity, waitpoints::Column::CreatedAt), Order::Asc)
            .order_by((waitpoints::Entity, waitpoints::Column::Id), Order::Asc)
            .limit(limit as u64);
        all(&self.reader, &select).await
    }

    async fn completed_among(&self, ids: &[WaitpointId]) -> Result<Vec<WaitpointId>> {
        let mut select = waitpoints::Entity::find().into_query();
        select
            .and_where(col(waitpoints::Column::Id).is_in(ids.iter().map(|id| id.as_str())))
            .and_where(col(waitpoints::Column::CompletedAt).is_not_null());
        Ok(all(&self.reader, &select).await?.into_iter().map(|waitpoint| waitpoint.id).collect())
    }
}

fn narrow(select: &mut SelectStatement, environment: &EnvironmentId, filter: &WaitpointFilter) {
    let tags: Vec<_> = filter.tags_any.iter().filter(|tag| !tag.contains('\0')).collect();
    if !tags.is_empty() {
        let mut tagged = Query::select();
        tagged
            .column(waitpoint_tags::Column::WaitpointId)
            .from(waitpoint_tags::Entity)
            .and_where(Expr::col(waitpoint_tags::Column::EnvironmentId).eq(environment.as_str()))
            .and_where(Expr::col(waitpoint_tags::Column::Tag).is_in(tags.into_iter().map(String::as_str)));
        select.and_where(col(waitpoints::Column::Id).in_subquery(tagged));
    }
    if !filter.statuses.is_empty() && filter.statuses.len() < WaitStatus::ALL.len() {
        let any = filter.statuses.iter().fold(Condition::any(), |any, status| {
            let completed = || col(waitpoints::Column::CompletedAt).is_not_null();
            let record = || Outcome::Record(0).as_str();
            any.add(match status {
                WaitStatus::Waiting => col(waitpoints::Column::CompletedAt).is_null(),
                WaitStatus::Completed => completed().and(col(waitpoints::Column::Outcome).eq(record())),
                WaitStatus::TimedOut => completed().and(col(waitpoints::Column::Outcome).ne(record())),
            })
        });
        select.cond_where(any);
    }
    let words = [
        (waitpoints::Column::SessionId, filter.session.as_ref().map(|id| id.as_str())),
        (waitpoints::Column::RunId, filter.run.as_ref().map(|id| id.as_str())),
        (waitpoints::Column::IdempotencyKey, filter.idempotency_key.as_deref()),
    ];
    for (column, word) in words {
        if let Some(word) = word {
            select.and_where(col(column).eq(word));
        }
    }
    if let Some(from) = filter.created_from {
        select.and_where(col(waitpoints::Column::CreatedAt).gte(from.millis()));
    }
    if let Some(to) = filter.created_to {
        select.and_where(col(waitpoints::Column::CreatedAt).lte(to.millis()));
    }
}

/// The page and one row more, nearest to the anchor first.
fn window(select: &mut SelectStatement, page: &WaitpointPageRequest) {
    let (cursor, up) = match &page.anchor {
        WaitpointAnchor::After(cursor) => (cursor, false),
        WaitpointAnchor::Before(cursor) => (cursor, true),
    };
    if let Some(cursor) = cursor {
        select.cond_where(beyond(cursor, up));
    }
    let order = if up { Order::Asc } else { Order::Desc };
    select
        .order_by((waitpoints::Entity, waitpoints::Column::CreatedAt), order.clone())
        .order_by((waitpoints::Entity, waitpoints::Column::Id), order)
        .limit(page.size as u64 + 1);
}

/// Rows newer (`up`) or older than a cursor, as one stretch of an index.
fn beyond(cursor: &WaitpointCursor, up: bool) -> Condition {
    let (at, id) = (cursor.created_at.millis(), cursor.id.as_str());
    let created = || col(waitpoints::Column::CreatedAt);
    let (within, past, id) = if up {
        (created().gte(at), created().gt(at), col(waitpoints::Column::Id).gt(id))
    } else {
        (created().lte(at), created().lt(at), col(waitpoints::Column::Id).lt(id))
    };
    Condition::all().add(within).add(Condition::any().add(past).add(id))
}
