//! Queries on the runs of sessions.

use std::time::Duration;

use entity::{session_runs, sessions};
use sea_orm::sea_query::{Expr, ExprTrait, LockType, Order, Query, SelectStatement};
use sea_orm::{ActiveValue::Set, ConnectionTrait, EntityTrait, QueryTrait};

use super::{SqlMetadata, fault, rows};
use sessiond_domain::error::Result;
use sessiond_domain::port::HandedOver;
use sessiond_domain::run::SessionRun;
use sessiond_domain::session::Session;
use sessiond_domain::{EnvironmentId, RunId, RunReason, SessionId};

/// Runs of one environment: where every query begins.
fn scoped(environment: &EnvironmentId) -> SelectStatement {
    let mut select = session_runs::Entity::find().into_query();
    select.and_where(Expr::col(session_runs::Column::EnvironmentId).eq(environment.as_str()));
    select
}

async fn one(db: &impl ConnectionTrait, select: &SelectStatement) -> Result<Option<SessionRun>> {
    db.query_one(select).await.map_err(fault)?.as_ref().map(rows::run).transpose()
}

/// The run with this id.
pub(super) async fn find(
    db: &impl ConnectionTrait,
    environment: &EnvironmentId,
    id: &RunId,
) -> Result<Option<SessionRun>> {
    let mut select = scoped(environment);
    select.and_where(Expr::col(session_runs::Column::Id).eq(id.as_str()));
    one(db, &select).await
}

/// The newest runs of a session.
pub(super) async fn newest(
    db: &impl ConnectionTrait,
    environment: &EnvironmentId,
    session: &SessionId,
    limit: usize,
) -> Result<Vec<SessionRun>> {
    let mut select = scoped(environment);
    select
        .and_where(Expr::col(session_runs::Column::SessionId).eq(session.as_str()))
        .order_by(session_runs::Column::TriggeredAt, Order::Desc)
        .order_by(session_runs::Column::Id, Order::Desc)
        .limit(limit as u64);
    db.query_all(&select).await.map_err(fault)?.iter().map(rows::run).collect()
}

/// The first run of a session that is being created.
pub(super) async fn insert_first(db: &impl ConnectionTrait, session: &Session) -> Result<()> {
    let run = SessionRun {
        id: session.current_run_id.clone(),
        environment: session.environment.clone(),
        session: session.id.clone(),
        reason: RunReason::Initial,
        previous: None,
        triggered_at: session.created_at,
    };
    insert(db, &run, None).await
}

async fn insert(db: &impl ConnectionTrait, run: &SessionRun, request_key: Option<&str>) -> Result<()> {
    let row = session_runs::ActiveModel {
        id: Set(run.id.to_string()),
        environment_id: Set(run.environment.to_string()),
        session_id: Set(run.session.to_string()),
        reason: Set(run.reason.as_str().to_owned()),
        previous_run_id: Set(run.previous.as_ref().map(ToString::to_string)),
        request_key: Set(request_key.map(str::to_owned)),
        triggered_at: Set(run.triggered_at.millis()),
    };
    db.execute(&session_runs::Entity::insert(row).into_query()).await.map_err(fault)?;
    Ok(())
}

impl SqlMetadata {
    /// The row is locked first, so that handovers, changes and a close of one session queue.
    pub(super) async fn swap_run(
        &self,
        run: SessionRun,
        request_key: Option<&str>,
    ) -> Result<Option<HandedOver>> {
        let transaction = self.begin().await?;
        let mut select = super::sessions::scoped(&run.environment);
        select.and_where(Expr::col(sessions::Column::Id).eq(run.session.as_str())).lock(LockType::Update);
        let Some(mut session) = super::sessions::one(&transaction, &select).await? else {
            return Ok(None);
        };
        if let Some(key) = request_key {
            let mut known = scoped(&run.environment);
            known
                .and_where(Expr::col(session_runs::Column::SessionId).eq(run.session.as_str()))
                .and_where(Expr::col(session_runs::Column::RequestKey).eq(key));
            if let Some(known) = one(&transaction, &known).await? {
                return Ok(Some(HandedOver { session, swapped: true, run: known.id }));
            }
        }
        if session.closed.is_some() || Some(&session.current_run_id) != run.previous.as_ref() {
            let run = session.current_run_id.clone();
            return Ok(Some(HandedOver { session, swapped: false, run }));
        }
        session.current_run_id = run.id.clone();
        session.updated_at = run.triggered_at.max(session.updated_at.plus(Duration::from_millis(1)));
        let mut update = Query::update();
        update
            .table(sessions::Entity)
            .value(sessions::Column::CurrentRunId, run.id.as_str())
            .value(sessions::Column::UpdatedAt, session.updated_at.millis())
            .and_where(Expr::col(sessions::Column::EnvironmentId).eq(run.environment.as_str()))
            .and_where(Expr::col(sessions::Column::Id).eq(run.session.as_str()));
        transaction.execute(&update).await.map_err(fault)?;
        insert(&transaction, &run, request_key).await?;
        transaction.commit().await.map_err(fault)?;
        Ok(Some(HandedOver { session, swapped: true, run: run.id }))
    }
}
