//! Where signed URLs lead: whoever holds one gets or puts the snapshot of one session.

use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Extension;
use axum::body::Body;
use axum::extract::{FromRequestParts, Path, State};
use axum::response::Response;
use futures_util::{StreamExt, stream};
use http::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_RANGE,
    CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, HeaderName, HeaderValue, IF_RANGE, RANGE,
    X_CONTENT_TYPE_OPTIONS,
};
use http::request::Parts;
use http::{HeaderMap, StatusCode};
use http_body_util::BodyExt;
use tokio::time::Instant;

use super::App;
use super::error::Failure;
use super::extract::require_plain;
use super::rest::model::ErrorBody;
use crate::auth::signed_url::{UrlGrant, UrlMethod};
use crate::domain::blob::{SNAPSHOT_MAX, UNKNOWN_MEDIA_TYPE};
use crate::domain::send_budget::Download;
use crate::domain::{BlobInfo, ByteStream, ConnectionBudget, Error};

/// How often a read begins again because a put came between.
const RETRIES: usize = 16;
/// Longest wait for others to have what they read.
const PLACE_PATIENCE: Duration = Duration::from_secs(10);
/// What an answer says that may hold anything a writer made up: no page of ours, and nobody's to keep.
const GUARDS: [(HeaderName, HeaderValue); 5] = [
    (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    (CONTENT_SECURITY_POLICY, HeaderValue::from_static("sandbox; default-src 'none'")),
    (CONTENT_DISPOSITION, HeaderValue::from_static("attachment")),
    (CACHE_CONTROL, HeaderValue::from_static("private, no-store")),
    (ACCEPT_RANGES, HeaderValue::from_static("bytes")),
];

/// A URL that opens a snapshot to read.
#[derive(Debug)]
pub struct ToGet(UrlGrant);

/// A URL that opens a snapshot to write.
#[derive(Debug)]
pub struct ToPut(UrlGrant);

async fn open(parts: &mut Parts, app: &App, method: UrlMethod) -> Result<UrlGrant, Failure> {
    let path = Path::<String>::from_request_parts(parts, &()).await;
    let Path(token) = path.map_err(|_| Failure::no_route())?;
    let opened = app.auth.open_url(&token, method).await;
    if matches!(opened, Err(Error::Denied(_))) {
        app.admit_stranger(app.stranger(&parts.headers, &parts.extensions))?;
    }
    Ok(opened?)
}

impl FromRequestParts<App> for ToGet {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Failure> {
        open(parts, app, UrlMethod::Get).await.map(Self)
    }
}

impl FromRequestParts<App> for ToPut {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Failure> {
        open(parts, app, UrlMethod::Put).await.map(Self)
    }
}

/// The snapshot, or one range of it.
#[utoipa::path(get, path = "/blobs/v1/{token}", tag = "snapshots", operation_id = "downloadSnapshot",
    params(("token" = String, Path, description = "Of a URL that snapshot-url answered with"),
        ("Range" = Option<String>, Header, description = "One range of bytes; other ones are ignored")),
    responses((status = 200, description = "The bytes, with the type they were put with",
            content((Vec<u8> = "*/*")),
            headers(("ETag" = String), ("Accept-Ranges" = String))),
        (status = 206, description = "The range", content((Vec<u8> = "*/*")),
            headers(("ETag" = String), ("Content-Range" = String))),
        (status = 404, description = "No snapshot was put", body = ErrorBody),
        (status = 416, description = "The range begins behind the end", body = ErrorBody,
            headers(("Content-Range" = String)))))]
pub async fn get(
    State(app): State<App>,
    Extension(budget): Extension<ConnectionBudget>,
    ToGet(grant): ToGet,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let place = place(&budget).await?;
    if let Some(asked) = asked_range(&headers) {
        return get_range(&app, &grant, asked, place).await;
    }
    let blob = app.sessions.read_snapshot(&grant.environment, &grant.session).await?;
    let length = blob.info.length;
    Ok(answer(&blob.info, StatusCode::OK, length, Body::from_stream(placed(blob.bytes, place))))
}

/// Waits for a place among the blobs that are sent at once.
///
/// # Errors
/// 503 after a while: clients choose how long they take, and only those that do not move are cut.
pub async fn place(budget: &ConnectionBudget) -> Result<Download, Failure> {
    let place = tokio::time::timeout(PLACE_PATIENCE, budget.download()).await.ok().flatten();
    Ok(place.ok_or_else(|| Error::unavailable("the store of blobs", "too many blobs are sent at once"))?)
}

/// The bytes of a blob, which keep its place until they are dropped.
pub fn placed(bytes: ByteStream, place: Download) -> ByteStream {
    bytes
        .map(move |piece| {
            let _kept = &place;
            piece
        })
        .boxed()
}

/// As GET, without the bytes.
#[utoipa::path(head, path = "/blobs/v1/{token}", tag = "snapshots", operation_id = "headSnapshot",
    params(("token" = String, Path, description = "Of a URL that snapshot-url answered with")),
    responses((status = 200, description = "The headers", headers(("ETag" = String), ("Content-Length" = u64))),
        (status = 404, description = "No snapshot was put")))]
pub async fn head(State(app): State<App>, ToGet(grant): ToGet) -> Result<Response, Failure> {
    let info = app.sessions.find_snapshot(&grant.environment, &grant.session).await?;
    Ok(answer(&info, StatusCode::OK, info.length, Body::empty()))
}

/// Replaces the snapshot: all of it is stored, with its type, or nothing. At most 33,554,432 bytes.
#[utoipa::path(put, path = "/blobs/v1/{token}", tag = "snapshots", operation_id = "uploadSnapshot",
    params(("token" = String, Path, description = "Of a URL that snapshot-url answered with")),
    request_body(content = Vec<u8>, content_type = "application/vnd.trigger.transcript+ndjson"),
    responses((status = 200, description = "It is stored"),
        (status = 408, description = "The body did not arrive in time", body = ErrorBody),
        (status = 413, description = "The body is over its limit", body = ErrorBody),
        (status = 415, description = "The body is encoded", body = ErrorBody)))]
pub async fn put(
    State(app): State<App>,
    ToPut(grant): ToPut,
    headers: HeaderMap,
    body: Body,
) -> Result<StatusCode, Failure> {
    require_plain(&headers)?;
    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let announced = text(CONTENT_LENGTH).and_then(|text| text.parse::<u64>().ok());
    if announced.is_some_and(|length| length > SNAPSHOT_MAX) {
        return Err(Failure::body_too_large());
    }
    let refusal = Arc::new(OnceLock::new());
    let (pause, whole) = (app.config.body_chunk_timeout, app.config.body_timeout);
    let bytes = pieces(body, pause, whole, refusal.clone());
    let stored =
        app.sessions.put_snapshot(&grant.environment, &grant.session, text(CONTENT_TYPE), bytes).await;
    match stored {
        Ok(()) => Ok(StatusCode::OK),
        Err(Error::TooLarge { .. }) => Err(Failure::body_too_large()),
        Err(error) => Err(refusal.get().cloned().unwrap_or_else(|| error.into())),
    }
}

/// The body as it arrives. What the wire says when it does not is left in `refusal`.
fn pieces(body: Body, pause: Duration, whole: Duration, refusal: Arc<OnceLock<Failure>>) -> ByteStream {
    let deadline = Instant::now() + whole;
    let next = async move |mut body: Body| {
        let refuse = |failure: Failure| {
            let error = Error::malformed("body", failure.message.clone());
            // The stream ends with its first error, so nothing was left there before.
            let _ = refusal.set(failure);
            error
        };
        loop {
            let patience = deadline.min(Instant::now() + pause);
            let frame = tokio::time::timeout_at(patience, body.frame()).await;
            let frame = frame.map_err(|_| refuse(Failure::body_timeout()))?;
            let Some(frame) = frame else { return Ok(None) };
            let frame = frame.map_err(|_| refuse(Failure::bad_request("Request body could not be read")))?;
            if let Ok(data) = frame.into_data() {
                return Ok(Some((data, body)));
            }
        }
    };
    let next = Arc::new(next);
    stream::try_unfold(body, move |body| {
        let next = next.clone();
        async move { next(body).await }
    })
    .boxed()
}

async fn get_range(app: &App, grant: &UrlGrant, asked: Asked, place: Download) -> Result<Response, Failure> {
    for _ in 0..RETRIES {
        let info = app.sessions.find_snapshot(&grant.environment, &grant.session).await?;
        let Some(range) = asked.within(info.length) else { return Ok(unsatisfiable(&info)) };
        let read = app.sessions.read_snapshot_range(&grant.environment, &grant.session, &info, range.clone());
        let Some(bytes) = read.await? else { continue };
        let length = range.end - range.start;
        let body = Body::from_stream(placed(bytes, place));
        let mut response = answer(&info, StatusCode::PARTIAL_CONTENT, length, body);
        let within = format!("bytes {}-{}/{}", range.start, range.end - 1, info.length);
        response.headers_mut().insert(CONTENT_RANGE, value(&within));
        return Ok(response);
    }
    Err(Error::unavailable("the snapshot", "it changed during every attempt to read it").into())
}

fn answer(info: &BlobInfo, status: StatusCode, length: u64, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.extend(GUARDS);
    let kept = HeaderValue::from_str(&info.media_type);
    headers.insert(CONTENT_TYPE, kept.unwrap_or(HeaderValue::from_static(UNKNOWN_MEDIA_TYPE)));
    headers.insert(CONTENT_LENGTH, length.into());
    headers.insert(ETAG, value(&format!("\"{}\"", info.etag)));
    response
}

fn unsatisfiable(info: &BlobInfo) -> Response {
    let failure =
        Failure::new(StatusCode::RANGE_NOT_SATISFIABLE, "range_not_satisfiable", "Range not satisfiable");
    let mut response = failure.render(None);
    response.headers_mut().insert(CONTENT_RANGE, value(&format!("bytes */{}", info.length)));
    response
}

fn value(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).unwrap_or(HeaderValue::from_static(""))
}

/// One range of bytes, as a request spells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    /// From the first to the last of these, or to the end.
    From(u64, Option<u64>),
    /// So many at the end.
    Last(u64),
}

impl Asked {
    /// What of it there is; `None` if nothing.
    fn within(self, length: u64) -> Option<Range<u64>> {
        let range = match self {
            Self::From(first, last) => first..last.map_or(length, |last| last.saturating_add(1).min(length)),
            Self::Last(count) => length.saturating_sub(count)..length,
        };
        (range.start < range.end).then_some(range)
    }
}

/// The range that is asked for. What is none, or more than one, or only for a version that we do not compare, is as not
/// asked, which HTTP allows: the answer is everything.
fn asked_range(headers: &HeaderMap) -> Option<Asked> {
    if headers.contains_key(IF_RANGE) {
        return None;
    }
    let text = headers.get(RANGE)?.to_str().ok()?;
    let (unit, range) = text.split_once('=')?;
    let (first, last) = range.trim().split_once('-')?;
    let number =
        |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u64>().ok()).flatten();
    if !unit.eq_ignore_ascii_case("bytes") {
        return None;
    }
    match (first, last) {
        ("", last) => number(last).map(Asked::Last),
        (first, "") => Some(Asked::From(number(first)?, None)),
        (first, last) => {
            let (first, last) = (number(first)?, number(last)?);
            (first <= last).then_some(Asked::From(first, Some(last)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_range_is_read_and_everything_else_ignored() {
        for (text, asked) in [
            ("bytes=0-0", Some(Asked::From(0, Some(0)))),
            ("Bytes=5-", Some(Asked::From(5, None))),
            ("bytes=-22", Some(Asked::Last(22))),
            ("bytes=2-1", None),
            ("bytes=0-1,3-4", None),
            ("bytes=-", None),
            ("bytes=+1-2", None),
            ("lines=1-2", None),
            ("bytes", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(RANGE, text.parse().expect("a header"));
            assert_eq!(asked_range(&headers), asked, "{text}");
            headers.insert(IF_RANGE, HeaderValue::from_static("\"x\""));
            assert_eq!(asked_range(&headers), None, "{text}");
        }
    }

    #[test]
    fn a_range_is_cut_to_what_there_is() {
        for (asked, length, range) in [
            (Asked::From(0, Some(0)), 3, Some(0..1)),
            (Asked::From(1, Some(u64::MAX)), 3, Some(1..3)),
            (Asked::From(2, None), 3, Some(2..3)),
            (Asked::From(3, None), 3, None),
            (Asked::Last(2), 3, Some(1..3)),
            (Asked::Last(9), 3, Some(0..3)),
            (Asked::Last(0), 3, None),
            (Asked::Last(1), 0, None),
        ] {
            assert_eq!(asked.within(length), range, "{asked:?} of {length}");
        }
    }
}
