//! Sessions over REST: create, list, get, change, close, hand over.

use axum::extract::{RawQuery, State};
use axum::response::Response;
use axum::{Extension, Json};
use http::{HeaderMap, StatusCode};

use super::list;
use super::model::{
    self, CloseBody, CreateBody, CreatedResponse, EndAndContinueBody, EndAndContinueResponse, ListResponse,
    Pagination, SessionItem, UpdateBody,
};
use crate::api::App;
use crate::api::error::{Failure, Route};
use crate::api::extract::{ApiAsker, JsonObject, SessionPath};
use crate::domain::{ConnectionBudget, Cursor};

/// Largest body of a create or a change.
const BODY_MAX: usize = 32_768;
/// Largest body of a close.
const CLOSE_MAX: usize = 1024;
/// Longest request key taken over; a longer one is nobody's.
const REQUEST_KEY_MAX: usize = 256;

fn in_load(error: crate::domain::Error) -> Failure {
    Failure::from(error).on(Route::Load)
}

fn in_change(error: crate::domain::Error) -> Failure {
    Failure::from(error).on(Route::Change)
}

/// Creates a session, or answers the one that has the same external id.
#[utoipa::path(post, path = "/api/v1/sessions", tag = "sessions", operation_id = "createSession",
    request_body = CreateBody,
    params(("x-trigger-request-idempotency-key" = Option<String>, Header,
        description = "Makes a retry find the first attempt's session when there is no externalId")),
    responses((status = 201, description = "Created", body = CreatedResponse),
        (status = 200, description = "Was there before", body = CreatedResponse)))]
pub async fn create(
    State(app): State<App>,
    ApiAsker(caller): ApiAsker,
    headers: HeaderMap,
    JsonObject(body): JsonObject<BODY_MAX>,
) -> Result<(StatusCode, Json<CreatedResponse>), Failure> {
    let key = request_key(&headers);
    let created = app.sessions.create(&caller, model::create(&body, key)?).await?;
    let session = &created.session;
    let response = CreatedResponse {
        session: SessionItem::new(session, app.clock.now()),
        run_id: session.current_run_id.to_string(),
        public_access_token: app.auth.session_token(&caller, session).await?,
        is_cached: created.is_cached,
    };
    let status = if created.is_cached { StatusCode::OK } else { StatusCode::CREATED };
    Ok((status, Json(response)))
}

/// Lists sessions, newest first. Filters are ANDed; several values of one are ORed, joined with commas or
/// repeated.
#[utoipa::path(get, path = "/api/v1/sessions", tag = "sessions", operation_id = "listSessions",
    params(("page[size]" = Option<u32>, Query, description = "1 to 100; 20 by default"),
        ("page[after]" = Option<String>, Query, description = "Cursor: older than"),
        ("page[before]" = Option<String>, Query, description = "Cursor: newer than"),
        ("filter[type]" = Option<String>, Query), ("filter[tags]" = Option<String>, Query),
        ("filter[taskIdentifier]" = Option<String>, Query), ("filter[externalId]" = Option<String>, Query),
        ("filter[status]" = Option<String>, Query, description = "ACTIVE, CLOSED, EXPIRED"),
        ("filter[createdAt][period]" = Option<String>, Query, description = "Such as 7d, 12h, 30m"),
        ("filter[createdAt][from]" = Option<String>, Query, description = "Milliseconds or a date, inclusive"),
        ("filter[createdAt][to]" = Option<String>, Query, description = "Milliseconds or a date, inclusive")),
    responses((status = 200, description = "A page", body = ListResponse)))]
pub async fn list(
    State(app): State<App>,
    ApiAsker(caller): ApiAsker,
    Extension(budget): Extension<ConnectionBudget>,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
) -> Result<Response, Failure> {
    let from_sdk = headers.contains_key("trigger-version");
    let now = app.clock.now();
    let query = list::parse(query.as_deref().unwrap_or_default(), now, from_sdk)?;
    let listed = async {
        let page = app.sessions.list(&caller, query.filter, &query.page).await?;
        let step = query.step.saturating_add(1);
        let text = |cursor: Option<Cursor>| cursor.map(|cursor| list::encode(step, &cursor.encode()));
        Ok(ListResponse {
            pagination: Pagination { next: text(page.next()), previous: text(page.previous()) },
            data: page.sessions.iter().map(|session| SessionItem::new(session, now)).collect(),
        })
    };
    app.answers.json(&budget, listed).await
}

/// One session.
#[utoipa::path(get, path = "/api/v1/sessions/{session}", tag = "sessions", operation_id = "getSession",
    params(("session" = String, Path, description = "session_... or an external id")),
    responses((status = 200, description = "The session", body = SessionItem)))]
pub async fn retrieve(
    State(app): State<App>,
    ApiAsker(caller): ApiAsker,
    SessionPath(session): SessionPath,
) -> Result<Json<SessionItem>, Failure> {
    let session = app.sessions.get(&caller, &session).await.map_err(in_load)?;
    Ok(Json(SessionItem::new(&session, app.clock.now())))
}

/// Changes tags, metadata or external id; allowed on closed and expired sessions.
#[utoipa::path(patch, path = "/api/v1/sessions/{session}", tag = "sessions", operation_id = "updateSession",
    request_body = UpdateBody,
    params(("session" = String, Path, description = "session_... or an external id")),
    responses((status = 200, description = "The session", body = SessionItem)))]
pub async fn update(
    State(app): State<App>,
    ApiAsker(caller): ApiAsker,
    SessionPath(session): SessionPath,
    JsonObject(body): JsonObject<BODY_MAX>,
) -> Result<Json<SessionItem>, Failure> {
    let patch = model::update(&body)?;
    let session = app.sessions.update(&caller, &session, patch).await.map_err(in_change)?;
    Ok(Json(SessionItem::new(&session, app.clock.now())))
}

/// Closes a session for ever; of several closes the first wins. The last record of `.out` is then a control record
/// `session-closed`, and of `.in` the message that an agent of the SDK ends on.
#[utoipa::path(post, path = "/api/v1/sessions/{session}/close", tag = "sessions",
    operation_id = "closeSession", request_body = CloseBody,
    params(("session" = String, Path, description = "session_... or an external id")),
    responses((status = 200, description = "The session", body = SessionItem)))]
pub async fn close(
    State(app): State<App>,
    ApiAsker(caller): ApiAsker,
    SessionPath(session): SessionPath,
    JsonObject(body): JsonObject<CLOSE_MAX>,
) -> Result<Json<SessionItem>, Failure> {
    let (reason, calling) = model::close(&body)?;
    let session = app.sessions.close(&caller, &session, reason, calling.as_ref()).await.map_err(in_change)?;
    Ok(Json(SessionItem::new(&session, app.clock.now())))
}

/// Ends the session's run and records the one that goes on in its place. Of several runs that try, the current one wins.
#[utoipa::path(post, path = "/api/v1/sessions/{session}/end-and-continue", tag = "sessions",
    operation_id = "endAndContinueSession", request_body = EndAndContinueBody,
    params(("session" = String, Path, description = "session_... or an external id"),
        ("x-trigger-request-idempotency-key" = Option<String>, Header,
        description = "Makes a retry find the run that the first attempt has started")),
    responses((status = 200, description = "Who runs the session now", body = EndAndContinueResponse)))]
pub async fn end_and_continue(
    State(app): State<App>,
    ApiAsker(caller): ApiAsker,
    SessionPath(session): SessionPath,
    headers: HeaderMap,
    JsonObject(body): JsonObject<CLOSE_MAX>,
) -> Result<Json<EndAndContinueResponse>, Failure> {
    let mut request = model::end_and_continue(&body)?;
    request.request_key = request_key(&headers);
    let handed = app.sessions.end_and_continue(&caller, &session, request).await;
    let handed = handed.map_err(|error| Failure::from(error).on(Route::Handover))?;
    Ok(Json(EndAndContinueResponse { run_id: handed.run.to_string(), swapped: handed.swapped }))
}

fn request_key(headers: &HeaderMap) -> Option<String> {
    let key = headers.get("x-trigger-request-idempotency-key").and_then(|value| value.to_str().ok());
    key.filter(|key| (1..=REQUEST_KEY_MAX).contains(&key.len())).map(str::to_owned)
}
