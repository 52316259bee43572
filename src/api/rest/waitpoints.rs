//! Waiting for input over REST: what the SDK calls, and a long-poll of our own.

use axum::extract::{RawQuery, State};
use axum::response::Response;
use axum::{Extension, Json};
use http::HeaderMap;

use super::list;
use super::model::Pagination;
use super::waitpoint_model::{
    self as model, CompleteBody, SuccessResponse, WaitBody, WaitResponse, WaitpointItem,
    WaitpointListResponse,
};
use crate::api::App;
use crate::api::error::{Failure, Route};
use crate::api::extract::{ApiAsker, Asker, JsonObject, KeyAsker, RunPath, WaitpointPath};
use crate::domain::record::METERED_MAX;
use crate::domain::waitpoint::WaitpointCursor;
use crate::domain::{ConnectionBudget, Error};

/// Largest body of a wait.
const WAIT_MAX: usize = 10_240;

fn in_wait(error: Error) -> Failure {
    Failure::from(error).on(Route::Wait)
}

/// Registers that a run waits for the next record of a session's channel.
#[utoipa::path(post, path = "/api/v1/runs/{run}/session-streams/wait", tag = "waitpoints",
    operation_id = "createWaitpoint", request_body = WaitBody,
    params(("run" = String, Path, description = "run_..., as recorded on a session")),
    responses((status = 200, description = "The waitpoint", body = WaitResponse)))]
pub async fn wait(
    State(app): State<App>,
    KeyAsker(caller): KeyAsker,
    RunPath(run): RunPath,
    JsonObject(body): JsonObject<WAIT_MAX>,
) -> Result<Json<WaitResponse>, Failure> {
    let new = model::wait(&body, run, app.clock.now())?;
    let registered = app.sessions.create_waitpoint(&caller, new).await.map_err(in_wait)?;
    Ok(Json(WaitResponse {
        waitpoint_id: registered.waitpoint.id.to_string(),
        is_cached: !registered.created,
    }))
}

/// Confirms that the run and the waitpoint exist. There is no run engine: await the waitpoint instead.
#[utoipa::path(post, path = "/engine/v1/runs/{run}/waitpoints/tokens/{waitpoint}/wait", tag = "waitpoints",
    operation_id = "blockOnWaitpoint",
    params(("run" = String, Path, description = "run_..."),
        ("waitpoint" = String, Path, description = "waitpoint_...")),
    responses((status = 200, description = "They do", body = SuccessResponse)))]
pub async fn block(
    State(app): State<App>,
    Asker(caller): Asker,
    RunPath(run): RunPath,
    WaitpointPath(waitpoint): WaitpointPath,
) -> Result<Json<SuccessResponse>, Failure> {
    app.sessions.block_on_waitpoint(&caller, &run, &waitpoint).await.map_err(in_wait)?;
    Ok(Json(SuccessResponse { success: true }))
}

/// Lists waitpoints, newest first: those that wait are what is to be answered. Who may read one session only names it.
#[utoipa::path(get, path = "/api/v1/waitpoints/tokens", tag = "waitpoints", operation_id = "listWaitpoints",
    params(("page[size]" = Option<u32>, Query, description = "1 to 100; 20 by default"),
        ("page[after]" = Option<String>, Query, description = "Cursor: older than"),
        ("page[before]" = Option<String>, Query, description = "Cursor: newer than"),
        ("filter[status]" = Option<String>, Query, description = "WAITING, COMPLETED, TIMED_OUT"),
        ("filter[session]" = Option<String>, Query, description = "session_... or an external id"),
        ("filter[run]" = Option<String>, Query, description = "run_..."),
        ("filter[tags]" = Option<String>, Query), ("filter[idempotencyKey]" = Option<String>, Query),
        ("filter[createdAt][period]" = Option<String>, Query, description = "Such as 7d, 12h, 30m"),
        ("filter[createdAt][from]" = Option<String>, Query, description = "Milliseconds or a date, inclusive"),
        ("filter[createdAt][to]" = Option<String>, Query, description = "Milliseconds or a date, inclusive")),
    responses((status = 200, description = "A page", body = WaitpointListResponse)))]
pub async fn list(
    State(app): State<App>,
    ApiAsker(caller): ApiAsker,
    Extension(budget): Extension<ConnectionBudget>,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
) -> Result<Response, Failure> {
    let from_sdk = headers.contains_key("trigger-version");
    let query = model::query(query.as_deref().unwrap_or_default(), app.clock.now(), from_sdk)?;
    let listed = async {
        let page =
            app.sessions.waitpoints(&caller, query.session.as_ref(), query.filter, &query.page).await?;
        let step = query.step.saturating_add(1);
        let text =
            |cursor: Option<WaitpointCursor>| cursor.map(|cursor| list::encode(step, &cursor.encode()));
        Ok(WaitpointListResponse {
            pagination: Pagination { next: text(page.next()), previous: text(page.previous()) },
            data: page.waitpoints.iter().map(WaitpointItem::new).collect(),
        })
    };
    app.answers.json(&budget, listed).await
}

/// One waitpoint with what has come of it. With `wait` the answer comes once it is complete, or after so many seconds,
/// or when the server stops.
#[utoipa::path(get, path = "/api/v1/waitpoints/tokens/{waitpoint}", tag = "waitpoints",
    operation_id = "getWaitpoint",
    params(("waitpoint" = String, Path, description = "waitpoint_..."),
        ("wait" = Option<u32>, Query, description = "Seconds to wait for its completion: 0 to 300"),
        ("Prefer" = Option<String>, Header, description = "`wait=` so many seconds, as the parameter")),
    responses((status = 200, description = "The waitpoint", body = WaitpointItem)))]
pub async fn retrieve(
    State(app): State<App>,
    ApiAsker(caller): ApiAsker,
    WaitpointPath(id): WaitpointPath,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
) -> Result<Json<WaitpointItem>, Failure> {
    let patience = model::patience(query.as_deref().unwrap_or_default(), &headers)?;
    let until = app.clock.now().plus(patience);
    let awaited = app.sessions.await_waitpoint(&caller, &id, until).await.map_err(in_wait)?;
    let waitpoint = awaited.into_waitpoint();
    let record = app.sessions.completing_record(&waitpoint).await?;
    Ok(Json(WaitpointItem::with_output(&waitpoint, record.as_ref())))
}

/// Answers a waitpoint: the data is appended to its channel and completes it. The same answer again changes nothing;
/// another one, or one that comes too late, is refused.
#[utoipa::path(post, path = "/api/v1/waitpoints/tokens/{waitpoint}/complete", tag = "waitpoints",
    operation_id = "completeWaitpoint", request_body = CompleteBody,
    params(("waitpoint" = String, Path, description = "waitpoint_...")),
    responses((status = 200, description = "Answered", body = SuccessResponse)))]
pub async fn complete(
    State(app): State<App>,
    ApiAsker(caller): ApiAsker,
    WaitpointPath(id): WaitpointPath,
    JsonObject(body): JsonObject<METERED_MAX>,
) -> Result<Json<SuccessResponse>, Failure> {
    let data = model::complete(&body)?;
    app.sessions.complete_waitpoint(&caller, &id, &data).await.map_err(in_wait)?;
    Ok(Json(SuccessResponse { success: true }))
}
