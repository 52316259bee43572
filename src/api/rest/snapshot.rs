//! Snapshots over REST: URLs to put and get one, and the transcript inside.

use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::response::Response;
use axum::{Extension, Json};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use serde::Serialize;
use utoipa::ToSchema;

use crate::api::error::{Failure, Route};
use crate::api::extract::{ApiAsker, KeyAsker, SessionPath};
use crate::api::origin::Origin;
use crate::api::{App, blobs};
use crate::auth::signed_url::UrlMethod;
use crate::domain::send_budget::Download;
use crate::domain::transcript::{Transcript, TranscriptQuery};
use crate::domain::{Action, Caller, ConnectionBudget, Error, SessionRef, Violation};

/// Where to put or get a snapshot.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct SnapshotUrlResponse {
    /// Open to whoever holds it, for one session and one method.
    #[schema(format = "uri")]
    pub presigned_url: String,
}

/// Where in the channels the snapshot was taken.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct TranscriptCursorsBody {
    /// Of `out`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub last_out_event_id: Option<String>,
    /// Of `in`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub last_in_event_id: Option<String>,
}

/// A page of a transcript, oldest message first.
#[derive(Debug, ToSchema)]
#[schema(rename_all = "camelCase")]
#[allow(dead_code, reason = "written around messages that are not read; the type documents the answer")]
pub struct TranscriptResponse {
    /// As the agent wrote them: at most 10,000, and at most 8 MiB unless one alone is larger.
    #[schema(max_items = 10_000)]
    messages: Vec<serde_json::Value>,
    /// Absent if the snapshot says none.
    #[schema(nullable = false)]
    cursors: Option<TranscriptCursorsBody>,
    /// What `before` must be for the page of older messages; absent if there are none.
    #[schema(nullable = false)]
    next_cursor: Option<String>,
}

/// What a page says beside its messages.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Rest {
    #[serde(skip_serializing_if = "Option::is_none")]
    cursors: Option<TranscriptCursorsBody>,
    #[serde(skip_serializing_if = "Option::is_none")]
    next_cursor: Option<String>,
}

/// The messages go from the store to the client, piece by piece; everything else is written around them.
fn answer(page: Transcript, place: Download) -> Response {
    let (out, input) = (page.cursors.last_out_event_id, page.cursors.last_in_event_id);
    let any = out.is_some() || input.is_some();
    let cursors = TranscriptCursorsBody { last_out_event_id: out, last_in_event_id: input };
    let rest = Rest { cursors: any.then_some(cursors), next_cursor: page.next_cursor };
    let begin = Bytes::from_static(b"{\"messages\":[");
    let end = match serde_json::to_string(&rest).unwrap_or_default().strip_prefix('{') {
        None | Some("}") => Bytes::from_static(b"]}"),
        Some(rest) => Bytes::from(format!("],{rest}")),
    };
    let length = begin.len() as u64 + page.messages.length + end.len() as u64;
    let around = |bytes| stream::iter([Ok::<_, Error>(bytes)]);
    let body = around(begin).chain(blobs::placed(page.messages.bytes, place)).chain(around(end));
    let mut response = Response::new(Body::from_stream(body));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response.headers_mut().insert(CONTENT_LENGTH, length.into());
    response
}

async fn signed(
    app: &App,
    caller: &Caller,
    session: &SessionRef,
    origin: &Origin,
    method: UrlMethod,
) -> Result<Json<SnapshotUrlResponse>, Failure> {
    let (action, route) = match method {
        UrlMethod::Get => (Action::Read, Route::Load),
        UrlMethod::Put => (Action::Write, Route::Change),
    };
    let found = app.sessions.with_snapshot(caller, action, session).await;
    let session = found.map_err(|error| Failure::from(error).on(route))?;
    let token = app.auth.url_token(caller, &session, method, app.config.url_ttl)?;
    Ok(Json(SnapshotUrlResponse { presigned_url: format!("{}/blobs/v1/{token}", origin.0) }))
}

/// A URL that answers GET and HEAD with the session's snapshot, for 15 minutes unless set otherwise, or for as long as
/// the credentials that ask. It answers 404 until a snapshot was put.
#[utoipa::path(get, path = "/api/v1/sessions/{session}/snapshot-url", tag = "snapshots",
    operation_id = "getSnapshotUrl",
    params(("session" = String, Path, description = "session_... or an external id")),
    responses((status = 200, description = "The URL", body = SnapshotUrlResponse)))]
pub async fn url_to_get(
    State(app): State<App>,
    ApiAsker(caller): ApiAsker,
    origin: Origin,
    SessionPath(session): SessionPath,
) -> Result<Json<SnapshotUrlResponse>, Failure> {
    signed(&app, &caller, &session, &origin, UrlMethod::Get).await
}

/// A URL to PUT the session's snapshot to, at most 33,554,432 bytes; valid as the one to get it. On closed and expired
/// sessions too, because the last turn's snapshot may come after the close.
#[utoipa::path(put, path = "/api/v1/sessions/{session}/snapshot-url", tag = "snapshots",
    operation_id = "createSnapshotUploadUrl",
    params(("session" = String, Path, description = "session_... or an external id")),
    responses((status = 200, description = "The URL", body = SnapshotUrlResponse)))]
pub async fn url_to_put(
    State(app): State<App>,
    ApiAsker(caller): ApiAsker,
    origin: Origin,
    SessionPath(session): SessionPath,
) -> Result<Json<SnapshotUrlResponse>, Failure> {
    signed(&app, &caller, &session, &origin, UrlMethod::Put).await
}

/// The transcript in the session's snapshot: the newest `limit` messages before the one with the id `before`, or before
/// the end; oldest first within the page. A page has at most 10,000 messages and 8 MiB, or one message that is larger:
/// `nextCursor` leads to what is older. Empty if there is no snapshot, or no message `before`. A message whose id is
/// longer than 4,096 bytes is left out, as one without an id is.
#[utoipa::path(get, path = "/api/v1/sessions/{session}/transcript", tag = "snapshots",
    operation_id = "getTranscript",
    params(("session" = String, Path, description = "session_... or an external id"),
        ("limit" = Option<i64>, Query, description = "Messages at most; as many as a page has if it is not positive"),
        ("before" = Option<String>, Query, description = "Id of a message; `nextCursor` of a page")),
    responses((status = 200, description = "A page", body = TranscriptResponse)))]
pub async fn transcript(
    State(app): State<App>,
    Extension(budget): Extension<ConnectionBudget>,
    KeyAsker(caller): KeyAsker,
    SessionPath(session): SessionPath,
    RawQuery(query): RawQuery,
) -> Result<Response, Failure> {
    let query = parse(query.as_deref().unwrap_or_default())?;
    let place = blobs::place(&budget).await?;
    let page = app.sessions.transcript(&caller, &session, &query).await;
    Ok(answer(page.map_err(|error| Failure::from(error).on(Route::Load))?, place))
}

fn parse(query: &str) -> Result<TranscriptQuery, Failure> {
    let mut parsed = TranscriptQuery::default();
    for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
        match &*name {
            "limit" => {
                let limit: i64 = value.parse().map_err(|_| {
                    Failure::query(&[Violation {
                        field: "limit".to_owned(),
                        message: "must be an integer".to_owned(),
                    }])
                })?;
                parsed.limit = usize::try_from(limit).ok().filter(|limit| *limit > 0);
            }
            "before" => parsed.before = Some(value.into_owned()),
            _ => {}
        }
    }
    Ok(parsed)
}
